"""2:4 sparse matmuls on TPUs (Mosaic): storage is sparse, arithmetic is not.

The inputs of x are sorted by their position in a group of four, once outside, so that the planes
of prepared values, each the first or second value of every group, become the four parts of a dense
tile by the bits of positions: no value moves between lanes, and a word's two bf16 numbers or four
codes are selected at once. With few rows the parts are multiplied as they are written out, and
scales multiply the products: rows are repeated for each scale of 128 groups, and in a copy only
that scale's inputs are not zero. With more rows the tile, all inputs of some outputs, is scaled,
written to VMEM and serves every tile of rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels import gathers
from jaxcomp.kernels.calls import on_tpu
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.sparse_matmul import layers, nm, reference
from jaxcomp.kernels.sparse_matmul.nm import NMSparse
from jaxcomp.kernels.sparse_matmul.reference import Options

LANES = 128
# Groups of m inputs become as many parts of the tile.
PARTS = 4
# Inputs whose weights are written out at a time.
SLAB = PARTS * LANES
_VMEM = 48 << 20
# Rows, with their copies, that are multiplied while weights are written out.
_FEW = 128
# Outputs that are written out at a time: an int4 register holds so many.
FILLED = 64
# What int4 values are multiplied with where they become int8.
_UNIT = 16
# Integers as wide as numbers of so many bytes.
_INTEGERS = {1: jnp.int8, 2: jnp.int16, 4: jnp.int32}


def unfit(
    weight: NMSparse, chip: Chip | None, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> str | None:
    """Why the kernel does not take a weight on a chip, or None.

    Args:
      weight: stored or prepared.
      chip: None for one that no kernel knows.
      dtype: of x.

    Returns:
      A reason, or None.
    """
    if chip is None or chip.platform != "tpu":
        return f"the chip is {chip.name if chip else 'unknown'}, not a TPU"
    if (weight.n, weight.m) != (2, PARTS):
        return f"it takes 2:4 sparsity, not {weight.n}:{weight.m}"
    k = weight.shape[1]
    if k % (PARTS * LANES):
        return f"the {k} inputs are not a multiple of {PARTS * LANES}"
    if weight.group_size is not None:
        width = weight.group_size // PARTS
        if width % LANES and LANES % width:
            return (
                f"int4 values in groups of {weight.group_size} inputs: a quarter of one neither "
                f"divides {LANES} nor is a multiple of it"
            )
    if not tiles(LANES, weight, jnp.dtype(dtype).itemsize):
        return f"128 rows and outputs of {k} inputs do not fit into VMEM"
    return None


def matmul(
    x: jax.Array,
    weight: NMSparse,
    bias: jax.Array | None,
    options: Options,
    chip: Chip,
    interpret=False,
) -> jax.Array:
    """Y = activation(x Wᵀ + bias).

    Args:
      x: ``(M, K)``, bf16 or f32.
      weight: that fits; one that is not prepared is prepared here, on every call.
      bias: ``(N,)`` or None.
      options: what is fused.
      chip: whose matrix unit to fill.
      interpret: False, or ``pltpu.InterpretParams(..)``.

    Returns:
      ``(M, N)``.
    """
    weight = nm.prepare(weight) if weight.layout == "stored" else weight
    m, (n, k) = x.shape[0], weight.shape
    tm, tn = tiles(m, weight, x.dtype.itemsize)
    x = jnp.pad(x, ((0, -m % tm), (0, 0)))
    # The inputs of 128 groups beside each other, by their positions.
    x = x.reshape(-1, LANES, PARTS).swapaxes(1, 2).reshape(-1, k)
    few = few_rows(m, weight, x.dtype.itemsize)
    copies = copies_of(weight) if few else 1
    if copies > 1:
        # Each has the inputs of one scale, which then multiplies its products.
        one = jnp.arange(k) % LANES * copies // LANES == jnp.arange(copies)[:, None, None]
        x = jnp.where(one, x, jnp.zeros((), x.dtype)).reshape(-1, k)
    layer, (values, positions) = layers.of_kernel(weight)

    def of_layer(*shape, index):
        """A part of an array that has an axis of layers, where there are several."""
        return pl.BlockSpec(
            (*(None for _ in layer), *shape),
            lambda j, i, *own: (*(number[0] for number in own), *index(j)),
        )

    operands = {
        "x": (x, pl.BlockSpec((copies * tm, k), lambda j, i, *_: (i, 0))),
        "values": (values, of_layer(2, tn, k // PARTS, index=lambda j: (0, j, 0))),
        "positions": (positions, of_layer(tn, k // PARTS, index=lambda j: (j, 0))),
    }
    if weight.scales is not None:
        spec = pl.BlockSpec((tn, k // weight.group_size), lambda j, i, *_: (j, 0))
        operands["scales"] = (weight.scales, spec)
    if bias is not None:
        spec = pl.BlockSpec((1, tn), lambda j, i, *_: (0, j))
        operands["bias"] = (bias.astype(jnp.float32)[None], spec)
    names = tuple(operands)
    outputs = columns(tn, chip, few)
    scratch = _few_scratch if few else _many_scratch
    scratch = scratch(weight, copies * tm, tn, outputs, x.dtype, chip)
    body = functools.partial(
        _few_rows if few else _many_rows,
        group_size=weight.group_size,
        options=options,
        outputs=outputs,
        chip=chip,
    )
    rows = x.shape[0] // copies

    def kernel(*refs):
        refs = refs[len(layer) :]
        own = dict(zip(scratch, refs[len(names) + 1 :], strict=True))
        body(dict(zip(names, refs, strict=False)), refs[len(names)], **own)

    y = on_tpu(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(layer),
            grid=(-(-n // tn), rows // tm),
            in_specs=[spec for _, spec in operands.values()],
            out_specs=pl.BlockSpec((tm, tn), lambda j, i, *_: (i, j)),
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=jax.ShapeDtypeStruct((rows, n), options.out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=_cost(m, weight, options, x.dtype.itemsize),
        interpret=interpret,
        name="nm_matmul",
    )(*layer, *(array for array, _ in operands.values()))
    return y[:m]


def _cost(m: int, weight: NMSparse, options: Options, itemsize: int) -> pl.CostEstimate:
    """What a product of so many rows costs, for XLA's scheduler and counts."""
    n, k = weight.shape
    rows = m * (k * itemsize + n * jnp.dtype(options.out_dtype).itemsize)
    return pl.CostEstimate(
        flops=2 * m * n * k,
        transcendentals=0 if options.activation in (None, "relu") else m * n,
        bytes_accessed=weight.nbytes + rows,
    )


def tiles(m: int, weight: NMSparse, itemsize: int) -> tuple[int, int] | None:
    """Rows and outputs of a grid step: the most that fit, or None."""
    n, k = weight.shape
    coded = weight.scales is not None
    # Of an output: the dense tile, and two copies of two planes and of positions.
    stored = 1 if coded else 2 * weight.values.dtype.itemsize
    output = k * itemsize + 2 * (k // PARTS) * (stored + 1)
    # Scales of it, twice and once more, and spread over the inputs.
    output += 12 * max(k // weight.group_size, LANES) + k if coded else 0
    rows = min(-(-m // 16) * 16, 256)
    for tn in (1024, 512, 256, LANES):
        for tm in (rows, min(rows, LANES)):
            whole = tn * output + tm * (2 * k * itemsize + 12 * tn)
            if (tn <= LANES or tn < n + LANES) and whole <= _VMEM - (4 << 20):
                return tm, min(tn, -(-n // LANES) * LANES)
    return None


def copies_of(weight: NMSparse) -> int:
    """Scales of 128 groups: as many copies few rows have.

    Args:
      weight: stored or prepared.
    """
    return 1 if weight.scales is None else max(SLAB // weight.group_size, 1)


def few_rows(m: int, weight: NMSparse, itemsize: int) -> bool:
    """Whether rows are so few that weights are multiplied as they are written out.

    Args:
      m: rows.
      weight: that fits.
      itemsize: bytes of an entry of x.
    """
    tm, tn = tiles(m, weight, itemsize)
    copies = copies_of(weight)
    # They take the place of the dense tile.
    return m <= tm and copies * tm <= min(_FEW, tn // 2)


def columns(tn: int, chip: Chip, few: bool) -> int:
    """Outputs that are multiplied at a time.

    Args:
      tn: outputs of a tile.
      chip: a TPU.
      few: whether the rows are few; with more outputs 7x would run out of registers.
    """
    return chip.mxu if tn % chip.mxu == 0 and not (few and chip.name == "7x") else LANES


def _few_scratch(weight, rows, tn, outputs, dtype, chip):
    """Products that wait, and the scales of a tile with outputs in lanes."""
    k = weight.shape[1]
    found = {"products_ref": pltpu.VMEM((k // SLAB, rows, outputs), jnp.float32)}
    if weight.scales is None:
        return found
    found["scales_ref"] = pltpu.VMEM((k // weight.group_size, tn), jnp.float32)
    if _codes(dtype, chip) == jnp.int8:
        found["w_ref"] = pltpu.VMEM((outputs * dtype.itemsize // 4, k), jnp.int32)
    return found


def _codes(dtype, chip: Chip):
    """The numbers that int4 values become: those that rows are multiplied with, or integers."""
    exact = dtype == jnp.bfloat16 and chip.multiplies("float8_e4m3fn")
    return jnp.float8_e4m3fn if exact else jnp.int8


def _few_rows(
    refs, y_ref, products_ref=None, scales_ref=None, w_ref=None, *,
    group_size, options, outputs, chip,
):  # fmt: skip
    """Weights are multiplied as they are written out, and products scaled."""
    x_ref, coded, m = refs["x"], "scales" in refs, y_ref.shape[0]
    number = refs["values"].dtype
    if coded:
        number = _codes(x_ref.dtype, chip)
        unit = _UNIT if number == jnp.int8 else 1
        scales_ref[...] = refs["scales"][...].T * (1 / unit)
    _keep_in_memory(products_ref.at[0])

    def written(block, start):
        """The weights of a slab, as the matrix unit takes them."""
        parts = _decompress(refs, block, start, number)
        if number == jnp.float8_e4m3fn:
            return jnp.concatenate(parts, axis=1)
        parts = [part.astype(x_ref.dtype) for part in parts]
        if not coded:
            return jnp.concatenate(parts, axis=1)
        # In the layout of this memory, which it then does not use, they cost v5 a third less.
        for i, part in enumerate(parts):
            inputs = pl.ds(PARTS * start + i * LANES, LANES)
            w_ref[:, inputs] = pltpu.bitcast(part, jnp.int32)
        return pltpu.bitcast(w_ref[:, pl.ds(PARTS * start, SLAB)], x_ref.dtype)

    def product(block, start):
        y = _dot(x_ref[:, pl.ds(PARTS * start, SLAB)], written(block, start))
        # By way of memory, or the compiler would multiply all before it scales or adds any.
        products_ref[start // LANES] = y
        y = products_ref[start // LANES]
        if not coded:
            return y
        first = PARTS * start // group_size
        return sum(
            y[i * m : (i + 1) * m] * scales_ref[pl.ds(first + i, 1), block]
            for i in range(y.shape[0] // m)
        )

    def multiply(block):
        y = product(block, 0)
        for start in range(LANES, x_ref.shape[1] // PARTS, LANES):
            y = y + product(block, start)
        _finish(refs, y_ref, block, y, options)

    _blocks(y_ref.shape[1], outputs, multiply)


def _many_scratch(weight, rows, tn, outputs, dtype, chip):
    """The dense tile in 32-bit words, sums, and scales that are to be spread over lanes."""
    del chip
    k = weight.shape[1]
    found = {
        "w_ref": pltpu.VMEM((tn * dtype.itemsize // 4, k), jnp.int32),
        "sums_ref": pltpu.VMEM((rows, outputs), jnp.float32),
    }
    if weight.scales is not None:
        groups = -(-k // (weight.group_size * LANES)) * LANES
        found["own_ref"] = pltpu.VMEM((tn, groups), jnp.float32)
        found["scales_ref"] = pltpu.VMEM((tn, k // PARTS), jnp.float32)
    return found


def _many_rows(
    refs, y_ref, w_ref, sums_ref, own_ref=None, scales_ref=None, *,
    group_size, options, outputs, chip,
):  # fmt: skip
    """The first tile of rows finds weights as they are stored, and writes them out."""
    x_ref, coded = refs["x"], "scales" in refs
    k, dtype = x_ref.shape[1], x_ref.dtype

    def spread(block):
        for start in range(0, k // PARTS, LANES):
            width = group_size // PARTS
            scales_ref[block, pl.ds(start, LANES)] = _spread(own_ref, block, start, width)

    def fill(block):
        for start in range(0, k // PARTS, LANES):
            parts = _decompress(refs, block, start, jnp.int8 if coded else refs["values"].dtype)
            if coded:
                scales = scales_ref[block, pl.ds(start, LANES)]
                parts = [part.astype(jnp.float32) * scales for part in parts]
            for i, part in enumerate(parts):
                inputs = pl.ds(PARTS * start + i * LANES, LANES)
                w_ref[_words(block, dtype), inputs] = pltpu.bitcast(part.astype(dtype), jnp.int32)

    @pl.when(pl.program_id(1) == 0)
    def _():
        if coded:
            own_ref[:, : k // group_size] = refs["scales"][...] * (1 / _UNIT)
            _blocks(y_ref.shape[1], FILLED, spread)
        _blocks(y_ref.shape[1], FILLED, fill)

    _keep_in_memory(sums_ref)
    width, depth = _summed(chip, y_ref.shape[0], outputs, k)

    def multiply(whole):
        for part in range(0, outputs, width):
            block = pl.ds(pl.multiple_of(whole.start + part, width), width)
            of_sums = pl.ds(part, width)
            for start in range(0, k, depth):
                inputs = pl.ds(start, min(depth, k - start))
                w = pltpu.bitcast(w_ref[_words(block, dtype), inputs], dtype)
                y = _dot(x_ref[:, inputs], w)
                y = sums_ref[:, of_sums] + y if start else y
                if start + depth < k:
                    sums_ref[:, of_sums] = y
            _finish(refs, y_ref, block, y, options)

    _blocks(y_ref.shape[1], outputs, multiply)


def _summed(chip: Chip, rows: int, outputs: int, k: int) -> tuple[int, int]:
    """Outputs and inputs whose products are summed before the sums go to VMEM.

    So that registers suffice: of few rows and all outputs the compiler would keep the sums there.
    """
    if chip.name == "7x":  # Its matrix unit holds sums itself.
        return outputs, k
    if chip.mxu > LANES:
        return (LANES, 4 * chip.mxu) if rows <= LANES else (outputs, chip.mxu)
    return outputs, 4 * chip.mxu


def _keep_in_memory(ref) -> None:
    """Touches memory in a branch of its own, or the compiler would use registers instead."""

    @pl.when(pl.program_id(0) == 0)
    def _():
        ref[:8] = jnp.zeros((8, ref.shape[1]), ref.dtype)


def _block(i, outputs):
    return pl.ds(pl.multiple_of(i * outputs, outputs), outputs)


def _blocks(size, outputs, step):
    """Takes a step for each block of outputs of a tile."""
    jax.lax.fori_loop(0, size // outputs, lambda i, _: step(_block(i, outputs)), None)


def _words(block, dtype):
    """Rows of 32-bit words that hold some outputs."""
    each = 4 // dtype.itemsize
    return pl.ds(pl.multiple_of(jax.lax.div(block.start, each), 8), block.size // each)


def _dot(x, w):
    """f32 product over the inputs, with f32 factors where x is f32."""
    return jax.lax.dot_general(
        x,
        w,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _finish(refs, y_ref, block, y, options):
    bias = jnp.broadcast_to(refs["bias"][:, block], y.shape) if "bias" in refs else None
    y_ref[:, block] = reference.finish(y, bias, options)


def _decompress(refs, block, start, dtype):
    """Weights ``(outputs, 128)`` at each of the four positions of 128 groups, without scales.

    Numbers narrower than 32 bits are selected several at a time, by the bits of words.

    Args:
      refs: with "values" and "positions".
      block: outputs.
      start: the first group.
      dtype: of the values' numbers: theirs, or one that holds int4.

    Returns:
      Four arrays; int8 ones are ``_UNIT`` times the values.
    """
    columns = pl.ds(start, LANES)
    first, second = (
        pltpu.bitcast(refs["values"][i, block, columns].astype(dtype), jnp.int32) for i in (0, 1)
    )
    codes = refs["positions"][block, columns]
    if dtype == jnp.int8:
        first, second = (_upper_halves(a) for a in (first, second))
        where = functools.partial(_signs, pltpu.bitcast(codes, jnp.int32))
    else:
        size = jnp.dtype(dtype).itemsize
        codes = pltpu.bitcast(codes.astype(_INTEGERS[size]), jnp.int32)
        where = functools.partial(_masks, codes, 8 * size)
    # Positions are in order: the first is 0, 1 or 2, and the second 1, 2 or 3.
    first_1, first_2 = first & where(0), first & where(1)
    second_2_3 = second & where(3)
    second_3 = second_2_3 & where(2)
    parts = (
        first ^ first_1 ^ first_2,
        first_1 | (second ^ second_2_3),
        first_2 | (second_2_3 ^ second_3),
        second_3,
    )
    return [pltpu.bitcast(part, dtype) for part in parts]


def _masks(codes, bits, bit):
    """All bits of those of a word's numbers whose code has a bit."""
    ones = jnp.int32(sum(1 << at for at in range(0, 31, bits)))
    one = (jax.lax.shift_right_logical(codes, bit) if bit else codes) & ones
    return (one << bits) - one if bits < 32 else -one


def _signs(codes, bit):
    """The same of bytes, by the sign of an int4 code; their lower three bits may be any."""
    top = pltpu.bitcast(codes << (3 - bit) if bit < 3 else codes, jnp.int4)
    return pltpu.bitcast(top.astype(jnp.int8), jnp.int32)


def _upper_halves(words):
    """Bytes that hold int4 values, times ``_UNIT``: a mask's lower bits then do not matter."""
    return (words << 4) & jnp.int32(-0x0F0F0F10)


def _spread(ref, block, start, width):
    """``(outputs, 128)``: the scale of each of 128 groups of four, ``width`` of which share one."""
    first = start // width
    window = first // LANES * LANES
    lane = jax.lax.broadcasted_iota(jnp.int32, (block.size, LANES), 1)
    index = first - window + (jax.lax.div(lane, width) if width < LANES else 0 * lane)
    scales = ref[block, pl.ds(window, LANES)]
    return gathers.along(scales, index, axis=1)
