"""Attention of the newest tokens to a long cache, in plain JAX: the reference.

It takes a part of a cache as well, as the kernels do, which begins at position ``start`` of every
sequence: with the log-sum-exps that it returns, results of all parts are merged exactly
(``cache_sharding``).
"""

import functools

import jax
import jax.numpy as jnp
from jaxcomp.kernels.sparse_attention import rows as rows_of
from jaxcomp.kernels.sparse_attention.rules import Mask


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
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    span: jax.Array | None = None,
    span_ramp: float = 32.0,
    start: int | jax.Array = 0,
    out_dtype: jax.typing.DTypeLike | None = None,
    finite: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The reference.

    Args:
      q: as all others, that of ``api.decode_attention``.
      k: keys of the positions from ``start`` on.
      v: likewise.
      lengths: of whole sequences.
      mask: bound to the whole cache's capacity.
      scale: of the products.
      soft_cap: bound of the scores.
      k_scale: of these keys.
      v_scale: of these values.
      segment_ids: of the queries.
      kv_segment_ids: of these keys.
      span: (heads,), z of the adaptive span.
      span_ramp: length of its ramp.
      start: position of the first key.
      out_dtype: of the outputs; q's if None.
      finite: whether values past a length are finite, which are multiplied with zeros then.

    Returns:
      Outputs (batch, queries, heads, value_dim), zeros where nothing is looked at, and
      log-sum-exps (batch, heads, queries), float32 at least, -inf there.
    """
    batch, queries, heads, _ = q.shape
    capacity, kv_heads = k.shape[1:3]
    compute = jnp.promote_types(q.dtype, jnp.float32)
    # The cache is read in q's dtype, which holds its codes exactly, and never written out wider.
    product = functools.partial(
        jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=compute
    )
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, -1)
    scores = product("bqhgd,bkhd->bhgqk", grouped, k.astype(q.dtype)) * scale
    if k_scale is not None:
        scores *= jnp.moveaxis(k_scale.astype(compute), 1, 2)[:, :, None, None]
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    q_position = lengths[:, None] - queries + jnp.arange(queries)
    k_position = start + jnp.arange(capacity)
    allowed = rows_of.allowed(
        mask, q_position, lengths, start, capacity, segment_ids, kv_segment_ids
    )
    by_head = (batch, kv_heads, -1) if allowed.shape[1] > 1 else (batch, 1, 1)
    allowed = allowed.reshape(*by_head, queries, capacity)
    top = jnp.max(scores, axis=-1, where=allowed, initial=-1e30, keepdims=True)
    weights = jnp.where(allowed, jnp.exp(scores - top), 0)
    if span is not None:
        distance = jnp.abs(q_position[:, None, None, :, None] - k_position)
        reach = span_ramp + span.astype(compute).reshape(kv_heads, -1, 1, 1)
        weights *= jnp.clip((reach - distance) / span_ramp, 0, 1)
    total = weights.sum(-1, keepdims=True)
    safe = jnp.where(total > 0, total, 1)
    lse = jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)
    weights /= safe
    # What lies past the length may be anything, and not a number times zero is not zero. Only then
    # is it replaced: of a cache of several layers XLA would have all in the layout of the result,
    # and copy the whole cache for each layer.
    held = k_position < lengths[:, None]
    finite |= jnp.issubdtype(v.dtype, jnp.integer)
    v = v.astype(q.dtype)
    if not finite:
        v = jnp.where(held[:, :, None, None], v, 0)
    if v_scale is not None:
        v_scale = jnp.where(held[..., None], v_scale.astype(compute), 0)
        weights *= jnp.moveaxis(v_scale, 1, 2)[:, :, None, None]
    out = product("bhgqk,bkhd->bqhgd", weights.astype(q.dtype), v)
    out = out.reshape(*q.shape[:3], -1).astype(out_dtype or q.dtype)
    return out, lse.reshape(batch, heads, queries)
