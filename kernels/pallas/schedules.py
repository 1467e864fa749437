"""A kernel's final schedule, read from the dumps of the TPU compiler.

One bundle is one cycle of the core. Loops are told apart, and what a step may skip: the regions
between a branch and where its target joins.
"""

import dataclasses
import pathlib
import re

_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*((?:> ?)*)")
_BRANCH = re.compile(r"sbr\.rel \([^)]*\) target = \$region(\d+)")
_JOINED = re.compile(r"empty region (\d+)")


@dataclasses.dataclass
class Bundles:
    """Some bundles, and what they use.

    Attributes:
      bundles: their number.
      used: unit -> slots used in them.
    """

    bundles: int = 0
    used: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def spills(self) -> int:
        """Registers moved to memory and back."""
        return sum(count for unit, count in self.used.items() if unit.endswith(("SPILL", "FILL")))

    def add(self, units: list[str], row: list[int]) -> None:
        """Counts one more bundle."""
        self.bundles += 1
        for unit, count in zip(units, row, strict=True):
            self.used[unit] = self.used.get(unit, 0) + count


@dataclasses.dataclass
class Loop(Bundles):
    """Bundles of a loop that are in no loop inside it.

    Attributes:
      depth: loops around and including it.
      longest: bundles of its longest run without a branch.
    """

    depth: int = 0
    longest: int = 0


@dataclasses.dataclass
class Schedule:
    """A kernel's final schedule.

    Attributes:
      name: the kernel's name.
      loops: in order of their first bundle; grid steps are the loop of depth 1.
      slots: unit -> slots of a bundle.
      regions: what branches skip and holds no branch itself, in order.
      outer: what branches skip with one branch around, which skips the whole of a step, in order.
    """

    name: str
    loops: list[Loop]
    slots: dict[str, int]
    regions: list[Bundles] = dataclasses.field(default_factory=list)
    outer: list[Bundles] = dataclasses.field(default_factory=list)

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
                stack.append(Loop(depth=level))
                loops.append(stack[-1])
            run = 0
        del stack[depth:]
        run = 0 if label else run
        if stack and address < len(rows):
            loop = stack[-1]
            run += 1
            loop.add(units, rows[address])
            loop.longest = max(loop.longest, run)
        run = 0 if "sbr.rel" in line else run
    spans = _spans(bundles)
    leaves = [
        s for s in spans if not any(s[0] <= start < s[1] for start, _ in spans if start != s[0])
    ]
    outer = [s for s in spans if sum(a <= s[0] and s[1] <= b for a, b in spans) == 2]
    regions, parts = ([_total(units, rows[a:b]) for a, b in of] for of in (leaves, outer))
    return Schedule(name, loops, dict(zip(units, slots, strict=True)), regions, parts)


def _spans(bundles: str) -> list[tuple[int, int]]:
    """First bundles of what branches skip, and of what follows, in order."""
    begun: dict[str, int] = {}
    spans = []
    for line in bundles.splitlines():
        found = _BUNDLE.match(line)
        if not found:
            continue
        address = int(found[1], 16)
        if found[2] == "PF":
            spans += [(begun.pop(n), address) for n in _JOINED.findall(line) if n in begun]
        if branch := _BRANCH.search(line):
            begun[branch[1]] = address + 1
    return sorted(spans)


def _total(units: list[str], rows: list[list[int]]) -> Bundles:
    total = Bundles()
    for row in rows:
        total.add(units, row)
    return total


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
