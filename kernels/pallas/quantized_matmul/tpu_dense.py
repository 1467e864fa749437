"""The quantized matmul of many rows on TPUs: weights are decoded and scaled once into VMEM.

The decoded tile, all inputs of some outputs in bf16, then serves every tile of rows, so what the
decoding costs is divided by their number. The first tile of rows is multiplied while it is decoded.
Sums go through VMEM after each slab of inputs, and decoded weights at every 128: what the matrix
unit returns for a tile of rows is more than the registers hold. No loop of the compiler's
schedules in benchmarks/results spills one. What scales weights is in ``tpu_factors``.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels.calls import apart, by_name, on_tpu
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.quantized_matmul import reference, tpu_codebook, tpu_factors, tpu_float8
from jaxcomp.kernels.quantized_matmul.reference import Options
from jaxcomp.kernels.quantized_matmul.tpu_quantize import Visits, wide
from jaxcomp.kernels.quantized_matmul.tpu_tiles import LANES as _LANES
from jaxcomp.kernels.quantized_matmul.tpu_tiles import Tile
from jaxcomp.kernels.quantized_matmul.weights import Weight

# Chips whose matrix units have a slab each and keep no sums: one would wait for the other's.
_APART = ("v6e",)
# Rows of a tile up to which there both have a part of each slab: their sums fit into registers.
_FEW = 128
# Formats, by chip, of which weights wait in VMEM for their scales: registers do not hold them.
_STAGED = {"v6e": ("int2", "fp8", "codebook"), "7x": ("codebook",)}
# Those of them that take so many instructions to decode that transposed scales wait for them.
_SLOW = {"v6e": ("fp8", "codebook")}
# Quarters of the inputs after which zero points meet sums of rows: where nothing spills.
_QUARTERS = {"7x": 2}
# Slabs of 256 inputs that slow formats have registers for: 4096, and sums of their groups.
_TOGETHER = 17
# And that zero points, spread like scales, have them for on 7x.
_SPREAD = 28


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How weights are decoded and multiplied.

    Attributes:
      format: a key of ``FORMATS``.
      group_size: inputs that share a scale.
      dtype: that codes are multiplied with scales in.
      slab: inputs whose products are summed before the sums go to VMEM.
      staged: whether bf16 weights wait in VMEM for their scales.
      unit: what a 1 among decoded weights stands for, before zero points and scales.
      packed: whether the cores look up bytes.
      rows: whether scales lie as ``tpu_factors.from_rows`` spreads them.
      sums: in how many places products are summed before these are added up.
      kept: whether weights wait in VMEM to be multiplied even where no later step loads them.
      entries: whether values of a codebook wait in VMEM to be looked up, not in registers.
      summed: whether zero points are multiplied with sums of rows: none is among decoded weights.
      quarters: of the inputs, which are multiplied before those sums.
      together: slabs that are decoded in one piece of code, at most, or None.
      waits: whether all sums wait in VMEM for code of its own that finishes them.
    """

    format: str
    group_size: int
    dtype: str
    slab: int
    staged: bool
    unit: float
    packed: bool
    rows: bool
    sums: int
    kept: bool
    entries: bool
    summed: bool
    quarters: int
    together: int | None
    waits: bool

    @classmethod
    def of(cls, weight: Weight, chip: Chip, m: int, experts: bool = False) -> "Decoding":
        """The one of a weight, or of experts', on a chip, for tiles of m rows."""
        wide = chip.mxu > _LANES
        # Zero points that are spread, as scales are, take as long again, and registers. Of rows of
        # one tile their products with sums of rows are less; more rows share what is spread, and
        # XLA would have to read all of them for their sums.
        summed = weight.zeros is not None and m <= 2 * _FEW
        # Of experts v6e would spill 82 registers, in 0.84 of the cycles.
        summed = summed and not (experts and chip.name == "v6e")
        zeros = weight.zeros is not None and not summed
        quarters = _QUARTERS.get(chip.name, int(not wide and m <= _FEW))
        factors = [] if tpu_factors.by_channel(weight) else [weight.scales]
        factors += [weight.zeros] if zeros else []
        # v6e and 7x compute in bf16, in which codes of 8 bits are exact, also less whole zero
        # points, and times bf16 scales round once. (Values of a codebook are rounded to it before,
        # as those of few rows are.) Without scales weights are what they are.
        once = all(array.dtype == jnp.bfloat16 for array in factors)
        once = once and (wide or not factors)
        # The four matrix units of v5 take 512 inputs at a time. Of two wide ones each takes 256,
        # and with sums of both of many rows the compiler runs out of registers.
        apart = chip.name in _APART
        slab = 512 if not wide or (apart and m <= _FEW) else chip.mxu
        staged = weight.format in _STAGED.get(chip.name, ()) or zeros
        # Where the matrix units are busy, rows of zero points as well would spill registers, and so
        # would scales that wait for what is slowly decoded.
        slow = weight.format in _SLOW.get(chip.name, ())
        hard = m > _FEW if slow else m > 2 * _FEW and zeros
        # Of more than some 4096 inputs slow decoding runs ahead of matrix units, and spills. (More
        # rows keep those busy for longer.)
        together = _TOGETHER if slow and _FEW < m <= 2 * _FEW else None
        if zeros and chip.name == "7x":
            together = _SPREAD
        # v5 scales in f32, and few rows keep its four matrix units busy only for a short time: what
        # is decoded ahead of them is more than registers hold. Of more rows it is not, and storing
        # it would only cost cycles. So it is with what v6e decodes slowly. Tiles of more rows than
        # 256 are mostly several, of which all but the first load it.
        kept = (slow or not wide) if m <= _FEW else wide and m > 2 * _FEW
        # Of more rows that saves v5 no spills, and costs cycles, too.
        entries = weight.format == "codebook" and (wide or kept)
        # What stores experts' rows takes registers that the last products then have not. (Without
        # zero points they have, and it would cost cycles.)
        waits = experts and summed
        return cls(
            weight.format, weight.group_size, "bfloat16" if once else "float32", slab,
            wide and staged, unit(weight.format, chip), wide, wide and not hard, 2 if apart else 1,
            kept, entries, summed, quarters, together, waits,
        )  # fmt: skip

    def lie_by_rows(self, name: str) -> bool:
        """Whether outputs are the last axis of the factors of a name."""
        return name == "output_scales" or (self.rows and name != "offsets")


def matmul(
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    options: Options,
    chip: Chip,
    interpret,
    tile: Tile,
    cost: pl.CostEstimate | None = None,
    x_scales: jax.Array | None = None,
) -> jax.Array:
    """Multiplies: y = activation(x Wᵀ + bias) with W rounded to bf16.

    Args:
      x: bf16 ``(M, K)``; the codes of quantized ones are exact in bf16, too.
      weight: prepared, without stack axes, perhaps one of several layers.
      bias: ``(N,)`` or None.
      options: what is fused.
      chip: whose arithmetic to use.
      interpret: False, or ``pltpu.InterpretParams(..)``.
      tile: rows and outputs of a grid step, and outputs that are decoded at a time.
      cost: of the product, for XLA.
      x_scales: f32 ``(M, 1)`` that rows are quantized with, or None.

    Returns:
      ``(M, N)``.
    """
    m, (n, k) = x.shape[0], weight.shape
    tm, tn = tile.m, tile.n
    how = Decoding.of(weight, chip, tm)
    visits = Visits.of(x, weight, options, chip, tile, "bfloat16", decoded=True)
    fields = 4 if weight.format == "int2" else 1
    scalars = weight.scalars
    rows = visits.operands(x, x_scales, options, tile)
    rows["x"] = rows["x"][0].astype(jnp.bfloat16), rows["x"][1]
    operands = rows | {
        "w": (
            weight.codes,
            visits.spec(
                (*(None for _ in scalars), tn, k // fields),
                lambda j, i, *layer: (*(number[0] for number in layer), j, 0),
            ),
        ),
    }
    terms = tpu_factors.terms(weight) if how.summed else 0
    if how.summed and visits.dtype is None:
        sums = tpu_factors.sums(rows["x"][0], weight.group_size)
        operands["sums"] = sums, visits.spec((tm, sums.shape[1]), lambda j, i, *layer: (i, 0))
    for name, array in tpu_factors.factors(weight, how.unit, how.rows, how.summed).items():
        shape, index = tpu_factors.block(array, tn, how.lie_by_rows(name))
        operands[name] = array, visits.spec(shape, lambda j, i, *layer, index=index: index(j))
    if bias is not None:
        by_column = visits.spec((1, tn), lambda j, i, *layer: (0, j))
        operands["bias"] = (bias.astype(jnp.float32)[None], by_column)
    if weight.table is not None:
        operands["table"] = (weight.table, pl.BlockSpec(memory_space=pltpu.SMEM))
    names = ("w_ref", "acc_ref", "entries_ref")
    own_memory = dict(zip(names, scratch(tile, k, how), strict=False))
    own_memory |= visits.scratch(tile, k, options, terms)
    kind = "dense" if options.activation_dtype is None else "rows_dense"

    def body(refs, y_ref, *own):
        own = dict(zip(own_memory, own, strict=True))
        _kernel(refs, y_ref, **own, how=how, options=options, columns=tile.columns, visits=visits)

    return on_tpu(
        by_name(body, tuple(operands), len(scalars)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=visits.grid,
            in_specs=[spec for _, spec in operands.values()],
            out_specs=visits.spec((tm, tn), lambda j, i, *layer: (i, j)),
            scratch_shapes=list(own_memory.values()),
        ),
        out_shape=jax.ShapeDtypeStruct((m, n), options.out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=None if interpret else visits.semantics,
            vmem_limit_bytes=visits.memory,
        ),
        cost_estimate=cost,
        interpret=interpret,
        name=f"quantized_matmul_{kind}_{weight.format}",
    )(*scalars, *(array for array, _ in operands.values()))


def scratch(tile: Tile, k: int, how: Decoding) -> list:
    """Memory of the kernel: the decoded weights of a tile, sums of a block, perhaps a codebook.

    Weights are words of two outputs' bf16, which take whole registers.
    """
    found = [
        pltpu.VMEM((tile.n // 2, k), jnp.int32),
        pltpu.VMEM((how.sums, tile.m, tile.columns), jnp.float32),
    ]
    return [*found, tpu_codebook.scratch(how.packed)] if how.entries else found


def _kernel(
    refs, y_ref, w_ref, acc_ref, entries_ref=None, *, how, options, columns, visits, **rows
):  # fmt: skip
    """All inputs of one tile of y."""
    first = pl.program_id(len(visits.grid) - 1) == 0
    refs = with_entries(refs, entries_ref, how, first)
    refs = visits.rows_of(refs, options, how.group_size, **rows)

    def multiply(decoded, block):
        def write(y):
            y_ref[:, block] = y

        product(refs, w_ref, acc_ref, block, options, how, decoded, write)

    def run(decoded):
        blocks(y_ref.shape[1], columns, functools.partial(multiply, decoded))

    keep_in_memory(acc_ref, w_ref if how.kept else None)
    pl.when(first)(lambda: run(False))
    pl.when(jnp.logical_not(first))(lambda: run(True))


def keep_in_memory(acc_ref, w_ref=None) -> None:
    """Touches the sums' memory outside of what multiplies, in a branch of its own.

    Sums that one block of code alone stores and loads the compiler would keep in registers, of
    which there are too few. A step with one tile of rows has only one such block.

    Args:
      acc_ref: ``(.., rows, outputs)``.
      w_ref: decoded weights, words ``(outputs / 2, inputs)``, that are to be kept as well, or None.
    """
    some = *acc_ref.shape[:-2], 8, acc_ref.shape[-1]

    @pl.when(pl.program_id(0) == 0)
    def _():
        acc_ref[..., :8, :] = jnp.zeros(some, acc_ref.dtype)
        if w_ref is not None:
            # The compiler drops stores of weights that nothing else loads. What is loaded here is
            # not used: the first sums overwrite it.
            acc_ref[0, :8, :_LANES] = w_ref[:8, :_LANES].astype(acc_ref.dtype)


def with_entries(refs, entries_ref, how: Decoding, first: jax.Array) -> dict:
    """References with "entries" of the codebook.

    Args:
      refs: of the operands, with a "table" where there is a codebook.
      entries_ref: memory of ``tpu_codebook.scratch``, or None.
      how: weights are decoded.
      first: whether this is the first step along rows, which stores them.
    """
    if entries_ref is None:
        return refs

    @pl.when(first)
    def _():
        entries_ref[...] = tpu_codebook.entries(refs["table"], how.packed)

    return {**refs, "entries": entries_ref}


def unit(format: str, chip: Chip) -> float:
    """What a 1 among the codes of a format stands for that are decoded by a chip."""
    if format == "int2":
        return 1 / 64
    if format == "fp8" and not chip.multiplies("float8_e4m3fn"):
        return tpu_float8.UNIT
    return 1.0


def blocks(outputs: int, columns: int, step: Callable[[pl.Slice], None]) -> None:
    """Takes a step for each block of outputs of a tile."""

    def one(i, _):
        step(pl.ds(pl.multiple_of(i * columns, columns), columns))

    jax.lax.fori_loop(0, outputs // columns, one, None)


def product(
    refs, w_ref, acc_ref, block, options, how: Decoding, decoded: bool,
    write: Callable[[jax.Array], None],
) -> None:  # fmt: skip
    """A tile of rows times some outputs, finished.

    Args:
      refs: with "x", perhaps its groups' "sums", and perhaps "row_scales".
      w_ref: decoded weights.
      acc_ref: f32 ``(sums, rows, outputs)``.
      block: a slice of outputs.
      options: what is fused.
      how: the weights are decoded.
      decoded: whether they are. Else each slab is where it is multiplied, so that the matrix unit
        works while others decode.
      write: takes the product ``(rows, outputs)``.
    """
    slabs = _slabs(refs, how)
    # Registers that decode would be too few for what follows, too.
    waits = how.waits or not decoded
    pieces = _pieces(len(slabs), len(slabs) if decoded else how.together)
    # What the next piece of code multiplies first is decoded while this one's last is multiplied.
    ahead = int(len(pieces) > 1)

    def decode_slab(rows, inputs):
        if rows is refs["x"]:
            for first in range(inputs.start, inputs.start + inputs.size, _LANES):
                _decode(refs, w_ref, block, first, how)

    def multiply(piece):
        for slab in piece:
            if not decoded:
                for own in slabs[slab + ahead if slab else 0 : slab + ahead + 1]:
                    decode_slab(*own)
            rows, inputs = slabs[slab]
            weights = rows is refs["x"]
            y = jax.lax.dot_general(
                rows[:, inputs],
                _load(w_ref, block, inputs) if weights else refs["offsets"][block, inputs],
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            sums = acc_ref.at[slab % how.sums]
            y = sums[...] + y if slab >= how.sums else y
            if slab + 1 < len(slabs) or waits:
                sums[...] = y
        return y

    def body(piece):
        multiply(piece)

    if len(pieces) == 1:
        y = multiply(pieces[0])
    else:
        # Where a tile is a single block, it begins at a number that is known.
        unknown = block.start + pl.program_id(0) + pl.program_id(1)
        apart([functools.partial(body, piece) for piece in pieces], unknown)

    def end():
        last = len(slabs) - 1
        total = acc_ref[last % how.sums] if waits else y
        for slab in range(max(last - how.sums + 1, 0), last):
            total = total + acc_ref[slab % how.sums]
        write(finish(refs, total, block, options))

    if how.waits:
        apart([end], block.start)
    else:
        end()


def _slabs(refs, how: Decoding) -> list[tuple]:
    """Rows, or sums of their groups, and a slice of their inputs, as they are multiplied."""

    def of(name):
        size = refs[name].shape[1]
        starts = range(0, size, how.slab)
        return [(refs[name], pl.ds(start, min(how.slab, size - start))) for start in starts]

    slabs = of("x")
    place = len(slabs) * how.quarters // 4
    return slabs[:place] + of("sums") + slabs[place:] if how.summed else slabs


def _pieces(slabs: int, most: int | None) -> list[range]:
    """Slabs in as few pieces of equal size as have at most so many."""
    size = -(-slabs // -(-slabs // (most or slabs)))
    return [range(first, min(first + size, slabs)) for first in range(0, slabs, size)]


def finish(refs, y, outputs, options) -> jax.Array:
    """Sums of some outputs with what follows them.

    Args:
      refs: perhaps with "output_scales", "row_scales" and "bias".
      y: f32 ``(rows, outputs)``.
      outputs: a slice.
      options: what is fused.
    """
    if "output_scales" in refs:
        y = y * refs["output_scales"][:, outputs]
    if "row_scales" in refs:
        y = y * wide(refs["row_scales"][...], y.shape[1])
    bias = refs["bias"][:, outputs] if "bias" in refs else None
    return reference.finish(y, None if bias is None else jnp.broadcast_to(bias, y.shape), options)


def _decode(refs, w_ref, block, start, how) -> None:
    """Stores bf16 weights ``(outputs, 128)`` of the inputs from ``start``."""
    dtype, inputs = jnp.dtype(how.dtype), pl.ds(start, _LANES)
    spread = tpu_factors.from_rows if how.rows else tpu_factors.from_lanes
    w = decode(refs, block, start, _LANES, how.format, how.packed, exact=False)
    if how.unit == tpu_float8.UNIT:
        w = tpu_float8.sixteenths(w)
    w = w.astype(dtype)
    if "zeros" in refs:
        w = w - spread(refs["zeros"], block, start, how.group_size).astype(dtype)
    if "scales" in refs:
        if how.staged and dtype == jnp.bfloat16:
            _store(w_ref, block, inputs, w)
            w = _load(w_ref, block, inputs)
        w = w * spread(refs["scales"], block, start, how.group_size).astype(dtype)
    _store(w_ref, block, inputs, w.astype(jnp.bfloat16))


def _store(w_ref, block, inputs, w) -> None:
    """Keeps decoded weights of some outputs."""
    w_ref[tpu_factors.words(block), inputs] = pltpu.bitcast(w, w_ref.dtype)


def _load(w_ref, block, inputs) -> jax.Array:
    """Decoded weights of some outputs."""
    return pltpu.bitcast(w_ref[tpu_factors.words(block), inputs], jnp.bfloat16)


def decode(refs, outputs, start, size, format, packed=False, exact=True):
    """Values of some outputs' codes, inputs from ``start``: a dtype that holds them exactly.

    Args:
      refs: with "w", and the "table" of a codebook or its "entries".
      outputs: a slice.
      start: first input, a multiple of 128.
      size: inputs; 128 for int2.
      format: a key of ``FORMATS``.
      packed: whether the cores look up bytes, as v6e and 7x do.
      exact: False leaves values of int2 multiplied by 64.

    Returns:
      ``(outputs, size)``.
    """
    if format == "int2":
        # Each code is brought to the top of its byte, where it means 64 times itself.
        position, field = divmod(start // _LANES, 4)
        bytes_ = refs["w"][outputs, pl.ds(position * _LANES, _LANES)]
        four = pltpu.bitcast(bytes_, jnp.int32) << (6 - 2 * field)
        top = pltpu.bitcast(four & jnp.int32(-0x3F3F3F40), jnp.int8)
        return top.astype(jnp.bfloat16) * jnp.bfloat16(1 / 64) if exact else top
    codes = refs["w"][outputs, pl.ds(start, size)]
    if format == "codebook":
        if "entries" in refs:
            entries = refs["entries"][...]
        else:
            entries = tpu_codebook.entries(refs["table"], packed)
        return tpu_codebook.decode(codes, entries, packed)
    return codes
