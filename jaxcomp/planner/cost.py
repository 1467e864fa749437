"""How many bytes a compiled program moves, by XLA's own count.

XLA adds up the operands and results of every operation, of a slice what is read of it: also those
that a TPU keeps on the chip from one operation to the next, so this is more than what goes to and
from memory. It counts the body of a loop once, and a scanned model is a loop: each further trip is
added here. Of a kernel it knows what the kernel says of itself, its ``cost_estimate``.
"""

import re
from typing import Any

import jax

from jaxcomp.planner import hlo

_ESTIMATE = re.compile(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"')


def accessed(compiled: Any) -> int | None:
    """Bytes that a program's operations read and write in one run, on one device.

    Args:
      compiled: what ``lower(..).compile()`` returned, for any device.

    Returns:
      The bytes, or None where the compiler does not count or its text is not understood.

    Example:
      >>> x = jax.numpy.zeros(16, "float32")
      >>> accessed(jax.jit(lambda x: x + 1).lower(x).compile())
      128
    """
    found = compiled.cost_analysis()
    found = found[0] if isinstance(found, list) else found
    once = (found or {}).get("bytes accessed")
    if once is None:
        return None
    text = compiled.as_text()
    bodies, entry = hlo.computations(text)
    try:
        return round(once + _further(text, bodies, entry, {}))
    except (ImportError, AttributeError, RuntimeError, ValueError):
        return None  # The names below are JAX's own.


def _further(text: str, bodies: dict[str, list[str]], name: str, counted: dict) -> float:
    """What a run of a computation moves beyond what XLA counts for it."""
    total = 0.0
    for line in bodies.get(name, ()):
        for other in hlo.called(line):
            further = _further(text, bodies, other, counted)
            if hlo.is_loop(line):
                trips = hlo.trips(line, bodies)
                if other not in counted:
                    counted[other] = _once(text, other) + _kernels(bodies, other)
                total += (trips - 1) * counted[other] + trips * further
            else:
                total += further
    return total


def _kernels(bodies: dict[str, list[str]], name: str) -> int:
    """What the kernels of a computation move by their own estimates, of a loop once."""
    total = 0
    for line in bodies.get(name, ()):
        found = _ESTIMATE.search(line)
        total += int(found[1]) if found else 0
        total += sum(_kernels(bodies, other) for other in hlo.called(line))
    return total


def _once(text: str, name: str) -> float:
    """XLA's count for one computation of a module, made the module's entry."""
    from jaxlib import _hlo, _jax

    _, *lines = text.splitlines()
    for i, line in enumerate(lines):
        found = hlo.computation(line)
        if found is not None:
            lines[i] = ("ENTRY " if found == name else "") + line.removeprefix("ENTRY ")
    module = _hlo.hlo_module_from_text("\n".join(["HloModule counted", *lines]))
    # The properties of the CPU's client do not matter: shapes alone are counted.
    return _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)["bytes accessed"]
