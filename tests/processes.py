"""Several processes on this machine, joined by ``jax.distributed`` over gloo on CPU.

    with processes.start(source, 2, tmp_path) as group:
        printed = group.wait()

``source`` is a script that runs in every process after JAX was joined; it finds ``PROCESS``,
``PROCESSES`` and ``FOLDER`` (a ``pathlib.Path`` they share) as names. What it prints is kept apart
from what libraries write to the process's own output, where gloo's lines come in the middle of
others.
"""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence

from tests import xla

ROOT = pathlib.Path(__file__).parent.parent

_JOIN = """\
import gc, pathlib, sys
import jax
gc.set_threshold(20_000, 10, 5)  # As in conftest.py.
address, PROCESSES, PROCESS, heartbeat, folder, script, printed = sys.argv[1:]
PROCESSES, PROCESS, FOLDER = int(PROCESSES), int(PROCESS), pathlib.Path(folder)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
# These scripts compile much and compute little.
jax.config.update("jax_disable_most_optimizations", True)
jax.distributed.initialize(
    address, PROCESSES, PROCESS, initialization_timeout=60,
    heartbeat_timeout_seconds=int(heartbeat), shutdown_timeout_seconds=60,
)
sys.stdout = open(printed, "w", buffering=1)
exec(compile(open(script).read(), script, "exec"))
"""


class Group:
    """Processes that run.

    Attributes:
      running: the processes, by their number.
      folder: where the files ``printed-K`` and ``output-K`` of process K are: what its script
        printed, and everything else, standard error included.
    """

    def __init__(self, running: Sequence[subprocess.Popen], folder: pathlib.Path):
        self.running, self.folder = list(running), folder

    def kill(self, process: int) -> None:
        """Ends one process at once, as the machine's death would (SIGKILL)."""
        self.running[process].kill()

    def output(self, process: int) -> str:
        """Everything that came from a process so far."""
        output = (self.folder / f"output-{process}").read_text(errors="replace")
        return self.printed(process) + output

    def printed(self, process: int) -> str:
        """What a process's script printed so far."""
        path = self.folder / f"printed-{process}"
        return path.read_text() if path.exists() else ""

    def codes(self, timeout: float = 120) -> list[int]:
        """Waits for all to end and gives their exit codes; TimeoutError if one goes on."""
        deadline = time.monotonic() + timeout
        for k, process in enumerate(self.running):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise TimeoutError(
                    f"process {k} still runs after {timeout} s; it printed:\n{self.output(k)}"
                ) from None
        return [process.returncode for process in self.running]

    def wait(self, timeout: float = 120) -> list[str]:
        """Waits for all to end well and gives what their scripts printed, or fails."""
        codes = self.codes(timeout)
        failed = [k for k, code in enumerate(codes) if code]
        assert not failed, "".join(
            f"\nprocess {k} ended with {codes[k]}:\n{self.output(k)}" for k in failed
        )
        return [self.printed(k) for k in range(len(codes))]


@contextlib.contextmanager
def start(
    source: str, count: int, folder: pathlib.Path, devices: int = 2, heartbeat: int = 10
) -> Iterator[Group]:
    """Starts processes; those that still run at the end of the block are killed.

    Args:
      source: the script; it may be indented.
      count: number of processes.
      folder: shared folder, the script's ``FOLDER``; scripts and outputs go there too.
      devices: virtual CPU devices in each process.
      heartbeat: seconds after which a silent process counts as dead.
    """
    run = folder / f"processes-{time.monotonic_ns()}"
    run.mkdir(parents=True)
    (run / "script.py").write_text(textwrap.dedent(source))
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla.flags(devices),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
    }
    address = f"localhost:{_free_port()}"
    with contextlib.ExitStack() as stack:
        running = []
        for k in range(count):
            paths = folder, run / "script.py", run / f"printed-{k}"
            arguments = [address, count, k, heartbeat, *paths]
            stream = stack.enter_context(open(run / f"output-{k}", "wb"))
            process = subprocess.Popen(
                [sys.executable, "-c", _JOIN, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            stack.callback(_end, process)
            running.append(process)
        yield Group(running, run)


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
