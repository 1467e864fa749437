"""The 2:4 sparse matmul on Hopper GPUs (Mosaic GPU): storage is sparse, arithmetic is not.

A block computes yᵀ = W xᵀ for 64 outputs of each of two warpgroups and a tile of tokens. Planes of
values, each the first or second value of every group of four inputs, become the four parts of a
dense tile in registers, by comparing the groups' position codes; the inputs of x are sorted by
their place in a group, so no value moves. Each part is multiplied from where it is made. A third
warpgroup copies planes, codes and tokens into a ring of stages in shared memory. int4 values are
converted and scaled before they are compared, two of four of them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxcomp.kernels.calls import on_gpu

ROWS = 64  # outputs of a warpgroup
WORKERS = 2
DEPTH = 64  # groups of a step
_PARTS = 4
_COPY_REGISTERS, _WORK_REGISTERS = 40, 232  # of 504 for three threads
_SHARED_BYTES = 200 << 10
_MOST_STAGES = 5


def product(
    x: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    scales: jax.Array | None,
    tokens: int,
    split: int,
    interpret=False,
) -> jax.Array:
    """Sums of yᵀ = W xᵀ, to be added over the first axis.

    Args:
      x: bf16 ``(4, M, K / 4)``, inputs by their place in a group; M is at most 8 or a multiple.
      values: bf16 or int4 ``(2, N, K / 4)`` of ``nm.prepare``; N is a multiple of
        ``ROWS * WORKERS``, and K / 4 of ``DEPTH``.
      positions: int4 ``(N, K / 4)`` of ``nm.prepare``.
      scales: f32 ``(N, spans)`` of int4 values, where a span has a multiple or a divisor of
        ``DEPTH`` groups of four; None of others.
      tokens: rows of x in a block.
      split: blocks along K.
      interpret: False, or ``plgpu.InterpretGPUParams(..)``.

    Returns:
      float32 ``(split, N, M up to a multiple of tokens)``.
    """
    n, groups = positions.shape
    m_blocks = pl.cdiv(x.shape[1], tokens)
    steps = pl.cdiv(groups // DEPTH, split)
    inputs = {"x": x, "values": values, "positions": positions}
    inputs |= {} if scales is None else {"scales": scales}
    span = groups if scales is None else groups // scales.shape[1]
    bits = 16 if scales is None else 4
    stage_bytes = DEPTH * (2 * _PARTS * tokens + WORKERS * ROWS * (2 * bits + 4) // 8)
    stored_bytes = 4 * WORKERS * ROWS * tokens
    stages = min(_MOST_STAGES, (_SHARED_BYTES - stored_bytes) // stage_bytes)

    def tiles(*shape, dtype=jnp.bfloat16, bits=16):
        width = min(128, shape[-1] * bits // 8)
        swizzled = plgpu.TilingTransform((8, width * 8 // bits)), plgpu.SwizzleTransform(width)
        return plgpu.SMEM(shape, dtype, transforms=swizzled)

    scratch = {
        "x": tiles(stages, _PARTS, tokens, DEPTH),
        "values": tiles(stages, WORKERS, 2, ROWS, DEPTH, dtype=values.dtype, bits=bits),
        "positions": tiles(stages, WORKERS, ROWS, DEPTH, dtype=jnp.int4, bits=4),
        "stored": tiles(WORKERS, ROWS, tokens, dtype=jnp.float32, bits=32),
        "full": plgpu.Barrier(num_arrivals=_PARTS + 3 * WORKERS, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages),
    }
    if interpret:  # which takes no factor from registers
        scratch["parts"] = tiles(WORKERS, _PARTS, ROWS, DEPTH)

    def body(*refs, **scratch):
        refs = dict(zip([*inputs, "out"], refs, strict=True))
        worker = lax.axis_index("warpgroup")
        arguments = (refs, scratch, steps, stages)
        lax.cond(
            worker == WORKERS,
            functools.partial(_copy, *arguments),
            functools.partial(_multiply, *arguments, span, worker),
        )

    return on_gpu(
        body,
        out_type=jax.ShapeDtypeStruct((split, n, m_blocks * tokens), jnp.float32),
        grid=(n // (ROWS * WORKERS), m_blocks, split),
        grid_names=("n", "m", "split"),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(*inputs.values())


def _outputs(worker) -> pl.Slice:
    return pl.ds((lax.axis_index("n") * WORKERS + worker) * ROWS, ROWS)


def _copy(refs, scratch, steps: int, stages: int) -> None:
    """Fills the stages, as soon as they have been read."""
    plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
    tokens = scratch["x"].shape[-2]
    rows = pl.ds(lax.axis_index("m") * tokens, tokens)

    @pl.loop(0, steps)
    def _step(step):
        stage = lax.rem(step, stages)
        full = scratch["full"].at[stage]
        # Past the last group, where a split has fewer steps, zeros are read.
        groups = pl.ds((lax.axis_index("split") * steps + step) * DEPTH, DEPTH)

        @pl.when(step >= stages)
        def _wait():
            plgpu.barrier_wait(scratch["empty"].at[stage])

        for part in range(_PARTS):
            to = scratch["x"].at[stage, part]
            plgpu.copy_gmem_to_smem(refs["x"].at[part, rows, groups], to, full)
        for worker in range(WORKERS):
            outputs = _outputs(worker)
            for i in range(2):
                to = scratch["values"].at[stage, worker, i]
                plgpu.copy_gmem_to_smem(refs["values"].at[i, outputs, groups], to, full)
            to = scratch["positions"].at[stage, worker]
            plgpu.copy_gmem_to_smem(refs["positions"].at[outputs, groups], to, full)

    # A block must not end before its barriers have been used up.
    @pl.loop(max(0, steps - stages), steps)
    def _drain(step):
        plgpu.barrier_wait(scratch["empty"].at[lax.rem(step, stages)])


def _multiply(refs, scratch, steps: int, stages: int, span: int, worker) -> None:
    """Sums the products of a warpgroup's outputs, and writes them."""
    plgpu.set_max_registers(_WORK_REGISTERS, action="increase")
    tokens = scratch["x"].shape[-2]

    def all_steps(acc):
        @pl.loop(0, steps)
        def _step(step):
            stage = lax.rem(step, stages)
            # Scales come while the stage is waited for.
            scales = _scales(refs, step + lax.axis_index("split") * steps, span, worker)
            plgpu.barrier_wait(scratch["full"].at[stage])
            parts = _decompressed(scratch, stage, scales, worker)
            if "parts" in scratch:
                for i, part in enumerate(parts):
                    scratch["parts"][worker, i] = part
                plgpu.commit_smem()
                parts = [scratch["parts"].at[worker, i] for i in range(_PARTS)]
            for i, part in enumerate(parts):
                plgpu.wgmma(acc, part, scratch["x"].at[stage, i].T)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(scratch["empty"].at[stage])

        return acc[...]

    stored = scratch["stored"].at[worker]
    stored[...] = pl.run_scoped(all_steps, plgpu.ACC((ROWS, tokens), jnp.float32))
    plgpu.commit_smem()
    columns = pl.ds(lax.axis_index("m") * tokens, tokens)
    to = refs["out"].at[lax.axis_index("split"), _outputs(worker), columns]
    plgpu.copy_smem_to_gmem(stored, to)
    plgpu.wait_smem_to_gmem(0)


def _scales(refs, step, span: int, worker) -> list[jax.Array]:
    """Scales of a step's spans, each of a warpgroup's outputs; none where values have none."""
    if "scales" not in refs:
        return []
    # Past the last group, where a split has fewer steps, zeros are multiplied: any scale will do.
    last = refs["scales"].shape[1] - max(1, DEPTH // span)
    first = jnp.minimum(lax.div(step * DEPTH, span), last)
    return [
        plgpu.load(
            refs["scales"].at[_outputs(worker), first + i],
            layout=plgpu.Layout.WGMMA.reduce(1),
            optimized=False,
        )
        for i in range(max(1, DEPTH // span))
    ]


def _decompressed(scratch, stage, scales, worker) -> list[jax.Array]:
    """Weights (ROWS, DEPTH) of each place in a group, in registers.

    A code is first + 4 * second position, of which it is known that first < second; as int4 it is
    one of 4 (0, 1), -8 (0, 2), -4 (0, 3), -7 (1, 2), -3 (1, 3) and -2 (2, 3).
    """

    def converted(codes):
        codes = plgpu.load(codes, layout=plgpu.Layout.WGMMA_UPCAST_4X)
        return plgpu.layout_cast(codes, plgpu.Layout.WGMMA).astype(jnp.bfloat16)

    def plane(i):
        values = scratch["values"].at[stage, worker, i]
        if not scales:
            return plgpu.load(values, layout=plgpu.Layout.WGMMA)
        values, width = converted(values), DEPTH // len(scales)
        scaled = []
        for j, scale in enumerate(scales):
            part = values[:, j * width : (j + 1) * width]
            scaled.append(part * lax.broadcast_in_dim(scale.astype(part.dtype), part.shape, (0,)))
        return lax.concatenate(scaled, 1)

    first, second = plane(0), plane(1)
    code = converted(scratch["positions"].at[stage, worker])
    zero = jnp.zeros_like(first)

    def where(*codes, then, other):
        return jnp.where(functools.reduce(jnp.logical_or, [code == c for c in codes]), then, other)

    return [
        where(4, -8, -4, then=first, other=zero),
        where(-7, -3, then=first, other=where(4, then=second, other=zero)),
        where(-2, then=first, other=where(-8, -7, then=second, other=zero)),
        where(-4, -3, -2, then=second, other=zero),
    ]
