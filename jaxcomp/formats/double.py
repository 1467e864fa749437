"""Double quantization: the scales of groups are themselves stored in 8 bits.

The scales s of a matrix less their mean are e4m3 values under one float scale for every 256 of
them, taken in the order in which they are stored, ``(in_groups, out_groups)``:

    s = mean + step[block] * value,    step = max over the block of |s - mean| / 448.

For groups of 64 weights that is 8/64 + 32/(64*256) = 0.127 bits a weight instead of 32/64 = 0.5,
and one mean a matrix.

A scale must be positive: where rounding would make it zero or less, the value next to it towards
zero is taken. ``step`` keeps 20 significant bits and is at least 2^-12 of the mean, so that the
product is exact and the values can be read off the sums again.

Source: Dettmers et al., QLoRA, arXiv 2305.14314, section 3.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.formats import floating

BLOCK = 256
_LARGEST = 448.0


def second_level(
    scale: jax.Array, known: jax.Array, dtype: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Mean of the scales, and a step for each block of them.

    Args:
      scale: ``(*stack, in_groups, out_groups)`` float32 or float64.
      known: bool like ``scale``; a scale where it is False counts for nothing.
      dtype: in which mean and steps will be stored; None is that of ``scale``.

    Returns:
      Mean ``(*stack,)`` and steps ``(*stack, blocks)``, in the dtype of ``scale`` and representable
      in ``dtype``.
    """
    dtype = dtype or scale.dtype
    flat = scale.reshape(*scale.shape[:-2], -1)
    known = known.reshape(flat.shape)

    def stored(value, fallback):
        value = value.astype(dtype).astype(scale.dtype)
        return jnp.where(value > 0, value, fallback)

    mean = jnp.where(known, flat, 0).sum(-1) / jnp.maximum(known.sum(-1), 1)
    mean = stored(jnp.where(mean > 0, mean, 1), 1)
    apart = jnp.where(known, jnp.abs(flat - mean[..., None]), 0)
    blocks = -(-flat.shape[-1] // BLOCK)
    more = blocks * BLOCK - flat.shape[-1]
    apart = jnp.pad(apart, [(0, 0)] * (flat.ndim - 1) + [(0, more)])
    step = apart.reshape(*flat.shape[:-1], blocks, BLOCK).max(-1) / _LARGEST
    step = jnp.maximum(step, mean[..., None] * 2.0**-12)
    return mean, stored(jax.lax.reduce_precision(step, 8, 19), 1)


def _spread(step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    each = jnp.repeat(step, BLOCK, axis=-1)[..., : math.prod(shape[-2:])]
    return each.reshape(shape)


def encode_scale(scale: jax.Array, mean: jax.Array, step: jax.Array) -> jax.Array:
    """Scales as 8-bit values.

    Args:
      scale: ``(*stack, in_groups, out_groups)``, positive.
      mean: ``(*stack,)``.
      step: ``(*stack, blocks)``.

    Returns:
      float8_e4m3fn like ``scale``.
    """
    wide = scale.dtype
    mean, each = mean.astype(wide)[..., None, None], _spread(step.astype(wide), scale.shape)
    codes = floating.encode_float((scale - mean) / each, "e4m3")
    value = mean + each * floating.decode_float(codes, "e4m3", wide)
    # Patterns of negative values count away from zero.
    codes = jnp.where(value > 0, codes, codes - 1)
    return jax.lax.bitcast_convert_type(codes.astype(jnp.uint8), jnp.float8_e4m3fn)


def decode_scale(
    values: jax.Array, mean: jax.Array, step: jax.Array, dtype: Any = jnp.float32
) -> jax.Array:
    """Scales of 8-bit values, the inverse of ``encode_scale``."""
    each = _spread(step.astype(dtype), values.shape)
    return mean.astype(dtype)[..., None, None] + each * values.astype(dtype)
