"""Compressed arrays: sums of parts with the logical shape and dtype of a weight."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.meta import AxisMetadata
from jax.sharding import NamedSharding

from jaxcomp.errors import JaxcompError
from jaxcomp.formats import base


def to_matrix(
    leaf: Any, stack_axes: Sequence[int], out_axes: Sequence[int], in_axes: Sequence[int]
) -> Any:
    """A dense leaf as the canonical matrix.

    Args:
      leaf: array (JAX or NumPy, which stays NumPy) of any layout.
      stack_axes: axes of the leaf that become the leading stack axes, in that order.
      out_axes: axes that are flattened into ``out``, in that order.
      in_axes: axes that are flattened into ``in``, in that order.

    Returns:
      ``(*stack, out, in)``.

    Raises:
      JaxcompError: when the axes are not each axis of the leaf once.

    Example:
      >>> import numpy as np
      >>> to_matrix(np.zeros((3, 5, 2)), (), (1, 2), (0,)).shape
      (10, 3)
    """
    axes = (*stack_axes, *out_axes, *in_axes)
    if sorted(axes) != list(range(np.ndim(leaf))):
        raise JaxcompError(
            f"array {np.shape(leaf)}: stack_axes {tuple(stack_axes)}, out_axes {tuple(out_axes)} "
            f"and in_axes {tuple(in_axes)} must name each of its {np.ndim(leaf)} axes once."
        )
    moved = leaf.transpose(axes)
    stack = moved.shape[: len(stack_axes)]
    out = math.prod(leaf.shape[a] for a in out_axes)
    return moved.reshape(*stack, out, math.prod(leaf.shape[a] for a in in_axes))


@dataclasses.dataclass(frozen=True, eq=False)
class CompressedArray:
    """A weight stored as a sum of parts, W = parts[0] + parts[1] + ...

    A pytree whose leaves are the parts' arrays. It can stand where an array stands: ``jnp``
    functions materialize it (``__jax_array__``). Slicing the leaves along a leading axis
    (``lax.scan``, ``vmap``, ``jax.tree.map(lambda a: a[i], ..)``) takes the first stack axis away,
    stacking them adds one.

    Attributes:
      parts: parts of equal shape ``(*stack, out, in)``.
      dtype: logical dtype, what ``materialize`` returns.
      dims: shape of the leaf without its stack axes.
      out_axes: axes of ``dims`` that make ``out``, in the order in which they are flattened.
      in_axes: axes of ``dims`` that make ``in``, in the order in which they are flattened.
      stack_axes: positions of the stack axes in the full leaf, in the order of the matrix's stack
        axes.
      split: mesh axes of the full ``(*stack, out, in)`` on a mesh of Auto axes, as ``prepare`` of
        ``dispatch`` notes them: a traced function cannot see it, and kernels have to know it.
    """

    parts: tuple[Any, ...]
    dtype: Any
    dims: tuple[int, ...]
    out_axes: tuple[int, ...]
    in_axes: tuple[int, ...]
    stack_axes: tuple[int, ...] = ()
    split: NamedSharding | None = None

    @classmethod
    def from_matrix(
        cls,
        parts: Any,
        leaf_shape: Sequence[int],
        dtype: Any,
        stack_axes: Sequence[int] = (),
        out_axes: Sequence[int] = (0,),
        in_axes: Sequence[int] = (1,),
    ) -> "CompressedArray":
        """Makes a compressed array of parts in the canonical view of a leaf.

        Args:
          parts: one part or a sequence of them, each ``(*stack, out, in)``.
          leaf_shape: shape of the dense leaf.
          dtype: dtype of the dense leaf.
          stack_axes: axes of the leaf that are the parts' stack axes.
          out_axes: axes of the leaf that make ``out``.
          in_axes: axes of the leaf that make ``in``.

        Returns:
          The compressed array, ``shape == leaf_shape``.

        Raises:
          JaxcompError: when a part does not have the shape that the leaf asks for.
        """
        parts = tuple(parts) if isinstance(parts, (tuple, list)) else (parts,)
        leaf_shape = tuple(int(n) for n in leaf_shape)
        rank = len(leaf_shape)
        stack_axes, out_axes, in_axes = (
            tuple(a % rank for a in axes) for axes in (stack_axes, out_axes, in_axes)
        )
        if sorted((*stack_axes, *out_axes, *in_axes)) != list(range(rank)):
            raise JaxcompError(
                f"array {leaf_shape}: stack_axes {stack_axes}, out_axes {out_axes} and in_axes "
                f"{in_axes} must name each of its {rank} axes once."
            )
        wanted = (
            *(leaf_shape[a] for a in stack_axes),
            math.prod(leaf_shape[a] for a in out_axes),
            math.prod(leaf_shape[a] for a in in_axes),
        )
        if not parts:
            raise JaxcompError(f"array {leaf_shape}: a compressed array needs at least one part.")
        for part in parts:
            if tuple(part.shape) != wanted:
                raise JaxcompError(
                    f"array {leaf_shape}: its matrix is {wanted}, but a part of type "
                    f"{type(part).__name__} has shape {tuple(part.shape)}; "
                    "make the part for that matrix."
                )
        rest = [a for a in range(rank) if a not in stack_axes]
        return cls(
            parts,
            dtype=jnp.dtype(dtype),
            dims=tuple(leaf_shape[a] for a in rest),
            out_axes=tuple(rest.index(a) for a in out_axes),
            in_axes=tuple(rest.index(a) for a in in_axes),
            stack_axes=stack_axes,
        )

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the stack axes that are there now."""
        return tuple(self.parts[0].shape[:-2])

    @property
    def first_axis(self) -> int | None:
        """Where the first stack axis that is there now lies in the full leaf; None without one."""
        return self.stack_axes[-len(self.stack)] if self.stack else None

    def _layout(self) -> list[tuple[str, int]]:
        """The axes of the leaf as ("stack" | "dim", index), with sliced stack axes gone."""
        dims = iter(("dim", i) for i in range(len(self.dims)))
        full = len(self.dims) + len(self.stack_axes)
        where = {axis: i for i, axis in enumerate(self.stack_axes)}
        gone = len(self.stack_axes) - len(self.stack)
        layout = [("stack", where[a] - gone) if a in where else next(dims) for a in range(full)]
        layout = [(kind, i) for kind, i in layout if i >= 0]
        return [("stack", i) for i in range(-gone)] + layout

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape of the leaf."""
        sizes = {"stack": self.stack, "dim": self.dims}
        return tuple(sizes[kind][i] for kind, i in self._layout())

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.stack) + len(self.dims)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbits(self) -> int:
        """Exact stored bits of all parts."""
        return sum(part.nbits for part in self.parts)

    def matrix(self, dtype: Any = None) -> jax.Array:
        """The canonical matrix ``(*stack, out, in)``, the sum of the parts.

        Args:
          dtype: of the result; None is the logical dtype. Parts are summed in float32 (float64 when
            asked for).

        Returns:
          A dense array.
        """
        dtype = self.dtype if dtype is None else dtype
        wide = jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32
        if len(self.parts) == 1:
            return self.parts[0].materialize(dtype)
        total = self.parts[0].materialize(wide)
        for part in self.parts[1:]:
            total = total + part.materialize(wide)
        return total.astype(dtype)

    @functools.partial(jax.jit, inline=True)
    def materialize(self) -> jax.Array:
        """The dense leaf, of ``shape`` and ``dtype``."""
        stack = self.stack
        flat = [*self.out_axes, *self.in_axes]
        value = self.matrix().reshape(*stack, *(self.dims[a] for a in flat))
        source = {("stack", i): i for i in range(len(stack))}
        source |= {("dim", a): len(stack) + i for i, a in enumerate(flat)}
        return value.transpose([source[axis] for axis in self._layout()])

    def replace(self, **changes: Any) -> "CompressedArray":
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)

    def __jax_array__(self) -> jax.Array:
        """The dense leaf, for ``jnp`` functions."""
        return self.materialize()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The dense leaf, for NumPy functions."""
        dense = np.asarray(self.materialize())
        return dense if dtype is None else dense.astype(dtype)

    def astype(self, dtype: Any) -> "CompressedArray":
        """The same parts under another logical dtype."""
        return self.replace(dtype=jnp.dtype(dtype))

    def __getitem__(self, index: Any) -> Any:
        """``[...]`` and ``[:]`` give it back; an integer on a leading stack axis slices the parts.

        Anything else is the index into the dense leaf.
        """
        plain = index if isinstance(index, tuple) else (index,)
        if all(i is Ellipsis or (isinstance(i, slice) and i == slice(None)) for i in plain):
            return self
        leading = self._layout()[:1] == [("stack", 0)]
        if leading and isinstance(index, (int, np.integer)) and not isinstance(index, bool):
            if not -self.shape[0] <= index < self.shape[0]:
                raise IndexError(f"index {index} is out of bounds for axis 0, size {self.shape[0]}")
            return jax.tree.map(lambda a: a[index], self)
        return self.materialize()[index]

    def __len__(self) -> int:
        """Size of the leading axis."""
        return self.shape[0]

    def __iter__(self) -> Any:
        """Slices along the leading axis."""
        return (self[i] for i in range(len(self)))

    @property
    def T(self) -> jax.Array:
        """The dense leaf transposed."""
        return self.materialize().T

    def __matmul__(self, other: Any) -> jax.Array:
        """The dense leaf times ``other``."""
        return self.materialize() @ other

    def __rmatmul__(self, other: Any) -> jax.Array:
        """``other`` times the dense leaf."""
        return other @ self.materialize()

    # Flax Linen's protocol for boxed variables (``AxisMetadata``, registered below): a parameter is
    # unboxed where a module reads it, so an unmodified Linen layer runs on a compressed array.

    def unbox(self) -> jax.Array:
        """The dense leaf, for a Linen module that reads it."""
        return self.materialize()

    def replace_boxed(self, value: Any) -> Any:
        """What a Linen module wrote in its place."""
        return value

    def add_axis(self, index: int, params: Any) -> "CompressedArray":
        """Nothing to do: stack axes are read from the arrays."""
        del index, params
        return self

    def remove_axis(self, index: int, params: Any) -> "CompressedArray":
        """Nothing to do: stack axes are read from the arrays."""
        del index, params
        return self

    def __repr__(self) -> str:
        """The names of the parts, the logical dtype and shape."""
        names = " + ".join(type(part).__name__ for part in self.parts)
        try:
            return f"CompressedArray({names}, {jnp.dtype(self.dtype).name}{list(self.shape)})"
        except Exception:
            # Leaves may be anything (shardings, axis numbers) in a tree made by jax.tree.map.
            return f"CompressedArray({names})"


jax.tree_util.register_dataclass(
    CompressedArray,
    data_fields=["parts"],
    meta_fields=["dtype", "dims", "out_axes", "in_axes", "stack_axes", "split"],
)


AxisMetadata.register(CompressedArray)


def is_compressed(x: Any) -> bool:
    """Whether ``x`` is a compressed array."""
    return isinstance(x, CompressedArray)


def materialize(tree: Any) -> Any:
    """The same tree with dense arrays in place of compressed ones."""
    return jax.tree.map(
        lambda x: x.materialize() if is_compressed(x) else x, tree, is_leaf=is_compressed
    )


def nbits(tree: Any) -> int:
    """Exact bits that the arrays of a tree hold, dense and compressed; an int4 is 4 of them."""
    return sum(base.leaf_bits(leaf) for leaf in jax.tree_util.tree_leaves(tree))
