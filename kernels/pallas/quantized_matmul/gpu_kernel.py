"""One product of the matrix unit per warpgroup and step, with weights decoded in registers.

A block computes yᵀ = W xᵀ for ``64 * rows`` outputs and ``tokens`` rows of x. The matrix unit takes
its left factor from registers, so codes are decoded on their way there; the right factor, the
tokens, may be as narrow as 8. One warpgroup copies codes, scales and tokens into a ring of stages
in shared memory; the others multiply. A copy past the end of an array reads zeros and a store
there is dropped, so tiles need not divide the sizes.

Scales are applied to the sums of a group where a tile of tokens is narrow, and to the decoded
weights where it is wide: whichever of the two is smaller. Zero points are taken from decoded bf16
weights; from 8-bit ones, which have no room for them, as their product with the sum of x over the
group.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxcomp.kernels.calls import on_gpu
from jaxcomp.kernels.quantized_matmul import gpu_decode

ROWS = 64  # outputs of a warpgroup: rows of the matrix unit's instruction
NARROW = 64  # the widest tile of tokens whose sums are scaled instead of the weights
_COPY_REGISTERS = 40
_STORED_TOKENS = 64  # tokens that leave a warpgroup at a time
COPIED = 32  # f32 numbers of the smallest copy to shared memory


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a product is divided.

    Attributes:
      tokens: rows of x in a block: 8, 16, 32, 64, 128 or 256.
      depth: inputs in a step of a warpgroup: a multiple or a divisor of the group size.
      rows: warpgroups of a block along N, 64 outputs each.
      slices: warpgroups of a block along K, whose sums meet in shared memory.
      stages: steps that are copied ahead.
      split: blocks along K, whose sums are added afterwards.
    """

    tokens: int
    depth: int
    rows: int = 2
    slices: int = 1
    stages: int = 4
    split: int = 1


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is computed, apart from the sizes of the arrays.

    Attributes:
      group_size: inputs that share a scale.
      activation: applied last: None, "relu", "silu" or "gelu".
      out_dtype: name of the 16-bit dtype of y, or None for the f32 sums of each split of K.
      tiles: how it is divided.
      bits: width of the codes that uint16 words hold, or None where codes have their own dtype.
      staged: whether decoded weights go through shared memory, as interpret mode needs.
    """

    group_size: int
    activation: str | None
    out_dtype: str
    tiles: Tiles
    bits: int | None = None
    staged: bool = False

    @property
    def span(self) -> int:
        """Inputs of a step that share a scale."""
        return min(self.tiles.depth, self.group_size)

    @property
    def packed(self) -> int:
        """Codes in an element of the array of codes."""
        return 1 if self.bits is None else 16 // self.bits


def product(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    table: jax.Array | None,
    row_scales: jax.Array | None,
    bias: jax.Array | None,
    problem: Problem,
    interpret=False,
    experts: jax.Array | None = None,
) -> jax.Array:
    """Computes y = activation((x Wᵀ) row_scales + bias), or the sums that it is made of.

    Where there are weights of several experts, each tile of tokens has its own.

    Args:
      x: ``(M, K)`` bf16, int8 or float8_e4m3fn: the dtype of the products. M is at most 8 or a
        multiple of 8; ``tiles.depth`` divides K.
      codes: int4, int8 or float8_e4m3fn ``(N, K)``, or uint16 words ``(N, K * bits / 16)`` in the
        order of ``gpu_decode.block_of``.
      scales: bf16 or f32 ``(K / group_size, N)``.
      zeros: like scales, or None.
      table: the ``(16,)`` values of 4-bit words that are indices, or None for integers.
      row_scales: f32 ``(M,)`` or None.
      bias: f32 ``(N,)`` or None.
      problem: what is computed.
      interpret: False, or ``plgpu.InterpretGPUParams(..)``.
      experts: int32, of each tile of ``tiles.tokens`` rows, or -1 for a tile that is not computed;
        codes, scales, zeros and bias then have an axis of experts before all others. None for one
        weight.

    Returns:
      ``(M, N)``; without ``out_dtype`` the f32 sums ``(split, N, M)`` with M up to a multiple of
      ``tiles.tokens``, to be added over the first axis.

    Raises:
      ValueError: the tiles do not fit the arrays.
    """
    tiles = problem.tiles
    (m, k), n = x.shape, scales.shape[-1]
    if n % (ROWS * tiles.rows) or k % tiles.depth or (m > 8 and m % 8):
        raise ValueError(
            f"{tiles} do not fit x {x.shape} and codes {codes.shape}: N must be a multiple of "
            f"{ROWS} rows, K of depth, and M of 8 above 8"
        )
    n_blocks, m_blocks = n // (ROWS * tiles.rows), pl.cdiv(m, tiles.tokens)
    steps = pl.cdiv(pl.cdiv(k, tiles.depth * tiles.slices), tiles.split)
    groups = tiles.depth // problem.span
    workers = tiles.rows * tiles.slices
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    narrow = tiles.tokens <= NARROW or x.dtype != jnp.bfloat16
    chunk = min(tiles.tokens, _STORED_TOKENS)

    row_sums = None
    if zeros is not None and x.dtype != jnp.bfloat16:
        row_sums = x.astype(jnp.float32).reshape(m, -1, problem.span).sum(axis=2).T
        row_sums = jnp.pad(row_sums, ((0, 0), (0, m_blocks * tiles.tokens - m)))
        row_sums = row_sums.reshape(-1, m_blocks, tiles.tokens)
        row_sums = jnp.pad(row_sums, ((0, 0), (0, 0), (0, max(0, COPIED - tiles.tokens))))
    if row_scales is not None:
        row_scales = jnp.pad(row_scales, (0, m_blocks * tiles.tokens - m))
        row_scales = row_scales.reshape(m_blocks, tiles.tokens)
    inputs = {
        "x": x,
        "codes": codes.reshape(-1, ROWS, k // problem.packed),
        "scales": scales.reshape(-1, n // ROWS, ROWS),
        "zeros": None if zeros is None else zeros.reshape(-1, n // ROWS, ROWS),
        "table": None if table is None else gpu_decode.table_bytes(table),
        "row_scales": row_scales,
        "row_sums": row_sums,
        "bias": None if bias is None else bias.reshape(-1, ROWS),
        "experts": experts,
    }
    inputs = {name: array for name, array in inputs.items() if array is not None}

    # Products take whole spans of a swizzle.
    x_layout = _swizzled(problem.span if narrow else tiles.depth, _bits(x.dtype))
    words = tiles.depth // problem.packed
    scratch = {
        "code_stages": plgpu.SMEM(
            (tiles.stages, tiles.slices, tiles.rows, ROWS, words),
            codes.dtype,
            transforms=_swizzled(words, _bits(codes.dtype)),
        ),
        "x_stages": plgpu.SMEM(
            (tiles.stages, tiles.slices, tiles.tokens, tiles.depth),
            x.dtype,
            transforms=x_layout,
        ),
        "scale_stages": plgpu.SMEM(
            (tiles.stages, tiles.slices, tiles.rows, groups, ROWS), scales.dtype
        ),
        "stored": (
            plgpu.SMEM((tiles.rows, ROWS, chunk), jnp.float32, transforms=_swizzled(chunk, 32))
            if problem.out_dtype is None
            else plgpu.SMEM(
                (tiles.rows, chunk, ROWS), problem.out_dtype, transforms=_swizzled(ROWS, 16)
            )
        ),
        "full": plgpu.Barrier(
            num_arrivals=tiles.slices
            * (1 + (row_sums is not None) + (2 if zeros is None else 3) * tiles.rows),
            num_barriers=tiles.stages,
        ),
        "empty": plgpu.Barrier(num_arrivals=workers, num_barriers=tiles.stages),
    }
    if zeros is not None:
        scratch["zero_stages"] = plgpu.SMEM(
            (tiles.stages, tiles.slices, tiles.rows, groups, ROWS), zeros.dtype
        )
    if row_sums is not None:
        scratch["row_sum_stages"] = plgpu.SMEM(
            (tiles.stages, tiles.slices, groups, row_sums.shape[2]), jnp.float32
        )
    if tiles.slices > 1:
        scratch["slice_sums"] = plgpu.SMEM(
            (tiles.slices - 1, tiles.rows, ROWS, tiles.tokens),
            jnp.float32,
            transforms=_swizzled(tiles.tokens, 32),
        )
        scratch["summed"] = plgpu.Barrier(num_arrivals=workers)
    if problem.staged:
        scratch["decoded"] = plgpu.SMEM((workers, ROWS, tiles.depth), x.dtype, transforms=x_layout)

    def body(*refs, **scratch):
        refs = dict(zip([*inputs, "out"], refs, strict=True))
        m_block = lax.axis_index("m")
        expert = refs["experts"][m_block] if experts is not None else 0
        place = _Place(
            worker=lax.axis_index("warpgroup"),
            m_block=m_block,
            n_block=lax.axis_index("n"),
            first=lax.axis_index("split") * steps,
            split=lax.axis_index("split"),
            row_before=expert * (n // ROWS),
            group_before=expert * (k // problem.group_size),
        )
        arguments = (refs, scratch, place, problem, steps)

        def work():
            lax.cond(
                place.worker == workers,
                functools.partial(_copy, *arguments),
                functools.partial(_multiply, *arguments, sums, narrow),
            )

        work() if experts is None else pl.when(expert >= 0)(work)

    if problem.out_dtype is None:
        out = jax.ShapeDtypeStruct((tiles.split, n, m_blocks * tiles.tokens), jnp.float32)
    else:
        out = jax.ShapeDtypeStruct((m, n), problem.out_dtype)
    return on_gpu(
        body,
        out_type=out,
        grid=(n_blocks, m_blocks, tiles.split),
        grid_names=("n", "m", "split"),
        num_threads=workers + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(*inputs.values())


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a warpgroup works."""

    worker: jax.Array
    m_block: jax.Array
    n_block: jax.Array
    first: jax.Array
    split: jax.Array
    row_before: jax.Array | int  # rows of 64 outputs, of the experts before
    group_before: jax.Array | int


def _bits(dtype) -> int:
    dtype = jnp.dtype(dtype)
    return (jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).bits


def registers(workers: int) -> tuple[int, int]:
    """Registers of a thread at the start of a block, and of one that multiplies later.

    The copying warpgroup gives up what it does not need. The others wait for theirs, so they must
    not ask for more than the block was given.
    """
    warpgroups = workers + 1
    first = min(256, 65536 // (128 * warpgroups) // 8 * 8)
    return first, min(256, (warpgroups * first - _COPY_REGISTERS) // workers // 8 * 8)


def _swizzled(span: int, bits: int) -> tuple:
    """The layout in shared memory of rows that are read in spans of some elements."""
    width = min(128, span * bits // 8)
    return (plgpu.TilingTransform((8, width * 8 // bits)), plgpu.SwizzleTransform(width))


def _copy(refs, scratch, place: _Place, problem: Problem, steps: int) -> None:
    """Fills the stages, as soon as they have been read."""
    tiles = problem.tiles
    plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
    tokens = pl.ds(place.m_block * tiles.tokens, tiles.tokens)

    @pl.loop(0, steps)
    def _step(step):
        stage = lax.rem(step, tiles.stages)
        full = scratch["full"].at[stage]

        @pl.when(step >= tiles.stages)
        def _wait():
            plgpu.barrier_wait(scratch["empty"].at[stage])

        for part in range(tiles.slices):
            at = ((place.first + step) * tiles.slices + part) * tiles.depth
            inputs = pl.ds(at, tiles.depth)
            words = pl.ds(at // problem.packed, tiles.depth // problem.packed)
            group = lax.div(at, problem.group_size) + place.group_before
            groups = pl.ds(group, scratch["scale_stages"].shape[-2])
            plgpu.copy_gmem_to_smem(
                refs["x"].at[tokens, inputs], scratch["x_stages"].at[stage, part], full
            )
            if "row_sums" in refs:
                spans = pl.ds(at // problem.span, tiles.depth // problem.span)
                plgpu.copy_gmem_to_smem(
                    refs["row_sums"].at[spans, place.m_block],
                    scratch["row_sum_stages"].at[stage, part],
                    full,
                )
            for row in range(tiles.rows):
                n_row = place.n_block * tiles.rows + row
                to = (stage, part, row)
                plgpu.copy_gmem_to_smem(
                    refs["codes"].at[place.row_before + n_row, :, words],
                    scratch["code_stages"].at[to],
                    full,
                )
                plgpu.copy_gmem_to_smem(
                    refs["scales"].at[groups, n_row], scratch["scale_stages"].at[to], full
                )
                if "zeros" in refs:
                    plgpu.copy_gmem_to_smem(
                        refs["zeros"].at[groups, n_row], scratch["zero_stages"].at[to], full
                    )

    # A block must not end before its barriers have been used up.
    @pl.loop(max(0, steps - tiles.stages), steps)
    def _drain(step):
        plgpu.barrier_wait(scratch["empty"].at[lax.rem(step, tiles.stages)])


def _multiply(refs, scratch, place: _Place, problem: Problem, steps: int, sums, narrow) -> None:
    """Sums a slice of K, adds the slices of the other warpgroups, and stores a tile of y."""
    tiles, worker = problem.tiles, place.worker
    workers = tiles.rows * tiles.slices
    plgpu.set_max_registers(registers(workers)[1], action="increase")
    row, part = lax.rem(worker, tiles.rows), lax.div(worker, tiles.rows)
    shape = (ROWS, tiles.tokens)
    dtype = refs["x"].dtype
    table = [refs["table"][i] for i in range(8)] if "table" in refs else None

    def rows(ref, group):
        return plgpu.load(ref.at[group], layout=plgpu.Layout.WGMMA.reduce(1))

    def decoded(stage):
        """Decoded weights of a step, in slices of one group, and what is owed to each of them.

        bf16 weights are less their zero points.
        """
        where = (stage, part, row)
        w = gpu_decode.decode(
            scratch["code_stages"].at[where],
            dtype,
            table,
            problem.bits,
            problem.group_size,
            problem.staged,
        )
        for group in range(tiles.depth // problem.span):
            inputs = slice(group * problem.span, (group + 1) * problem.span)
            w_group = w[:, inputs]
            owed = None
            if "row_sums" in refs:
                zero = rows(scratch["zero_stages"].at[where], group).astype(jnp.float32)
                row_sum = plgpu.load(
                    scratch["row_sum_stages"].at[stage, part, group, : tiles.tokens],
                    layout=plgpu.Layout.WGMMA.reduce(0),
                    optimized=False,
                )
                owed = lax.broadcast_in_dim(zero, shape, (0,))
                owed *= lax.broadcast_in_dim(row_sum, shape, (1,))
            elif "zeros" in refs:
                zero = rows(scratch["zero_stages"].at[where], group).astype(dtype)
                w_group -= lax.broadcast_in_dim(zero, w_group.shape, (0,))
            yield inputs, w_group, rows(scratch["scale_stages"].at[where], group), owed

    def issue(acc, w, stage, inputs):
        if problem.staged:
            scratch["decoded"][worker, :, inputs] = w
            plgpu.commit_smem()
            w = scratch["decoded"].at[worker, :, inputs]
        plgpu.wgmma(acc, w, scratch["x_stages"].at[stage, part, :, inputs].T)

    def narrow_step(step, total):
        stage = lax.rem(step, tiles.stages)
        plgpu.barrier_wait(scratch["full"].at[stage])
        for inputs, w, scale, owed in decoded(stage):

            def group_sum(acc, w=w, inputs=inputs):
                issue(acc, w, stage, inputs)
                return acc[...]

            acc = pl.run_scoped(group_sum, plgpu.ACC(shape, sums))
            scale = lax.broadcast_in_dim(scale.astype(jnp.float32), shape, (0,))
            acc = acc.astype(jnp.float32)
            total += (acc if owed is None else acc - owed) * scale
        plgpu.barrier_arrive(scratch["empty"].at[stage])
        return total

    def wide_steps(acc):
        @pl.loop(0, steps)
        def _step(step):
            stage = lax.rem(step, tiles.stages)
            plgpu.barrier_wait(scratch["full"].at[stage])
            w = lax.concatenate(
                [
                    w * lax.broadcast_in_dim(scale.astype(dtype), w.shape, (0,))
                    for _, w, scale, _ in decoded(stage)
                ],
                1,
            )
            issue(acc, w, stage, slice(0, tiles.depth))
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(scratch["empty"].at[stage])

        return acc[...]

    if narrow:
        total = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
        total = lax.fori_loop(0, steps, narrow_step, total)
    else:
        total = pl.run_scoped(wide_steps, plgpu.ACC(shape, sums))

    if tiles.slices > 1:
        slice_sums = scratch["slice_sums"]

        @pl.when(part > 0)
        def _give():
            slice_sums[part - 1, row] = total

        plgpu.barrier_arrive(scratch["summed"])
        plgpu.barrier_wait(scratch["summed"])

        @pl.when(part == 0)
        def _take():
            y = total
            for other in range(tiles.slices - 1):
                y += plgpu.load(slice_sums.at[other, row], layout=plgpu.Layout.WGMMA)
            _store(y, row, refs, scratch, place, problem)
    else:
        _store(total, row, refs, scratch, place, problem)


def _store(y, row, refs, scratch, place: _Place, problem: Problem) -> None:
    """Finishes a warpgroup's tile of yᵀ and writes it, transposed."""
    tiles = problem.tiles
    n_row = place.n_block * tiles.rows + row
    if "row_scales" in refs:
        scale = plgpu.load(
            refs["row_scales"].at[place.m_block],
            layout=plgpu.Layout.WGMMA.reduce(0),
            optimized=False,
        )
        y *= lax.broadcast_in_dim(scale, y.shape, (1,))
    if "bias" in refs:
        bias = plgpu.load(
            refs["bias"].at[place.row_before + n_row],
            layout=plgpu.Layout.WGMMA.reduce(1),
            optimized=False,
        )
        y += lax.broadcast_in_dim(bias, y.shape, (0,))
    y = _ACTIVATIONS[problem.activation](y)
    stored, outputs = scratch["stored"].at[row], pl.ds(n_row * ROWS, ROWS)
    chunk = min(tiles.tokens, _STORED_TOKENS)
    for start in range(0, tiles.tokens, chunk):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        part = y[:, start : start + chunk]
        tokens = pl.ds(place.m_block * tiles.tokens + start, chunk)
        if problem.out_dtype is None:
            stored[...] = part
            out = refs["out"].at[place.split, outputs, tokens]
        else:
            stored.T[...] = part.astype(problem.out_dtype)
            out = refs["out"].at[tokens, outputs]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(stored, out)
    plgpu.wait_smem_to_gmem(0)


def _silu(y):
    root = lax.rsqrt(1.0 + jnp.exp(-y))  # one instruction; a division is a call, which spills
    return y * root * root


def _gelu(y):
    return 0.5 * y * (1.0 + jnp.tanh(0.7978845608028654 * (y + 0.044715 * y * y * y)))


_ACTIVATIONS = {
    None: lambda y: y,
    "relu": lambda y: jnp.maximum(y, 0.0),
    "silu": _silu,
    "gelu": _gelu,
}
