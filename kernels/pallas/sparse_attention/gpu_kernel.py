"""Flash attention over a list of blocks on Hopper GPUs (Mosaic GPU): the forward kernel.

A thread block has 128 queries of one head, 64 for each of two warpgroups, and goes over the blocks
of keys that its row of the schedule lists, and over no others. A third warpgroup copies them into a
ring of stages in shared memory. The list is sorted by what a block needs: full blocks first, with
no arithmetic for a mask, then those of each rule, then those of bitmaps; each kind is a loop of its
own, so no step branches. The warpgroups take turns: one multiplies while the other is at its
softmax. Scores and weights stay in registers.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxcomp.kernels.calls import on_gpu
from jaxcomp.kernels.sparse_attention.gpu_lists import BLOCK, WORDS
from jaxcomp.kernels.sparse_attention.rules import Mask
from jaxcomp.kernels.sparse_attention.schedule import MOST_BLOCKS, RULE, TABLE

WORKERS = 2
ROWS = BLOCK // WORKERS  # queries of a warpgroup
COPY_REGISTERS, WORK_REGISTERS = 24, 240  # of 504 for three threads
_SHARED_BYTES = 128 << 10  # for the stages: what is left beside the queries, and to spare
LOG2_E = math.log2(math.e)
# A masked score is far below the first maximum: its weight is zero even in a row that has seen no
# other score.
LOWEST, MASKED = -1e30, -2e38
# The bits of a block's number. Told so, the compiler knows positions to be positive, and divides by
# the constants of a rule without a case for negative ones.
BLOCK_MASK = MOST_BLOCKS - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """How products become scores, and how a kernel has them.

    Attributes:
      scale: of the products.
      soft_cap: bound of the scores, or None.
      staged: whether weights go through shared memory, as interpret mode needs.
    """

    scale: float
    soft_cap: float | None
    staged: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem(Scores):
    """What is known before any number is.

    Attributes:
      codes: what the schedule's blocks need, in the order of a row's list.
      rules: masks that are computed, for codes from RULE on.
      ramp: distance over which an adaptive span fades.
    """

    codes: tuple[int, ...]
    rules: tuple[Mask, ...]
    ramp: float = 32.0


def forward(
    operands: dict[str, jax.Array], problem: Problem, interpret=False
) -> tuple[jax.Array, jax.Array]:
    """Outputs and log-sum-exps.

    Args:
      operands: "q" (batch, queries, heads, dim), "k" and "v" (batch, keys, kv_heads, dim), bf16 or
        f16, with dim 64 or 128 and lengths up to 8 or multiples of it; the schedule as int32
        "rows" (lists, row blocks, 2 + codes): a block of queries, then where each code's part of
        its list starts and the last one ends, and "columns" (lists, steps), blocks of keys; where
        codes have TABLE, int32 "tables" (lists, steps) and "bits" (bitmaps, WORDS, BLOCK), 32 keys
        a word; and, or not, int32 "segments" and "kv_segments", (batch, whole blocks); and, or not,
        float32 "span" (heads,), how far each head sees before it fades, and "ticks" (BLOCK,), which
        are 0, 1, 2 and so on.
      problem: what is computed.
      interpret: False, or ``plgpu.InterpretGPUParams(..)``.

    Returns:
      Outputs like q, and float32 (batch, heads, whole blocks of queries).
    """
    q, rows = operands["q"], operands["rows"]
    batch, _, heads, dim = q.shape
    stages = _SHARED_BYTES // (2 * BLOCK * dim * q.dtype.itemsize)

    def tiles(*shape, columns=dim):
        swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM((*shape, columns), q.dtype, transforms=swizzled)

    scratch = {
        "q": tiles(WORKERS, ROWS),
        "k": tiles(stages, BLOCK),
        "v": tiles(stages, BLOCK),
        "lse": plgpu.SMEM((WORKERS, ROWS), jnp.float32),
        "q_full": plgpu.Barrier(num_barriers=WORKERS),
        "k_full": plgpu.Barrier(
            num_arrivals=2 if "kv_segments" in operands else 1, num_barriers=stages
        ),
        "v_full": plgpu.Barrier(num_barriers=stages),
        "k_empty": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages),
        "v_empty": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages),
        "turn": plgpu.Barrier(num_arrivals=WORKERS),
    }
    if "kv_segments" in operands:
        scratch["kv_segments"] = plgpu.SMEM((stages, BLOCK), jnp.int32)
    if problem.staged:
        scratch["weights"] = tiles(WORKERS, ROWS, columns=BLOCK)

    def body(*refs, **scratch):
        refs = dict(zip([*operands, "out", "lse"], refs, strict=True))
        head, worker = lax.axis_index("head"), lax.axis_index("warpgroup")
        place = _Place(
            batch=lax.axis_index("batch"),
            head=head,
            kv_head=lax.div(head, jnp.int32(heads // operands["k"].shape[2])),
            listed=head if rows.shape[0] > 1 else 0,
            row=lax.axis_index("row"),
            worker=worker,
        )
        lax.cond(
            worker == WORKERS,
            functools.partial(_copy, refs, scratch, place, problem, stages),
            functools.partial(_attend, refs, scratch, place, problem, stages),
        )

    return on_gpu(
        body,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, rows.shape[1] * BLOCK), jnp.float32),
        ),
        grid=(heads, rows.shape[1], batch),
        grid_names=("head", "row", "batch"),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )(*operands.values())


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a warpgroup works; ``row`` counts the schedule's rows, in the order of their length."""

    batch: jax.Array
    head: jax.Array
    kv_head: jax.Array
    listed: jax.Array | int
    row: jax.Array
    worker: jax.Array

    def of_row(self, refs, index: int) -> jax.Array:
        """A number of the schedule's row."""
        return refs["rows"][self.listed, self.row, index]

    def start(self, refs) -> jax.Array:
        """The first query of the block."""
        return (self.of_row(refs, 0) & BLOCK_MASK) * BLOCK

    def keys(self, refs, step) -> jax.Array:
        """The first key of a step."""
        return (refs["columns"][self.listed, step] & BLOCK_MASK) * BLOCK


def _copy(refs, scratch, place: _Place, problem: Problem, stages: int) -> None:
    """Fills the stages, as soon as they have been read."""
    plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
    for worker in range(WORKERS):
        queries = pl.ds(place.start(refs) + worker * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(
            refs["q"].at[place.batch, queries, place.head],
            scratch["q"].at[worker],
            scratch["q_full"].at[worker],
        )
    first, last = place.of_row(refs, 1), place.of_row(refs, 1 + len(problem.codes))

    @pl.loop(first, last)
    def _step(step):
        stage = lax.rem(step - first, stages)
        keys = pl.ds(place.keys(refs, step), BLOCK)

        def free(name):
            @pl.when(step - first >= stages)
            def _wait():
                plgpu.barrier_wait(scratch[f"{name}_empty"].at[stage])

        for name in "kv":
            free(name)
            full = scratch[f"{name}_full"].at[stage]
            source = refs[name].at[place.batch, keys, place.kv_head]
            plgpu.copy_gmem_to_smem(source, scratch[name].at[stage], full)
            if name == "k" and "kv_segments" in refs:
                source = refs["kv_segments"].at[place.batch, keys]
                plgpu.copy_gmem_to_smem(source, scratch["kv_segments"].at[stage], full)

    # A block must not end before its barriers have been used up.
    @pl.loop(jnp.maximum(last - stages, first), last)
    def _drain(step):
        for name in "kv":
            plgpu.barrier_wait(scratch[f"{name}_empty"].at[lax.rem(step - first, stages)])


def _attend(refs, scratch, place: _Place, problem: Problem, stages: int) -> None:
    """Goes over the blocks of a row with an online softmax."""
    plgpu.set_max_registers(WORK_REGISTERS, action="increase")
    worker, dtype = place.worker, refs["q"].dtype
    start, first = place.start(refs) + worker * ROWS, place.of_row(refs, 1)
    by_row = plgpu.Layout.WGMMA.reduce(1)
    score_shape, out_shape = (ROWS, BLOCK), (ROWS, refs["q"].shape[-1])

    def take_turns():
        plgpu.barrier_arrive(scratch["turn"])
        plgpu.barrier_wait(scratch["turn"])

    def down(x, shape):
        return lax.broadcast_in_dim(x, shape, (0,))

    def across(x, shape):
        return lax.broadcast_in_dim(x, shape, (1,))

    def product(a, b, shape):
        """A product, started before the other warpgroup is let go on."""

        def run(acc):
            plgpu.wgmma(acc, a, b)
            if a is queries:
                take_turns()
            return acc[...]

        return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))

    def step(code, index, carry):
        acc, top, total = carry
        stage = lax.rem(index - first, stages)
        plgpu.barrier_wait(scratch["k_full"].at[stage])
        scores = product(queries, scratch["k"].at[stage].T, score_shape)
        if "segments" not in refs:
            plgpu.barrier_arrive(scratch["k_empty"].at[stage])
        scores, factor = capped(scores, problem)
        if "segments" in refs:
            # Read again by each step: to hold them takes registers that are not there.
            ids = refs["segments"].at[place.batch, pl.ds(start, ROWS)]
            segments = plgpu.load(ids, layout=by_row, optimized=False)
            kv_segments = plgpu.load(
                scratch["kv_segments"].at[stage],
                layout=plgpu.Layout.WGMMA.reduce(0),
                optimized=False,
            )
            same = down(segments, score_shape) == across(kv_segments, score_shape)
            scores = jnp.where(same, scores, MASKED)
            plgpu.barrier_arrive(scratch["k_empty"].at[stage])
        if code == TABLE:
            words = words_of(refs["bits"], refs["tables"][place.listed, index], worker)
            scores = jnp.where(unpacked(words), scores, MASKED)
        elif code >= RULE:
            positions = (
                down(count(ROWS, 1) + start, score_shape),
                across(count(BLOCK, 0) + place.keys(refs, index), score_shape),
            )
            scores = jnp.where(problem.rules[code - RULE].allowed(*positions), scores, MASKED)
        if "span" in refs:
            # As a summand, for which it need not be kept until scores are weights. What cannot be
            # seen, whose logarithm is infinite, does not count as the largest score either.
            # Columns are read, from a place that is always zero, which the compiler cannot know:
            # what it counts, or reads once for all steps, it would hold in registers.
            zero = lax.shift_right_logical(refs["columns"][place.listed, index], jnp.int32(31))
            ticks = refs["ticks"].at[pl.ds(zero, BLOCK)]
            columns = plgpu.load(ticks, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
            rows = count(ROWS, 1) + (start - place.keys(refs, index))
            span = refs["span"][place.head]
            near = nearness(span, problem.ramp, rows, columns, score_shape)
            scores += jnp.log2(near) * (1 / factor)

        before, top = top, jnp.maximum(top, scores.max(axis=1) * factor)
        weights = jnp.exp2(scores * factor - down(top, score_shape))
        fade = jnp.exp2(before - top)
        total = fade * total + weights.sum(axis=1)
        weights = weights.astype(dtype)
        if problem.staged:
            scratch["weights"][worker] = weights
            plgpu.commit_smem()
            weights = scratch["weights"].at[worker]
        plgpu.barrier_arrive(scratch["turn"])
        plgpu.barrier_wait(scratch["v_full"].at[stage])
        plgpu.barrier_wait(scratch["turn"])
        added = product(weights, scratch["v"].at[stage], out_shape)
        plgpu.barrier_arrive(scratch["v_empty"].at[stage])
        return down(fade, out_shape) * acc + added, top, total

    def of_rows(value):
        return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), by_row)

    queries = scratch["q"].at[worker]
    plgpu.barrier_wait(scratch["q_full"].at[worker])
    pl.when(worker == 1)(take_turns)
    acc = plgpu.layout_cast(jnp.zeros(out_shape, jnp.float32), plgpu.Layout.WGMMA)
    carry = acc, of_rows(LOWEST), of_rows(0.0)
    for i, code in enumerate(problem.codes):
        bounds = place.of_row(refs, 1 + i), place.of_row(refs, 2 + i)
        carry = lax.fori_loop(*bounds, functools.partial(step, code), carry)
    pl.when(worker == 0)(take_turns)

    acc, top, total = carry
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    share = jnp.where(some, 1.0 / safe, 0.0)
    scratch["lse"][worker] = jnp.where(some, (top + jnp.log2(safe)) * (1 / LOG2_E), -jnp.inf)
    queries[...] = (acc * down(share, out_shape)).astype(dtype)
    plgpu.commit_smem()
    rows = pl.ds(start, ROWS)
    plgpu.copy_smem_to_gmem(queries, refs["out"].at[place.batch, rows, place.head])
    plgpu.copy_smem_to_gmem(
        scratch["lse"].at[worker], refs["lse"].at[place.batch, place.head, rows]
    )
    plgpu.wait_smem_to_gmem(0)


def capped(scores, problem: Scores):
    """Scores, and the positive factor that makes them powers of two."""
    if problem.soft_cap:
        scores = jnp.tanh(scores * (problem.scale / problem.soft_cap))
        return scores, problem.soft_cap * LOG2_E
    if problem.scale > 0:
        return scores, problem.scale * LOG2_E
    return scores * problem.scale, LOG2_E


def count(size: int, reduced: int) -> jax.Array:
    """0 to size - 1, along rows or columns of scores: one number for what shares it.

    An iota over the whole block would be computed, and kept in registers, element by element.
    """
    layout = plgpu.Layout.WGMMA.reduce(reduced)
    return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)


def nearness(
    span, ramp: float, rows: jax.Array, columns: jax.Array, shape: tuple[int, int]
) -> jax.Array:
    """An adaptive span's weights of scores: clip((ramp + span - distance) / ramp, 0, 1).

    Args:
      span: how far a head sees before it fades, a scalar.
      ramp: distance over which it fades.
      rows: int32 positions of rows, from somewhere near: float32 is exact to 16 million.
      columns: those of columns.
      shape: of the scores.

    Returns:
      float32 of that shape.
    """
    rows = lax.broadcast_in_dim(rows.astype(jnp.float32), shape, (0,))
    columns = lax.broadcast_in_dim(columns.astype(jnp.float32), shape, (1,))
    seen = (span + ramp - jnp.abs(rows - columns)) * (1 / ramp)
    return jnp.minimum(jnp.maximum(seen, 0.0), 1.0)


def words_of(bits, table, worker) -> list[jax.Array]:
    """A warpgroup's rows of a bitmap, 32 columns in each array."""
    rows = pl.ds(worker * ROWS, ROWS)
    return [
        plgpu.load(bits.at[table, word, rows], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        for word in range(WORDS)
    ]


def unpacked(words: list[jax.Array]) -> jax.Array:
    """Bits of ``words_of`` as bool (rows, columns)."""
    shape = (ROWS, 32)
    key = lax.broadcast_in_dim(count(32, 0), shape, (1,))
    parts = [
        lax.shift_right_logical(lax.broadcast_in_dim(word, shape, (0,)), key) & 1 for word in words
    ]
    return lax.concatenate(parts, 1) != 0
