"""PACT: the clipping level of an input is learned.

    y = clip(x, 0, alpha)  (signed inputs: clip(x, -alpha, alpha)), rounded to 2^b levels
    dy / dx = 1 inside, else 0;   dy / d alpha = 1 where x >= alpha (-1 where x <= -alpha), else 0

Differs from the paper in: the level may clip signed inputs on both sides; there the grid has the
2^b - 1 levels of integer matmuls.

Source: Choi et al., https://arxiv.org/abs/1805.06085.
"""

import jax
import jax.numpy as jnp

from jaxcomp.quantization.activation import (
    activation_scales,
    dequantize_input,
    quantize_input,
)
from jaxcomp.quantization.ste import straight_through
from jaxcomp.step import Activation

_SMALLEST = 2.0**-20


def pact_qparams(activation: Activation, alpha: jax.Array) -> tuple:
    """Scale and zero point (None for signed inputs) of the grid below a clipping level.

    Args:
      activation: symmetric for signed inputs, asymmetric for inputs that are never negative.
      alpha: the level; its sign is ignored.

    Returns:
      Arrays like ``alpha``.
    """
    level = jnp.maximum(jnp.abs(alpha), _SMALLEST)
    low = -level if activation.symmetric else jnp.zeros_like(level)
    return activation_scales(low, level, activation)


def pact(x: jax.Array, activation: Activation, alpha: jax.Array) -> jax.Array:
    """An input clipped at a learned level and quantized.

    Args:
      x: any shape.
      activation: as of ``pact_qparams``; one scale for the tensor.
      alpha: scalar, the clipping level.

    Returns:
      Like ``x``.

    Example:
      >>> spec = Activation(format="int4", granularity="tensor", dynamic=False)
      >>> out = pact(jnp.array([0.4, 9.0]), spec, jnp.array(7.0))
      >>> out.tolist()
      [0.0, 7.0]
    """
    scale, zero = jax.lax.stop_gradient(pact_qparams(activation, alpha))
    level = jnp.maximum(jnp.abs(alpha), _SMALLEST).astype(scale.dtype)
    wide = x.astype(scale.dtype)
    bottom = -level if activation.symmetric else jnp.zeros_like(level)
    clipped = jnp.where(wide >= level, level, jnp.where(wide <= bottom, bottom, wide))
    codes, *_ = quantize_input(jax.lax.stop_gradient(x), activation, scale, zero)
    return straight_through(clipped, dequantize_input(codes, scale, zero)).astype(x.dtype)
