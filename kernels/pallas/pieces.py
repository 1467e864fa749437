"""f32 numbers as sums of bf16 ones, their pieces, which every TPU's matrix unit multiplies.

Three pieces hold the 24 bits of a number x = x0 + x1 + x2, each at most 2^-7 of the one before. Of
x w the products x_i w_j with i + j > 2 are below 2^-20 of it, and left out: six are summed, or
three where w is one piece itself, as numbers of bf16 and codes of eight bits are. A compiler that
is asked for a product of f32 in the highest precision does the same, but all at once, and splits
its factors again wherever it multiplies them, for which there are not enough registers.
"""

import functools

import jax
import jax.numpy as jnp

COUNT = 3


def count(dtype: jax.typing.DTypeLike) -> int:
    """How many pieces numbers of a dtype are."""
    return COUNT if dtype == jnp.float32 else 1


def pairs(of_x: int, of_w: int) -> list[tuple[int, int]]:
    """Pieces of x and of w that are multiplied with each other.

    Those of a piece of w follow each other: the first can begin before w is split to the last.

    Args:
      of_x: pieces of x.
      of_w: of w.
    """
    most = max(of_x, of_w)
    return [(i, j) for j in range(of_w) for i in reversed(range(of_x)) if i + j < most]


def total(products: jax.Array, rows: int) -> jax.Array:
    """The sum of products of pieces, which lie below each other.

    Args:
      products: ``(pairs * rows, ..)``.
      rows: of each.
    """
    parts = [products[first : first + rows] for first in range(0, products.shape[0], rows)]
    return functools.reduce(jnp.add, parts)


def split(x: jax.Array) -> list[jax.Array]:
    """Three bf16 pieces of f32 numbers, in a kernel.

    They are cut off, not rounded: by their bits, which no compiler takes for needless.
    """
    parts = []
    for _ in range(COUNT - 1):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-0x10000)
        parts.append(jax.lax.bitcast_convert_type(bits, jnp.float32))
        x = x - parts[-1]
    return [part.astype(jnp.bfloat16) for part in (*parts, x)]


def listed(x: jax.Array) -> jax.Array:
    """The pieces of an array, rounded, outside of a kernel.

    Args:
      x: of f32, or of numbers that are one piece, which stay as they are.

    Returns:
      The pieces along a new first axis.
    """
    if x.dtype != jnp.float32:
        return x[None]
    parts = []
    for _ in range(COUNT):
        parts.append(jax.lax.reduce_precision(x, 8, 7))
        x = x - parts[-1]
    return jnp.stack(parts).astype(jnp.bfloat16)
