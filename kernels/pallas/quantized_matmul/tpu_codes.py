"""The quantized matmul of many quantized rows on TPUs: products of codes, whose sums are scaled.

Where the matrix unit multiplies eight bits twice as fast as bf16, and scaling sums is less work
than that leaves for the vector units. A tile of rows times some outputs is summed a slab of inputs
at a time; between slabs sums wait in VMEM, since registers hold no tile of them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels.calls import by_name, on_tpu
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.quantized_matmul import tpu_dense, tpu_factors
from jaxcomp.kernels.quantized_matmul.reference import Options
from jaxcomp.kernels.quantized_matmul.tpu_quantize import Visits
from jaxcomp.kernels.quantized_matmul.tpu_tiles import LANES as _LANES
from jaxcomp.kernels.quantized_matmul.tpu_tiles import Tile
from jaxcomp.kernels.quantized_matmul.weights import Weight

# Inputs whose products are summed before the sums go to VMEM.
_SLAB = 512
# Rows of a tile up to which slabs that follow each other are summed in places of their own.
_FEW = 128


def fits(weight: Weight, chip: Chip, dtype: str) -> bool:
    """Whether the sums of a weight's codes are scaled beside the matrix unit, on a chip.

    Args:
      weight: prepared.
      chip: a TPU.
      dtype: that rows are quantized to.

    Returns:
      True for groups of 128 and more on v5, and for one group a row on v6e and 7x: of groups of 128
      their vector units would take longer than bf16 products do.
    """
    if not chip.multiplies(dtype) or weight.zeros is not None or weight.group_size % _LANES:
        return False
    return chip.mxu == _LANES or weight.group_size == weight.shape[1]


def matmul(
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    options: Options,
    chip: Chip,
    interpret,
    tile: Tile,
    cost: pl.CostEstimate | None = None,
    x_scales: jax.Array | None = None,
) -> jax.Array:
    """Multiplies: y = activation(x Wᵀ + bias), with x quantized.

    Args:
      x: ``(M, K)``, bf16 or f32.
      weight: that ``fits``, without stack axes, perhaps one of several layers.
      bias: ``(N,)`` or None.
      options: what is fused.
      chip: whose arithmetic to use.
      interpret: False, or ``pltpu.InterpretParams(..)``.
      tile: rows and outputs of a grid step, and outputs whose sums are kept at a time.
      cost: of the product, for XLA.
      x_scales: f32 ``(M, 1)`` that rows are quantized with, or None.

    Returns:
      ``(M, N)``.
    """
    m, (n, k) = x.shape[0], weight.shape
    tile = dataclasses.replace(tile, m=-(-tile.m // 32) * 32)
    tm, tn = tile.m, tile.n
    visits = Visits.of(x, weight, options, chip, tile, options.activation_dtype, decoded=False)
    fields = 4 if weight.format == "int2" else 1
    scalars = weight.scalars
    operands = visits.operands(x, x_scales, options, tile) | {
        "w": (
            weight.codes,
            visits.spec(
                (*(None for _ in scalars), tn, k // fields),
                lambda j, i, *layer: (*(number[0] for number in layer), j, 0),
            ),
        ),
        # What decoding leaves of two bits is 64 times the code.
        "output_scales" if tpu_factors.by_channel(weight) else "scales": (
            weight.scales.astype(jnp.float32) * (1 / 64 if weight.format == "int2" else 1.0),
            visits.spec((k // weight.group_size, tn), lambda j, i, *layer: (0, j)),
        ),
    }  # fmt: skip
    if bias is not None:
        spec = visits.spec((1, tn), lambda j, i, *layer: (0, j))
        operands["bias"] = (bias.astype(jnp.float32)[None], spec)
    places, slab = _places(chip, tm)
    scratch = {"acc_ref": pltpu.VMEM((places, tm, tile.columns), jnp.float32)}
    scratch |= visits.scratch(tile, k, options)

    def body(refs, y_ref, *own):
        _kernel(
            refs, y_ref, **dict(zip(scratch, own, strict=True)),
            format=weight.format, group_size=weight.group_size, slab=slab, columns=tile.columns,
            options=options, visits=visits,
        )  # fmt: skip

    return on_tpu(
        by_name(body, tuple(operands), len(scalars)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=visits.grid,
            in_specs=[spec for _, spec in operands.values()],
            out_specs=visits.spec((tm, tn), lambda j, i, *layer: (i, j)),
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=jax.ShapeDtypeStruct((m, n), options.out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=None if interpret else visits.semantics,
            vmem_limit_bytes=visits.memory,
        ),
        cost_estimate=cost,
        interpret=interpret,
        name=f"quantized_matmul_rows_codes_{weight.format}",
    )(*scalars, *(array for array, _ in operands.values()))


def _places(chip: Chip, m: int) -> tuple[int, int]:
    """In how many places slabs are summed in turn, and inputs of a slab, for tiles of m rows.

    In one place, a slab's products wait in registers for the sums of the one before. More rows keep
    the matrix units busy for longer than that takes, on v6e, where these keep no sums, twice as
    many.
    """
    if chip.name == "v6e" and m <= 2 * _FEW:
        return (2, 2 * _SLAB) if m <= _FEW else (3, _SLAB)
    return (2, _SLAB) if chip.mxu == _LANES and m <= _FEW else (1, _SLAB)


def _kernel(
    refs, y_ref, acc_ref, *, format, group_size, slab, columns, options, visits, **rows
):  # fmt: skip
    """All inputs of one tile of y."""
    refs = visits.rows_of(refs, options, group_size, **rows)
    tpu_dense.keep_in_memory(acc_ref)

    def multiply(block):
        y = _sums(refs, acc_ref, block, format, group_size, slab)
        y_ref[:, block] = tpu_dense.finish(refs, y, block, options)

    tpu_dense.blocks(y_ref.shape[1], columns, multiply)


def _sums(refs, acc_ref, block, format, group_size, slab) -> jax.Array:
    """f32 ``(rows, outputs)``: sums of the products of codes, scaled."""
    x_ref = refs["x"]
    k = x_ref.shape[1]
    depth = max(size for size in range(_LANES, slab + 1, _LANES) if group_size % size == 0)
    slab = slab // depth * depth
    starts, count = range(0, k, slab), acc_ref.shape[0]
    for place, first in enumerate(starts):
        sums = acc_ref.at[place % count]
        y = sums[...] if place >= count else None
        for start in range(first, min(first + slab, k), depth):
            product = jax.lax.dot_general(
                x_ref[:, pl.ds(start, depth)],
                _codes(refs, block, start, depth, format).astype(x_ref.dtype),
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.int32 if x_ref.dtype == jnp.int8 else jnp.float32,
            ).astype(jnp.float32)
            if "scales" in refs:
                group = start // group_size
                product = product * refs["scales"][group : group + 1, block]
            y = product if y is None else y + product
        if first < starts[-1]:
            sums[...] = y
    # 0, which the compiler does not know: what it sees stored and loaded at one place it would keep
    # in registers, too, until the last products are there.
    unknown = jnp.minimum(block.start, 0)
    for place in range(max(len(starts) - count, 0), len(starts) - 1):
        y = y + acc_ref[place % count + unknown]
    return y


def _codes(refs, block, start, size, format) -> jax.Array:
    """``(outputs, size)``: codes as ``tpu_dense.decode`` leaves them."""
    if format != "int2":
        return tpu_dense.decode(refs, block, start, size, format, exact=False)
    # Inputs that follow each other lie in the same bytes, 128 to a bit position.
    parts = range(start, start + size, _LANES)
    decoded = [tpu_dense.decode(refs, block, at, _LANES, format, exact=False) for at in parts]
    return jnp.concatenate(decoded, axis=1)
