"""Codes of e4m3 on TPUs whose cores do not convert them: v5e, v5p and v6e.

These convert another float of eight bits in one instruction, float8_e4m3b11fnuz: the same fields
with an exponent less by four, so that a byte stands for a sixteenth of what it does in e4m3. But
0x80, a negative zero in e4m3, is not a number there, and it is the only such code. For the two of
e4m3 (0x7F and 0xFF) the scale is not a number: see ``layout.prepare``.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

# What a 1 among the results stands for.
UNIT = 16.0


def sixteenths(codes: jax.Array) -> jax.Array:
    """Sixteenths of values.

    Args:
      codes: float8_e4m3fn ``(outputs, inputs)``, of a multiple of 32 outputs, all of them numbers.

    Returns:
      float8_e4m3b11fnuz of the same shape.
    """
    # Four codes are in a word, and no sum of theirs reaches the next one. Zeros lose their signs.
    words, size_bits = pltpu.bitcast(codes, jnp.int32), jnp.int32(0x7F7F7F7F)
    kept = ((words & size_bits) + size_bits) | size_bits
    return pltpu.bitcast(words & kept, jnp.float8_e4m3b11fnuz)
