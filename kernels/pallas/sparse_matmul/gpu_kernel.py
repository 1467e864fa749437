"""Block-sparse products on Hopper GPUs (Mosaic GPU): one kernel for y and dx, one for the blocks.

A thread block sums up a tile of the result in registers. One warpgroup copies what the list names,
64 inputs at a time, into a ring of stages in shared memory; the others multiply what has arrived,
with both factors in shared memory, and let go of a stage when the next product has been started.
A copy past the end of an array reads zeros and a store there is dropped, so tiles need not divide
the rows of x.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxcomp.kernels.calls import on_gpu
from jaxcomp.kernels.quantized_matmul.reference import ACTIVATIONS

WIDTH = 128  # columns of a tile
DEPTH = 64  # inputs of a step: the 128 bytes that shared memory's swizzle spans
_STORED = 64  # rows and columns that leave a warpgroup at a time
_COPY_REGISTERS, _WORK_REGISTERS = 40, 232


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a product is divided.

    Attributes:
      rows: rows of a tile that a warpgroup has: 64 or 128.
      workers: warpgroups that multiply: 1 or 2.
      stages: steps that are copied ahead.
      split: parts of each list, whose sums are added afterwards.
    """

    rows: int
    workers: int
    stages: int
    split: int = 1

    @property
    def height(self) -> int:
        """Rows of a tile."""
        return self.rows * self.workers


def product(
    x: jax.Array,
    values: jax.Array,
    lists: dict[str, jax.Array],
    bias: jax.Array | None,
    axis: int,
    size: int,
    activation: str | None,
    out_dtype: str,
    tiles: Tiles,
    interpret=False,
) -> jax.Array:
    """Computes y = activation(x Wᵀ + bias), or x W, over lists of blocks.

    Args:
      x: bf16 ``(M, inputs)``, the inputs a multiple of 8, and M above 8.
      values: bf16 ``(blocks, bn, bk)``; bn and bk are multiples of 128.
      lists: int32 "starts" ``(majors + 1,)``, where the list of each block of outputs starts;
        "blocks" ``(blocks,)``, which of the values; "minors" ``(blocks,)``, their block of inputs.
      bias: f32 of all outputs in whole blocks, or None; only for one split.
      axis: 0 for outputs along bn, 1 for outputs along bk.
      size: outputs, a multiple of 8.
      activation: a key of ``ACTIVATIONS``; only for one split.
      out_dtype: of y.
      tiles: how it is divided.
      interpret: False, or ``plgpu.InterpretGPUParams(..)``.

    Returns:
      ``(split, M, size)``, to be added over the first axis.
    """
    majors = lists["starts"].shape[0] - 1
    width, depth = values.shape[1 + axis], values.shape[2 - axis]
    columns, per = width // WIDTH, depth // DEPTH  # tiles of a block, steps of a block
    inputs = {"x": x, "values": values} | lists | ({} if bias is None else {"bias": bias})

    def copies(refs, scratch, place, step):
        major, at = lax.div(place.column, columns), lax.rem(place.column, columns)
        listed = refs["starts"][major] + lax.div(step, per)
        within = lax.rem(step, per) * DEPTH
        rows = pl.ds(place.row * tiles.height, tiles.height)
        spans = [pl.ds(at * WIDTH, WIDTH), pl.ds(within, DEPTH)]
        spans = spans if axis == 0 else spans[::-1]
        columns_of_x = pl.ds(refs["minors"][listed] * depth + within, DEPTH)
        yield refs["x"].at[rows, columns_of_x], scratch["a"]
        yield refs["values"].at[refs["blocks"][listed], *spans], scratch["b"]

    def factors(scratch, stage, worker):
        rows = pl.ds(worker * tiles.rows, tiles.rows)
        b = scratch["b"].at[stage]
        return scratch["a"].at[stage, rows], b.T if axis == 0 else b

    def bounds(refs, place):
        major = lax.div(place.column, columns)
        count = (refs["starts"][major + 1] - refs["starts"][major]) * per
        part = lax.div(count + (tiles.split - 1), tiles.split)
        return jnp.minimum(place.part * part, count), jnp.minimum((place.part + 1) * part, count)

    def finish(refs, place, acc):
        if bias is not None:
            row = plgpu.load(
                refs["bias"].at[pl.ds(place.column * WIDTH, WIDTH)],
                layout=plgpu.Layout.WGMMA.reduce(0),
                optimized=False,
            )
            acc += lax.broadcast_in_dim(row, acc.shape, (1,))
        return ACTIVATIONS[activation](acc)

    return _run(
        inputs,
        stages={
            "a": (tiles.height, DEPTH),
            "b": (WIDTH, DEPTH) if axis == 0 else (DEPTH, WIDTH),
        },
        copies=copies,
        factors=factors,
        bounds=bounds,
        finish=finish,
        out=jax.ShapeDtypeStruct((tiles.split, x.shape[0], size), out_dtype),
        grid=(pl.cdiv(x.shape[0], tiles.height), majors * columns, tiles.split),
        where=lambda place: (place.part, place.row * tiles.height, place.column * WIDTH),
        tiles=tiles,
        interpret=interpret,
    )


def outer(
    x: jax.Array,
    dz: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    block: tuple[int, int],
    out_dtype: str,
    tiles: Tiles,
    interpret=False,
) -> jax.Array:
    """Computes dzᵀ x where the blocks are.

    Args:
      x: bf16 ``(M, K)``, K a multiple of 8, and M above 8.
      dz: bf16 ``(M, N)``, N a multiple of 8.
      rows: int32 ``(blocks,)``.
      columns: int32 ``(blocks,)``.
      block: (bn, bk), multiples of 128.
      out_dtype: of the result.
      tiles: 64 rows for each of two warpgroups.
      interpret: False, or ``plgpu.InterpretGPUParams(..)``.

    Returns:
      ``(blocks, bn, bk)``.
    """
    (bn, bk), across = block, block[1] // WIDTH

    def corner(place):
        """Of a tile within its block."""
        down = lax.div(place.column, across) * tiles.height
        return down, lax.rem(place.column, across) * WIDTH

    def copies(refs, scratch, place, step):
        down, right = corner(place)
        tokens = pl.ds(step * DEPTH, DEPTH)
        outputs = pl.ds(refs["rows"][place.row] * bn + down, tiles.height)
        inputs = pl.ds(refs["columns"][place.row] * bk + right, WIDTH)
        yield refs["dz"].at[tokens, outputs], scratch["a"]
        yield refs["x"].at[tokens, inputs], scratch["b"]

    def factors(scratch, stage, worker):
        outputs = pl.ds(worker * tiles.rows, tiles.rows)
        return scratch["a"].at[stage, :, outputs].T, scratch["b"].at[stage]

    return _run(
        {"x": x, "dz": dz, "rows": rows, "columns": columns},
        stages={"a": (DEPTH, tiles.height), "b": (DEPTH, WIDTH)},
        copies=copies,
        factors=factors,
        bounds=lambda refs, place: (0, pl.cdiv(x.shape[0], DEPTH)),
        finish=lambda refs, place, acc: acc,
        out=jax.ShapeDtypeStruct((len(rows), bn, bk), out_dtype),
        grid=(len(rows), bn // tiles.height * across, 1),
        where=lambda place: (place.row, *corner(place)),
        tiles=tiles,
        interpret=interpret,
    )


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a thread block works."""

    row: jax.Array
    column: jax.Array
    part: jax.Array


def _run(
    inputs: dict[str, jax.Array],
    *,
    stages: dict[str, tuple[int, int]],
    copies: Callable,
    factors: Callable,
    bounds: Callable,
    finish: Callable,
    out: jax.ShapeDtypeStruct,
    grid: tuple[int, int, int],
    where: Callable,
    tiles: Tiles,
    interpret,
) -> jax.Array:
    """Sums of products, a tile for each thread block.

    Args:
      inputs: arrays by name.
      stages: shapes of the factors "a" and "b" of a step in shared memory.
      copies: (refs, scratch, place, step) -> pairs of a source and the stages it goes to.
      factors: (scratch, stage, worker) -> the two factors of a warpgroup.
      bounds: (refs, place) -> first step and the one after the last.
      finish: (refs, place, sums of a warpgroup) -> what is stored.
      out: of the result, of three axes.
      grid: thread blocks by row, column and part.
      where: place -> the corner of a tile in the result.
      tiles: how it is divided.
      interpret: False, or ``plgpu.InterpretGPUParams(..)``.
    """
    dtype = inputs["x"].dtype
    shared = {
        name: plgpu.SMEM((tiles.stages, *shape), dtype, transforms=_swizzled(dtype))
        for name, shape in stages.items()
    }
    shared |= {
        "stored": plgpu.SMEM(
            (tiles.workers, _STORED, _STORED), out.dtype, transforms=_swizzled(out.dtype)
        ),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
        "empty": plgpu.Barrier(num_arrivals=tiles.workers, num_barriers=tiles.stages),
    }

    def copy(refs, scratch, place):
        if tiles.workers > 1:
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
        first, last = bounds(refs, place)

        @pl.loop(first, last)
        def _step(step):
            stage = lax.rem(step - first, tiles.stages)

            @pl.when(step - first >= tiles.stages)
            def _wait():
                plgpu.barrier_wait(scratch["empty"].at[stage])

            for source, target in copies(refs, scratch, place, step):
                plgpu.copy_gmem_to_smem(source, target.at[stage], scratch["full"].at[stage])

        # A block must not end before its barriers have been used up.
        @pl.loop(jnp.maximum(last - tiles.stages, first), last)
        def _drain(step):
            plgpu.barrier_wait(scratch["empty"].at[lax.rem(step - first, tiles.stages)])

    def multiply(refs, scratch, place, worker):
        if tiles.workers > 1:
            plgpu.set_max_registers(_WORK_REGISTERS, action="increase")
        first, last = bounds(refs, place)

        def free(step):
            plgpu.barrier_arrive(scratch["empty"].at[lax.rem(step - first, tiles.stages)])

        def sums(acc):
            @pl.loop(first, last)
            def _step(step):
                stage = lax.rem(step - first, tiles.stages)
                plgpu.barrier_wait(scratch["full"].at[stage])
                plgpu.wgmma(acc, *factors(scratch, stage, worker))
                plgpu.wgmma_wait(1)

                @pl.when(step > first)
                def _previous():
                    free(step - 1)

            return acc[...]

        acc = pl.run_scoped(sums, plgpu.ACC((tiles.rows, WIDTH), jnp.float32))

        @pl.when(last > first)
        def _last():
            free(last - 1)

        y = finish(refs, place, acc).astype(out.dtype)
        stored, (which, row, column) = scratch["stored"].at[worker], where(place)
        for down in range(0, tiles.rows, _STORED):
            for right in range(0, WIDTH, _STORED):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                stored[...] = y[down : down + _STORED, right : right + _STORED]
                plgpu.commit_smem()
                to = (
                    pl.ds(row + worker * tiles.rows + down, _STORED),
                    pl.ds(column + right, _STORED),
                )
                plgpu.copy_smem_to_gmem(stored, refs["out"].at[which, *to])
        plgpu.wait_smem_to_gmem(0)

    def body(*refs, **scratch):
        refs = dict(zip([*inputs, "out"], refs, strict=True))
        place = _Place(*(lax.axis_index(name) for name in ("row", "column", "part")))
        worker = lax.axis_index("warpgroup")
        lax.cond(
            worker == tiles.workers,
            functools.partial(copy, refs, scratch, place),
            functools.partial(multiply, refs, scratch, place, worker),
        )

    return on_gpu(
        body,
        out_type=out,
        grid=grid,
        grid_names=("row", "column", "part"),
        num_threads=tiles.workers + 1,
        thread_name="warpgroup",
        scratch_types=shared,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(*inputs.values())


def _swizzled(dtype) -> tuple:
    """The layout in shared memory of rows that are read in spans of 128 bytes."""
    span = 128 // jnp.dtype(dtype).itemsize
    return (plgpu.TilingTransform((8, span)), plgpu.SwizzleTransform(128))
