"""Kernels on a Hopper GPU: right first, then how fast, against XLA and cuDNN.

    python -m benchmarks.gpu [--save FILE] [--budget SECONDS] [--sweep] [--only WORD] [--rehearse]

Quantized matmuls are here, sparse attention and products in ``gpu_sparse``, decoding in
``gpu_decode``; where tokamax is installed its kernels run too. First every kernel is compared with
float64, at sizes that do not divide the tiles, and run three times: an answer that
changes is a race. Then medians: each sample times many calls at once, over distinct weights that
together exceed the second-level cache several times, and the variants of a table take turns.
``--sweep`` also tries other tiles, for the table in ``gpu_tiles.json``. All of it runs in child
processes: what fails or hangs is told, and the rest goes on. ``--rehearse`` runs a small part on a
CPU, with the kernels interpreted, to try the script.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import queue
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxcomp.kernels import chips
from jaxcomp.kernels.quantized_matmul import gpu, reference, weights
from jaxcomp.kernels.quantized_matmul.reference import Options

from benchmarks import common, gpu_decode, gpu_sparse, gpu_tokamax
from benchmarks.gpu_timing import MARK, Variants, copies, reply

SHAPES = {"up": (14336, 4096), "down": (4096, 14336)}
ROWS = (1, 16, 256, 2048, 64)
GROUP = 128
# ||error|| / ||y||, by what y is rounded to or what x was rounded to.
TOLERANCE = {"bfloat16": 1e-2, "float32": 4e-3}
# (variant, rows, least ratio to XLA's bf16 matmul, name of the shape)
REQUIRED = [
    ("int4, prepared", 1, 2.7, "up"),
    ("int4, prepared", 16, 2.7, "up"),
    ("int4, prepared", 2048, 0.95, "up"),
    ("int4, x int8", 256, 1.6, "up"),
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
    *(Check("fp8", m, 512, 2048, activation_dtype="float8_e4m3fn") for m in (1, 256)),
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


def check_one(check: Check, interpret) -> tuple[float, bool]:
    """The relative error of the kernel's answer, and whether three runs agree."""
    rng = np.random.default_rng(zlib.crc32(str(check).encode()))
    weight, bias = make(rng, check)
    # Rows of different sizes, with a channel of outliers, as activations have them.
    x = rng.normal(size=(check.m, check.k)) * np.exp(rng.normal(size=(check.m, 1)))
    x[:, 3] *= 20.0
    x = jnp.asarray(x / 8, jnp.bfloat16)
    options = Options(check.activation, check.activation_dtype, check.out_dtype)
    told = gpu.reason(x, weight, options, None)
    if told:
        raise NotImplementedError(told)
    if check.prepared:
        weight = gpu.prepare(weight)
    run = jax.jit(functools.partial(gpu.run, options=options, interpret=interpret))
    answers = [np.asarray(run(x, weight, bias), np.float64) for _ in range(1 if interpret else 3)]
    want = expected(x, gpu.restore(weight), bias, options)
    error = np.linalg.norm(answers[0] - want) / np.linalg.norm(want)
    return float(error), all(np.array_equal(answers[0], other) for other in answers)


def check_all(checks: list, start: int, interpret) -> None:
    """Checks kernels from one on, a reply each."""
    for index, check in enumerate(checks[start:], start):
        try:
            if isinstance(check, Check):
                error, stable = check_one(check, interpret)
                exact = check.out_dtype == "float32" and check.activation_dtype is None
                limit = TOLERANCE["float32" if exact else "bfloat16"]
            else:
                error, stable = gpu_sparse.check_one(check, interpret)
                limit = gpu_sparse.TOLERANCE[check.dtype]
            verdict = "ok" if error <= limit else "WRONG"  # also where it is not a number
            verdict = verdict if stable else "CHANGES FROM RUN TO RUN"
            row = (f"{error:.1e}", f"{limit:.0e}", verdict)
        except Exception as failure:
            row = ("", "", f"{type(failure).__name__}: {str(failure)[:160]}")
            traceback.print_exc(file=sys.stderr)
        reply({"index": index, "row": row})


def checks_of(arguments: argparse.Namespace) -> list:
    """What is checked: with ``--only sparse`` or ``--only decode`` only those kernels."""
    parts = {"table": CHECKS, "sparse": gpu_sparse.CHECKS, "decode": gpu_decode.CHECKS}
    if arguments.rehearse:
        parts = {"table": REHEARSED, "sparse": gpu_sparse.REHEARSED, "decode": gpu_decode.REHEARSED}
    wanted = parts.keys() & set(arguments.only.split()) or parts
    return [check for part, checks in parts.items() if part in wanted for check in checks]


def batch(rng: np.random.Generator, m: int, n: int, k: int, weight_bytes: float) -> list:
    """Tokens of the products of one call, distinct so that XLA merges none of them.

    A call must take much longer than its start, which is a fraction of a millisecond.
    """
    seconds = max(weight_bytes / 3e12, 2 * m * n * k / 600e12)
    count = max(copies(weight_bytes), min(64, round(1.5e-3 / seconds)))
    some = [jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16) for _ in range(2)]
    return [some[i % 2] * (1 + i / 64) for i in range(count)]


def table_of(shape: str, m: int, sweep: bool, deadline: float, small: bool) -> tuple[list, dict]:
    """Times all variants of a product; rows of a table, and ratios to bf16 by variant."""
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
    return rows, ratios


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


def child(part: list[str], arguments: argparse.Namespace, silence: float) -> Iterator[dict]:
    """Replies of a part of this script in a new process, until it has been silent for too long."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", *part]
    command += ["--rehearse"] if arguments.rehearse else []
    command += ["--sweep"] if arguments.sweep else []
    command += ["--only", arguments.only] if arguments.only else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=common.ROOT)
    lines: queue.Queue = queue.Queue()

    def listen() -> None:
        for line in process.stdout:
            if line.startswith(MARK):
                lines.put(json.loads(line.removeprefix(MARK)))
        lines.put(None)

    threading.Thread(target=listen, daemon=True).start()
    try:
        while (message := lines.get(timeout=silence)) is not None:
            yield message
    except queue.Empty:
        yield {"hangs": True}
    finally:
        process.kill()
        process.wait()


def run_part(arguments: argparse.Namespace) -> None:
    """What a child process does."""
    part, *options = arguments.part
    if part == "device":
        good = arguments.rehearse or chips.chip_of(jnp.zeros(1)) is chips.H100
        reply({"kind": jax.devices()[0].device_kind, "good": good})
    elif part == "numerics":
        interpret = False
        if arguments.rehearse:
            from jax.experimental.pallas import mosaic_gpu as plgpu

            interpret = plgpu.InterpretGPUParams()
        check_all(checks_of(arguments), int(options[0]), interpret)
    else:
        name, m, deadline = options[0], int(options[1]), time.perf_counter() + float(options[2])
        if part == "sparse":
            rows, ratios = gpu_sparse.table_of(name, m, deadline, arguments.rehearse)
        elif part == "decode":
            rows, ratios = gpu_decode.table_of(m, deadline, arguments.rehearse)
        else:
            rows, ratios = table_of(name, m, arguments.sweep, deadline, arguments.rehearse)
        reply({"rows": rows, "ratios": ratios})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=pathlib.Path, help="a file for what is printed")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in all")
    parser.add_argument("--sweep", action="store_true", help="also try other tiles")
    parser.add_argument("--only", default="", help="a shape, rows or both: 'up 16'; sparse; decode")
    parser.add_argument("--rehearse", action="store_true", help="a small part, on a CPU")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        run_part(arguments)
        return 0
    started = time.perf_counter()
    out = common.Output()

    def left() -> float:
        return arguments.budget - (time.perf_counter() - started)

    def save() -> None:
        if arguments.save is not None:
            arguments.save.parent.mkdir(parents=True, exist_ok=True)
            arguments.save.write_text("\n".join(out.lines) + "\n")

    device = next(child(["device"], arguments, 60.0), {})
    out(f"{device.get('kind')}; {common.machine('jax', 'jaxlib')}")
    out(f"command: python -m benchmarks.gpu {' '.join(sys.argv[1:])}")
    out()
    if not device.get("good"):
        out("no Hopper GPU here: nothing measured")
        return 2

    checks = checks_of(arguments)
    rows: list[tuple] = []
    while len(rows) < len(checks) and left() > 0:
        for message in child(["numerics", str(len(rows))], arguments, min(90.0, max(1.0, left()))):
            row = ("", "", "HANGS") if "hangs" in message else message["row"]
            rows.append((checks[len(rows)], *row))
            if "hangs" in message:
                break
        else:
            if len(rows) < len(checks):
                rows.append((checks[len(rows)], "", "", "ended its process"))
    out(common.table(("product", "error", "at most", ""), rows))
    out()
    save()
    good = len(rows) == len(checks) and all(row[-1] == "ok" for row in rows)

    ratios: dict[tuple, dict] = {}
    columns = {
        "table": ("product", "us", "+-", "GB/s", "TFLOP/s", "times bf16"),
        "sparse": ("computed", "us", "+-", "% of blocks", "TFLOP/s", "times dense"),
        "decode": ("decoded", "us", "+-", "GB/s", "% of bandwidth", "times cuDNN"),
    }
    cases = [("table", shape, m) for shape in SHAPES for m in ROWS]
    cases += [("sparse", *case) for case in gpu_sparse.tables()]
    cases += [("decode", *case) for case in gpu_decode.tables()]
    if arguments.only:
        wanted = set(arguments.only.split())
        cases = [(part, n, m) for part, n, m in cases if wanted <= {part, n, str(m)}]
    if arguments.rehearse:
        cases = list({case[0]: case for case in reversed(cases)}.values())[::-1]
    for part, name, m in cases:
        seconds, title = left(), f"{part} of {name}, {m} rows"
        if seconds < 20:
            out(f"{title}: no time left")
            continue
        silence = min(seconds, 600.0 if arguments.sweep else 150.0)
        command = [part, name, str(m), str(seconds - 15)]
        message = next(child(command, arguments, silence), {"failed": True})
        if "rows" in message:
            ratios[part, name, m] = message["ratios"]
            out(common.table(columns[part], message["rows"]))
        else:
            out(f"{title}: {'hangs' if 'hangs' in message else 'ended its process'}")
        out()
        save()

    required = [("table", shape, m, name, least) for name, m, least, shape in REQUIRED]
    required += [("sparse", *each) for each in gpu_sparse.REQUIRED]
    required += [("decode", *each) for each in gpu_decode.REQUIRED]
    for part, shape, m, name, least in required:
        ratio = ratios.get((part, shape, m), {}).get(name)
        dense = {"table": "bf16", "sparse": "the dense kernel", "decode": "cuDNN"}[part]
        text = f"{name} at {m} rows, {shape}: at least {least} times {dense}"
        if ratio is None:
            out(f"not measured: {text}")
            good = False
        else:
            out(common.requirement(f"{text} ({ratio:.2f})", ratio >= least))
            good &= ratio >= least
    out(f"{time.perf_counter() - started:.0f} seconds in all")
    save()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
