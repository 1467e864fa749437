"""What the decoding kernel for TPUs computes: a block of a sequence's cache (``tpu_decode``)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels import gathers, pieces
from jaxcomp.kernels.calls import apart
from jaxcomp.kernels.quantized_matmul import tpu_float8
from jaxcomp.kernels.sparse_attention import rows as rows_of
from jaxcomp.kernels.sparse_attention.rules import Mask
from jaxcomp.kernels.sparse_attention.tpu_columns import (
    SUBLANES,
    WORD,
    Rows,
    columns_of,
    divided,
    iota,
    multiple,
)
from jaxcomp.kernels.sparse_attention.tpu_kernels import (
    LOWEST,
    MASKED,
    across,
    dot,
    folded,
    lanes,
    sums,
    touch,
)
from jaxcomp.kernels.sparse_attention.tpu_walk import LANES, LOG2_E

# Products that are computed at once.
PRODUCTS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Config:
    """What a kernel knows before it runs.

    Attributes:
      rows: of queries.
      mask: bound to the whole cache's capacity.
      rule: whether the mask is one rule on positions; else there are bits.
      block: positions of a block.
      steps: of a sequence.
      factor: of the products; of the capped ones before the cap.
      soft_cap: bound of the scores.
      span_ramp: length of the spans' ramps.
      without_loop: products of a block that are computed without a loop.
      float8: names of the floats of eight bits that the matrix unit takes beside bfloat16.
      code_parts: of the code of a full block, see ``_code_parts``.
      split: pieces of queries and weights, see ``pieces``.
      interpreted: whether the kernel is.
    """

    rows: Rows
    mask: Mask
    rule: bool
    block: int
    steps: int
    factor: float
    soft_cap: float | None
    span_ramp: float
    without_loop: int
    float8: frozenset[str]
    code_parts: int
    split: int
    interpreted: bool

    def in_words(self, dtype: jax.typing.DTypeLike) -> bool:
        """Whether codes are converted by ``tpu_float8``, which makes a number of each."""
        return dtype == jnp.float8_e4m3fn and jnp.dtype(dtype).name not in self.float8

    def unit(self, dtype: jax.typing.DTypeLike) -> float:
        """What a 1 among converted keys or values stands for."""
        return tpu_float8.UNIT if self.in_words(dtype) else 1.0

    @property
    def columns(self) -> int:
        """Of a block and a set."""
        return self.block * self.rows.heads

    def parts(self, edge: bool) -> tuple[int, bool]:
        """Columns that are computed at once, and whether a loop goes over them.

        Args:
          edge: whether the cache ends in the block. A sequence has one such: its code may be slow,
            and what is masked takes registers.
        """
        rows = self.rows
        loop = edge or self.split * rows.sets * rows.count * self.columns > self.without_loop
        return columns_at_once(self.split * rows.count << edge, self.columns), loop

    def operand_pieces(self, dtype: jax.typing.DTypeLike) -> int:
        """Pieces of keys or values of a dtype."""
        return self.split if dtype == jnp.float32 else 1

    def products(self, dtype: jax.typing.DTypeLike) -> int:
        """Products of pieces of a row with those of keys or values of a dtype."""
        return len(pieces.pairs(self.split, self.operand_pieces(dtype)))


def decode_kernel(config: Config, refs) -> None:
    """One step: a block of one sequence.

    Args:
      config: of the kernel.
      refs: scalars and operands by name, None where there are none; "out" and "lse"; and memory.
        Of merged rows the "top" score so far, the "highest" with this block and the "total" of
        weights, by lanes; the "sum" of weighted values and "sums" of parts; a block's "scores",
        what is "allowed" of them, the "distance" of their positions, and scales that are "spread"
        over its columns. And what is made once, as it would wait for its use in registers: heads of
        lanes, "lane_heads", and the "bit" of a row in the words of "bits".
    """
    rows = config.rows
    sequence, step = pl.program_id(0), pl.program_id(1)
    length, filled = refs.lengths[sequence], refs.filled[sequence]
    if refs.listed is None:
        index = step if refs.first is None else refs.first[sequence] + step
        some = index * config.block < filled
    else:
        index = refs.listed[sequence * config.steps + step]
        some = step < refs.number[sequence]
    here = index * config.block

    @pl.when(step == 0)
    def _():
        refs.top[...] = jnp.full_like(refs.top, LOWEST)
        refs.highest[...] = jnp.full_like(refs.highest, LOWEST)
        refs.total[...] = jnp.zeros_like(refs.total)
        refs.sum[...] = jnp.zeros_like(refs.sum)
        refs.lane_heads[...] = rows.lane_heads()
        if not config.rule:
            refs.bit[...] = jnp.left_shift(1, rows.within(refs.bit.shape) & (rows_of.BITS - 1))
        touch(
            refs.scores, refs.spread, refs.allowed, refs.distance, refs.sums, refs.products
        )  # fmt: skip

    inside = here + config.block <= filled
    where = {"length": length, "first": refs.start[0] + here}
    add = functools.partial(_add, config, refs, **where)
    pl.when(some & inside)(functools.partial(add, None))
    pl.when(some & ~inside)(functools.partial(add, filled - here))

    @pl.when(step == config.steps - 1)
    def _():
        _finish(config, refs, length)


def _add(config: Config, refs, count, length, first) -> None:
    """Adds a block.

    Args:
      config: of the kernel.
      refs: of the kernel.
      count: positions that are filled; None for all.
      length: of the sequence.
      first: position of the block's first.
    """
    rows = config.rows
    width, loop = config.parts(edge=count is not None)

    def score(of, start):
        scores = _scores(config, refs, of, start, width)
        scores = jnp.where(_allowed(config, refs, of, start, width, count), scores, MASKED)
        refs.scores[of, :, pl.ds(start, width)] = scores
        refs.highest[of] = jnp.maximum(refs.highest[of], across(jnp.maximum, scores))

    def fade(of):
        before, after = refs.top[of], rows.across(refs.highest[of], jnp.maximum)
        refs.top[of], refs.highest[of] = after, after
        faded = jnp.exp2(before - after)
        refs.total[of] *= faded
        refs.sum[of] *= lanes(rows.by_row(faded), refs.sum.shape[-1])

    def add(of, start):
        weights = jnp.exp2(refs.scores[of, :, pl.ds(start, width)] - lanes(refs.top[of], width))
        if refs.span is not None:
            weights *= _span_weights(config, refs, of, start, width)
        refs.total[of] += folded(weights)
        if refs.v_scale is not None:
            weights *= _scales(config, refs, of, start, width, values=True)
        shares = rows.split(weights, refs.lane_heads[...])
        if config.split > 1:
            shares = jnp.concatenate(pieces.split(shares))
        shares = shares.astype(refs.q.dtype)
        values = _operand(config, refs, refs.v, of, start, width, refs.q.dtype, count)
        # Sums of one set are few. Those of all heads at once wait for each other in memory.
        parts = sums(width) if rows.sets == 1 else 1
        for part in range(parts):
            along = slice(part * width // parts, (part + 1) * width // parts)
            own = [value[along] for value in values]
            _products(config, refs.sums.at[part], shares[:, along], own, transposed=False)
        found = [pieces.total(refs.sums[part], rows.count) for part in range(parts)]
        refs.sum[of] += functools.reduce(jnp.add, found)

    def find_positions(start):
        if config.rule:
            _allow(config, refs, start, width, count, length, first)
        if refs.span is not None:
            _distances(config, refs, start, width, length, first)

    def spread():
        if refs.k_scale is not None:
            _spread(config, refs, count)

    def each(body):
        return functools.partial(_each, config.columns, width, loop, body)

    def of_sets(body):
        return [functools.partial(body, of) for of in range(rows.sets)]

    before = [spread, each(find_positions)]
    scores, adds = ([each(body) for body in of_sets(body)] for body in (score, add))
    scores.append(_joined(of_sets(fade)))
    if count is not None:
        apart([*before, *scores, *adds], length)
        return
    unrolled = adds
    if not loop:
        starts = range(0, config.columns, width)
        unrolled = [functools.partial(one, start) for one in of_sets(add) for start in starts]
    parts = {
        1: [[*before, *scores, *adds]],
        2: [[*before, *scores], adds],
        3: [before, scores, adds],
        4: [before, scores, *([one] for one in adds)],
        5: [*([one] for one in before), scores, *([one] for one in unrolled)],
    }
    bodies = [_joined(part) for part in parts[config.code_parts]]
    if len(bodies) == 1:
        bodies[0]()
    else:
        apart(bodies, length)


def _joined(bodies):
    """One body of several."""

    def all_of_them():
        for body in bodies:
            body()

    return all_of_them


def _each(columns: int, width: int, loop: bool, body) -> None:
    """Takes a body over parts of a set's columns, each from a first column on."""

    def one(part, _):
        body(pl.multiple_of(part * width, LANES))

    if loop and columns > width:
        jax.lax.fori_loop(0, columns // width, one, None)
    else:
        for start in range(0, columns, width):
            body(start)


def _scores(config: Config, refs, of, start, width: int) -> jax.Array:
    """Scores over log 2, (merged, width), of a set's columns from ``start``, before any mask."""
    keys = _operand(config, refs, refs.k, of, start, width, refs.q.dtype)
    if config.split == 1:
        products = dot(refs.q[of], keys[0], transposed=True)
    else:
        _products(config, refs.products.at[:, pl.ds(0, width)], refs.q[of], keys, transposed=True)
        products = pieces.total(refs.products[:, :width], config.rows.count)
    scores = config.rows.merge(products, refs.lane_heads[...])
    if refs.k_scale is None:
        scores *= config.factor
    else:
        scores *= _scales(config, refs, of, start, width, values=False)
    if config.soft_cap:
        scores = jnp.tanh(scores) * (config.soft_cap * LOG2_E)
    return scores


def _products(config: Config, ref, rows: jax.Array, columns: list, *, transposed: bool) -> None:
    """Writes the products of rows with columns, one below the other those of all pairs of pieces.

    Args:
      config: of the kernel.
      ref: f32 ``(pairs * rows, ..)``.
      rows: of one piece after those of another, which are more important.
      columns: pieces of keys or values.
      transposed: whether rows are multiplied with the transpose.
    """
    end = 0
    for piece, own in enumerate(columns):
        # Of each piece of a column those of rows that count.
        count = rows.shape[0] - piece * config.rows.count
        ref[end : end + count] = dot(rows[:count], own, transposed=transposed)
        end += count


def _through_memory(config: Config, refs, ref, start, width: int, count) -> list[jax.Array]:
    """Pieces of f32 keys or values, which are more than registers hold: by way of memory.

    Arguments are those of ``_operand``.
    """
    dim = ref.shape[-1]
    for first in range(0, width, 2 * SUBLANES):
        held = ref[0, pl.ds(multiple(start + first, 2 * SUBLANES), 2 * SUBLANES), :]
        held = _filled_rows(config, held, start + first, count)
        for piece, part in enumerate(pieces.split(held)):
            place = piece, pl.ds(first // 2, SUBLANES), pl.ds(0, dim)
            refs.pieces[place] = pltpu.bitcast(part, jnp.int32)
    # Zero, which is not known: else what is stored would be kept in registers.
    zero = jnp.minimum(refs.lengths[0], 0)
    words = [
        refs.pieces[zero + i, pl.ds(0, width // 2), pl.ds(0, dim)] for i in range(pieces.COUNT)
    ]
    return [pltpu.bitcast(own, jnp.bfloat16) for own in words]


def _filled_rows(config: Config, held: jax.Array, start, count) -> jax.Array:
    """Keys or values of columns from ``start``, with zeros past those of ``count`` positions."""
    if count is None:
        return held
    filled = start + iota((held.shape[0], 1), 0) < count * config.rows.heads
    return jnp.where(filled, held, jnp.zeros_like(held))


def _operand(
    config: Config, refs, ref, of, start, width: int, dtype, count=None
) -> list[jax.Array]:
    """Pieces of keys or values of a set's columns from ``start``, as the matrix unit takes them.

    They are read in words: codes of eight bits would be put together from pieces of eight rows.

    Args:
      config: of the kernel.
      refs: of the kernel.
      ref: of a block of keys or values.
      of: number of the set.
      start: first column.
      width: columns.
      dtype: of the result.
      count: positions, if not all, past which they are zeros: there may be anything, and not a
        number times zero is not zero.
    """
    if ref.dtype.itemsize > 1:
        if config.operand_pieces(ref.dtype) > 1:
            return _through_memory(config, refs, ref, start, width, count)
        held = ref[0, pl.ds(start, width), :].astype(dtype)
        return [_filled_rows(config, held, start, count)]
    words, sets = width // WORD, config.rows.sets
    if config.interpreted:  # It knows no references of another type.
        every = ref[0, pl.ds(multiple(start * sets, LANES), width * sets), :]
        own = every.reshape(words, sets, WORD, every.shape[1])[:, of]
        own = pltpu.bitcast(own.reshape(width, every.shape[1]), jnp.int32)
    else:
        first = multiple(divided(start, WORD)[0] * sets, LANES // WORD)
        every = ref.bitcast(jnp.int32).at[0, pl.ds(first, words * sets)]
        own = every[pl.ds(of, words, stride=sets), :] if sets > 1 else every[...]
    numbers = jnp.issubdtype(ref.dtype, jnp.integer) or config.in_words(ref.dtype)
    if count is not None and not numbers:
        own = _filled(own, count * config.rows.heads - start, config.rows.heads)
    codes = pltpu.bitcast(own, ref.dtype)
    if dtype == jnp.bfloat16 and ref.dtype.name in config.float8:
        return [codes]
    if config.in_words(ref.dtype):
        codes = tpu_float8.sixteenths(codes)
    return [codes.astype(dtype)]


def _filled(words: jax.Array, count, heads: int) -> jax.Array:
    """Words of four codes, of rows in order, with zeros from a code on.

    Args:
      words: int32.
      count: codes before that one, a multiple of ``heads``.
      heads: of a position.
    """
    row, pieces = iota((SUBLANES, words.shape[1]), 0), []
    for first in range(0, words.shape[0], SUBLANES):
        # The number that a loop changes comes first: else what rows are compared with is the same
        # in each of its turns, and kept, in more registers than there are.
        left = (count - WORD * first) - WORD * row
        kept = jnp.where(left > 0, -1, 0)
        if heads % WORD:
            some = jnp.left_shift(1, 8 * jnp.clip(left, 0, WORD - 1)) - 1
            kept = jnp.where(left < WORD, some, kept)
        pieces.append(words[first : first + SUBLANES] & kept)
    return jnp.concatenate(pieces)


def _by_tile(config: Config, make, start, width: int) -> jax.Array:
    """(1, width) of what ``make`` gives for each 128 columns.

    Args:
      config: of the kernel.
      make: (position, part) -> (1, 128): of columns ``part * 128`` on, counted from the first one
        of a position, which is a multiple of 128.
      start: first column.
      width: columns.
    """
    heads = config.rows.heads
    aligned = width % (LANES * heads) == 0
    tiles = []
    for number in range(width // LANES):
        # All but the position is known where parts are those of whole positions.
        group, part = divmod(number, heads)
        if aligned:
            group += divided(start, LANES * heads)[0]
        else:
            group, part = divided(divided(start, LANES)[0] + number, heads)
        tiles.append(make(group * LANES, part))
    return jnp.concatenate(tiles, axis=1)


def _k_position(config: Config, first, start, width: int) -> jax.Array:
    """Positions of columns, int32 (1, width)."""

    def position(group, part):
        return columns_of(config.rows.heads, part)[0] + (first + group)

    return _by_tile(config, position, start, width)


def _allow(config: Config, refs, start, width: int, count, length, first) -> None:
    """Writes ``allowed``, of columns of every set: not 0 where a row looks at the position."""
    rows = config.rows
    k_position = _k_position(config, first, start, width)
    query = divided(rows.within((rows.merged, LANES)), rows.group)[0]
    allowed = config.mask.allowed(lanes(length - rows.queries + query, width), k_position)
    if count is not None:
        allowed &= k_position < first + count
    if not rows.merges:
        allowed &= _own_heads(config, start, width)
    refs.allowed[:, pl.ds(start, width)] = jnp.where(allowed, 1.0, 0.0)


def _allowed(config: Config, refs, of, start, width: int, count) -> jax.Array:
    """Which scores count, bool (merged, width)."""
    rows, place = config.rows, pl.ds(start, width)
    if config.rule:
        allowed = refs.allowed[:, place] != 0
    else:
        # A load can spread a row of one register over all rows, and none of several.
        pieces = [refs.bits[pl.ds(of, 1), pl.ds(start + i, LANES)] for i in range(0, width, LANES)]
        allowed = jnp.concatenate([(piece & refs.bit[...]) for piece in pieces], axis=1) != 0
        if count is not None:
            allowed &= _k_position(config, 0, start, width) < count
        if not rows.merges:
            allowed &= _own_heads(config, start, width)
    return allowed


def _own_heads(config: Config, start, width: int) -> jax.Array:
    """Whether a column's head is the row's, bool (merged, width), of rows that are not merged."""
    rows = config.rows
    row_head = divided(iota((rows.merged, LANES), 0), rows.each)[0]
    head = _by_tile(config, lambda group, part: columns_of(rows.heads, part)[1], start, width)
    return lanes(row_head, width) == head


def _distances(config: Config, refs, start, width: int, length, first) -> None:
    """Writes ``distance``, of columns of every set."""
    rows = config.rows
    k_position = _k_position(config, first, start, width)
    query = divided(rows.within((rows.merged, LANES)), rows.group)[0]
    distance = jnp.abs(lanes(length - rows.queries + query, width) - k_position)
    refs.distance[:, pl.ds(start, width)] = distance.astype(jnp.float32)


def _span_weights(config: Config, refs, of, start, width: int) -> jax.Array:
    """What adaptive spans leave of weights, (merged, width)."""
    distance = refs.distance[:, pl.ds(start, width)]
    soft = (config.span_ramp + lanes(refs.span[of], width) - distance) * (1 / config.span_ramp)
    return jnp.clip(soft, 0.0, 1.0)


def _spread(config: Config, refs, count) -> None:
    """Writes the scales (heads, positions) in the order of columns.

    XLA would do it by way of an array whose last axis, heads, is padded to whole lanes.

    Args:
      config: of the kernel.
      refs: of the kernel; ``spread`` gets, of each set and each 128 positions, rows of 128 columns:
        those of keys, times ``factor``, and those of values.
      count: positions, if not all, past which they are zeros.
    """
    heads, shape = config.rows.heads, refs.spread.shape[2:]
    row = iota(shape, 0)
    of_values = row >= heads
    column = (row - jnp.where(of_values, heads, 0)) * LANES + iota(shape, 1)
    position, head = divided(column, heads)
    position &= LANES - 1
    units = config.unit(refs.k.dtype), config.unit(refs.v.dtype)
    factor = jnp.where(of_values, units[1], config.factor * units[0])

    def one(of, group):
        place = pl.ds(multiple(group * LANES, LANES), LANES)
        found = jnp.zeros(shape, jnp.float32)
        for number in range(heads):
            which = pl.ds(of * heads + number, 1)
            held = jnp.where(of_values, refs.v_scale[which, place], refs.k_scale[which, place])
            found = jnp.where(head == number, gathers.along(held, position, 1), found)
        found *= factor
        if count is not None:
            found = jnp.where(position < count - group * LANES, found, 0.0)
        refs.spread[of, group] = found

    for group in range(config.block // LANES):
        for of in range(config.rows.sets):
            one(of, group)


def _scales(config: Config, refs, of, start, width: int, values: bool) -> jax.Array:
    """Scales of a set's columns from ``start``, (1, width), as ``_spread`` has written them."""
    before = config.rows.heads if values else 0

    def row(position, part):
        return refs.spread[of, divided(position, LANES)[0], pl.ds(before + part, 1)]

    return _by_tile(config, row, start, width)


def _finish(config: Config, refs, length) -> None:
    """Writes a sequence's results."""
    rows = config.rows
    for of in range(rows.sets):
        totals = rows.by_row(rows.across(refs.total[of], jnp.add))
        # Queries before the sequence's start look at nothing, whatever the mask says.
        query = divided(rows.within(totals.shape), rows.group)[0]
        some = (totals > 0) & (query >= rows.queries - length)
        safe = jnp.where(some, totals, 1.0)
        share = lanes(jnp.where(some, 1.0 / safe, 0.0), refs.sum.shape[-1])
        refs.out[of] = (refs.sum[of] * share).astype(refs.out.dtype)
        exponent = rows.by_row(refs.top[of]) * (1 / LOG2_E) + jnp.log(safe)
        refs.lse[of] = jnp.where(some, exponent, -jnp.inf)


def columns_at_once(rows: int, columns: int) -> int:
    """Columns whose products are computed at once: a divisor of all, of whole lanes.

    Args:
      rows: of queries.
      columns: of a block.
    """
    width = columns
    while width * rows > PRODUCTS and width % (2 * LANES) == 0:
        width //= 2
    return width
