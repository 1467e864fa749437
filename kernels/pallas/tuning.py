"""What was measured on devices: which of several ways to compute a product is the fastest there.

A table is JSON, as ``python -m jaxcomp.kernels.tune`` writes it:

    {"version": 1, "devices": {"cpu": {"products": [
        {"format": "int8", "activation": "int8", "m": 4096, "n": 768, "k": 256, "group_size": 256,
         "seconds": {"codes": 0.011, "floats": 0.009, "dense": 0.008}}, ..],
      "tiles": {"few": {..}}}}}

"products" are those of one weight. ``python -m benchmarks.gpu --table`` adds in the same form
"sparse" ones, whose format is "2:4", "2:4 int4" or "blocks" (with the "density" of those), and
those of "experts", whose m counts the rows of all.

``--compile-only`` adds "schedules" of TPUs that are not here, with "cycles" by width of a tile;
what they choose in "tiles" says so by its "source".

The library brings ``tuned.json``. Entries of the file that the environment variable
``JAXCOMP_TUNING`` names come before its own; that file is read once.
"""

import functools
import json
import math
import os
import pathlib

VARIABLE = "JAXCOMP_TUNING"
VERSION = 1


def read(path: str | os.PathLike) -> dict:
    """A table's devices.

    Args:
      path: of the file.

    Returns:
      Device name -> {"products": [..], "tiles": {..}}.

    Raises:
      ValueError: the file is no table, or one of another version.
    """
    try:
        found = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: not a table of measurements ({error}); make one with "
            f"python -m jaxcomp.kernels.tune, or unset {VARIABLE}"
        ) from error
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        raise ValueError(
            f"{path}: a table of version {version}, and this library reads {VERSION}; make it "
            "again with python -m jaxcomp.kernels.tune"
        )
    return found["devices"]


@functools.cache
def _cached(path: str) -> dict:
    return read(path)


def _tables() -> list[dict]:
    """The user's table, then the library's."""
    own = os.environ.get(VARIABLE)
    shipped = _cached(str(pathlib.Path(__file__).with_name("tuned.json")))
    return [_cached(own), shipped] if own else [shipped]


def fastest(
    device: str,
    format: str,
    activation: str | None,
    shape: tuple[int, int, int],
    group_size: int,
    ways: tuple[str, ...],
    kind: str = "products",
    density: float = 1.0,
) -> str | None:
    """Which of several ways to compute a product was measured to be the fastest.

    Args:
      device: name of the chip, as "cpu".
      format: of the weight, as "int4"; where it was not measured another one tells.
      activation: what the input is quantized to ("int8", "e4m3"), or None.
      shape: (rows, outputs, inputs); the measurement nearest to it counts.
      group_size: inputs that share a scale. Whole rows and groups are not told from one another.
      ways: names to choose from: "codes" (a product of codes), "floats" (of what they stand for),
        "kernel", "xla".
      kind: of products, a key of a device's entries. Only among "products" may another format tell.
      density: share of a weight that is stored in blocks. A kernel's time goes down with it and
        that of a dense product does not: measurements of sparser weights say nothing.

    Returns:
      One of the names, or None where nothing was measured.
    """
    for table in _tables():
        known = [
            entry
            for entry in table.get(device, {}).get(kind, ())
            if entry["activation"] == activation and set(ways) <= set(entry["seconds"])
            if entry.get("density", 1.0) >= density
        ]
        whole = group_size == shape[2]
        known = [e for e in known if (e["group_size"] == e["k"]) == whole]
        same = [e for e in known if e["format"] == format]
        known = same or (known if kind == "products" else [])
        if known:
            nearest = min(known, key=lambda entry: _distance(entry, shape))
            return min(ways, key=nearest["seconds"].get)
    return None


def _distance(entry: dict, shape: tuple[int, int, int]) -> float:
    pairs = zip((entry[axis] for axis in "mnk"), shape, strict=True)
    return sum(abs(math.log(max(a, 1) / max(b, 1))) for a, b in pairs)


def unproven(
    device: str,
    format: str,
    activation: str | None,
    shape: tuple[int, int, int],
    group_size: int,
    ways: tuple[str, str],
    kind: str = "products",
    density: float = 1.0,
) -> str | None:
    """Why a kernel that was not run here before is not chosen: no measurement speaks for it.

    Args:
      device: as in ``fastest``, like all that follow.
      format: of the weight.
      activation: what the input is quantized to, or None.
      shape: (rows, outputs, inputs).
      group_size: inputs that share a scale.
      ways: "kernel", and what XLA's way is called.
      kind: of products.
      density: share of a weight that is stored in blocks.

    Returns:
      The reason, or None where the kernel was measured to be faster.
    """
    found = fastest(device, format, activation, shape, group_size, ways, kind, density)
    if found is None:
        command = "jaxcomp.kernels.tune" if kind == "products" else "benchmarks.gpu --table FILE"
        return (
            f"no measurement on {device} says that it is faster than XLA; ask for it by name, or "
            f"measure with python -m {command}"
        )
    return None if found == "kernel" else f"XLA was measured to be faster on {device}"


def tiles(device: str, kernel: str) -> dict | None:
    """Sizes of a kernel's tiles that were measured on a device, or None."""
    for table in _tables():
        found = table.get(device, {}).get("tiles", {}).get(kernel)
        if found is not None:
            return found
    return None
