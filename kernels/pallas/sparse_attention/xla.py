"""Block-sparse attention in plain JAX: only the listed blocks are read and computed.

One key head of one sequence at a time, all its blocks at once: memory in proportion to the blocks
of the mask, forward and backward (the scores are computed again for the gradient). On a mesh all
heads are computed at once, each device those that it has.
"""

import functools

import jax
import jax.numpy as jnp
from jaxcomp.kernels.sparse_attention.reference import dequantized, finite
from jaxcomp.kernels.sparse_attention.schedule import FULL, RULE, TABLE, Schedule


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: Schedule,
    *,
    block_q: int,
    block_k: int,
    scale: float,
    soft_cap: float | None = None,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    span: jax.Array | None = None,
    span_ramp: float = 32.0,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    at_once: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention over a schedule's blocks; arguments and results are those of ``reference``.

    Sequences and heads that a mesh splits have to be computed ``at_once``: a loop over them would
    bring all of them to every device.
    """
    batch, queries, heads, _ = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    rows, columns = blocks.row_blocks * block_q, blocks.column_blocks * block_k

    def by_head(x, length, per=1):
        """(batch, length, kv_heads * per, ..) to (batch, kv_heads, per, padded length, ..)."""
        x = jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, length, kv_heads, per, *x.shape[3:]), 1, 3)

    def by_sequence(x, length):
        x = jnp.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=-1)
        return jnp.broadcast_to(x[:, None], (batch, kv_heads, length))

    steps = [jnp.asarray(x) for x in (blocks.rows.major, blocks.rows.minor)]
    steps += [jnp.asarray(x) for x in (blocks.rows.code, blocks.rows.table)]
    if blocks.rows.lists > 1:
        shape = (batch, kv_heads, group, steps[0].shape[-1])
        steps = [jnp.broadcast_to(x.reshape(shape[1:]), shape) for x in steps]
    per_head = {
        "q": by_head(q, rows, group),
        "k": by_head(k, columns)[:, :, 0],
        "v": by_head(v, columns)[:, :, 0],
    }
    if blocks.rows.lists > 1:
        per_head["steps"] = steps
    if k_scale is not None:
        per_head["k_scale"] = by_head(jax.lax.stop_gradient(k_scale), columns)[:, :, 0]
    if v_scale is not None:
        per_head["v_scale"] = by_head(jax.lax.stop_gradient(v_scale), columns)[:, :, 0]
    if segment_ids is not None:
        per_head["segments"] = by_sequence(segment_ids, rows)
        per_head["kv_segments"] = by_sequence(kv_segment_ids, columns)
    if span is not None:
        span = span.reshape(kv_heads, group)
        per_head["span"] = jnp.broadcast_to(span, (batch, *span.shape))
    one = functools.partial(
        _one_head,
        shared=[x[0] for x in steps],
        blocks=blocks,
        block_q=block_q,
        block_k=block_k,
        scale=scale,
        soft_cap=soft_cap,
        span_ramp=span_ramp,
    )
    if at_once:
        out, lse = jax.checkpoint(jax.vmap(jax.vmap(one)))(per_head)
    else:
        per_head = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), per_head)
        out, lse = jax.lax.map(jax.checkpoint(one), per_head)
    out = out.reshape(batch, heads, rows, v.shape[-1])[:, :, :queries]
    return jnp.moveaxis(out, 1, 2).astype(q.dtype), lse.reshape(batch, heads, rows)[:, :, :queries]


def _one_head(operands, *, shared, blocks, block_q, block_k, scale, soft_cap, span_ramp):
    """The query heads of one key head: (group, rows, dim) and (group, rows)."""
    q, v = operands["q"], operands["v"]
    compute = jnp.promote_types(q.dtype, jnp.float32)
    cut = {
        name: x.reshape(-1, block_q if name == "segments" else block_k, *x.shape[1:])
        for name, x in operands.items()
        if name in ("k", "v", "k_scale", "v_scale", "segments", "kv_segments")
    }
    (keys, no_key), (values, no_value) = (
        finite(dequantized(cut[name], cut.get(f"{name}_scale"), compute)) for name in ("k", "v")
    )

    def head(q, span, steps):
        row, column, code, table = steps
        q_position = row[:, None, None] * block_q + jnp.arange(block_q)[:, None]
        k_position = column[:, None, None] * block_k + jnp.arange(block_k)[None, :]
        allowed = jnp.broadcast_to((code == FULL)[:, None, None], (len(row), block_q, block_k))
        for i, rule in enumerate(blocks.rules):
            here = (code == RULE + i)[:, None, None]
            allowed |= here & rule.allowed(q_position, k_position)
        if len(blocks.bitmaps):
            allowed |= (code == TABLE)[:, None, None] & jnp.asarray(blocks.bitmaps)[table]
        if "segments" in cut:
            ids = cut["segments"][row][:, :, None]
            allowed &= (ids == cut["kv_segments"][column][:, None, :]) & (ids >= 0)
        queries = q.reshape(-1, block_q, q.shape[-1]).astype(compute)[row]
        scores = _product("nqd,nkd->nqk", queries, keys[column]) * scale
        scores = jnp.where(no_key[column][:, None, :], jnp.nan, scores)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        tops = jnp.max(scores, axis=-1, where=allowed, initial=-1e30)
        top = jnp.maximum(jax.ops.segment_max(tops, row, blocks.row_blocks), -1e30)
        top = jax.lax.stop_gradient(top)
        weights = jnp.where(allowed, scores - top[row][:, :, None], 0)
        weights = jnp.where(allowed, jnp.exp(weights), 0)
        if span is not None:
            distance = jnp.abs(q_position - k_position)
            weights *= jnp.clip((span_ramp + span.astype(compute) - distance) / span_ramp, 0, 1)
        total = jax.ops.segment_sum(weights.sum(-1), row, blocks.row_blocks)
        out = _product("nqk,nkd->nqd", weights, values[column])
        lost = _product("nqk,nk->nq", weights, no_value[column].astype(compute))
        lost = jax.ops.segment_sum(lost, row, blocks.row_blocks) > 0
        out = jax.ops.segment_sum(out, row, blocks.row_blocks)
        safe = jnp.where(total > 0, total, 1)
        lse = jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)
        out = out / safe[..., None] + jnp.where(lost, jnp.nan, 0)[..., None]
        return out.reshape(-1, v.shape[-1]), lse.reshape(-1)

    own = "steps" in operands
    return jax.vmap(head, (0, 0 if "span" in operands else None, 0 if own else None))(
        q, operands.get("span"), operands["steps"] if own else shared
    )


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)
