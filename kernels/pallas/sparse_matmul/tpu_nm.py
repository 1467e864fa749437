"""2:4 sparse matmuls on TPUs (Mosaic): storage is sparse, arithmetic is not.

The inputs of x are sorted by their position in a group of four, once outside, so that the planes
of prepared values, each the first or second value of every group, become the four parts of a dense
tile by comparing positions: no value moves between lanes. The tile, all inputs of some outputs,
then serves every tile of rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.sparse_matmul import nm, reference
from jaxcomp.kernels.sparse_matmul.nm import NMSparse
from jaxcomp.kernels.sparse_matmul.reference import Options

LANES = 128
# Groups of m inputs become as many parts of the tile.
_PARTS = 4
_VMEM = 48 << 20
# Outputs that are written out at a time: what the registers hold.
FILLED = 64


def unfit(
    weight: NMSparse, chip: Chip | None, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> str | None:
    """Why the kernel does not take a weight on a chip, or None.

    Args:
      weight: stored or prepared.
      chip: None for one that no kernel knows.
      dtype: of x.

    Returns:
      A reason, or None.
    """
    if chip is None or chip.platform != "tpu":
        return f"the chip is {chip.name if chip else 'unknown'}, not a TPU"
    if (weight.n, weight.m) != (2, _PARTS):
        return f"it takes 2:4 sparsity, not {weight.n}:{weight.m}"
    k = weight.shape[1]
    if k % (_PARTS * LANES):
        return f"the {k} inputs are not a multiple of {_PARTS * LANES}"
    if weight.group_size is not None:
        width = weight.group_size // _PARTS
        if width % LANES and LANES % width:
            return (
                f"int4 values in groups of {weight.group_size} inputs: a quarter of one neither "
                f"divides {LANES} nor is a multiple of it"
            )
    if not tiles(LANES, weight, jnp.dtype(dtype).itemsize):
        return f"128 rows and outputs of {k} inputs do not fit into VMEM"
    return None


def matmul(
    x: jax.Array,
    weight: NMSparse,
    bias: jax.Array | None,
    options: Options,
    chip: Chip,
    interpret=False,
) -> jax.Array:
    """Y = activation(x Wᵀ + bias).

    Args:
      x: ``(M, K)``, bf16 or f32.
      weight: that fits; one that is not prepared is prepared here, on every call.
      bias: ``(N,)`` or None.
      options: what is fused.
      chip: whose matrix unit to fill.
      interpret: False, or ``pltpu.InterpretParams(..)``.

    Returns:
      ``(M, N)``.
    """
    weight = nm.prepare(weight) if weight.layout == "stored" else weight
    m, (n, k) = x.shape[0], weight.shape
    tm, tn = tiles(m, weight, x.dtype.itemsize)
    x = jnp.pad(x, ((0, -m % tm), (0, 0)))
    x = x.reshape(-1, k // _PARTS, _PARTS).swapaxes(1, 2).reshape(-1, k)
    operands = {
        "x": (x, pl.BlockSpec((tm, k), lambda j, i: (i, 0))),
        "values": (weight.values, pl.BlockSpec((2, tn, k // _PARTS), lambda j, i: (0, j, 0))),
        "positions": (weight.positions, pl.BlockSpec((tn, k // _PARTS), lambda j, i: (j, 0))),
    }
    if weight.scales is not None:
        spec = pl.BlockSpec((tn, k // weight.group_size), lambda j, i: (j, 0))
        operands["scales"] = (weight.scales, spec)
    if bias is not None:
        spec = pl.BlockSpec((1, tn), lambda j, i: (0, j))
        operands["bias"] = (bias.astype(jnp.float32)[None], spec)
    names = tuple(operands)
    outputs = chip.mxu if tn % chip.mxu == 0 else LANES
    body = functools.partial(
        _kernel, group_size=weight.group_size, options=options, outputs=outputs
    )
    y = pl.pallas_call(
        lambda *refs: body(dict(zip(names, refs, strict=False)), *refs[len(names) :]),
        grid=(-(-n // tn), x.shape[0] // tm),
        in_specs=[spec for _, spec in operands.values()],
        out_specs=pl.BlockSpec((tm, tn), lambda j, i: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], n), options.out_dtype),
        scratch_shapes=[pltpu.VMEM((tn, k), x.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        interpret=interpret,
        name="nm_matmul",
    )(*(array for array, _ in operands.values()))
    return y[:m]


def tiles(m: int, weight: NMSparse, itemsize: int) -> tuple[int, int] | None:
    """Rows and outputs of a grid step: the most that fit, or None."""
    n, k = weight.shape
    coded = weight.scales is not None
    # Of an output: the dense tile, and two copies of two planes and of positions.
    stored = 1 if coded else 2 * weight.values.dtype.itemsize
    output = k * itemsize + 2 * (k // _PARTS) * (stored + 1)
    output += 8 * max(k // weight.group_size, LANES) if coded else 0
    rows = min(-(-m // 16) * 16, 256)
    for tn in (1024, 512, 256, LANES):
        for tm in (rows, min(rows, LANES)):
            whole = tn * output + tm * (2 * k * itemsize + 12 * tn)
            if (tn <= LANES or tn < n + LANES) and whole <= _VMEM - (4 << 20):
                return tm, min(tn, -(-n // LANES) * LANES)
    return None


def _kernel(refs, y_ref, w_ref, *, group_size, options, outputs):
    """All inputs of one tile of y."""

    def blocks(step, outputs):
        def one(i, _):
            step(pl.ds(pl.multiple_of(i * outputs, outputs), outputs))

        jax.lax.fori_loop(0, w_ref.shape[0] // outputs, one, None)

    def fill(block):
        size = w_ref.shape[1] // _PARTS
        for start in range(0, size, LANES):
            parts = _decompress(refs, block, start, group_size)
            for i, part in enumerate(parts):
                w_ref[block, pl.ds(i * size + start, LANES)] = part.astype(w_ref.dtype)

    def multiply(block):
        y = reference.dot(refs["x"][...], w_ref[block, :], ((1,), (1,)))
        bias = jnp.broadcast_to(refs["bias"][:, block], y.shape) if "bias" in refs else None
        y_ref[:, block] = reference.finish(y, bias, options)

    pl.when(pl.program_id(1) == 0)(lambda: blocks(fill, FILLED))
    blocks(multiply, outputs)


def _decompress(refs, block, start, group_size):
    """f32 weights ``(outputs, 128)`` at each of the four positions of 128 groups."""
    columns = pl.ds(start, LANES)
    first, second = (refs["values"][i, block, columns].astype(jnp.float32) for i in (0, 1))
    if "scales" in refs:
        scales = _spread(refs["scales"], block, start, group_size // _PARTS)
        first, second = first * scales, second * scales
    code = refs["positions"][block, columns].astype(jnp.int32)
    p0, p1 = code & 3, (code >> 2) & 3
    # Positions are in order, so the last is never the first's and the first never the second's.
    return (
        jnp.where(p0 == 0, first, 0.0),
        jnp.where(p0 == 1, first, jnp.where(p1 == 1, second, 0.0)),
        jnp.where(p0 == 2, first, jnp.where(p1 == 2, second, 0.0)),
        jnp.where(p1 == 3, second, 0.0),
    )


def _spread(ref, block, start, width):
    """``(outputs, 128)``: the scale of each of 128 groups of four, ``width`` of which share one."""
    first, count = start // width, max(LANES // width, 1)
    columns = [
        jnp.broadcast_to(ref[block, first + i : first + i + 1], (block.size, LANES))
        for i in range(count)
    ]
    lane = jax.lax.broadcasted_iota(jnp.int32, columns[0].shape, 1)
    out = columns[0]
    for i, column in enumerate(columns[1:], 1):
        out = jnp.where(lane >= i * width, column, out)
    return out
