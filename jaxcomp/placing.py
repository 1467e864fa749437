"""Where ``compress`` computes and where it keeps things: the default device, or a mesh.

On a mesh,

- a batch's values are split along their leading axis over as many mesh axes as divide it;
- a weight to compress is a matrix whose rows (outputs) are split over all mesh axes where they
  divide, so that the column loops, the searches and the masks, which treat rows alone, need nothing
  from other devices; each device's rows are read from the host by themselves;
- a finished weight is split over its outputs while batches are evaluated with it;
- statistics, and whatever else all rows or batches need, are on every device: the sums over the
  batch are added up across devices by XLA;
- what is read again later (activations between steps, finished weights) waits in host memory.

A mesh may have devices of several processes. All of them then run the same program: each holds the
parts of weights, inputs and activations that its devices compute with, and finished weights whole.
What Python decides on (counts of masks, NaN, branches) is the same on all of them.

Where these devices are CPUs, each process sums its own tokens by itself, which are added up once
for each input; of a stack it takes some matrices rather than some rows of all, and with them their
Hessians; and finished weights are whole on each device if that spares exchanges (all batches
are split over all devices): the memory is the process's own, which has them anyway. XLA would
split them there too, as it does for batches that do not reach all devices, with the same numbers
and for the same processor time (within the noise of ``benchmarks.scale``); it would move them, or
what they are multiplied with, between the processes once more.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcomp import calibration, formats, host
from jaxcomp.errors import JaxcompError


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A batch's value that is spread over processes: what this one holds of it, in host memory.

    Attributes:
      shape: of the whole value.
      sharding: how the mesh splits it.
      pieces: by position (start and end along each axis) what the devices of this process hold.
    """

    shape: tuple[int, ...]
    sharding: NamedSharding
    pieces: dict[tuple[tuple[int, int], ...], np.ndarray]

    @classmethod
    def of(cls, value: jax.Array) -> "Waiting":
        """Copies to the host what this process holds; equal parts on several devices once."""
        shards = {_bounds(s.index, value.shape): s.data for s in value.addressable_shards}
        pieces = {at: np.asarray(data) for at, data in shards.items()}
        return cls(value.shape, value.sharding, pieces)

    def own(self) -> list[np.ndarray]:
        """Those pieces that no process with a lower index holds as well."""
        holders: dict[tuple[tuple[int, int], ...], int] = {}
        for device, index in self.sharding.devices_indices_map(self.shape).items():
            at = _bounds(index, self.shape)
            holders[at] = min(device.process_index, holders.get(at, device.process_index))
        return [p for at, p in self.pieces.items() if holders[at] == jax.process_index()]

    def load(self) -> jax.Array:
        """The value on its devices."""
        return jax.make_array_from_callback(
            self.shape, self.sharding, lambda index: self.pieces[_bounds(index, self.shape)]
        )


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


class Here:
    """The default device, where everything stays. The other places have the same methods.

    Attributes:
      mesh: None.
      processes: indices of the processes that take part, ascending.
      hosts: whether they are several that compute on CPUs; ``own`` and ``summed`` are for these.
    """

    mesh: Mesh | None = None
    hosts: bool = False

    @property
    def processes(self) -> tuple[int, ...]:
        """This one."""
        return (jax.process_index(),)

    def context(self) -> contextlib.AbstractContextManager:
        """What the run happens in."""
        return contextlib.nullcontext()

    def abstract(self, tree: Any) -> Any:
        """What the model is traced with in place of parameters or inputs."""
        return tree

    def parameter(self, leaf: Any) -> Any:
        """A leaf of the model, where it lies."""
        return leaf

    def inputs(self, value: Any) -> Any:
        """A calibration input, as it waits for its turn."""
        return host.to_device(value)

    def load(self, value: Any) -> Any:
        """A batch's value, to compute with."""
        return value

    def keep(self, value: Any) -> Any:
        """A batch's value that was computed and will be read later."""
        return value

    def item(self, value: Any, position: int) -> Any:
        """A kept value's item along its leading axis, kept in its turn."""
        return value[position]

    def stack(self, values: Sequence[Any]) -> Any:
        """Kept values of one batch along a new leading axis."""
        return jnp.stack(values)

    def shared(self, tree: Any) -> Any:
        """Values that all batches or all rows need."""
        return tree

    def rereads(self, leaf: Any) -> bool:
        """Whether ``matrix`` costs so little that it is called whenever the matrix is read."""
        return jax.default_backend() == "cpu" and not isinstance(leaf, jax.Array)

    def takes_apart(self) -> bool:
        """Whether a stack of matrices is better compressed one by one: its peak is the host's."""
        return jax.default_backend() == "cpu"

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

    def weight(self, array: formats.CompressedArray) -> jax.Array:
        """A compressed weight made dense, once for all batches that are evaluated with it."""
        return jax.jit(_dense)(array)

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
        axes = dict(mesh.shape)
        if mesh.empty:
            raise JaxcompError(f"compress(mesh=..) with the axes {axes} has no devices")
        self._processes = tuple(sorted({d.process_index for d in mesh.devices.flat}))
        if jax.process_index() not in self._processes:
            raise JaxcompError(
                f"compress(mesh=..) with the axes {axes} has devices of the processes "
                f"{self._processes} and none of this one, {jax.process_index()}; call it on these "
                "processes only, or give a mesh of all jax.devices()"
            )
        kinds = (AxisType.Auto,) * len(mesh.axis_names)
        self.mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
        on_cpus = all(d.platform == "cpu" for d in mesh.devices.flat)
        self.hosts = on_cpus and len(self._processes) > 1
        self._data_parallel = self.hosts  # Until an input is seen that not all devices split.

    @property
    def processes(self) -> tuple[int, ...]:
        """Those whose devices the mesh has."""
        return self._processes

    def context(self) -> contextlib.AbstractContextManager:
        """Names the mesh, for models that constrain how their values are split."""
        return jax.set_mesh(self.mesh)

    def abstract(self, tree: Any) -> Any:
        """Shapes without the caller's shardings."""
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype) if hasattr(a, "dtype") else a, tree
        )

    def parameter(self, leaf: Any) -> Any:
        """Where it lies, as an array whose axes are Auto."""
        return _auto(leaf)

    def inputs(self, value: Any) -> Any:
        """Kept on the host."""
        if not _is_key(value) and np.ndim(value):
            split = math.prod(self.mesh.shape[n] for n in self._dividing(np.shape(value)[0]))
            self._data_parallel &= split == self.mesh.size
        return self.keep(_auto(value))

    def load(self, value: Any) -> Any:
        """Split along the leading axis."""
        if isinstance(value, Waiting):
            return value.load()
        return _put(value, self._split(value))

    def keep(self, value: Any) -> Any:
        """In host memory; keys of random numbers stay where they are."""
        if _is_key(value):
            return value
        if not _is_global(value):
            return np.asarray(value)
        value = _put(value, self._split(value))
        return np.asarray(value) if value.is_fully_replicated else Waiting.of(value)

    def item(self, value: Any, position: int) -> Any:
        """In host memory."""
        return self.keep(value.load()[position] if isinstance(value, Waiting) else value[position])

    def own(self, value: Any) -> list[np.ndarray]:
        """What of a kept value is this process's to count: over all of them it is each part once.

        Args:
          value: has at least one axis.

        Returns:
          Parts along the leading axis; they may be empty.
        """
        if isinstance(value, Waiting):
            return value.own()
        rank = self._processes.index(jax.process_index())
        return [np.array_split(np.asarray(value), len(self._processes))[rank]]

    def summed(self, statistics: calibration.Statistics) -> calibration.Statistics:
        """Statistics of all processes' tokens, from those of this one's; NumPy's in and out.

        Each sum is made once, in one order, and sent to all: they get the same bits.
        """
        devices = {d.process_index: d for d in self.mesh.devices.flat[::-1]}
        one_each = Mesh(np.array([devices[p] for p in self._processes]), ("process",))
        split = NamedSharding(one_each, PartitionSpec("process"))

        def spread(a):
            own = jax.device_put(np.asarray(a)[None], devices[jax.process_index()])
            shape = (len(self._processes), *own.shape[1:])
            return jax.make_array_from_single_device_arrays(shape, split, [own])

        everywhere = NamedSharding(one_each, PartitionSpec())
        with jax.set_mesh(one_each):
            add = jax.jit(calibration.total, out_shardings=everywhere)
            return jax.tree.map(np.asarray, add(jax.tree.map(spread, statistics)))

    def stack(self, values: Sequence[Any]) -> Any:
        """In host memory."""
        if any(isinstance(v, Waiting) or _is_global(v) for v in values):
            values = [self.load(v) for v in values]
        return self.keep(jnp.stack(values))

    def shared(self, tree: Any) -> Any:
        """On every device."""
        everywhere = self._sharding()
        if everywhere.is_fully_addressable:
            return jax.device_put(tree, everywhere)
        return jax.tree.map(lambda a: _put(a, everywhere), tree)

    def rereads(self, leaf: Any) -> bool:
        """False: its parts travel to the devices."""
        return False

    def takes_apart(self) -> bool:
        """False: devices share a stack."""
        return False

    def matrix(self, leaf: Any, axes: Sequence[Sequence[int]]) -> jax.Array:
        """Split over rows, or the stack where that takes more devices; read shard by shard."""
        leaf, as_matrix = _auto(leaf), functools.partial(_matrix, axes)
        stack, out, in_ = ([leaf.shape[a] for a in given] for given in axes)
        shape = (*stack, math.prod(out), math.prod(in_))
        dtype = jax.dtypes.canonicalize_dtype(_wide(leaf.dtype))
        best, names = self._split_axis(shape[:-1])
        sharding = self._sharding(*(None,) * best, names or None)
        if _is_global(leaf):
            return jax.jit(lambda a: as_matrix(a).astype(dtype), out_shardings=sharding)(leaf)
        if isinstance(leaf, jax.Array):
            leaf = np.asarray(leaf)

        def read(index):
            part, rest = _of_leaf(index, leaf.shape, axes)
            return as_matrix(np.asarray(leaf[part]))[rest].astype(dtype, copy=False)

        return jax.make_array_from_callback(shape, sharding, read)

    def parts(self, shape: Sequence[int], axes: Sequence[Sequence[int]]) -> list[tuple[slice, ...]]:
        """What this process is the first to read when all call ``matrix``, in the leaf's own axes.

        Args:
          shape: of the leaf.
          axes: its stack, out and in axes.

        Returns:
          Positions; over all processes they hold each element once.
        """
        stack, out, _ = axes
        sizes = (*(shape[a] for a in stack), math.prod(shape[a] for a in out))
        best, names = self._split_axis(sizes)
        if names:
            sharding = self._sharding(names)
            holders: dict[tuple[int, int], int] = {}
            for device, (rows,) in sharding.devices_indices_map(sizes[best : best + 1]).items():
                at = rows.indices(sizes[best])[:2]
                holders[at] = min(device.process_index, holders.get(at, device.process_index))
            found = sorted(at for at, holder in holders.items() if holder == jax.process_index())
        else:
            rank, count = self._processes.index(jax.process_index()), len(self._processes)
            found = [(sizes[best] * rank // count, sizes[best] * (rank + 1) // count)]
        axis = (*stack, *out[:1])[best] if best < len(stack) or out else None
        if axis is None:  # A row alone.
            return [(slice(None),) * len(shape)] if any(b > a for a, b in found) else []
        each = max(1, sizes[best] // max(1, shape[axis]))
        return [(slice(None),) * axis + (slice(-(-a // each), -(-b // each)),) for a, b in found]

    def _split_axis(self, sizes: Sequence[int]) -> tuple[int, tuple[str, ...]]:
        """By which of a matrix's axes, stack and rows, devices share it, and over which names."""
        choices = [self._dividing(size) for size in sizes]
        devices = [math.prod(self.mesh.shape[n] for n in names) for names in choices]
        # Processes that each take some experts share the work on statistics too.
        best = max(range(len(sizes)), key=lambda k: (devices[k], -k if self.hosts else k))
        return best, choices[best]

    def weight(self, array: formats.CompressedArray) -> jax.Array:
        """Split over outputs, or the stack where that takes more devices.

        XLA gathers what is smaller, the weight or the batch that it is multiplied with. Neither
        where each CPU has all of the weight and a part of each batch.
        """
        if self._data_parallel:
            return jax.jit(_dense, out_shardings=self._sharding())(self.shared(array))
        choices = [
            (self._dividing(size), kind == "dim", axis)
            for axis, (size, (kind, index)) in enumerate(
                zip(array.shape, array._layout(), strict=True)
            )
            if kind == "stack" or index in array.out_axes[:1]
        ]
        devices = lambda names: math.prod(self.mesh.shape[n] for n in names)  # noqa: E731
        most = lambda choice: (devices(choice[0]), choice[1])  # noqa: E731
        names, _, axis = max(choices, key=most, default=((), False, 0))
        spec = (*(None,) * axis, names or None)
        return jax.jit(_dense, out_shardings=self._sharding(*spec))(self.shared(array))

    def finished(self, tree: Any) -> Any:
        """In host memory, whole."""
        return host.fetch(tree)

    def jit(self, function: Callable) -> Callable:
        """Results are on every device."""
        return jax.jit(function, out_shardings=self._sharding())

    def _split(self, value: Any) -> NamedSharding:
        """How a batch's value is split: along its leading axis."""
        shape = np.shape(value)  # Also of a number, which a loop may start with.
        names = self._dividing(shape[0]) if shape else ()
        return self._sharding(names) if names else self._sharding()

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


def _matrix(axes: Sequence[Sequence[int]], leaf: Any) -> Any:
    return formats.to_matrix(leaf, *axes)


def _of_leaf(
    index: tuple[slice, ...], shape: Sequence[int], axes: Sequence[Sequence[int]]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a part of a leaf's matrix lies in the leaf, and in the matrix of that part."""
    stack, out, _ = axes
    found = [slice(None)] * len(shape)
    for axis, positions in zip(stack, index, strict=False):
        found[axis] = positions
    rest = (slice(None),) * len(stack)
    first, end, _ = index[len(stack)].indices(math.prod(shape[a] for a in out))
    each = max(1, math.prod(shape[a] for a in out[1:]))
    if not out or first % each or end % each:  # From within one position of the first axis.
        return tuple(found), (*rest, index[len(stack)])
    found[out[0]] = slice(first // each, end // each)
    return tuple(found), rest


def _put(value: Any, sharding: NamedSharding) -> Any:
    """Places a value that every process has whole, or that they hold parts of."""
    if sharding.is_fully_addressable or _is_global(value):
        return jax.device_put(value, sharding)
    if _is_key(value):
        data = _put(jax.random.key_data(value), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    # Unlike jax.device_put this compares nothing between the processes.
    dtype = jax.dtypes.canonicalize_dtype(getattr(value, "dtype", np.asarray(value).dtype))
    value = np.asarray(value, dtype)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _auto(value: Any) -> Any:
    """The same buffers under a mesh of Auto axes, for an array over several processes."""
    if not _is_global(value) or not isinstance(value.sharding, NamedSharding):
        return value
    mesh = value.sharding.mesh
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    sharding = NamedSharding(
        Mesh(mesh.devices, mesh.axis_names, axis_types=kinds), value.sharding.spec
    )
    buffers = [shard.data for shard in value.addressable_shards]
    return jax.make_array_from_single_device_arrays(value.shape, sharding, buffers)


def _is_global(value: Any) -> bool:
    return isinstance(value, jax.Array) and not value.is_fully_addressable


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


def _dense(array: formats.CompressedArray) -> jax.Array:
    return array.materialize()


def _wide(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended)
