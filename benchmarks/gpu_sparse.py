"""The part of ``benchmarks.gpu`` on sparse kernels: attention over blocks, block-sparse weights.

Numbers first, against float64; then medians beside what is dense: cuDNN's flash attention and XLA's
matmul, and beside XLA over the same blocks. Never run on a GPU so far.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxcomp.kernels import sparse_attention as sparse
from jaxcomp.kernels.sparse_attention import reference
from jaxcomp.kernels.sparse_attention.schedule import schedule
from jaxcomp.kernels.sparse_matmul import (
    BlockSparse,
    block_sparse,
    block_sparse_matmul,
    nm,
    nm_matmul,
    nm_sparse,
    nm_stored,
    prepare_nm,
)

from benchmarks import gpu_tokamax
from benchmarks.gpu_checks import distance, repeated, stable
from benchmarks.gpu_timing import Variants, copies

MASKS = {
    "full": sparse.full(),
    "causal": sparse.causal(),
    "window": sparse.window(1536, causal=True),
    "strided": sparse.strided(192),
    "bigbird": sparse.window(256) | sparse.global_(64) | sparse.random(2, block_size=64),
    "nothing for some": sparse.causal(-5) & ~sparse.window(300),
    "heads": sparse.per_head([sparse.causal(), sparse.window(100)] * 2),
    "random": sparse.random(13, block_size=128),
}
COLUMNS = ("computed", "us", "+-", "% of blocks", "TFLOP/s", "times dense")
BASE = "the dense kernel"
LENGTH, HEADS, KV_HEADS, DIM = 16384, 32, 8, 128
GROUP = 128  # inputs of int4 values that share a scale
SHAPES = {"up": (14336, 4096), "down": (4096, 14336)}
DENSITY = 0.1
# (table, its rows, variant, least ratio to the dense kernel)
REQUIRED = [("attention", LENGTH, "random blocks", 5.0), ("up", 16, "2:4", 1.4)]


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention whose numbers are checked."""

    mask: str
    queries: int
    keys: int
    dim: int = 128
    dtype: str = "bfloat16"
    heads: int = 4
    kv_heads: int = 2
    segments: bool = False
    soft_cap: float | None = None
    span: bool = False
    gradient: bool = False

    def __str__(self) -> str:
        parts = [f"attention, {self.mask}", f"{self.queries} x {self.keys}", self.dtype]
        parts += [f"{self.heads} on {self.kv_heads} heads of {self.dim}"]
        parts += ["segments"] if self.segments else []
        parts += [f"cap {self.soft_cap}"] if self.soft_cap else []
        parts += ["spans"] if self.span else []
        parts += ["gradients"] if self.gradient else []
        return ", ".join(parts)

    def error(self, rng: np.random.Generator, interpret) -> tuple[float, bool]:
        """The relative error, and whether three runs agree."""
        mask = MASKS[self.mask]
        shapes = [(2, self.queries, self.heads), *[(2, self.keys, self.kv_heads)] * 2]
        q, k, v = (jnp.asarray(rng.normal(size=(*s, self.dim)), self.dtype) for s in shapes)
        ids = {}
        if self.segments:
            for name, length in (("segment_ids", self.queries), ("kv_segment_ids", self.keys)):
                ids[name] = np.sort(rng.integers(-1, 4, (2, length)), 1).astype(np.int32)
        # No whole numbers: where a ramp ends on a distance, its slope is a matter of convention.
        span = np.linspace(5.3, 200.7, self.heads, dtype=np.float32) if self.span else None

        def run(q, k, v, span):
            return sparse.attention(
                q, k, v, mask, soft_cap=self.soft_cap, span=span, implementation="mosaic_gpu",
                interpret=interpret, return_logsumexp=True, **ids,
            )  # fmt: skip

        if self.gradient:
            d_out = jnp.asarray(rng.normal(size=q.shape), self.dtype)
            return self._gradient_error(run, mask, ids, (q, k, v, span), d_out, interpret)
        answers = repeated(jax.jit(run), (q, k, v, span), interpret)
        want = expected_attention(q, k, v, mask, self.soft_cap, span, **ids)
        seen = np.isfinite(want[1])
        if not np.array_equal(seen, np.isfinite(answers[0][1])):
            return float("nan"), True  # it looks where it may not, or not where it may
        errors = [distance(answers[0][0], want[0])]
        errors.append(distance(answers[0][1][seen], want[1][seen]))
        return max(errors), stable(answers)

    def _gradient_error(self, run, mask, ids, operands, d_out, interpret) -> tuple[float, bool]:
        """That of gradients, from autodiff of the reference in float32; the span's in float64."""
        span = operands[3]
        options = {"scale": operands[0].shape[-1] ** -0.5, "soft_cap": self.soft_cap, **ids}

        def plain(q, k, v, span):
            return reference.attention(q, k, v, mask, span=span, **options)

        def gradients(run, *operands):
            def loss(q, k, v, span):
                return (run(q, k, v, span)[0].astype(jnp.float32) * d_out).sum()

            return jax.grad(loss, (0, 1, 2, 3) if self.span else (0, 1, 2))(*operands)

        answers = repeated(jax.jit(functools.partial(gradients, run)), operands, interpret)
        exact = [None if x is None else jnp.asarray(x, jnp.float32) for x in operands]
        want = jax.jit(functools.partial(gradients, plain))(*exact)
        want = [np.asarray(x, np.float64) for x in want]
        errors = [distance(*two) for two in zip(answers[0][:3], want[:3], strict=True)]
        if self.span:
            found = expected_span_gradient(*operands[:3], d_out, mask, self.soft_cap, span, **ids)
            errors.append(np.linalg.norm(answers[0][3] - found[0]) / np.linalg.norm(found[1]))
        return float(max(errors)), stable(answers)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A block-sparse product whose numbers, and gradients, are checked."""

    m: int
    n: int
    k: int
    block: tuple[int, int] = (128, 128)
    activation: str | None = None
    gradient: bool = False
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        text = f"blocks {self.block[0]} x {self.block[1]}, {self.m} x {self.n} x {self.k}"
        text += f", bias, {self.activation}" if self.activation else ""
        return text + (", gradients" if self.gradient else "")

    def error(self, rng: np.random.Generator, interpret) -> tuple[float, bool]:
        """The relative error, and whether three runs agree."""
        w = jnp.asarray(rng.normal(size=(self.n, self.k)) / 32, jnp.bfloat16)
        grid = [-(-size // b) for size, b in zip(w.shape, self.block, strict=True)]
        mask = rng.random(grid) < 0.4
        mask[0] = False
        mask[-1, -1] = True
        weight = block_sparse(w, mask, self.block)
        kept = np.kron(mask, np.ones(self.block))[: self.n, : self.k]
        dense = np.asarray(w.astype(jnp.float32), np.float64) * kept
        x = jnp.asarray(rng.normal(size=(self.m, self.k)), jnp.bfloat16)
        dy = jnp.asarray(rng.normal(size=(self.m, self.n)), jnp.bfloat16)
        bias = jnp.asarray(rng.normal(size=self.n), jnp.float32) if self.activation else None

        def product(x, weight):
            return block_sparse_matmul(
                x, weight, bias, self.activation, implementation="mosaic_gpu", interpret=interpret
            )

        def gradients(x, weight):
            y, pullback = jax.vjp(product, x, weight)
            dx, dw = pullback(dy)
            return y, dx, dw.values

        run = jax.jit(gradients if self.gradient else lambda *a: (product(*a),))
        answers = repeated(run, (x, weight), interpret)
        x, dy = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, dy))
        z = x @ dense.T if bias is None else x @ dense.T + np.asarray(bias, np.float64)
        want = [z / (1.0 + np.exp(-z)) if self.activation else z]
        if self.gradient:
            pads = [(0, g * b - size) for g, b, size in zip(grid, self.block, w.shape, strict=True)]
            tiles = np.pad(dy.T @ x, pads).reshape(grid[0], self.block[0], grid[1], self.block[1])
            want += [dy @ dense, tiles[np.asarray(weight.rows), :, np.asarray(weight.columns)]]
        return max(map(distance, answers[0], want)), stable(answers)


@dataclasses.dataclass(frozen=True)
class TwoOfFour:
    """A product with a 2:4 weight whose numbers are checked."""

    m: int
    n: int
    k: int
    activation: str | None = None
    group_size: int | None = None
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        text = f"2:4, {self.m} x {self.n} x {self.k}"
        text += f", int4 g{self.group_size}" if self.group_size else ""
        return text + (f", bias, {self.activation}" if self.activation else "")

    def error(self, rng: np.random.Generator, interpret) -> tuple[float, bool]:
        """The relative error, and whether three runs agree."""
        w = jnp.asarray(rng.normal(size=(self.n, self.k)) / 32, jnp.bfloat16)
        order = rng.random((self.n, self.k // 4, 4)).argsort(-1)
        mask = (order < 2).reshape(w.shape)
        weight = nm_sparse(w, mask)
        if self.group_size:
            codes = rng.integers(0, 256, (self.n, self.k // 4), dtype=np.uint8)
            scales = rng.uniform(0.5, 1.5, (self.k // self.group_size, self.n)) / 64
            scales = jnp.asarray(scales, jnp.float32)
            weight = nm_stored(
                jnp.asarray(codes), weight.positions, scales, group_size=self.group_size
            )
        dense = np.asarray(nm.dense(weight), np.float64)
        x = jnp.asarray(rng.normal(size=(self.m, self.k)), jnp.bfloat16)
        bias = jnp.asarray(rng.normal(size=self.n), jnp.float32) if self.activation else None

        def run(x, weight):
            options = {"implementation": "mosaic_gpu", "interpret": interpret}
            return (nm_matmul(x, weight, bias, self.activation, **options),)

        answers = repeated(jax.jit(run), (x, weight), interpret)
        z = np.asarray(x.astype(jnp.float32), np.float64) @ dense.T
        z = z if bias is None else z + np.asarray(bias, np.float64)
        want = z / (1.0 + np.exp(-z)) if self.activation else z
        return distance(answers[0][0], want), stable(answers)


CHECKS = [
    Attention("full", 512, 1024),
    Attention("full", 700, 300, dtype="float16", dim=64),
    Attention("causal", 2048, 2048),
    Attention("causal", 999, 999, heads=3, kv_heads=1),
    Attention("window", 4096, 4096, heads=2, kv_heads=1),
    Attention("strided", 1500, 1500, dtype="float16"),
    Attention("bigbird", 2000, 2000, segments=True, soft_cap=20.0),
    Attention("nothing for some", 600, 600, dim=64, segments=True),
    Attention("heads", 700, 700),
    Attention("random", 2048, 2048, heads=2, kv_heads=2),
    Attention("causal", 5, 5),
    Attention("strided", 1500, 1500, span=True),
    Attention("causal", 999, 999, heads=3, kv_heads=1, soft_cap=20.0, segments=True, span=True),
    Attention("bigbird", 1000, 1000, gradient=True),
    Attention("causal", 700, 700, soft_cap=20.0, span=True, gradient=True),
    *(Blocks(m, 640, 1100) for m in (1, 13, 64, 100, 300)),
    *(Blocks(m, 1024, 4096, (256, 128), "silu") for m in (1, 100, 2048)),
    *(Blocks(m, *SHAPES["up"]) for m in (1, 2048)),
    *(Blocks(m, 1024, 768, (128, 256), gradient=True) for m in (7, 500)),
    *(TwoOfFour(m, 640, 1280, "silu") for m in (1, 13, 64, 300)),
    *(TwoOfFour(m, *SHAPES["down"]) for m in (1, 16)),
    *(TwoOfFour(m, 640, 1280, "silu", 64) for m in (1, 13, 300)),
    *(TwoOfFour(m, *SHAPES["down"], group_size=GROUP) for m in (1, 16)),
]
REHEARSED = [
    Attention("bigbird", 140, 140, dim=64, heads=1, kv_heads=1, soft_cap=20.0),
    Blocks(3, 256, 250),
    Attention("causal", 60, 60, dim=64, heads=1, kv_heads=1, span=True, gradient=True),
    TwoOfFour(3, 128, 512),
    TwoOfFour(3, 128, 512, group_size=64),
]


def weights_of(
    q, k, v, mask, soft_cap, span=None, segment_ids=None, kv_segment_ids=None, ramp=32.0
):
    """In float64, of each sequence and head: weights but for the span, those of it, and values."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    (batch, queries, heads, dim), keys = q.shape, k.shape[1]
    group, mask = heads // k.shape[2], mask.bind(queries, keys)
    apart = np.abs(np.arange(queries)[:, None] - np.arange(keys))
    for b, h in np.ndindex(batch, heads):
        s = q[b, :, h] @ k[b, :, h // group].T * dim**-0.5
        s = s if soft_cap is None else soft_cap * np.tanh(s / soft_cap)
        allowed = mask.head(h).block(0, queries, 0, keys)
        if segment_ids is not None:
            ids = segment_ids[b][:, None]
            allowed = allowed & (ids == kv_segment_ids[b]) & (ids >= 0)
        z = np.inf if span is None else np.float64(span[h])
        near = np.clip((ramp + z - apart) / ramp, 0, 1)
        yield b, h, np.where(allowed, np.exp(s), 0), near, v[b, :, h // group]


def expected_attention(q, k, v, *options, **ids):
    """Outputs and log-sum-exps in float64; options are those of ``weights_of``."""
    batch, queries, heads, _ = q.shape
    out, lse = np.zeros(q.shape), np.full((batch, heads, queries), -np.inf)
    for b, h, weights, near, values in weights_of(q, k, v, *options, **ids):
        weights = weights * near
        total = weights.sum(1)
        some = total > 0
        out[b, :, h] = weights @ values / np.where(some, total, 1)[:, None]
        lse[b, h, some] = np.log(total[some])
    return out, lse


def expected_span_gradient(q, k, v, d_out, *options, ramp=32.0, **ids):
    """In float64, and the sums of its terms' sizes, which may cancel."""
    d_out = np.asarray(d_out.astype(jnp.float32), np.float64)
    found = np.zeros((2, q.shape[2]))
    for b, h, weights, near, values in weights_of(q, k, v, *options, ramp=ramp, **ids):
        total = (weights * near).sum(1, keepdims=True)
        shares = weights / np.where(total > 0, total, np.inf)
        d_shares = d_out[b, :, h] @ values.T
        delta = (shares * near * d_shares).sum(1, keepdims=True)
        terms = np.where((near > 0) & (near < 1), shares * (d_shares - delta), 0) / ramp
        found[:, h] += terms.sum(), np.abs(terms).sum()
    return found


def tables() -> list[tuple[str, int]]:
    """Names and rows of x of what is timed."""
    return [("attention", LENGTH), *((shape, m) for shape in SHAPES for m in (1, 16, 2048))]


def table_of(name: str, rows: int, deadline: float, small: bool) -> tuple[list, dict, list]:
    """Times all variants; rows of a table, ratios to the dense one, entries of a tuning table."""
    if name == "attention":
        return *_attention_table(256 if small else rows, deadline, small), []
    return _block_table(name, rows, deadline, small)


def _attention_table(length: int, deadline: float, small: bool) -> tuple[list, dict]:
    heads, kv_heads = (2, 1) if small else (HEADS, KV_HEADS)
    rng = np.random.default_rng(0)

    def random(heads):
        return jnp.asarray(rng.standard_normal((1, length, heads, DIM), np.float32), jnp.bfloat16)

    q, keys = random(heads), (random(kv_heads), random(kv_heads))
    xs, operands = [q, q * 1.01], [keys]
    variants, shares = Variants(deadline), {}

    def dense(implementation, causal=False):
        return lambda q, kv: jax.nn.dot_product_attention(
            q, *kv, implementation=implementation, is_causal=causal
        )

    def ours(mask, implementation):
        return lambda q, kv: sparse.attention(q, *kv, mask, implementation=implementation)

    variants.add("cuDNN, all keys", dense("cudnn"), xs, operands)
    variants.add("cuDNN, causal", dense("cudnn", True), xs, operands)
    variants.add("XLA, all keys", dense("xla"), xs, operands)
    if gpu_tokamax.installed() and not small:
        variants.add("tokamax, all keys", gpu_tokamax.attention(), xs, operands)
        variants.add("tokamax, causal", gpu_tokamax.attention(causal=True), xs, operands)
    masks = {"all keys": "full", "causal": "causal", "window": "window", "random blocks": "random"}
    for name, mask in masks.items():
        shares[name] = schedule(MASKS[mask], heads, length, length, 128, 128).density
        if not small:
            variants.add(name, ours(MASKS[mask], "mosaic_gpu"), xs, operands)
    spans, shares["causal with spans"] = jnp.linspace(500.0, 4000.0, heads), shares["causal"]

    def spanned(q, kv):
        return sparse.attention(q, *kv, MASKS["causal"], span=spans, implementation="mosaic_gpu")

    if not small:
        variants.add("causal with spans", spanned, xs, operands)
    variants.add("XLA, random blocks", ours(MASKS["random"], "xla"), xs, operands)

    medians = variants.measure()
    base = medians.get("cuDNN, all keys", (float("nan"), 0.0))[0]
    found, ratios = [], {}
    for name, (seconds, spread) in medians.items():
        share = shares[name.rpartition(", ")[2]]
        work = 4 * length**2 * DIM * heads * share
        ratios[name] = base / seconds
        found.append(_row(f"attention of {length}: {name}", seconds, spread, share, work, base))
    return found + _failed(variants, f"attention of {length}"), ratios


def _block_table(shape: str, m: int, deadline: float, small: bool) -> tuple[list, dict, list]:
    n, k = (256, 512) if small else SHAPES[shape]
    rng = np.random.default_rng(m)
    variants = Variants(deadline)
    count = round(n // 128 * (k // 128) * DENSITY)
    kept = copies(2 * n * k * DENSITY)
    # A call must take much longer than its start: many products of few rows.
    xs = [jnp.asarray(rng.standard_normal((m, k), np.float32), jnp.bfloat16)]
    xs = [xs[0] * (1 + i / 64) for i in range(2 if small else max(kept, 4 if m > 256 else 64))]
    whole = jnp.asarray(rng.standard_normal((n, k), np.float32) / 64, jnp.bfloat16)
    dense = [whole * (1 + i) for i in range(copies(2 * n * k))]
    weights = []
    for _ in range(kept):
        where = np.sort(rng.choice(n // 128 * (k // 128), max(count, 1), replace=False))
        lists = (jnp.asarray(a, jnp.int32) for a in np.divmod(where, k // 128))
        values = jnp.asarray(rng.standard_normal((len(where), 128, 128), np.float32), jnp.bfloat16)
        weights.append(BlockSparse(values, *lists, None, (n, k)))
    contract = (((1,), (1,)), ((), ()))
    variants.add(
        "XLA bf16, dense",
        lambda x, w: jax.lax.dot_general(x, w, contract, preferred_element_type=jnp.bfloat16),
        xs,
        dense,
    )
    for name, implementation in (("blocks", "mosaic_gpu"), ("XLA, blocks", "xla")):
        if not small or implementation == "xla":
            run = functools.partial(block_sparse_matmul, implementation=implementation)
            variants.add(name, run, xs, weights)

    # The first of each four inputs or the second, and the third or the fourth.
    codes = jnp.asarray(rng.integers(0, 256, (n, k // 8), dtype=np.uint8) & 0x55 | 0x88)
    half = whole[:, ::2]
    halves = [nm_stored(half * (1 + i / 64), codes) for i in range(copies(1.125 * n * k))]
    packed = jnp.asarray(rng.integers(0, 256, (n, k // 4), dtype=np.uint8))
    scales = jnp.asarray(rng.uniform(0.5, 1.5, (k // GROUP, n)) / 64, jnp.float32)
    quarters = [
        nm_stored(packed ^ jnp.uint8(17 * i), codes, scales, group_size=GROUP)
        for i in range(copies(0.375 * n * k))
    ]
    for name, stored in (("2:4", halves), ("2:4 int4", quarters)):
        ready = stored if small else [prepare_nm(weight, chip="h100") for weight in stored]
        for title, implementation in ((name, "mosaic_gpu"), (f"XLA, {name}", "xla")):
            if not small or implementation == "xla":
                run = functools.partial(nm_matmul, implementation=implementation)
                variants.add(title, run, xs, ready)

    medians = variants.measure()
    base = medians.get("XLA bf16, dense", (float("nan"), 0.0))[0]
    title, found, ratios = f"{shape} {n} x {k}, {m} rows", [], {}
    for name, (seconds, spread) in medians.items():
        share = 1.0 if "dense" in name else count / (n // 128 * (k // 128))
        share = 0.5 if "2:4" in name else share
        ratios[name] = base / seconds
        found.append(_row(f"{title}: {name}", seconds, spread, share, 2 * m * n * k * share, base))
    return found + _failed(variants, title), ratios, _entries(medians, m, n, k)


def _entries(medians: dict, m: int, n: int, k: int) -> list[dict]:
    """What the tuning table is told: kernels, and what XLA takes for the same stored weight."""
    found = []
    others = {"blocks": ("XLA, blocks", "XLA bf16, dense"), "2:4": ("XLA, 2:4",)}
    others["2:4 int4"] = ("XLA, 2:4 int4",)
    for format, names in others.items():
        ways = [medians[name][0] for name in names if name in medians]
        if format not in medians or not ways:
            continue
        entry = {"kind": "sparse", "format": format, "activation": None, "m": m, "n": n, "k": k}
        entry["group_size"] = GROUP if format == "2:4 int4" else k
        if format == "blocks":
            entry["density"] = DENSITY
        found.append(entry | {"seconds": {"kernel": medians[format][0], "xla": min(ways)}})
    return found


def _row(title, seconds, spread, share, work, base) -> tuple:
    numbers = (seconds * 1e6, spread * 1e6, 100 * share, work / seconds / 1e12, base / seconds)
    return (title, *(f"{x:.{digits}f}" for x, digits in zip(numbers, (1, 1, 1, 1, 2), strict=True)))


def _failed(variants: Variants, title: str) -> list[tuple]:
    return [(f"{title}: {n}", "", "", "", "", told) for n, told in variants.failures.items()]
