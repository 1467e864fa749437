"""Chooses the tiles of TPU kernels by the compiler's schedules: for a TPU that is not here.

    python -m jaxcomp.kernels.tune --compile-only --topology v5e:1x1 --output tuned.json

For each product, tiles of several widths are compiled for the slice (``offline``), and the bundles
of the final schedule's loops (``schedules``), times how often they run, are its scheduled cycles.
Waits for memory are not in them: of two tiles that read equally well they name the better one, and
what was measured on a TPU counts before them.
"""

import dataclasses
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxcomp.kernels import chips, offline, tune
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.quantized_matmul import layout, weights
from jaxcomp.kernels.quantized_matmul.tpu_tiles import Tile
from jaxcomp.kernels.schedules import Schedule, schedules

_TARGET = "jaxcomp.kernels.tune_compiled:product"
# Loops that multiply use more slots of the matrix unit than this; a few odd ones are in others.
_PRODUCTS = 128


def few_cycles(schedule: Schedule, tile: Tile, n: int, k: int) -> float:
    """Scheduled cycles of a kernel of few rows, for one tile of rows.

    Args:
      schedule: of the kernel.
      tile: that it has.
      n: outputs.
      k: inputs.
    """
    return sum(loop.bundles for loop in schedule.loops) * -(-n // tile.n) * k / tile.k


def dense_cycles(schedule: Schedule, tile: Tile, n: int, times: Sequence[int]) -> float:
    """Scheduled cycles of a kernel of many rows, or of a bf16 one in its tiling.

    Args:
      schedule: of the kernel.
      tile: that it has.
      n: outputs.
      times: for each tile of outputs, how many steps decode a weight and how many find it decoded;
        of bf16, whose steps are all alike, their number alone.

    Returns:
      Cycles; NaN where the compiler has made other loops than the source has.
    """
    parts = [loop for loop in schedule.inner() if loop.used.get("MXU", 0) > _PRODUCTS]
    step = schedule.step().bundles
    if tile.n == tile.columns and not parts:
        # One block of outputs: no loops, but the branches in which they would be.
        parts = [part for part in schedule.regions if part.used.get("MXU", 0) > _PRODUCTS]
        step -= sum(part.bundles for part in parts)
        if not parts:
            return float(step * sum(times) * -(-n // tile.n))
    if len(parts) < len(times):
        times = [count for count in times if count]  # What never runs is not compiled.
    if len(parts) != len(times):
        return float("nan")
    total = sum(times) * step
    for part, count in zip(parts, times, strict=True):
        total += part.bundles * (tile.n // tile.columns) * count
    return float(total * -(-n // tile.n))


def product(mesh, chip: str, width: int, **case):
    """A kernel and the shapes of its operands, as ``offline`` compiles it.

    Args:
      mesh: of the slice; the kernel has one of its devices.
      chip: name of its chip.
      width: outputs of a tile.
      **case: fields of a ``tune.Case``.

    Returns:
      The function, and its arguments.
    """
    case = tune.Case(**case)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    weight = weight_shapes(case)
    operands = jax.ShapeDtypeStruct((case.m, case.k), jnp.bfloat16), weight
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), operands
    )
    _, _, call = tune.tiled(case, chips.BY_NAME[chip], weight)
    return (lambda x, weight: call(width, x, weight)), shapes


def candidates(case: tune.Case, chip: Chip, topology: str, timeout: float = 900) -> dict:
    """Compiles a product with tiles of several widths.

    Args:
      case: weight-only.
      chip: a TPU.
      topology: a slice of it.
      timeout: seconds for all widths.

    Returns:
      "kernel" and "inputs" as of ``tune.tile_ways``; "cycles" and "spills" (registers moved to
      memory and back in a step's loops) by width; "errors" by width of what does not compile.
    """
    kernel, tile, _ = tune.tiled(case, chip, weight_shapes(case))
    widths = [width for width in tune.WIDTHS if width <= max(case.n, tune.WIDTHS[0])]
    found = _compiled(case, chip, topology, kernel, widths, timeout)
    if any(error for _, error in found.values()):
        # Which schedule is whose is certain of one that is alone.
        found = {}
        for width in widths:
            found |= _compiled(case, chip, topology, kernel, [width], timeout)
    cycles, spills, errors = {}, {}, {}
    for width, (schedule, error) in found.items():
        count = error or _cycles(case, dataclasses.replace(tile, n=width), kernel, schedule)
        if error or not count > 0:
            errors[str(width)] = error or "not as many loops as in the source: a grid of one step?"
        else:
            cycles[str(width)] = count
            spills[str(width)] = sum(loop.spills for loop in schedule.loops)
    inputs = tune.inputs_of(chip, kernel, tile)
    return {
        "kernel": kernel, "inputs": inputs, "cycles": cycles, "spills": spills, "errors": errors
    }  # fmt: skip


def _compiled(case, chip, topology, kernel, widths, timeout):
    """Schedule and error of each width, one of them None."""
    fields = dataclasses.asdict(case)
    requests = [(_TARGET, {"chip": chip.name, "width": width, **fields}) for width in widths]
    prefix = "quantized_matmul_dense" if kernel == "dense" else "quantized_matmul"
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        results = offline.compile_cases(topology, requests, folder, timeout)
        read = schedules(folder, f"{prefix}_{case.format}")
    errors = [result["error"] for result in results]
    errors += ["not reached"] * (len(widths) - len(errors))
    if not any(errors) and len(read) != len(widths):
        errors = [f"the compiler wrote {len(read)} schedules, not {len(widths)}"] * len(widths)
    read = read if not any(errors) else [None] * len(widths)
    return dict(zip(widths, zip(read, errors, strict=True), strict=True))


def _cycles(case: tune.Case, tile: Tile, kernel: str, schedule: Schedule) -> float:
    rows = -(-case.m // tile.m)
    if kernel == "dense":
        return dense_cycles(schedule, tile, case.n, [1, rows - 1])
    return rows * few_cycles(schedule, tile, case.n, case.k)


def weight_shapes(case: tune.Case) -> weights.Weight:
    """A prepared weight without its numbers."""
    width = case.k * weights.FORMATS[case.format].bits // 8
    codes = jax.ShapeDtypeStruct((case.n, width), jnp.uint8)
    scales = jax.ShapeDtypeStruct((case.k // case.group_size, case.n), jnp.bfloat16)

    def make(codes, scales):
        return layout.prepare(
            weights.stored(codes, scales, None, None, case.format, case.group_size)
        )

    return jax.eval_shape(make, codes, scales)


def rank(output: str | os.PathLike, topology: str, wanted: Sequence[tune.Case]) -> None:
    """Compiles what the file lacks, and writes its cycles and the best tiles there.

    Args:
      output: the file.
      topology: as "v5e:1x1".
      wanted: from ``tune.cases``; those with activations have no tiles to choose.
    """
    chip = offline.chip_of_topology(topology)
    table = tune.Table(output, chip.name)
    work = [case for case in wanted if case.activation is None]
    table.mine["compiled_with"] = {"jax": jax.__version__, "libtpu": offline.version()}
    for number, case in enumerate(work, 1):
        told = f"[{number}/{len(work)}] {chip.name}: {tune.SCHEDULED}, {case}"
        if table.has("schedules", case):
            print(f"{told}: known", file=sys.stderr)
            continue
        found = candidates(case, chip, topology)
        table.add("schedules", case, **found)
        cycles = found["cycles"]
        parts = [f"{w} {cycles[w]:.0f}" for w in sorted(cycles, key=cycles.get)]
        parts += [f"{w} fails: {e.splitlines()[0][:120]}" for w, e in found["errors"].items()]
        print(f"{told}: {', '.join(parts)}", file=sys.stderr, flush=True)
    tune.choose(table.mine, chip)
    table.write()
