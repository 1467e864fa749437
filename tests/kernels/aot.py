"""Compiles functions for TPUs that are not here, with the real compiler, in processes of their own.

A type that the compiler does not know can abort its process, and its dumps are asked for by flags
that are read once: so each request runs in a fresh process.

    python -m tests.kernels.aot '{"topology": "v5e:2x4", "cases": [["module:function", {..}], ..]}'

``module:function(mesh, **options)`` returns a function and its arguments as ShapeDtypeStructs with
shardings on that mesh.
"""

import functools
import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

TOPOLOGIES = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4", "7x": "tpu7x:2x2x1"}
ROOT = pathlib.Path(__file__).parents[2]
MARK = "aot result: "


# `make test` installs the compiler there: among the packages, every process would look for a TPU.
BESIDE = pathlib.Path(sys.prefix) / "tpu"


@functools.cache
def available() -> bool:
    """Whether the TPU compiler is installed."""
    return (BESIDE / "libtpu").is_dir() or importlib.util.find_spec("libtpu") is not None


def environment(dump: pathlib.Path | None = None) -> dict[str, str]:
    """Variables of a process that compiles, and writes final schedules if asked."""
    variables = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
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
    chip: str, cases: list[tuple[str, dict]], dump: pathlib.Path | None = None, timeout: float = 900
) -> list[dict]:
    """Compiles cases for a chip in one new process.

    Args:
      chip: a key of ``TOPOLOGIES``.
      cases: ("module:function", options) each.
      dump: a folder for the compiler's schedules, or None.
      timeout: seconds for all of them.

    Returns:
      For each case a dict: "error" (None or the message), "seconds", "memory" (bytes a device:
      arguments, outputs, temporaries), "bytes_accessed", "hlo" (the compiled program's text). A
      case that aborts the compiler ends the list early, with that as its error.
    """
    request = json.dumps({"topology": TOPOLOGIES[chip], "cases": cases})
    command = [sys.executable, "-m", "tests.kernels.aot", request]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment(dump), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith(MARK)]
    results = [json.loads(x.removeprefix(MARK)) for x in lines]
    if len(results) < len(cases):
        told = done.stderr.strip()[-2000:]
        results.append({"error": f"the compiler ended with {done.returncode}: {told}"})
    return results


def main() -> None:
    """Compiles what is asked for on the command line; one line a case."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    request = json.loads(sys.argv[1])
    topology = topologies.get_topology_desc(platform="tpu", topology_name=request["topology"])
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
            memory = compiled.memory_analysis()
            result["memory"] = {
                "arguments": memory.argument_size_in_bytes,
                "outputs": memory.output_size_in_bytes,
                "temporaries": memory.temp_size_in_bytes,
            }
            result["bytes_accessed"] = compiled.cost_analysis().get("bytes accessed")
            result["hlo"] = compiled.as_text()
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"[:2000]
        result["seconds"] = time.perf_counter() - started
        print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
