"""Attention of the newest tokens to a long cache: a kernel for TPUs, and plain JAX.

The queries are few, so reading the cache is the work, and arithmetic is idle. The kernel goes over
blocks of the cache as it lies in memory, all key heads of a position beside each other: all queries
are multiplied with all of it, and of the products those with a query's own key head are kept. To
pick out one head's keys the whole cache would have to be copied. Which blocks hold anything that a
query may look at depends on the sequence's length; the others are neither read nor computed: where
a distance bounds the mask, arithmetic finds them, else lists do (``rows``). A mask that is one rule
on positions is computed in the kernel; of any other, and of segments, a word of bits is read with
each key, less than a hundredth of its bytes.

Both take a part of a cache as well, which begins at position ``start`` of every sequence: with the
log-sum-exps that they return, results of all parts are merged exactly (``cache_sharding``).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.sparse_attention import rows as rows_of
from jaxcomp.kernels.sparse_attention import tpu
from jaxcomp.kernels.sparse_attention.rules import Mask
from jaxcomp.kernels.sparse_attention.tpu_kernels import (
    LOWEST,
    MASKED,
    dot,
    folded,
    lanes,
    sums,
    touch,
)
from jaxcomp.kernels.sparse_attention.tpu_walk import LANES, LOG2_E

ROWS = 8
# Bytes of keys in a block: enough that starting a step costs little beside reading it.
BLOCK_BYTES = 1 << 20
# Scores that are computed at once: as many as there are registers for. They and their weights are
# kept in memory that is named, or the compiler would spill them.
SCORES = 1 << 16


def unfit(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    chip: Chip | None,
    interpret: Any,
    rule: bool = True,
) -> str | None:
    """Why the kernel does not take these operands, or None.

    Args:
      q: as for ``mosaic``, like k and v.
      k: likewise.
      v: likewise.
      chip: that it would run on.
      interpret: whether it is interpreted.
      rule: whether the mask is one rule on positions.
    """
    reason = tpu.unfit(q, k, v, chip, interpret)
    if reason:
        return reason
    if k.shape[-1] % LANES or v.shape[-1] % LANES:
        return (
            f"it takes heads of a multiple of {LANES}, not {k.shape[-1]} and {v.shape[-1]}: a "
            "smaller one does not fill the lanes, and the cache would be copied"
        )
    each = q.shape[1] * (q.shape[2] // k.shape[2])
    if not rule and each > rows_of.BITS:
        return (
            f"where the mask is no single rule on positions it takes up to {rows_of.BITS} queries "
            f"and heads that share a key head, not {q.shape[1]} x {q.shape[2] // k.shape[2]}"
        )
    return None


def plain(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    mask: Mask,
    *,
    scale: float,
    soft_cap: float | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    span: jax.Array | None = None,
    span_ramp: float = 32.0,
    start: int | jax.Array = 0,
    out_dtype: jax.typing.DTypeLike | None = None,
    finite: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The reference.

    Args:
      q: as all others, that of ``api.decode_attention``.
      k: keys of the positions from ``start`` on.
      v: likewise.
      lengths: of whole sequences.
      mask: bound to the whole cache's capacity.
      scale: of the products.
      soft_cap: bound of the scores.
      k_scale: of these keys.
      v_scale: of these values.
      segment_ids: of the queries.
      kv_segment_ids: of these keys.
      span: (heads,), z of the adaptive span.
      span_ramp: length of its ramp.
      start: position of the first key.
      out_dtype: of the outputs; q's if None.
      finite: whether values past a length are finite, which are multiplied with zeros then.

    Returns:
      Outputs (batch, queries, heads, value_dim), zeros where nothing is looked at, and
      log-sum-exps (batch, heads, queries), float32 at least, -inf there.
    """
    batch, queries, heads, _ = q.shape
    capacity, kv_heads = k.shape[1:3]
    compute = jnp.promote_types(q.dtype, jnp.float32)
    # The cache is read in q's dtype, which holds its codes exactly, and never written out wider.
    product = functools.partial(
        jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=compute
    )
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, -1)
    scores = product("bqhgd,bkhd->bhgqk", grouped, k.astype(q.dtype)) * scale
    if k_scale is not None:
        scores *= jnp.moveaxis(k_scale.astype(compute), 1, 2)[:, :, None, None]
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    q_position = lengths[:, None] - queries + jnp.arange(queries)
    k_position = start + jnp.arange(capacity)
    allowed = rows_of.allowed(
        mask, q_position, lengths, start, capacity, segment_ids, kv_segment_ids
    )
    by_head = (batch, kv_heads, -1) if allowed.shape[1] > 1 else (batch, 1, 1)
    allowed = allowed.reshape(*by_head, queries, capacity)
    top = jnp.max(scores, axis=-1, where=allowed, initial=-1e30, keepdims=True)
    weights = jnp.where(allowed, jnp.exp(scores - top), 0)
    if span is not None:
        distance = jnp.abs(q_position[:, None, None, :, None] - k_position)
        reach = span_ramp + span.astype(compute).reshape(kv_heads, -1, 1, 1)
        weights *= jnp.clip((reach - distance) / span_ramp, 0, 1)
    total = weights.sum(-1, keepdims=True)
    safe = jnp.where(total > 0, total, 1)
    lse = jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)
    weights /= safe
    # What lies past the length may be anything, and not a number times zero is not zero. Only then
    # is it replaced: of a cache of several layers XLA would have all in the layout of the result,
    # and copy the whole cache for each layer.
    held = k_position < lengths[:, None]
    finite |= jnp.issubdtype(v.dtype, jnp.integer)
    v = v.astype(q.dtype)
    if not finite:
        v = jnp.where(held[:, :, None, None], v, 0)
    if v_scale is not None:
        v_scale = jnp.where(held[..., None], v_scale.astype(compute), 0)
        weights *= jnp.moveaxis(v_scale, 1, 2)[:, :, None, None]
    out = product("bhgqk,bkhd->bqhgd", weights.astype(q.dtype), v)
    out = out.reshape(*q.shape[:3], -1).astype(out_dtype or q.dtype)
    return out, lse.reshape(batch, heads, queries)


def mosaic(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    mask: Mask,
    *,
    scale: float,
    soft_cap: float | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    span: jax.Array | None = None,
    span_ramp: float = 32.0,
    start: int | jax.Array = 0,
    whole_capacity: int | None = None,
    layer: jax.Array | int | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    block_k: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The kernel: arguments and results are those of ``plain``.

    Further ones: ``whole_capacity`` of a cache of which k is a part, ``block_k`` keys of a block,
    ``layer`` of k and v, which then have an axis of layers in front.
    """
    batch, queries, heads, dim = q.shape
    capacity, kv_heads, out_dim = k.shape[-3], k.shape[-2], v.shape[-1]
    block = block_k or block_size(capacity, kv_heads * dim * k.dtype.itemsize)
    count, columns = -(-capacity // block), block * kv_heads
    rows = -(-queries * heads // ROWS) * ROWS
    coded = k.dtype != q.dtype
    widest = columns_at_once(rows, columns, coded)
    factor = scale / soft_cap if soft_cap else scale * LOG2_E
    rule, reach = rows_of.is_rule(mask, segment_ids is not None), mask.reach()
    lengths, first = lengths.astype(jnp.int32), jnp.asarray(start, jnp.int32).reshape(1)
    # Of the keys here, the first one's position, and the first sequence of the layer.
    sequences = jnp.asarray(0 if layer is None else batch * layer, jnp.int32).reshape(1)
    begin = jnp.concatenate([first, sequences])
    scalars, steps = [lengths, begin], count
    whole_capacity = whole_capacity or capacity
    listed = rows_of.lists(mask, queries, whole_capacity, block)
    if listed and (whole_capacity == capacity or capacity % block == 0):
        filled = _divided(jnp.clip(lengths - first, 0, capacity) + (block - 1), block)[0]
        found, number = listed.at(lengths - queries, _divided(first, block)[0], filled)
        steps = min(count, listed.longest)
        if batch * steps <= rows_of.MOST_LISTED:
            scalars += [found[:, :steps].reshape(-1), number]
        else:
            listed, steps = None, count
    else:
        listed = None
    if reach is not None:
        steps = min(count, (max(reach, 0) + queries - 2) // block + 2)

    def bounds(lengths, begin, sequence):
        """Keys here that a sequence has filled; first and last block a query may look at."""
        filled = jnp.clip(lengths[sequence] - begin[0], 0, capacity)
        last = _divided(filled + (block - 1), block)[0] - 1
        if reach is None:
            return filled, jnp.int32(0), last
        nearest = jnp.maximum(lengths[sequence] - queries - reach - begin[0], 0)
        return filled, _divided(nearest, block)[0], last

    def visit(sequence, step, lengths, begin, found=None, number=None):
        """Keys here that are filled, the step's block, and whether there is one."""
        filled, first, last = bounds(lengths, begin, sequence)
        if found is not None:
            return filled, found[sequence * steps + step], step < number[sequence]
        return filled, first + step, first + step <= last

    def at(sequence, step, lengths, begin, found=None, number=None):
        # Past the last block it stays there, and nothing is fetched.
        if found is not None:
            step = jnp.maximum(jnp.minimum(step, number[sequence] - 1), 0)
            return jnp.clip(found[sequence * steps + step], 0, count - 1)
        _, first, last = bounds(lengths, begin, sequence)
        return jnp.maximum(jnp.minimum(first + step, last), 0)

    def whole(width):
        return pl.BlockSpec((None, rows, width), lambda b, s, *n: (b, 0, 0))

    def cached(width):
        return pl.BlockSpec((None, columns, width), lambda b, s, *n: (n[1][1] + b, at(b, s, *n), 0))

    # Positions and heads side by side: the same bytes, in the tiles of every TPU.
    flat = [x.reshape(-1, capacity * kv_heads, x.shape[-1]) for x in (k, v)]
    stacked = q.reshape(batch, queries * heads, dim)
    operands = [jnp.pad(stacked, ((0, 0), (0, rows - queries * heads), (0, 0))), *flat]
    specs = [whole(dim), cached(dim), cached(out_dim)]
    for x in (k_scale, v_scale):
        if x is not None:
            operands.append(jnp.moveaxis(x.astype(jnp.float32), 1, 2))
            specs.append(
                pl.BlockSpec((None, kv_heads, block), lambda b, s, *n: (b, 0, at(b, s, *n)))
            )
    scale_rows = [pltpu.VMEM((ROWS, columns), jnp.float32) for _ in operands[3:]]
    spread = [pltpu.VMEM((2, kv_heads, LANES), jnp.int32)] if scale_rows else []
    if not rule:
        positions = lengths[:, None] - queries + jnp.arange(queries, dtype=jnp.int32)
        bits = rows_of.allowed(
            mask, positions, lengths, begin[0], capacity, segment_ids, kv_segment_ids
        )
        operands.append(rows_of.words(bits, kv_heads, heads))
        specs.append(pl.BlockSpec((None, 1, columns), lambda b, s, *n: (b, 0, at(b, s, *n))))
    if span is not None:
        each = jnp.pad(jnp.tile(span.astype(jnp.float32), queries), (0, rows - queries * heads))
        operands.append(jnp.broadcast_to(each[:, None], (rows, LANES)))
        specs.append(pl.BlockSpec((rows, LANES), lambda b, s, *n: (0, 0)))

    def body(*refs):
        numbers, (q, k, v, *rest) = refs[: len(scalars)], refs[len(scalars) :]
        stored, rest = rest[: len(scale_rows)], rest[len(scale_rows) :]
        bits, rest = (None, rest) if rule else (rest[0], rest[1:])
        spans, rest = (None, rest) if span is None else (rest[0], rest[1:])
        (out, lse, top, total, summed, of_row, partial, held, *rest) = rest
        passing, scales, places = rest[:3], rest[3:5], rest[5:]
        sequence, step = pl.program_id(0), pl.program_id(1)
        lengths, begin = numbers[:2]
        filled, index, some = visit(sequence, step, *numbers)
        here = index * block

        @pl.when(step == 0)
        def _():
            top[...] = jnp.full_like(top, LOWEST)
            total[...] = jnp.zeros_like(total)
            summed[...] = jnp.zeros_like(summed)
            touch(*passing, partial)
            row = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 0)
            query, head = _divided(row, heads)
            q_position = lengths[sequence] - queries + query
            group = heads // kv_heads
            # No key has the head of a row that is none.
            row_is = (q_position >= 0) & (query < queries)
            of_row[0] = jnp.where(row_is, _divided(head, group)[0], -1)
            of_row[1] = q_position
            bit = (query * group + _divided(head, group)[1]) & (rows_of.BITS - 1)
            of_row[2] = jnp.left_shift(1, bit)
            for place in places:
                place[...] = jnp.stack(_place(kv_heads, 0))

        def hold(number, _):
            """Copies values, with zeros past the cache's end.

            What lies there may be anything, and not a number times zero is not zero.
            """
            start = pl.multiple_of(number * LANES, LANES)
            column = start + jax.lax.broadcasted_iota(jnp.int32, (LANES, 1), 0)
            values = v[pl.ds(start, LANES), :].astype(q.dtype)
            inside = column < (filled - here) * kv_heads
            held[pl.ds(start, LANES), :] = jnp.where(inside, values, jnp.zeros_like(values))

        def add(edge):
            width = columns_at_once(rows, columns, coded, edge)
            products, scored, shares = (ref.at[:, :width] for ref in passing)
            if scales:
                _spread(stored, scales, (factor, 1.0), places[0], filled - here if edge else None)
            if edge:
                jax.lax.fori_loop(0, columns // LANES, hold, None)

            def scale_of(number, place):
                return jnp.tile(scales[number][:, place], (rows // ROWS, 1))

            def weighted(start):
                """Weights times values: parts of the sum wait for each other in memory."""
                values, count = held if edge else v, sums(width)
                length = width // count
                for number in range(count):
                    along = number * length
                    place = pl.ds(pl.multiple_of(start + along, LANES), length)
                    of = shares[:, along : along + length]
                    partial[number] = dot(of, values[place, :].astype(q.dtype), transposed=False)
                return functools.reduce(jnp.add, [partial[i] for i in range(count)])

            def part(number, _):
                start = pl.multiple_of(number * width, LANES)
                place = pl.ds(start, width)
                column = start + jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
                k_index, k_head = _divided(column, kv_heads)
                if LANES % kv_heads == 0:  # the same in all registers
                    k_head = lanes(jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1), width)
                    k_head = _divided(k_head, kv_heads)[1]
                k_index = here + k_index
                products[...] = dot(q[...], k[place, :].astype(q.dtype), transposed=True)
                scores = products[...]
                scores *= scale_of(0, place) if scales else factor
                if soft_cap:
                    scores = jnp.tanh(scores) * (soft_cap * LOG2_E)
                q_head, q_position, bit = (lanes(of_row[i], width) for i in range(3))
                allowed = q_head == k_head
                if edge:
                    allowed &= k_index < filled
                if rule:
                    allowed &= mask.allowed(q_position, begin[0] + k_index)
                else:
                    allowed &= (bits[:, place] & bit) != 0
                scored[...] = jnp.where(allowed, scores, MASKED)
                scores = scored[...]
                before = top[...]
                after = jnp.maximum(before, scores.max(axis=1, keepdims=True))
                weights = jnp.exp2(scores - lanes(after, width))
                if span is not None:
                    distance = jnp.abs(q_position - begin[0] - k_index).astype(jnp.float32)
                    soft = (span_ramp + lanes(spans[...], width) - distance) * (1 / span_ramp)
                    weights *= jnp.clip(soft, 0.0, 1.0)
                products[...] = weights
                weights = products[...]
                fade = jnp.exp2(before - after)
                top[...] = after
                total[...] = fade * total[...] + folded(weights)
                if scales:
                    weights *= scale_of(1, place)
                shares[...] = weights.astype(q.dtype)
                added = weighted(start)
                summed[...] = lanes(fade, out_dim) * summed[...] + added

            jax.lax.fori_loop(0, columns // width, part, None)

        inside = here + block <= filled
        pl.when(some & inside)(functools.partial(add, False))
        pl.when(some & ~inside)(functools.partial(add, True))

        @pl.when(step == steps - 1)
        def _():
            totals = jnp.broadcast_to(total[...].sum(axis=1, keepdims=True), total.shape)
            safe = jnp.where(totals > 0, totals, 1.0)
            share = lanes(jnp.where(totals > 0, 1.0 / safe, 0.0), out_dim)
            out[...] = (summed[...] * share).astype(out.dtype)
            exponent = top[...] * (1 / LOG2_E) + jnp.log(safe)
            lse[...] = jnp.where(totals > 0, exponent, -jnp.inf)

    out, lse = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, steps),
            in_specs=specs,
            out_specs=[whole(out_dim), whole(LANES)],
            scratch_shapes=[
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, out_dim), jnp.float32),
                pltpu.VMEM((3, rows, LANES), jnp.int32),
                pltpu.VMEM((sums(widest), rows, out_dim), jnp.float32),
                pltpu.VMEM((columns, out_dim), q.dtype),
                *[pltpu.VMEM((rows, widest), x) for x in (jnp.float32, jnp.float32, q.dtype)],
                *scale_rows,
                *spread,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, rows, out_dim), out_dtype or q.dtype),
            jax.ShapeDtypeStruct((batch, rows, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * rows * steps * columns * (dim + out_dim),
            transcendentals=batch * rows * steps * columns,
            bytes_accessed=batch * steps * columns * (dim + out_dim) * k.dtype.itemsize,
        ),
        interpret=interpret,
        name="sparse_attention_decode",
    )(*scalars, *operands)
    out = out[:, : queries * heads].reshape(batch, queries, heads, out_dim)
    lse = lse[:, : queries * heads, 0].reshape(batch, queries, heads)
    return out, jnp.moveaxis(lse, 2, 1)


def block_size(capacity: int, row_bytes: int) -> int:
    """Positions of a block of the cache, from the bytes that the keys of one take."""
    wanted = max(BLOCK_BYTES // row_bytes // LANES * LANES, LANES)
    return min(wanted, 1024, -(-capacity // LANES) * LANES)


def columns_at_once(rows: int, columns: int, coded: bool = False, edge: bool = False) -> int:
    """Columns whose scores are computed at once: a divisor of all, of whole lanes.

    Args:
      rows: of queries.
      columns: of a block.
      coded: whether keys and values are converted, which takes registers.
      edge: whether the cache ends within the block, which takes some, too.
    """
    width, most = columns, SCORES >> (coded + edge)
    while width * rows > most and width % (2 * LANES) == 0:
        width //= 2
    return width


def _place(heads: int, ahead: int) -> tuple[jax.Array, jax.Array]:
    """Of columns, each position's heads beside each other: positions, and whose they are.

    Args:
      heads: of a position.
      ahead: the first column.

    Returns:
      int32 (heads, LANES), the position of each column, and whether it is the row's head's.
    """
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (heads, LANES), axis) for axis in range(2))
    position, head = _divided(lane + ahead, heads)
    return position, (head == row).astype(jnp.int32)


def _spread(stored, scales, factors, places, count=None) -> None:
    """Writes numbers (heads, positions) in the order of columns, to (rows, positions * heads).

    All rows are equal: to read one row for all takes more registers than there are.

    XLA would do it by way of an array whose last axis, heads, is padded to whole lanes.

    Args:
      stored: references of each.
      scales: references of what is written.
      factors: what each is multiplied with.
      places: what ``_place`` says of all lanes, where heads divide them.
      count: positions, if not all, past which zeros are written.
    """
    heads, positions = stored[0].shape
    shape = heads, LANES
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    # Where heads divide the lanes it is that of all parts, and takes few registers.
    first_place = places[0], places[1]

    def group(number, _):
        first = pl.multiple_of(number * LANES, LANES)
        for by_head, along, factor in zip(stored, scales, factors, strict=True):
            held = by_head[:, pl.ds(first, LANES)] * factor
            if count is not None:
                held = jnp.where(first + lane < count, held, 0.0)
            for part in range(heads):
                before, ahead = divmod(part * LANES, heads)
                position, own = first_place if LANES % heads == 0 else _place(heads, ahead)
                picked = jnp.take_along_axis(
                    held, position + before, axis=1, mode="promise_in_bounds"
                )
                place = pl.multiple_of((number * heads + part) * LANES, LANES)
                row = jnp.where(own != 0, picked, 0.0).sum(0, keepdims=True)
                along[:, pl.ds(place, LANES)] = jnp.broadcast_to(row, (along.shape[0], LANES))

    if heads == 1:
        for by_head, along, factor in zip(stored, scales, factors, strict=True):
            row = by_head[...] * factor
            if count is not None:
                inside = jax.lax.broadcasted_iota(jnp.int32, row.shape, 1) < count
                row = jnp.where(inside, row, 0.0)
            along[...] = jnp.broadcast_to(row, along.shape)
    else:
        jax.lax.fori_loop(0, positions // LANES, group, None)


def _divided(x: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of numbers that are not negative."""
    if by & (by - 1) == 0:
        return x >> (by.bit_length() - 1), x & (by - 1)
    return jax.lax.div(x, by), jax.lax.rem(x, by)
