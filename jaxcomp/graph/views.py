"""How a weight is seen after transposes, reshapes, casts and loops: exact bookkeeping of its axes.

A view is a rearrangement of a leaf of the parameter tree. Each axis of the view is a product of
factors, and a factor is a part of one axis of the leaf: an axis of 768 seen as (12, 64) is the
factors (stride 64, size 12) and (stride 1, size 64). So any chain of reshapes and transposes that
only moves axes about can be followed, and undone.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Factor(NamedTuple):
    """A part of an axis of the leaf.

    Attributes:
      axis: axis of the leaf.
      stride: how far apart, along that axis, neighbours lie.
      size: how many values it takes.
    """

    axis: int
    stride: int
    size: int


@dataclasses.dataclass(frozen=True)
class View:
    """A leaf rearranged.

    Attributes:
      leaf_shape: shape of the whole leaf.
      axes: for each axis of the view its factors, slowest first. An axis of size one may have none.
      dtype: dtype of the view.
      loops: factors over which enclosing scans iterate, outermost first. They are no axes of the
        view.
      fixed: factors of which the view is one slice, with the index.
    """

    leaf_shape: tuple[int, ...]
    axes: tuple[tuple[Factor, ...], ...]
    dtype: Any
    loops: tuple[Factor, ...] = ()
    fixed: tuple[tuple[Factor, int], ...] = ()

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: Any) -> "View":
        """The leaf as it is."""
        axes = tuple((Factor(i, 1, n),) for i, n in enumerate(shape))
        return cls(tuple(shape), axes, jnp.dtype(dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the view's axes."""
        return tuple(math.prod(f.size for f in axis) for axis in self.axes)

    @property
    def is_leaf(self) -> bool:
        """Whether the view is the leaf itself."""
        return self == View.of(self.leaf_shape, self.dtype)

    def replace(self, **changes) -> "View":
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)

    def transpose(self, permutation) -> "View":
        """Axes reordered."""
        return self.replace(axes=tuple(self.axes[i] for i in permutation))

    def reshape(self, shape: tuple[int, ...]) -> "View | None":
        """Axes merged and split; None where the leaf's axes cannot be followed."""
        queue = [f for axis in self.axes for f in axis]
        axes = []
        for size in shape:
            axis, have = [], 1
            while have < size:
                if not queue:
                    return None
                factor = queue.pop(0)
                if have * factor.size <= size:
                    if size % (have * factor.size):
                        return None
                    axis.append(factor)
                    have *= factor.size
                    continue
                take = size // have
                if size % have or factor.size % take:
                    return None
                rest = factor.size // take
                axis.append(Factor(factor.axis, factor.stride * rest, take))
                queue.insert(0, Factor(factor.axis, factor.stride, rest))
                have = size
            if size == 1 and queue and queue[0].size == 1:
                axis.append(queue.pop(0))
            axes.append(tuple(axis))
        if any(f.size != 1 for f in queue):
            return None
        return self.replace(axes=tuple(axes))

    def squeeze(self, dimensions) -> "View":
        """Axes of size one removed."""
        return self.replace(axes=tuple(a for i, a in enumerate(self.axes) if i not in dimensions))

    def expand(self, shape, positions) -> "View | None":
        """Axes of size one added: axis i of the view goes to ``positions[i]`` of ``shape``."""
        axes = [()] * len(shape)
        for axis, position in zip(self.axes, positions, strict=True):
            axes[position] = axis
        grown = self.replace(axes=tuple(axes))
        return grown if grown.shape == tuple(shape) else None

    def pick(self, axis: int, index: int) -> "View | None":
        """The slice ``index:index+1`` of an axis that is a whole axis of the leaf."""
        if len(self.axes[axis]) != 1:
            return None
        factor = self.axes[axis][0]
        if factor.stride != 1 or factor.size != self.leaf_shape[factor.axis]:
            return None
        axes = (*self.axes[:axis], (), *self.axes[axis + 1 :])
        return self.replace(axes=axes, fixed=(*self.fixed, (factor, index)))

    def enter_loop(self) -> "View | None":
        """The view inside a scan over its first axis, a whole axis of the leaf; else None."""
        first = self.axes[0]
        if len(first) != 1 or first[0].stride != 1:
            return None
        if first[0].size != self.leaf_shape[first[0].axis]:
            return None
        return self.replace(axes=self.axes[1:], loops=(*self.loops, first[0]))

    def loop_axis(self) -> int:
        """Where the axis of the last loop lies in a leaf that the outer loops have sliced."""
        *outer, last = (f.axis for f in self.loops)
        return last - sum(a < last for a in outer)

    def replay(self, leaf: Any) -> Any:
        """The view's value from the leaf's.

        Args:
          leaf: dense array of the leaf's shape, already sliced by the loops.

        Returns:
          An array of the view's shape and dtype.
        """
        gone = [f.axis for f in self.loops]
        refined = [
            f for axis in self.axes for f in axis if f.size > 1 or self.leaf_shape[f.axis] == 1
        ]
        refined += [f for f, _ in self.fixed]
        present = {f.axis for f in refined}
        shape, order = [], []
        for axis in range(len(self.leaf_shape)):
            # What is neither is an axis of size one that a reshape dropped.
            if axis in gone or axis not in present:
                continue
            factors = sorted((f for f in refined if f.axis == axis), key=lambda f: -f.stride)
            shape += [f.size for f in factors]
            order += factors
        value = leaf.reshape(shape)
        for factor, index in self.fixed:
            at = order.index(factor)
            value = value[(slice(None),) * at + (index,)]
            order.pop(at)
        wanted = [f for axis in self.axes for f in axis if f in order]
        value = value.transpose([order.index(f) for f in wanted]).reshape(self.shape)
        return value if value.dtype == self.dtype else value.astype(self.dtype)


IDENTITIES = frozenset(
    {
        "copy",
        "copy_p",
        "sharding_constraint",
        "mesh_cast",
        "reshard",
        "layout_constraint",
        "pvary",
        "pcast",
        "optimization_barrier",
        "stop_gradient",
        "name",
    }
)


def through(eqn: Any, view: View) -> View | None:
    """The view that an equation makes of its only operand; None where it computes instead.

    Args:
      eqn: an equation of one operand, the value that ``view`` describes.
      view: how the operand comes from its leaf.

    Returns:
      The view of the result.
    """
    name, params = eqn.primitive.name, eqn.params
    shape = tuple(eqn.outvars[0].aval.shape)
    if name in IDENTITIES:
        return view
    if name == "convert_element_type":
        dtype = jnp.dtype(params["new_dtype"])
        floating = jnp.issubdtype(view.dtype, np.floating) and jnp.issubdtype(dtype, np.floating)
        return view.replace(dtype=dtype) if floating else None
    if name == "transpose":
        return view.transpose(params["permutation"])
    if name == "reshape" and params.get("dimensions") is None:
        return view.reshape(shape)
    if name == "squeeze":
        return view.squeeze(params["dimensions"])
    if name == "expand_dims":
        return view.reshape(shape)
    if name == "broadcast_in_dim":
        return view.expand(shape, params["broadcast_dimensions"])
    if name == "slice":
        return _through_slice(params, view, shape)
    return None


def _through_slice(params: dict, view: View, shape: tuple[int, ...]) -> View | None:
    cut = [i for i, (a, b) in enumerate(zip(view.shape, shape, strict=True)) if a != b]
    if not cut:
        return view
    if len(cut) != 1 or shape[cut[0]] != 1:
        return None
    return view.pick(cut[0], params["start_indices"][cut[0]])
