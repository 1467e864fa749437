"""What is counted of sparse attention's schedules, beside jax's own splash attention.

A step of the grid is one block of queries and keys: bundles that every step has, and regions for
the first block of a row, for what the mask leaves of a block, for the block, and for the last. So a
mask's list of blocks says how often each runs. Copies that a step may skip are counted at every
step.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxcomp.kernels import chips, pieces
from jaxcomp.kernels.schedules import Bundles, Schedule
from jaxcomp.kernels.sparse_attention import schedule as listed
from jaxcomp.kernels.sparse_attention import tpu, tpu_decode, tpu_walk
from jaxcomp.kernels.sparse_attention.tpu_decode_kernel import columns_at_once

from benchmarks.tpu_cases import Case
from tests.kernels.sparse_attention import programs

# So many heads that the arrays are in HBM, not in vector memory, as in a model.
HEADS, LENGTH, DIM = 32, 16384, 128
# Decoding has Llama-3-8B's heads.
KV_HEADS, GROUP, CAPACITY, BATCH = 8, 4, 16384, 8
_MODULE = "tests.kernels.sparse_attention.programs"
# Operands whose gradient needs a kernel.
GRADIENTS = {"forward": "", "dq": "q", "dkv": "kv"}
# A block's products have more slots of the matrix unit than this; nothing else has.
PRODUCTS = 64


def blocks(schedule: Schedule) -> list[Bundles]:
    """The regions that compute a block, in the order of the source."""
    return [region for region in schedule.regions if region.used.get("MXU", 0) > PRODUCTS]


def _own_blocks(schedule: Schedule) -> list[Bundles]:
    """Those of our kernels, which may hold branches and loops.

    Of decoding one block that is full, and one in which a cache ends.
    """
    return [region for region in schedule.outer if region.used.get("MXU", 0) > PRODUCTS]


def total(
    schedule: Schedule,
    regions: list[Bundles],
    steps: int,
    rows: int,
    computed: list[int],
    limited: Sequence[int] = (),
    trips: tuple[int, int, int] = (1, 1, 1),
) -> float:
    """Scheduled cycles of all steps.

    Args:
      schedule: of a kernel over blocks.
      regions: of it, of which some compute a block.
      steps: of the grid.
      rows: how often a result begins and ends.
      computed: how often each region that computes a block runs.
      limited: how often each region runs that writes what is masked.
      trips: of the loops that regions are, where they are more than one: of those that begin or end
        a result, that write what is masked, and that compute.

    Returns:
      Their number; NaN where the schedule has other regions than the source.
    """
    places = [i for i, region in enumerate(regions) if region.used.get("MXU", 0) > PRODUCTS]
    first, last = places[0] - len(limited) - 1, places[-1]
    if len(places) != len(computed) or first < 0 or last + 1 == len(regions):
        return float("nan")
    # Each of the source's branches: its region, how often it runs, and its loop's trips.
    edge, limit, compute = trips
    taken = [(regions[first], rows, edge)]
    between = regions[first + 1 : places[0]]
    taken += [(region, n, limit) for region, n in zip(between, limited, strict=True)]
    taken += [(regions[i], n, compute) for i, n in zip(places, computed, strict=True)]
    taken.append((regions[last + 1], rows, edge))
    loops = schedule.inner()
    if len(loops) != sum(again > 1 for _, _, again in taken):
        return float("nan")
    skipped = sum(region.bundles for region, _, _ in taken) - sum(loop.bundles for loop in loops)
    cycles = (schedule.step().bundles - skipped) * steps
    for region, count, again in taken:
        more = loops.pop(0).bundles * (again - 1) if again > 1 else 0
        cycles += (region.bundles + more) * count
    return cycles


def _config(mask: str) -> tpu_walk.Config:
    """The blocks that the kernel chooses, and all else that it knows."""
    x = jax.ShapeDtypeStruct((1, LENGTH, HEADS, DIM), jnp.bfloat16)
    block_q, block_k = tpu.fitting_blocks(x, x, programs.MASKS[mask])[0]
    sizes = {"queries": LENGTH, "keys": LENGTH, "block_q": block_q, "block_k": block_k}
    return tpu_walk.Config(
        programs.MASKS[mask], HEADS, HEADS, **sizes, scale=1.0, soft_cap=None, ramp=1.0,
        interpret=False,
    )  # fmt: skip


def _own(
    schedule: Schedule, chip: chips.Chip, mask: str, kernel: str, segments: bool = False
) -> float:
    config = dataclasses.replace(_config(mask), wide=chip.mxu > tpu_walk.LANES)
    steps = config.blocks.columns(config.group) if kernel == "dkv" else config.blocks.rows
    if kernel == "forward":
        walk = tpu_walk.Walk(config, steps, True, together=config.together)
    else:
        walk = tpu_walk.gradient_walk(config, kernel != "dkv", DIM * 2)
    turns = HEADS // walk.wide(0)
    counts = collections.Counter(steps.code.reshape(-1).tolist())
    # Of segments a full block, too, writes what is masked.
    lowest = listed.FULL + (not segments)
    limited = [counts[code] * turns for code in sorted(counts) if code >= lowest]
    full = 0 if segments else counts[listed.FULL]
    computed = [full * turns] if full else []
    computed += [sum(limited)] if limited else []
    results = config.blocks.column_blocks if kernel == "dkv" else config.blocks.row_blocks
    pairs = walk.sizes[walk.by_rows] // walk.tile[1]
    trips = (walk.results, pairs * walk.parts, pairs * walk.turns)
    counts = steps.count * turns, results * turns, computed, limited, trips
    return total(schedule, schedule.outer, *counts)


def _splash(schedule: Schedule, chip: chips.Chip, mask: str, size: int, kernel: str) -> float:
    """Its grid has as many steps a result as the fullest one has blocks."""
    del chip
    of = listed.schedule(programs.MASKS[mask], HEADS, LENGTH, LENGTH, size, size)
    steps = of.columns(1) if kernel == "dkv" else of.rows
    results = of.column_blocks if kernel == "dkv" else of.row_blocks
    fullest = max(collections.Counter(steps.major[0].tolist()).values())
    return total(
        schedule,
        schedule.regions,
        fullest * results * HEADS,
        results * HEADS,
        [steps.count * HEADS],
    )


def _decode(schedule: Schedule, chip: chips.Chip, block: int, trips: int) -> float:
    """All blocks are full: the code of one in which a cache ends has loops, and does not run.

    Of a full block, too, where these have more than one trip.
    """
    del chip
    places = [schedule.outer.index(region) for region in _own_blocks(schedule)]
    parts = schedule.outer[places[0] - 1 : places[-1] + 2]
    if len(places) != 2 or len(parts) != 4:
        return float("nan")
    first, _, edge, last = (region.bundles for region in parts)
    inner = [loop.bundles for loop in schedule.inner()]
    own = inner[: len(inner) // 2] if trips > 1 else []
    loops = sum(inner) - sum(own)
    if loops > edge:
        return float("nan")
    each = schedule.step().bundles - (first + edge - loops + last) + sum(own) * trips
    return each * (CAPACITY // block) * BATCH + (first + last) * BATCH


def _decode_cases() -> list[Case]:
    """Caches of one kind each, and what else makes a block's code another."""
    kinds = {
        "bfloat16 cache": {},
        "int8 cache": {"cache": "int8"},
        "fp8 cache": {"cache": "float8_e4m3fn"},
        "soft cap with fp8 cache": {"cache": "float8_e4m3fn", "soft_cap": 50.0},
        "span with bfloat16 cache": {"span": True},
        "float32 cache": {"dtype": "float32"},
        "int8 cache for float32": {"dtype": "float32", "cache": "int8"},
        # They do not divide the lanes.
        "bfloat16 cache of 5 heads": {"kv_heads": 5},
        "int8 cache of 5 heads": {"kv_heads": 5, "cache": "int8"},
        "fp8 cache of 5 heads": {"kv_heads": 5, "cache": "float8_e4m3fn"},
    }
    cases = []
    for name, options in kinds.items():
        wide = "dtype" in options
        width, scale = (1, 4) if "cache" in options else (4 if wide else 2, 0)
        heads = options.get("kv_heads", KV_HEADS)
        sets = heads // 4 if "cache" in options and heads % 4 == 0 else 1
        rows = tpu_decode.Rows(1, GROUP, heads // sets, sets)
        scores = heads * tpu_decode.Rows(1, GROUP, heads, 1).merged
        block = tpu_decode.block_size(CAPACITY, heads * DIM * width, scores)
        columns = block * rows.heads
        trips = columns // columns_at_once(pieces.COUNT * rows.count, columns) if wide else 1
        cases.append(
            Case(
                f"decode {name} of {BATCH}x{CAPACITY}",
                "sparse_attention_decode",
                f"{_MODULE}:decode",
                {"capacity": CAPACITY, "batch": BATCH, "heads": GROUP * heads, **options},
                functools.partial(_decode, block=block, trips=trips),
                BATCH * CAPACITY * heads * 2 * (DIM * width + scale),
                inner=_own_blocks,
            )
        )
    return cases


def _case(mask: str, kernel: str, name: str, against: str, shapes: dict) -> Case:
    # Differentiation puts words before the names of its kernels.
    before = "" if kernel == "forward" else "*"
    return Case(
        name,
        f"{before}sparse_attention_{kernel}",
        f"{_MODULE}:attend",
        shapes | {"mask": mask, "gradient": GRADIENTS[kernel]},
        functools.partial(_own, mask=mask, kernel=kernel),
        against=against,
        inner=_own_blocks,
    )


def _splash_case(name: str, mask: str, kernel: str, size: int, shapes: dict) -> Case:
    of = {"forward": "splash_mha_fwd"}.get(kernel, f"splash_mha_{kernel}")
    options = shapes | {"mask": mask, "size": size, "gradient": GRADIENTS[kernel]}
    count = functools.partial(_splash, mask=mask, size=size, kernel=kernel)
    return Case(name, of, f"{_MODULE}:splash", options, count, inner=blocks)


def _segments_case(basis: str, shapes: dict) -> Case:
    of = _case("causal", "forward", f"attention segments causal {LENGTH}", basis, shapes)
    return dataclasses.replace(
        of,
        options=of.options | {"segments": True},
        cycles=functools.partial(_own, mask="causal", kernel="forward", segments=True),
        inner=lambda schedule: schedule.regions,
    )


def cases() -> list[Case]:
    """Masks of all blocks, of a tenth, and the two that splash attention has too."""
    shapes = {"queries": LENGTH, "heads": HEADS, "kv_heads": HEADS, "dim": DIM}
    out = []
    for mask in ("full", "tenth"):
        basis = f"attention full {LENGTH}" if mask == "tenth" else ""
        out.append(_case(mask, "forward", f"attention {mask} {LENGTH}", basis, shapes))
    # Gradients last: their programs have forward kernels, too.
    for kernel in ("forward", "dq", "dkv"):
        words = "" if kernel == "forward" else f" {kernel}"
        for mask in ("causal", "window"):
            basis = f"splash {mask}{words} {LENGTH}"
            out.append(_splash_case(basis, mask, kernel, programs.BLOCK, shapes))
            large = f"{basis} in blocks of {2 * programs.BLOCK}"
            out.append(_splash_case(large, mask, kernel, 2 * programs.BLOCK, shapes))
            out.append(_case(mask, kernel, f"attention {mask}{words} {LENGTH}", basis, shapes))
        # Options have no other kernel beside them.
        basis = f"attention causal{words} {LENGTH}"
        name = f"attention soft cap causal{words} {LENGTH}"
        out.append(_case("causal", kernel, name, basis, shapes | {"soft_cap": 30.0}))
        if kernel == "forward":
            # With maxima, unlike a low cap.
            name = f"attention soft cap 100 causal {LENGTH}"
            out.append(_case("causal", kernel, name, basis, shapes | {"soft_cap": 100.0}))
            out.append(_segments_case(basis, shapes))
    return out + _decode_cases()
