"""The process that compiles: ``python -m jaxcomp.planner.child``, a request on standard input.

The TPU compiler reads its environment once, when it is loaded, and may abort its process on a
program that it cannot take: so it runs beside the one that plans. One line of JSON a program.
"""

import collections
import dataclasses
import json
import re
import sys
import time
from typing import Any

MARK = "plan: "


def main() -> None:
    """Compiles the request's programs one after the other."""
    request = json.load(sys.stdin)
    import jax
    import numpy as np
    from jax.experimental import topologies

    from jaxcomp.planner.steps import Serving, Split, Workload

    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=request["topology"]
        )
        serving = Serving(Workload(**request["workload"]))
    except Exception as error:
        _say({"fatal": f"{type(error).__name__}: {error}"})
        return
    devices = np.array(topology.devices)
    for index, phase, split in request["programs"]:
        split = Split(*split)
        mesh = jax.sharding.Mesh(devices.reshape(split.data, split.model), ("data", "model"))
        started = time.perf_counter()
        found: dict[str, Any] = {"index": index, "phase": phase}
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                found |= measure(*serving.step(phase, split, mesh), serving.weight_shapes())
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
        found["seconds"] = time.perf_counter() - started
        _say(found)


def measure(function: Any, arguments: tuple, choices: tuple, weights: set) -> dict[str, Any]:
    """Compiles a program and reads what the compiler says about it."""
    from jaxcomp.planner import hlo

    started = time.perf_counter()
    lowered = function.lower(*arguments)
    middle = time.perf_counter()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    exchanges = hlo.collectives(text)
    sent: collections.Counter = collections.Counter()
    for one in exchanges:
        sent[one.kind] += one.sent
    gathers = [c for c in exchanges if c.kind == "all-gather"]
    largest = max(gathers, key=lambda c: c.nbytes, default=None)
    whole = hlo.whole_weights(exchanges, weights)
    ran = collections.Counter(choice.implementation for choice in choices)
    return {
        "lower_seconds": middle - started,
        "compile_seconds": time.perf_counter() - middle,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "sent": dict(sent),
        "largest_gather": None if largest is None else dataclasses.asdict(largest),
        "whole_weight_gathers": [dataclasses.asdict(c) for c in whole],
        "implementations": dict(ran),
        "reasons": sorted({re.sub(r"\s+", " ", c.reason) for c in choices}),
    }


def _say(value: dict[str, Any]) -> None:
    print(MARK + json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
