"""Block-sparse matmuls of many rows on TPUs (Mosaic): the outputs of a row of blocks at a time.

A grid step takes a tile of rows of x, all their inputs, and adds up the products of the blocks that
lie in one row of the weight. So sums of other outputs need no memory, tiles are as tall as x lets
them be, and the weight is read once for each tile. The blocks come through a ring of copies, which
runs ahead of the products over the ends of steps. Few rows would make many short steps: ``tpu``
has a kernel for them.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels import pieces
from jaxcomp.kernels.calls import on_tpu
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.sparse_matmul import layers, reference
from jaxcomp.kernels.sparse_matmul.blocks import BlockSparse
from jaxcomp.kernels.sparse_matmul.reference import Options

_LANES = 128
_VMEM = 48 << 20
# Most rows of a tile.
_TALLEST = 2048
# Most rows of a chunk, and outputs: products of more would be spilled.
_CHUNK = 1024
_WIDEST = 256
# Most blocks, and most products of bf16 numbers, that a step of the loop over blocks takes.
_TOGETHER = 4
_UNROLLED = 2 * 2048 * 256 * 256
# Rows of a block of f32 that are split at a time.
_SPLIT = 16
# Chips that split large blocks of f32 in code of its own: beside it they would load sums before the
# products that these are added to, and spill them.
_APART = ("7x",)
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
      apart: whether blocks of f32 are split by code of its own, not beside products.
    """

    rows: int
    together: int
    slots: int
    depth: int
    chunk: int
    apart: bool


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
    split = pieces.COUNT if itemsize == 4 else 1
    of_weight = weight_pieces(weight, split)
    # Two copies of x and of y, the sums, and a product that is added to them.
    row = 4 * split * weight.grid[1 - axis] * inputs + out * (8 + 2 * out_itemsize)
    held = (ahead + _TOGETHER) * size
    if of_weight > 1:
        held += 2 * _TOGETHER * of_weight * out * inputs
    fitting = (_VMEM - (4 << 20) - held) // row
    passes = len(pieces.pairs(split, of_weight))
    most = min(fitting, _TALLEST) // 16 * 16
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
    if of_weight > 1:
        # Splitting the next blocks, and the last products, wait for a step's end.
        together = max(min(2 * _WIDEST // inputs, limit), 1)
    chunk = _CHUNK
    if together > 2 and chip.mxu > _LANES:  # Sums of as many rows would wait in registers.
        chunk //= 2
        if weight.scales is not None:
            chunk = min(chunk, -(-rows // 32) * 16)
    apart = chip.name in _APART and out * inputs > _LANES**2
    return Tile(rows, together, ahead + together, depth, chunk, apart)


def weight_pieces(weight: BlockSparse, split: int) -> int:
    """Pieces of a block that are multiplied.

    Args:
      weight: any.
      split: pieces of x; more than one asks for all of a weight in f32.
    """
    return split if weight.values.dtype == jnp.float32 else 1


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
    itemsize, split = x.dtype.itemsize, pieces.count(x.dtype)
    x = pieces.listed(reference.pad_columns(jnp.pad(x, ((0, -m % sizes.rows), (0, 0))), k))
    padded, of_weight = x.shape[1], weight_pieces(weight, split)
    layer, (values,) = layers.of_kernel(weight)
    listed = [values]
    if weight.scales is not None:
        listed.append(weight.scales[:, None])
    operands = [x, *listed]
    in_specs = [
        pl.BlockSpec((split, sizes.rows, k), lambda i, j, *_: (0, i, 0)),
        *(pl.BlockSpec(memory_space=pl.ANY) for _ in listed),
    ]
    if bias is not None:
        operands.append(reference.pad_columns(bias.astype(jnp.float32)[None], n))
        in_specs.append(pl.BlockSpec((1, out), lambda i, j, *_: (0, j)))
    # In words of two numbers, which take whole registers.
    words = weight.block[0] // 2, weight.block[1]
    split_blocks = [(sizes.together, of_weight, *words)] if of_weight > 1 else []
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
            grid=(padded // sizes.rows, weight.grid[axis]),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((sizes.rows, out), lambda i, j, *_: (i, j)),
            scratch_shapes=[
                pltpu.VMEM((sizes.rows, out), jnp.float32),
                pltpu.SemaphoreType.DMA((len(listed), sizes.slots)),
                pltpu.VMEM((sizes.slots, *weight.block), values.dtype),
                *(pltpu.VMEM((sizes.slots, *a.shape[1:]), a.dtype) for a in listed[1:]),
                *(pltpu.VMEM(shape, jnp.int32) for shape in split_blocks),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((padded, n), options.out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=cost(m, weight, options, itemsize),
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

    def take(self, b, number, all_exist=True):
        """Waits for some blocks, and sends as many later ones into slots that were used before."""

        def wait(b):
            for copy in self._copies(b):
                copy.wait()

        for i in range(number):
            if all_exist:
                wait(b + i)
            else:
                pl.when(b + i < self.order_ref.shape[0])(functools.partial(wait, b + i))
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
    held, (pieces_ref,) = held[: len(listed)], held[len(listed) :] or (None,)
    if layered:
        listed = (listed[0].at[layer_ref[0]], *listed[1:])
    together = sizes.together
    ring = _Ring(order_ref, list(zip(listed, held, strict=True)), arrived, sizes.slots - together)
    row = pl.program_id(1)
    first, end = starts_ref[row], starts_ref[row + 1]

    def split_next(b):
        """Splits the next blocks, those of other outputs, too."""
        for i in range(together):
            slot = ring.slot(jnp.minimum(b + i, order_ref.shape[0] - 1))
            split(held[0].at[slot], pieces_ref.at[i])

    @pl.when(row == 0)
    def _():
        ring.fill()
        if pieces_ref is not None:
            ring.take(0, together, all_exist=False)
            split_next(0)

    @contextlib.contextmanager
    def taken(b, number):
        """Blocks from ``b`` on, while they are multiplied."""
        if pieces_ref is None:
            ring.take(b, number)
            yield
        else:
            # Those that follow are split while the last products are computed.
            ring.take(b + together, number, all_exist=False)
            yield
            follow = functools.partial(split_next, b + number)
            if sizes.apart:
                pl.when(b >= 0)(follow)
            else:
                follow()

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
        factors = x_ref, held, pieces_ref
        for product in _products(*factors, from_ref, ring, b, number, part, axis, sizes.depth):
            if y is None:
                before = so_far(part, begun)
            else:
                sums_ref[part] = y
                before = sums_ref[part]
            y = before + product
        return y

    def add(i, _):
        b = first + i * together
        with taken(b, together):
            for part in parts:
                sums_ref[part] = total(b, together, part, b > first)

    def finish(number, begun):
        if not number:
            for part in parts:
                y_ref[part] = reference.finish(begin(part), None, options)
            return
        with taken(end - number, number):
            for part in parts:
                y = total(end - number, number, part, begun)
                if pieces_ref is None:
                    y_ref[part] = reference.finish(y, None, options)
                else:
                    sums_ref[part] = y
        if pieces_ref is not None:
            pl.when(end > 0)(write)

    def write():
        """In code of its own: 7x would spill what it multiplies meanwhile."""
        for part in parts:
            y_ref[part] = reference.finish(sums_ref[part], None, options)

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
        if number == 0 or not (scaled or pieces_ref is not None):
            pl.when(left == number)(functools.partial(finish, number, whole > 0))
            continue
        # Products that are scaled, or many, leave no register to choose sums in meanwhile.
        for begun in (False, True):
            found = (left == number) & ((whole > 0) == begun)
            pl.when(found)(functools.partial(finish, number, begun))


def split(values_ref, pieces_ref) -> None:
    """Splits a block of f32.

    Args:
      values_ref: the block.
      pieces_ref: of int32 ``(pieces, outputs / 2, inputs)``; gets words of two bf16 numbers.
    """
    # Some outputs after the other, as many as registers hold.
    for some in range(0, values_ref.shape[0], _SPLIT):
        for piece, w in enumerate(pieces.split(values_ref[pl.ds(some, _SPLIT)])):
            pieces_ref[piece, pl.ds(some // 2, _SPLIT // 2)] = pltpu.bitcast(w, jnp.int32)


def _cut(size: int, most: int, unit: int) -> list[pl.Slice]:
    """A size in about equal parts of at most so many, which are multiples of a unit."""
    each = -(-size // (unit * -(-size // most))) * unit
    return [pl.ds(start, min(each, size - start)) for start in range(0, size, each)]


def _products(x_ref, held, pieces_ref, from_ref, ring, b, number, part, axis, depth):
    """Products of some rows and outputs with blocks from ``b`` on, which are to be added up."""
    values_ref, *scales_ref = held
    split, dtype, inputs = x_ref.shape[0], x_ref.dtype, values_ref.shape[2 - axis]
    rows, columns = part
    of_weight = 1 if pieces_ref is None else split
    outputs = (columns, slice(None)) if axis == 0 else (slice(None), columns)
    slots = [ring.slot(b + i) for i in range(number)]
    scales = [
        ref[slot, :, columns] if axis == 0 else ref[slot] for slot in slots for ref in scales_ref
    ]
    places = [
        pl.ds(pl.multiple_of(from_ref[b + i] * inputs, inputs), inputs) for i in range(number)
    ]

    def x_of(i, piece):
        return x_ref[piece, rows, places[i]]

    def w_of(i, piece):
        if of_weight == 1:
            return values_ref[(slots[i], *outputs)]
        some, along = outputs
        if axis == 0:
            some = pl.ds(columns.start // 2, columns.size // 2)
        return pltpu.bitcast(pieces_ref[i, piece, some, along], dtype)

    if scales and axis == 1:
        own = [[x_of(i, piece) for piece in range(split)] for i in range(number)]
        own = [rescaled(a, s) for a, s in zip(own, scales, strict=True)]
        x_of = lambda i, piece: own[i][piece]  # noqa: E731

    def product(x, w):
        return reference.dot(x, w, ((1,), (1 - axis,)))

    def cut(x, w):
        """Of large blocks only so many inputs at a time are added up by the matrix unit."""
        for start in range(0, inputs, depth):
            some = slice(start, start + depth)
            yield x[:, some], w[:, some] if axis == 0 else w[some]

    every = []
    for turn, (of_x, of_w) in enumerate(pieces.pairs(split, of_weight)):
        # Zero, which is not known: what is read for a product is read again for the next one that
        # it is a factor of, not kept, in registers that there are not.
        zero = jnp.minimum(b + turn, 0) if split > 1 and not (scales and axis == 1) else 0
        for i in range(number):
            for some in cut(x_of(i, of_x + zero), w_of(i, of_w + zero)):
                every.append((*some, scales[i] if scales and axis == 0 else None))
    joined = max(depth // inputs, 1) if not scales or axis == 1 else 1
    for i in range(0, len(every), joined):
        left, right, scale = zip(*every[i : i + joined], strict=True)
        y = product(jnp.concatenate(left, axis=1), jnp.concatenate(right, axis=1 - axis))
        yield y if scale[0] is None else y * scale[0]


def rescaled(x: list[jax.Array], scales: jax.Array) -> list[jax.Array]:
    """Pieces of rows, scaled: they are put together, and split again."""
    whole = functools.reduce(jnp.add, [piece.astype(jnp.float32) for piece in x]) * scales
    return pieces.split(whole) if len(x) > 1 else [whole.astype(x[0].dtype)]
