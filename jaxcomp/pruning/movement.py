"""Movement pruning: keeps the weights that training moves away from zero.

    S <- S - lr_S * w * g          g = dL/d(masked w), at dropped weights too
    movement:       keep the top (1 - s_t) of S (not of |S|)
    soft movement:  keep sigmoid(S) > tau;  S <- S - lr_S * (w g + strength * sigmoid'(S))

Since dL/dS is w g when the mask is passed straight through, this is gradient descent on the scores.
Dropped weights keep their value, hidden from the model, and return with it when their score rises.

Differs from the paper in: the scores descend by plain SGD, where the released code gives them the
model's optimizer; a slice's score is the sum of its weights'.

Source: Sanh, Wolf, Rush, https://arxiv.org/abs/2005.07683.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxcomp.errors import JaxcompError
from jaxcomp.pruning.method import Method, Scored, Weight, check_number, evaluate, wide


@dataclasses.dataclass(frozen=True, kw_only=True)
class Movement(Scored):
    """Drops the weights whose scores are lowest.

    Attributes:
      learning_rate: of the scores, a number or a schedule; a constant one does not change the
        order of the scores.
    """

    learning_rate: float | Callable[[Any], jax.Array] = 1.0
    latent: ClassVar[bool] = True
    regrow: ClassVar[bool] = True

    def check(self, layouts, schedule):
        """Checks the options and the pattern."""
        super().check(layouts, schedule)
        check_number("Movement: learning_rate", self.learning_rate)

    def init(self, layout, weight):
        """Scores of zero."""
        return jnp.zeros_like(wide(weight))

    def accumulate(self, layout, state, weight, gradient, mask, count):
        """S <- S - lr w g."""
        step = evaluate(self.learning_rate, count) * wide(weight) * wide(gradient)
        return (state - step).astype(state.dtype)

    def scores(self, weight: Weight):
        """The scores, summed over slices."""
        return self.unit_sum(weight.layout, weight.state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftMovement(Method):
    """Drops the weights whose scores are below a threshold; the penalty sets the sparsity.

    Attributes:
      threshold: tau, compared with sigmoid(S), between 0 and 1; scores start at 0, so weights are
        all kept at first for a threshold below 1/2.
      strength: lambda of the penalty lambda * sum sigmoid(S), a number or a schedule. The released
        code takes the mean over a tensor: divide by its size for that.
      learning_rate: of the scores, a number or a schedule.
    """

    threshold: float = 0.1
    strength: float | Callable[[Any], jax.Array] = 0.0
    learning_rate: float | Callable[[Any], jax.Array] = 1.0
    latent: ClassVar[bool] = True

    def check(self, layouts, schedule):
        """Checks the options; there is no schedule of sparsities."""
        if schedule is not None:
            raise JaxcompError(
                "SoftMovement: takes no schedule of sparsities; its strength sets the sparsity"
            )
        if not 0 < self.threshold < 1:
            raise JaxcompError(f"SoftMovement: threshold {self.threshold} must lie between 0 and 1")
        check_number("SoftMovement: strength", self.strength)
        check_number("SoftMovement: learning_rate", self.learning_rate)

    def init(self, layout, weight):
        """Scores of zero."""
        return jnp.zeros_like(wide(weight))

    def accumulate(self, layout, state, weight, gradient, mask, count):
        """S <- S - lr (w g + strength sigmoid'(S))."""
        soft = jax.nn.sigmoid(state)
        slope = evaluate(self.strength, count) * soft * (1 - soft)
        step = evaluate(self.learning_rate, count) * (wide(weight) * wide(gradient) + slope)
        return (state - step).astype(state.dtype)

    def select(self, weights, sparsity, count):
        """sigmoid(S) > tau, as S > log(tau / (1 - tau))."""
        bound = math.log(self.threshold / (1 - self.threshold))
        return [w.state > bound for w in weights]


def soft_movement_penalty(scores: Any, strength: float | jax.Array) -> jax.Array:
    """The penalty of soft movement pruning.

    Args:
      scores: pytree of scores S.
      strength: lambda.

    Returns:
      strength * sum sigmoid(S), a scalar; ``SoftMovement`` applies its gradient by itself.

    Example:
      >>> float(soft_movement_penalty({"w": jnp.zeros(4)}, 0.5))
      1.0
    """
    return strength * sum(jax.nn.sigmoid(wide(s)).sum() for s in jax.tree.leaves(scores))
