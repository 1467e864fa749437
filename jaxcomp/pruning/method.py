"""What a method of pruning in training is, and how scores become masks.

``jaxcomp.pruning.wrap`` keeps masks, hidden values and the optimizer in step; a method says what is
special about it. To add one, write a frozen dataclass that derives from ``Method`` and override
what differs:

    check(layouts, schedule)          refuse what cannot be done, before any work
    init(layout, weight)              state of one weight, a pytree or None
    initial_masks(weights, schedule)  masks at the start; all True unless overridden
    gradient(gradient, weight, mask)  what the optimizer gets; masked unless overridden
    accumulate(layout, state, weight, gradient, mask, count)   state after each step
    select(weights, sparsity, count)  new masks, at the steps where they are recomputed

and set ``latent = True`` if dropped weights keep a hidden value that goes on being trained. All
functions are traced: their results may depend on values only through jnp. Layouts, options and the
schedule's type are static.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.errors import JaxcompError
from jaxcomp.pruning import masks

Scope = Literal["global", "tensor", "row"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one leaf of the parameters is to be read.

    Attributes:
      path: its name.
      shape: its shape.
      stack: leading axes that index layers or experts, each a tensor of its own.
      input_axes: axes, in order and counted from the front, that a contraction sums over; the
        other axes after the stack are outputs.
    """

    path: str
    shape: tuple[int, ...]
    stack: int
    input_axes: tuple[int, ...]

    @property
    def tensor_size(self) -> int:
        """Weights of one element of the stack."""
        return math.prod(self.shape[self.stack :])

    @property
    def input_size(self) -> int:
        """Inputs of one output."""
        return math.prod(self.shape[a] for a in self.input_axes)

    @property
    def stack_size(self) -> int:
        """Elements of the stack."""
        return math.prod(self.shape[: self.stack])

    def _order(self) -> tuple[int, ...]:
        outputs = [a for a in range(self.stack, len(self.shape)) if a not in self.input_axes]
        return (*range(self.stack), *outputs, *self.input_axes)

    def to_rows(self, x: jax.Array) -> jax.Array:
        """The array as ``(*stack, out, in)``."""
        moved = x.transpose(self._order())
        return moved.reshape(*self.shape[: self.stack], -1, self.input_size)

    def from_rows(self, x: jax.Array) -> jax.Array:
        """The inverse of ``to_rows``."""
        order = self._order()
        moved = x.reshape([self.shape[a] for a in order])
        return moved.transpose([order.index(a) for a in range(len(order))])

    def unit_axes(self, axis: int) -> tuple[int, ...]:
        """The axes that make up one unit along ``axis``, counted from the front."""
        position = axis % len(self.shape)
        return tuple(a for a in range(self.stack, len(self.shape)) if a != position)


class Weight(NamedTuple):
    """One weight as ``select`` sees it.

    Attributes:
      layout: how to read it.
      value: after the optimizer's step; hidden values included where the method is latent.
      gradient: of the loss in this step, at dropped weights too.
      mask: which weights were kept up to now.
      state: what ``accumulate`` returned.
    """

    layout: Layout
    value: jax.Array
    gradient: jax.Array | None
    mask: jax.Array | None
    state: Any


def wide(x: jax.Array) -> jax.Array:
    """The array in float32, or float64 where it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Base of the methods of pruning in training; see the head of this module."""

    latent: ClassVar[bool] = False

    def check(self, layouts: Sequence[Layout], schedule: Any) -> None:
        """Raises a ``JaxcompError`` for what cannot be done.

        Args:
          layouts: the weights to be pruned.
          schedule: None, a number, or a function of the step.
        """

    def init(self, layout: Layout, weight: jax.Array) -> Any:
        """State of one weight; None for none."""
        return None

    def initial_masks(self, weights: Sequence[Weight], schedule: Any) -> list[jax.Array]:
        """Masks before the first step (the weights' ``gradient`` and ``mask`` are None)."""
        return [jnp.ones_like(w.value, dtype=bool) for w in weights]

    def gradient(self, gradient: jax.Array, weight: jax.Array, mask: jax.Array) -> jax.Array:
        """The gradient that the optimizer gets."""
        return jnp.where(mask, gradient, jnp.zeros((), gradient.dtype))

    def accumulate(
        self,
        layout: Layout,
        state: Any,
        weight: jax.Array,
        gradient: jax.Array,
        mask: jax.Array,
        count: jax.Array,
    ) -> Any:
        """State after a step: weight and gradient as they were in the forward pass."""
        return state

    def select(
        self, weights: Sequence[Weight], sparsity: jax.Array | None, count: jax.Array
    ) -> list[jax.Array]:
        """The new masks, exactly as many dropped as the sparsity says."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored(Method):
    """Base of the methods that drop the weights, or units, of lowest score.

    Attributes:
      scope: what a weight is compared with: all pruned weights ("global"), its tensor, or its row
        (the inputs of one output).
      n: with ``m``, keep n of every m consecutive inputs instead of following a schedule.
      m: size of such a block.
      axis: drop whole slices along this axis of each leaf instead of single weights; sparsities
        then count slices.
    """

    scope: Scope = "tensor"
    n: int | None = None
    m: int | None = None
    axis: int | None = None
    regrow: ClassVar[bool] = False

    def check(self, layouts, schedule):
        """Checks scope and pattern against the weights, and that a schedule goes with them."""
        name = type(self).__name__
        if self.scope not in ("global", "tensor", "row"):
            raise JaxcompError(f"{name}: scope {self.scope!r} must be 'global', 'tensor' or 'row'")
        if (self.n is None) != (self.m is None):
            raise JaxcompError(f"{name}: give both n and m, got n={self.n}, m={self.m}")
        if self.n is not None and self.axis is not None:
            raise JaxcompError(f"{name}: give n and m, or axis, not both")
        if self.axis is not None and self.scope == "row":
            raise JaxcompError(f"{name}: slices are compared in scope 'tensor' or 'global'")
        if (schedule is None) != (self.n is not None):
            raise JaxcompError(
                f"{name}: needs a schedule of sparsities (or a number), or n and m without one"
            )
        for layout in layouts:
            if self.n is not None:
                masks.check_nm(self.n, self.m, layout.input_size, layout.path)
            if self.axis is not None:
                size = len(layout.shape)
                if not layout.stack <= self.axis % size or not -size <= self.axis < size:
                    raise JaxcompError(
                        f"{layout.path} {layout.shape}: axis {self.axis} is none of its axes after "
                        f"the {layout.stack} stack axes"
                    )

    def unit_sum(self, layout: Layout, x: jax.Array) -> jax.Array:
        """The sum over each unit with the axes kept, or the array itself for single weights."""
        if self.axis is None:
            return x
        return x.sum(layout.unit_axes(self.axis), keepdims=True)

    def scores(self, weight: Weight) -> jax.Array:
        """Scores that broadcast to the weight, larger for more important."""
        raise NotImplementedError

    def select(self, weights, sparsity, count):
        """Drops the lowest scores; weights dropped before go first, and stay dropped."""
        scores = []
        for w in weights:
            score = self.scores(w)
            if not self.regrow:
                kept = w.mask
                if self.axis is not None:
                    kept = kept.any(w.layout.unit_axes(self.axis), keepdims=True)
                score = jnp.where(kept, score, -jnp.inf)
            scores.append(score)
        kept = keep_highest(
            [w.layout for w in weights],
            scores,
            sparsity,
            scope=self.scope,
            nm=None if self.n is None else (self.n, self.m),
        )
        if self.regrow:
            return kept
        return [mask & w.mask for mask, w in zip(kept, weights, strict=True)]


def keep_highest(
    layouts: Sequence[Layout],
    scores: Sequence[jax.Array],
    sparsity: Any,
    *,
    scope: Scope = "tensor",
    nm: tuple[int, int] | None = None,
) -> list[jax.Array]:
    """Masks that drop exactly the lowest scores; ties go in order.

    Args:
      layouts: how to read each weight.
      scores: signed scores of each weight, or of its units with their other axes of size one.
      sparsity: fraction to drop, may be traced; not for N:M.
      scope: what is compared with what.
      nm: (n, m) to keep n of every m consecutive inputs.

    Returns:
      Bool masks of the layouts' shapes.
    """
    if nm is not None:
        kept = [
            lay.from_rows(masks.nm_mask(lay.to_rows(s), *nm))
            for lay, s in zip(layouts, scores, strict=True)
        ]
    elif scope == "global":
        high, low = masks.traced_counts(sparsity, [sum(s.size for s in scores)])
        kept = masks.drop_smallest_of_all(scores, (high[0], low[0]), signed=True)
    elif scope == "row":
        counts = _counts(sparsity, [lay.input_size for lay in layouts])
        kept = [
            lay.from_rows(masks.drop_smallest(lay.to_rows(s), k, signed=True))
            for lay, s, k in zip(layouts, scores, counts, strict=True)
        ]
    else:
        sizes = [s.size // max(1, lay.stack_size) for lay, s in zip(layouts, scores, strict=True)]
        counts = _counts(sparsity, sizes)
        kept = [
            masks.drop_smallest(s, k, tuple(range(lay.stack, s.ndim)), signed=True)
            for lay, s, k in zip(layouts, scores, counts, strict=True)
        ]
    return [jnp.broadcast_to(m, lay.shape) for lay, m in zip(layouts, kept, strict=True)]


def _counts(sparsity, sizes):
    high, low = masks.traced_counts(sparsity, sizes)
    total = (high << 15) | low
    return [total[i] for i in range(len(sizes))]


def evaluate(value: float | Callable[[Any], jax.Array], count: jax.Array) -> Any:
    """A number, or a schedule's value at a step."""
    return value(count) if callable(value) else value


def check_number(name: str, value: Any) -> None:
    """Refuses negative numbers; schedules pass."""
    if not callable(value) and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
        raise JaxcompError(f"{name} {value!r} must be a number that is not negative, or a schedule")
