"""Compiles functions for an H100 that is not here, with CUDA's own assembler.

The compiler's dumps are asked for by variables that are read once, so each request runs in a fresh
process:

    python -m tests.kernels.aot_gpu '{"cases": [["module:function", {..}], ..]}'

``module:function(**options)`` returns a function and its arguments as ShapeDtypeStructs.
"""

import importlib
import json
import os
import pathlib
import re
import sys
import tempfile
import time

from jaxcomp.kernels import offline

from jaxcomp.planner import cuda
from jaxcomp.planner.cuda import H100, available

__all__ = ["available", "compile_cases"]

ROOT = pathlib.Path(__file__).parents[2]


def environment(dump: pathlib.Path) -> dict[str, str]:
    """Variables of a process that compiles, and writes PTX and the assembler's report."""
    return cuda.environment() | {
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_TO": str(dump),
    }


def compile_cases(
    cases: list[tuple[str, dict]], timeout: float = 900, dump: pathlib.Path | None = None
) -> list[dict]:
    """Compiles cases for an H100 in one new process.

    Args:
      cases: ("module:function", options) each.
      timeout: seconds for all of them.
      dump: a folder that keeps PTX and reports, or None for a temporary one.

    Returns:
      For each case a dict: "error" (None or the message), "seconds", "kernels" (what the assembler
      reports of each Mosaic kernel: "registers", "stack", "spill_stores", "spill_loads",
      "warnings"), "memory" (bytes of arguments, outputs and temporaries) and "hlo" (the compiled
      program's text). A case that aborts the process ends the list with an error.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary if dump is None else dump)
        folder.mkdir(parents=True, exist_ok=True)
        request = {"cases": cases}
        return offline.replies("tests.kernels.aot_gpu", request, environment(folder), ROOT, timeout)


def reports(folder: pathlib.Path, since: float) -> list[dict]:
    """What the assembler said of the kernels that it made since a time."""
    found = []
    for path in sorted(folder.rglob("*.ptxas"), key=os.path.getmtime):
        text = path.read_text()
        if path.stat().st_mtime < since or "registers" not in text:
            continue
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", text)
        stack, stores, loads = map(int, spills.groups()) if spills else (0, 0, 0)
        used = re.search(r"Used (\d+) registers", text)
        warnings = [x.strip() for x in text.splitlines() if "warning" in x.lower()]
        found.append(
            {
                "registers": int(used.group(1)) if used else None,
                "stack": stack,
                "spill_stores": stores,
                "spill_loads": loads,
                "warnings": warnings,
            }
        )
    return found


def main() -> None:
    """Compiles what is asked for on the command line; one line a case."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    request = json.loads(sys.argv[1])
    dump = pathlib.Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
    )
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("device",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for target, options in request["cases"]:
        started, since = time.perf_counter(), time.time()
        result: dict = {"error": None}
        try:
            module, _, name = target.partition(":")
            function, arguments = getattr(importlib.import_module(module), name)(**options)
            arguments = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), arguments
            )
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                compiled = jax.jit(function).lower(*arguments).compile()
            result["memory"] = offline.memory_of(compiled)
            result["hlo"] = compiled.as_text()
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"[:4000]
        result["kernels"] = reports(dump, since)
        result["seconds"] = time.perf_counter() - started
        print(offline.MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
