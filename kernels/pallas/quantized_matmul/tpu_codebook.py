"""Codes of a codebook as bf16 on TPUs: looked up by gathers along sublanes, one instruction each.

In every lane a register holds 8 words or 32 bytes, one below the other, of which a gather takes
one for each number of an index. The cores of v6e and 7x gather bytes: 16 values of bf16 fill a
register, and a gather looks up 2048 codes. Those of v5 gather words of 32 bits: the values of
codes 0 to 7 and of 8 to 15 are in a register each, and two gathers look up 1024 codes.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels import gathers

_LANES, _WORDS = 128, 8


def entries(table, packed: bool) -> jax.Array:
    """The values of a codebook as codes are looked up in them, the same in every lane.

    Args:
      table: f32 ``(16,)`` in SMEM.
      packed: whether the cores gather bytes.

    Returns:
      ``(16, 128)``: bf16, the values of codes -8 to 7; or, where cores gather words, f32, those of
      0 to 7 before those of -8 to -1.
    """
    row = jax.lax.broadcasted_iota(jnp.int32, (16, _LANES), 0)
    values = jnp.full(row.shape, table[0], jnp.float32)
    first = 8 if packed else 0
    for code in range(1, 16):
        values = jnp.where(row == (code + first) % 16, table[code], values)
    return values.astype(jnp.bfloat16) if packed else values


def scratch(packed: bool):
    """Memory for ``entries``."""
    return pltpu.VMEM((16, _LANES), jnp.bfloat16 if packed else jnp.float32)


def decode(codes: jax.Array, entries: jax.Array, packed: bool) -> jax.Array:
    """The values of codes.

    Args:
      codes: int4 ``(outputs, inputs)``, multiples of 64 and 128.
      entries: of the codebook.
      packed: whether the cores gather bytes.

    Returns:
      bf16 ``(outputs, inputs)``.
    """
    if packed:
        # A bf16 between 128 and 144 ends in its distance from 128, which is i = c + 8 for a signed
        # code c; bytes 2 i and 2 i + 1 of a lane are those of its value.
        bits = pltpu.bitcast(codes.astype(jnp.bfloat16) + jnp.bfloat16(136), jnp.int16)
        pair = bits * jnp.int16(0x202) + jnp.int16(0x7B00)  # (bits - 0x4300) * 0x202 + 0x100
        bytes_ = pltpu.bitcast(entries, jnp.int8)
        return pltpu.bitcast(_gather(bytes_, pltpu.bitcast(pair, jnp.int8)), jnp.bfloat16)
    words = codes.astype(jnp.int32)
    low, high = (_gather(half, words & 7) for half in (entries[:_WORDS], entries[_WORDS:]))
    return jnp.where(words < 0, high, low).astype(jnp.bfloat16)


def _gather(entries: jax.Array, index: jax.Array) -> jax.Array:
    """``entries[index[r, c], c % 128]`` of one register's entries, in the shape of the index."""
    rows = entries.shape[0]
    blocks = index.reshape(-1, rows, index.shape[1])
    parts = []
    for start in range(0, index.shape[1], _LANES):
        part = blocks[:, :, start : start + _LANES]
        source = jnp.broadcast_to(entries[None], part.shape)
        parts.append(gathers.along(source, part, axis=1))
    return jnp.concatenate(parts, axis=2).reshape(index.shape)
