"""The quantized matmul on TPUs (Mosaic): weights are decoded next to the matrix unit.

One grid step multiplies a tile of x with a tile of W, a unit of inputs (a group, or what the matrix
unit is deep) at a time, and scales each unit's sums: decoding a weight costs one conversion and no
multiplication. What the matrix unit cannot multiply as it is, is split into pieces that it can,
stacked as rows, because with few rows it has nothing else to do while weights are pushed into it:

- rows against integers, on v5: three int8 digits of bf16 x and four of f32 x, counted from the
  power of two above the row's largest entry;
- f32 rows otherwise: three bf16 numbers whose sum is x;
- groups smaller than a unit: one copy of x a group, zero outside it.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels import pieces as pieces_of
from jaxcomp.kernels.calls import by_name, on_tpu
from jaxcomp.kernels.chips import V5E, Chip
from jaxcomp.kernels.quantized_matmul import (
    layout,
    tpu_codes,
    tpu_dense,
    tpu_factors,
    tpu_float8,
    tpu_quantize,
    tpu_rows,
    tpu_tiles,
)
from jaxcomp.kernels.quantized_matmul.reference import Options
from jaxcomp.kernels.quantized_matmul.tpu_dense import decode, finish
from jaxcomp.kernels.quantized_matmul.weights import FORMATS, Weight

_LANES = 128
# Longest product whose sums are scaled as one. Of twice that v5 spills registers.
_DEEPEST = 1024
# Rows of a tile up to which a chip has registers for several blocks of outputs at once.
_TOGETHER = {"v6e": 16, "7x": 32}
# Rows of three and of four digits above which v5 has no registers for products of more than 128
# outputs.
_DIGITS = {3: 128, 4: 64}
# Rows of a tile whose sums wait in memory, where there are no registers for those of all.
_WAITING = 16
# Groups, and inputs, of a tile above which zero points, or e4m3 on v5, take registers of the rest.
_GROUPS, _DEEP = 64, 4096
# Most bytes of memory for the products of a tile.
_PRODUCTS = 4 << 20


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How a product is put to the matrix unit.

    Attributes:
      x: dtype of the pieces of x.
      w: dtype of the decoded weights.
      pieces: into how many x is split.
      depth: inputs that are multiplied at a time.
      copies: groups in that depth, each of which has rows of its own.
      packed: whether the cores look up bytes of a codebook, or words.
      unit: what a 1 among decoded weights stands for.
      by_row: whether pieces of few rows follow each other, rather than those of all.
    """

    x: str
    w: str
    pieces: int
    depth: int
    copies: int
    packed: bool
    unit: float
    by_row: bool


def arithmetic(chip: Chip, x_dtype, weight: Weight, options: Options) -> Arithmetic:
    """The cheapest exact product of a chip for these operands."""
    kind, float8 = FORMATS[weight.format].kind, "float8_e4m3fn"
    exact_in_float8 = weight.format in ("int4", "int2", "fp8") and chip.multiplies(float8)
    group_size = weight.group_size
    split = x_dtype == jnp.float32 and options.activation_dtype is None
    # The cores of v5 turn integers into int8 in one instruction; those of wider units into bf16.
    digits = kind == "int" and chip.mxu == _LANES and options.activation_dtype is None
    # The matrix units of v6e keep no sums, and those of three pieces are more than registers hold.
    # So are sums of more than 16 rows' digits.
    deepest = chip.mxu if split and chip.name == "v6e" else _DEEPEST // (2 if digits else 1)
    depth = max(
        size
        for size in range(_LANES, max(min(group_size, deepest), _LANES) + 1, _LANES)
        if size == _LANES or group_size % size == 0
    )
    depth = _LANES if weight.format == "int2" else depth
    unit = tpu_dense.unit(weight.format, chip)
    copies = max(depth // group_size, 1)
    # The matrix unit of 7x takes an eighth longer for rows in this order, and has registers for
    # pieces in the other one.
    by_row = digits or (split and (chip.name != "7x" or copies > 1))
    units = depth, copies, chip.mxu > _LANES, unit, by_row
    if options.activation_dtype == "int8":
        return Arithmetic("int8", "int8", 1, *units)
    if options.activation_dtype == float8:
        dtype = float8 if exact_in_float8 else "bfloat16"
        return Arithmetic(dtype, dtype, 1, *units)
    narrow = x_dtype == jnp.bfloat16
    if digits:
        return Arithmetic("int8", "int8", 3 if narrow else 4, *units)
    pieces = 1 if narrow else 3
    return Arithmetic("bfloat16", float8 if exact_in_float8 else "bfloat16", pieces, *units)


def unfit(
    weight: Weight, chip: Chip | None, options: Options | None = None, x_dtype=jnp.bfloat16
) -> str | None:
    """Why the kernel does not take a weight on a chip, or None.

    Args:
      weight: stored or prepared.
      chip: None for one that no kernel knows.
      options: what is fused, where it is known.
      x_dtype: dtype of the rows.

    Returns:
      A reason, or None.
    """
    if chip is None or chip.platform != "tpu":
        return f"the chip is {chip.name if chip else 'unknown'}, not a TPU"
    k = weight.shape[1]
    if not k or k % _LANES:
        return f"the {k} inputs are not a multiple of {_LANES}"
    if weight.group_size % _LANES and _LANES % weight.group_size:
        return f"groups of {weight.group_size} neither divide {_LANES} nor are multiples of it"
    if weight.format == "int2" and k % (4 * _LANES):
        return f"the {k} inputs of int2 are not a multiple of {4 * _LANES}"
    if weight.format == "codebook" and x_dtype == jnp.float32:
        return "float32 rows ask for more than the bf16 values that a codebook is decoded to"
    if options and options.activation_dtype == "int8" and not chip.multiplies("int8"):
        return f"the matrix unit of {chip.name} has no integers; use float8_e4m3fn activations"
    return None


def many_rows(m: int, x_dtype, weight: Weight, chip: Chip, options: Options) -> str | None:
    """Which kernel of many rows takes a product.

    Args:
      m: rows.
      x_dtype: their dtype, before they are quantized.
      weight: prepared.
      chip: a TPU.
      options: what is fused.

    Returns:
      "codes": products of quantized rows and codes; "dense": of bf16 and weights that were scaled
      and rounded to it, for bf16 rows only; None for the kernel of few rows.
    """
    few, dtype = tpu_tiles.table(chip.name, "few")["rows"], options.activation_dtype
    wide = chip.mxu > _LANES
    if dtype is None and _scaled_soon(weight, chip):
        few //= 2
    # With a copy of each for each group of a unit. On v5 decoding to bf16 takes longer than those
    # of quantized rows.
    rows = m * max(_LANES // weight.group_size, 1) if wide or dtype is None else m
    if dtype is None:
        return "dense" if rows > few and x_dtype == jnp.bfloat16 else None
    codes = tpu_codes.fits(weight, chip, dtype)
    # On v5 sums of so few more are scaled sooner than their weights are; with a scale an output the
    # kernel of codes takes as long, and spills nothing.
    soon = wide or (codes and tpu_factors.by_channel(weight))
    if rows <= (few if soon else 2 * few):
        return None
    if codes:
        return "codes"
    return "dense" if x_dtype == jnp.bfloat16 and not integers(chip, weight, options) else None


def _scaled_soon(weight: Weight, chip: Chip) -> bool:
    """Whether scaled weights of half as many rows take no longer than sums, which spill."""
    channel = chip.name == "v6e" and tpu_factors.by_channel(weight)
    return channel or (chip.mxu > _LANES and weight.format == "codebook")


def integers(chip: Chip, weight: Weight, options: Options) -> bool:
    """Whether integers are faster than bf16 of many rows however often their sums are scaled.

    Args:
      chip: a TPU.
      weight: whose groups they are.
      options: with the dtype that rows are quantized to.
    """
    return (
        chip.mxu == _LANES
        and options.activation_dtype == "int8"
        and weight.group_size % _LANES == 0
    )


def matmul(
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    options: Options,
    chip: Chip = V5E,
    interpret=False,
    tile: tpu_tiles.Tile | None = None,
    x_scales: jax.Array | None = None,
) -> jax.Array:
    """Multiplies: y = activation(x Wᵀ + bias).

    Args:
      x: ``(M, K)``, bf16 or f32.
      weight: without stack axes, perhaps one of several layers; one that is not prepared is
        prepared here, on every call.
      bias: ``(N,)`` or None.
      options: what is fused.
      chip: whose arithmetic to use.
      interpret: False, or ``pltpu.InterpretParams(..)``.
      tile: of the kernel of few rows, which then runs; None for a good one.
      x_scales: f32 ``(M, 1)`` that rows are quantized with, or None.

    Returns:
      ``(M, N)``.
    """
    weight = layout.prepare(weight.sliced()) if weight.layout == "stored" else weight
    m, (n, k) = x.shape[0], weight.shape
    dense = tpu_tiles.dense(chip.name, m, n, k, chip.mxu)
    many = None
    if dense and tile is None:
        many = many_rows(m, x.dtype, weight, chip, options)
    if many is not None:
        run = tpu_codes.matmul if many == "codes" else tpu_dense.matmul
        if options.activation_dtype is not None:
            dense = tpu_quantize.shared(dense, n, chip)
        how_much = cost(m, weight, options)
        return run(x, weight, bias, options, chip, interpret, dense, how_much, x_scales)
    how = arithmetic(chip, x.dtype, weight, options)
    pieces = how.pieces * how.copies
    tile = tile or tile_of(chip, m, weight, how)
    padded = -(-m // tile.m) * tile.m
    steps, per_step = k // tile.k, max(tile.k // weight.group_size, 1)
    steps_per_scale = np.int32(max(weight.group_size // tile.k, 1))
    scratch = scratch_of(tile, steps, weight, how, chip)
    tiles_of_n = -(-n // tile.n)
    # Each core quantizes the rows itself, at the first of its tiles of outputs.
    cores = chip.cores if tiles_of_n % chip.cores == 0 else 1
    inside = tpu_rows.inside(x, chip, how, options, tile) and cores == chip.cores
    each = tiles_of_n // cores
    if inside:
        scratch |= tpu_rows.scratch(tile, steps, weight, how)
        grid = (1, cores, each, steps)
    else:
        grid = (padded // tile.m, tiles_of_n, steps)

    def spec(shape, index):
        """A block by its tile of rows, tile of outputs, step of inputs and scalars."""
        if not inside:
            return pl.BlockSpec(shape, index)
        return pl.BlockSpec(
            shape, lambda i, core, j, step, *layer: index(i, core * each + j, step, *layer)
        )

    def body(refs, y_ref, *own):
        _kernel(
            refs, y_ref, **dict(zip(scratch, own, strict=True)),
            weight=static(weight), how=how, tile=tile, options=options, axes=len(grid),
            apart=apart(chip, tile, options),
        )  # fmt: skip

    def by_group(array):
        """(groups, N) as (.., groups a step, N)."""
        return array.reshape(-1, per_step, n)

    scale_spec = spec(
        (None, per_step, tile.n),
        lambda i, j, step, *layer: (jax.lax.div(step, steps_per_scale), 0, j),
    )
    fields = 4 if weight.format == "int2" else 1
    scalars = weight.scalars
    operands = {
        "w": (
            weight.codes,
            spec(
                (*(None for _ in scalars), tile.n, tile.k // fields),
                lambda i, j, step, *layer: (*(number[0] for number in layer), j, step),
            ),
        ),
        "scales": (by_group(weight.scales), scale_spec),
    }
    if weight.zeros is not None:
        operands["zeros"] = (by_group(weight.zeros), scale_spec)
    by_row = spec((tile.m, 1), lambda i, j, step, *layer: (i, 0))
    if inside:
        operands["x"] = (x, spec((tile.m, k), lambda i, j, step, *layer: (i, 0)))
        if x_scales is not None:
            operands["x_scales"] = (x_scales, by_row)
    else:
        more = ((0, padded - m), (0, 0))
        if x_scales is not None:
            x_scales = jnp.pad(x_scales, more, constant_values=1.0)
        rows, row_scales, sums = tpu_rows.split(
            jnp.pad(x, more), x_scales, weight, how, options, tile
        )
        operands["x"] = (
            rows, spec((pieces * tile.m, tile.k), lambda i, j, step, *layer: (i, step))
        )  # fmt: skip
        if row_scales is not None:
            operands["row_scales"] = (row_scales, by_row)
        if sums is not None:
            operands["sums"] = (
                sums, spec((None, tile.m, per_step), lambda i, j, step, *layer: (step, i, 0))
            )  # fmt: skip
    if bias is not None:
        operands["bias"] = (
            bias.astype(jnp.float32)[None], spec((1, tile.n), lambda i, j, step, *layer: (0, j))
        )  # fmt: skip
    if weight.table is not None:
        operands["table"] = (weight.table, pl.BlockSpec(memory_space=pltpu.SMEM))

    y = on_tpu(
        by_name(body, tuple(operands), len(scalars)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[spec for _, spec in operands.values()],
            out_specs=spec((tile.m, tile.n), lambda i, j, step, *layer: (i, j)),
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=jax.ShapeDtypeStruct((padded, n), options.out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=None
            if interpret
            else ("parallel", "parallel", *("arbitrary" for _ in grid[2:])),
            vmem_limit_bytes=40 << 20,
        ),
        cost_estimate=cost(m, weight, options),
        interpret=interpret,
        name=f"quantized_matmul_{weight.format}",
    )(*scalars, *(array for array, _ in operands.values()))
    return y[:m]


def cost(m: int, weight: Weight, options: Options, share: float = 1.0) -> pl.CostEstimate:
    """What a product of so many rows costs, for XLA's scheduler and counts.

    Args:
      m: rows.
      weight: of the product, or of all experts.
      options: what is fused.
      share: of the weight that is read.
    """
    n, k = weight.shape
    rows = m * (2 * k + n * jnp.dtype(options.out_dtype).itemsize)
    return pl.CostEstimate(
        flops=2 * m * n * k,
        transcendentals=0 if options.activation in (None, "relu") else m * n,
        bytes_accessed=round(share * weight.nbytes) + rows,
    )


def static(weight: Weight) -> Weight:
    """A weight without its arrays."""
    return dataclasses.replace(
        weight, codes=None, scales=None, zeros=weight.zeros is not None, table=None, layer=None
    )


def tile_of(chip: Chip, m: int, weight: Weight, how: Arithmetic) -> tpu_tiles.Tile:
    """The tile of a product of few rows."""
    pieces = how.pieces * how.copies
    tile = tpu_tiles.few(chip.name, m, *weight.shape, weight.group_size, how.depth, pieces)
    slow = weight.format in ("fp8", "int2") or weight.zeros is not None or how.depth > _LANES
    digits = how.x == "int8" and how.pieces in _DIGITS
    if digits:
        digits = how.pieces * tile.m > _DIGITS[how.pieces] // (2 if slow else 1)
        digits = digits or (weight.zeros is not None and tile.k > _DEEP)
    codes = _codes_once(how) and tile.m > 16 and (slow or tile.m <= 32)
    if chip.mxu == _LANES and (how.w == "bfloat16" or digits or codes):
        # Decoding to bf16 takes the registers of v5 that sums of more outputs would need, and so do
        # the products of digits, and of quantized rows.
        return dataclasses.replace(tile, columns=_LANES)
    return tile


def _codes_once(how: Arithmetic) -> bool:
    """Whether int8 rows are multiplied as they are, not in pieces or copies."""
    return how.x == "int8" and how.pieces * how.copies == 1


def scratch_of(
    tile: tpu_tiles.Tile, steps: int, weight: Weight, how: Arithmetic, chip: Chip
) -> dict:
    """Memory of a kernel, by the name of its argument."""
    found = {}
    rows = how.pieces * how.copies * tile.m
    # On v5 there are several pieces of each row, and nothing spills without both, but for 17 to 32
    # quantized rows.
    short = _codes_once(how) and tile.m <= 32 and tile.columns == _LANES
    if chip.mxu > _LANES or short:
        if 4 * tile.k // how.depth * rows * tile.n <= _PRODUCTS:
            shape = tile.k // how.depth, rows, tile.n
            found["products_ref"] = pltpu.VMEM(shape, jnp.int32 if how.x == "int8" else jnp.float32)
        groups = tile.k // weight.group_size
        # Eight rows leave registers for scales, but for those of many groups and zero points.
        if groups > 1 and (tile.m > 8 or (weight.zeros is not None and groups > _GROUPS)):
            found["scales_ref"] = pltpu.VMEM((-(-tile.n // _LANES), groups, _LANES), jnp.float32)
    if waiting := waiting_rows(tile, weight, how, chip):
        found["waiting_ref"] = pltpu.VMEM((1, waiting, tile.n), jnp.float32)
    if steps > 1:
        found["acc_ref"] = pltpu.VMEM((tile.m, tile.n), jnp.float32)
    return found


def waiting_rows(tile: tpu_tiles.Tile, weight: Weight, how: Arithmetic, chip: Chip) -> int:
    """Rows of a tile whose sums wait in memory: there are no registers for those of all."""
    # 7x sums bf16 products where it multiplies, and has enough where no zero points follow.
    short = chip.name == "v6e" or (chip.name == "7x" and weight.zeros is not None)
    most = 2 * _WAITING if short else tile.m
    if chip.mxu == _LANES and weight.format == "fp8":
        most = _WAITING // 2 if tile.m <= _WAITING and tile.k > _DEEP else _WAITING
    single = how.x == "bfloat16" and how.pieces * how.copies == 1
    return min(most, _WAITING) if single and tile.m > most else 0


def keep_scales(refs, scales_ref, how: Arithmetic, always: jax.Array) -> None:
    """Stores scales so that a load brings one row of them to all sublanes.

    It does so in a branch of its own: what one block of code both stores and loads, the compiler
    would keep in registers, of which there are too few.

    Args:
      refs: with "scales".
      scales_ref: f32 ``(outputs / 128, groups, 128)``, or None where they are not kept.
      how: weights are decoded.
      always: true, which the compiler does not know.
    """
    if scales_ref is not None:

        @pl.when(always)
        def _():
            for block in range(scales_ref.shape[0]):
                scales = refs["scales"][:, pl.ds(block * _LANES, _LANES)]
                scales_ref[block] = scales.astype(jnp.float32) * how.unit


def apart(chip: Chip, tile: tpu_tiles.Tile, options: Options) -> bool:
    """Whether blocks of outputs are not scheduled with each other, which would spill registers."""
    # 7x sums bf16 products where it multiplies.
    spills = options.activation_dtype is not None or chip.name == "v6e"
    return spills and tile.m > _TOGETHER.get(chip.name, tile.m)


def keep_order(products_ref, first: jax.Array) -> None:
    """Touches the products' memory in a branch of its own.

    A compiler that sees at once that this memory is needless schedules all products of a wide
    matrix unit before any is scaled, and the registers spill. A second block of code that stores
    there has it keep the order, until it then drops nearly all stores and loads.

    Args:
      products_ref: None where there is none.
      first: true at some steps.
    """
    if products_ref is not None:

        @pl.when(first)
        def _():
            products_ref[0, :8] = jnp.zeros_like(products_ref[0, :8])


def _kernel(
    refs, y_ref, products_ref=None, scales_ref=None, waiting_ref=None, acc_ref=None, rows_ref=None,
    row_scales_ref=None, sums_ref=None, *, weight, how, tile, options, axes, apart,
):  # fmt: skip
    """One tile of y, or one more tile of inputs added to it."""
    j, k, steps = pl.program_id(axes - 2), pl.program_id(axes - 1), pl.num_programs(axes - 1)
    keep_scales(refs, scales_ref, how, j >= 0)
    keep_order(products_ref, j == 0)
    keep_order(waiting_ref, j == 0)
    if rows_ref is not None:

        @pl.when(jnp.logical_and(j == 0, k == 0))
        def _():
            copies = functools.partial(tpu_rows.copies, weight=weight, how=how)
            tpu_quantize.quantize(
                refs, options.activation_dtype, rows_ref, row_scales_ref, sums_ref,
                copies if how.copies > 1 else None,
            )  # fmt: skip

        refs = {**refs, "x": rows_ref.at[k], "row_scales": row_scales_ref}
        if sums_ref is not None:
            refs["sums"] = sums_ref.at[k]
    for start in range(0, tile.n, tile.columns):
        columns = pl.ds(start, min(tile.columns, tile.n - start))

        def multiply(columns=columns):
            memory = products_ref, scales_ref, waiting_ref
            y = sums_of(refs, columns, weight, how, tile, *memory)
            if acc_ref is None:
                y_ref[:, columns] = finish(refs, y, columns, options)
                return

            @pl.when(k == 0)
            def _():
                acc_ref[:, columns] = y

            @pl.when(k > 0)
            def _():
                acc_ref[:, columns] += y

            @pl.when(k == steps - 1)
            def _():
                y_ref[:, columns] = finish(refs, acc_ref[:, columns], columns, options)

        if apart:
            # Each in a branch of its own, always taken; equal conditions would be merged.
            pl.when(j >= -start)(multiply)
        else:
            multiply()


def sums_of(
    refs, columns, weight, how, tile, products_ref=None, scales_ref=None, waiting_ref=None
):  # fmt: skip
    """f32 ``(tile.m, columns)``: the scaled sums of a tile's inputs."""
    scales = refs["scales"][:, columns].astype(jnp.float32)
    together = tpu_rows.side_by_side(how, tile)
    waiting = 0 if waiting_ref is None else waiting_ref.shape[1]
    ys = [
        jnp.zeros((together - waiting, columns.size), jnp.float32)
        for _ in range(0, tile.m, together)
    ]
    integers = how.x == "int8"
    for start in range(0, tile.k, how.depth):
        w = decode(refs, columns, start, how.depth, weight.format, how.packed, exact=False)
        if how.unit == tpu_float8.UNIT:
            w = tpu_float8.sixteenths(w)
        products = jax.lax.dot_general(
            refs["x"][:, pl.ds(start, how.depth)],
            w.astype(how.w),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.int32 if integers else jnp.float32,
        )
        if products_ref is not None:
            products_ref[start // how.depth, :, columns] = products
            products = products_ref[start // how.depth, :, columns]
        first = 0
        for i, copy in itertools.product(range(len(ys)), range(how.copies)):
            total = None
            for _ in range(how.pieces):
                row = products[first : first + together].astype(jnp.float32)
                first += together
                if total is not None:
                    row = (total * 256.0 if integers else total) + row
                total = row
            group = start // weight.group_size + copy
            if scales_ref is None:
                scale = scales[group : group + 1] * how.unit
            else:
                scale = _everywhere(scales_ref, group, columns, together)
            total = total * scale
            if waiting:
                _add(waiting_ref, columns, total[:waiting], start)
            ys[i] = ys[i] + total[waiting:]
    if waiting:
        ys.insert(0, waiting_ref[0, :, columns])
    y = jnp.concatenate(ys)
    # Zero points last: their product would keep its sums in registers all the while.
    if weight.zeros:
        offsets = refs["zeros"][:, columns].astype(jnp.float32) * scales
        y = _subtract(y, refs["sums"][...], offsets, how, "row_scales" in refs)
    return y


def _add(waiting_ref, columns, products, start: int) -> None:
    """Adds products of some rows, from the inputs at ``start`` on, to sums that wait in memory."""
    if start > 0:
        # Zero, which is not known: what was stored is loaded again, not kept in registers.
        zero = jnp.minimum(pl.program_id(0) + pl.program_id(1) + start, 0)
        products = products + waiting_ref[zero, :, columns]
    waiting_ref[0, :, columns] = products


def _subtract(
    y: jax.Array, sums: jax.Array, offsets: jax.Array, how: Arithmetic, scaled: bool
) -> jax.Array:
    """``y - sums offsets``: without what zero points add.

    Args:
      y: f32 ``(rows, outputs)``.
      sums: f32 ``(rows, groups)``, of rows' groups.
      offsets: f32 ``(groups, outputs)``, scaled zero points.
      how: rows were multiplied.
      scaled: whether rows have scales: as digits have, and codes.
    """
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    digits = how.x == "int8" and how.pieces == 3
    exact = not (digits or (how.x == "bfloat16" and how.pieces == 1 and not scaled))
    if exact and y.shape[0] <= 2 * _WAITING:
        return y - dot(sums, offsets, precision="highest")
    # Of bf16 rows, three digits each, two pieces of both are enough.
    pairs = reversed(pieces_of.pairs(3, 3)) if exact else ((0, 1), (1, 0), (0, 0))
    of_sums, of_offsets = pieces_of.split(sums), pieces_of.split(offsets)
    products = (dot(of_sums[i], of_offsets[j]) for i, j in pairs)
    # One product after the other: of many rows that takes fewer registers, but of digits.
    return y - sum(products) if digits else functools.reduce(jnp.subtract, products, y)


def _everywhere(scales_ref, group: int, columns: pl.Slice, rows: int) -> jax.Array:
    """``(rows, columns)``: the scales of a group, in all rows."""
    blocks = range(columns.start // _LANES, (columns.start + columns.size) // _LANES)
    shape = rows, _LANES
    # Of 128 outputs at a time the row is loaded into all sublanes at once.
    return jnp.concatenate(
        [jnp.broadcast_to(scales_ref[block, pl.ds(group, 1)], shape) for block in blocks], axis=1
    )
