"""The part of ``benchmarks.gpu`` on quantized matmuls of one weight. Never run on a GPU so far."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxcomp.kernels.quantized_matmul import gpu, reference, weights
from jaxcomp.kernels.quantized_matmul.reference import Options

from benchmarks import gpu_tokamax
from benchmarks.gpu_checks import distance, repeated, stable
from benchmarks.gpu_timing import Variants, copies

COLUMNS = ("product", "us", "+-", "GB/s", "TFLOP/s", "times bf16")
BASE = "bf16"
SHAPES = {"up": (14336, 4096), "down": (4096, 14336)}
ROWS = (1, 16, 256, 2048, 64)
GROUP = 128
# (table, its rows, variant, least ratio to XLA's bf16 matmul)
REQUIRED = [
    ("up", 1, "int4, prepared", 2.7),
    ("up", 16, "int4, prepared", 2.7),
    ("up", 2048, "int4, prepared", 0.95),
    ("up", 256, "int4, x int8", 1.6),
]


@dataclasses.dataclass(frozen=True)
class Check:
    """A product whose numbers are checked."""

    format: str
    m: int
    n: int
    k: int
    group_size: int = GROUP
    zeros: bool = False
    activation_dtype: str | None = None
    activation: str | None = None
    bias: bool = False
    out_dtype: str = "bfloat16"
    prepared: bool = False

    def __str__(self) -> str:
        parts = [f"{self.format} g{self.group_size}", f"{self.m} x {self.n} x {self.k}"]
        parts += ["zeros"] if self.zeros else []
        parts += [self.activation_dtype] if self.activation_dtype else []
        parts += [f"bias, {self.activation}"] if self.bias else []
        parts += ["prepared"] if self.prepared else []
        parts += [self.out_dtype] if self.out_dtype != "bfloat16" else []
        return " ".join(parts)

    @property
    def dtype(self) -> str:
        """What y, or x before it is multiplied, is rounded to."""
        return "bfloat16" if self.activation_dtype is not None else self.out_dtype

    def error(self, rng: np.random.Generator, interpret) -> tuple[float, bool]:
        """The relative error of the kernel's answer, and whether three runs agree."""
        weight, bias = make(rng, self)
        # Rows of different sizes, with a channel of outliers, as activations have them.
        x = rng.normal(size=(self.m, self.k)) * np.exp(rng.normal(size=(self.m, 1)))
        x[:, 3] *= 20.0
        x = jnp.asarray(x / 8, jnp.bfloat16)
        options = Options(self.activation, self.activation_dtype, self.out_dtype)
        told = gpu.reason(x, weight, options, None)
        if told:
            raise NotImplementedError(told)
        ready = gpu.prepare(weight) if self.prepared else weight
        kernel = functools.partial(gpu.run, options=options, interpret=interpret)
        run = jax.jit(lambda *operands: (kernel(*operands),))
        answers = repeated(run, (x, ready, bias), interpret)
        return distance(answers[0][0], expected(x, weight, bias, options)), stable(answers)


CHECKS = [
    *(Check("int4", m, 320, 1088, 64) for m in (1, 3, 8, 13, 33, 100, 300)),
    *(Check("int4", m, 512, 2048, 32, zeros=True) for m in (1, 16, 130)),
    *(Check("int4", m, 512, 2048, 64, zeros=True, activation="gelu", bias=True) for m in (5, 96)),
    *(Check("int4", m, 768, 2048, 2048, activation="silu", bias=True) for m in (8, 64, 257)),
    *(Check("int4", m, 512, 1024, out_dtype="float32") for m in (1, 19, 256)),
    *(Check("int4", m, *SHAPES[name]) for name in SHAPES for m in (1, 16, 256)),
    *(Check("int4", m, *SHAPES[name], prepared=True) for name in SHAPES for m in (1, 16, 256)),
    *(Check("int4", m, 512, 2048, 32, zeros=True, prepared=True) for m in (1, 130)),
    *(Check("int2", m, 512, 2048, 64, zeros=True) for m in (1, 40, 256)),
    *(Check("int2", m, 512, 2048, prepared=True) for m in (1, 40, 256)),
    *(Check("codebook", m, 512, 2048, 64, zeros=True) for m in (1, 40, 256)),
    *(Check("codebook", m, 512, 2048, prepared=True) for m in (1, 40, 256)),
    *(Check("int4", m, 512, 2048, activation_dtype="int8") for m in (1, 40, 256)),
    *(Check("int4", m, 512, 2048, 64, activation_dtype="float8_e4m3fn") for m in (1, 40, 256)),
    *(Check("int8", m, 512, 2048, 64, zeros=True) for m in (1, 40, 256)),
    *(Check("int8", m, 512, 2048, activation_dtype="int8") for m in (1, 256)),
    *(Check("int4", m, 512, 2048, 64, zeros=True, activation_dtype="int8") for m in (1, 40, 256)),
    *(Check("fp8", m, 512, 2048, activation_dtype="float8_e4m3fn") for m in (1, 256)),
    *(Check("fp8", m, 512, 2048) for m in (1, 40, 256)),
]
REHEARSED = [
    Check("int4", 3, 64, 192, 64, zeros=True),
    Check("int4", 9, 64, 128, 64, activation_dtype="int8", activation="gelu", bias=True),
    Check("int2", 9, 64, 128, 64, prepared=True),
]


def make(rng: np.random.Generator, check: Check) -> tuple[weights.Weight, jax.Array | None]:
    """A random weight and bias."""
    bits = weights.FORMATS[check.format].bits
    codes = rng.integers(0, 256, (check.n, check.k * bits // 8), dtype=np.uint8)
    if check.format == "fp8":
        codes = np.where((codes & 0x7F) == 0x7F, 0, codes)  # not a number
    groups = (check.k // check.group_size, check.n)
    scales = jnp.asarray(rng.uniform(0.5, 1.5, groups) / 64, jnp.bfloat16)
    zeros = jnp.asarray(rng.integers(-4, 5, groups), jnp.bfloat16) if check.zeros else None
    bias = jnp.asarray(rng.normal(size=check.n), jnp.float32) if check.bias else None
    arrays = (jnp.asarray(codes), scales, zeros)
    return weights.stored(*arrays, None, check.format, check.group_size), bias


def expected(x: jax.Array, weight: weights.Weight, bias, options: Options) -> np.ndarray:
    """The product in float64."""
    x = np.asarray(x.astype(jnp.float32), np.float64)
    if options.activation_dtype is not None:
        rows, scales = reference.quantize_rows(jnp.asarray(x), options.activation_dtype)
        x = np.asarray(rows.astype(jnp.float32), np.float64) * np.asarray(scales, np.float64)
    y = x @ np.asarray(weights.dequantize(weight), np.float64).T
    y = y if bias is None else y + np.asarray(bias, np.float64)
    if options.activation == "silu":
        return y / (1.0 + np.exp(-y))
    if options.activation == "gelu":
        return 0.5 * y * (1.0 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return y


def batch(rng: np.random.Generator, m: int, n: int, k: int, weight_bytes: float) -> list:
    """Tokens of the products of one call, distinct so that XLA merges none of them.

    A call must take much longer than its start, which is a fraction of a millisecond.
    """
    seconds = max(weight_bytes / 3e12, 2 * m * n * k / 600e12)
    count = max(copies(weight_bytes), min(64, round(1.5e-3 / seconds)))
    some = [jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16) for _ in range(2)]
    return [some[i % 2] * (1 + i / 64) for i in range(count)]


def tables() -> list[tuple[str, int]]:
    """Names and rows of what is timed."""
    return [(shape, m) for shape in SHAPES for m in ROWS]


def table_of(
    shape: str, m: int, deadline: float, small: bool, sweep: bool = False
) -> tuple[list, dict, list]:
    """Times all variants; rows of a table, ratios to bf16, and no entries: ``tune`` makes those."""
    n, k = (256, 256) if small else SHAPES[shape]
    rng = np.random.default_rng(m)
    variants = Variants(deadline)

    count = copies(2 * n * k)
    dense = [jnp.asarray(rng.normal(size=(n, k)) / 64, jnp.bfloat16) for _ in range(2)]
    dense += [dense[i % 2] * (1 + i) for i in range(2, count)]
    contract = (((1,), (1,)), ((), ()))
    variants.add(
        "XLA bf16",
        lambda x, w: jax.lax.dot_general(x, w, contract, preferred_element_type=jnp.bfloat16),
        batch(rng, m, n, k, 2 * n * k),
        dense,
    )

    def several(format):
        weight, _ = make(rng, Check(format, m, n, k))
        flips = [jnp.uint8(17 * i) for i in range(copies(n * k / 2))]
        return [dataclasses.replace(weight, codes=weight.codes ^ flip) for flip in flips]

    packed = several("int4")
    xs = batch(rng, m, n, k, n * k / 2)
    plain = Options(None, None, "bfloat16")

    def kernel(options, tiles=None):
        return lambda x, w: gpu.run(x, w, None, options, tiles=tiles)

    if not small:
        variants.add("int4", kernel(plain), xs, packed)
        ready = [gpu.prepare(weight) for weight in packed]
        variants.add("int4, prepared", kernel(plain), xs, ready)
        if m <= 64:
            variants.add(
                "NF4, prepared",
                kernel(plain),
                xs,
                [gpu.prepare(weight) for weight in several("codebook")],
            )
    variants.add("XLA int4", lambda x, w: reference.matmul(x, w, None, plain), xs, packed)
    if gpu_tokamax.installed() and not small:
        variants.add("tokamax int4", gpu_tokamax.product, xs, packed)
    if m >= 16 and not small:
        for dtype in ("int8", "float8_e4m3fn"):
            options = Options(None, dtype, "bfloat16")
            variants.add(f"int4, x {dtype}", kernel(options), xs, packed)
    if m >= 16:
        codes = [jax.lax.bitcast_convert_type(w.astype(jnp.bfloat16), jnp.int16) for w in dense]
        codes = [c.astype(jnp.int8) for c in codes]

        def w8a8(x, codes):
            rows, scales = reference.quantize_rows(x, "int8")
            y = jax.lax.dot_general(rows, codes, contract, preferred_element_type=jnp.int32)
            return (y * (scales * 0.01)).astype(jnp.bfloat16)

        variants.add("XLA W8A8, a scale a row", w8a8, batch(rng, m, n, k, n * k), codes)
    if sweep and not small:
        chosen = gpu.choose_tiles(xs[0], ready[0])
        for tiles in neighbours(chosen, m):
            name = f"int4, prepared, {dataclasses.astuple(tiles)}"
            variants.add(name, kernel(plain, tiles), xs, ready)

    medians = variants.measure()
    base = medians.get("XLA bf16", (float("nan"), 0.0))[0]
    rows, ratios = [], {}
    for name, (seconds, spread) in medians.items():
        bits = 16 if name == "XLA bf16" else 8 if "W8A8" in name else 4 + 16 / GROUP
        moved = n * k * bits / 8 + 2 * m * (n + k)
        ratios[name] = base / seconds
        rows.append(
            (
                f"{shape} {n} x {k}, {m} rows: {name}",
                f"{seconds * 1e6:.1f}",
                f"{spread * 1e6:.1f}",
                f"{moved / seconds / 1e9:.0f}",
                f"{2 * m * n * k / seconds / 1e12:.1f}",
                f"{base / seconds:.2f}",
            )
        )
    rows += [
        (f"{shape} {n} x {k}, {m} rows: {name}", "", "", "", "", told)
        for name, told in variants.failures.items()
    ]
    return rows, ratios, []


def neighbours(chosen: gpu.Tiles, m: int) -> list:
    """Other tiles worth a try, as far as they fit in shared memory."""
    if m <= 64:
        tokens, depths, stages, splits = (chosen.tokens,), (128, 256), (3, 6), (1, 2, 4)
        warpgroups = ((1, 2), (1, 4), (2, 1), (2, 2), (1, 3))
    else:
        tokens, depths, stages, splits = (64, 128, 256), (64, 128), (3, 4, 6), (1,)
        warpgroups = ((2, 1), (1, 2))
    every = itertools.product(tokens, depths, warpgroups, stages, splits)
    tried = [gpu.Tiles(t, d, r, s, stages, split) for t, d, (r, s), stages, split in every]

    def shared(tiles):
        stage = tiles.depth * (32 * tiles.rows + 2 * tiles.tokens) + 512 * tiles.rows
        slices = 256 * tiles.rows * tiles.tokens * (tiles.slices - 1)
        return tiles.slices * tiles.stages * stage + slices

    return [tiles for tiles in tried if tiles != chosen and shared(tiles) < 205_000]
