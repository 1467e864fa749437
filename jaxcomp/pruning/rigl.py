"""RigL: sparse from the start, exchanging weights that became small for ones with large gradients.

At the steps where masks are recomputed, in each tensor:

    k     = round(fraction(t) * kept),   fraction(t) = alpha / 2 (1 + cos(pi t / end))
    drop  the k kept weights of smallest |w|
    grow  the k weights of largest |g| among all that are not kept now; they start at zero

The number of kept weights never changes. Over the tensors the density is uniform, or follows
Erdos-Renyi-Kernel: proportional to sum(dims) / prod(dims), at most 1, the same number in all.

Masks start at random, so start the training from masked weights:

    state = tx.init(params);  params = apply_mask(params, get_masks(state))

Differs from the paper in: the optimizer's step is taken in the steps of the exchange too; a weight
dropped and grown in the same step keeps its value, as in the released code.

Source: Evci et al., https://arxiv.org/abs/1911.11134.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from jaxcomp.errors import JaxcompError
from jaxcomp.pruning import masks
from jaxcomp.pruning.method import Layout, Method, wide
from jaxcomp.pruning.schedules import cosine_fraction


def layer_densities(
    shapes: Sequence[tuple[int, ...]],
    sparsity: float,
    kind: Literal["erk", "uniform"] = "erk",
    counts: Sequence[int] | None = None,
) -> list[float]:
    """Density of each tensor for one sparsity of all.

    Args:
      shapes: shapes of the tensors.
      sparsity: fraction of all weights to drop.
      kind: "erk" or "uniform".
      counts: how many tensors of each shape there are, 1 if None.

    Returns:
      Densities from 0 to 1 with sum density * size = (1 - sparsity) * sum size.

    Raises:
      JaxcompError: the sparsity is no fraction, or the kind is unknown.

    Example:
      >>> [round(d, 4) for d in layer_densities([(10, 10), (40, 10)], 0.5)]
      [0.7143, 0.4464]

    Source: https://arxiv.org/abs/1911.11134, section 3 and appendix.
    """
    masks.check_sparsity(sparsity)
    if kind not in ("erk", "uniform"):
        raise JaxcompError(f"density {kind!r} must be 'erk' or 'uniform'")
    if kind == "uniform":
        return [1.0 - sparsity] * len(shapes)
    counts = [1] * len(shapes) if counts is None else counts
    sizes = [c * math.prod(s) for c, s in zip(counts, shapes, strict=True)]
    raw = [sum(s) / math.prod(s) for s in shapes]
    dense: set[int] = set()
    while True:
        left = (1 - sparsity) * sum(sizes) - sum(sizes[i] for i in dense)
        rest = [i for i in range(len(shapes)) if i not in dense]
        weight = sum(raw[i] * sizes[i] for i in rest)
        factor = left / weight if weight else 0.0
        full = {i for i in rest if factor * raw[i] > 1}
        if not full:
            return [1.0 if i in dense else factor * raw[i] for i in range(len(shapes))]
        dense |= full


@functools.partial(jax.jit, static_argnames=("shape", "stack"))
def _random_mask(seed, index, shape, stack, kept):
    key = jax.random.fold_in(jax.random.key(seed), index)
    size = math.prod(shape[stack:])
    axes = tuple(range(stack, len(shape)))
    return masks.drop_smallest(jax.random.uniform(key, shape), size - kept, axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RigL(Method):
    """Exchanges weights at a constant number of kept ones.

    Attributes:
      end: step from which masks are fixed; the paper takes 3/4 of the training.
      fraction: alpha, the share of kept weights exchanged at first.
      density: how the sparsity is spread over tensors, "erk" or "uniform".
      seed: of the random initial masks.
    """

    end: int
    fraction: float = 0.3
    density: Literal["erk", "uniform"] = "erk"
    seed: int = 0

    def check(self, layouts, schedule):
        """Checks the options, and that the schedule is one number."""
        cosine_fraction(self.fraction, self.end)
        if not isinstance(schedule, (int, float)):
            raise JaxcompError(
                f"RigL: keeps one sparsity throughout; give it as a number, not {schedule!r}"
            )
        self._kept(layouts, schedule)

    def _kept(self, layouts: Sequence[Layout], sparsity: float) -> list[int]:
        shapes = [lay.shape[lay.stack :] for lay in layouts]
        counts = [lay.stack_size for lay in layouts]
        densities = layer_densities(shapes, sparsity, self.density, counts)
        return [
            lay.tensor_size - masks.dropped_count(1 - density, lay.tensor_size)
            for lay, density in zip(layouts, densities, strict=True)
        ]

    def initial_masks(self, weights, schedule):
        """Random masks of the exact counts."""
        layouts = [w.layout for w in weights]
        result = []
        for i, (w, kept) in enumerate(zip(weights, self._kept(layouts, schedule), strict=True)):
            mask = _random_mask(self.seed, i, w.layout.shape, w.layout.stack, kept)
            # Placed on devices as the weight is.
            result.append(mask & jnp.ones_like(w.value, dtype=bool))
        return result

    def select(self, weights, sparsity, count):
        """Drops by magnitude and grows by gradient, as many."""
        fraction = cosine_fraction(self.fraction, self.end)(count)
        return [self._exchange(w, fraction) for w in weights]

    def _exchange(self, weight, fraction):
        layout, mask = weight.layout, weight.mask
        axes = tuple(range(layout.stack, len(layout.shape)))
        kept = mask.sum(axes, keepdims=True, dtype=jnp.int32)
        k = jnp.round(fraction * kept).astype(jnp.int32)
        k = jnp.clip(k, 0, jnp.minimum(kept, layout.tensor_size - kept))
        magnitude = jnp.where(mask, jnp.abs(wide(weight.value)), -1)
        # Weights outside the mask have the lowest score and go with the k smallest inside.
        stay = masks.drop_smallest(magnitude, layout.tensor_size - kept + k, axes, signed=True)
        growth = jnp.where(stay, -1, jnp.abs(wide(weight.gradient)))
        grown = masks.drop_smallest(growth, layout.tensor_size - k, axes, signed=True)
        return stay | grown
