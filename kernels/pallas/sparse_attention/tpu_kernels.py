"""What the kernels for TPUs compute: one tile at a time, and what begins and ends a result.

Scores are kept in units of log 2, so that the exponential is the one that the hardware has, and the
factor for it is multiplied into the side that stays in memory, once.

The kernels for queries keep a block of queries and go over its keys. The one for keys and values
keeps a block of keys and computes the scores transposed: the queries' statistics then lie along
lanes, as they are stored.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxcomp.kernels.sparse_attention.schedule import TABLE
from jaxcomp.kernels.sparse_attention.tpu_walk import LANES, LOG2_E, Kernel, Left, Spanned, repeat

# A score that is masked is far below the first maximum: its weight is zero even in a row that has
# seen no other score.
LOWEST, MASKED = -1e30, -2e38
# Parts of a tile in which what spans leave of it is written.
SPAN_PARTS = 8
# Rows of a tile of registers, in the narrowest dtype that is kept in memory.
TOUCHED = 16


# -- arithmetic of one block -----------------------------------------------------------------------


def dot(a, b, *, transposed: bool):
    """Product a b, or a b' where transposed, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _positions(refs, shape: tuple[int, int], by_rows: bool):
    """Positions of queries and of keys, a column and a row that broadcast to the tile."""
    column, row = (shape[0], 1), (1, shape[1])
    starts = (refs.q_start, refs.k_start) if by_rows else (refs.k_start, refs.q_start)
    down = starts[0] + jax.lax.broadcasted_iota(jnp.int32, column, 0)
    along = starts[1] + jax.lax.broadcasted_iota(jnp.int32, row, 1)
    return (down, along) if by_rows else (along, down)


def _limits(refs, by_rows):
    """What writes the highest score of each query and key: infinity, or that of masked ones.

    Args:
      refs: of the kernel.
      by_rows: whether queries lie along rows.

    Returns:
      Of a rule, allowed(q, k), TABLE for the step's bitmap, or None for a full block.
    """

    def limit(rule):
        allowed = None
        if rule == TABLE:
            allowed = refs.bitmap[...] != 0
        elif rule is not None:
            allowed = rule(*_positions(refs, refs.limits.shape, by_rows))
        if refs.segments is not None:
            sides = (refs.segments, refs.kv_segments)[:: 1 if by_rows else -1]
            same = lanes(sides[0][...], refs.limits.shape[1]) == sides[1][...]
            allowed = same if allowed is None else allowed & same
        shape = refs.limits.shape
        highest = jnp.full(shape, jnp.inf, jnp.float32)
        if refs.bitmap is not None or refs.segments is not None:
            # To choose between constants, or what is equal along an axis, the compiler wants the
            # mask in a layout that it cannot make of these.
            down, along = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
            highest = (down + along).astype(jnp.float32) + jnp.inf
        refs.limits[...] = jnp.where(allowed, highest, MASKED)

    return limit


def _scored(config, refs) -> None:
    """Writes scores over log 2, not masked, of ``refs.products``, which have all but scale and cap.

    Args:
      config: of the kernel.
      refs: of the kernel; products are those of queries, keys and ``config.factor``.
    """
    if refs.scores is None:
        return
    scores = refs.products[...]
    if refs.k_scale is not None:
        scores *= _spread(refs.k_scale, scores.shape[0])
    if config.soft_cap:
        scores = jnp.tanh(scores)
        if refs.slopes is not None:
            refs.slopes[...] = 1 - scores * scores
        scores *= config.soft_cap * LOG2_E
    refs.scores[...] = scores


def _scores(refs):
    """Memory of scores."""
    return refs.products if refs.scores is None else refs.scores


def _masked(refs, scores, left: Left):
    """What is left of scores.

    To mask again where they are needed again takes fewer registers than to keep the result.
    """
    if left is Left.ALL:
        return scores
    return jnp.minimum(scores, refs.limits[...]) if left is Left.LIMITS else scores + refs.bias[...]


def _highest(refs, scores, left: Left):
    """Maxima of rows, (rows, 1), of those of each lane.

    A wide matrix unit gives products faster than their maxima are taken, which then wait in memory.
    What is masked is late enough as it is, and maxima of pairs wait least.
    """
    parts = [scores[:, i : i + LANES] for i in range(0, scores.shape[1], LANES)]
    if left is not Left.ALL:
        while len(parts) > 1:
            pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
            parts = [functools.reduce(jnp.maximum, pair) for pair in pairs]
    elif refs.maxima is not None:
        count, found = refs.maxima.shape[0], parts
        for i in range(count):
            some = found[len(found) * i // count : len(found) * (i + 1) // count]
            refs.maxima[i] = functools.reduce(jnp.maximum, some)
        parts = [refs.maxima[i] for i in range(count)]
    return functools.reduce(jnp.maximum, parts).max(axis=1, keepdims=True)


def _span_part(rows: int, trip):
    size = rows // SPAN_PARTS
    return pl.ds(pl.multiple_of(trip * size, size), size)


def _spanned(config, refs, by_rows) -> Spanned | None:
    """What writes log2 m(distance), of the adaptive span's weight m, to add to scores.

    It has code of its own: what is computed beside products comes early, and would be spilled.
    What the mask leaves out has no weight either.
    """
    if refs.span is None:
        return None
    rows, columns = refs.bias.shape
    starts = (refs.q_start, refs.k_start)[:: 1 if by_rows else -1]
    offset = starts[0] - starts[1]  # of the first row and the first column
    nearest = jnp.maximum(jnp.maximum(offset - (columns - 1), -offset - (rows - 1)), 0)
    farthest = jnp.maximum(offset + (rows - 1), columns - 1 - offset)

    def write(left):
        def part(trip):
            at = _span_part(rows, trip)
            down = offset + at.start + jax.lax.broadcasted_iota(jnp.int32, (at.size, 1), 0)
            along = jax.lax.broadcasted_iota(jnp.int32, (1, columns), 1)
            distance = jnp.abs(down - along).astype(jnp.float32)
            weight = jnp.clip((config.ramp + refs.z - distance) * (1 / config.ramp), 0, 1)
            bias = jnp.maximum(jnp.log2(weight), MASKED)
            if left is Left.LIMITS:
                bias = jnp.minimum(bias, refs.limits[at])
            refs.bias[at] = bias

        repeat(SPAN_PARTS, part)

    def gather():
        """Adds to the gradient of z: of each score's, over m where there is a ramp."""

        def part(trip):
            at = _span_part(rows, trip)
            bias = refs.bias[at]
            ramp = (bias < 0) & (bias > MASKED)
            refs.span_sum[at] += folded(jnp.where(ramp, refs.d_shares[at] * jnp.exp2(-bias), 0))

        repeat(SPAN_PARTS, part)

    inside, outside = farthest <= refs.z, nearest >= refs.z + config.ramp
    return Spanned(write, gather, inside, outside)


def lanes(x, width: int):
    """(rows, 128) of equal lanes to (rows, width)."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def folded(x):
    """(rows, width) to (rows, 128): sums over what lies in the same lane."""
    return across(jnp.add, x)


def across(join, x):
    """(rows, width) to (rows, 128): what lies in the same lane, joined."""
    return functools.reduce(join, [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)])


def _column(row):
    """(1, n) to (n, 128) of equal lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _spread(ref, rows: int):
    """(1, n) in memory to (rows, n), 128 at a time: a load can spread those, and keeps nothing."""
    pieces = [ref[:, i : i + LANES] for i in range(0, ref.shape[1], LANES)]
    return jnp.concatenate([jnp.broadcast_to(x, (rows, x.shape[1])) for x in pieces], axis=1)


def _waiting(ref, x):
    """What was stored to memory, to be read from there again where there is no register for it."""
    ref[...] = x
    return ref[...]


def _operand(ref, like):
    """A block of keys or values as the matrix unit takes it; codes are exact in bfloat16."""
    return ref[...].astype(like.dtype)


def touch(*refs) -> None:
    """Stores to memory that a tile's values pass through, in code that runs once a result.

    There are more values than registers. A compiler that sees all stores and loads of a memory in
    one block of code drops them, and then spills what it has no register for. What another block
    may have stored is kept, and read again where there was no register.
    """
    for ref in (ref for ref in refs if ref is not None):
        place, rows = (0,) * (len(ref.shape) - 2), min(TOUCHED, ref.shape[-2])
        ref[*place, :rows] = jnp.zeros((rows, ref.shape[-1]), ref.dtype)


def sums(length: int) -> int:
    """Partial sums of a product over this many: each has memory of its own (``_product``)."""
    return 2 if length % (2 * LANES) == 0 else 1


def _product(sums, a, b, like):
    """Product a b of two references, whose partial sums wait for each other in memory."""
    count = sums.shape[0]
    length = a.shape[1] // count
    for part in range(count):
        place = slice(part * length, (part + 1) * length)
        sums[part] = dot(a[:, place], _operand(b.at[place], like), transposed=False)
    return functools.reduce(jnp.add, [sums[part] for part in range(count)])


# -- kernels: what a tile does first, its products, what is added from them, and last --------------


def _kernel(config, refs, by_rows, start, steps, finish) -> Kernel:
    limit, spanned = _limits(refs, by_rows), _spanned(config, refs, by_rows)
    return Kernel(start, limit, spanned, steps, finish)


def forward_kernel(config, refs, by_rows):
    """Outputs and log-sum-exps, by an online softmax."""
    apart = config.forward_apart
    waiting = refs.scores is not None and not config.bounded

    def start():
        refs.scaled[...] = (refs.q[...].astype(jnp.float32) * config.factor).astype(refs.q.dtype)
        if not config.bounded:
            refs.top[...] = jnp.full_like(refs.top, LOWEST)
        refs.total[...] = jnp.zeros_like(refs.total)
        refs.sum[...] = jnp.zeros_like(refs.sum)
        touch(refs.scores, refs.products, refs.maxima, refs.weights, refs.fade, refs.sums)

    def products(left):
        refs.products[...] = dot(refs.scaled[...], _operand(refs.k, refs.q), transposed=True)
        if apart:
            score(left)
            if left is Left.ALL:
                refs.maxima[0] = across(jnp.maximum, refs.scores[...])

    def score(left):
        """Writes scores. Those that wait in memory, unlike products, are masked there as well."""
        _scored(config, refs)
        if waiting and left is not Left.ALL:
            refs.scores[...] = _masked(refs, refs.scores[...], left)

    def rise(left):
        """The highest scores so far, to which sums fade."""
        # Maxima of lanes that are masked would take registers beside products.
        all_left = left is Left.ALL
        highest = refs.maxima[0] if all_left else across(jnp.maximum, refs.scores[...])
        before = refs.top[...]
        top = jnp.maximum(before, highest.max(axis=1, keepdims=True))
        refs.fade[...] = jnp.exp2(before - top)
        refs.top[...] = top
        for ref in (refs.total, refs.sum):
            ref[...] *= lanes(refs.fade[...], ref.shape[1])

    def weigh(scores, left):
        """Powers of scores: above the highest so far, to which sums fade, or of bounded ones."""
        if config.bounded:
            return jnp.exp2(_masked(refs, scores[...], left))
        if apart:
            return jnp.exp2(scores[...] - lanes(refs.top[...], scores.shape[1]))
        before = refs.top[...]
        top = jnp.maximum(before, _highest(refs, _masked(refs, scores[...], left), left))
        weights = jnp.exp2(_masked(refs, scores[...] - lanes(top, scores.shape[1]), left))
        refs.fade[...] = jnp.exp2(before - top)
        refs.top[...] = top
        return weights

    def faded(ref):
        if config.bounded or apart:
            return ref[...]
        return lanes(refs.fade[...], ref.shape[1]) * ref[...]

    def add(left):
        if not apart:
            score(left)
        weights = weigh(_scores(refs), Left.ALL if waiting else left)
        # Lane by lane: the lanes are added up once, at the end.
        refs.total[...] = faded(refs.total) + folded(weights)
        if refs.v_scale is not None:
            weights *= _spread(refs.v_scale, weights.shape[0])
        refs.weights[...] = weights.astype(refs.q.dtype)
        added = _product(refs.sums, refs.weights, refs.v, refs.q)
        refs.sum[...] = faded(refs.sum) + added

    def finish():
        total = jnp.broadcast_to(refs.total[...].sum(axis=1, keepdims=True), refs.total.shape)
        total = _waiting(refs.total, total)
        inverse = jnp.where(total > 0, 1.0 / total, 0.0)
        refs.out[...] = (refs.sum[...] * lanes(inverse, refs.sum.shape[1])).astype(refs.out.dtype)
        if refs.lse is None:
            return
        lse = jnp.log(refs.total[...])
        if not config.bounded:
            lse += refs.top[...] * (1 / LOG2_E)
        refs.total[...] = jnp.where(refs.total[...] > 0, lse, -jnp.inf)
        for i in range(0, refs.total.shape[0], LANES):
            refs.lse[:, i : i + LANES] = refs.total[i : i + LANES].T[:1]

    steps = (products, rise, add) if apart else (products, add)
    return _kernel(config, refs, by_rows, (start,), steps, finish)


def query_kernel(config, refs, by_rows):
    """The gradients of queries and spans, from saved log-sum-exps."""
    waits = config.wide or bool(config.soft_cap)

    def start():
        refs.lse_column[...] = _column(refs.lse[...])
        refs.delta_column[...] = _column(refs.delta[...])
        refs.sum[...] = jnp.zeros_like(refs.sum)
        if refs.span is not None:
            refs.span_sum[...] = jnp.zeros_like(refs.span_sum)
        touch(refs.scores, refs.products, refs.d_shares, refs.d_scores, refs.sums)

    def scale():
        refs.scaled[...] = (refs.q[...].astype(jnp.float32) * config.factor).astype(refs.q.dtype)

    def products(left):
        refs.products[...] = dot(refs.scaled[...], _operand(refs.k, refs.q), transposed=True)
        _scored(config, refs)
        if not config.apart:
            of_values()

    def of_values():
        refs.d_shares[...] = dot(refs.d_out[...], _operand(refs.v, refs.q), transposed=True)

    def share(left):
        refs.products[...] = shares(left)
        of_values()

    def shares(left):
        lse = lanes(refs.lse_column[...], refs.products.shape[1])
        return jnp.exp2(_masked(refs, _scores(refs)[...], left) - lse)

    def add(left):
        if config.apart:
            found = refs.products[...]
        else:
            found = shares(left)
            found = _waiting(refs.products, found) if waits else found
        d_shares = refs.d_shares[...]
        if refs.v_scale is not None:
            d_shares *= _spread(refs.v_scale, d_shares.shape[0])
        d_scores = found * (d_shares - lanes(refs.delta_column[...], d_shares.shape[1]))
        if refs.span is not None:
            d_scores = _waiting(refs.d_shares, d_scores)
        if config.soft_cap:
            d_scores *= refs.slopes[...]
        if refs.k_scale is not None:
            d_scores *= _spread(refs.k_scale, d_scores.shape[0])
        if waits and refs.span is None:
            d_scores = _waiting(refs.d_shares, d_scores)
        refs.d_scores[...] = d_scores.astype(refs.q.dtype)
        refs.sum[...] += _product(refs.sums, refs.d_scores, refs.k, refs.q)

    def finish():
        refs.dq[...] = (refs.sum[...] * config.scale).astype(refs.dq.dtype)
        if refs.span is not None:
            d_span = refs.span_sum[...].sum(axis=0, keepdims=True)
            refs.d_span[...] = d_span * (1 / config.ramp)

    steps = (products, share, add) if config.apart else (products, add)
    return _kernel(config, refs, by_rows, (start, scale), steps, finish)


def key_kernel(config, refs, by_rows):
    """The gradients of keys and values, from scores with keys along rows."""

    def start():
        k = refs.k[...].astype(jnp.float32)
        refs.scaled[...] = (k * config.factor).astype(refs.scaled.dtype)
        refs.k_sum[...] = jnp.zeros_like(refs.k_sum)
        refs.v_sum[...] = jnp.zeros_like(refs.v_sum)
        touch(
            refs.scores,
            refs.products,
            refs.d_shares,
            refs.weights,
            refs.d_scores,
            refs.k_sums,
            refs.v_sums,
        )

    def products(left):
        refs.products[...] = dot(refs.scaled[...], refs.q[...], transposed=True)
        _scored(config, refs)

    def share(left):
        lse = _spread(refs.lse, refs.products.shape[0])
        shares = jnp.exp2(_masked(refs, _scores(refs)[...], left) - lse)
        if not config.apart:
            refs.weights[...] = shares.astype(refs.q.dtype)
        refs.d_shares[...] = dot(_operand(refs.v, refs.q), refs.d_out[...], transposed=True)
        if not config.apart:
            of_values(left)
        # They wait for the products of values, where their own products were.
        refs.products[...] = shares

    def weigh(_):
        refs.weights[...] = refs.products[...].astype(refs.q.dtype)

    def of_values(_):
        refs.v_sum[...] += _product(refs.v_sums, refs.weights, refs.d_out, refs.q)

    def add(left):
        d_shares = refs.d_shares[...] - _spread(refs.delta, refs.products.shape[0])
        d_scores = refs.products[...] * d_shares
        if config.soft_cap:
            d_scores *= refs.slopes[...]
        d_scores = _waiting(refs.d_shares, d_scores)
        refs.d_scores[...] = d_scores.astype(refs.q.dtype)
        refs.k_sum[...] += _product(refs.k_sums, refs.d_scores, refs.q, refs.q)

    def finish():
        refs.dk[...] = (refs.k_sum[...] * config.scale).astype(refs.dk.dtype)
        refs.dv[...] = refs.v_sum[...].astype(refs.dv.dtype)

    steps = (products, share, weigh, of_values, add) if config.apart else (products, share, add)
    return _kernel(config, refs, by_rows, (start,), steps, finish)
