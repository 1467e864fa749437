"""Compiles functions for TPUs that are not here, with the real compiler, in processes of their own.

A type that the compiler does not know can abort its process, and its dumps are asked for by flags
that are read once: so each request runs in a fresh process.

    python -m jaxcomp.kernels.offline '{"topology": "v5e:2x4", "cases": [["module:function", {}]]}'

``module:function(mesh, **options)`` returns a function and its arguments as ShapeDtypeStructs with
shardings on that mesh.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

from jaxcomp.kernels import chips

MARK = "compiled: "
# A folder with libtpu beside the environment's packages, where `make` installs it: among them,
# every process would look for a TPU.
BESIDE = pathlib.Path(sys.prefix) / "tpu"
MISSING = (
    "the TPU compiler (libtpu) is not installed; it needs no TPU, install it with: pip install "
    f"libtpu, or beside the packages with: pip install --target {BESIDE} libtpu"
)


@functools.cache
def available() -> bool:
    """Whether the TPU compiler is installed."""
    return (BESIDE / "libtpu").is_dir() or importlib.util.find_spec("libtpu") is not None


def version() -> str:
    """Of the TPU compiler; "" where it is not installed."""
    found = importlib.metadata.distributions(name="libtpu", path=[str(BESIDE), *sys.path])
    return next((each.version for each in found), "")


def chip_of_topology(name: str) -> chips.Chip:
    """The chip that a slice is made of.

    Args:
      name: as "v5e:1x1"; that such a slice exists is for the compiler to say.

    Returns:
      The chip.

    Raises:
      ValueError: the chip is no TPU that is known, or the shape is none.
    """
    kind, _, shape = name.partition(":")
    chip = chips.BY_NAME.get(kind.lower().removeprefix("tpu"))
    if chip is None or chip.platform != "tpu" or not re.fullmatch(r"\d+(x\d+)+", shape):
        known = [each.name for each in chips.BY_NAME.values() if each.platform == "tpu"]
        raise ValueError(
            f"topology {name!r}: write a chip of {', '.join(known)} and its slice's shape, as in "
            "v5e:1x1 or v5p:2x2x1"
        )
    return chip


def environment(dump: pathlib.Path | None = None) -> dict[str, str]:
    """Variables of a process that compiles, and writes final schedules if asked."""
    variables = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": "",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(BESIDE), os.environ.get("PYTHONPATH")])),
    }
    if dump is not None:
        options = ("hlo_text=true", "llo_text=true", "llo_html=false", "llo_static_gaps=true")
        # Of the hundred passes' only the last ones': the others take minutes to write.
        options = (*options, "llo_pass_label_regex=final")
        flags = [f"--xla_jf_dump_to={dump}", *(f"--xla_jf_dump_{o}" for o in options)]
        flags += ["--xla_jf_emit_annotations=true", "--xla_jf_debug_level=2"]
        variables["LIBTPU_INIT_ARGS"] = " ".join(flags)
    return variables


def compile_cases(
    topology: str,
    cases: list[tuple[str, dict]],
    dump: pathlib.Path | None = None,
    timeout: float = 900,
    folder: pathlib.Path | None = None,
) -> list[dict]:
    """Compiles cases for a slice in one new process.

    Args:
      topology: of the slice, as "v5e:2x4".
      cases: ("module:function", options) each; an option "mesh" is the mesh's shape.
      dump: a folder for the compiler's schedules, or None.
      timeout: seconds for all of them.
      folder: from which modules are imported, besides the installed ones; None for this one.

    Returns:
      For each case a dict: "error" (None or the message), "seconds", "memory" (bytes a device:
      arguments, outputs, temporaries), "bytes_accessed", "hlo" (the compiled program's text). A
      case that aborts the compiler ends the list early, with that as its error.
    """
    request = {"topology": topology, "cases": cases}
    return replies("jaxcomp.kernels.offline", request, environment(dump), folder, timeout)


def replies(
    module: str,
    request: dict,
    variables: dict[str, str],
    folder: pathlib.Path | None,
    timeout: float,
) -> list[dict]:
    """What a module, run in a new process, replies to each of the cases of a request.

    Args:
      module: its ``main`` reads the request, as JSON, and prints ``MARK`` and JSON for each case.
      request: has "cases".
      variables: of the process's environment, besides this one's.
      folder: where it runs; None for this one.
      timeout: seconds for all of them.

    Returns:
      The replies; if the process ends early, its error in place of the next one.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(request)],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith(MARK)]
    found = [json.loads(x.removeprefix(MARK)) for x in lines]
    if len(found) < len(request["cases"]):
        told = done.stderr.strip()[-2000:]
        found.append({"error": f"the compiler ended with {done.returncode}: {told}"})
    return found


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes of a compiled program's arguments, outputs and temporaries, on one device."""
    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }


def main() -> None:
    """Compiles what is asked for on the command line; one line a case."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    request = json.loads(sys.argv[1])
    name = request["topology"]
    # A host has four chips unless it is said to have one.
    one = math.prod(map(int, name.partition(":")[2].split("x"))) == 1
    more = {"chips_per_host_bounds": (1, 1, 1)} if one else {}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
    devices = np.array(topology.devices)
    for target, options in request["cases"]:
        started = time.perf_counter()
        result: dict = {"error": None}
        try:
            module, _, name = target.partition(":")
            make = getattr(importlib.import_module(module), name)
            options = dict(options)
            shape = tuple(options.pop("mesh", (1, 1)))
            mesh = jax.sharding.Mesh(devices[: np.prod(shape)].reshape(shape), ("data", "model"))
            function, arguments = make(mesh, **options)
            compiled = jax.jit(function).lower(*arguments).compile()
            result["memory"] = memory_of(compiled)
            result["bytes_accessed"] = compiled.cost_analysis().get("bytes accessed")
            result["hlo"] = compiled.as_text()
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"[:2000]
        result["seconds"] = time.perf_counter() - started
        print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
