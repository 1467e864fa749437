"""What the kernels for TPUs compute: one block at a time, and what begins and ends a result.

Scores are kept in units of log 2, so that the exponential is the one that the hardware has, and the
factor for it is multiplied into the side that stays in memory, once.

The kernels for queries keep a block of queries and go over its keys. The one for keys and values
keeps a block of keys and computes the scores transposed: the queries' statistics then lie along
lanes, as they are stored.
"""

import functools

import jax
import jax.numpy as jnp
from jaxcomp.kernels.sparse_attention.tpu_walk import LANES, LOG2_E

# A score that is masked is far below the first maximum: its weight is zero even in a row that has
# seen no other score.
LOWEST, MASKED = -1e30, -2e38


# -- arithmetic of one block -----------------------------------------------------------------------


def dot(a, b, *, transposed: bool):
    """Product a b, or a b' where transposed, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _positions(config, refs, by_rows: bool):
    """Positions of queries and of keys, a column and a row that broadcast to the block."""
    q_shape, k_shape = ((config.block_q, 1), (1, config.block_k))
    if not by_rows:
        q_shape, k_shape = q_shape[::-1], k_shape[::-1]
    q = refs.q_start + jax.lax.broadcasted_iota(jnp.int32, q_shape, 0 if by_rows else 1)
    k = refs.k_start + jax.lax.broadcasted_iota(jnp.int32, k_shape, 1 if by_rows else 0)
    return q, k


def _scores(config, refs, products, rule, by_rows):
    """Masked scores over log 2 and what the gradient needs of them: tanh, and the span's distance.

    Args:
      config: of the kernel.
      refs: of the kernel.
      products: queries times keys, with ``config.factor`` in them.
      rule: allowed(q, k), or None for a full block.
      by_rows: whether queries lie along rows.
    """
    tanh = distance = None
    if refs.k_scale is not None:
        products = products * refs.k_scale[...]
    if config.soft_cap:
        tanh = jnp.tanh(products)
        products = tanh * (config.soft_cap * LOG2_E)
    if rule is not None or refs.span is not None:
        q, k = _positions(config, refs, by_rows)
    allowed = None if rule is None else rule(q, k)
    if refs.segments is not None:
        same = refs.segments[...] == refs.kv_segments[...]
        allowed = same if allowed is None else allowed & same
    if allowed is not None:
        products = jnp.where(allowed, products, MASKED)
    if refs.span is not None:
        distance = jnp.abs(q - k).astype(jnp.float32)
    return products, tanh, distance


def _span_weights(config, refs, distance):
    """m(distance), and its derivative to z."""
    soft = (config.ramp + refs.z - distance) * (1 / config.ramp)
    inside = (soft > 0) & (soft < 1)
    return jnp.clip(soft, 0, 1), jnp.where(inside, 1 / config.ramp, 0.0)


def lanes(x, width: int):
    """(rows, 128) of equal lanes to (rows, width)."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def folded(x):
    """(rows, width) to (rows, 128): sums over what lies in the same lane."""
    return functools.reduce(jnp.add, [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)])


def _column(row):
    """(1, n) to (n, 128) of equal lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _operand(ref, like):
    """A block of keys or values as the matrix unit takes it; codes are exact in bfloat16."""
    return ref[...].astype(like.dtype)


# -- kernels: what a head does first, a block's products, what is added from them, and last --------


def forward_kernel(config, refs, by_rows):
    """Outputs and log-sum-exps, by an online softmax."""

    def start():
        refs.scaled[...] = (refs.q[...].astype(jnp.float32) * config.factor).astype(refs.q.dtype)
        refs.top[...] = jnp.full_like(refs.top, LOWEST)
        refs.total[...] = jnp.zeros_like(refs.total)
        refs.sum[...] = jnp.zeros_like(refs.sum)

    def products():
        return dot(refs.scaled[...], _operand(refs.k, refs.q), transposed=True)

    def add(rule, products):
        scores, _, distance = _scores(config, refs, products, rule, by_rows)
        before = refs.top[...]
        top = jnp.maximum(before, scores.max(axis=1, keepdims=True))
        weights = jnp.exp2(scores - lanes(top, config.block_k))
        if distance is not None:
            weights *= _span_weights(config, refs, distance)[0]
        fade = jnp.exp2(before - top)
        refs.top[...] = top
        # Lane by lane: the lanes are added up once, at the end.
        refs.total[...] = fade * refs.total[...] + folded(weights)
        if refs.v_scale is not None:
            weights *= refs.v_scale[...]
        added = dot(weights.astype(refs.q.dtype), _operand(refs.v, refs.q), transposed=False)
        refs.sum[...] = lanes(fade, added.shape[1]) * refs.sum[...] + added

    def finish():
        total = jnp.broadcast_to(refs.total[...].sum(axis=1, keepdims=True), refs.total.shape)
        some = total > 0
        safe = jnp.where(some, total, 1.0)
        out = refs.sum[...] * lanes(jnp.where(some, 1.0 / safe, 0.0), refs.sum.shape[1])
        refs.out[...] = out.astype(refs.out.dtype)
        if refs.lse is None:
            return
        lse = jnp.where(some, refs.top[...] * (1 / LOG2_E) + jnp.log(safe), -jnp.inf)
        refs.lse[...] = lse.T[:1]

    return start, products, add, finish


def query_kernel(config, refs, by_rows):
    """The gradients of queries and spans, from saved log-sum-exps."""

    def start():
        refs.scaled[...] = (refs.q[...].astype(jnp.float32) * config.factor).astype(refs.q.dtype)
        refs.lse_column[...] = _column(refs.lse[...])
        refs.delta_column[...] = _column(refs.delta[...])
        refs.sum[...] = jnp.zeros_like(refs.sum)
        if refs.span is not None:
            refs.span_sum[...] = jnp.zeros_like(refs.span_sum)

    def products():
        return dot(refs.scaled[...], _operand(refs.k, refs.q), transposed=True)

    def add(rule, products):
        k, v = _operand(refs.k, refs.q), _operand(refs.v, refs.q)
        scores, tanh, distance = _scores(config, refs, products, rule, by_rows)
        shares = jnp.exp2(scores - lanes(refs.lse_column[...], config.block_k))
        d_shares = dot(refs.d_out[...], v, transposed=True)
        if refs.v_scale is not None:
            d_shares *= refs.v_scale[...]
        d_scores = shares * (d_shares - lanes(refs.delta_column[...], config.block_k))
        if distance is not None:
            weights, slopes = _span_weights(config, refs, distance)
            refs.span_sum[...] += folded(d_scores * slopes)
            d_scores *= weights
        if tanh is not None:
            d_scores *= 1 - tanh * tanh
        if refs.k_scale is not None:
            d_scores *= refs.k_scale[...]
        refs.sum[...] += dot(d_scores.astype(refs.q.dtype), k, transposed=False)

    def finish():
        refs.dq[...] = (refs.sum[...] * config.scale).astype(refs.dq.dtype)
        if refs.span is not None:
            refs.d_span[...] = refs.span_sum[...].sum(axis=0, keepdims=True)

    return start, products, add, finish


def key_kernel(config, refs, by_rows):
    """The gradients of keys and values, from scores with keys along rows."""

    def start():
        k = refs.k[...].astype(jnp.float32)
        refs.scaled[...] = (k * config.factor).astype(refs.scaled.dtype)
        refs.k_sum[...] = jnp.zeros_like(refs.k_sum)
        refs.v_sum[...] = jnp.zeros_like(refs.v_sum)

    def products():
        return dot(refs.scaled[...], refs.q[...], transposed=True)

    def add(rule, products):
        q, d_out = refs.q[...], refs.d_out[...]
        scores, tanh, distance = _scores(config, refs, products, rule, by_rows)
        shares = jnp.exp2(scores - refs.lse[...])
        weights = shares
        if distance is not None:
            weights = shares * _span_weights(config, refs, distance)[0]
        refs.v_sum[...] += dot(weights.astype(q.dtype), d_out, transposed=False)
        d_shares = dot(refs.v[...].astype(q.dtype), d_out, transposed=True)
        d_scores = weights * (d_shares - refs.delta[...])
        if tanh is not None:
            d_scores *= 1 - tanh * tanh
        refs.k_sum[...] += dot(d_scores.astype(q.dtype), q, transposed=False)

    def finish():
        refs.dk[...] = (refs.k_sum[...] * config.scale).astype(refs.dk.dtype)
        refs.dv[...] = refs.v_sum[...].astype(refs.dv.dtype)

    return start, products, add, finish
