"""The part of ``benchmarks.gpu`` on sparse kernels: attention over blocks, block-sparse weights.

Numbers first, against float64; then medians beside what is dense: cuDNN's flash attention and XLA's
matmul, and beside XLA over the same blocks. Never run on a GPU so far.
"""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxcomp.kernels import sparse_attention as sparse
from jaxcomp.kernels.sparse_attention.schedule import schedule
from jaxcomp.kernels.sparse_matmul import (
    BlockSparse,
    block_sparse,
    block_sparse_matmul,
    nm_matmul,
    nm_sparse,
    nm_stored,
    prepare_nm,
)

from benchmarks import gpu_tokamax
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
LENGTH, HEADS, KV_HEADS, DIM = 16384, 32, 8, 128
SHAPES = {"up": (14336, 4096), "down": (4096, 14336)}
DENSITY = 0.1
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3}
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

    def __str__(self) -> str:
        parts = [f"attention, {self.mask}", f"{self.queries} x {self.keys}", self.dtype]
        parts += [f"{self.heads} on {self.kv_heads} heads of {self.dim}"]
        parts += ["segments"] if self.segments else []
        parts += [f"cap {self.soft_cap}"] if self.soft_cap else []
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

        def run(q, k, v):
            return sparse.attention(
                q, k, v, mask, soft_cap=self.soft_cap, implementation="mosaic_gpu",
                interpret=interpret, return_logsumexp=True, **ids,
            )  # fmt: skip

        answers = repeated(jax.jit(run), (q, k, v), interpret)
        want = expected_attention(q, k, v, mask, self.soft_cap, **ids)
        seen = np.isfinite(want[1])
        if not np.array_equal(seen, np.isfinite(answers[0][1])):
            return float("nan"), True  # it looks where it may not, or not where it may
        errors = [distance(answers[0][0], want[0])]
        errors.append(distance(answers[0][1][seen], want[1][seen]))
        return max(errors), stable(answers)


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
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        text = f"2:4, {self.m} x {self.n} x {self.k}"
        return text + (f", bias, {self.activation}" if self.activation else "")

    def error(self, rng: np.random.Generator, interpret) -> tuple[float, bool]:
        """The relative error, and whether three runs agree."""
        w = jnp.asarray(rng.normal(size=(self.n, self.k)) / 32, jnp.bfloat16)
        order = rng.random((self.n, self.k // 4, 4)).argsort(-1)
        mask = (order < 2).reshape(w.shape)
        weight = nm_sparse(w, mask)
        x = jnp.asarray(rng.normal(size=(self.m, self.k)), jnp.bfloat16)
        bias = jnp.asarray(rng.normal(size=self.n), jnp.float32) if self.activation else None

        def run(x, weight):
            options = {"implementation": "mosaic_gpu", "interpret": interpret}
            return (nm_matmul(x, weight, bias, self.activation, **options),)

        answers = repeated(jax.jit(run), (x, weight), interpret)
        x, w = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, w))
        z = x @ (w * mask).T
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
    *(Blocks(m, 640, 1100) for m in (1, 13, 64, 100, 300)),
    *(Blocks(m, 1024, 4096, (256, 128), "silu") for m in (1, 100, 2048)),
    *(Blocks(m, *SHAPES["up"]) for m in (1, 2048)),
    *(Blocks(m, 1024, 768, (128, 256), gradient=True) for m in (7, 500)),
    *(TwoOfFour(m, 640, 1280, "silu") for m in (1, 13, 64, 300)),
    *(TwoOfFour(m, *SHAPES["down"]) for m in (1, 16)),
]
REHEARSED = [
    Attention("bigbird", 140, 140, dim=64, heads=1, kv_heads=1, soft_cap=20.0),
    Blocks(3, 256, 250),
    TwoOfFour(3, 128, 512),
]


def expected_attention(q, k, v, mask, soft_cap, segment_ids=None, kv_segment_ids=None):
    """Outputs and log-sum-exps in float64."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    (batch, queries, heads, dim), keys = q.shape, k.shape[1]
    group, mask = heads // k.shape[2], mask.bind(queries, keys)
    out, lse = np.zeros(q.shape), np.full((batch, heads, queries), -np.inf)
    for b in range(batch):
        for h in range(heads):
            s = q[b, :, h] @ k[b, :, h // group].T * dim**-0.5
            s = s if soft_cap is None else soft_cap * np.tanh(s / soft_cap)
            allowed = mask.head(h).block(0, queries, 0, keys)
            if segment_ids is not None:
                ids = segment_ids[b][:, None]
                allowed = allowed & (ids == kv_segment_ids[b]) & (ids >= 0)
            weights = np.where(allowed, np.exp(s), 0)
            total = weights.sum(1)
            some = total > 0
            out[b, :, h] = weights @ v[b, :, h // group] / np.where(some, total, 1)[:, None]
            lse[b, h, some] = np.log(total[some])
    return out, lse


def repeated(run, arguments, interpret) -> list:
    """Results of three runs, or of one where they are interpreted, in float64."""

    def once():
        return [np.asarray(x.astype(jnp.float32), np.float64) for x in run(*arguments)]

    return [once() for _ in range(1 if interpret else 3)]


def stable(answers: list) -> bool:
    first, *others = answers
    return all(np.array_equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def distance(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def check_one(check: Attention | Blocks | TwoOfFour, interpret) -> tuple[float, bool]:
    """The relative error of the kernel's answer, and whether three runs agree."""
    return check.error(np.random.default_rng(zlib.crc32(str(check).encode())), interpret)


def tables() -> list[tuple[str, int]]:
    """Names and rows of x of what is timed."""
    return [("attention", LENGTH), *((shape, m) for shape in SHAPES for m in (1, 16, 2048))]


def table_of(name: str, rows: int, deadline: float, small: bool) -> tuple[list, dict]:
    """Times all variants of a computation; rows of a table, and ratios to the dense one."""
    if name == "attention":
        return _attention_table(256 if small else rows, deadline, small)
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


def _block_table(shape: str, m: int, deadline: float, small: bool) -> tuple[list, dict]:
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
    halves = halves if small else [prepare_nm(weight) for weight in halves]
    for name, implementation in (("2:4", "mosaic_gpu"), ("XLA, 2:4", "xla")):
        if not small or implementation == "xla":
            run = functools.partial(nm_matmul, implementation=implementation)
            variants.add(name, run, xs, halves)

    medians = variants.measure()
    base = medians.get("XLA bf16, dense", (float("nan"), 0.0))[0]
    title, found, ratios = f"{shape} {n} x {k}, {m} rows", [], {}
    for name, (seconds, spread) in medians.items():
        share = 1.0 if "dense" in name else count / (n // 128 * (k // 128))
        share = 0.5 if "2:4" in name else share
        ratios[name] = base / seconds
        found.append(_row(f"{title}: {name}", seconds, spread, share, 2 * m * n * k * share, base))
    return found + _failed(variants, title), ratios


def _row(title, seconds, spread, share, work, base) -> tuple:
    numbers = (seconds * 1e6, spread * 1e6, 100 * share, work / seconds / 1e12, base / seconds)
    return (title, *(f"{x:.{digits}f}" for x, digits in zip(numbers, (1, 1, 1, 1, 2), strict=True)))


def _failed(variants: Variants, title: str) -> list[tuple]:
    return [(f"{title}: {n}", "", "", "", "", told) for n, told in variants.failures.items()]
