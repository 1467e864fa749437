"""Hard-concrete gates: a relaxation of the L0 norm that is zero and one with real probability.

A gate z is a stretched, clipped binary concrete variable with one parameter, log_alpha:

    u ~ U(0, 1),  s = sigmoid((log u - log(1 - u) + log_alpha) / beta)
    z = clip(s * (zeta - gamma) + gamma, 0, 1)

    P(z != 0) = sigmoid(log_alpha - beta * log(-gamma / zeta))
    P(z  = 1) = sigmoid(log_alpha - beta * log((1 - gamma) / (zeta - 1)))
    E[L0]     = sum P(z != 0) * unit_size
    test time: z = clip(sigmoid(log_alpha) * (zeta - gamma) + gamma, 0, 1)

The test-time gate is not divided by beta; with the usual constants it is closed for log_alpha <=
-ln 11 and fully open from ln 11. CoFi's gate at test time is another: the expected number of zeros
is rounded and that many of the smallest gates are closed (``rank_gate``).

Differs from the paper in: log_alpha may have any shape, and its order decides ``rank_gate``, where
CoFi's code orders the sigmoids, which tie once they saturate.

Source: Louizos, Welling, Kingma, https://arxiv.org/abs/1712.01312; CoFi,
https://arxiv.org/abs/2204.00408.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.errors import JaxcompError
from jaxcomp.pruning import masks

BETA = 2 / 3
"""Temperature of the paper."""
GAMMA = -0.1
"""Lower end of the stretched interval."""
ZETA = 1.1
"""Upper end of the stretched interval."""
EPSILON = 1e-6
"""Distance of the uniform noise from 0 and 1."""


def _check(beta, gamma, zeta):
    if not (beta > 0 and gamma < 0 and zeta > 1):
        raise JaxcompError(
            f"a hard-concrete gate needs beta > 0, gamma < 0 and zeta > 1 (the paper: 2/3, -0.1, "
            f"1.1), got beta={beta}, gamma={gamma}, zeta={zeta}"
        )


def _wide(x):
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def init(
    key: jax.Array,
    shape: tuple[int, ...],
    drop_rate: float = 0.5,
    scale: float = 0.01,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Draws log_alpha around log((1 - drop_rate) / drop_rate).

    Args:
      key: PRNG key.
      shape: shape of the gates.
      drop_rate: sigmoid(log_alpha) starts at one minus this, between 0 and 1.
      scale: standard deviation of the normal distribution.
      dtype: dtype of log_alpha.

    Returns:
      log_alpha.

    Raises:
      JaxcompError: the drop rate is not between 0 and 1.

    Example:
      >>> log_alpha = init(jax.random.key(0), (12,), drop_rate=0.5)
      >>> bool(abs(log_alpha).max() < 0.1)
      True
    """
    if not 0 < drop_rate < 1:
        raise JaxcompError(f"drop_rate {drop_rate} must lie between 0 and 1, both excluded")
    mean = math.log((1 - drop_rate) / drop_rate)
    return mean + scale * jax.random.normal(key, shape, dtype)


def clamp(
    log_alpha: jax.Array, low: float = math.log(1e-2), high: float = math.log(1e2)
) -> jax.Array:
    """Keeps log_alpha where its gradient is alive; apply it after each update, as the paper's code.

    Args:
      log_alpha: any shape.
      low: smallest value.
      high: largest value.

    Returns:
      The clipped log_alpha.
    """
    return jnp.clip(log_alpha, low, high)


def sample(
    key: jax.Array,
    log_alpha: jax.Array,
    beta: float = BETA,
    gamma: float = GAMMA,
    zeta: float = ZETA,
) -> jax.Array:
    """Samples gates for training.

    Args:
      key: PRNG key.
      log_alpha: any shape.
      beta: temperature.
      gamma: lower end of the stretched interval.
      zeta: upper end of the stretched interval.

    Returns:
      Gates from 0 to 1 like ``log_alpha``, differentiable where they lie in between.

    Raises:
      JaxcompError: the constants give no distribution with mass on 0 and 1.

    Example:
      >>> z = sample(jax.random.key(0), jnp.zeros(1000))
      >>> bool(((z >= 0) & (z <= 1)).all()), bool((z == 0).any()), bool((z == 1).any())
      (True, True, True)

    Source: https://arxiv.org/abs/1712.01312, equations 10 and 11.
    """
    _check(beta, gamma, zeta)
    x = _wide(log_alpha)
    u = jax.random.uniform(key, x.shape, x.dtype, EPSILON, 1 - EPSILON)
    s = jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + x) / beta)
    return jnp.clip(s * (zeta - gamma) + gamma, 0, 1).astype(jnp.asarray(log_alpha).dtype)


def gate(log_alpha: jax.Array, gamma: float = GAMMA, zeta: float = ZETA) -> jax.Array:
    """Deterministic gates for test time, the paper's.

    Args:
      log_alpha: any shape.
      gamma: lower end of the stretched interval.
      zeta: upper end of the stretched interval.

    Returns:
      Gates from 0 to 1 like ``log_alpha``.

    Raises:
      JaxcompError: the constants give no gate.

    Example:
      >>> gate(jnp.array([-3.0, 0.0, 3.0])).tolist()
      [0.0, 0.5, 1.0]

    Source: https://arxiv.org/abs/1712.01312, equation 13.
    """
    _check(BETA, gamma, zeta)
    z = jax.nn.sigmoid(_wide(log_alpha)) * (zeta - gamma) + gamma
    return jnp.clip(z, 0, 1).astype(jnp.asarray(log_alpha).dtype)


def rank_gate(
    log_alpha: jax.Array,
    beta: float = BETA,
    gamma: float = GAMMA,
    zeta: float = ZETA,
    soft: bool = True,
    sharpness: float = 0.8,
) -> jax.Array:
    """Deterministic gates for test time, CoFi's: as many zeros as are expected.

    Args:
      log_alpha: ``(.., units)``; the units of the last axis are compared with one another.
      beta: temperature.
      gamma: lower end of the stretched interval.
      zeta: upper end of the stretched interval.
      soft: open gates hold sigmoid(log_alpha / beta * sharpness); otherwise 1.
      sharpness: CoFi's "magical number".

    Returns:
      Gates like ``log_alpha``; of each row exactly round(sum P(z = 0)) are zero.

    Raises:
      JaxcompError: the constants give no gate.

    Example:
      >>> rank_gate(jnp.array([-4.0, 4.0, -5.0, 5.0]), soft=False).tolist()
      [0.0, 1.0, 0.0, 1.0]

    Source: https://arxiv.org/abs/2204.00408, released code.
    """
    x = _wide(log_alpha)
    zeros = prob_zero(x, beta, gamma, zeta).sum(-1, keepdims=True)
    keep = masks.drop_smallest(x, jnp.round(zeros).astype(jnp.int32), signed=True)
    value = jax.nn.sigmoid(x / beta * sharpness) if soft else jnp.ones_like(x)
    return jnp.where(keep, value, 0).astype(jnp.asarray(log_alpha).dtype)


def prob_nonzero(
    log_alpha: jax.Array, beta: float = BETA, gamma: float = GAMMA, zeta: float = ZETA
) -> jax.Array:
    """Probability that a sampled gate is not zero.

    Args:
      log_alpha: any shape.
      beta: temperature.
      gamma: lower end of the stretched interval.
      zeta: upper end of the stretched interval.

    Returns:
      P(z != 0), at least float32; its derivative is P(z != 0) P(z = 0).

    Raises:
      JaxcompError: the constants give no distribution with mass on 0 and 1.
    """
    _check(beta, gamma, zeta)
    return jax.nn.sigmoid(_wide(log_alpha) - beta * math.log(-gamma / zeta))


def prob_zero(
    log_alpha: jax.Array, beta: float = BETA, gamma: float = GAMMA, zeta: float = ZETA
) -> jax.Array:
    """Probability that a sampled gate is zero.

    Args:
      log_alpha: any shape.
      beta: temperature.
      gamma: lower end of the stretched interval.
      zeta: upper end of the stretched interval.

    Returns:
      P(z = 0), at least float32, without the cancellation of 1 - P(z != 0).

    Raises:
      JaxcompError: the constants give no distribution with mass on 0 and 1.

    Example:
      >>> round(float(prob_zero(jnp.array(0.0))), 5)
      0.16818
    """
    _check(beta, gamma, zeta)
    return jax.nn.sigmoid(beta * math.log(-gamma / zeta) - _wide(log_alpha))


def prob_one(
    log_alpha: jax.Array, beta: float = BETA, gamma: float = GAMMA, zeta: float = ZETA
) -> jax.Array:
    """Probability that a sampled gate is exactly one.

    Args:
      log_alpha: any shape.
      beta: temperature.
      gamma: lower end of the stretched interval.
      zeta: upper end of the stretched interval.

    Returns:
      P(z = 1), at least float32.

    Raises:
      JaxcompError: the constants give no distribution with mass on 0 and 1.
    """
    _check(beta, gamma, zeta)
    return jax.nn.sigmoid(_wide(log_alpha) - beta * math.log((1 - gamma) / (zeta - 1)))


def expected_l0(
    log_alpha: jax.Array,
    unit_size: float | jax.Array = 1.0,
    beta: float = BETA,
    gamma: float = GAMMA,
    zeta: float = ZETA,
) -> jax.Array:
    """Expected number of weights that stay.

    Args:
      log_alpha: any shape.
      unit_size: weights behind one gate, a number or an array that broadcasts.
      beta: temperature.
      gamma: lower end of the stretched interval.
      zeta: upper end of the stretched interval.

    Returns:
      Scalar, sum of P(z != 0) * unit_size.

    Raises:
      JaxcompError: the constants give no distribution with mass on 0 and 1.

    Example:
      >>> float(expected_l0(jnp.full(4, 50.0), unit_size=64))
      256.0
    """
    return jnp.sum(prob_nonzero(log_alpha, beta, gamma, zeta) * unit_size)


def penalty(
    log_alpha: jax.Array,
    strength: float | jax.Array,
    unit_size: float | jax.Array = 1.0,
    weight_decay: float | jax.Array = 0.0,
    squared_norm: float | jax.Array = 0.0,
    beta: float = BETA,
    gamma: float = GAMMA,
    zeta: float = ZETA,
) -> jax.Array:
    """The L0 penalty, with the L2 penalty of the weights that stay.

        sum P(z != 0) * (strength * unit_size + weight_decay / 2 * ||w||²)

    Args:
      log_alpha: any shape.
      strength: price of one weight.
      unit_size: weights behind one gate, a number or an array that broadcasts.
      weight_decay: L2 strength.
      squared_norm: sum of squares of the weights behind each gate, broadcast like ``unit_size``.
      beta: temperature.
      gamma: lower end of the stretched interval.
      zeta: upper end of the stretched interval.

    Returns:
      Scalar to add to the loss.

    Raises:
      JaxcompError: the constants give no distribution with mass on 0 and 1.

    Source: https://arxiv.org/abs/1712.01312, equations 9 and 12, and appendix A.
    """
    price = strength * unit_size + 0.5 * weight_decay * squared_norm
    return jnp.sum(prob_nonzero(log_alpha, beta, gamma, zeta) * price)
