"""Attention of the newest tokens to a long cache: a kernel for TPUs, and plain JAX.

The queries are few, so reading the cache is the work. The kernel goes over blocks of positions with
all key heads in each, as the cache lies in memory; which blocks hold anything that a query may look
at depends on the sequence's length, and the others are neither read nor computed.

Both take a part of a cache as well, which begins at position ``start`` of every sequence: with the
log-sum-exps that they return, results of all parts are merged exactly (``cache_sharding``).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.sparse_attention import tpu
from jaxcomp.kernels.sparse_attention.rules import Mask
from jaxcomp.kernels.sparse_attention.tpu_kernels import LOWEST, MASKED, dot, folded, lanes
from jaxcomp.kernels.sparse_attention.tpu_walk import LANES, LOG2_E

ROWS = 8
# Bytes of keys in a block: enough that starting a step costs little beside reading it.
BLOCK_BYTES = 1 << 20


def unfit(
    q: jax.Array, k: jax.Array, v: jax.Array, chip: Chip | None, interpret: Any
) -> str | None:
    """Why the kernel does not take these operands, or None."""
    reason = tpu.unfit(q, k, v, chip, interpret)
    if reason:
        return reason
    if k.shape[-1] % LANES or v.shape[-1] % LANES:
        return (
            f"it takes heads of a multiple of {LANES}, not {k.shape[-1]} and {v.shape[-1]}: a "
            "smaller one does not fill the lanes, and the cache would be copied"
        )
    return None


def plain(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    mask: Mask,
    *,
    scale: float,
    soft_cap: float | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    start: int | jax.Array = 0,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The reference.

    Args:
      q: as all others, that of ``api.decode_attention``.
      k: keys of the positions from ``start`` on.
      v: likewise.
      lengths: of whole sequences.
      mask: likewise.
      scale: of the products.
      soft_cap: bound of the scores.
      k_scale: of these keys.
      v_scale: of these values.
      start: position of the first key.
      out_dtype: of the outputs; q's if None.

    Returns:
      Outputs (batch, queries, heads, value_dim), zeros where nothing is looked at, and
      log-sum-exps (batch, heads, queries), float32 at least, -inf there.
    """
    batch, queries, heads, _ = q.shape
    capacity, kv_heads = k.shape[1:3]
    compute = jnp.promote_types(q.dtype, jnp.float32)
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    grouped = q.astype(compute).reshape(batch, queries, kv_heads, heads // kv_heads, -1)
    scores = product("bqhgd,bkhd->bhgqk", grouped, k.astype(compute)) * scale
    if k_scale is not None:
        scores *= jnp.moveaxis(k_scale.astype(compute), 1, 2)[:, :, None, None]
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    q_position = (lengths[:, None] - queries + jnp.arange(queries))[:, :, None]
    k_position = (start + jnp.arange(capacity))[None, None]
    allowed = mask.allowed(q_position, k_position) & (k_position < lengths[:, None, None])
    allowed = (allowed & (q_position >= 0))[:, None, None]
    top = jnp.max(scores, axis=-1, where=allowed, initial=-1e30, keepdims=True)
    weights = jnp.where(allowed, jnp.exp(scores - top), 0)
    total = weights.sum(-1, keepdims=True)
    safe = jnp.where(total > 0, total, 1)
    lse = jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)
    weights /= safe
    v = v.astype(compute)
    if v_scale is not None:
        v *= v_scale.astype(compute)[..., None]
    # What lies past the length may be anything, and not a number times zero is not zero.
    v = jnp.where((k_position[0] < lengths[:, None])[:, :, None, None], v, 0)
    out = product("bhgqk,bkhd->bqhgd", weights, v)
    out = out.reshape(*q.shape[:3], -1).astype(out_dtype or q.dtype)
    return out, lse.reshape(batch, heads, queries)


def mosaic(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    mask: Mask,
    *,
    scale: float,
    soft_cap: float | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    start: int | jax.Array = 0,
    out_dtype: jax.typing.DTypeLike | None = None,
    block_k: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The kernel: arguments and results are those of ``plain``; ``block_k`` keys are in a block."""
    batch, queries, heads, dim = q.shape
    capacity, kv_heads, out_dim = k.shape[1], k.shape[2], v.shape[-1]
    group = heads // kv_heads
    block = block_k or _block(capacity, kv_heads * dim * k.dtype.itemsize)
    count = -(-capacity // block)
    rows = -(-queries * group // ROWS) * ROWS
    factor = scale / soft_cap if soft_cap else scale * LOG2_E
    # A key head's queries beside each other, as the rows of one product.
    grouped = jnp.moveaxis(q.reshape(batch, queries, kv_heads, group, dim), 2, 1)
    grouped = grouped.reshape(batch, kv_heads, queries * group, dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, rows - queries * group), (0, 0)))
    reach = mask.reach()

    def bounds(lengths, begin, sequence):
        """Keys here that a sequence has filled; first and last block a query may look at."""
        filled = jnp.clip(lengths[sequence] - begin[0], 0, capacity)
        last = jax.lax.div(filled + (block - 1), block) - 1
        if reach is None:
            return filled, jnp.int32(0), last
        nearest = jnp.maximum(lengths[sequence] - queries - reach - begin[0], 0)
        return filled, jax.lax.div(nearest, block), last

    def at(sequence, step, lengths, begin):
        _, first, last = bounds(lengths, begin, sequence)
        # Past the last block it stays there, and nothing is fetched.
        return jnp.maximum(jnp.minimum(first + step, last), 0)

    def cached(width):
        return pl.BlockSpec((None, block, width), lambda b, s, *n: (b, at(b, s, *n), 0))

    def whole(width):
        return pl.BlockSpec((None, kv_heads, rows, width), lambda b, s, *n: (b, 0, 0, 0))

    operands = [grouped, *(x.reshape(batch, capacity, -1) for x in (k, v))]
    specs = [whole(dim), cached(kv_heads * dim), cached(kv_heads * out_dim)]
    for x in (k_scale, v_scale):
        if x is not None:
            operands.append(jnp.moveaxis(x.astype(jnp.float32), 1, 2))
            specs.append(
                pl.BlockSpec((None, kv_heads, block), lambda b, s, *n: (b, 0, at(b, s, *n)))
            )

    def body(lengths, begin, q, k, v, *rest):
        scales, (out, lse, top, total, summed) = rest[:-5], rest[-5:]
        sequence, step = pl.program_id(0), pl.program_id(1)
        filled, first, last = bounds(lengths, begin, sequence)
        length = lengths[sequence]

        @pl.when(step == 0)
        def _():
            top[...] = jnp.full_like(top, LOWEST)
            total[...] = jnp.zeros_like(total)
            summed[...] = jnp.zeros_like(summed)

        def add(edge):
            here = (first + step) * block
            row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
            q_position = length - queries + (row if group == 1 else jax.lax.div(row, group))
            k_index = here + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
            allowed = mask.allowed(q_position, begin[0] + k_index)
            allowed = allowed & (k_index < filled) & (q_position >= 0)
            for head in range(kv_heads):
                keys = k[:, head * dim : (head + 1) * dim].astype(q.dtype)
                values = v[:, head * out_dim : (head + 1) * out_dim].astype(q.dtype)
                if edge:
                    # What lies past the cache's end may be anything, and not a number times zero
                    # is not zero.
                    held = here + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) < filled
                    values = jnp.where(held, values, jnp.zeros_like(values))
                scores = dot(q[head], keys, transposed=True) * factor
                if scales:
                    scores *= scales[0][head : head + 1]
                if soft_cap:
                    scores = jnp.tanh(scores) * (soft_cap * LOG2_E)
                scores = jnp.where(allowed, scores, MASKED)
                before = top[head]
                after = jnp.maximum(before, scores.max(axis=1, keepdims=True))
                weights = jnp.exp2(scores - lanes(after, block))
                fade = jnp.exp2(before - after)
                top[head] = after
                total[head] = fade * total[head] + folded(weights)
                if scales:
                    scaled = weights * scales[1][head : head + 1]
                    weights = jnp.where(allowed, scaled, 0.0) if edge else scaled
                added = dot(weights.astype(q.dtype), values, transposed=False)
                summed[head] = lanes(fade, out_dim) * summed[head] + added

        here = first + step
        inside = (here + 1) * block <= filled
        pl.when((here <= last) & inside)(functools.partial(add, False))
        pl.when((here <= last) & ~inside)(functools.partial(add, True))

        @pl.when(step == count - 1)
        def _():
            for head in range(kv_heads):
                sums = total[head].sum(axis=1, keepdims=True)
                safe = jnp.where(sums > 0, sums, 1.0)
                out[head] = (summed[head] * jnp.where(sums > 0, 1.0 / safe, 0.0)).astype(out.dtype)
                exponent = (top[head] + jnp.log2(safe)) / LOG2_E
                lse[head] = jnp.where(sums > 0, exponent, -jnp.inf)

    out, lse = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, count),
            in_specs=specs,
            out_specs=[whole(out_dim), whole(LANES)],
            scratch_shapes=[
                pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, rows, out_dim), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, kv_heads, rows, out_dim), out_dtype or q.dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, rows, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="sparse_attention_decode",
    )(lengths.astype(jnp.int32), jnp.asarray(start, jnp.int32).reshape(1), *operands)
    out = out[:, :, : queries * group].reshape(batch, kv_heads, queries, group, out_dim)
    lse = lse[:, :, : queries * group, 0].reshape(batch, kv_heads, queries, group)
    lse = jnp.moveaxis(lse, 2, 3).reshape(batch, heads, queries)
    return jnp.moveaxis(out, 1, 2).reshape(batch, queries, heads, out_dim), lse


def _block(capacity: int, row_bytes: int) -> int:
    wanted = max(BLOCK_BYTES // row_bytes // LANES * LANES, LANES)
    return min(wanted, 1024, -(-capacity // LANES) * LANES)
