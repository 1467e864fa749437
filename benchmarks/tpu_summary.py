"""The table of kernels/README.md, from results/tpu_schedule.txt: python -m benchmarks.tpu_summary

It is written between the page's two marks; ``tests/kernels/test_schedules.py`` compares them. Each
number is a case's cycles over those that it is held against, for one chip. Nothing is compiled.
"""

import pathlib
import sys

from benchmarks import tpu_marks

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "kernels" / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "tpu_schedule.txt"
MARKS = ("<!-- scheduled cycles: `python -m benchmarks.tpu_summary` -->", "<!-- end of cycles -->")

_FORMATS = (
    "int8 g128", "int2 g128", "fp8 g128", "NF4 g128", "int4 g32", "int4 g128 with zero points",
    "int4 by channel", "W4A8 g128", "W4A8 by channel", "W8A8 by channel",
)  # fmt: skip


def _products(rows: int) -> dict[str, str]:
    """Labels of products with so many rows, and their cases' names; W8A8 has none of 16."""
    formats = _FORMATS[:-1] if rows == 16 else _FORMATS
    return {name: f"format {name} M={rows} 4096x4096" for name in formats}


def _attention(blocks: str) -> dict[str, tuple[str, str]]:
    """Attention and its gradients, and splash attention's in such blocks."""
    steps = {"": "", ", gradient to queries": " dq", ", to keys and values": " dkv"}
    cases = {
        f"{mask}{label}": f"{mask}{step} 16384"
        for label, step in steps.items()
        for mask in ("causal", "window")
    }
    return {label: (f"attention {c}", f"splash {c}{blocks}") for label, c in cases.items()}


# What a section's cases are held against, and these by their labels; of two cases the first is
# held against the second.
SECTIONS = {
    "1 and 16 rows of a 4096 x 4096 weight, of the time of its bytes": {
        "W4A16 g128, 1 row": "few W4A16 g128 M=1 4096x4096",
        "W4A16 g128": "few W4A16 g128 M=16 4096x4096",
        **_products(16),
        "f32 rows, int4 g128": "f32 rows int4 g128 M=16 4096x4096",
    },
    "256 rows of it, of a bf16 kernel in the same tiling": {
        "W4A16 g128": "many W4A16 g128 M=256 4096x4096",
        **_products(256),
    },
    "2048 rows of it, of a bf16 kernel in the same tiling": {
        "W4A16 g128": "many W4A16 g128 M=2048 4096x4096",
        **_products(2048),
    },
    "Eight experts of 14336 x 4096": {
        "W4A16 g128, 32 rows, of the time of their bytes":
            "experts W4A16 g128 M=32 E=8 14336x4096",
        "W4A16 g128, 4096 rows, of bf16": "experts W4A16 g128 M=4096 E=8 14336x4096",
    },
    "Sparse weights of 14336 x 4096, 16 rows, of the time of their bytes": {
        "2:4 in bf16": "2:4 bf16 M=16 14336x4096",
        "2:4 in int4 g128": "2:4 int4 g128 M=16 14336x4096",
        "half of the blocks of 256": "blocks 50% of 256 M=16 14336x4096",
        "a tenth": "blocks 10% of 256 M=16 14336x4096",
    },
    "The same, 2048 rows, of the dense bf16 kernel": {
        "2:4 in bf16": "2:4 bf16 M=2048 14336x4096",
        "2:4 in int4 g128": "2:4 int4 g128 M=2048 14336x4096",
        "half of the blocks of 256": "blocks 50% of 256 M=2048 14336x4096",
        "a tenth": "blocks 10% of 256 M=2048 14336x4096",
        "half, gradient to values": "blocks 50% of 256 gradient to values M=2048 14336x4096",
    },
    "Attention, 16384 tokens, 32 heads of 128": {
        "a tenth of the blocks, of all": "attention tenth 16384",
    },
    "Attention, of jax's splash attention in blocks of 512": _attention(""),
    "Attention, of splash in blocks of 1024, which spill": _attention(" in blocks of 1024"),
    "Attention, of itself without": {
        "a soft cap, causal": "attention soft cap causal 16384",
        "the same, gradient to queries": "attention soft cap causal dq 16384",
        "the same, to keys and values": "attention soft cap causal dkv 16384",
        "segments, causal": "attention segments causal 16384",
    },
    "Decoding, 8 sequences of 16384, of the time of the cache's bytes": {
        "bf16 cache": "decode bfloat16 cache of 8x16384",
        "int8 cache": "decode int8 cache of 8x16384",
        "fp8 cache": "decode fp8 cache of 8x16384",
        "int8 cache, of the bf16 cache's cycles":
            ("decode int8 cache of 8x16384", "decode bfloat16 cache of 8x16384"),
    },
}  # fmt: skip


def summary(rows: list[tpu_marks.Row]) -> str:
    """A table in Markdown.

    Args:
      rows: of the file of results.

    Returns:
      A line for each case of ``SECTIONS``, with a ratio for each chip, "-" where there is none.
    """
    found = {(row.chip, row.case): row for row in rows}

    def ratio(chip: str, case: str | tuple[str, str]) -> float | None:
        if isinstance(case, str):
            row = found.get((chip, case))
            return row and row.ratio
        ours, other = (found.get((chip, name)) for name in case)
        return ours and other and ours.cycles / other.cycles

    lines = ["| case | " + " | ".join(tpu_marks.CHIPS) + " |"]
    lines.append("| --- |" + " ---: |" * len(tpu_marks.CHIPS))
    for title, cases in SECTIONS.items():
        lines.append(f"| **{title}** |" + " |" * len(tpu_marks.CHIPS))
        for label, case in cases.items():
            ratios = [ratio(chip, case) for chip in tpu_marks.CHIPS]
            cells = ["-" if number is None else f"{number:.2f}" for number in ratios]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parts(page: str) -> tuple[str, str, str]:
    """What stands before the page's table, the table, and what follows.

    Raises:
      ValueError: if the page does not hold both marks.
    """
    before, _, rest = page.partition(MARKS[0])
    table, end, after = rest.partition(MARKS[1])
    if not end:
        raise ValueError(f"{PAGE} has to hold {MARKS[0]!r} and, after it, {MARKS[1]!r}.")
    return before, table.strip(), after


def main() -> int:
    """Writes the table."""
    before, _, after = parts(PAGE.read_text())
    table = summary(tpu_marks.read(RESULTS.read_text())[0])
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
