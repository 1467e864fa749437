"""What the benchmarks share: tables, the machine's description, child processes and their cost.

Imports nothing heavy, so that a parent's memory is not counted among its child's.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
TINYLM = ROOT / "jaxcomp" / "assets" / "tinylm"
LENGTH, BATCH_SIZE, SAMPLES, HELD_OUT = 256, 16, 128, 128


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a child process took.

    Attributes:
      wall: seconds from its start to its end.
      cpu: seconds of processor time, user and system.
      peak: largest resident memory, in bytes.
      reply: the JSON object in the last line it printed.
    """

    wall: float
    cpu: float
    peak: int
    reply: dict


def child(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    cpus: Iterable[int] | None = None,
) -> Cost:
    """Runs a command to its end and measures it.

    Args:
      command: program and arguments.
      environment: variables added to this process's.
      cpus: processors it may use; None is all.

    Returns:
      Its cost and what it replied.

    Raises:
      RuntimeError: it failed; the end of what it printed is in the message.
    """
    import tempfile
    import time

    pinned = None if cpus is None else set(cpus)

    def pin():
        if pinned is not None:
            os.sched_setaffinity(0, pinned)

    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        process = subprocess.Popen(
            list(command),
            stdout=out,
            stderr=err,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            preexec_fn=pin,
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        lines = out.read().strip().splitlines()
        if process.returncode:
            tail = (err.read() or "\n".join(lines))[-3000:]
            raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{tail}")
    scale = 1 if sys.platform == "darwin" else 1024
    reply = json.loads(lines[-1]) if lines else {}
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * scale, reply)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A text table; the first column is aligned left, the others right.

    Args:
      columns: their names.
      rows: cells, turned into text by ``str``; None is empty.

    Returns:
      Markdown that is also readable as it stands.
    """
    cells = [list(columns)] + [["" if c is None else str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]

    def line(row):
        padded = [
            c.ljust(w) if not i else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if not i else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def machine(*packages: str) -> str:
    """Date, processor and versions, in one line.

    Args:
      packages: distributions whose versions matter.

    Returns:
      For instance "2026-01-31, 2 x Intel(R) Xeon(R), Python 3.12.1, jax 0.12.0".
    """
    model = platform.processor() or platform.machine()
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    date = datetime.date.today().isoformat()
    return ", ".join([date, f"{cores} x {model}", f"Python {platform.python_version()}", *found])


def requirement(text: str, holds: bool) -> str:
    """One line that says whether a requirement is met."""
    return f"{'met' if holds else 'NOT MET'}: {text}"


class Output:
    """Prints, and keeps what was printed for a file in ``results/``."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, text: str = "") -> None:
        """Prints a line."""
        print(text, flush=True)
        self.lines.append(text)

    def save(self, name: str) -> None:
        """Writes all of it to ``results/NAME.txt``."""
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / f"{name}.txt").write_text("\n".join(self.lines) + "\n")
