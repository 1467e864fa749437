"""The part of ``benchmarks.gpu`` on experts: rows sorted by expert, each with its own int4 weight.

Numbers first, against float64; then medians beside XLA's ragged product of bf16 weights, and beside
what XLA makes of the packed ones. Never run on a GPU so far.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxcomp.kernels.quantized_matmul import (
    grouped_quantized_matmul,
    prepare,
    reference,
    weights,
)

from benchmarks.gpu_checks import distance, repeated, stable
from benchmarks.gpu_timing import Variants, copies

EXPERTS, GROUP = 8, 128  # Mixtral's
SHAPES = {"experts up": (14336, 4096), "experts down": (4096, 14336)}
ROWS = (16, 32, 4096)  # of all experts: eight, 16 and 2048 tokens with two of them each
COLUMNS = ("experts", "us", "+-", "GB/s", "TFLOP/s", "times bf16")
BASE = "XLA's ragged product in bf16"
# (table, its rows, variant, least ratio to XLA's bf16)
REQUIRED = [("experts up", 32, "int4, prepared", 2.0), ("experts up", 4096, "int4, prepared", 0.9)]


@dataclasses.dataclass(frozen=True)
class Experts:
    """A product of experts whose numbers are checked; the last two rows are no expert's."""

    sizes: tuple[int, ...]
    n: int
    k: int
    format: str = "int4"
    group_size: int = GROUP
    zeros: bool = False
    activation_dtype: str | None = None
    full: bool = False
    prepared: bool = False
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        parts = [f"experts {self.sizes}, {self.format} g{self.group_size}, {self.n} x {self.k}"]
        parts += ["zeros"] if self.zeros else []
        parts += [self.activation_dtype] if self.activation_dtype else []
        parts += ["bias, silu"] if self.full else []
        parts += ["prepared"] if self.prepared else []
        return ", ".join(parts)

    def error(self, rng: np.random.Generator, interpret) -> tuple[float, bool]:
        """The relative error, and whether three runs agree."""
        weight = random(rng, self.format, len(self.sizes), self.n, self.k, self.group_size)
        if self.zeros:
            zeros = jnp.asarray(rng.integers(-4, 5, weight.scales.shape), jnp.bfloat16)
            weight = dataclasses.replace(weight, zeros=zeros)
        x = rng.normal(size=(sum(self.sizes) + 2, self.k)) / 8
        x = jnp.asarray(x, jnp.bfloat16)
        bias = rng.normal(size=(len(self.sizes), self.n)) if self.full else None
        ready = prepared(weight) if self.prepared else weight
        own = None if bias is None else jnp.asarray(bias, jnp.float32)

        def run(x, weight, bias):
            y = grouped_quantized_matmul(
                x, jnp.array(self.sizes), weight, bias=bias,
                activation="silu" if self.full else None, activation_dtype=self.activation_dtype,
                implementation="mosaic_gpu", interpret=interpret,
            )  # fmt: skip
            return (y,)

        answers = repeated(jax.jit(run), (x, ready, own), interpret)
        rows = np.asarray(x.astype(jnp.float32), np.float64)
        if self.activation_dtype is not None:
            codes, scales = reference.quantize_rows(x, self.activation_dtype)
            rows = np.asarray(codes.astype(jnp.float32), np.float64) * np.asarray(scales)
        dense = np.asarray(weights.dequantize(weight), np.float64)
        want, start = np.zeros((len(rows), self.n)), 0
        for expert, size in enumerate(self.sizes):
            z = rows[start : start + size] @ dense[expert].T
            z = z if bias is None else z + np.float32(bias[expert])
            want[start : start + size] = z / (1 + np.exp(-z)) if self.full else z
            start += size
        return distance(answers[0][0], want), stable(answers)


CHECKS = [
    Experts((3, 0, 12, 1), 512, 1024),
    Experts((3, 0, 12, 1), 512, 2048, zeros=True, group_size=64, prepared=True),
    Experts((200, 0, 1, 500), 512, 1024, full=True),
    Experts((200, 0, 1, 500), 512, 1024, full=True, prepared=True),
    Experts((0, 0, 0, 7), 768, 1024, "codebook", prepared=True),
    Experts((30, 40, 1), 512, 1024, "int8", 256),
    Experts((5, 90, 0), 512, 1024, activation_dtype="int8"),
    Experts((5, 90, 0), 512, 1024, "fp8", activation_dtype="float8_e4m3fn"),
    Experts((5, 90, 0), 512, 1024, "fp8"),
    Experts((4, 2, 0, 9, 1, 5, 3, 8), *SHAPES["experts up"], prepared=True),
]
REHEARSED = [Experts((3, 0, 6), 128, 256, group_size=64, full=True)]


def random(rng, format: str, experts: int, n: int, k: int, group_size: int) -> weights.Weight:
    """Experts' weights of random codes."""
    width = k * weights.FORMATS[format].bits // 8
    codes = rng.integers(0, 256, (experts, n, width), dtype=np.uint8)
    if format == "fp8":
        codes = np.where((codes & 0x7F) == 0x7F, 0, codes)  # not a number
    scales = jnp.asarray(rng.uniform(0.5, 1.5, (experts, k // group_size, n)) / 64, jnp.bfloat16)
    return weights.stored(jnp.asarray(codes), scales, None, None, format, group_size)


def prepared(weight: weights.Weight) -> weights.Weight:
    """The weight as the kernel reads it fastest."""
    options = {"format": weight.format, "group_size": weight.group_size, "table": weight.table}
    return prepare(weight.codes, weight.scales, weight.zeros, chip="h100", **options)


def tables() -> list[tuple[str, int]]:
    """Names and rows of what is timed."""
    return [(name, rows) for name in SHAPES for rows in ROWS]


def table_of(name: str, m: int, deadline: float, small: bool) -> tuple[list, dict, list]:
    """Times all variants; rows of a table, ratios to bf16, and entries of a tuning table."""
    n, k = (128, 256) if small else SHAPES[name]
    rng = np.random.default_rng(m)
    variants = Variants(deadline)
    sizes = jnp.asarray(np.bincount(rng.integers(0, EXPERTS, m), minlength=EXPERTS), jnp.int32)
    x = jnp.asarray(rng.standard_normal((m, k), np.float32), jnp.bfloat16)
    xs = [x * (1 + i / 64) for i in range(2 if small or m > 256 else 8)]

    weight = random(rng, "int4", EXPERTS, n, k, GROUP)
    flips = [jnp.uint8(17 * i) for i in range(copies(EXPERTS * n * k / 2))]
    packed = [dataclasses.replace(weight, codes=weight.codes ^ flip) for flip in flips]
    dense = jnp.asarray(rng.standard_normal((EXPERTS, k, n), np.float32) / 64, jnp.bfloat16)
    variants.add("XLA bf16", lambda x, w: jax.lax.ragged_dot(x, w, sizes), xs, [dense, dense * 2])

    def materialized(x, w):
        w = jnp.swapaxes(weights.dequantize(w).astype(x.dtype), 1, 2)
        return jax.lax.ragged_dot(x, w, sizes)

    def grouped(implementation):
        return lambda x, w: grouped_quantized_matmul(x, sizes, w, implementation=implementation)

    variants.add("XLA int4, made dense", materialized, xs, packed)
    variants.add("XLA int4", grouped("xla"), xs, packed)
    if not small:
        variants.add("int4", grouped("mosaic_gpu"), xs, packed)
        ready = [prepared(weight) for weight in packed]
        variants.add("int4, prepared", grouped("mosaic_gpu"), xs, ready)

    medians = variants.measure()
    base = medians.get("XLA bf16", (float("nan"), 0.0))[0]
    title, rows, ratios = f"{name} {n} x {k}, {m} rows", [], {}
    busy = int((np.asarray(sizes) > 0).sum())
    for variant, (seconds, spread) in medians.items():
        bits = 16 if variant == "XLA bf16" else 4 + 16 / GROUP
        moved = busy * n * k * bits / 8 + 2 * m * (n + k)
        ratios[variant] = base / seconds
        numbers = (
            seconds * 1e6,
            spread * 1e6,
            moved / seconds / 1e9,
            2 * m * n * k / seconds / 1e12,
        )
        row = (*(f"{number:.1f}" for number in numbers), f"{base / seconds:.2f}")
        rows.append((f"{title}: {variant}", *row))
    failed = [(f"{title}: {v}", "", "", "", "", told) for v, told in variants.failures.items()]
    return rows + failed, ratios, _entries(medians, m, n, k)


def _entries(medians: dict, m: int, n: int, k: int) -> list[dict]:
    """What the tuning table is told: the kernel, and the faster of XLA's two ways."""
    ways = [medians[name][0] for name in ("XLA int4", "XLA int4, made dense") if name in medians]
    if not ways or "int4, prepared" not in medians:
        return []
    entry = {"kind": "experts", "format": "int4", "activation": None, "m": m, "n": n, "k": k}
    seconds = {"kernel": medians["int4, prepared"][0], "xla": min(ways)}
    return [entry | {"group_size": GROUP, "experts": EXPERTS, "seconds": seconds}]
