"""A weight on its way through a training step, with what is learned about it beside it."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.errors import JaxcompError
from jaxcomp.graph.sites import Layout
from jaxcomp.graph.views import View


@dataclasses.dataclass(frozen=True)
class Latent:
    """A dense leaf and a pytree that belongs to it, sliced together by the loops around its use.

    Attributes:
      value: the leaf, already sliced by loops.
      learned: pytree of arrays with the canonical matrix's stack axes in front, sliced likewise.
      path: name of the weight.
      layout: the canonical matrix of the whole leaf.
    """

    value: Any
    learned: Any
    path: str
    layout: Layout

    @property
    def dtype(self) -> Any:
        """Dtype of the leaf."""
        return self.value.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf as it is now."""
        return tuple(self.value.shape)

    @property
    def gone(self) -> tuple[int, ...]:
        """Axes of the whole leaf that loops have sliced."""
        sliced = len(self.layout.leaf_shape) - self.value.ndim
        return self.layout.stack_axes[:sliced]

    def leading(self, view: View) -> "Latent":
        """The axis that a scan runs over in front; ``view`` is the weight inside the scan."""
        stack = self.layout.stack_axes[len(self.gone) :]
        if not stack or stack[0] != view.loops[-1].axis:
            raise JaxcompError(
                f"{self.path} {self.layout.leaf_shape}: one of its uses loops over axis "
                f"{view.loops[-1].axis} where another has the stack axes {self.layout.stack_axes}; "
                "loop over the same axes in the same order, or exclude this path"
            )
        return dataclasses.replace(self, value=jnp.moveaxis(self.value, view.loop_axis(), 0))

    def picked(self, view: View) -> tuple["Latent", View]:
        """The slice that a view takes at fixed indices, its axes kept with size one.

        Args:
          view: of the leaf.

        Returns:
          The slice, and the view of it.
        """
        latent, shape, fixed = self, list(view.leaf_shape), []
        for factor, index in view.fixed:
            stack = self.layout.stack_axes[len(self.gone) :]
            at = factor.axis - sum(g < factor.axis for g in self.gone)
            place = stack.index(factor.axis)
            cut = functools.partial(jax.lax.slice_in_dim, start_index=index, limit_index=index + 1)
            latent = dataclasses.replace(
                latent,
                value=cut(latent.value, axis=at),
                learned=jax.tree.map(functools.partial(cut, axis=place), latent.learned),
            )
            shape[factor.axis] = 1
            fixed.append((factor._replace(size=1), 0))
        return latent, view.replace(leaf_shape=tuple(shape), fixed=tuple(fixed))

    def matrix(self) -> jax.Array:
        """The canonical matrix ``(*stack, out, in)`` of what the loops have left."""
        order, shape = self._order()
        return self.value.transpose(order).reshape(shape)

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """A leaf, in the layout of ``value``, from a canonical matrix."""
        order, _ = self._order()
        moved = matrix.reshape([self.value.shape[a] for a in order])
        return moved.transpose([order.index(a) for a in range(len(order))])

    def _order(self):
        gone = self.gone
        at = lambda a: a - sum(g < a for g in gone)  # noqa: E731
        stack = [at(a) for a in self.layout.stack_axes[len(gone) :]]
        out = [at(a) for a in self.layout.out_axes]
        inner = [at(a) for a in self.layout.in_axes]
        size = lambda axes: [self.value.shape[a] for a in axes]  # noqa: E731
        shape = (*size(stack), math.prod(size(out)), math.prod(size(inner)))
        return stack + out + inner, shape


jax.tree_util.register_dataclass(
    Latent, data_fields=["value", "learned"], meta_fields=["path", "layout"]
)
