"""The part of ``benchmarks.gpu`` on decoding: a token of each sequence, and a long cache.

Numbers first, against float64; then medians beside XLA and cuDNN, and the share of the memory's
bandwidth that reading the cache takes. Never run on a GPU so far.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxcomp.kernels import chips
from jaxcomp.kernels import sparse_attention as sparse

from benchmarks.gpu_checks import distance, repeated, stable
from benchmarks.gpu_timing import Variants

COLUMNS = ("decoded", "us", "+-", "GB/s", "% of bandwidth", "times cuDNN")
BASE = "cuDNN"
HEADS, KV_HEADS, DIM = 32, 8, 128
# Sequences -> keys of each.
CACHES = {1: 131072, 16: 16384, 128: 2048}
RULES = {"causal": sparse.causal(), "window": sparse.window(300, causal=True)}
TOP = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
# (table, its rows, variant, least ratio to cuDNN's bf16)
REQUIRED = [("decode", 16, "bf16", 0.95), ("decode", 16, "int8", 1.6)]


@dataclasses.dataclass(frozen=True)
class Decode:
    """Decoding whose numbers are checked; what lies past a sequence's length is no number."""

    lengths: tuple[int, ...]
    capacity: int
    cache: str | None = None
    queries: int = 1
    heads: int = 8
    kv_heads: int = 2
    dim: int = 128
    dtype: str = "bfloat16"
    mask: str = "causal"
    soft_cap: float | None = None

    def __str__(self) -> str:
        parts = [f"decoding, {self.mask}, {len(self.lengths)} x {self.queries} x {self.capacity}"]
        parts += [f"{self.heads} on {self.kv_heads} heads of {self.dim}", self.dtype]
        parts += [f"cache {self.cache}"] if self.cache else []
        parts += [f"cap {self.soft_cap}"] if self.soft_cap else []
        return ", ".join(parts)

    def error(self, rng: np.random.Generator, interpret) -> tuple[float, bool]:
        """The relative error, and whether three runs agree."""
        lengths, batch = np.array(self.lengths), len(self.lengths)
        shape = (batch, self.queries, self.heads, self.dim)
        q = jnp.asarray(rng.normal(size=shape), self.dtype)
        cached, scales = [], {}
        filled = jnp.arange(self.capacity)[None, :, None] < lengths[:, None, None]
        for name in "kv":
            x = jnp.asarray(rng.normal(size=(batch, self.capacity, self.kv_heads, self.dim)))
            if self.cache:
                x, scale = quantized(x, self.cache)
                scales[f"{name}_scale"] = jnp.where(filled, scale, jnp.nan)
            else:
                x = jnp.where(filled[..., None], x, jnp.nan).astype(self.dtype)
            cached.append(x)
        mask = RULES[self.mask]

        def run(q, k, v, lengths, scales):
            return sparse.decode_attention(
                q, k, v, lengths, mask, soft_cap=self.soft_cap, implementation="mosaic_gpu",
                interpret=interpret, return_logsumexp=True, **scales,
            )  # fmt: skip

        arguments = (q, *cached, jnp.asarray(lengths, jnp.int32), scales)
        answers = repeated(jax.jit(run), arguments, interpret)
        wanted = expected(q, *cached, lengths, mask, self.soft_cap, **scales)
        seen = np.isfinite(wanted[1])
        if not np.array_equal(seen, np.isfinite(answers[0][1])):
            return float("nan"), True  # it looks where it may not, or not where it may
        errors = [distance(answers[0][0], wanted[0])]
        errors.append(distance(answers[0][1][seen], wanted[1][seen]))
        return max(errors), stable(answers)


CHECKS = [
    Decode((1000, 1, 64, 65), 1024),
    Decode((5000, 3000), 8192, queries=3, soft_cap=20.0),
    Decode((4000, 77), 4096, mask="window", heads=32, kv_heads=8),
    Decode((900, 2), 1000, dim=64, dtype="float16", queries=5),
    *(Decode((3000, 130, 64), 4096, cache) for cache in TOP),
    Decode((700, 20), 1000, "int8", mask="window", queries=2, soft_cap=20.0),
    Decode((32768,), 32768, "float8_e4m3fn", heads=32, kv_heads=8),
    Decode((1900,) * 80, 2048, heads=4, kv_heads=2),
]
REHEARSED = [Decode((100, 7), 128, "int8", heads=4, kv_heads=1, dim=64)]


def quantized(x: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Codes, and a scale a position and head."""
    scale = jnp.abs(x).max(-1) / TOP[dtype]
    codes = x / scale[..., None]
    return (jnp.round(codes) if dtype == "int8" else codes).astype(dtype), scale


def expected(q, k, v, lengths, mask, soft_cap, k_scale=None, v_scale=None):
    """Outputs and log-sum-exps in float64, of each sequence's own keys only."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    if k_scale is not None:
        scales = (np.asarray(x, np.float64)[..., None] for x in (k_scale, v_scale))
        k, v = (x * scale for x, scale in zip((k, v), scales, strict=True))
    batch, queries, heads, dim = q.shape
    group = heads // k.shape[2]
    out, lse = np.zeros(q.shape), np.full((batch, heads, queries), -np.inf)
    for b, length in enumerate(lengths):
        allowed = mask.block(length - queries, queries, 0, length)
        allowed = allowed & (np.arange(length - queries, length) >= 0)[:, None]
        for h in range(heads):
            s = q[b, :, h] @ k[b, :length, h // group].T * dim**-0.5
            s = s if soft_cap is None else soft_cap * np.tanh(s / soft_cap)
            weights = np.where(allowed, np.exp(s), 0)
            total = weights.sum(1)
            some = total > 0
            sums = weights @ v[b, :length, h // group]
            out[b, :, h] = sums / np.where(some, total, 1)[:, None]
            lse[b, h, some] = np.log(total[some])
    return out, lse


def tables() -> list[tuple[str, int]]:
    """Names and sequences of what is timed."""
    return [("decode", batch) for batch in CACHES]


def table_of(name: str, batch: int, deadline: float, small: bool) -> tuple[list, dict, list]:
    """Times all variants; rows of a table, ratios to cuDNN's bf16, and no entries."""
    del name
    capacity = 256 if small else CACHES[batch]
    rng = np.random.default_rng(batch)

    def random(length, heads):
        shape = (batch, length, heads, DIM)
        return jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)

    q, cache = random(1, HEADS), [random(capacity, KV_HEADS) for _ in "kv"]
    xs = [q * (1 + i / 64) for i in range(2 if small else 4)]
    lengths = jnp.full(batch, capacity, jnp.int32)
    variants = Variants(deadline)

    def decode(implementation):
        def run(q, cache):
            scales = dict(zip(("k_scale", "v_scale"), cache[2:], strict=False))
            return sparse.decode_attention(
                q, *cache[:2], lengths, implementation=implementation, **scales
            )

        return run

    def cudnn(q, cache):
        options = {"implementation": "cudnn", "key_value_seq_lengths": lengths}
        return jax.nn.dot_product_attention(
            q, *cache, query_seq_lengths=jnp.ones_like(lengths), **options
        )

    variants.add("XLA bf16", decode("xla"), xs, [cache])
    variants.add("cuDNN bf16", cudnn, xs, [cache])
    if not small:
        variants.add("bf16", decode("mosaic_gpu"), xs, [cache])
    for dtype in ("int8", "float8_e4m3fn"):
        codes, scales = zip(*(quantized(x.astype(jnp.float32), dtype) for x in cache), strict=True)
        variants.add(f"XLA {dtype}", decode("xla"), xs, [[*codes, *scales]])
        if not small:
            variants.add(dtype, decode("mosaic_gpu"), xs, [[*codes, *scales]])

    medians = variants.measure()
    base = medians.get("cuDNN bf16", (float("nan"), 0.0))[0]
    title, rows, ratios = f"{batch} sequences of {capacity}", [], {}
    for name, (seconds, spread) in medians.items():
        width = 2 * DIM if "bf16" in name else DIM + 4
        rate = 2 * batch * capacity * KV_HEADS * width / seconds
        ratios[name] = base / seconds
        numbers = (seconds * 1e6, spread * 1e6, rate / 1e9, 100 * rate / chips.H100.bandwidth)
        row = (*(f"{x:.1f}" for x in numbers), f"{base / seconds:.2f}")
        rows.append((f"{title}: {name}", *row))
    failed = [(f"{title}: {n}", "", "", "", "", told) for n, told in variants.failures.items()]
    return rows + failed, ratios, []
