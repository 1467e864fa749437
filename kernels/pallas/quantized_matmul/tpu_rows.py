"""Rows of x as the TPU kernels of few rows, and of experts, multiply them.

They are split, or quantized by XLA, outside of the kernel, or, of one tile of a weight's rows,
quantized inside, at its first step; see ``tpu_quantize``. Of experts they are not: each of their
tiles is visited by every expert that has rows in it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels import pieces
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.quantized_matmul import reference, tpu_quantize
from jaxcomp.kernels.quantized_matmul.reference import Options
from jaxcomp.kernels.quantized_matmul.tpu_tiles import Tile
from jaxcomp.kernels.quantized_matmul.weights import Weight

_LANES = 128
# Most bytes of the rows in VMEM, before and after.
_ROWS = 12 << 20


def inside(x: jax.Array, chip: Chip, how, options: Options, tile: Tile) -> bool:
    """Whether the kernel quantizes rows.

    Args:
      x: ``(M, K)``.
      chip: a TPU.
      how: the ``tpu.Arithmetic``.
      options: what is fused.
      tile: of the kernel.
    """
    m, k = x.shape
    held = 2 * x.dtype.itemsize + how.copies * jnp.dtype(how.x).itemsize
    return tpu_quantize.known(chip, options) and m <= tile.m and tile.m * k * held <= _ROWS


def scratch(tile: Tile, steps: int, weight: Weight, how) -> dict:
    """Memory of a kernel that quantizes rows, by the name of its argument."""
    found = {
        "rows_ref": pltpu.VMEM((steps, how.copies * tile.m, tile.k), jnp.dtype(how.x)),
        "row_scales_ref": pltpu.VMEM((tile.m, _LANES), jnp.float32),
    }
    if weight.zeros is not None:
        groups = max(tile.k // weight.group_size, 1)
        found["sums_ref"] = pltpu.VMEM((steps, tile.m, groups), jnp.float32)
    return found


def copies(x: jax.Array, weight: Weight, how) -> jax.Array:
    """``(copies * M, K)``: for each group of a unit the rows with zeros outside of it."""
    if how.copies == 1:
        return x
    column = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    group = jax.lax.div(jax.lax.rem(column, how.depth), weight.group_size)
    return jnp.concatenate([jnp.where(group == i, x, 0.0) for i in range(how.copies)])


def split(x, x_scales, weight, how, options, tile):
    """Rows of x as the kernel takes them, and what is left of their scales.

    Returns:
      ``(copies * pieces * M, K)`` with the copies and pieces of some rows together; f32 row
      scales ``(M, 1)`` or None; f32 group sums ``(steps, M, groups a step)`` or None.
    """
    m, k = x.shape
    row_scales = None
    if options.activation_dtype is not None:
        x, row_scales = reference.quantize_rows(x, options.activation_dtype, x_scales)
        total, parts = x.astype(jnp.float32), [x]
    elif how.x == "int8":
        total, parts, row_scales = _digits(x, how.pieces)
    else:
        total, parts = x.astype(jnp.float32), list(pieces.listed(x))
    rows = jnp.stack([part.astype(how.x) for part in parts])
    sums = None
    if weight.zeros is not None:
        steps = k // tile.k
        width = min(weight.group_size, tile.k)
        sums = total.reshape(m, steps, tile.k // width, width).sum(-1).swapaxes(0, 1)
    if how.copies > 1:
        group = jnp.arange(k) % how.depth // weight.group_size
        own = group == jnp.arange(how.copies)[:, None]
        rows = jnp.where(own[:, None, None], rows[None], jnp.zeros((), rows.dtype))
    together = side_by_side(how, tile)
    rows = rows.reshape(-1, m // together, together, k).swapaxes(0, 1)
    return rows.reshape(-1, k), row_scales, sums


def side_by_side(how, tile: Tile) -> int:
    """Rows of a tile whose pieces and copies follow each other.

    Where these are those of a register, the products of pieces are added as the matrix unit returns
    them. If those of a tile's other rows came in between, all would wait in registers.

    Args:
      how: the ``tpu.Arithmetic``.
      tile: of the kernel.
    """
    if not how.by_row:
        return tile.m
    few = how.x == "bfloat16" and tile.m <= 16
    return math.gcd(tile.m, 8 if few else 32 // jnp.dtype(how.x).itemsize)


def _digits(x: jax.Array, count: int) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """Splits rows into signed digits of eight bits, below a power of two a row.

    Args:
      x: ``(M, K)``.
      count: digits.

    Returns:
      f32 whole numbers ``(M, K)``, their digits in int32, highest first, and the f32 scales
      ``(M, 1)`` that make x of them.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    # Powers of two by their bits: the largest becomes less than 2^(8 count - 2), so that the first
    # digit is one of int8. Rows that are all smaller than 2^-80 keep what is above 2^-110.
    bits = 8 * count - 3
    exponent = jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23
    exponent = jnp.maximum(exponent, 47) - 127 - bits
    power = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    whole = jnp.round(x * power((127 - exponent) << 23)).astype(jnp.int32)
    digits, rest = [], whole
    for _ in range(count - 1):
        digits.append((rest << 24) >> 24)
        rest = (rest - digits[-1]) >> 8
    # Integers have no infinity and no NaN: the scale carries them. The largest may not, as a CPU's
    # maximum can lose a NaN.
    finite = jnp.all(jnp.isfinite(x), axis=1, keepdims=True)
    scale = jnp.where(finite, power((127 + exponent) << 23), jnp.nan)
    return whole.astype(jnp.float32), [rest, *digits[::-1]], scale
