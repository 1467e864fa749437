"""How sparsity grows over the steps of training.

A schedule is a function of the step, as in optax, and gives the sparsity from 0 to 1. Between
``begin`` and ``end`` a polynomial leads from the initial to the final value:

    s(t) = final + (initial - final) * (1 - (t - begin) / (end - begin))^power

with power 3 for the cubic schedule, whose slope is zero at the end.

Differs from the paper in: the schedule is defined at every step; how often masks are recomputed
is an option of ``jaxcomp.pruning.wrap``.

Source: Zhu & Gupta, https://arxiv.org/abs/1710.01878; GMP*, https://arxiv.org/abs/2210.06384;
RigL, https://arxiv.org/abs/1911.11134.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.errors import JaxcompError
from jaxcomp.pruning.masks import check_sparsity

Schedule = Callable[[Any], jax.Array]


def _float(step):
    step = jnp.asarray(step)
    return step.astype(jnp.result_type(float))


def _check_span(begin: int, end: int) -> None:
    if begin < 0:
        raise JaxcompError(f"begin {begin} must not be negative")
    if end <= begin:
        raise JaxcompError(
            f"the schedule ends at step {end}, not after its warm-up of {begin} steps; "
            "end is a step of the whole training: make it larger than begin"
        )


def constant(sparsity: float) -> Schedule:
    """The same sparsity at every step.

    Args:
      sparsity: fraction to drop.

    Returns:
      The schedule.

    Raises:
      JaxcompError: the sparsity is no fraction.
    """
    check_sparsity(sparsity)
    return lambda step: jnp.full_like(_float(step), sparsity)


def one_shot(final: float, begin: int = 0) -> Schedule:
    """Nothing before ``begin``, then the final sparsity.

    Args:
      final: fraction to drop.
      begin: step from which it holds.

    Returns:
      The schedule.

    Raises:
      JaxcompError: the sparsity is no fraction, or ``begin`` is negative.

    Example:
      >>> schedule = one_shot(0.5, begin=10)
      >>> float(schedule(9)), float(schedule(10))
      (0.0, 0.5)
    """
    check_sparsity(final)
    if begin < 0:
        raise JaxcompError(f"begin {begin} must not be negative")
    return lambda step: jnp.where(jnp.asarray(step) >= begin, final, _float(0.0))


def polynomial(
    final: float, end: int, begin: int = 0, initial: float = 0.0, power: float = 3.0
) -> Schedule:
    """A polynomial from the initial to the final sparsity.

    Args:
      final: sparsity from ``end`` on.
      end: step, counted from the start of training, at which the final sparsity is reached.
      begin: step at which it starts to rise; the warm-up before it has the initial sparsity.
      initial: sparsity up to ``begin``.
      power: exponent of the remaining share of the way; 1 is linear.

    Returns:
      The schedule.

    Raises:
      JaxcompError: a sparsity is no fraction, the power is not positive, or the schedule is not
        longer than its warm-up.

    Example:
      >>> schedule = polynomial(0.8, end=10, power=1)
      >>> round(float(schedule(5)), 6)
      0.4
    """
    check_sparsity(final)
    check_sparsity(initial)
    _check_span(begin, end)
    if not power > 0:
        raise JaxcompError(f"power {power} must be positive")

    def schedule(step):
        left = 1 - jnp.clip((_float(step) - begin) / (end - begin), 0, 1)
        rest = left**power
        return initial * rest + final * (1 - rest)

    return schedule


def cubic(final: float, end: int, begin: int = 0, initial: float = 0.0) -> Schedule:
    """The cubic schedule of gradual magnitude pruning.

    Args:
      final: sparsity from ``end`` on.
      end: step, counted from the start of training, at which the final sparsity is reached.
      begin: step at which it starts to rise; the warm-up before it has the initial sparsity.
      initial: sparsity up to ``begin``.

    Returns:
      The schedule.

    Raises:
      JaxcompError: a sparsity is no fraction, or the schedule is not longer than its warm-up.

    Example:
      >>> schedule = cubic(0.8, end=100)
      >>> [round(float(schedule(t)), 6) for t in (0, 50, 100)]
      [0.0, 0.7, 0.8]

    Source: https://arxiv.org/abs/1710.01878, equation 1.
    """
    return polynomial(final, end, begin, initial, 3.0)


def gmp_star(final: float, end: int, begin: int = 0, first: float = 0.5) -> Schedule:
    """The schedule of GMP*: a large first step, then cubic.

    Args:
      final: sparsity from ``end`` on.
      end: step at which the final sparsity is reached.
      begin: step of the first jump; before it nothing is dropped.
      first: sparsity right after the jump.

    Returns:
      The schedule.

    Raises:
      JaxcompError: a sparsity is no fraction, the first is above the final one, or the schedule is
        not longer than its warm-up.

    Example:
      >>> schedule = gmp_star(0.9, end=100, begin=10)
      >>> [round(float(schedule(t)), 6) for t in (9, 10, 100)]
      [0.0, 0.5, 0.9]

    Source: https://arxiv.org/abs/2210.06384.
    """
    rise = cubic(final, end, begin, first)
    if first > final:
        raise JaxcompError(f"the first step to {first} is above the final sparsity {final}")
    return lambda step: jnp.where(jnp.asarray(step) >= begin, rise(step), 0.0)


def cosine_fraction(fraction: float, end: int) -> Schedule:
    """RigL's fraction of the kept weights that are exchanged: half a cosine from ``fraction`` to 0.

    Args:
      fraction: alpha, the fraction at step 0.
      end: step from which nothing is exchanged.

    Returns:
      fraction / 2 * (1 + cos(pi t / end)) as a schedule.

    Raises:
      JaxcompError: the fraction is none, or ``end`` is not positive.

    Example:
      >>> schedule = cosine_fraction(0.3, end=100)
      >>> [round(float(schedule(t)), 6) for t in (0, 50, 100, 200)]
      [0.3, 0.15, 0.0, 0.0]

    Source: https://arxiv.org/abs/1911.11134, section 3.
    """
    if not 0 <= fraction <= 1:
        raise JaxcompError(f"fraction {fraction} must lie between 0 and 1")
    _check_span(0, end)

    def schedule(step):
        share = jnp.clip(_float(step) / end, 0, 1)
        return jnp.where(share < 1, fraction / 2 * (1 + jnp.cos(jnp.pi * share)), 0.0)

    return schedule
