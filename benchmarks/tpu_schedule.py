"""Scheduled cycles of the TPU kernels, from the compiler's own dumps: no TPU is needed.

    python -m benchmarks.tpu_schedule [--chip v5e] [--operation quantized_matmul] [--only few]

The TPU compiler writes the final VLIW schedule of a kernel: one bundle is one cycle of the core,
and a second file says which units each bundle uses. So the bundles of a kernel's loops, times how
often they run, are its scheduled cycles; beside them stand the cycles that the bytes of the weight
take at the chip's bandwidth. It is a static model: waits for memory are not in it, nor what XLA
does to x before the kernel, and branches that a step may skip (the first and last step's) are
counted at every step. Clocks and bandwidths are those of ``jaxcomp.kernels.chips``.
"""

import argparse
import functools
import pathlib
import tempfile

from jaxcomp.kernels import chips

from benchmarks import tpu_attention
from benchmarks.schedules import Case, Schedule, schedules
from tests.kernels import aot


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

    module = "tests.kernels.quantized_matmul.aot_cases"
    cases = []
    for n, k in ((4096, 4096), (14336, 4096), (4096, 14336)):
        size = n * k / 2 + n * (k // 128) * 2
        for m in (1, 16, 256, 2048):

            def few(schedule, chip, m=m, n=n, k=k):
                tile = tpu_tiles.few(chip.name, m, n, k, 128, 128, 1)
                return sum(loop.bundles for loop in schedule.loops) * -(-n // tile.n) * k / tile.k

            def dense(schedule, chip, decodes, m=m, n=n, k=k):
                tile = tpu_tiles.dense(chip.name, m, n, k, chip.mxu)
                rows, outputs = -(-m // tile.m), -(-n // tile.n)
                # The first tile of rows decodes the weights for the others, in a loop of its own.
                # Of the loops inside a step, those count that hold a product, not a few odd slots.
                inner = [loop for loop in schedule.inner() if loop.used.get("MXU", 0) > 128]
                if decodes and len(inner) != 2:
                    return float("nan")  # not the loops that the source has: no number, then
                times = [1, rows - 1] if decodes else [rows] * len(inner)
                total = rows * outputs * schedule.step().bundles
                for loop, count in zip(inner, times, strict=True):
                    total += loop.bundles * (tile.n // tile.columns) * count * outputs
                return total

            options = {"m": m, "n": n, "k": k}
            name = f"W4A16 g128 M={m} {n}x{k}"
            if m <= 16:
                case = Case(
                    f"few {name}",
                    "quantized_matmul_int4",
                    f"{module}:quantized",
                    options,
                    few,
                    size,
                )
                cases.append(case)
                continue
            kernels = (("quantized_matmul_dense_int4", "quantized"), ("bf16_matmul", "bf16"))
            for kernel, function in kernels:
                title = f"many {name}" if function == "quantized" else f"many bf16 M={m} {n}x{k}"
                count = functools.partial(dense, decodes=function == "quantized")
                cases.append(Case(title, kernel, f"{module}:{function}", options, count))
    return cases


def grouped_matmul() -> list[Case]:
    """Mixtral's W4A16 g128 experts, for 16 tokens of two experts each that meet all eight."""
    from jaxcomp.kernels.quantized_matmul import tpu_tiles

    cases, experts, m = [], 8, 32
    for n, k in ((14336, 4096), (4096, 14336)):

        def cycles(schedule, chip, n=n, k=k):
            tile = tpu_tiles.grouped_few(chip.name, m, experts, n, k, 128, 128, 1)
            visits = -(-m // tile.m) + experts - 1  # the most that there can be
            steps = -(-n // tile.n) * k / tile.k
            return sum(loop.bundles for loop in schedule.loops) * visits * steps

        cases.append(
            Case(
                f"experts W4A16 g128 M={m} E={experts} {n}x{k}",
                "grouped_matmul_int4",
                "tests.kernels.quantized_matmul.aot_cases:grouped",
                {"m": m, "n": n, "k": k, "experts": experts},
                cycles,
                experts * (n * k / 2 + n * (k // 128) * 2),
            )
        )
    return cases


CASES = {
    "quantized_matmul": quantized_matmul,
    "grouped_matmul": grouped_matmul,
    "sparse_attention": tpu_attention.cases,
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--chip", choices=list(aot.TOPOLOGIES), action="append")
    parser.add_argument("--operation", choices=list(CASES), action="append")
    parser.add_argument("--only", default="", help="cases whose name holds one of these, by commas")
    options = parser.parse_args()
    makes = [CASES[name] for name in options.operation or CASES]
    words = options.only.split(",")
    cases = [c for make in makes for c in make() if any(word in c.name for word in words)]
    head = ("chip", "case", "cycles", "held against", "ratio", "MXU slots", "spills")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head), flush=True)
    for name in options.chip or aot.TOPOLOGIES:
        chip = chips.BY_NAME[name]
        counted: dict[str, float] = {}
        for case, schedule, error in measure(chip, cases):
            if schedule is None:
                print(f"| {name} | {case.name} | {error} |", flush=True)
                continue
            cycles = counted[case.name] = case.cycles(schedule, chip)
            basis = counted.get(case.against, case.bytes / chip.bandwidth * chip.clock)
            ratio = f"{basis:.0f} | {cycles / basis:.2f}" if basis else "- | -"
            inner = case.inner(schedule)
            busiest = max(inner, key=lambda part: part.bundles)
            used = busiest.used.get("MXU", 0) / busiest.bundles / schedule.slots["MXU"]
            spills = sum(part.spills for part in inner)
            row = f"| {name} | {case.name} | {cycles:.0f} | {ratio} | {used:.0%} | {spills} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
