"""Codes of e4m3 on TPUs whose cores do not convert them: v5e, v5p and v6e.

These convert another float of eight bits in one instruction, float8_e4m3b11fnuz: the same fields
with an exponent less by four, so that a byte stands for a sixteenth of what it does in e4m3. Three
bytes differ. e4m3 has a negative zero (0x80) and two codes that are not numbers (0x7F and 0xFF); in
the other, 0x80 is not a number, and all others are.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

# What a 1 among the results stands for.
UNIT = 16.0


def sixteenths(codes: jax.Array) -> jax.Array:
    """Sixteenths of values.

    Args:
      codes: float8_e4m3fn ``(outputs, inputs)``, of a multiple of 32 outputs.

    Returns:
      float8_e4m3b11fnuz of the same shape.
    """
    # Four codes are in a word, and no sum of theirs reaches the next one.
    words = pltpu.bitcast(codes, jnp.int32)
    ones, size_bits = jnp.int32(0x01010101), jnp.int32(0x7F7F7F7F)
    size = words & size_bits
    sign = (words ^ size) & (size + size_bits)  # None of zeros.
    undefined = ((size + ones) >> 7) & ones
    return pltpu.bitcast((size + undefined) | sign, jnp.float8_e4m3b11fnuz)
