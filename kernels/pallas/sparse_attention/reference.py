"""Attention under a mask in plain JAX: what every other implementation must agree with.

    out_i = sum_j a_ij v_j / sum_j a_ij,   a_ij = allowed_ij m(|i - j|) exp(cap(scale q_i . k_j))

with cap(s) = c tanh(s / c) where there is a soft cap, and the adaptive span's soft mask
m(d) = clip((ramp + z - d) / ramp, 0, 1) with one learned z a head (arXiv 1905.07799). A row in
which nothing is allowed gives zeros. A key or a value that is not finite makes the results of those
that look at it NaN, and of no others.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxcomp.kernels.sparse_attention.rules import Mask, PerHead


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float,
    soft_cap: float | None = None,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    span: jax.Array | None = None,
    span_ramp: float = 32.0,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention with the whole matrix of scores in memory.

    Args:
      q: (batch, queries, heads, head_dim).
      k: (batch, keys, kv_heads, head_dim); quantized where there is a ``k_scale``.
      v: (batch, keys, kv_heads, value_dim).
      mask: which query looks at which key.
      scale: of the products.
      soft_cap: bound of the scores.
      segment_ids: int (batch, queries); negative for padding.
      kv_segment_ids: int (batch, keys).
      span: (heads,), z of the adaptive span.
      span_ramp: length of its ramp.
      k_scale: (batch, keys, kv_heads).
      v_scale: (batch, keys, kv_heads).

    Returns:
      Outputs (batch, queries, heads, value_dim) of q's dtype, and float32 log-sum-exps (batch,
      heads, queries); those of rows in which nothing is allowed are -inf.
    """
    queries, keys, heads, kv_heads = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    compute = jnp.promote_types(q.dtype, jnp.float32)
    precise = jax.lax.Precision.HIGHEST
    k, v = (dequantized(x, s, compute) for x, s in ((k, k_scale), (v, v_scale)))
    (k, no_key), (v, no_value) = finite(k), finite(v)
    grouped = q.astype(compute).reshape(*q.shape[:2], kv_heads, heads // kv_heads, q.shape[3])
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, k, precision=precise) * scale
    scores = jnp.where(jnp.moveaxis(no_key, 1, 2)[:, :, None, None], jnp.nan, scores)
    scores = scores.reshape(q.shape[0], heads, queries, keys)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    allowed = jnp.asarray(dense(mask, heads, queries, keys))[None]
    if segment_ids is not None:
        same = segment_ids[:, :, None] == kv_segment_ids[:, None, :]
        allowed = allowed & (same & (segment_ids >= 0)[:, :, None])[:, None]
    allowed = jnp.broadcast_to(allowed, scores.shape)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, where=allowed, initial=-1e30))
    weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores - top[..., None], 0)), 0)
    if span is not None:
        distance = jnp.abs(jnp.arange(queries)[:, None] - jnp.arange(keys)[None, :])
        soft = (span_ramp + span.astype(compute)[:, None, None] - distance) / span_ramp
        weights = weights * jnp.clip(soft, 0, 1)
    total = weights.sum(-1)
    some = total > 0
    safe = jnp.where(some, total, 1)
    shares = (weights / safe[..., None]).reshape(
        q.shape[0], kv_heads, heads // kv_heads, queries, keys
    )
    out = jnp.einsum("bhgqk,bkhd->bqhgd", shares, v, precision=precise)
    lost = jnp.einsum("bhgqk,bkh->bqhg", shares, no_value.astype(compute)) > 0
    out = out + jnp.where(lost, jnp.nan, 0)[..., None]
    lse = jnp.where(some, top + jnp.log(safe), -jnp.inf)
    return out.reshape(*q.shape[:3], v.shape[-1]).astype(q.dtype), lse


def finite(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys or values with zeros for what is no finite number, and which of them had any.

    A weight of zero times no number is no number: what is not looked at must not reach a product.
    """
    known = jnp.isfinite(x)
    return jnp.where(known, x, 0), ~known.all(axis=-1)


def dense(mask: Mask, heads: int, queries: int, keys: int) -> np.ndarray:
    """The mask as bool (heads or 1, queries, keys)."""
    mask = mask.bind(queries, keys)
    heads = heads if isinstance(mask, PerHead) else 1
    return np.stack([mask.head(h).block(0, queries, 0, keys) for h in range(heads)])


def dequantized(x: jax.Array, scale: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """Keys or values (.., dim) in a dtype; with scales (..), constants."""
    if scale is None:
        return x.astype(dtype)
    return jax.lax.stop_gradient(x.astype(dtype) * scale.astype(dtype)[..., None])
