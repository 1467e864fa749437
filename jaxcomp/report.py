"""What compression did: one row a weight, and totals."""

import io
import json
from typing import Any

import msgspec


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one weight.

    Attributes:
      path: name of the weight in the tree.
      kind: how the model uses it (for instance "dot", "conv", "gather"), or "dense" for a leaf that
        no step names.
      shape: of the dense leaf.
      format: what it is stored as, for people.
      nbits: bits stored, scales and indices counted.
      error: relative error of the layer's output, ‖x Wᵀ - x Ŵᵀ‖ / ‖x Wᵀ‖, where the algorithm
        knows it.
      seconds: time the algorithm took. Not written to checkpoints, which are to be the same bytes
        whenever they are made.
      notes: what a reader should know (a scale folded into a norm, an activation order, ..).
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    format: str
    nbits: int
    error: float | None = None
    seconds: float | None = None
    notes: str = ""

    @property
    def weights(self) -> int:
        """Number of weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight."""
        return self.nbits / self.weights if self.weights else 0.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What compression did to a model.

    Attributes:
      rows: one for each weight that a step names.
      other_weights: number of weights in leaves that no step names.
      other_nbits: bits that those take.
      original_nbits: bits of the whole dense tree.
      seconds: of the whole run.

    Example:
      >>> row = Row(path="w", kind="dot", shape=(8, 16), format="int4", nbits=8 * 16 * 4)
      >>> report = Report(rows=(row,), original_nbits=8 * 16 * 32)
      >>> report.bits_per_weight, report.compression
      (4.0, 8.0)
      >>> Report.from_json(report.to_json()) == report
      True
    """

    rows: tuple[Row, ...] = ()
    other_weights: int = 0
    other_nbits: int = 0
    original_nbits: int = 0
    seconds: float | None = None

    @property
    def weights(self) -> int:
        """Number of weights in the rows."""
        return sum(row.weights for row in self.rows)

    @property
    def nbits(self) -> int:
        """Bits of the whole tree."""
        return sum(row.nbits for row in self.rows) + self.other_nbits

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tree, rounded up."""
        return -(-self.nbits // 8)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, over the rows."""
        return sum(row.nbits for row in self.rows) / self.weights if self.weights else 0.0

    @property
    def compression(self) -> float:
        """How many times smaller the whole tree is."""
        return self.original_nbits / self.nbits if self.nbits else 1.0

    def without_times(self) -> "Report":
        """The report with all seconds left out."""
        rows = tuple(msgspec.structs.replace(row, seconds=None) for row in self.rows)
        return msgspec.structs.replace(self, rows=rows, seconds=None)

    def totals(self) -> dict[str, Any]:
        """Sums over the model, JSON-able."""
        return {
            "weights": self.weights,
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.nbytes,
            "original_bytes": -(-self.original_nbits // 8),
            "compression": self.compression,
            "seconds": self.seconds,
        }

    def to_json(self) -> str:
        """The rows and totals as one line of JSON."""
        return json.dumps({**msgspec.to_builtins(self), "totals": self.totals()})

    @classmethod
    def from_json(cls, text: str | bytes) -> "Report":
        """The report that ``to_json`` wrote."""
        return msgspec.json.decode(text, type=cls)

    def table(self) -> Any:
        """The report as a ``rich.table.Table``."""
        from rich import box
        from rich.table import Table

        table = Table(caption=self.summary(), caption_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("weight", overflow="fold")
        table.add_column("kind")
        table.add_column("shape", no_wrap=True)
        table.add_column("format", overflow="fold")
        for name in ("bits/weight", "error", "seconds"):
            table.add_column(name, justify="right", no_wrap=True)
        notes = any(row.notes for row in self.rows)
        if notes:
            table.add_column("notes", overflow="fold")
        for row in self.rows:
            cells = [
                row.path,
                row.kind,
                "x".join(map(str, row.shape)),
                row.format,
                f"{row.bits_per_weight:.2f}",
                "" if row.error is None else f"{row.error:.4f}",
                "" if row.seconds is None else f"{row.seconds:.2f}",
            ]
            table.add_row(*cells, *([row.notes] if notes else []))
        return table

    def summary(self) -> str:
        """The totals in one line of text."""
        time = "" if self.seconds is None else f" in {self.seconds:.1f} s"
        return (
            f"{len(self.rows)} weights compressed{time}: {self.bits_per_weight:.2f} bits a "
            f"weight; whole model {megabytes(self.nbytes)}, {self.compression:.2f} times smaller."
        )

    def __str__(self) -> str:
        """The table as text, 100 characters wide."""
        from rich.console import Console

        stream = io.StringIO()
        Console(file=stream, width=100, no_color=True).print(self.table())
        return stream.getvalue().rstrip("\n")


def megabytes(nbytes: float) -> str:
    """A size for people: "3.21 MB" (10**6 bytes)."""
    return f"{nbytes / 1e6:.2f} MB"
