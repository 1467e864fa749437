"""What is counted of the schedules of products with sparse weights, beside the dense bf16 one.

Llama-3-8B's gate and up projections, 14336 x 4096. Few rows are held against the cycles that the
bytes of the sparse weight take, many against the dense product in bf16. Branches that only some
steps take are counted at every step, loops where they run; loops and branches without arithmetic
are no part of a kernel but copies of operands that XLA has put into VMEM, and are not counted.
"""

import functools

import jax
import jax.numpy as jnp
from jaxcomp.kernels import chips, pieces
from jaxcomp.kernels.quantized_matmul import tpu_tiles
from jaxcomp.kernels.schedules import Bundles, Loop, Schedule
from jaxcomp.kernels.sparse_matmul import nm, tpu, tpu_many, tpu_nm
from jaxcomp.kernels.sparse_matmul.blocks import BlockSparse
from jaxcomp.kernels.tune_compiled import dense_cycles

from benchmarks.tpu_cases import Case

N, K, GROUP, BLOCK = 14336, 4096, 128, 256
MODULE = "tests.kernels.sparse_matmul.programs"
DENSE = "tests.kernels.quantized_matmul.aot_cases:bf16"


def cases() -> list[Case]:
    """2:4 weights in bf16 and int4, and weights with a tenth and with half of their blocks."""
    out = []
    for m in (16, 2048):
        # Few rows are held against bytes; bf16 is beside them to be seen.
        size = N * K * 2.0 if m == 16 else 0
        shape = {"m": m, "n": N, "k": K}
        count = functools.partial(_dense, m=m)
        out.append(Case(_dense_name(m), "bf16_matmul", DENSE, shape, count, size))
        out += [_nm_case(m, group_size) for group_size in (None, GROUP)]
        out += [_blocks_case(m, BLOCK, density) for density in (0.1, 0.5)]
    out += [_nm_case(64, group_size) for group_size in (None, GROUP)]
    out.append(_nm_case(128, None))
    out += [_blocks_case(2048, block, 0.5) for block in (128, 512)]
    # Models whose numbers are f32.
    out += [_nm_case(m, group_size, "float32") for m in (16, 2048) for group_size in (None, GROUP)]
    out.append(_blocks_case(16, BLOCK, 0.5, "float32"))
    return [*out, _gradient_case(2048, 0.5)]


def _dense_name(m: int) -> str:
    return f"dense M={m} {N}x{K} in bf16"


def _nm_case(m: int, group_size: int | None, dtype: str = "bfloat16") -> Case:
    wide = dtype == "float32"
    name, stored = ("int4 g128", 6) if group_size else ("f32", 34) if wide else ("bf16", 18)
    name += " f32 rows" if wide and group_size else ""
    # Bytes of 16 weights: half of the values, and four bits of positions for each four.
    size = N * K / 16 * stored + (4 * N * K / group_size if group_size else 0)
    return Case(
        f"2:4 {name} M={m} {N}x{K}",
        "nm_matmul",
        f"{MODULE}:nm",
        {"rows": m, "outputs": N, "inputs": K, "group_size": group_size, "dtype": dtype},
        functools.partial(_nm, m=m, group_size=group_size, dtype=dtype),
        0 if m > 128 else size,
        _dense_name(m) if m > 128 else "",
    )


def _blocks_case(m: int, block: int, density: float, dtype: str = "bfloat16") -> Case:
    weight = _weight(block, density, dtype)
    options = {"rows": m, "outputs": N, "inputs": K, "block": block, "density": density}
    return Case(
        f"blocks {density:.0%} of {block} {'f32 ' * (dtype == 'float32')}M={m} {N}x{K}",
        "block_sparse_matmul",
        f"{MODULE}:blocks",
        options | {"dtype": dtype},
        functools.partial(_blocks, m=m, weight=weight),
        0 if m > 64 else weight.values.size * weight.values.dtype.itemsize,
        _dense_name(m) if m > 64 else "",
    )


def _gradient_case(m: int, density: float) -> Case:
    """The gradient to the values, which is as many products as the forward pass."""
    weight = _weight(BLOCK, density)
    return Case(
        f"blocks {density:.0%} of {BLOCK} gradient to values M={m} {N}x{K}",
        "transpose_jvp_block_sparse_matmul_dvalues",
        f"{MODULE}:values_gradient",
        {"rows": m, "outputs": N, "inputs": K, "block": BLOCK, "density": density},
        functools.partial(_values_gradient, m=m, weight=weight),
        against=_dense_name(m),
        inner=Schedule.inner,
    )


def _weight(block: int, density: float, dtype: str = "bfloat16") -> BlockSparse:
    """Shapes of a weight."""
    count = round(N // block * (K // block) * density)
    values = jax.ShapeDtypeStruct((count, block, block), jnp.dtype(dtype))
    listed = jax.ShapeDtypeStruct((count,), jnp.int32)
    return BlockSparse(values, listed, listed, None, (N, K))


def _dense(schedule: Schedule, chip: chips.Chip, m: int) -> float:
    tile = tpu_tiles.dense(chip.name, m, N, K, chip.mxu)
    return dense_cycles(schedule, tile, N, [-(-m // tile.m)])


def _nm(schedule: Schedule, chip: chips.Chip, m: int, group_size: int | None, dtype: str) -> float:
    """Many rows have a loop that writes the dense tile, once, before the one that multiplies."""
    of_values = jnp.int4 if group_size else jnp.dtype(dtype)
    values = jax.ShapeDtypeStruct((2, N, K // 4), of_values)
    scales = jax.ShapeDtypeStruct((N, K // group_size), jnp.float32) if group_size else None
    weight = nm.NMSparse(values, values, scales, 2, 4, group_size, (N, K), nm.LAYOUT)
    size = jnp.dtype(dtype).itemsize
    rows, outputs = tpu_nm.tiles(m, weight, size)
    few = tpu_nm.few_rows(m, weight, size)
    inner = [loop.bundles for loop in schedule.inner() if _computes(loop)]
    split = size == 4 and (group_size is None or not few)
    # Scales of codes are spread before. Few rows and f32 weights: results are written in the end.
    if len(inner) != (1 + split if few else 3 if group_size else 2):
        return float("nan")
    blocks = outputs // tpu_nm.columns(outputs, chip, few)
    slabs = K // tpu_nm.SLAB if split else 1  # Of f32 weights a loop takes one, or a pair.
    if few and split:
        each = _step(schedule) + inner[0] * (blocks * slabs // 2) + inner[1] * blocks
        return float(each * -(-N // outputs))
    each = (_step(schedule) + inner[-1] * blocks) * -(-m // rows)
    fill = (sum(inner[:-2]) + inner[-2] * slabs) * (outputs // tpu_nm.FILLED) if not few else 0
    return float((fill + each) * -(-N // outputs))


def _blocks(schedule: Schedule, chip: chips.Chip, m: int, weight: BlockSparse) -> float:
    """By the kernel that the rows have."""
    sizes = (weight.values.dtype.itemsize,) * 2
    rows = tpu.product_rows(m, weight, 0, *sizes)
    if not rows:
        return _many_rows(schedule, tpu_many.tile(m, weight, 0, *sizes, chip), m, weight)
    return _few_rows(schedule, weight, rows) * -(-m // rows)


def _few_rows(schedule: Schedule, weight: BlockSparse, rows: int) -> float:
    """Loops over outputs that clear and write sums around those over the blocks of a copy."""
    copy, count = tpu.copy_size(weight), len(weight.values)
    split = pieces.count(weight.values.dtype)
    _, together = tpu.held_together(rows, weight.block[0], copy, split)
    sizes = [min(copy, count - start) for start in range(0, count, copy)]
    trips = [weight.grid[0], *_trips(sizes, together), weight.grid[0]]
    inner = [loop for loop in schedule.inner() if _computes(loop)]
    if len(inner) != len(trips):
        return float("nan")
    looped = sum(loop.bundles * trip for loop, trip in zip(inner, trips, strict=True))
    return _step(schedule) * len(sizes) + looped


def _trips(sizes: list[int], together: int) -> list[int]:
    """Of loops over so many blocks at a time, and over those that are left."""
    whole = sum(size // together for size in sizes)
    return [whole, sum(size % together for size in sizes)] if together > 1 else [whole]


def _values_gradient(schedule: Schedule, chip: chips.Chip, m: int, weight: BlockSparse) -> float:
    """Loops that clear and write sums, once, around those over a copy's blocks for some rows."""
    del chip
    tiles = -(-m // tpu.gradient_rows(m, weight, 2))
    copy, count = tpu.gradient_copy(weight), len(weight.values)
    sizes = [min(copy, count - start) for start in range(0, count, copy)]
    trips = [copy * len(sizes), *(tiles * n for n in _trips(sizes, 2)), copy * len(sizes)]
    inner = [loop for loop in schedule.inner() if loop.used.get("VSTORE", 0)]
    if len(inner) != len(trips):
        return float("nan")
    looped = sum(loop.bundles * trip for loop, trip in zip(inner, trips, strict=True))
    return _step(schedule) * len(sizes) * tiles + looped


def _many_rows(schedule: Schedule, tile: tpu_many.Tile, m: int, weight: BlockSparse) -> float:
    """A step for each row of blocks: a loop over some, and a branch for each number that is left.

    The blocks are spread evenly over the rows. The first step of a tile fills the ring.
    """
    fill, *loops = schedule.inner()
    left = [part for part in schedule.regions if part.used.get("VSTORE", 0)]
    left = [part.bundles for part in left if not _holds(part, schedule.inner())]
    if len(loops) != 1 or len(left) != tile.together + 1:
        return float("nan")
    tiles, grid, count = -(-m // tile.rows), weight.grid[0], len(weight.values)
    total = grid * (schedule.step().bundles - sum(left))
    total += fill.bundles * (tile.slots - tile.together)
    for row in range(grid):
        blocks = count // grid + (row < count % grid)
        whole = max(blocks - 1, 0) // tile.together
        total += whole * loops[0].bundles + left[blocks - whole * tile.together]
    return float(total * tiles)


def _computes(part: Bundles) -> bool:
    return any(part.used.get(unit, 0) for unit in ("MXU", "XLU", "VALU"))


def _step(schedule: Schedule) -> int:
    """Bundles of a step outside of its loops, and of copies."""
    copies = [
        region.bundles
        for region in schedule.regions
        if not _computes(region) and not _holds(region, schedule.inner())
    ]
    return schedule.step().bundles - sum(copies)


def _holds(region: Bundles, loops: list[Loop]) -> bool:
    """Whether a region holds one of the loops, whose bundles are not the step's."""
    return any(
        0 <= region.bundles - loop.bundles < 16
        and region.used.get("MXU", 0) == loop.used.get("MXU", 0)
        for loop in loops
    )
