"""Rows that TPU kernels quantize themselves, with the arithmetic of ``reference.quantize_rows``.

A kernel quantizes each tile of rows when it meets it first, and keeps codes in VMEM: the tiles of
outputs that follow multiply them from there, and x is read once. Where the codes of all rows do
not fit it takes a part of the rows after the other, or leaves them to XLA, which quantizes them
before: see ``Visits.of``.

Of 2048 rows of 4096 inputs the loops below take 26720 scheduled cycles on v5e, 24672 on v6e and
20320 on 7x, and XLA's three passes over x 95328, 47344 and 44408; of 256 rows 3340, 3084 and 2540,
and XLA 11738, 5707 and 5316; of 14336 inputs as much an input. On v5p each of the two cores
quantizes all 2048 rows, in 26912; XLA's passes are 96016, which they share. (Bundles of the
compiler's schedules times their trips, added up by hand: no benchmark prints these.)

Scales lie in all lanes, so that a loop's step computes what depends on them alone once. Whether a
row's entries are all numbers is seen from its largest, found among their bits, which order NaNs
above all others.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.quantized_matmul import reference
from jaxcomp.kernels.quantized_matmul.reference import Options
from jaxcomp.kernels.quantized_matmul.tpu_tiles import LANES as _LANES
from jaxcomp.kernels.quantized_matmul.tpu_tiles import Tile
from jaxcomp.kernels.quantized_matmul.weights import FORMATS, Weight

# Entries that a loop's step looks at: enough for its instructions to hide each other's latency. Of
# those that are also summed, or copied, registers hold fewer.
_ENTRIES, _SUMMED = 1 << 15, 1 << 13
# Inputs of groups that the matrix unit adds up at a time.
_SUMMED_AT_ONCE = 256
# Rows whose largest entries are in registers at a time, where there are more than _TOGETHER.
_ROWS, _TOGETHER = 32, 64
# Rows whose scales are computed at a time.
_SCALED = 128
# Bits of f32 infinity; those of a NaN, less its sign, are more.
_INFINITY = 0x7F800000
# Bytes of VMEM that a kernel of many rows may take, unless its rows take more; and what of them the
# compiler needs.
_MEMORY, _ROOM = 48 << 20, 4 << 20


def known(chip: Chip, options: Options) -> bool:
    """Whether a chip's kernels quantize rows: cores without float8 do not round to it either."""
    dtype = options.activation_dtype
    return dtype is not None and (dtype == "int8" or chip.multiplies(dtype))


def shared(tile: Tile, n: int, chip: Chip) -> Tile:
    """A tile of as many outputs, or fewer, that a chip's cores share evenly, if there is one."""
    # Of one block of outputs, which is no loop, the compiler keeps too much in registers.
    sizes = range(tile.n, tile.columns, -tile.columns)
    even = (size for size in sizes if -(-n // size) % chip.cores == 0)
    return dataclasses.replace(tile, n=next(even, tile.n))


@dataclasses.dataclass(frozen=True)
class Visits:
    """In which order a kernel of many rows visits its tiles, and whether it quantizes the rows.

    Attributes:
      rows: tiles of rows of a part.
      outputs: tiles of outputs.
      parts: of the rows, one after the other, each with all outputs.
      cores: that share the tiles of outputs; each quantizes all rows, at its first of them.
      dtype: of the codes that the kernel keeps, or None where rows come as they are multiplied.
      memory: bytes of VMEM that the kernel may take.
    """

    rows: int
    outputs: int
    parts: int = 1
    cores: int = 1
    dtype: str | None = None
    memory: int = _MEMORY

    @classmethod
    def of(
        cls, x: jax.Array, weight: Weight, options: Options, chip: Chip, tile: Tile, dtype: str,
        decoded: bool,
    ) -> "Visits":  # fmt: skip
        """The ones of a product.

        Args:
          x: ``(M, K)``, before they are quantized.
          weight: prepared.
          options: what is fused.
          chip: a TPU.
          tile: of the kernel.
          dtype: that rows are multiplied in.
          decoded: whether a tile of weights is decoded once, for all tiles of rows: of several
            parts each would decode it again, so that there is one, or XLA quantizes.
        """
        (m, k), n = x.shape, weight.shape[0]
        tiles, outputs = -(-m // tile.m), -(-n // tile.n)
        if not known(chip, options) or outputs % chip.cores:
            return cls(tiles, outputs)
        blocks = 2 * tile.m * (k * x.dtype.itemsize + 4 * tile.n)
        blocks += 2 * tile.n * k * FORMATS[weight.format].bits // 8
        each = tile.m * (k * jnp.dtype(dtype).itemsize + 4 * _LANES)
        fixed = blocks + (2 * tile.n * k if decoded else 0)
        # The compiler keeps a part of it.
        most = chip.vmem // 4 * 3

        def fits(rows, memory):
            return fixed + rows * each <= memory - _ROOM

        parts = [1] if decoded else range(1, tiles + 1)
        rows = next((tiles // p for p in parts if tiles % p == 0 and fits(tiles // p, most)), None)
        if rows is None:
            return cls(tiles, outputs)
        memory = _MEMORY if fits(rows, _MEMORY) else most
        return cls(rows, outputs, tiles // rows, chip.cores, dtype, memory)

    @property
    def grid(self) -> tuple[int, ...]:
        """Cores and parts, if there are several, tiles of outputs, and tiles of rows."""
        several = tuple(size for size in (self.cores, self.parts) if size > 1)
        return *several, self.outputs // self.cores, self.rows

    @property
    def semantics(self) -> tuple[str, ...]:
        """Of the grid's axes: what cores share, and what they visit in order."""
        shared = self.cores > 1 or self.dtype is None
        return ("parallel" if shared else "arbitrary", *("arbitrary" for _ in self.grid[1:]))

    def _place(self, index: Callable) -> Callable:
        """Of programs' ids and scalars: the index by core, part, tiles of outputs and rows."""

        def of(*ids):
            ids, layer = list(ids[: len(self.grid)]), ids[len(self.grid) :]
            core = ids.pop(0) if self.cores > 1 else 0
            part = ids.pop(0) if self.parts > 1 else 0
            return index(core, part, *ids, *layer)

        return of

    def spec(self, shape: tuple[int | None, ...], index: Callable) -> pl.BlockSpec:
        """A block by its tile of outputs, tile of rows, and scalars."""
        each, rows = np.int32(self.outputs // self.cores), np.int32(self.rows)

        def of(core, part, j, i, *layer):
            return index(core * each + j, part * rows + i, *layer)

        return pl.BlockSpec(shape, self._place(of))

    def operands(self, x: jax.Array, x_scales: jax.Array | None, options: Options, tile: Tile):
        """Rows as the kernel takes them, by name, and their blocks.

        Args:
          x: ``(M, K)``.
          x_scales: f32 ``(M, 1)`` that they are quantized with, or None.
          options: what is fused.
          tile: of the kernel.
        """
        shape = tile.m, x.shape[1]
        if self.dtype is not None:
            # Its last block stays where it is: later tiles of outputs do not ask for it.
            rows = np.int32(self.rows)

            @self._place
            def once(core, part, j, i, *layer):
                return part * rows + jnp.where(j == 0, i, rows - 1), 0

            operands = {"x": (x, pl.BlockSpec(shape, once))}
            if x_scales is not None:
                operands["x_scales"] = x_scales, pl.BlockSpec((tile.m, 1), once)
            return operands
        more = (0, -x.shape[0] % tile.m), (0, 0)
        operands, by_row = {}, lambda j, i, *layer: (i, 0)
        if options.activation_dtype is not None:
            x, scales = reference.quantize_rows(x, options.activation_dtype, x_scales)
            operands["row_scales"] = jnp.pad(scales, more), self.spec((tile.m, 1), by_row)
        return operands | {"x": (jnp.pad(x, more), self.spec(shape, by_row))}

    def scratch(self, tile: Tile, k: int, options: Options, terms: int = 0) -> dict:
        """Memory of the rows, by the name of its argument.

        Args:
          tile: of the kernel.
          k: inputs.
          options: what is fused.
          terms: of the sums of the rows' groups, or 0 where nothing is multiplied with them.
        """
        if options.activation_dtype is None:
            return {}
        by_row = tile.m, _LANES
        if self.dtype is None:
            return {"row_scales_ref": pltpu.VMEM((1, *by_row), jnp.float32)}
        found = {
            "rows_ref": pltpu.VMEM((self.rows, tile.m, k), jnp.dtype(self.dtype)),
            "row_scales_ref": pltpu.VMEM((self.rows, *by_row), jnp.float32),
        }
        if terms:
            found["sums_ref"] = pltpu.VMEM((self.rows, tile.m, terms), jnp.bfloat16)
            found["totals_ref"] = pltpu.VMEM((tile.m, terms), jnp.float32)
        return found

    def rows_of(
        self, refs, options, group_size, row_scales_ref=None, rows_ref=None, sums_ref=None,
        totals_ref=None,
    ) -> dict:  # fmt: skip
        """Operands with a step's rows as they are multiplied, quantized if they are not yet.

        Args:
          refs: operands by name.
          options: what is fused.
          group_size: inputs of a group.
          row_scales_ref: f32 ``(tiles, rows, 128)``, or None without any.
          rows_ref: ``(tiles, rows, K)``, or None where they come as they are multiplied.
          sums_ref: bf16 ``(tiles, rows, terms)`` for what ``tpu_factors.sums`` makes of codes.
          totals_ref: f32 ``(rows, terms)``.
        """
        if row_scales_ref is None:
            return refs
        axes = len(self.grid)
        j, i = pl.program_id(axes - 2), pl.program_id(axes - 1)
        if rows_ref is None:
            # Spread over lanes once: each block of outputs would do so again.
            scales_ref = row_scales_ref.at[0]
            scales_ref[...] = jnp.broadcast_to(refs["row_scales"][...], scales_ref.shape)
            return {**refs, "row_scales": scales_ref}

        @pl.when(j == 0)
        def _():
            tile = rows_ref.at[pl.ds(i, 1)], row_scales_ref.at[i]
            quantize(refs, options.activation_dtype, *tile)
            if sums_ref is not None:
                _sum(rows_ref.at[i], group_size, sums_ref.at[i], totals_ref)

        own = {"x": rows_ref.at[i], "row_scales": row_scales_ref.at[i]}
        return {**refs, **own} if sums_ref is None else {**refs, **own, "sums": sums_ref.at[i]}


def quantize(refs, dtype: str, rows_ref, row_scales_ref, sums_ref=None, copies=None) -> None:
    """Quantizes the rows of a tile.

    Args:
      refs: with all inputs of the tile's rows, "x", and perhaps their "x_scales".
      dtype: that they are quantized to.
      rows_ref: ``(steps, copies * M, inputs a step)``; gets the codes.
      row_scales_ref: f32 ``(M, 128)``; gets the scales, each in all lanes.
      sums_ref: None, or f32 ``(steps, M, groups a step)``; gets the sums of the codes of each
        group.
      copies: None, or makes of some inputs' f32 codes the copies of all rows.
    """
    x_ref, m = refs["x"], row_scales_ref.shape[0]
    at_once = math.gcd(m, _ROWS) if m > _TOGETHER and copies is None else m
    _each(m, at_once, lambda rows: _largest(x_ref, rows, row_scales_ref))
    given_ref = refs.get("x_scales")
    scaled = math.gcd(m, _SCALED) if m > _SCALED else m
    _each(m, scaled, lambda rows: _scale(given_ref, rows, dtype, row_scales_ref))
    out = row_scales_ref, rows_ref, sums_ref, copies
    _each(m, at_once, lambda rows: _round(x_ref, rows, dtype, *out))


def _each(m: int, size: int, step: Callable[[pl.Slice], None]) -> None:
    """Takes a step for each so many of m rows."""

    def one(i, _):
        step(pl.ds(pl.multiple_of(i * size, size), size))

    jax.lax.fori_loop(0, m // size, one, None)


def _inputs(start, size: int) -> pl.Slice:
    """Some inputs, from a multiple of 128."""
    return pl.ds(pl.multiple_of(start, _LANES), size)


def _chunk(k: int, most: int, group: int = 1) -> int:
    """The most of k inputs at a time that are parts of a group, or whole groups."""
    return max(
        size
        for size in range(_LANES, max(most, _LANES) + 1, _LANES)
        if k % size == 0 and (size % group == 0 or group % size == 0)
    )


def _largest(x_ref, rows, out_ref) -> None:
    """Finds some rows' largest entries of each lane, by their bits: a NaN is above all others."""
    chunk = _chunk(x_ref.shape[1], _ENTRIES // rows.size)

    def step(j, largest):
        entries = x_ref[rows, _inputs(j * chunk, chunk)].astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(entries, jnp.int32) & jnp.int32(0x7FFFFFFF)
        for start in range(0, chunk, _LANES):
            largest = jnp.maximum(largest, bits[:, start : start + _LANES])
        return largest

    none = jnp.zeros((rows.size, _LANES), jnp.int32)
    bits = jax.lax.fori_loop(0, x_ref.shape[1] // chunk, step, none)
    out_ref[rows] = jax.lax.bitcast_convert_type(bits, jnp.float32)


def _scale(given_ref, rows, dtype, row_scales_ref) -> None:
    """Puts some rows' scales in place of each lane's largest entries."""
    largest = row_scales_ref[rows]
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    # What given scales make of infinity is a number: the largest.
    above = jnp.int32(_INFINITY - (given_ref is None))
    undefined = jnp.max(jnp.where(bits > above, 1.0, 0.0), axis=1, keepdims=True)
    if given_ref is None:
        scales = reference.scales_of(jnp.max(largest, axis=1, keepdims=True), dtype)
    else:
        scales = given_ref[rows]
    scales = jnp.where(undefined > 0, jnp.nan, scales)
    row_scales_ref[rows] = jnp.broadcast_to(scales, largest.shape)


def _round(x_ref, rows, dtype, row_scales_ref, rows_ref, sums_ref, copies) -> None:
    """Stores some rows' codes, and their sums."""
    steps, _, width = rows_ref.shape
    plain = sums_ref is None and copies is None
    group = 1 if sums_ref is None else width // sums_ref.shape[2]
    chunk = _chunk(width, (_ENTRIES if plain else _SUMMED) // rows.size, group)

    # Beside sums registers do not hold them as well.
    scales = wide(row_scales_ref[rows], chunk) if plain else None

    def some(i, j, sums):
        """Inputs from ``j * chunk`` of step i."""
        start = pl.multiple_of(j * chunk, chunk)
        entries = x_ref[rows, _inputs(i * width + j * chunk, chunk)].astype(jnp.float32)
        divisors = scales if plain else wide(row_scales_ref[rows], chunk)
        codes = reference.rounded(entries / divisors, dtype)
        if plain:
            rows_ref[i, rows, pl.ds(start, chunk)] = codes.astype(rows_ref.dtype)
            return sums
        codes = codes.astype(jnp.float32)
        stored, place = (codes, rows) if copies is None else (copies(codes), slice(None))
        rows_ref[i, place, pl.ds(start, chunk)] = stored.astype(rows_ref.dtype)
        if sums is not None:
            column = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 1)
            for part in range(0, chunk, min(group, chunk)):
                total = jnp.sum(codes[:, part : part + group], axis=1, keepdims=True)
                sums += jnp.where(column == jax.lax.div(start + part, group), total, 0.0)
        return sums

    def step(i, _):
        sums = None
        if sums_ref is not None:
            sums = jnp.zeros((rows.size, sums_ref.shape[2]), jnp.float32)
        sums = jax.lax.fori_loop(0, width // chunk, lambda j, sums: some(i, j, sums), sums)
        if sums_ref is not None:
            sums_ref[i, rows] = sums

    jax.lax.fori_loop(0, steps, step, None)


def _sum(rows_ref, group_size: int, sums_ref, totals_ref) -> None:
    """Stores the sums of bf16 rows' groups as ``tpu_factors.sums`` does.

    The matrix unit adds them up, times ones where a column is of an input's group.
    """
    k, shape = rows_ref.shape[1], totals_ref.shape
    groups, chunk = k // group_size, _chunk(k, _SUMMED_AT_ONCE)
    totals_ref[...] = jnp.zeros(shape, jnp.float32)

    def step(i, _):
        column, of = (jax.lax.broadcasted_iota(jnp.int32, (shape[1], chunk), d) for d in (0, 1))
        same = jax.lax.rem(column, groups) == jax.lax.div(i * chunk + of, group_size)
        ones = jnp.where(jnp.logical_and(same, column < 3 * groups), 1.0, 0.0)
        totals_ref[...] += jax.lax.dot_general(
            rows_ref[:, _inputs(i * chunk, chunk)],
            ones.astype(rows_ref.dtype),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    jax.lax.fori_loop(0, k // chunk, step, None)
    totals = totals_ref[...]
    high = totals.astype(jnp.bfloat16).astype(jnp.float32)
    second = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, shape, 1), groups) == 1
    sums_ref[...] = jnp.where(second, totals - high, high).astype(jnp.bfloat16)


def wide(scales: jax.Array, width: int) -> jax.Array:
    """``(M, width)`` of scales of rows in 128 lanes, or as they are in one."""
    lanes = scales.shape[1]
    return scales if lanes == 1 else jnp.concatenate([scales] * (width // lanes), axis=1)
