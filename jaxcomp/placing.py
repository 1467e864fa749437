"""Where ``compress`` computes and where it keeps things: the default device, or a mesh.

On a mesh,

- a batch's values are split along their leading axis over as many mesh axes as divide it;
- a weight to compress is a matrix whose rows (outputs) are split over all mesh axes where they
  divide, so that the column loops, the searches and the masks, which treat rows alone, need nothing
  from other devices; each device's rows are read from the host by themselves;
- statistics, and whatever else all rows or batches need, are on every device: the sums over the
  batch are added up across devices by XLA;
- what is read again later (activations between steps, finished weights) waits in host memory.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcomp import formats, host
from jaxcomp.errors import JaxcompError


class Here:
    """The default device, where everything stays. The other places have the same methods."""

    def context(self) -> contextlib.AbstractContextManager:
        """What the run happens in."""
        return contextlib.nullcontext()

    def abstract(self, tree: Any) -> Any:
        """What the model is traced with in place of parameters or inputs."""
        return tree

    def inputs(self, value: Any) -> Any:
        """A calibration input, as it waits for its turn."""
        return host.to_device(value)

    def load(self, value: Any) -> Any:
        """A batch's value, to compute with."""
        return value

    def keep(self, value: Any) -> Any:
        """A batch's value that was computed and will be read later."""
        return value

    def shared(self, tree: Any) -> Any:
        """Values that all batches or all rows need."""
        return tree

    def matrix(self, leaf: Any, axes: Sequence[Sequence[int]]) -> jax.Array:
        """A leaf as a float32 (or float64) matrix, read from the host once.

        Args:
          leaf: dense, device or host array.
          axes: its stack, out and in axes.

        Returns:
          ``(*stack, out, in)``.
        """
        matrix = formats.to_matrix(host.numpy(leaf), *axes)
        dtype = _wide(matrix.dtype)
        if isinstance(matrix, np.ndarray) and not (
            matrix.dtype == dtype and matrix.flags.c_contiguous
        ):
            whole = host.empty(matrix.shape, dtype)
            whole[...] = matrix
            matrix = whole
        return host.to_device(matrix.astype(dtype, copy=False))

    def finished(self, tree: Any) -> Any:
        """A compressed weight, as it waits for the end of the run."""
        return tree

    def jit(self, function: Callable) -> Callable:
        """Compiles a function whose results are ``shared``."""
        return jax.jit(function)


class OnMesh(Here):
    """The devices of a mesh; see the module.

    Attributes:
      mesh: the same devices and names with axes of type Auto, whatever the caller's are: XLA
        decides how values between the ones placed here are split.
    """

    def __init__(self, mesh: Any):
        if not isinstance(mesh, Mesh):
            raise JaxcompError(
                f"compress(mesh=..) is a {type(mesh).__name__}; give a jax.sharding.Mesh of "
                "devices, such as jax.make_mesh((jax.device_count(),), ('data',))"
            )
        if mesh.empty or mesh.is_multi_process:
            raise JaxcompError(
                f"compress(mesh=..) with the axes {dict(mesh.shape)} "
                + (
                    "has no devices"
                    if mesh.empty
                    else "has devices of several processes, which compress does not support; give "
                    "a mesh of jax.local_devices()"
                )
            )
        kinds = (AxisType.Auto,) * len(mesh.axis_names)
        self.mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)

    def context(self) -> contextlib.AbstractContextManager:
        """Names the mesh, for models that constrain how their values are split."""
        return jax.set_mesh(self.mesh)

    def abstract(self, tree: Any) -> Any:
        """Shapes without the caller's shardings."""
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype) if hasattr(a, "dtype") else a, tree
        )

    def inputs(self, value: Any) -> Any:
        """Kept on the host."""
        return self.keep(value)

    def load(self, value: Any) -> Any:
        """Split along the leading axis."""
        entries = self._dividing(value.shape[0]) if value.ndim else ()
        return jax.device_put(value, self._sharding(entries or None))

    def keep(self, value: Any) -> Any:
        """In host memory; keys of random numbers stay where they are."""
        return value if _is_key(value) else np.asarray(value)

    def shared(self, tree: Any) -> Any:
        """On every device."""
        return jax.device_put(tree, self._sharding())

    def matrix(self, leaf: Any, axes: Sequence[Sequence[int]]) -> jax.Array:
        """Split over rows, or the stack where that takes more devices; read shard by shard."""
        matrix = formats.to_matrix(np.asarray(leaf), *axes)
        dtype = jax.dtypes.canonicalize_dtype(_wide(matrix.dtype))
        choices = {axis: self._dividing(matrix.shape[axis]) for axis in range(matrix.ndim - 1)}
        sizes = {axis: math.prod(self.mesh.shape[n] for n in c) for axis, c in choices.items()}
        best = max(choices, key=lambda axis: (sizes[axis], axis))
        entries = [None] * matrix.ndim
        entries[best] = choices[best] or None
        return jax.make_array_from_callback(
            matrix.shape,
            self._sharding(*entries),
            lambda index: matrix[index].astype(dtype, copy=False),
        )

    def finished(self, tree: Any) -> Any:
        """In host memory."""
        return jax.tree.map(np.asarray, tree)

    def jit(self, function: Callable) -> Callable:
        """Results are on every device."""
        return jax.jit(function, out_shardings=self._sharding())

    def _dividing(self, size: int) -> tuple[str, ...]:
        """The first mesh axes, as many as divide a size together."""
        names: tuple[str, ...] = ()
        devices = 1
        for name, count in self.mesh.shape.items():
            if size % (devices * count):
                break
            names, devices = (*names, name), devices * count
        return names

    def _sharding(self, *entries: Any) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*entries))


def place(mesh: Any) -> Here:
    """The place that ``compress(mesh=..)`` asks for.

    Args:
      mesh: a ``jax.sharding.Mesh``, or None for the default device.

    Returns:
      The place.

    Raises:
      JaxcompError: not a mesh of devices of this process.
    """
    return Here() if mesh is None else OnMesh(mesh)


def ahead(load: Callable[[int], Any], count: int) -> Iterator[Any]:
    """What ``load`` gives for 0 .. count - 1, the next always asked for before one is used.

    Transfers to devices run in the background, so the next batch travels during the computation.

    Args:
      load: gives values of a batch.
      count: number of batches.

    Yields:
      The values of each batch.
    """
    following = load(0) if count else None
    for b in range(count):
        given, following = following, load(b + 1) if b + 1 < count else None
        yield given


def _wide(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended)
