"""First-order Taylor pruning: drops what the loss would miss least, by a running mean of |w g|.

    I <- decay * I + (1 - decay) * |w g|      or (w g)²
    of a slice: |sum w g| or (sum w g)²

Differs from the paper in: a running mean instead of the mean over a window of minibatches; weights
dropped before always go first.

Source: Molchanov et al., https://arxiv.org/abs/1611.06440 and https://arxiv.org/abs/1906.10771.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from jaxcomp.errors import JaxcompError
from jaxcomp.pruning.importance import reduce_taylor
from jaxcomp.pruning.method import Scored, Weight, wide


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taylor(Scored):
    """Drops the weights, or slices, of smallest first-order Taylor score.

    Attributes:
      decay: of the running mean, from 0 (this step alone) to below 1.
      reduction: "abs" for |w g|, "square" for (w g)².
    """

    decay: float = 0.9
    reduction: Literal["abs", "square"] = "abs"

    def check(self, layouts, schedule):
        """Checks the options and the pattern."""
        super().check(layouts, schedule)
        if not 0 <= self.decay < 1:
            raise JaxcompError(f"Taylor: decay {self.decay} must be at least 0 and below 1")
        if self.reduction not in ("abs", "square"):
            raise JaxcompError(f"Taylor: reduction {self.reduction!r} must be 'abs' or 'square'")

    def init(self, layout, weight):
        """Scores of zero."""
        return self.unit_sum(layout, jnp.zeros_like(wide(weight)))

    def accumulate(self, layout, state, weight, gradient, mask, count):
        """One step of the running mean."""
        first_order = self.unit_sum(layout, wide(weight) * wide(gradient))
        score = reduce_taylor(first_order, self.reduction).astype(state.dtype)
        return self.decay * state + (1 - self.decay) * score

    def scores(self, weight: Weight):
        """The running mean."""
        return weight.state
