"""Block-sparse matmuls of many rows on TPUs (Mosaic): the outputs of a row of blocks at a time.

A grid step takes a tile of rows of x, all their inputs, and adds up the products of the blocks that
lie in one row of the weight. So sums of other outputs need no memory, tiles are as tall as x lets
them be, and the weight is read once for each tile. The blocks come through a ring of copies, which
runs ahead of the products over the ends of steps. Few rows would make many short steps: ``tpu``
has a kernel for them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels.calls import on_tpu
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.sparse_matmul import layers, reference
from jaxcomp.kernels.sparse_matmul.blocks import BlockSparse
from jaxcomp.kernels.sparse_matmul.reference import Options

_LANES = 128
_VMEM = 48 << 20
# Rows of a tile in bf16; in f32, whose products cost more, half of them.
_TALLEST = 2048
# Most rows of a chunk, and outputs: products of more would be spilled.
_CHUNK = 1024
_WIDEST = 256
# Most blocks, and most products of bf16 numbers, that a step of the loop over blocks takes.
_TOGETHER = 4
_UNROLLED = 2 * 2048 * 256 * 256
# Bytes of blocks that are on their way while others are multiplied.
_RING = 2 << 20


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes of a product.

    Attributes:
      rows: of x in a grid step.
      together: blocks that a step of the loop over them takes.
      slots: of the ring of blocks.
      depth: inputs whose products are added up before they are added to others.
      chunk: rows whose products with all blocks of a loop's step are finished before those of
        others begin.
    """

    rows: int
    together: int
    slots: int
    depth: int
    chunk: int


def tile(
    m: int, weight: BlockSparse, axis: int, itemsize: int, out_itemsize: int, chip: Chip
) -> Tile | None:
    """The tile of a product, or None where the inputs of 16 rows do not fit into VMEM.

    Args:
      m: rows of x.
      weight: any.
      axis: of the weight that is summed to.
      itemsize: bytes of an entry of x.
      out_itemsize: bytes of an entry of y.
      chip: a TPU.
    """
    out, inputs = weight.block[axis], weight.block[1 - axis]
    size = out * inputs * weight.values.dtype.itemsize
    ahead = max(2, _RING // size)
    # Two copies of x and of y, the sums, and a product that is added to them.
    row = 2 * weight.grid[1 - axis] * inputs * itemsize + out * (8 + 2 * out_itemsize)
    fitting = (_VMEM - (4 << 20) - (ahead + _TOGETHER) * size) // row
    passes = itemsize // 2
    most = min(fitting, _TALLEST // passes) // 16 * 16
    if most <= 0:
        return None
    # As many tiles as it takes and cores share, and none larger than it has to be.
    tiles = -(-m // most)
    if m >= 256 * chip.cores:
        tiles = -(-tiles // chip.cores) * chip.cores
    rows = -(-m // (16 * tiles)) * 16
    depth = 2 * chip.mxu
    # Sums of one product that wait for a second one of a wide matrix unit would be spilled.
    limit = _TOGETHER if chip.mxu == _LANES else min(depth // inputs, _TOGETHER)
    together = max(min(_UNROLLED // (rows * passes * out * inputs), limit), 1)
    chunk = _CHUNK
    if together > 2 and chip.mxu > _LANES:  # Sums of as many rows would wait in registers.
        chunk //= 2
        if weight.scales is not None:
            chunk = min(chunk, -(-rows // 32) * 16)
    return Tile(rows, together, ahead + together, depth, chunk)


def matmul(
    x: jax.Array,
    weight: BlockSparse,
    bias: jax.Array | None,
    options: Options,
    axis: int,
    chip: Chip,
    interpret=False,
) -> jax.Array:
    """Sums over the list: of x Wᵀ, to outputs (axis 0), or of x W, to inputs (axis 1).

    Args:
      x: ``(M, K)``, or ``(M, N)`` for axis 1; bf16 or f32.
      weight: that fits.
      bias: of what is summed to, or None.
      options: what is fused.
      axis: of the weight that is summed to.
      chip: whose matrix unit to fill.
      interpret: False, or ``pltpu.InterpretParams(..)``.

    Returns:
      ``(M, N)``, or ``(M, K)`` for axis 1.
    """
    m, out = x.shape[0], weight.block[axis]
    n, k = (weight.grid[a] * weight.block[a] for a in (axis, 1 - axis))
    out_itemsize = jnp.dtype(options.out_dtype).itemsize
    sizes = tile(m, weight, axis, x.dtype.itemsize, out_itemsize, chip)
    x = reference.pad_columns(jnp.pad(x, ((0, -m % sizes.rows), (0, 0))), k)
    layer, (values,) = layers.of_kernel(weight)
    listed = [values]
    if weight.scales is not None:
        listed.append(weight.scales[:, None])
    operands = [x, *listed]
    in_specs = [
        pl.BlockSpec((sizes.rows, k), lambda i, j, *_: (i, 0)),
        *(pl.BlockSpec(memory_space=pl.ANY) for _ in listed),
    ]
    if bias is not None:
        operands.append(reference.pad_columns(bias.astype(jnp.float32)[None], n))
        in_specs.append(pl.BlockSpec((1, out), lambda i, j, *_: (0, j)))
    body = functools.partial(
        _kernel,
        axis=axis,
        scaled=weight.scales is not None,
        biased=bias is not None,
        options=options,
        sizes=sizes,
        layered=bool(layer),
    )
    y = on_tpu(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3 + len(layer),
            grid=(x.shape[0] // sizes.rows, weight.grid[axis]),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((sizes.rows, out), lambda i, j, *_: (i, j)),
            scratch_shapes=[
                pltpu.VMEM((sizes.rows, out), jnp.float32),
                pltpu.SemaphoreType.DMA((len(listed), sizes.slots)),
                pltpu.VMEM((sizes.slots, *weight.block), values.dtype),
                *(pltpu.VMEM((sizes.slots, *a.shape[1:]), a.dtype) for a in listed[1:]),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], n), options.out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=cost(m, weight, options, x.dtype.itemsize),
        interpret=interpret,
        name="block_sparse_matmul_many" + ("_dx" if axis else ""),
    )(*_visits(weight, axis), *layer, *operands)
    return y[:m, : weight.shape[axis]]


def cost(m: int, weight: BlockSparse, options: Options, itemsize: int) -> pl.CostEstimate:
    """What a product over the list costs, for XLA's scheduler and counts.

    Args:
      m: rows.
      weight: any.
      options: what is fused.
      itemsize: bytes of an entry of x.
    """
    values, (n, k) = weight.values, weight.shape
    rows = m * (k * itemsize + n * jnp.dtype(options.out_dtype).itemsize)
    return pl.CostEstimate(
        flops=2 * m * values.size,
        transcendentals=0 if options.activation in (None, "relu") else m * n,
        bytes_accessed=values.size * values.dtype.itemsize + rows,
    )


def _visits(weight: BlockSparse, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where each row of blocks begins, the blocks in that order, and which part of x each takes."""
    lists = weight.rows, weight.columns
    to, order = lists[axis], jnp.arange(len(weight.values), dtype=jnp.int32)
    if axis == 1 or weight.parts[1] > 1:
        to, order = jax.lax.sort_key_val(to, order)
    starts = jnp.searchsorted(to, jnp.arange(weight.grid[axis] + 1), method="compare_all")
    return starts.astype(jnp.int32), order, lists[1 - axis][order]


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Copies of blocks, in the order of their use.

    Attributes:
      order_ref: which block of the list each is.
      pairs: of listed arrays, and of memory for some of their blocks.
      arrived: semaphores ``(pairs, slots)``.
      ahead: how many are on their way.
    """

    order_ref: jax.Ref
    pairs: list
    arrived: jax.Ref
    ahead: int

    def slot(self, b):
        """Where a block is while it is used."""
        return jax.lax.rem(b, self.arrived.shape[1])

    def fill(self):
        """Sends the first blocks on their way."""
        jax.lax.fori_loop(0, self.ahead, lambda b, _: self._start(b), None)

    def take(self, b, number):
        """Waits for some blocks, and sends as many later ones into slots that were used before."""
        for i in range(number):
            for copy in self._copies(b + i):
                copy.wait()
            self._start(b + i + self.ahead)

    def _start(self, b):
        @pl.when(b < self.order_ref.shape[0])
        def _():
            for copy in self._copies(b):
                copy.start()

    def _copies(self, b):
        block, slot = self.order_ref[b], self.slot(b)
        return [
            pltpu.make_async_copy(listed.at[block], held.at[slot], self.arrived.at[i, slot])
            for i, (listed, held) in enumerate(self.pairs)
        ]


def _kernel(
    starts_ref, order_ref, from_ref, *refs, axis, scaled, biased, options, sizes, layered
):  # fmt: skip
    """The outputs of one row of blocks."""
    layer_ref, x_ref, *refs = refs if layered else (None, *refs)
    listed, refs = refs[: 1 + scaled], list(refs[1 + scaled :])
    bias_ref = refs.pop(0) if biased else None
    y_ref, sums_ref, arrived, *held = refs
    if layered:
        listed = (listed[0].at[layer_ref[0]], *listed[1:])
    together = sizes.together
    ring = _Ring(order_ref, list(zip(listed, held, strict=True)), arrived, sizes.slots - together)
    row = pl.program_id(1)
    first, end = starts_ref[row], starts_ref[row + 1]
    pl.when(row == 0)(ring.fill)

    def begin(part):
        rows, columns = part
        zeros = jnp.zeros((rows.size, columns.size), jnp.float32)
        return jnp.broadcast_to(bias_ref[:, columns], zeros.shape) if biased else zeros

    def so_far(part, begun):
        if isinstance(begun, bool):
            return sums_ref[part] if begun else begin(part)
        return jnp.where(begun, sums_ref[part], begin(part))

    def total(b, number, part, begun):
        """Sums up to some blocks; between products they leave the registers."""
        y = None
        for product in _products(x_ref, held, from_ref, ring, b, number, part, axis, sizes.depth):
            if y is None:
                before = so_far(part, begun)
            else:
                sums_ref[part] = y
                before = sums_ref[part]
            y = before + product
        return y

    def add(i, _):
        b = first + i * together
        ring.take(b, together)
        for part in parts:
            sums_ref[part] = total(b, together, part, b > first)

    def finish(number, begun):
        ring.take(end - number, number)
        for part in parts:
            y = total(end - number, number, part, begun) if number else begin(part)
            y_ref[part] = reference.finish(y, None, options)

    parts = [
        (rows, columns)
        for rows in _cut(sizes.rows, sizes.chunk, 16)
        for columns in _cut(y_ref.shape[1], _WIDEST, _LANES)
    ]
    # The last blocks of a row finish its outputs.
    whole = jax.lax.div(jnp.maximum(end - first - 1, 0), together)
    jax.lax.fori_loop(0, whole, add, None)
    left = end - first - whole * together
    for number in range(together + 1):
        if not scaled or number == 0:
            pl.when(left == number)(functools.partial(finish, number, whole > 0))
            continue
        # Products that are scaled wait longer: there is no register to choose sums in meanwhile.
        for begun in (False, True):
            found = (left == number) & ((whole > 0) == begun)
            pl.when(found)(functools.partial(finish, number, begun))


def _cut(size: int, most: int, unit: int) -> list[pl.Slice]:
    """A size in about equal parts of at most so many, which are multiples of a unit."""
    each = -(-size // (unit * -(-size // most))) * unit
    return [pl.ds(start, min(each, size - start)) for start in range(0, size, each)]


def _products(x_ref, held, from_ref, ring, b, number, part, axis, depth):
    """Products of some rows and outputs with blocks from ``b`` on, which are to be added up."""
    values_ref, *scales_ref = held
    inputs = values_ref.shape[2 - axis]
    rows, columns = part
    x, w, scales = [], [], []
    for i in range(number):
        slot = ring.slot(b + i)
        x.append(x_ref[rows, pl.ds(pl.multiple_of(from_ref[b + i] * inputs, inputs), inputs)])
        w.append(values_ref[slot, columns] if axis == 0 else values_ref[slot, :, columns])
        scales += [ref[slot, :, columns] if axis == 0 else ref[slot] for ref in scales_ref]

    def product(x, w):
        return reference.dot(x, w, ((1,), (1 - axis,)))

    def cut(x, w):
        """Of large blocks only so many inputs at a time are added up by the matrix unit."""
        for start in range(0, inputs, depth):
            some = slice(start, start + depth)
            yield x[:, some], w[:, some] if axis == 0 else w[some]

    if scales and axis == 0:
        for *block, s in zip(x, w, scales, strict=True):
            yield from (product(*part) * s for part in cut(*block))
        return
    if scales:
        x = [(a.astype(jnp.float32) * s).astype(a.dtype) for a, s in zip(x, scales, strict=True)]
    pairs = [part for block in zip(x, w, strict=True) for part in cut(*block)]
    joined = max(depth // inputs, 1)
    for i in range(0, len(pairs), joined):
        x, w = zip(*pairs[i : i + joined], strict=True)
        yield product(jnp.concatenate(x, axis=1), jnp.concatenate(w, axis=1 - axis))
