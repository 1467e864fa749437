"""Gradients of flash attention over a list of blocks on Hopper GPUs (Mosaic GPU).

One kernel computes both sides. It keeps a block of queries and goes over the blocks of keys of its
list, or keeps a block of keys and goes over blocks of queries, with the scores transposed. With the
log-sum-exps of the forward pass, shares are computed again, and

    d_share = d_out v',  d_score = share (d_share - delta),
    dq = d_score k,      dk = d_score' q,      dv = share' d_out

where delta is what the sum of a row's shares being one takes away. With an adaptive span a share is
m(distance) times the exponential, and the gradient of its reach z the sum of

    exponential (d_share - delta) / ramp    where 0 < m < 1.

Of what is kept, each of two warpgroups has 64 rows; a block that passes by they take in parts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxcomp.kernels.calls import on_gpu
from jaxcomp.kernels.sparse_attention.gpu_kernel import (
    BLOCK_MASK,
    COPY_REGISTERS,
    MASKED,
    ROWS,
    WORK_REGISTERS,
    WORKERS,
    Problem,
    capped,
    count,
    nearness,
    unpacked,
    words_of,
)
from jaxcomp.kernels.sparse_attention.gpu_lists import BLOCK, WORDS
from jaxcomp.kernels.sparse_attention.schedule import RULE, TABLE

LSE, DELTA = 0, 1  # in one array, whose addresses take half the registers of two
_STAGES = 2
_POSITION_MASK = (BLOCK_MASK + 1) * BLOCK - 1


def gradients(
    operands: dict[str, jax.Array], problem: Problem, by_keys: bool, interpret=False
) -> tuple[jax.Array, ...]:
    """The gradient of queries, or those of keys and values.

    Args:
      operands: as of ``gpu_kernel.forward``, with the lists of keys where those are asked for
        (``gpu_lists.arrays``), and "d_out", of q's shape and dtype, and "statistics", float32 (2,
        batch, heads, whole blocks of queries): log-sum-exps in units of log 2, infinite where a
        query looks at nothing, and delta.
      problem: what is computed.
      by_keys: whether to keep keys.
      interpret: False, or ``plgpu.InterpretGPUParams(..)``.

    Returns:
      (dq,), or (dk, dv), like q and k. With a span also, after dq, float32 (batch, heads, whole
      blocks of queries): what each query adds to its gradient.
    """
    (batch, _, heads, dim), kv_heads = operands["q"].shape, operands["k"].shape[2]
    pairs = [("q", "d_out"), ("k", "v")]
    kept, moving = pairs[::-1] if by_keys else pairs
    rows, dtype = operands["rows"], operands["q"].dtype
    operands = _with_positions(operands, batch, by_keys)

    # Two sums of 128 columns and segments leave registers for fewer scores at once.
    width = ROWS // 2 if by_keys and dim == 128 and "own" in operands else ROWS

    def tiles(*shape, columns=dim):
        # A product's summed axis is whole spans of the swizzle, and a part's is its width.
        swizzled = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width))
        return plgpu.SMEM((*shape, columns), dtype, transforms=swizzled)

    scratch = {f"kept{i}": tiles(WORKERS, ROWS) for i in range(2)}
    scratch |= {f"moving{i}": tiles(_STAGES, BLOCK) for i in range(2)}
    scratch |= {
        "kept_full": plgpu.Barrier(num_arrivals=2, num_barriers=WORKERS),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        "empty": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=_STAGES),
    }
    if problem.staged:
        scratch["left"] = tiles(WORKERS, 2, ROWS, columns=width)
    names = ("dk", "dv") if by_keys else ("dq",)
    like = operands["k"] if by_keys else operands["q"]
    out = dict.fromkeys(names, jax.ShapeDtypeStruct(like.shape, dtype))
    if "span" in operands and not by_keys:
        scratch["d_span"] = plgpu.SMEM((WORKERS, ROWS), jnp.float32)
        out["d_span"] = jax.ShapeDtypeStruct((batch, heads, rows.shape[1] * BLOCK), jnp.float32)

    def body(*refs, **scratch):
        refs = dict(zip([*operands, *out], refs, strict=True))
        head, worker = lax.axis_index("head"), lax.axis_index("warpgroup")
        place = _Place(
            batch=lax.axis_index("batch"),
            head=head,
            listed=head if rows.shape[0] > 1 else 0,
            row=lax.axis_index("row"),
            worker=worker,
            group=heads // kv_heads,
            by_keys=by_keys,
        )
        arguments = (refs, scratch, place, problem, kept, moving)
        lax.cond(
            worker == WORKERS,
            functools.partial(_copy, *arguments),
            functools.partial(_work, *arguments, names, width),
        )

    return on_gpu(
        body,
        out_type=list(out.values()),
        grid=(kv_heads if by_keys else heads, rows.shape[1], batch),
        grid_names=("head", "row", "batch"),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )(*operands.values())


def _with_positions(operands, batch: int, by_keys: bool) -> dict[str, jax.Array]:
    """Operands with what passes by: positions, and segments, in one array for its addresses' sake.

    Segments of what is kept are called "own".
    """
    if by_keys:
        length = operands["statistics"].shape[-1]
    else:
        length = -(-operands["k"].shape[1] // BLOCK) * BLOCK
    passing = [jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))]
    operands = dict(operands)
    if "segments" in operands:
        sides = [operands.pop(name) for name in ("segments", "kv_segments")]
        operands["own"], other = sides[::-1] if by_keys else sides
        passing.append(other)
    return operands | {"passing": jnp.stack(passing)}


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a warpgroup works; a step of keys' lists is one query head of an entry."""

    batch: jax.Array
    head: jax.Array
    listed: jax.Array | int
    row: jax.Array
    worker: jax.Array
    group: int
    by_keys: bool

    def start(self, refs) -> jax.Array:
        """The first position of the block that is kept."""
        return (refs["rows"][self.listed, self.row, 0] & BLOCK_MASK) * BLOCK

    def bound(self, refs, code: int) -> jax.Array:
        """The first step of a code, by its place among the codes."""
        return refs["rows"][self.listed, self.row, 1 + code] * self.steps(refs)

    def steps(self, refs) -> int:
        """Steps of an entry."""
        return self.group if self.by_keys and "members" not in refs else 1

    def entry(self, refs, step) -> jax.Array:
        """The entry of the list that a step is of."""
        return lax.div(step, jnp.int32(self.steps(refs)))

    def passing(self, refs, step) -> tuple[jax.Array, jax.Array]:
        """The first position of the block that passes by, and its head."""
        entry = self.entry(refs, step)
        start = (refs["columns"][self.listed, entry] & BLOCK_MASK) * BLOCK
        if not self.by_keys:
            return start, lax.div(self.head, jnp.int32(self.group))
        if "members" in refs:
            return start, self.head * self.group + refs["members"][self.listed, entry]
        return start, self.head * self.group + lax.rem(step, jnp.int32(self.group))


def _copy(refs, scratch, place: _Place, problem: Problem, kept, moving) -> None:
    """Fetches what is kept, then fills the stages as soon as they have been read."""
    plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
    for worker in range(WORKERS):
        rows = pl.ds(place.start(refs) + worker * ROWS, ROWS)
        for i, name in enumerate(kept):
            source = refs[name].at[place.batch, rows, place.head]
            full = scratch["kept_full"].at[worker]
            plgpu.copy_gmem_to_smem(source, scratch[f"kept{i}"].at[worker], full)
    first, last = place.bound(refs, 0), place.bound(refs, len(problem.codes))

    @pl.loop(first, last)
    def _step(step):
        stage = lax.rem(step - first, _STAGES)

        @pl.when(step - first >= _STAGES)
        def _wait():
            plgpu.barrier_wait(scratch["empty"].at[stage])

        start, head = place.passing(refs, step)
        for i, name in enumerate(moving):
            source = refs[name].at[place.batch, pl.ds(start, BLOCK), head]
            to = scratch[f"moving{i}"].at[stage]
            plgpu.copy_gmem_to_smem(source, to, scratch["full"].at[stage])

    # A block must not end before its barriers have been used up.
    @pl.loop(jnp.maximum(last - _STAGES, first), last)
    def _drain(step):
        plgpu.barrier_wait(scratch["empty"].at[lax.rem(step - first, _STAGES)])


def _work(refs, scratch, place: _Place, problem: Problem, kept, moving, names, width: int) -> None:
    """Goes over the blocks of a list, in parts of a width, and sums up what each adds."""
    plgpu.set_max_registers(WORK_REGISTERS, action="increase")
    worker, by_keys, dtype = place.worker, place.by_keys, refs["q"].dtype
    start, first = place.start(refs) + worker * ROWS, place.bound(refs, 0)
    shape, out_shape = (ROWS, width), (ROWS, refs["q"].shape[-1])
    here = [scratch[f"kept{i}"].at[worker] for i in range(2)]
    down, across = (
        functools.partial(lax.broadcast_in_dim, shape=shape, broadcast_dimensions=(axis,))
        for axis in (0, 1)
    )

    def of_rows(ref):
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)

    def of_columns(ref):
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)

    statistics = []
    if not by_keys:
        rows = (place.batch, place.head, pl.ds(start, ROWS))
        statistics = [of_rows(refs["statistics"].at[(i, *rows)]) for i in (LSE, DELTA)]

    def statistic(i, at, head):
        if not by_keys:
            return down(statistics[i])
        return across(of_columns(refs["statistics"].at[i, place.batch, head, pl.ds(at, width)]))

    def near_of(at, head):
        """The span's weights of a part: positions that change are read, as in ``masked``."""
        columns = of_columns(refs["passing"].at[0, place.batch, pl.ds(at, width)]) - start
        return nearness(refs["span"][head], problem.ramp, count(ROWS, 1), columns, shape)

    def masked(scores, code, step, within, at):
        """Scores, far down where a query may not look."""
        if code == TABLE:
            table = refs["tables"][place.listed, place.entry(refs, step)]
            every, count_here = words_of(refs["bits"], table, worker), width // 32
            words = every[:count_here]
            for first_word in range(count_here, WORDS, count_here):
                chosen = within == first_word * 32
                others = every[first_word : first_word + count_here]
                words = [jnp.where(chosen, *two) for two in zip(others, words, strict=True)]
            scores = jnp.where(unpacked(words), scores, MASKED)
        elif code >= RULE:
            # Those that change are read: the compiler would hold all that it counts in registers.
            columns = of_columns(refs["passing"].at[0, place.batch, pl.ds(at, width)])
            columns &= _POSITION_MASK
            positions = [down(count(ROWS, 1) + start), across(columns)]
            positions = positions[::-1] if by_keys else positions
            allowed = problem.rules[code - RULE].allowed(*positions)
            scores = jnp.where(allowed, scores, MASKED)
        if "own" in refs:
            own = of_rows(refs["own"].at[place.batch, pl.ds(start, ROWS)])
            other = of_columns(refs["passing"].at[1, place.batch, pl.ds(at, width)])
            scores = jnp.where(down(own) == across(other), scores, MASKED)
        return scores

    def add(sums, code, step, within, d_span):
        """Adds what a part of a block gives to the sums, and to the span's gradient of each row."""
        stage = lax.rem(step - first, _STAGES)
        there = [scratch[f"moving{i}"].at[stage, pl.ds(within, width)] for i in range(2)]

        # Always zero, which the compiler cannot know: it would keep the addresses of all parts of
        # what is kept in registers.
        zero = lax.shift_right_logical(
            refs["columns"][place.listed, place.entry(refs, step)], jnp.int32(31)
        )

        def product(i):
            def run(acc):
                plgpu.wgmma(acc, scratch[f"kept{i}"].at[worker + zero], there[i].T)
                return acc[...]

            return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))

        # One product after the other: registers are short here. The other warpgroup fills the gap.
        scores, factor = capped(product(0), problem)
        at, head = place.passing(refs, step)
        at += within
        shares = masked(scores, code, step, within, at) * factor
        shares = jnp.exp2(shares - statistic(LSE, at, head))
        if "span" in refs and by_keys:
            near = near_of(at, head)
            # Beyond the span a share may be more than a number can hold.
            shares = jnp.where(near > 0, shares * near, 0.0)
        weights = shares.astype(dtype)
        if problem.soft_cap and d_span is None:
            shares *= 1 - scores * scores
        d_scores = shares * (product(1) - statistic(DELTA, at, head))
        if d_span is not None:
            near = near_of(at, place.head)
            d_scores = jnp.where(near > 0, d_scores, 0.0)
            d_span += jnp.where(near < 1, d_scores, 0.0).sum(axis=1)
            d_scores *= near
            if problem.soft_cap:
                d_scores *= 1 - scores * scores
        for i, left in enumerate([d_scores.astype(dtype), weights][: len(sums)]):
            if problem.staged:
                scratch["left"][worker, i] = left
                plgpu.commit_smem()
                left = scratch["left"].at[worker, i]
            plgpu.wgmma(sums[i], left, there[i])
        return d_span

    def all_steps(*sums):
        d_span = None
        if "d_span" in refs:
            d_span = plgpu.layout_cast(
                jnp.zeros((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1)
            )
        for i, code in enumerate(problem.codes):

            def step_of(step, d_span, code=code):
                stage = lax.rem(step - first, _STAGES)
                plgpu.barrier_wait(scratch["full"].at[stage])

                # A loop, so that no more addresses than those of one part are held in registers.
                def part_of(part, d_span):
                    return add(sums, code, step, pl.multiple_of(part * width, width), d_span)

                d_span = lax.fori_loop(0, BLOCK // width, part_of, d_span)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(scratch["empty"].at[stage])
                return d_span

            bounds = place.bound(refs, i), place.bound(refs, i + 1)
            d_span = lax.fori_loop(*bounds, step_of, d_span)
        return *(x[...] for x in sums), d_span

    plgpu.barrier_wait(scratch["kept_full"].at[worker])
    *sums, d_span = pl.run_scoped(all_steps, *[plgpu.ACC(out_shape, jnp.float32)] * len(names))
    for i, (name, total) in enumerate(zip(names, sums, strict=True)):
        here[i][...] = (total * problem.scale if i == 0 else total).astype(dtype)
        plgpu.commit_smem()
        to = refs[name].at[place.batch, pl.ds(start, ROWS), place.head]
        plgpu.copy_smem_to_gmem(here[i], to)
    if d_span is not None:
        scratch["d_span"][worker] = d_span * (1 / problem.ramp)
        plgpu.commit_smem()
        to = refs["d_span"].at[place.batch, place.head, pl.ds(start, ROWS)]
        plgpu.copy_smem_to_gmem(scratch["d_span"].at[worker], to)
    plgpu.wait_smem_to_gmem(0)
