"""Kernels on a Hopper GPU: right first, then how fast, against XLA and cuDNN.

    python -m benchmarks.gpu [--save FILE] [--table FILE] [--budget SECONDS] [--sweep]
                             [--only WORD] [--rehearse]

Quantized matmuls are in ``gpu_matmul``, sparse attention and products in ``gpu_sparse``, decoding
in ``gpu_decode``, experts in ``gpu_experts``; where tokamax is installed its kernels run too. First
every kernel is compared with float64, at sizes that do not divide the tiles, and run three times:
an answer that changes is a race. Then medians: each sample times many calls at once, over distinct
weights that together exceed the second-level cache several times, and the variants of a table take
turns.
``--sweep`` also tries other tiles, for the table in ``gpu_tiles.json``. ``--table`` adds what was
measured of sparse weights and experts, where every kernel gave the right numbers, to a table by
which dispatch chooses (those of single weights: ``python -m jaxcomp.kernels.tune``). All of it runs
in child processes: what fails or hangs is told, and the rest goes on. ``--rehearse`` runs a small
part on a CPU, with the kernels interpreted, to try the script.
"""

import argparse
import json
import pathlib
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxcomp.kernels import chips, tune

from benchmarks import common, gpu_decode, gpu_experts, gpu_matmul, gpu_sparse
from benchmarks.gpu_checks import TOLERANCE, check_one
from benchmarks.gpu_timing import MARK, reply

# Modules with what to check (CHECKS, and REHEARSED on a CPU), what to time (tables, table_of) and
# what it must reach (REQUIRED).
PARTS = {
    "table": gpu_matmul,
    "sparse": gpu_sparse,
    "decode": gpu_decode,
    "experts": gpu_experts,
}


def check_all(checks: list, start: int, interpret) -> None:
    """Checks kernels from one on, a reply each."""
    for index, check in enumerate(checks[start:], start):
        try:
            error, stable = check_one(check, interpret)
            limit = TOLERANCE[check.dtype]
            verdict = "ok" if error <= limit else "WRONG"  # also where it is not a number
            verdict = verdict if stable else "CHANGES FROM RUN TO RUN"
            row = (f"{error:.1e}", f"{limit:.0e}", verdict)
        except Exception as failure:
            row = ("", "", f"{type(failure).__name__}: {str(failure)[:160]}")
            traceback.print_exc(file=sys.stderr)
        reply({"index": index, "row": row})


def checks_of(arguments: argparse.Namespace) -> list:
    """What is checked: with ``--only sparse`` and the like only those kernels."""
    small = arguments.rehearse
    parts = {name: part.REHEARSED if small else part.CHECKS for name, part in PARTS.items()}
    wanted = parts.keys() & set(arguments.only.split()) or parts
    return [check for part, checks in parts.items() if part in wanted for check in checks]


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
        sweep = {"sweep": arguments.sweep} if part == "table" else {}
        found = PARTS[part].table_of(name, m, deadline, arguments.rehearse, **sweep)
        rows, ratios, entries = found
        reply({"rows": rows, "ratios": ratios, "entries": entries})


def write_table(path: pathlib.Path, entries: list[dict]) -> None:
    """Puts measurements into a table, in place of older ones of the same products."""
    table = tune.Table(path, chips.H100.name)
    for entry in entries:
        kind, entry = entry["kind"], {k: v for k, v in entry.items() if k != "kind"}
        same = {name: value for name, value in entry.items() if name != "seconds"}
        kept = [old for old in table.mine.get(kind, ()) if not same.items() <= old.items()]
        table.mine[kind] = [*kept, entry]
    table.mine["versions"] = {"jax": jax.__version__, "jaxlib": jax.lib.__version__}
    table.write()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=pathlib.Path, help="a file for what is printed")
    parser.add_argument("--table", type=pathlib.Path, help="a table of measurements to add to")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in all")
    parser.add_argument("--sweep", action="store_true", help="also try other tiles")
    parser.add_argument(
        "--only", default="", help="a shape, rows or both: 'up 16'; or a part: sparse"
    )
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
    entries: list[dict] = []
    cases = [(name, *case) for name, part in PARTS.items() for case in part.tables()]
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
            entries += message["entries"]
            out(common.table(PARTS[part].COLUMNS, message["rows"]))
            if arguments.table is not None and good:
                write_table(arguments.table, entries)
        else:
            out(f"{title}: {'hangs' if 'hangs' in message else 'ended its process'}")
        out()
        save()

    required = [(name, *each) for name, part in PARTS.items() for each in part.REQUIRED]
    for part, shape, m, name, least in required:
        ratio = ratios.get((part, shape, m), {}).get(name)
        text = f"{name} at {m} rows, {shape}: at least {least} times {PARTS[part].BASE}"
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
