"""What is counted of sparse attention's schedules, beside jax's own splash attention.

A step of the grid is one block of queries and keys: bundles that every step has, and regions for
the first block of a row, for what the mask leaves of a block, and for the last. So a mask's list of
blocks says how often each runs. Copies that a step may skip are counted at every step.
"""

import collections
import functools

import jax
import jax.numpy as jnp
from jaxcomp.kernels import chips
from jaxcomp.kernels.schedules import Bundles, Schedule
from jaxcomp.kernels.sparse_attention import decode, tpu, tpu_walk
from jaxcomp.kernels.sparse_attention import schedule as listed

from benchmarks.tpu_cases import Case
from tests.kernels.sparse_attention import programs

# So many heads that the arrays are in HBM, not in vector memory, as in a model.
HEADS, LENGTH, DIM = 32, 16384, 128
# Decoding has Llama-3-8B's heads.
KV_HEADS, GROUP, CAPACITY, BATCH = 8, 4, 16384, 8
# A block's products have more slots of the matrix unit than this; nothing else has.
PRODUCTS = 64


def blocks(schedule: Schedule) -> list[Bundles]:
    """The regions that compute a block, in the order of the source."""
    return [region for region in schedule.regions if region.used.get("MXU", 0) > PRODUCTS]


def total(schedule: Schedule, steps: int, rows: int, computed: list[int]) -> float:
    """Scheduled cycles of all steps.

    Args:
      schedule: of a kernel over blocks.
      steps: of the grid.
      rows: how often a result begins and ends.
      computed: how often each region that computes a block runs.

    Returns:
      Their number; NaN where the schedule has other regions than the source.
    """
    inner = blocks(schedule)
    places = [schedule.regions.index(region) for region in inner]
    ends = [place for place in (places[0] - 1, places[-1] + 1) if place < len(schedule.regions)]
    if len(inner) != len(computed) or len(ends) != 2 or ends[0] < 0:
        return float("nan")
    edges = [schedule.regions[place] for place in ends]
    always = schedule.step().bundles - sum(region.bundles for region in (*inner, *edges))
    once = sum(region.bundles for region in edges)
    each = zip(inner, computed, strict=True)
    return always * steps + once * rows + sum(part.bundles * count for part, count in each)


def sizes(mask: str) -> tuple[int, int]:
    """The blocks that the kernel chooses."""
    x = jax.ShapeDtypeStruct((1, LENGTH, HEADS, DIM), jnp.bfloat16)
    return tpu.fitting_blocks(x, x, programs.MASKS[mask])[0]


def _own(schedule: Schedule, chip: chips.Chip, mask: str) -> float:
    del chip
    of = listed.schedule(programs.MASKS[mask], HEADS, LENGTH, LENGTH, *sizes(mask))
    counts = collections.Counter(of.rows.code.reshape(-1).tolist())
    skipped = counts.pop(listed.SKIP, 0)
    block_q, block_k = sizes(mask)
    turns = HEADS // tpu_walk.together(HEADS, HEADS, of.rows.lists, block_q * block_k)
    computed = [counts[code] * turns for code in sorted(counts)]
    return total(schedule, sum(computed) + skipped * turns, of.row_blocks * turns, computed)


def _splash(schedule: Schedule, chip: chips.Chip, mask: str, size: int) -> float:
    """Its grid has as many steps a row as the fullest one has blocks."""
    del chip
    of = listed.schedule(programs.MASKS[mask], HEADS, LENGTH, LENGTH, size, size)
    steps = max(collections.Counter(of.rows.major[0].tolist()).values()) * of.row_blocks
    return total(schedule, steps * HEADS, of.row_blocks * HEADS, [of.rows.count * HEADS])


def _decode(schedule: Schedule, chip: chips.Chip, block: int, quantized: bool) -> float:
    """A full block's loops are the first half of all: those that a block's edge needs follow."""
    del chip
    columns = block * KV_HEADS
    trips = [columns // decode.columns_at_once(KV_HEADS * GROUP, columns)]
    trips = [block // 128, *trips] if quantized else trips
    inner = schedule.inner()
    if len(inner) != 2 * len(trips):
        return float("nan")
    once = schedule.step().bundles
    each = once + sum(loop.bundles * n for loop, n in zip(inner, trips, strict=False))
    return each * (CAPACITY // block) * BATCH


def cases() -> list[Case]:
    """Masks of all blocks, of a tenth, and the two that splash attention has too."""
    module = "tests.kernels.sparse_attention.programs"
    shapes = {"queries": LENGTH, "heads": HEADS, "kv_heads": HEADS, "dim": DIM}
    out = []
    for mask, against in (("full", ""), ("tenth", "full"), ("causal", ""), ("window", "")):
        name = f"attention {mask} {LENGTH}"
        basis = f"attention {against} {LENGTH}" if against else ""
        if mask in ("causal", "window"):
            basis = f"splash {mask} {LENGTH}"
            options = shapes | {"mask": mask, "size": programs.BLOCK}
            count = functools.partial(_splash, mask=mask, size=programs.BLOCK)
            out.append(Case(basis, "splash_mha", f"{module}:splash", options, count, inner=blocks))
        count = functools.partial(_own, mask=mask)
        options = shapes | {"mask": mask}
        kernel = "sparse_attention_forward"
        out.append(
            Case(name, kernel, f"{module}:attend", options, count, against=basis, inner=blocks)
        )
    for cache, width in (("bfloat16", 2), ("int8", 1)):
        block = decode.block_size(CAPACITY, KV_HEADS * DIM * width)
        out.append(
            Case(
                f"decode {cache} cache of {BATCH}x{CAPACITY}",
                "sparse_attention_decode",
                f"{module}:decode",
                {"capacity": CAPACITY, "batch": BATCH, "cache": cache if width == 1 else None},
                functools.partial(_decode, block=block, quantized=width == 1),
                BATCH * CAPACITY * KV_HEADS * 2 * (DIM * width + (4 if width == 1 else 0)),
                inner=lambda schedule: schedule.inner(),
            )
        )
    return out
