"""The process that compiles: ``python -m jaxcomp.planner.child``.

The TPU compiler reads its environment once, when it is loaded, and may abort its process on a
program that it cannot take: so it runs beside the one that plans. It reads one line of JSON that
says what is served and on which devices, then one a program, and answers each with one line.
"""

import collections
import dataclasses
import functools
import json
import sys
import time
from typing import Any

MARK = "plan: "


def main() -> None:
    """Answers until standard input ends."""
    request = json.loads(sys.stdin.readline())
    import jax
    import numpy as np
    from jax.experimental import topologies

    from jaxcomp.planner.steps import AXES, Serving, Split, Workload

    try:
        topology = topologies.get_topology_desc(**request["topology"])
    except Exception as error:
        _say({"error": f"{type(error).__name__}: {error}"})
        return
    _say({"devices": len(topology.devices), "version": _version(request["topology"]["platform"])})
    devices = np.array(topology.devices)
    served = functools.cache(lambda name: Serving(Workload(**request["workloads"][name])))
    for line in sys.stdin:
        program = json.loads(line)
        split = Split(*program["split"])
        mesh = jax.sharding.Mesh(devices.reshape(split.shape), AXES)
        started, used = time.perf_counter(), time.process_time()
        try:
            serving = served(program["workload"])
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                cached = serving.layer_cache(split, program["phase"])
                found = measure(*serving.step(program["phase"], split, mesh), serving, cached)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        found["seconds"] = time.perf_counter() - started
        found["cpu_seconds"] = time.process_time() - used
        _say(found)


def measure(
    function: Any, arguments: tuple, choices: tuple, serving: Any, cached: tuple[int, ...]
) -> dict[str, Any]:
    """Compiles a program and reads what the compiler says about it.

    Args:
      function: what ``jax.jit`` returned.
      arguments: shapes with shardings.
      choices: of the implementations at compressed weights.
      serving: whose weights no all-gather should put together.
      cached: shape of the keys that one layer keeps on a device if it has all positions.

    Returns:
      Values that JSON can hold; bytes are those of one device.
    """
    from jaxcomp.choice import IMPLEMENTATIONS
    from jaxcomp.planner import cost, hlo

    compiled = function.lower(*arguments).compile()
    memory = compiled.memory_analysis()
    exchanges = hlo.collectives(compiled.as_text())
    sent: collections.Counter[str] = collections.Counter()
    for one in exchanges:
        sent[one.kind] += round(one.sent)
    gathers = [c for c in exchanges if c.kind == "all-gather"]
    largest = max(gathers, key=lambda c: c.nbytes, default=None)
    whole = hlo.whole_weights(exchanges, serving.weight_shapes())
    of_weights = [c for c in choices if c.implementation in IMPLEMENTATIONS]
    attention = (
        f"{c.kind}: {c.implementation}: {c.reason}" for c in choices if c not in of_weights
    )
    integer = {c.path for c in choices if c.implementation in ("int8", "kernel")}
    return {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "accessed": cost.accessed(compiled),
        "sent": dict(sent),
        "largest_gather": None if largest is None else dataclasses.asdict(largest),
        "whole_weight_gathers": [dataclasses.asdict(c) for c in whole],
        "cache_gathered": round(sum(c.sent for c in hlo.whole_weights(exchanges, [cached]))),
        "implementations": dict(collections.Counter(c.implementation for c in of_weights)),
        "integer": sorted(integer & serving.integer_weights),
        "reasons": sorted({*(f"{c.implementation}: {c.reason}" for c in of_weights), *attention}),
    }


def _version(platform: str) -> str:
    import importlib.metadata

    import jax

    package = "libtpu" if platform == "tpu" else "jax-cuda13-plugin"
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = "of unknown version"
    return f"jax {jax.__version__}, {package} {found}"


def _say(value: dict[str, Any]) -> None:
    print(MARK + json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
