"""Operands for the tests, and attention in float64 by its definition."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxcomp.kernels.sparse_attention import (
    blocks,
    causal,
    dilated,
    fixed,
    full,
    global_,
    per_head,
    random,
    strided,
    window,
)

# By the dtype of q: what rounding of operands, of weights and of the result leaves. bfloat16 has 8
# bits, float16 has 11; keys and values quantized add nothing, as the expectation is of what the
# codes mean.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 2.5e-3}
GRADIENT_TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2}

CELLS = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 0]])
MASKS = {
    "full": full(),
    "causal": causal(),
    "window": window(70),
    "window causal": window(130, causal=True),
    "dilated": dilated(40, 3),
    "strided": strided(96),
    "fixed": fixed(80, 3),
    "bigbird": window(64) | global_(5) | random(1, seed=3, block_size=64),
    "blocks": blocks(CELLS, 100) & causal(),
    "not window": ~window(64) & causal(),
    "per head": per_head([causal(), window(32), random(1, block_size=128) & causal(), ~full()]),
}


def mask(name: str, queries: int, keys: int):
    """One of ``MASKS``; blocks as many as the sequences have."""
    if name != "blocks":
        return MASKS[name]
    rows, columns = (np.arange(-(-length // 100)) % 3 for length in (queries, keys))
    return blocks(CELLS[np.ix_(rows, columns)], 100) & causal()


def operands(seed: int, batch=1, queries=200, keys=200, heads=4, kv_heads=2, dim=32, out_dim=None):
    """q, k, v as float32 with entries of variance one."""
    rng = np.random.default_rng(seed)
    shapes = [
        (batch, queries, heads, dim),
        (batch, keys, kv_heads, dim),
        (batch, keys, kv_heads, out_dim or dim),
    ]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def quantized(x: np.ndarray, dtype: str):
    """Codes and scales (batch, keys, kv_heads) of keys or values."""
    top = 127.0 if dtype == "int8" else float(ml_dtypes.finfo(dtype).max)
    scale = np.abs(x).max(-1) / top
    codes = x / scale[..., None]
    codes = np.rint(codes).astype(np.int8) if dtype == "int8" else codes.astype(dtype)
    return codes, scale.astype(np.float32)


def expected(
    q, k, v, mask, *, scale=None, soft_cap=None, segment_ids=None, kv_segment_ids=None, span=None,
    span_ramp=32.0, k_scale=None, v_scale=None,
):  # fmt: skip
    """Outputs and log-sum-exps in float64, one query at a time."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    if k_scale is not None:
        k, v = k * np.asarray(k_scale)[..., None], v * np.asarray(v_scale)[..., None]
    batch, queries, heads, dim = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    scale = dim**-0.5 if scale is None else scale
    kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    mask = mask.bind(queries, keys)
    out = np.zeros((batch, queries, heads, v.shape[-1]))
    lse = np.full((batch, heads, queries), -np.inf)
    distance = np.abs(np.arange(queries)[:, None] - np.arange(keys))
    for b in range(batch):
        for h in range(heads):
            s = scale * q[b, :, h] @ k[b, :, h // group].T
            if soft_cap is not None:
                s = soft_cap * np.tanh(s / soft_cap)
            allowed = mask.head(h).block(0, queries, 0, keys)
            if segment_ids is not None:
                ids, kv_ids = np.asarray(segment_ids[b]), np.asarray(kv_segment_ids[b])
                allowed = allowed & (ids[:, None] == kv_ids) & (ids >= 0)[:, None]
            weights = np.where(allowed, np.exp(s), 0)
            if span is not None:
                weights *= np.clip((span_ramp + np.float64(span[h]) - distance) / span_ramp, 0, 1)
            total = weights.sum(1)
            some = total > 0
            shares = weights / np.where(some, total, 1)[:, None]
            out[b, :, h] = shares @ v[b, :, h // group]
            lse[b, h, some] = np.log(total[some])
    return out, lse


def assert_close(got, want, dtype: str, table=None):
    """Within the tolerance of a dtype, relative to the largest expected number."""
    got, want = np.asarray(jnp.asarray(got, jnp.float32), np.float64), np.asarray(want, np.float64)
    tolerance = (table or TOLERANCE)[dtype]
    assert got.shape == want.shape
    assert np.array_equal(np.isfinite(got), np.isfinite(want))
    got, want = got[np.isfinite(want)], want[np.isfinite(want)]
    error = np.abs(got - want).max(initial=0)
    assert error <= tolerance * max(1.0, np.abs(want).max(initial=0)), error
