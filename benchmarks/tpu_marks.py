"""The table of scheduled cycles, kept row by row in a file, and what is required of its rows."""

import dataclasses
import operator
import pathlib
from collections.abc import Iterable

from benchmarks import common

COLUMNS = ("chip", "case", "cycles", "held against", "ratio", "MXU slots", "spills", "date")
CHIPS = ("v5e", "v5p", "v6e", "7x")
# Of few rows: cycles over those that the bytes of the weight take.
FEW = {"v5e": 1.0, "v5p": 1.0, "v6e": 1.2, "7x": 1.5}
# Of 2048 rows: occupancy of the matrix unit over that of the bf16 product.
OCCUPANCY = 0.90
# Of a tenth of the blocks: cycles over those of all.
TENTH = 0.15
# What the names of a kind's cases begin with.
KINDS = {
    "few": "few rows",
    "many": "many rows",
    "format": "other formats and groups",
    "f32 rows": "rows in f32",
    "experts": "experts",
    "2:4": "2:4 weights",
    "blocks": "block-sparse weights",
    "attention": "attention",
    "decode": "decoding",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A case on a chip.

    Attributes:
      chip: its name.
      case: its name.
      cycles: scheduled.
      basis: cycles that they are held against, or None.
      used: part of the matrix unit's slots that the busiest loop uses.
      spills: registers moved to memory and back in the inner loops.
      date: of the compilation; "" where the file does not say.
    """

    chip: str
    case: str
    cycles: float
    basis: float | None
    used: float
    spills: int
    date: str

    @property
    def ratio(self) -> float | None:
        """Cycles over the basis."""
        return None if self.basis is None else self.cycles / self.basis

    @property
    def ours(self) -> bool:
        """Whether the kernel is one of this library, not one that it is held against."""
        return not self.case.startswith("splash") and not self.case.endswith(" in bf16")

    def __str__(self) -> str:
        basis = "- | -" if self.basis is None else f"{self.basis:.0f} | {self.ratio:.2f}"
        return (
            f"| {self.chip} | {self.case} | {self.cycles:.0f} | {basis} | {self.used:.0%} "
            f"| {self.spills} | {self.date} |"
        )


def head() -> str:
    """The table's first two lines."""
    return "| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS)


def read(text: str) -> tuple[list[Row], list[str]]:
    """The rows of a file, and its other lines: notes that people wrote.

    Args:
      text: of the file; of rows with one chip and case the last counts.

    Returns:
      Rows and notes. Heads of tables and lines of requirements are neither.
    """
    rows: dict[tuple[str, str], Row] = {}
    notes = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] in CHIPS and len(cells) >= len(COLUMNS) - 1:
            chip, case, cycles, basis, _, used, spills, *date = cells
            held = None if basis == "-" else float(basis)
            share = float(used.rstrip("%")) / 100
            row = Row(chip, case, float(cycles), held, share, int(spills), "".join(date))
            rows[chip, case] = row
        elif not line.startswith(("|", "met: ", "NOT MET: ", "not measured: ")):
            notes.append(line)
    return list(rows.values()), notes


def save(path: pathlib.Path, rows: Iterable[Row], order: list[str]) -> list[Row]:
    """Writes rows to a file in place of its rows of the same chips and cases.

    Args:
      path: of the file; its notes stay, before the table.
      rows: to write.
      order: names of cases, in the table's order; others come last.

    Returns:
      All rows of the file.
    """
    old, notes = read(path.read_text() if path.exists() else "")
    merged = {(row.chip, row.case): row for row in (*old, *rows)}
    place = {name: i for i, name in enumerate(order)}
    every = sorted(
        merged.values(),
        key=lambda row: (CHIPS.index(row.chip), place.get(row.case, len(order)), row.case),
    )
    told = "\n".join(notes).strip()
    parts = [told, "\n".join([head(), *map(str, every)]), "\n".join(t for t, _ in check(every))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
    return every


def check(rows: Iterable[Row]) -> list[tuple[str, bool | None]]:
    """What is required of the rows: a line each, and whether it holds; None: not measured."""
    rows = list(rows)
    found = []
    for chip in CHIPS:
        of = [row for row in rows if row.chip == chip and row.ours]

        def require(text, kind, score_of, limit, chip=chip, of=of):
            """The largest score of a kind's rows against a limit."""
            scores = {row.case: score_of(row) for row in of if kind(row.case)}
            scores = {case: value for case, value in scores.items() if value is not None}
            if not scores:
                found.append((f"not measured: {chip}: {text}", None))
                return
            # NaN, of a schedule that could not be counted, is the worst.
            worst = max(scores, key=lambda case: (scores[case] != scores[case], scores[case]))
            holds = scores[worst] <= limit
            score = f"{scores[worst]:.0f}" if limit == 0 else f"{scores[worst]:.3f}"
            told = f"{chip}: {text} ({score}: {worst})"
            found.append((common.requirement(told, holds), holds))

        ratio = operator.attrgetter("ratio")
        require(
            f"W4A16 g128 of 1 and 16 rows: at most {FEW[chip]:g} of the bytes' cycles",
            lambda case: case.startswith("few"), ratio, FEW[chip],
        )  # fmt: skip
        require(
            f"2048 rows: at most 1/{OCCUPANCY:g} of the cycles of bf16 in the same tiling",
            lambda case: case.startswith("many") and "M=2048" in case, ratio, 1 / OCCUPANCY,
        )  # fmt: skip
        require(
            f"attention to a tenth of the blocks: at most {TENTH:g} of all",
            lambda case: case.startswith("attention tenth"), ratio, TENTH,
        )  # fmt: skip
        require(
            "attention no slower than jax's splash attention on its masks",
            lambda case: case.startswith(("attention window", "attention causal")), ratio, 1.0,
        )  # fmt: skip
        for kind, name in KINDS.items():
            require(
                f"no spills, {name}",
                lambda case, kind=kind: case.startswith(kind), operator.attrgetter("spills"), 0,
            )  # fmt: skip
    return found
