"""Measures products on the device at hand and writes the table that they are chosen by.

    python -m jaxcomp.kernels.tune --output tuned.json
    JAXCOMP_TUNING=tuned.json python my_program.py

For each shape and format: the kernel with its table's tiles against XLA's forms, and on TPUs other
tiles too. On a CPU, where kernels are only interpreted, XLA's forms alone. Every measurement is
written as soon as it is there: stop it at any time, and the same command goes on. Without a TPU,
``--compile-only --topology v5e:1x1`` chooses tiles by the compiler's schedules (``tune_compiled``).
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxcomp.kernels import chips, offline, tuning
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.quantized_matmul import api, reference, tpu_tiles, weights
from jaxcomp.kernels.quantized_matmul.weights import Weight
from jaxcomp.kernels.tune_cases import DTYPES, Case, cases

WIDTHS = (256, 512, 1024)
# What marks tiles of a table that were chosen by the compiler's schedules.
SCHEDULED = "scheduled cycles"


def ways(case: Case, chip: Chip) -> dict[str, Callable[[], jax.Array]]:
    """Every way to compute a product, ready to be timed.

    Args:
      case: what to compute, of random numbers.
      chip: whose kernel to take.

    Returns:
      Name as in ``tuning.fastest``, and "dense" for the product of a weight that is not compressed
      -> a function of no arguments.
    """
    dtype = jnp.float32 if chip.platform == "cpu" else jnp.bfloat16
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (case.m, case.k), dtype)
    width = case.k * weights.FORMATS[case.format].bits // 8
    codes = jax.random.bits(keys[1], (case.n, width), jnp.uint8)
    if case.format == "fp8":
        codes = codes & 0x77  # no NaN
    scales = jax.random.uniform(keys[2], (case.k // case.group_size, case.n), minval=0.5)
    weight = weights.stored(codes, scales, None, None, case.format, case.group_size)
    dense = jax.random.normal(keys[2], (case.n, case.k), dtype)
    name = DTYPES.get(case.activation)
    options = reference.Options(None, name, "float32")
    found = {"dense": (lambda x, w: x @ w.T, dense)}
    if name is None:
        found["xla"] = (lambda x, w: reference.matmul(x, w, None, options), weight)
    else:
        found["codes"] = (functools.partial(_codes, dtype=name), weight)
        found["floats"] = (functools.partial(_floats, dtype=name), weight)
    kernel = {"tpu": "mosaic_tpu", "gpu": "mosaic_gpu"}.get(chip.platform)
    if kernel is not None:
        prepared = api.prepare(codes, scales, format=case.format, group_size=case.group_size)

        # As dispatch asks for it: the kernel for GPUs rounds on its way out.
        out_dtype = jnp.float32 if chip.platform == "tpu" else dtype

        def call(x, w):
            return api.quantized_matmul(
                x, w, activation_dtype=name, out_dtype=out_dtype, implementation=kernel
            )

        found["kernel"] = (call, prepared)
    return {
        name: functools.partial(jax.jit(function), x, operand)
        for name, (function, operand) in found.items()
    }


def _codes(x: jax.Array, weight: Weight, dtype: str) -> jax.Array:
    """The product of codes, as XLA computes it at its best."""
    rows, row_scales = reference.quantize_rows(x, dtype)
    codes = weights.unpack(weight.codes, weight.format)
    sums = {"preferred_element_type": jnp.int32}
    if dtype != "int8":
        sums = {"precision": jax.lax.Precision.HIGHEST}
        rows, codes = rows.astype(jnp.float32), codes.astype(jnp.float32)
    if len(weight.scales) == 1:
        dot = jax.lax.dot_general(rows, codes, (((1,), (1,)), ((), ())), **sums)
        return dot * weight.scales * row_scales
    groups = [weights.grouped(a, weight) for a in (rows, codes)]
    dot = jax.lax.dot_general(*groups, (((2,), (2,)), ((1,), (1,))), **sums)
    return (dot * weight.scales[:, None]).sum(0) * row_scales


def _floats(x: jax.Array, weight: Weight, dtype: str) -> jax.Array:
    """The product of what the codes stand for."""
    rows, row_scales = reference.quantize_rows(x, dtype)
    return (rows.astype(jnp.float32) * row_scales) @ weights.dequantize(weight).T


def timed(
    functions: Mapping[str, Callable[[], jax.Array]],
    rounds: int = 7,
    timer: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds that each function takes: the least of some rounds in which they take turns.

    Whatever else a machine does only adds to a time. A function that fails is left out: a kernel
    may not take a shape, or not fit into memory.

    Args:
      functions: by name.
      rounds: turns of each.
      timer: seconds that have passed.

    Returns:
      Seconds by name.
    """
    running, least = dict(functions), {}
    for turn in range(rounds + 1):  # The first compiles.
        for name, function in list(running.items()):
            started = timer()
            try:
                jax.block_until_ready(function())
            except Exception as error:
                print(f"  {name}: {str(error).splitlines()[0][:200]}", file=sys.stderr)
                running.pop(name)
                least.pop(name, None)
                continue
            taken = timer() - started
            if turn:
                least[name] = min(least.get(name, taken), taken)
    return least


def tile_ways(case: Case, chip: Chip) -> tuple[str, int, dict[str, Callable[[], jax.Array]]]:
    """A weight-only product on a TPU with tiles of several widths.

    Args:
      case: without an activation.
      chip: a TPU.

    Returns:
      Which kernel ("few" or "dense") has it, up to how many inputs its entry in the table counts,
      and functions by width.
    """
    x = jnp.ones((case.m, case.k), jnp.bfloat16)
    codes = jnp.zeros((case.n, case.k * weights.FORMATS[case.format].bits // 8), jnp.uint8)
    scales = jnp.ones((case.k // case.group_size, case.n))
    weight = api.prepare(codes, scales, format=case.format, group_size=case.group_size)
    kernel, tile, call = tiled(case, chip, weight)
    functions = {
        str(width): functools.partial(jax.jit(functools.partial(call, width)), x, weight)
        for width in WIDTHS
    }
    return kernel, inputs_of(chip, kernel, tile), functions


def tiled(case: Case, chip: Chip, weight: Weight) -> tuple[str, tpu_tiles.Tile, Callable]:
    """The kernel that a TPU has for a weight-only product, with tiles of any width.

    Args:
      case: without an activation.
      chip: a TPU.
      weight: prepared; shapes suffice.

    Returns:
      "few" or "dense"; its tile; and the product, (width of the tile, x, weight) -> y.
    """
    from jaxcomp.kernels.quantized_matmul import tpu, tpu_dense

    options = reference.Options(None, None, "bfloat16")
    tile = tpu_tiles.dense(chip.name, case.m, case.n, case.k, chip.mxu)
    many = tpu.many_rows(case.m, jnp.bfloat16, weight, chip, options)
    kernel = "dense" if tile and many else "few"
    if kernel == "few":
        how = tpu.arithmetic(chip, jnp.bfloat16, weight, options)
        tile = tpu.tile_of(chip, case.m, weight, how)

    def call(width, x, weight):
        own = dataclasses.replace(tile, n=width)
        if kernel == "dense":
            return tpu_dense.matmul(x, weight, None, options, chip, False, own)
        return tpu.matmul(x, weight, None, options, chip, tile=own)

    return kernel, tile, call


def inputs_of(chip: Chip, kernel: str, tile: tpu_tiles.Tile) -> int:
    """Up to how many inputs the entry of a tile counts in a kernel's table."""
    entries = tpu_tiles.table(chip.name, kernel)["outputs"]
    return next((inputs for inputs, _ in entries if tile.k <= inputs), entries[-1][0])


def best_tiles(measured: Sequence[dict], chip: Chip) -> dict[str, dict]:
    """The tiles of a chip's kernels by what was measured; others stay as they are.

    Args:
      measured: entries with "kernel", "inputs" and "seconds" by width.
      chip: whose table to change.

    Returns:
      Kernel -> its entry, as in ``tpu_tiles.json``.
    """
    found = {}
    for kernel in sorted({entry["kernel"] for entry in measured}):
        table = dict(tpu_tiles.table(chip.name, kernel))
        table.pop("source", None)
        outputs = []
        for inputs, width in table["outputs"]:
            mine = [
                e["seconds"]
                for e in measured
                if (e["kernel"], e["inputs"]) == (kernel, inputs) and e["seconds"]
            ]
            # Relative to each product's best, so that large ones do not decide for all.
            losses = {
                w: sum(s[w] / min(s.values()) for s in mine)
                for w in (str(w) for w in WIDTHS)
                if mine and all(w in s for s in mine)
            }
            outputs.append([inputs, int(min(losses, key=losses.get)) if losses else width])
        found[kernel] = {**table, "outputs": outputs}
    return found


def choose(mine: dict, chip: Chip) -> None:
    """Puts the best tiles among a device's entries: what was measured counts before schedules.

    Args:
      mine: what a table has of the device.
      chip: the device.
    """
    scheduled = [{**entry, "seconds": entry["cycles"]} for entry in mine.get("schedules", ())]
    tiles = {k: {**t, "source": SCHEDULED} for k, t in best_tiles(scheduled, chip).items()}
    tiles |= best_tiles(mine.get("widths", ()), chip)
    if tiles:
        mine["tiles"] = tiles


class Table:
    """The file that is written, one measurement after another.

    Args:
      path: of the file; what it holds already is kept.
      device: name of the device that is measured.
    """

    def __init__(self, path: str | os.PathLike, device: str):
        self.path = pathlib.Path(path)
        self.devices = tuning.read(self.path) if self.path.exists() else {}
        self.mine = self.devices.setdefault(device, {})

    def has(self, kind: str, case: Case) -> bool:
        """Whether a case was measured already."""
        wanted = dataclasses.asdict(case)
        return any(wanted.items() <= entry.items() for entry in self.mine.get(kind, ()))

    def add(self, kind: str, case: Case, **what) -> None:
        """Writes a measurement; a program that is stopped leaves the old file or the new one."""
        self.mine.setdefault(kind, []).append({**dataclasses.asdict(case), **what})
        self.write()

    def write(self) -> None:
        """Writes the file."""
        text = json.dumps({"version": tuning.VERSION, "devices": self.devices}, indent=1)
        beside = self.path.with_name(self.path.name + ".new")
        beside.write_text(text + "\n")
        os.replace(beside, self.path)


def tune(
    output: str | os.PathLike,
    chip: Chip,
    wanted: Sequence[Case],
    rounds: int = 7,
    timer: Callable[[], float] = time.perf_counter,
) -> None:
    """Measures what the file lacks, and writes it there.

    Args:
      output: the file.
      chip: the chip at hand.
      wanted: from ``cases``.
      rounds: turns of each way.
      timer: seconds that have passed.
    """
    device = chip.name
    table = Table(output, device)
    table.mine["versions"] = {"jax": jax.__version__, "jaxlib": jax.lib.__version__}
    work = [("products", case) for case in wanted]
    if chip.platform == "tpu":
        work += [("widths", case) for case in wanted if case.activation is None]
    for number, (kind, case) in enumerate(work, 1):
        told = f"[{number}/{len(work)}] {device}: {kind}, {case}"
        if table.has(kind, case):
            print(f"{told}: known", file=sys.stderr)
            continue
        more = {}
        if kind == "products":
            functions = ways(case, chip)
        else:
            kernel, inputs, functions = tile_ways(case, chip)
            more = {"kernel": kernel, "inputs": inputs}
        seconds = timed(functions, rounds, timer)
        table.add(kind, case, **more, seconds=seconds)
        order = sorted(seconds, key=seconds.get)
        print(
            f"{told}: " + ", ".join(f"{n} {seconds[n] * 1e6:.1f} us" for n in order),
            file=sys.stderr,
            flush=True,
        )
    choose(table.mine, chip)
    table.write()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 130 where it was stopped, and 2 where it cannot measure or compile."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxcomp.kernels.tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="choose the tiles of a TPU that is not here: those with the fewest cycles in the "
        "compiler's schedule (waits for memory are not in it); needs libtpu, and --topology",
    )
    parser.add_argument(
        "--topology", help="with --compile-only: for what it compiles, as v5e:1x1 or tpu7x:2x2x1"
    )
    parser.add_argument(
        "--output",
        default=os.environ.get(tuning.VARIABLE, "tuned.json"),
        help=f"file to write or go on with (default: ${tuning.VARIABLE}, or tuned.json)",
    )
    parser.add_argument("--shapes", help="rows x outputs x inputs, as 16x4096x4096,256x4096x4096")
    parser.add_argument("--formats", help=f"of {', '.join(weights.FORMATS)}, with commas")
    parser.add_argument("--group-size", type=int, default=128, help="of formats below 8 bits")
    parser.add_argument("--rounds", type=int, default=7, help="turns, of which the fastest counts")
    given = parser.parse_args(arguments)
    formats = given.formats.split(",") if given.formats else None
    for name in formats or ():
        if name not in weights.FORMATS:
            parser.error(f"format {name!r} is unknown; use {', '.join(weights.FORMATS)}")
    shapes = None
    if given.shapes:
        try:
            shapes = [tuple(map(int, shape.split("x"))) for shape in given.shapes.split(",")]
            if any(len(shape) != 3 for shape in shapes):
                raise ValueError
        except ValueError:
            parser.error(f"--shapes {given.shapes!r} must be as 16x4096x4096,256x4096x4096")
    if given.compile_only != bool(given.topology):
        parser.error("--compile-only and --topology, as in v5e:1x1, go together")
    if given.compile_only and not offline.available():
        print(offline.MISSING, file=sys.stderr)
        return 2
    try:
        chip = offline.chip_of_topology(given.topology) if given.topology else chips.chip_of()
    except ValueError as error:
        parser.error(str(error))
    if chip is None:
        print(f"no kernel knows {jax.devices()[0].device_kind}", file=sys.stderr)
        return 2
    wanted = cases(chip, formats, shapes, given.group_size)
    try:
        if given.compile_only:
            from jaxcomp.kernels import tune_compiled

            tune_compiled.rank(given.output, given.topology, wanted)
        else:
            tune(given.output, chip, wanted, given.rounds)
    except KeyboardInterrupt:
        print(f"stopped; {given.output} has what is done: run it again", file=sys.stderr)
        return 130
    print(f"{tuning.VARIABLE}={given.output} makes programs choose by it", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
