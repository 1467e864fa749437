"""The compiler in processes of its own: programs go in, bytes and exchanges come out."""

import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import jax

from jaxcomp.errors import JaxcompError
from jaxcomp.kernels import offline
from jaxcomp.planner import cuda
from jaxcomp.planner.child import MARK
from jaxcomp.planner.steps import Split, Workload
from jaxcomp.planner.targets import Topology

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_OUT_OF_MEMORY = re.compile(r"([\d.]+)([KMGT]?)\)? exceeds available \w+ \(([\d.]+)([KMGT]?)\)")
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")


def environment() -> dict[str, str]:
    """Variables of a process that compiles for TPUs and runs on the CPU."""
    variables = {**os.environ, **offline.environment()}
    package = str(pathlib.Path(__file__).parents[2])
    return variables | {"PYTHONPATH": os.pathsep.join([package, variables["PYTHONPATH"]])}


class Compiler:
    """Compiles the steps of several workloads for one topology; a context manager.

    Its processes take steps of any workload, so that none waits while there is work. A program
    that aborts its process is an error of that program; the next one gets a new process.
    """

    def __init__(
        self,
        workloads: dict[str, Workload],
        topology: Topology,
        timeout: float = 900.0,
        processes: int = 2,
    ):
        """Starts nothing yet.

        Args:
          workloads: what is served, by name.
          topology: on which devices.
          timeout: seconds after which a program counts as failed.
          processes: how many programs are compiled at a time.

        Raises:
          JaxcompError: the compiler is not installed.
        """
        if topology.device.platform == "cuda" and not cuda.available():
            raise JaxcompError(cuda.missing(jax.__version__))
        if topology.device.platform == "tpu" and not offline.available():
            raise JaxcompError(f"plan: {offline.MISSING}")
        self._processes = [_Process(workloads, topology, timeout) for _ in range(processes)]
        self._free: queue.LifoQueue[_Process] = queue.LifoQueue()
        for process in self._processes[::-1]:
            self._free.put(process)

    @property
    def version(self) -> str:
        """Of JAX and the compiler, once a program was compiled."""
        return next((p.version for p in self._processes if p.version), "")

    def __enter__(self) -> "Compiler":
        """Starts the processes: they load the compiler while the caller prepares its questions."""
        for process in self._processes:
            process.launch()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.end()

    def compile(
        self, name: str, phase: str, split: Split, wanted: Callable[[], bool] = lambda: True
    ) -> dict[str, Any] | None:
        """Compiles one step as soon as a process is free.

        Args:
          name: of the workload.
          phase: "decode" or "prefill".
          split: how the mesh is used.
          wanted: is asked when it could begin.

        Returns:
          What ``child.measure`` found; or "error", with "needed" and "granted" bytes when the
          memory of a device is too small. None if it was no longer wanted.

        Raises:
          JaxcompError: the compiler knows no such topology, or the model is wrong.
        """
        process = self._free.get()
        try:
            if not wanted():
                return None
            found = process.ask({"workload": name, "phase": phase, "split": list(split)})
        finally:
            self._free.put(process)
        sizes = out_of_memory(found.get("error") or "")
        if sizes is not None:
            found["needed"], found["granted"] = sizes
        return found


class _Process:
    """One process of the compiler, started by ``launch`` or when it is first asked."""

    def __init__(self, workloads: dict[str, Workload], topology: Topology, timeout: float):
        self.workloads, self.topology, self.timeout = workloads, topology, timeout
        self.version = ""
        self._process: subprocess.Popen | None = None
        self._ready = False
        self._errors: Any = None

    def ask(self, program: dict[str, Any]) -> dict[str, Any]:
        """Its answer to a program."""
        self.launch()
        if not self._ready:
            self._greet()
        self._tell(program)
        return self._hear()

    def launch(self) -> None:
        """Starts it if it does not run, and waits for nothing."""
        if self._process is not None:
            return
        on_tpu = self.topology.device.platform == "tpu"
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jaxcomp.planner.child"],
            env=environment() if on_tpu else cuda.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        workloads = {name: dataclasses.asdict(w) for name, w in self.workloads.items()}
        self._tell({"topology": self.topology.jax_arguments, "workloads": workloads})

    def _greet(self) -> None:
        """Waits until it knows the topology."""
        told = self._hear()
        if told.get("error"):
            self.end()
            raise JaxcompError(
                f"topology {self.topology.name!r}: the compiler's process says: "
                f"{_shortened(told['error'])}"
            )
        if told["devices"] != self.topology.devices:
            raise JaxcompError(
                f"topology {self.topology.name!r}: has {told['devices']} devices for the compiler, "
                f"not {self.topology.devices}."
            )
        self.version = told["version"]
        self._ready = True

    def _tell(self, value: dict[str, Any]) -> None:
        process = self._process
        assert process is not None and process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # Why it ended is said where it should answer.
            process.stdin.write(json.dumps(value) + "\n")
            process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdout is not None
        timer = threading.Timer(self.timeout, process.kill)
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith(MARK):
                    return json.loads(line.removeprefix(MARK))
        finally:
            timer.cancel()
        self._errors.seek(0)
        told = self._errors.read().strip()[-600:]
        self.end()
        return {
            "error": f"the compiler ended with {process.returncode} (within {self.timeout:.0f} s): "
            f"{told}"
        }

    def end(self) -> None:
        """Ends it."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._errors.close()
            self._process, self._ready = None, False


def out_of_memory(message: str) -> tuple[int, int] | None:
    """Bytes that a program needs and that there are, from the compiler's message.

    Args:
      message: of any error.

    Returns:
      The two numbers, or None when the error is another one.

    Example:
      >>> out_of_memory("would use (18.50G) exceeds available HBM (15.75G).")
      (19864223744, 16911433728)
    """
    match = _OUT_OF_MEMORY.search(message) or _USED.search(message)
    if match is None:
        return None
    need, unit, have, other = match.groups()
    return int(float(need) * _UNITS[unit]), int(float(have) * _UNITS[other])


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 400 else text[:400] + " .."
