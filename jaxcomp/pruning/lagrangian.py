"""Augmented Lagrangian that brings the expected sparsity of gates to a target.

    penalty = lambda_1 (s - t) + lambda_2 (s - t)²,   maximised over lambda_1 and lambda_2

with s the expected sparsity, 1 - E[size that stays] / size, and t the target, which rises linearly
over a warm-up. The multipliers start at zero and climb: they are ordinary parameters in the tree
that is optimized, and their gradients are negated before their optimizer sees them (``ascend``).

    lagrange = lagrangian(target=0.6, warmup_steps=1000, total_steps=5000)
    params = {"model": .., "gates": .., "multipliers": lagrange.init()}
    loss = task + lagrange.penalty(params["multipliers"], expected_sparsity, step)
    tx = optax.partition(
        {"descend": optax.adamw(3e-5), "ascend": ascend(optax.sgd(0.1))}, labels)

Differs from the paper in: nothing; CoFi's code scales neither term.

Source: FLOP, https://arxiv.org/abs/1910.04732; CoFi, https://arxiv.org/abs/2204.00408.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp.errors import JaxcompError
from jaxcomp.pruning import masks


class Multipliers(NamedTuple):
    """Lagrange multipliers, parameters to be maximised.

    Attributes:
      linear: scalar, factor of s - t.
      quadratic: scalar, factor of (s - t)².
    """

    linear: jax.Array
    quadratic: jax.Array


class Lagrangian(NamedTuple):
    """The functions of one constraint.

    Attributes:
      init: ``init() -> Multipliers``, zeros.
      penalty: ``penalty(multipliers, sparsity, step) -> scalar`` to add to the loss; ``sparsity``
        is the expected sparsity now, differentiable in the gates.
      target: ``target(step) -> scalar``, the target at a step.
    """

    init: Callable[[], Multipliers]
    penalty: Callable[[Multipliers, Any, Any], jax.Array]
    target: Callable[[Any], jax.Array]


def lagrangian(
    target: float,
    warmup_steps: int = 0,
    total_steps: int | None = None,
    prunable_size: float | None = None,
    total_size: float | None = None,
    start: float = 0.0,
    dtype: Any = jnp.float32,
) -> Lagrangian:
    """Makes the constraint that the expected sparsity equals a target.

    Args:
      target: sparsity to reach, 0 to 1, as a fraction of the same size that the sparsity given to
        ``penalty`` is a fraction of.
      warmup_steps: steps over which the target rises from ``start``.
      total_steps: length of the training, to check the warm-up against.
      prunable_size: weights behind the gates.
      total_size: weights of which the sparsity is a fraction; with ``prunable_size`` it is checked
        that the gates can reach the target.
      start: target at step 0.
      dtype: dtype of the multipliers.

    Returns:
      ``init``, ``penalty`` and ``target``.

    Raises:
      JaxcompError: the target is no fraction or cannot be reached, or the warm-up does not fit.

    Example:
      >>> lagrange = lagrangian(0.6, warmup_steps=100)
      >>> float(lagrange.penalty(lagrange.init(), 0.1, 50))
      0.0
      >>> round(float(lagrange.target(50)), 6), round(float(lagrange.target(1000)), 6)
      (0.3, 0.6)
    """
    masks.check_sparsity(target, "target")
    masks.check_sparsity(start, "start")
    if warmup_steps < 0:
        raise JaxcompError(f"warmup_steps {warmup_steps} must not be negative")
    if total_steps is not None and warmup_steps >= total_steps:
        raise JaxcompError(
            f"the schedule of {total_steps} steps is not longer than its warm-up of {warmup_steps} "
            "steps, so the target would hold at no step; shorten warmup_steps or train longer"
        )
    if (prunable_size is None) != (total_size is None):
        raise JaxcompError("give both prunable_size and total_size, or neither")
    if total_size is not None and target * total_size > prunable_size * (1 + 1e-9):
        raise JaxcompError(
            f"target sparsity {target} cannot be reached: the gated units hold {prunable_size} of "
            f"{total_size} weights, a sparsity of {prunable_size / total_size:.4g} when all are "
            "gone; lower the target or gate more units"
        )

    def init() -> Multipliers:
        return Multipliers(jnp.zeros((), dtype), jnp.zeros((), dtype))

    def target_at(step) -> jax.Array:
        step = jnp.asarray(step, jnp.promote_types(dtype, jnp.float32))
        share = jnp.clip(step / warmup_steps, 0, 1) if warmup_steps else jnp.ones_like(step)
        return start * (1 - share) + target * share

    def penalty(multipliers: Multipliers, sparsity, step) -> jax.Array:
        gap = sparsity - target_at(step)
        return multipliers.linear * gap + multipliers.quadratic * gap**2

    return Lagrangian(init, penalty, target_at)


def ascend(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Turns an optimizer that descends into one that climbs, by negating the gradients.

    Args:
      tx: the optimizer, as ``optax.sgd(0.1)`` or ``optax.adam(1e-2)``.

    Returns:
      The transformation, for the multipliers' part of the parameters.

    Example:
      >>> tx = ascend(optax.sgd(0.5))
      >>> updates, _ = tx.update(jnp.array(2.0), tx.init(jnp.array(0.0)))
      >>> float(updates)
      1.0
    """
    return optax.with_extra_args_support(optax.chain(optax.scale(-1.0), tx))
