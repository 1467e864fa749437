"""Gradual magnitude pruning: masks by magnitude, recomputed while the sparsity grows.

    drop the round(s_t * size) weights of smallest |w|, or the units of smallest l2 norm

Dropped weights get no gradient and stay zero; those that remain go on being trained.

Differs from the paper in: the weights are those after the optimizer's step; exactly that many go,
ties included; weights dropped before always go first, so masks only grow sparser.

Source: Zhu & Gupta, https://arxiv.org/abs/1710.01878.
"""

import dataclasses

import jax.numpy as jnp

from jaxcomp.pruning.method import Scored, Weight, wide


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradualMagnitude(Scored):
    """Drops the weights, or slices, of smallest magnitude.

    Example:
      >>> from jaxcomp.pruning import wrap
      >>> from jaxcomp.pruning.schedules import cubic
      >>> import optax
      >>> tx = wrap(optax.adamw(1e-3), GradualMagnitude(scope="global"), cubic(0.8, 1000))
    """

    def scores(self, weight: Weight):
        """|w|, or the squared l2 norm of a slice, which orders as the norm does."""
        value = wide(weight.value)
        return jnp.abs(value) if self.axis is None else self.unit_sum(weight.layout, value**2)
