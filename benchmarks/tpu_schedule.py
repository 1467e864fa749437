"""Scheduled cycles of the TPU kernels, from the compiler's own dumps: no TPU is needed.

    python -m benchmarks.tpu_schedule [--chip v5e] [--operation quantized_matmul] [--only few]
        [--save benchmarks/results/tpu_schedule.txt]

The TPU compiler writes the final VLIW schedule of a kernel: one bundle is one cycle of the core,
and a second file says which units each bundle uses. So the bundles of a kernel's loops, times how
often they run, are its scheduled cycles; beside them stand the cycles that the bytes of the weight
take at the chip's bandwidth. It is a static model: waits for memory are not in it, nor what XLA
does to x before the kernel, nor loops that quantize rows once, and branches that a step may skip
(the first and last step's) are counted at every step. Clocks and bandwidths are those of
``jaxcomp.kernels.chips``.

With ``--save`` the rows take the place of the file's rows of the same chips and cases, so that the
table can be made in parts; the requirements are then checked on all rows of the file.
"""

import argparse
import dataclasses
import datetime
import functools
import pathlib
import sys
import tempfile

import jax.numpy as jnp
from jaxcomp.kernels import chips, tune_compiled
from jaxcomp.kernels.schedules import Schedule, schedules

from benchmarks import tpu_attention, tpu_marks, tpu_sparse
from benchmarks.tpu_cases import Case
from tests.kernels import aot

_MODULE = "tests.kernels.quantized_matmul.aot_cases"


def measure(chip: chips.Chip, cases: list[Case]) -> list[tuple[Case, Schedule | None, str | None]]:
    """Compiles cases for a chip in one process, and reads what the compiler wrote.

    Args:
      chip: a TPU.
      cases: whose kernels' names begin differently only where they differ.

    Returns:
      Case, its schedule or None, and the compiler's error or None.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        requests = [(case.target, {**case.options, "chip": chip.name}) for case in cases]
        results = aot.compile_cases(chip.name, requests, folder, timeout=3600)
        queues = {case.kernel: schedules(folder, case.kernel) for case in cases}
    out = []
    for case, result in zip(cases, results, strict=False):
        schedule = None if result["error"] else queues[case.kernel].pop(0)
        out.append((case, schedule, result["error"]))
    return out


def quantized_matmul() -> list[Case]:
    """Llama-3-8B's W4A16 g128 products, and the dense ones that the large ones are held against."""
    from jaxcomp.kernels.quantized_matmul import tpu_tiles

    cases = []
    for n, k in ((4096, 4096), (14336, 4096), (4096, 14336)):
        size = n * k / 2 + n * (k // 128) * 2
        for m in (1, 16, *((128,) if n == k else ()), 256, 2048):

            def few(schedule, chip, m=m, n=n, k=k):
                tile = tpu_tiles.few(chip.name, m, n, k, 128, 128, 1)
                return tune_compiled.few_cycles(schedule, tile, n, k)

            def dense(schedule, chip, decodes, m=m, n=n, k=k):
                tile = tpu_tiles.dense(chip.name, m, n, k, chip.mxu)
                times = [1, -(-m // tile.m) - 1]
                times = times if decodes else [sum(times)]
                return tune_compiled.dense_cycles(schedule, tile, n, times)

            shape = {"m": m, "n": n, "k": k}
            name = f"W4A16 g128 M={m} {n}x{k}"
            kernel, target = "quantized_matmul_int4", f"{_MODULE}:quantized"
            if m <= 16:
                cases.append(Case(f"few {name}", kernel, target, shape, few, size))
            else:
                kernel = "quantized_matmul_dense_int4"
                cases += _against_bf16(f"many {name}", kernel, target, shape, dense)
    return cases


# Weights that are not W4A16 in groups of 128 with bf16 scales.
OTHERS = {
    "int8 g128": {"format": "int8"},
    "int2 g128": {"format": "int2"},
    "fp8 g128": {"format": "fp8"},
    "NF4 g128": {"format": "codebook"},
    "int4 g32": {"group_size": 32},
    "int4 g128 with zero points": {"zeros": True},
    "int4 by channel": {"group_size": 4096, "scale_dtype": "float32"},
    "W4A8 g128": {"activation_dtype": "native"},
    "W4A8 by channel": {
        "activation_dtype": "native", "group_size": 4096, "scale_dtype": "float32"
    },
    "W8A8 by channel": {
        "format": "native", "activation_dtype": "native", "group_size": 4096,
        "scale_dtype": "float32",
    },
}  # fmt: skip


# Rows with 14336 inputs: more than a tile's, or more than it leaves registers for.
DEEP = {
    "fp8 g128": (16,),
    "int4 g32": (16, 256),
    "int4 g128 with zero points": (1, 16),
    "W4A8 by channel": (256,),
    "W8A8 by channel": (256,),
}


def other_formats() -> list[Case]:
    """Other weights: of up to 64 rows against their bytes, of more against bf16.

    W4A8 also of 32 and 64 rows, and zero points of 64, the most whose sums are scaled on v6e and
    7x; W8A8, whose format is the chip's own, only of many.
    """
    cases = []
    for name in OTHERS:
        few = {"W8": (), "W4": (16, 32, 64)}.get(name[:2], (16,))
        few = (16, 64) if name == "int4 g128 with zero points" else few
        channel = (128,) if name in ("W4A8 by channel", "W8A8 by channel") else ()
        cases += [_format(name, m, 4096, 4096) for m in (*few, *channel, 256, 2048)]
        cases += [_format(name, m, 4096, 14336) for m in DEEP.get(name, ())]
    return cases


def _format(name: str, m: int, n: int, k: int) -> Case:
    """A product with weights of ``OTHERS``."""
    from jaxcomp.kernels.quantized_matmul import reference, tpu, tpu_tiles
    from jaxcomp.kernels.quantized_matmul.weights import FORMATS, Weight

    options = {**OTHERS[name], "m": m, "n": n, "k": k}
    if "by channel" in name:
        options["group_size"] = k
    format, group = options.get("format", "int4"), options.get("group_size", 128)
    quantized = "activation_dtype" in options

    def sums(schedule, chip):
        """By the loop that multiplies: rows are quantized once, before."""
        dtype = "int8" if chip.multiplies("int8") else "float8_e4m3fn"
        weight = Weight(None, None, None, None, format, group, (n, k))
        how = reference.Options(None, dtype if quantized else None, "bfloat16")
        tile = tpu.tile_of(chip, m, weight, tpu.arithmetic(chip, "bfloat16", weight, how))
        loops = [max(schedule.loops, key=lambda loop: loop.bundles)]
        whole = dataclasses.replace(schedule, loops=loops)
        return tune_compiled.few_cycles(whole, tile, n, k) * -(-m // tile.m)

    def dense(schedule, chip):
        tile = tpu_tiles.dense(chip.name, m, n, k, chip.mxu)
        times = [1, -(-m // tile.m) - 1]
        if "rows_codes" in schedule.name:  # Each step decodes what it multiplies.
            times = [sum(times)]
        return tune_compiled.dense_cycles(schedule, tile, n, times)

    label, target = f"{name} M={m} {n}x{k}", f"{_MODULE}:quantized"
    if m > 64:
        kernel = f"quantized_matmul_{'rows_' if quantized else f'dense_{format}'}"
        against = f"many W4A16 g128 M={m} {n}x{k} in bf16"
        return Case(f"format {label}", kernel, target, options, dense, against=against)
    arrays, width = 1 + options.get("zeros", False), 4 if "scale_dtype" in options else 2
    size = n * k * FORMATS[format].bits / 8 + arrays * n * (k // group) * width
    return Case(f"format {label}", f"quantized_matmul_{format}", target, options, sums, size)


def f32_rows() -> list[Case]:
    """W4A16's weights with rows in f32, whose sums are scaled however many there are."""
    from jaxcomp.kernels.quantized_matmul import reference, tpu
    from jaxcomp.kernels.quantized_matmul.weights import Weight

    cases, n, k, group = [], 4096, 4096, 128
    size = n * k / 2 + n * (k // group) * 2
    for m in (16, 256, 2048):

        def sums(schedule, chip, m=m):
            weight = Weight(None, None, None, None, "int4", group, (n, k))
            options = reference.Options(None, None, "float32")
            how = tpu.arithmetic(chip, jnp.float32, weight, options)
            tile = tpu.tile_of(chip, m, weight, how)
            return tune_compiled.few_cycles(schedule, tile, n, k) * -(-m // tile.m)

        shape = {"m": m, "n": n, "k": k, "x_dtype": "float32"}
        cases.append(
            Case(
                f"f32 rows int4 g128 M={m} 4096x4096", "quantized_matmul_int4",
                f"{_MODULE}:quantized", shape, sums, size if m == 16 else 0.0,
                against="" if m == 16 else f"many W4A16 g128 M={m} 4096x4096 in bf16",
            )
        )  # fmt: skip
    return cases


def _against_bf16(name, kernel, target, options, cycles) -> list[Case]:
    """A product of many rows after the bf16 one in its tiling."""
    dense = f"{name} in bf16"
    alike = functools.partial(cycles, decodes=False)
    return [
        Case(dense, "bf16_matmul", f"{_MODULE}:bf16", options, alike),
        Case(
            name,
            kernel,
            target,
            options,
            functools.partial(cycles, decodes=True),
            against=dense,
        ),
    ]


def grouped_matmul() -> list[Case]:
    """Mixtral's W4A16 g128 experts, for 16 and for 2048 tokens of two experts each.

    Where an expert's rows begin within a tile is data: the most visits that there can be are
    counted, and of the 2048 tokens also by the bf16 kernel, which they are held against.
    """
    from jaxcomp.kernels.quantized_matmul import tpu_tiles

    cases, experts = [], 8
    for n, k in ((14336, 4096), (4096, 14336)):

        def few(schedule, chip, n=n, k=k):
            tile = tpu_tiles.grouped_few(chip.name, 32, experts, n, k, 128, 128, 1)
            visits = -(-32 // tile.m) + experts - 1
            return tune_compiled.few_cycles(schedule, tile, n, k) * visits

        def dense(schedule, chip, decodes, n=n, k=k):
            tile = tpu_tiles.grouped_dense(chip.name, 4096, experts, n, k, chip.mxu)
            times = [experts, -(-4096 // tile.m) - 1]
            times = times if decodes else [sum(times)]
            return tune_compiled.dense_cycles(schedule, tile, n, times)

        target = f"{_MODULE}:grouped"
        size = experts * (n * k / 2 + n * (k // 128) * 2)
        shapes = [{"m": m, "n": n, "k": k, "experts": experts} for m in (32, 4096)]
        names = [f"experts W4A16 g128 M={s['m']} E={experts} {n}x{k}" for s in shapes]
        cases.append(Case(names[0], "grouped_matmul_int4", target, shapes[0], few, size))
        kernel = "grouped_matmul_dense_int4"
        cases += _against_bf16(names[1], kernel, target, shapes[1], dense)
        if n > k:
            name = names[1].replace("W4A16 g128", "int4 g128 with zero points")
            zeros = functools.partial(dense, decodes=True)
            against = cases[-1].against
            cases.append(
                Case(name, kernel, target, shapes[1] | {"zeros": True}, zeros, against=against)
            )
    return cases


CASES = {
    "quantized_matmul": quantized_matmul,
    "other_formats": other_formats,
    "f32_rows": f32_rows,
    "grouped_matmul": grouped_matmul,
    "sparse_matmul": tpu_sparse.cases,
    "sparse_attention": tpu_attention.cases,
}


def rows(
    chip: chips.Chip, cases: list[Case], known: list[tpu_marks.Row]
) -> tuple[list[tpu_marks.Row], list[str]]:
    """Compiles cases for a chip and counts them.

    Args:
      chip: a TPU.
      cases: to compile.
      known: rows that they may be held against, if those are not compiled.

    Returns:
      A row for each, and the compiler's errors.
    """
    found, errors, date = {}, [], datetime.date.today().isoformat()
    bases = {row.case: row.cycles for row in known if row.chip == chip.name}
    for case, schedule, error in measure(chip, cases):
        if schedule is None:
            errors.append(f"{chip.name}: {case.name}: {error}")
            continue
        basis = case.bytes / chip.bandwidth * chip.clock or None
        if case.against:
            basis = bases.get(case.against, float("nan"))
        inner = case.inner(schedule)
        busiest = max(inner, key=lambda part: part.bundles)
        found[case.name] = tpu_marks.Row(
            chip.name,
            case.name,
            case.cycles(schedule, chip),
            basis,
            busiest.used.get("MXU", 0) / busiest.bundles / schedule.slots["MXU"],
            sum(part.spills for part in inner),
            date,
        )
        bases[case.name] = found[case.name].cycles
    return list(found.values()), errors


def main() -> int:
    """Prints the table, and whether what is required holds; the exit code is 1 if it does not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--chip", choices=tpu_marks.CHIPS, action="append")
    parser.add_argument("--operation", choices=list(CASES), action="append")
    parser.add_argument("--only", default="", help="cases whose name holds one of these, by commas")
    parser.add_argument("--save", type=pathlib.Path, help="a file whose rows these replace")
    parser.add_argument("--ours", action="store_true", help="others' kernels are the file's rows")
    options = parser.parse_args()
    every = [(name, case) for name, make in CASES.items() for case in make()]
    wanted, words = options.operation or CASES, options.only.split(",")
    cases = [c for name, c in every if name in wanted and any(word in c.name for word in words)]
    known = []
    if options.ours and options.save is not None and options.save.exists():
        known, _ = tpu_marks.read(options.save.read_text())
    # What a case is held against is compiled with it.
    bases = {case.against for case in cases}
    cases = [c for _, c in every if c in cases or c.name in bases]
    table, failed = [], []
    print(tpu_marks.head(), flush=True)
    for name in options.chip or tpu_marks.CHIPS:
        there = {
            row.case
            for row in known
            if row.chip == name and not row.ours and row.cycles == row.cycles  # not NaN
        }
        found, errors = rows(chips.BY_NAME[name], [c for c in cases if c.name not in there], known)
        table += found
        failed += errors
        print("\n".join([*map(str, found), *errors]), flush=True)
        if options.save is not None:
            order = [case.name for _, case in every]
            total = tpu_marks.save(options.save, found, order)
    lines = tpu_marks.check(table if options.save is None else total)
    print("\n".join(["", *(line for line, _ in lines)]))
    return 1 if failed or any(holds is False for _, holds in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
