"""Block-sparse matmuls on TPUs (Mosaic), and their gradients, over one list of blocks.

Of few rows, a grid step takes all inputs and the next blocks of the list, which lie beside each
other in memory: so the blocks stream through VMEM in large copies, however they are scattered over
the weight. Where a block is, is read from the prefetched list; its product is added to f32 sums of
all outputs, which stay in VMEM until the list ends. Outputs without a block stay zero, and the
steps are as many as the blocks ask for. Many rows are multiplied by ``tpu_many``. The gradient to x
exchanges rows and columns of the list; the one to the values keeps the sums of some blocks, while
the rows of x pass by.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels import pieces
from jaxcomp.kernels.calls import on_tpu
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.sparse_matmul import layers, reference, tpu_many
from jaxcomp.kernels.sparse_matmul.blocks import BlockSparse
from jaxcomp.kernels.sparse_matmul.reference import Options

_LANES = 128
_LARGEST = 512
# Lists of them are held in the scalar memory.
_MOST_BLOCKS = 1 << 15
_VMEM = 48 << 20
# Bytes of blocks in a copy: enough that starting a step costs little beside it.
_COPY = 1 << 20
# Bytes of products of blocks that the registers hold beside what computes them.
_REGISTERS = 128 << 10
# Rows of f32 factors that are split at a time.
_SPLIT = 16
# Bytes of f32 sums of blocks, in the gradient to them.
_SUMS = 8 << 20


def unfit(dtype: jax.typing.DTypeLike, weight: BlockSparse, chip: Chip | None) -> str | None:
    """Why the kernels do not take a weight on a chip, or None.

    Args:
      dtype: of x.
      weight: any that is valid.
      chip: None for one that no kernel knows.

    Returns:
      A reason, or None.
    """
    if chip is None or chip.platform != "tpu":
        return f"the chip is {chip.name if chip else 'unknown'}, not a TPU"
    if any(size % _LANES or size > _LARGEST for size in weight.block):
        return f"blocks of {weight.block} are not multiples of {_LANES} up to {_LARGEST}"
    if not 0 < len(weight.values) <= _MOST_BLOCKS:
        return f"it takes 1 to {_MOST_BLOCKS} blocks, not {len(weight.values)}"
    size = jnp.dtype(dtype).itemsize
    tiles = [tpu_many.tile(_LANES, weight, axis, size, 4, chip) for axis in (0, 1)]
    if not all((*tiles, gradient_rows(_LANES, weight, size))):
        return f"128 rows of the {sum(weight.shape)} inputs and outputs do not fit into VMEM"
    return None


def matmul(
    x: jax.Array,
    weight: BlockSparse,
    bias: jax.Array | None,
    options: Options,
    chip: Chip,
    interpret=False,
) -> jax.Array:
    """Y = activation(x Wᵀ + bias).

    Args:
      x: ``(M, K)``, bf16 or f32.
      weight: that fits.
      bias: ``(N,)`` or None.
      options: what is fused.
      chip: whose matrix unit to fill.
      interpret: False, or ``pltpu.InterpretParams(..)``.

    Returns:
      ``(M, N)``.
    """
    return _product(x, weight, bias, options, 0, chip, interpret)


def gradients(
    x: jax.Array, weight: BlockSparse, dz: jax.Array, chip: Chip, interpret=False
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of z = x Wᵀ.

    Args:
      x: ``(M, K)``, bf16 or f32.
      weight: that fits.
      dz: ``(M, N)``, of x's dtype.
      chip: whose matrix unit to fill.
      interpret: False, or ``pltpu.InterpretParams(..)``.

    Returns:
      Cotangents of x, and of the blocks of W: in the dtype of float values, in f32 for int8 ones.
    """
    dx = _product(dz, weight, None, Options(None, x.dtype.name), 1, chip, interpret)
    return dx, _values_gradient(x, weight, dz, chip, interpret)


def _product(x, weight, bias, options, axis, chip, interpret):
    """Sums over the list: of x Wᵀ, to outputs (axis 0), or of x W, to inputs (axis 1)."""
    out_itemsize = jnp.dtype(options.out_dtype).itemsize
    tm = product_rows(x.shape[0], weight, axis, x.dtype.itemsize, out_itemsize)
    if not tm:
        return tpu_many.matmul(x, weight, bias, options, axis, chip, interpret)
    lists = (weight.rows, weight.columns)
    layer, (values,) = layers.of_kernel(weight)
    m, blocks = x.shape[0], len(weight.values)
    n, k = _padded(weight, axis), _padded(weight, 1 - axis)
    itemsize, split = x.dtype.itemsize, pieces.count(x.dtype)
    of_weight = tpu_many.weight_pieces(weight, split)
    # One tile: pieces are rows like others.
    x = pieces.listed(reference.pad_columns(_pad_rows(x, tm), k)).reshape(-1, k)
    copy = copy_size(weight)
    # The blocks lie in VMEM as they are stored; the matrix unit takes either order.
    in_specs = [
        pl.BlockSpec((split * tm, k), lambda i, step, *_: (0, 0)),
        pl.BlockSpec(
            (*(None for _ in layer), copy, *weight.block),
            lambda i, step, to, of, *own: (*(number[0] for number in own), step, 0, 0),
        ),
    ]
    operands = [x, values]
    if weight.scales is not None:
        spec = pl.BlockSpec((copy, 1, weight.block[0]), lambda i, step, *_: (step, 0, 0))
        in_specs.append(spec)
        operands.append(weight.scales[:, None])
    if bias is not None:
        in_specs.append(pl.BlockSpec((1, n), lambda i, step, *_: (0, 0)))
        operands.append(reference.pad_columns(bias.astype(jnp.float32)[None], n))
    waiting = []
    if split > 1:
        products = len(pieces.pairs(split, of_weight)) * tm
        waiting.append(pltpu.VMEM((products, weight.block[axis]), jnp.float32))
        if of_weight > 1:
            # In words of two numbers, which take whole registers.
            shape = of_weight, weight.block[0] // 2, weight.block[1]
            waiting.append(pltpu.VMEM(shape, jnp.int32))
    y = on_tpu(
        functools.partial(
            _product_kernel,
            axis=axis,
            blocks=blocks,
            scaled=weight.scales is not None,
            biased=bias is not None,
            options=options,
            scalars=len(layer),
            split=split,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2 + len(layer),
            grid=(1, -(-blocks // copy)),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((tm, n), lambda i, step, *_: (i, 0)),
            scratch_shapes=[pltpu.VMEM((tm, n), jnp.float32), *waiting],
        ),
        out_shape=jax.ShapeDtypeStruct((tm, n), options.out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=tpu_many.cost(m, weight, options, itemsize),
        interpret=interpret,
        name="block_sparse_matmul" if axis == 0 else "block_sparse_matmul_dx",
    )(lists[axis], lists[1 - axis], *layer, *operands)
    return y[:m, : weight.shape[axis]]


def _product_kernel(
    to_ref, from_ref, *refs, axis, blocks, scaled, biased, options, scalars, split
):  # fmt: skip
    """Adds the products of the blocks of one copy."""
    x_ref, values_ref, *refs = refs[scalars:]
    scales_ref = refs.pop(0) if scaled else None
    bias_ref = refs.pop(0) if biased else None
    y_ref, sums_ref, products_ref, split_ref = (*refs, None, None)[:4]
    copy, *block = values_ref.shape
    m, step = y_ref.shape[0], pl.program_id(1)
    across = functools.partial(_across, y_ref.shape[1], block[axis])

    @pl.when(step == 0)
    def _():
        def clear(columns):
            sums_ref[:, columns] = jnp.zeros((sums_ref.shape[0], columns.size), jnp.float32)

        across(clear)

    def x_of(i, zero=0):
        x = x_ref[:, _columns(from_ref[step * copy + i] + zero, block[1 - axis])]
        if not scaled or axis == 0:
            return x
        parts = [x[piece * m :][:m] for piece in range(split)]
        return jnp.concatenate(tpu_many.rescaled(parts, scales_ref[i]))

    def of_pieces(i):
        if split_ref is not None:
            tpu_many.split(values_ref.at[i], split_ref)
        end = 0
        for piece in range(1 if split_ref is None else split):
            # Zero, which is not known: what was stored or loaded before is loaded again, not kept
            # in registers.
            zero = jnp.minimum(step * copy + i + piece, 0)
            if split_ref is None:
                w = values_ref[i]
            else:
                w = pltpu.bitcast(split_ref[zero + piece], x_ref.dtype)
            rows = (split - piece) * m
            y = reference.dot(x_of(i, zero)[:rows], w, ((1,), (1 - axis,)))
            products_ref[end : end + rows] = y
            end += rows
        return pieces.total(products_ref[:end], m)

    def product(i):
        if split == 1:
            y = reference.dot(x_of(i), values_ref[i], ((1,), (1 - axis,)))
        else:
            y = of_pieces(i)
        return y * scales_ref[i] if scaled and axis == 0 else y

    held, together = held_together(m, block[axis], copy, split)

    def add(first, count):
        for start in range(0, count, held):
            together = range(start, min(start + held, count))
            products = [product(first + i) for i in together]
            for i, y in zip(together, products, strict=True):
                sums_ref[:, _columns(to_ref[step * copy + first + i], block[axis])] += y

    _each(jnp.minimum(copy, blocks - step * copy), together, add)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        def write(columns):
            y = sums_ref[:, columns]
            bias = jnp.broadcast_to(bias_ref[:, columns], y.shape) if biased else None
            y_ref[:, columns] = reference.finish(y, bias, options)

        across(write)


def held_together(rows: int, outputs: int, copy: int, split: int = 1) -> tuple[int, int]:
    """How many blocks' products are computed before they are added, and how many a loop takes.

    As many as the registers hold: they do not wait for each other, while sums may meet in the same
    place.

    Args:
      rows: of a tile.
      outputs: of a block.
      copy: blocks in a copy.
      split: pieces of x; the products of several leave no registers for those of another block.
    """
    if split > 1:
        return 1, 1
    fitting = _REGISTERS // (rows * outputs * 4)
    held = min(max(fitting, 1), 8)
    return held, min(max(held, 2 if fitting else 1), copy)


def _values_gradient(x, weight, dz, chip, interpret):
    """``(blocks, bn, bk)``: dzᵀ x where the blocks are."""
    m, blocks, (bn, bk) = x.shape[0], len(weight.values), weight.block
    n, k = _padded(weight, 0), _padded(weight, 1)
    tm = gradient_rows(m, weight, x.dtype.itemsize)
    x = reference.pad_columns(_pad_rows(x, tm), k)
    # Transposed once, rather than in each block.
    dz = reference.pad_columns(_pad_rows(dz, tm), n).T
    depth = _gradient_depth(tm, weight, chip)
    factors = (bn, depth), (depth, bk)
    split = [pltpu.VMEM((pieces.COUNT, *shape), jnp.bfloat16) for shape in factors]
    copy = gradient_copy(weight)
    return on_tpu(
        functools.partial(_values_gradient_kernel, blocks=blocks, depth=depth),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(-(-blocks // copy), x.shape[0] // tm),
            in_specs=[
                pl.BlockSpec((tm, k), lambda step, i, *_: (i, 0)),
                pl.BlockSpec((n, tm), lambda step, i, *_: (0, i)),
            ],
            out_specs=pl.BlockSpec((copy, bn, bk), lambda step, i, *_: (step, 0, 0)),
            scratch_shapes=[
                pltpu.VMEM((copy, bn, bk), jnp.float32),
                *(split if x.dtype == jnp.float32 else []),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(weight.values.shape, reference.gradient_dtype(weight)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=tpu_many.cost(m, weight, Options(None, x.dtype.name), x.dtype.itemsize),
        interpret=interpret,
        name="block_sparse_matmul_dvalues",
    )(weight.rows, weight.columns, x, dz)


def _values_gradient_kernel(
    rows_ref, columns_ref, x_ref, dz_ref, out_ref, sums_ref, *split_refs, blocks, depth
):
    """Adds what some rows of x and dz give to the blocks of one copy."""
    copy, bn, bk = out_ref.shape
    first = pl.program_id(0) * copy
    tile = pl.program_id(1)
    large = bn * bk > _LANES**2

    @pl.when(tile == 0)
    def _():
        def clear(i, _):
            sums_ref[i] = jnp.zeros((bn, bk), jnp.float32)

        jax.lax.fori_loop(0, copy, clear, None)

    def add(start, count):
        for i in range(count):
            row, column = rows_ref[first + start + i], columns_ref[first + start + i]
            for part in range(0, x_ref.shape[0], depth):
                rows = pl.ds(part, depth)
                dz, x = dz_ref[_columns(row, bn), rows], x_ref[rows, _columns(column, bk)]
                if not split_refs:
                    sums_ref[start + i] += reference.dot(dz, x, ((1,), (0,)))
                    continue
                for ref, factor in zip(split_refs, (dz, x), strict=True):
                    # Some rows after the other, as many as registers hold.
                    for some in range(0, factor.shape[0], _SPLIT):
                        for piece, value in enumerate(pieces.split(factor[some : some + _SPLIT])):
                            ref[piece, pl.ds(some, _SPLIT)] = value
                pairs = pieces.pairs(pieces.COUNT, pieces.COUNT)
                for turn, (of_dz, of_x) in enumerate(pairs):
                    # Zero, which is not known: pieces are loaded again, not kept in registers.
                    zero = jnp.minimum(row + turn, 0) if large else 0
                    dz, x = split_refs[0][of_dz + zero], split_refs[1][of_x + zero]
                    sums_ref[start + i] += reference.dot(dz, x, ((1,), (0,)))

    # The products of pieces of large blocks leave no registers for those of another block.
    together = 1 if split_refs and large else min(2, copy)
    _each(jnp.minimum(copy, blocks - first), together, add)

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        def write(i, _):
            out_ref[i] = sums_ref[i].astype(out_ref.dtype)

        jax.lax.fori_loop(0, copy, write, None)


def _each(size, together, run):
    """Calls ``run(start, count)`` for all of ``size`` items, so many together while there are."""
    whole = jax.lax.div(size, together)  # `//` asks for the sign, which needs a TPU to lower
    jax.lax.fori_loop(0, whole, lambda i, _: run(i * together, together), None)
    if together > 1:
        jax.lax.fori_loop(whole * together, size, lambda i, _: run(i, 1), None)


def _across(size, width, run):
    """Calls ``run(columns)`` for all columns, a block's at a time."""

    def one(i, _):
        run(_columns(i, width))

    jax.lax.fori_loop(0, size // width, one, None)


def _columns(block, width):
    """The columns of a block, which are aligned."""
    return pl.ds(pl.multiple_of(block * width, width), width)


def _rows(m: int, row: int, room: int) -> int:
    """Rows of a tile, each of so many bytes; 0 where 128 do not fit into the room."""
    if row * _LANES > room:
        return 0
    return next(t for t in (min(-(-m // 16) * 16, 256), _LANES) if row * t <= room)


def product_rows(m, weight, axis, itemsize, out_itemsize) -> int:
    """Rows of the tile of the product; 0 where there are more, or those of a tile do not fit.

    Held are two copies of x and y each, and the f32 sums.
    """
    n, k = _padded(weight, axis), _padded(weight, 1 - axis)
    row = 2 * k * _bytes(itemsize) + n * (4 + 2 * out_itemsize)
    # Of f32 the products of pieces wait in memory, too, and the pieces of a block.
    return 0 if m > _LANES else _rows(m, row, _VMEM - (4 if itemsize < 4 else 8) * _COPY)


def gradient_copy(weight: BlockSparse) -> int:
    """Blocks whose gradients a grid step adds to."""
    return min(len(weight.values), max(1, _SUMS // (math.prod(weight.block) * 4)))


def gradient_rows(m, weight, itemsize) -> int:
    """Rows of a tile of the gradient to the values: two copies of x and dz each."""
    sums = _SUMS * (4 + 2 * jnp.dtype(reference.gradient_dtype(weight)).itemsize) // 4
    row = 2 * (_padded(weight, 0) + _padded(weight, 1)) * itemsize
    return _rows(m, row, _VMEM - 4 * _COPY - sums)


def _gradient_depth(tm: int, weight: BlockSparse, chip: Chip) -> int:
    """Rows of a tile that are multiplied at a time.

    A matrix unit of fewer than the tile's would add up its products of large blocks in registers.
    """
    large = math.prod(weight.block) > _LARGEST**2 // 4
    return _LANES if large and chip.mxu == _LANES and tm % _LANES == 0 else tm


def _bytes(itemsize: int) -> int:
    """Of an entry of x as it is multiplied."""
    return 2 * pieces.COUNT if itemsize == 4 else itemsize


def _padded(weight: BlockSparse, axis: int) -> int:
    """Outputs (axis 0) or inputs (1) of whole blocks."""
    return weight.grid[axis] * weight.block[axis]


def copy_size(weight: BlockSparse) -> int:
    """Blocks in a copy."""
    bn, bk = weight.block
    return min(len(weight.values), max(1, _COPY // (bn * bk * weight.values.dtype.itemsize)))


def _pad_rows(x: jax.Array, tile: int) -> jax.Array:
    return jnp.pad(x, ((0, -len(x) % tile), (0, 0)))
