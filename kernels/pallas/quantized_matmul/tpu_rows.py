"""Rows of x as the TPU kernels multiply them: split outside of a kernel, or quantized inside.

Up to 16 rows are quantized by the kernel itself at its first step, and stay in VMEM for the
others: no pass over x before it. On v5e, of 16 rows of 4096 inputs, this takes 858 scheduled
cycles, and XLA 884 in six programs, whose starts are not in them. Of more rows the kernel's loops
take longer than XLA's, and many rows are quantized in one pass by XLA: each of their tiles is
visited again for every tile of outputs (and by every expert that has rows in it), which would
quantize it as often, or hold all of x. Both ways are the arithmetic of
``reference.quantize_rows``.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.quantized_matmul import reference
from jaxcomp.kernels.quantized_matmul.reference import Options
from jaxcomp.kernels.quantized_matmul.tpu_tiles import Tile
from jaxcomp.kernels.quantized_matmul.weights import Weight

_LANES = 128
# Most inputs that are quantized at a time, and entries: what the registers hold.
_CHUNK, _ENTRIES = 512, 1 << 13
# Most rows that the kernel quantizes.
_MOST = 16
# Most bytes of the rows in VMEM, before and after.
_ROWS = 8 << 20


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
    if options.activation_dtype is None or m > min(tile.m, _MOST):
        return False
    # Cores that do not know float8 do not round to it either.
    known = options.activation_dtype == "int8" or chip.multiplies(options.activation_dtype)
    held = 2 * x.dtype.itemsize + how.copies * jnp.dtype(how.x).itemsize
    return known and tile.m * k * held <= _ROWS


def scratch(tile: Tile, steps: int, weight: Weight, how) -> dict:
    """Memory of a kernel that quantizes rows, by the name of its argument."""
    found = {
        "rows_ref": pltpu.VMEM((steps, how.copies * tile.m, tile.k), jnp.dtype(how.x)),
        "row_scales_ref": pltpu.VMEM((tile.m, 1), jnp.float32),
    }
    if weight.zeros is not None:
        groups = max(tile.k // weight.group_size, 1)
        found["sums_ref"] = pltpu.VMEM((steps, tile.m, groups), jnp.float32)
    return found


def quantize(refs, weight, how, options, rows_ref, row_scales_ref, sums_ref=None) -> None:
    """Quantizes the rows of a tile.

    Args:
      refs: with all inputs of the tile's rows, "x", and perhaps their "x_scales".
      weight: without its arrays.
      how: they are multiplied.
      options: what is fused.
      rows_ref: ``(steps, copies * M, inputs a step)``; gets the codes.
      row_scales_ref: ``(M, 1)``; gets the scales.
      sums_ref: ``(steps, M, groups a step)``; gets the sums of the codes of each group.
    """
    x_ref, dtype = refs["x"], options.activation_dtype
    steps, _, width = rows_ref.shape
    m = x_ref.shape[0]
    most = min(_CHUNK, max(_ENTRIES // m, _LANES))
    none = jnp.zeros((m, _LANES), jnp.float32)
    if "x_scales" in refs:
        scales = refs["x_scales"][...]
    else:

        def largest_of(i, largest):
            entries = x_ref[:, _inputs(i * wide, wide)].astype(jnp.float32)
            return _by_lane(jnp.abs(entries), largest)

        k = x_ref.shape[1]
        wide = max(size for size in range(_LANES, most + 1, _LANES) if k % size == 0)
        largest = jax.lax.fori_loop(0, k // wide, largest_of, none)
        scales = reference.scales_of(jnp.max(largest, axis=-1, keepdims=True), dtype)
    group = weight.group_size
    chunk = max(
        size
        for size in range(_LANES, most + 1, _LANES)
        if width % size == 0 and (size % group == 0 or group % size == 0)
    )

    def some(i, j, undefined, sums):
        """Inputs from ``j * chunk`` of step i."""
        start = pl.multiple_of(j * chunk, chunk)
        scaled = reference.scaled(x_ref[:, _inputs(i * width + j * chunk, chunk)], scales)
        nan = jnp.where(scaled != scaled, 1.0, 0.0)
        undefined = _by_lane(nan, undefined)
        codes = reference.rounded(scaled, dtype).astype(jnp.float32)
        rows_ref[i, :, pl.ds(start, chunk)] = copies(codes, weight, how).astype(how.x)
        if sums is not None:
            column = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 1)
            for part in range(0, chunk, min(group, chunk)):
                total = jnp.sum(codes[:, part : part + group], axis=1, keepdims=True)
                sums += jnp.where(column == jax.lax.div(start + part, group), total, 0.0)
        return undefined, sums

    def step(i, undefined):
        sums = None if sums_ref is None else jnp.zeros(sums_ref.shape[1:], jnp.float32)
        undefined, sums = jax.lax.fori_loop(
            0, width // chunk, lambda j, found: some(i, j, *found), (undefined, sums)
        )
        if sums_ref is not None:
            sums_ref[i] = sums
        return undefined

    undefined = jnp.max(jax.lax.fori_loop(0, steps, step, none), axis=1, keepdims=True)
    row_scales_ref[...] = jnp.where(undefined > 0, jnp.nan, scales)


def _inputs(start, size: int) -> pl.Slice:
    """Some inputs, from a multiple of 128."""
    return pl.ds(pl.multiple_of(start, _LANES), size)


def _by_lane(x: jax.Array, most: jax.Array) -> jax.Array:
    """``(M, 128)``: the largest of each lane's entries so far, which move to no other lane yet."""
    for start in range(0, x.shape[1], _LANES):
        most = jnp.maximum(most, x[:, start : start + _LANES])
    return most


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
      ``(copies * pieces * M, K)`` with the copies and pieces of a tile's rows together; f32 row
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
        total, parts = x.astype(jnp.float32), _floats(x, how.pieces)
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
    rows = rows.reshape(-1, m // tile.m, tile.m, k).swapaxes(0, 1)
    return rows.reshape(-1, k), row_scales, sums


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


def _floats(x: jax.Array, pieces: int) -> list[jax.Array]:
    """Splits rows into bf16 numbers that add up to them."""
    parts = []
    for _ in range(pieces):
        parts.append(jax.lax.reduce_precision(x, 8, 7))
        x = x - parts[-1]
    return parts
