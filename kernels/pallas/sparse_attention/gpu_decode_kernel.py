"""Attention of few queries to a long cache on Hopper GPUs (Mosaic GPU): the kernel.

A thread block has the queries of one key head, up to 64 rows, and goes over a part of the blocks
of its sequence's cache. One warpgroup copies them into a ring of stages in shared memory; each of
the others takes every so manieth with an online softmax of its own, and leaves a result and its
log-sum-exp: those of all warpgroups and thread blocks are merged afterwards. The matrix unit is
mostly idle, so rows without a query are multiplied along. Codes of 8 bits become q's dtype on their
way through registers, and go back to shared memory, from where the matrix unit takes keys and
values; their scales are multiplied into scores and weights. Blocks that every query sees whole come
first, in a loop that knows no mask; the few that are left follow.
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
    LOG2_E,
    LOWEST,
    MASKED,
    Scores,
    capped,
    count,
)
from jaxcomp.kernels.sparse_attention.rules import Mask

ROWS = 64  # of queries: the least that the matrix unit takes
KEYS = 64  # of a block
WORKERS = 2
_COPY_REGISTERS, _WORK_REGISTERS = 72, 216  # of 504 for three threads
SHARED_BYTES = 216 << 10  # of 227 KiB; statistics and barriers take some more
_CHUNK = 64  # columns that are stored at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem(Scores):
    """What is known before any number is.

    Attributes:
      queries: tokens of a sequence that ask.
      group: query heads that share a key head: rows of one query.
      splits: parts of a sequence's blocks, each a thread block's.
      rule: the mask, or None where a query sees all keys up to its own.
    """

    queries: int
    group: int
    splits: int
    rule: Mask | None


def decode(
    operands: dict[str, jax.Array], problem: Problem, interpret=False
) -> tuple[jax.Array, jax.Array]:
    """Outputs and log-sum-exps of parts of the cache.

    Args:
      operands: "q" (batch, kv_heads, rows, dim), bf16 or f16, a row for each query and head of a
        group, at most ROWS, and up to 8 or a multiple of it; "k" and "v" (batch, capacity,
        kv_heads, dim), of q's dtype, int8 or fp8, with a capacity that is a multiple of 8; for
        codes, float32 "k_scale" and "v_scale" (batch, kv_heads, whole blocks of keys), those of
        values zero past the sequence's end; int32 "lengths" (batch,) of whole sequences and "start"
        (1,), the position of the first key.
      problem: what is computed.
      interpret: False, or ``plgpu.InterpretGPUParams(..)``.

    Returns:
      float32 (batch, kv_heads, splits * WORKERS, rows, dim), zeros where nothing is looked at, and
      (batch, kv_heads, splits * WORKERS, ROWS), -inf there.
    """
    q, k = operands["q"], operands["k"]
    batch, kv_heads, rows, dim = q.shape
    coded, stages = k.dtype != q.dtype, stage_count(dim, q.dtype, k.dtype)

    def tiles(*shape, columns=dim, dtype=q.dtype):
        width = min(128, columns * jnp.dtype(dtype).itemsize)
        swizzled = (
            plgpu.TilingTransform((8, width // jnp.dtype(dtype).itemsize)),
            plgpu.SwizzleTransform(width),
        )
        return plgpu.SMEM((*shape, columns), dtype, transforms=swizzled)

    scratch = {
        "q": tiles(ROWS),
        "k": tiles(stages, KEYS, dtype=k.dtype),
        "v": tiles(stages, KEYS, dtype=operands["v"].dtype),
        "out": tiles(WORKERS, ROWS, columns=_CHUNK, dtype=jnp.float32),
        "lse": plgpu.SMEM((WORKERS, ROWS), jnp.float32),
        "q_full": plgpu.Barrier(),
        "full": plgpu.Barrier(num_arrivals=4 if coded else 2, num_barriers=stages),
        "empty": plgpu.Barrier(num_barriers=stages),
    }
    if coded:
        scratch |= {f"{name}_scale": plgpu.SMEM((stages, KEYS), jnp.float32) for name in "kv"}
        scratch |= {f"{name}_wide": tiles(WORKERS, KEYS) for name in "kv"}
    if problem.staged:
        scratch["weights"] = tiles(WORKERS, ROWS, columns=KEYS)

    def body(*refs, **scratch):
        refs = dict(zip([*operands, "out", "lse"], refs, strict=True))
        worker = lax.axis_index("warpgroup")
        lax.cond(
            worker == WORKERS,
            functools.partial(_copy, refs, scratch, problem, stages),
            functools.partial(_attend, refs, scratch, worker, problem, stages),
        )

    parts = problem.splits * WORKERS
    return on_gpu(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, parts, rows, dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, kv_heads, parts, ROWS), jnp.float32),
        ),
        # Heads of one position lie beside each other: blocks that run together read together.
        grid=(kv_heads, problem.splits, batch),
        grid_names=("head", "split", "batch"),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )(*operands.values())


def stage_count(dim: int, dtype: jax.typing.DTypeLike, cache: jax.typing.DTypeLike) -> int:
    """Stages of the ring: as many as fit, the same number for each warpgroup.

    A stage is always the same warpgroup's, which so sees every turn of its barrier.
    """
    size, wide = jnp.dtype(cache).itemsize, jnp.dtype(dtype).itemsize
    kept = ROWS * dim * wide + WORKERS * ROWS * _CHUNK * 4
    kept += 2 * WORKERS * KEYS * dim * wide if size < wide else 0
    stages = (SHARED_BYTES - kept) // (2 * KEYS * (dim * size + 4))
    return min(stages, 4 * WORKERS) // WORKERS * WORKERS


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a thread block works.

    Attributes:
      batch: the sequence.
      head: the key head.
      split: which part of the sequence's blocks.
      length: of the sequence.
      begin: position of the first key here.
      filled: keys here that the sequence has.
      first: the part's first block.
      last: one past its last.
      whole: one past the last block without a key that some query may not see.
    """

    batch: jax.Array
    head: jax.Array
    split: jax.Array
    length: jax.Array
    begin: jax.Array
    filled: jax.Array
    first: jax.Array
    last: jax.Array
    whole: jax.Array


def _placed(refs, problem: Problem) -> _Place:
    """Divides the blocks that some query of a sequence may look at."""
    batch, split = lax.axis_index("batch"), lax.axis_index("split")
    length, begin = refs["lengths"][batch], refs["start"][0]
    filled = jnp.clip(length - begin, 0, refs["k"].shape[1])
    seen = filled
    if problem.rule is None:  # Where the first query looks at all of its keys, the later ones do.
        seen = jnp.clip(length - problem.queries + 1 - begin, 0, filled)
    end, start = lax.div(filled + (KEYS - 1), jnp.int32(KEYS)), jnp.int32(0)
    reach = problem.rule.reach() if problem.rule is not None else None
    if reach is not None:
        nearest = jnp.maximum(length - problem.queries - reach - begin, 0)
        start = jnp.minimum(lax.div(nearest, jnp.int32(KEYS)), end)
    part = lax.div(end - start + (problem.splits - 1), jnp.int32(problem.splits))
    first = jnp.minimum(start + split * part, end)
    return _Place(
        batch=batch,
        head=lax.axis_index("head"),
        split=split,
        length=length,
        begin=begin,
        filled=filled,
        first=first,
        last=jnp.minimum(first + part, end),
        whole=lax.div(seen, jnp.int32(KEYS)),
    )


def _copy(refs, scratch, problem: Problem, stages: int) -> None:
    """Fills the stages, as soon as they have been read."""
    place = _placed(refs, problem)
    plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
    # Rows that q does not have are filled with zeros. The start is no constant, as it is checked.
    rows = pl.ds(place.first * 0, ROWS)
    plgpu.copy_gmem_to_smem(
        refs["q"].at[place.batch, place.head, rows], scratch["q"], scratch["q_full"]
    )
    steps = place.last - place.first

    @pl.loop(0, steps)
    def _step(step):
        stage = lax.rem(step, stages)
        full, keys = scratch["full"].at[stage], pl.ds((place.first + step) * KEYS, KEYS)

        @pl.when(step >= stages)
        def _wait():
            plgpu.barrier_wait(scratch["empty"].at[stage])

        for name in "kv":
            source = refs[name].at[place.batch, keys, place.head]
            plgpu.copy_gmem_to_smem(source, scratch[name].at[stage], full)
            if f"{name}_scale" in refs:
                source = refs[f"{name}_scale"].at[place.batch, place.head, keys]
                plgpu.copy_gmem_to_smem(source, scratch[f"{name}_scale"].at[stage], full)

    # A block must not end before its barriers have been used up.
    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _drain(step):
        plgpu.barrier_wait(scratch["empty"].at[lax.rem(step, stages)])


def _attend(refs, scratch, worker, problem: Problem, stages: int) -> None:
    """Goes over every so manieth block with an online softmax."""
    place = _placed(refs, problem)
    plgpu.set_max_registers(_WORK_REGISTERS, action="increase")
    dtype, dim = refs["q"].dtype, refs["q"].shape[-1]
    shape, out_shape, by_row = (ROWS, KEYS), (ROWS, dim), plgpu.Layout.WGMMA.reduce(1)

    def down(x, shape=shape):
        return lax.broadcast_in_dim(x, shape, (0,))

    def across(x):
        return lax.broadcast_in_dim(x, shape, (1,))

    def scales(name, stage):
        ref = scratch[f"{name}_scale"].at[stage]
        return across(plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False))

    def factor(name, stage, held=None):
        """Keys or values of a stage as the matrix unit takes them, with ``held`` of them."""
        ref, layout = scratch[name].at[stage], plgpu.Layout.WGMMA
        coded = f"{name}_wide" in scratch
        if not coded and held is None:
            return ref
        layout = plgpu.Layout.WGMMA_UPCAST_2X if coded else plgpu.Layout.WGMMA
        x = plgpu.load(ref, layout=layout)
        if coded:
            x = (x if x.dtype == jnp.int8 else x.astype(jnp.float16)).astype(dtype)
        if held is not None:
            # What lies past the end may be no number, and that times zero is none.
            index = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=layout)
            x = jnp.where(index < held, x, jnp.zeros_like(x))
        to = scratch[f"{name}_wide"].at[worker] if coded else ref
        to[...] = x
        plgpu.commit_smem()
        return to

    def product(a, b, shape):
        def run(acc):
            plgpu.wgmma(acc, a, b)
            return acc[...]

        return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))

    def step(edge, index, carry):
        acc, top, total = carry
        at = worker + index * WORKERS
        stage, here = lax.rem(at, stages), (place.first + at) * KEYS
        plgpu.barrier_wait(scratch["full"].at[stage])
        keys = factor("k", stage)

        scores = product(scratch["q"], keys.T, shape)
        if "k_scale" in refs:
            scores *= scales("k", stage)
        scores, unit = capped(scores, problem)
        allowed = None
        if edge or problem.rule is not None:
            query = lax.div(count(ROWS, 1), jnp.int32(problem.group))
            q_position = place.length - problem.queries + query
            key = count(KEYS, 0) + here
            positions = down(q_position), across(key + place.begin)
            if problem.rule is not None:
                allowed = problem.rule.allowed(*positions)
            else:
                allowed = positions[0] >= positions[1]
            allowed &= down(q_position) >= 0
            if edge:
                allowed &= across(key) < place.filled
            scores = jnp.where(allowed, scores, MASKED)

        before, top = top, jnp.maximum(top, scores.max(axis=1) * unit)
        weights = jnp.exp2(scores * unit - down(top))
        fade = jnp.exp2(before - top)
        total = fade * total + weights.sum(axis=1)
        if "v_scale" in refs:
            weights *= scales("v", stage)
        weights = weights.astype(dtype)
        if problem.staged:
            scratch["weights"][worker] = weights
            plgpu.commit_smem()
            weights = scratch["weights"].at[worker]
        values = factor("v", stage, place.filled - here if edge else None)
        added = product(weights, values, out_shape)
        plgpu.barrier_arrive(scratch["empty"].at[stage])
        return down(fade, out_shape) * acc + added, top, total

    def of_rows(value):
        return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), by_row)

    plgpu.barrier_wait(scratch["q_full"])
    acc = plgpu.layout_cast(jnp.zeros(out_shape, jnp.float32), plgpu.Layout.WGMMA)
    carry = acc, of_rows(LOWEST), of_rows(0.0)
    ends = [
        lax.div(jnp.maximum(end - place.first - worker + (WORKERS - 1), 0), jnp.int32(WORKERS))
        for end in (jnp.minimum(place.whole, place.last), place.last)
    ]
    carry = lax.fori_loop(0, ends[0], functools.partial(step, False), carry)
    carry = lax.fori_loop(ends[0], ends[1], functools.partial(step, True), carry)
    _store(*carry, refs, scratch, worker, place)


def _store(acc, top, total, refs, scratch, worker, place: _Place) -> None:
    """Writes a warpgroup's result; rows that q does not have fall off."""
    part = place.split * WORKERS + worker
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    share = jnp.where(some, 1.0 / safe, 0.0)
    scratch["lse"][worker] = jnp.where(some, (top + jnp.log2(safe)) * (1 / LOG2_E), -jnp.inf)
    plgpu.commit_smem()
    to = refs["lse"].at[place.batch, place.head, part]
    plgpu.copy_smem_to_gmem(scratch["lse"].at[worker], to)
    acc *= lax.broadcast_in_dim(share, acc.shape, (0,))
    rows, stored = pl.ds(place.first * 0, ROWS), scratch["out"].at[worker]
    for start in range(0, acc.shape[1], _CHUNK):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        stored[...] = acc[:, start : start + _CHUNK]
        plgpu.commit_smem()
        columns = pl.ds(start, _CHUNK)
        to = refs["out"].at[place.batch, place.head, part, rows, columns]
        plgpu.copy_smem_to_gmem(stored, to)
    plgpu.wait_smem_to_gmem(0)
