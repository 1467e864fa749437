"""2:4 sparse matmuls on TPUs (Mosaic): storage is sparse, arithmetic is not.

The inputs of x are sorted by their position in a group of four, once outside, so that the planes
of prepared values, each the first or second value of every group, become the four parts of a dense
tile by the bits of positions: no value moves between lanes, and a word's two bf16 numbers or four
codes are selected at once. With few rows the parts are multiplied as they are written out, and
scales multiply the products: rows are repeated for each scale of 128 groups, and in a copy only
that scale's inputs are not zero. With more rows the tile, all inputs of some outputs, is scaled,
written to VMEM and serves every tile of rows. Of f32, pieces are multiplied (``pieces``).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels import gathers, pieces
from jaxcomp.kernels.calls import apart, on_tpu
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
# Most rows, with their copies, that are multiplied while weights are written out; of f32 also with
# their pieces.
_FEW, _FEW_PIECES = 128, 192
# Few rows, with their copies and pieces, beside whose products a wide matrix unit has no registers
# for sums; and the slabs whose products are summed there, by chip, before the sums go to VMEM.
_WAITING, _SUMMED = 64, {"v6e": 1, "7x": 3}
# Outputs that are written out at a time: an int4 register holds so many.
FILLED = 64
# What int4 values are multiplied with where they become int8.
_UNIT = 16
# Integers as wide as numbers of so many bytes.
_INTEGERS = {1: jnp.int8, 2: jnp.int16}


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
    itemsize, split = x.dtype.itemsize, pieces.count(x.dtype)
    x = pieces.listed(x)
    rows = x.shape[1]
    if copies > 1:
        # Each has the inputs of one scale, which then multiplies its products.
        one = jnp.arange(k) % LANES * copies // LANES == jnp.arange(copies)[:, None, None, None]
        x = jnp.where(one, x, jnp.zeros((), x.dtype))
    by_row = pl.BlockSpec((split, tm, k), lambda j, i, *_: (0, i, 0))
    if few:  # One tile, whose pieces are rows like others.
        x = x.reshape(-1, k)
        by_row = pl.BlockSpec(x.shape, lambda j, i, *_: (0, 0))
    layer, (values, positions) = layers.of_kernel(weight)

    def of_layer(*shape, index):
        """A part of an array that has an axis of layers, where there are several."""
        return pl.BlockSpec(
            (*(None for _ in layer), *shape),
            lambda j, i, *own: (*(number[0] for number in own), *index(j)),
        )

    operands = {
        "x": (x, by_row),
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
    scratch, body = (_few_scratch, _few_rows) if few else (_many_scratch, _many_rows)
    if few and weight.scales is None and weight_pieces(weight, split) > 1:
        scratch, body = _split_scratch, _split_rows
    scratch = scratch(weight, copies * tm, tn, outputs, split, chip)
    body = functools.partial(
        body,
        group_size=weight.group_size,
        options=options,
        outputs=outputs,
        chip=chip,
        split=split,
    )

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
        cost_estimate=_cost(m, weight, options, itemsize),
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
    split = pieces.COUNT if itemsize == 4 else 1
    # Of an output: the dense tile, and two copies of two planes and of positions.
    stored = 1 if coded else 2 * weight.values.dtype.itemsize
    output = 2 * k * weight_pieces(weight, split) + 2 * (k // PARTS) * (stored + 1)
    # Scales of it, twice and once more, and spread over the inputs.
    output += 12 * max(k // weight.group_size, LANES) + k if coded else 0
    rows = min(-(-m // 16) * 16, 256)
    choices = list(itertools.product((1024, 512, 256, LANES), (rows, min(rows, LANES))))
    if split > 1:  # Fewer rows do not keep a wide matrix unit busy.
        choices.sort(key=lambda choice: -choice[1])
    for tn, tm in choices:
        whole = tn * output + tm * (4 * k * split + 12 * tn)
        if (tn <= LANES or tn < n + LANES) and whole <= _VMEM - (4 << 20):
            return tm, min(tn, -(-n // LANES) * LANES)
    return None


def weight_pieces(weight: NMSparse, split: int) -> int:
    """Pieces of weights that are written out.

    Args:
      weight: stored or prepared.
      split: pieces of x; more than one asks for all of a weight in f32, as scaled codes are.
    """
    exact = weight.scales is None and weight.values.dtype != jnp.float32
    return 1 if exact else split


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
    rows = copies_of(weight) * tm
    split, most = (pieces.COUNT, _FEW_PIECES) if itemsize == 4 else (1, _FEW)
    # They take the place of the dense tile.
    return m <= tm and rows * split <= most and rows <= tn // 2


def columns(tn: int, chip: Chip, few: bool) -> int:
    """Outputs that are multiplied at a time.

    Args:
      tn: outputs of a tile.
      chip: a TPU.
      few: whether the rows are few; with more outputs 7x would run out of registers.
    """
    return chip.mxu if tn % chip.mxu == 0 and not (few and chip.name == "7x") else LANES


def _few_scratch(weight, rows, tn, outputs, split, chip):
    """Products that wait, perhaps sums, and the scales of a tile with outputs in lanes."""
    k, coded = weight.shape[1], weight.scales is not None
    found = {"products_ref": pltpu.VMEM((k // SLAB, split * rows, outputs), jnp.float32)}
    # Of codes it is their decoding that 7x has no registers for.
    if split * rows > _WAITING and (chip.name == "7x" if coded else chip.mxu > LANES):
        found["sums_ref"] = pltpu.VMEM((rows // copies_of(weight), outputs), jnp.float32)
    if not coded:
        return found
    found["scales_ref"] = pltpu.VMEM((k // weight.group_size, tn), jnp.float32)
    if _codes(chip) == jnp.int8:
        found["w_ref"] = pltpu.VMEM((outputs // 2, k), jnp.int32)
    return found


def _codes(chip: Chip):
    """The numbers that int4 values become: those that rows are multiplied with, or integers."""
    return jnp.float8_e4m3fn if chip.multiplies("float8_e4m3fn") else jnp.int8


def _few_rows(
    refs, y_ref, products_ref=None, sums_ref=None, scales_ref=None, w_ref=None, *,
    group_size, options, outputs, chip, split,
):  # fmt: skip
    """Weights are multiplied as they are written out, and products scaled."""
    x_ref, coded, m = refs["x"], "scales" in refs, y_ref.shape[0]
    number = refs["values"].dtype
    if coded:
        number = _codes(chip)
        unit = _UNIT if number == jnp.int8 else 1
        scales_ref[...] = refs["scales"][...].T * (1 / unit)
    _keep_in_memory(products_ref.at[0])
    if sums_ref is not None:
        _keep_in_memory(sums_ref)

    def written(block, start):
        """The weights of a slab, as the matrix unit takes them."""
        (parts,) = _decompress(refs, block, start, number)
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
            return pieces.total(y, m)
        first, each = PARTS * start // group_size, split * m
        return sum(
            pieces.total(y[i * each : (i + 1) * each], m) * scales_ref[pl.ds(first + i, 1), block]
            for i in range(y.shape[0] // each)
        )

    def total(block, starts, before=None):
        for start in starts:
            y = product(block, start)
            before = y if before is None else before + y
        return before

    def multiply(block):
        starts = range(0, x_ref.shape[1] // PARTS, LANES)
        if sums_ref is None:
            _finish(refs, y_ref, block, total(block, starts), options)
            return

        def add(some):
            sums_ref[...] = total(block, some, sums_ref[...] if some[0] else None)

        slabs = _SUMMED[chip.name]
        bodies = [
            functools.partial(add, starts[first : first + slabs])
            for first in range(0, len(starts), slabs)
        ]
        if coded:  # In code of its own each, or decoding would run ahead of the matrix unit.
            apart(bodies, block.start)
        else:
            for body in bodies:
                body()
        _finish(refs, y_ref, block, sums_ref[...], options)

    _blocks(y_ref.shape[1], outputs, multiply)


def _split_scratch(weight, rows, tn, outputs, split, chip):
    """Weights of two slabs, as words of two bf16 numbers, products of pieces, and sums."""
    del weight, chip
    weights = pltpu.VMEM((split, outputs // 2, SLAB), jnp.int32)
    products = len(pieces.pairs(split, split)) * rows
    return {
        "even_ref": weights,
        "odd_ref": weights,
        "products_ref": pltpu.VMEM((products, outputs), jnp.float32),
        "sums_ref": pltpu.VMEM((rows, tn), jnp.float32),
    }


def _split_rows(
    refs, y_ref, even_ref, odd_ref, products_ref, sums_ref, *,
    group_size, options, outputs, chip, split,
):  # fmt: skip
    """Few rows and weights in f32: while a slab is multiplied, the next one is written out.

    That is a loop: all slabs at once would ask for more registers than there are.
    """
    del group_size, chip
    x_ref, m = refs["x"], y_ref.shape[0]
    slabs = x_ref.shape[1] // SLAB
    count = y_ref.shape[1] // outputs * slabs
    _keep_in_memory(products_ref)

    def of(number):
        """Outputs and the place among the inputs of a slab."""
        return _block(jax.lax.div(number, slabs), outputs), jax.lax.rem(number, slabs)

    def write(number, w_ref):
        block, slab = of(number)
        for first in range(0, outputs, FILLED):
            some = pl.ds(pl.multiple_of(block.start + first, FILLED), FILLED)
            start = pl.multiple_of(slab * LANES, LANES)
            # Half of them at a time: pieces of all are more than registers hold.
            size = FILLED // 2
            written = _decompress(refs, some, start, jnp.float32, split, size)
            for number, parts in enumerate(written):
                place, piece = divmod(number, split)
                words = pl.ds((first + place * size) // 2, size // 2)
                for i, part in enumerate(parts):
                    w_ref[piece, words, pl.ds(i * LANES, LANES)] = pltpu.bitcast(part, jnp.int32)

    def multiply(number, w_ref):
        (block, slab), end = of(number), 0
        x = x_ref.at[:, pl.ds(pl.multiple_of(slab * SLAB, SLAB), SLAB)]
        for piece in range(split):
            # Of each piece of a weight those of x that count.
            rows = (split - piece) * m
            w = pltpu.bitcast(w_ref[piece], x_ref.dtype)
            products_ref[end : end + rows] = _dot(x[:rows], w)
            end += rows
        before = jnp.where(slab > 0, sums_ref[:, block], 0.0)
        sums_ref[:, block] = before + pieces.total(products_ref[...], m)

    def two(i, _):
        write(2 * i + 1, odd_ref)
        multiply(2 * i, even_ref)

        @pl.when(i >= 0)  # In code of its own.
        def _():
            write(jnp.minimum(2 * i + 2, count - 1), even_ref)
            multiply(2 * i + 1, odd_ref)

    write(0, even_ref)
    jax.lax.fori_loop(0, count // 2, two, None)
    if count % 2:
        multiply(count - 1, even_ref)
    finish = lambda block: _finish(refs, y_ref, block, sums_ref[:, block], options)  # noqa: E731
    _blocks(y_ref.shape[1], outputs, finish)


def _many_scratch(weight, rows, tn, outputs, split, chip):
    """The dense tile in words of two numbers, sums, and scales that are to be spread over lanes."""
    del chip
    k = weight.shape[1]
    found = {
        "w_ref": pltpu.VMEM((weight_pieces(weight, split), tn // 2, k), jnp.int32),
        "sums_ref": pltpu.VMEM((rows, outputs), jnp.float32),
    }
    if weight.scales is not None:
        groups = -(-k // (weight.group_size * LANES)) * LANES
        found["own_ref"] = pltpu.VMEM((tn, groups), jnp.float32)
        found["scales_ref"] = pltpu.VMEM((tn, k // PARTS), jnp.float32)
    return found


def _many_rows(
    refs, y_ref, w_ref, sums_ref, own_ref=None, scales_ref=None, *,
    group_size, options, outputs, chip, split,
):  # fmt: skip
    """The first tile of rows finds weights as they are stored, and writes them out."""
    x_ref, coded, m = refs["x"], "scales" in refs, y_ref.shape[0]
    k, dtype = x_ref.shape[2], x_ref.dtype

    def spread(block):
        for start in range(0, k // PARTS, LANES):
            width = group_size // PARTS
            scales_ref[block, pl.ds(start, LANES)] = _spread(own_ref, block, start, width)

    def store(piece, block, start, part, written):
        inputs = pl.ds(_multiple(PARTS * start + part * LANES), LANES)
        # As a view: with all in one index v5 took 450 bundles of some outputs, not 320.
        w_ref.at[piece][_words(block), inputs] = pltpu.bitcast(written.astype(dtype), jnp.int32)

    def fill_slab(block, start, halves=(0, 1)):
        """All of it, or a half: of the outputs of f32 values, of the positions of codes."""
        number = refs["values"].dtype
        if not coded:
            size = block.size // 2 if len(w_ref) > 1 else block.size
            for i, parts in enumerate(_decompress(refs, block, start, number, split, size)):
                place, piece = divmod(i, len(w_ref))
                some = pl.ds(block.start + place * size, size)
                for part, written in enumerate(parts) if place in halves else ():
                    store(piece, some, start, part, written)
            return
        (parts,) = _decompress(refs, block, start, jnp.int8)
        scales = scales_ref[block, pl.ds(start, LANES)]
        for part, written in enumerate(parts):
            if part // 2 in halves:
                scaled = written.astype(jnp.float32) * scales
                for piece, of_piece in enumerate(pieces.split(scaled) if split > 1 else [scaled]):
                    store(piece, block, start, part, of_piece)

    def fill(block):
        for start in range(0, k // PARTS, LANES):
            fill_slab(block, start)

    def fill_next(i, _):
        """One slab at a time: pieces of several are more than registers hold."""
        block = _block(jax.lax.div(i, k // SLAB), FILLED)
        start = pl.multiple_of(jax.lax.rem(i, k // SLAB) * LANES, LANES)
        fill_slab(block, start, (0,))
        pl.when(i >= 0)(lambda: fill_slab(block, start, (1,)))  # In code of its own.

    @pl.when(pl.program_id(1) == 0)
    def _():
        if coded:
            own_ref[:, : k // group_size] = refs["scales"][...] * (1 / _UNIT)
            _blocks(y_ref.shape[1], FILLED, spread)
        if len(w_ref) > 1:
            jax.lax.fori_loop(0, y_ref.shape[1] // FILLED * (k // SLAB), fill_next, None)
        else:
            _blocks(y_ref.shape[1], FILLED, fill)

    _keep_in_memory(sums_ref)
    width, depth = _summed(chip, m, outputs, k)
    pairs = pieces.pairs(split, w_ref.shape[0])
    products = [(start, *pair) for start in range(0, k, depth) for pair in pairs]

    def multiply(whole):
        for part in range(0, outputs, width):
            block = pl.ds(pl.multiple_of(whole.start + part, width), width)
            of_sums = pl.ds(part, width)
            for number, (start, of_x, of_w) in enumerate(products):
                inputs = pl.ds(start, min(depth, k - start))
                # Zero, which is not known: what is read for a product is read again for the next
                # one that it is a factor of, not kept in registers.
                zero = jnp.minimum(whole.start + number, 0) if split > 1 else 0
                w = pltpu.bitcast(w_ref[of_w + zero, _words(block), inputs], dtype)
                y = _dot(x_ref[of_x + zero, :, inputs], w)
                y = sums_ref[:, of_sums] + y if number else y
                if number + 1 < len(products):
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
        ref[*(0,) * (len(ref.shape) - 2), :8] = jnp.zeros((8, ref.shape[-1]), ref.dtype)


def _multiple(lanes):
    """Of whole registers, which the compiler is told of a number that a loop changes."""
    return lanes if isinstance(lanes, int) else pl.multiple_of(lanes, LANES)


def _block(i, outputs):
    return pl.ds(pl.multiple_of(i * outputs, outputs), outputs)


def _blocks(size, outputs, step):
    """Takes a step for each block of outputs of a tile."""
    jax.lax.fori_loop(0, size // outputs, lambda i, _: step(_block(i, outputs)), None)


def _words(block):
    """Rows of words that hold some outputs' bf16 numbers."""
    return pl.ds(pl.multiple_of(jax.lax.div(block.start, 2), 8), block.size // 2)


def _dot(x, w):
    """f32 product over the inputs."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _finish(refs, y_ref, block, y, options):
    bias = jnp.broadcast_to(refs["bias"][:, block], y.shape) if "bias" in refs else None
    y_ref[:, block] = reference.finish(y, bias, options)


def _decompress(refs, block, start, dtype, split=1, size=None):
    """Weights ``(outputs, 128)`` at each of the four positions of 128 groups, without scales.

    Several numbers are selected at a time, by the bits of words.

    Args:
      refs: with "values" and "positions".
      block: outputs.
      start: the first group.
      dtype: of the values' numbers: theirs, or one that holds int4.
      split: pieces of x: as many become of f32 values, and of others one.
      size: outputs at a time, or None for all.

    Yields:
      Of each piece four arrays, then those of the next outputs; int8 ones are ``_UNIT`` times the
      values, f32 ones are bf16.
    """
    columns = pl.ds(start, LANES)
    codes = refs["positions"][block, columns]
    split = split if dtype == jnp.float32 else 1
    dtype = jnp.bfloat16 if dtype == jnp.float32 else dtype
    if dtype == jnp.int8:
        masks = _signs
    else:
        bits = 8 * jnp.dtype(dtype).itemsize
        masks, codes = functools.partial(_masks, bits), codes.astype(_INTEGERS[bits // 8])
    codes = pltpu.bitcast(codes, jnp.int32)
    size = size or block.size
    each = codes.shape[0] * size // block.size
    for part in range(block.size // size):
        where = functools.partial(masks, codes[part * each : (part + 1) * each])
        some = pl.ds(block.start + part * size, size)
        planes = [refs["values"][i, some, columns] for i in (0, 1)]
        planes = zip(*map(pieces.split, planes), strict=True) if split > 1 else [planes]
        for pair in planes:
            first, second = (pltpu.bitcast(plane.astype(dtype), jnp.int32) for plane in pair)
            if dtype == jnp.int8:
                first, second = _upper_halves(first), _upper_halves(second)
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
            yield [pltpu.bitcast(words, dtype) for words in parts]


def _masks(bits, codes, bit):
    """All bits of those of a word's numbers whose code has a bit."""
    ones = jnp.int32(sum(1 << at for at in range(0, 31, bits)))
    one = (jax.lax.shift_right_logical(codes, bit) if bit else codes) & ones
    return (one << bits) - one


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
