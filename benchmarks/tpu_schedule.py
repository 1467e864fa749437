"""Scheduled cycles of the TPU kernels, from the compiler's own dumps: no TPU is needed.

    python -m benchmarks.tpu_schedule [--chip v5e] [--only few]

The TPU compiler writes the final VLIW schedule of a kernel: one bundle is one cycle of the core,
and a second file says which units each bundle uses. So the bundles of a kernel's loops, times how
often they run, are its scheduled cycles; beside them stand the cycles that the bytes of the weight
take at the chip's bandwidth. It is a static model: waits for memory are not in it, nor what XLA
does to x before the kernel, and branches that a step may skip (the first and last step's) are
counted at every step. Clocks and bandwidths are those of ``jaxcomp.kernels.chips``.
"""

import argparse
import dataclasses
import functools
import pathlib
import re
import tempfile
from collections.abc import Callable

from jaxcomp.kernels import chips

from tests.kernels import aot

_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*((?:> ?)*)")


@dataclasses.dataclass
class Loop:
    """Bundles of a loop that are in no loop inside it.

    Attributes:
      depth: loops around and including it.
      bundles: their number.
      used: unit -> slots used in them.
      longest: bundles of its longest run without a branch.
    """

    depth: int
    bundles: int = 0
    used: dict[str, int] = dataclasses.field(default_factory=dict)
    longest: int = 0

    @property
    def spills(self) -> int:
        """Registers moved to memory and back."""
        return sum(count for unit, count in self.used.items() if unit.endswith(("SPILL", "FILL")))


@dataclasses.dataclass
class Schedule:
    """A kernel's final schedule.

    Attributes:
      name: the kernel's name.
      loops: in order of their first bundle; grid steps are the loop of depth 1.
      slots: unit -> slots of a bundle.
    """

    name: str
    loops: list[Loop]
    slots: dict[str, int]

    def step(self) -> Loop:
        """The loop over grid steps, without loops inside it."""
        return next(loop for loop in self.loops if loop.depth == 1)

    def inner(self) -> list[Loop]:
        """Loops inside a grid step."""
        return [loop for loop in self.loops if loop.depth > 1]


def utilization(text: str) -> tuple[list[str], list[int], list[list[int]]]:
    """Units, their slots, and a row of used slots a bundle, from a utilization dump."""
    names, slots, rows = [], [], []
    for line in text.splitlines():
        if line.startswith("MXU"):
            names = [name.strip() for name in line.split(",")]
        elif names and line.strip() and not line.startswith("="):
            rows.append([int(word) for word in line.split()])
    if rows:
        slots = rows.pop(0)
    return names, slots, rows


def parse(bundles: str, used: str, name: str = "") -> Schedule:
    """A schedule from the text of its bundles and of their utilization."""
    units, slots, rows = utilization(used)
    stack: list[Loop] = []
    loops: list[Loop] = []
    begun: set[tuple[int, int]] = set()
    run = 0
    for line in bundles.splitlines():
        found = _BUNDLE.match(line)
        if not found:
            continue
        address, label, depth = int(found[1], 16), found[2], found[3].count(">")
        # Only the label of a body begins a loop: bundles of the loop around may stand within one.
        while len(stack) < depth or (label == "LB" and depth and (depth, address) not in begun):
            if label == "LB":
                del stack[depth - 1 :]
                begun.add((depth, address))
            level = len(stack) + 1
            same = [loop for loop in loops if loop.depth == level]
            if same and (label != "LB" or level < depth):
                stack.append(same[-1])
            else:
                stack.append(Loop(level))
                loops.append(stack[-1])
            run = 0
        del stack[depth:]
        run = 0 if label else run
        if stack and address < len(rows):
            loop = stack[-1]
            run += 1
            loop.bundles += 1
            loop.longest = max(loop.longest, run)
            for unit, count in zip(units, rows[address], strict=True):
                loop.used[unit] = loop.used.get(unit, 0) + count
        run = 0 if "sbr.rel" in line else run
    return Schedule(name, loops, dict(zip(units, slots, strict=True)))


def schedules(folder: pathlib.Path, kernel: str) -> list[Schedule]:
    """Schedules of the kernels in a dump whose names begin with a word, in order of compilation."""
    found = []
    for path in sorted(folder.glob(f"*-{kernel}*-final_bundles.txt")):
        if "analysis" in path.name:
            continue
        stem, _, name = path.name.removesuffix("-final_bundles.txt").partition("-")
        name = name.rpartition("-")[0]
        used = next(folder.glob(f"{stem}-{name}-*final_hlo-static-per-bundle-utilization.txt"))
        found.append(parse(path.read_text(), used.read_text(), name))
    return found


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel to compile and what its schedule is held against.

    Attributes:
      name: printed.
      kernel: how the kernel's name begins in the dump.
      target: "module:function" for ``tests.kernels.aot``.
      options: of the function, the chip aside.
      cycles: (schedule, chip) -> scheduled cycles of the whole product.
      bytes: bytes of the weight that it reads, or 0 where that does not bound it.
    """

    name: str
    kernel: str
    target: str
    options: dict
    cycles: Callable[[Schedule, chips.Chip], float]
    bytes: float = 0.0


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


CASES = {"quantized_matmul": quantized_matmul}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--chip", choices=list(aot.TOPOLOGIES), action="append")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    options = parser.parse_args()
    cases = [case for make in CASES.values() for case in make() if options.only in case.name]
    head = ("chip", "case", "cycles", "of weight bytes", "ratio", "MXU slots", "spills")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head), flush=True)
    for name in options.chip or aot.TOPOLOGIES:
        chip = chips.BY_NAME[name]
        for case, schedule, error in measure(chip, cases):
            if schedule is None:
                print(f"| {name} | {case.name} | {error} |", flush=True)
                continue
            cycles = case.cycles(schedule, chip)
            memory = case.bytes / chip.bandwidth * chip.clock
            ratio = f"{memory:.0f} | {cycles / memory:.2f}" if memory else "- | -"
            busiest = max(schedule.loops, key=lambda loop: loop.bundles)
            used = busiest.used.get("MXU", 0) / busiest.bundles / schedule.slots["MXU"]
            spills = sum(loop.spills for loop in schedule.loops)
            row = f"| {name} | {case.name} | {cycles:.0f} | {ratio} | {used:.0%} | {spills} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
