"""Attention of the newest tokens to a long cache, on TPUs.

The queries are few, so reading the cache is the work. The kernel goes over blocks of the cache as
it lies in memory, all key heads of a position beside each other: a position and a head are a
column. To pick out one head's keys the whole cache would have to be copied, so queries of all heads
are multiplied with all columns, which the matrix unit has time for; of the products only those with
a column's own head are kept, merged into as many rows as one head has (``Rows``), and all else is
done with these. Of codes of eight bits, four heads' columns are read by themselves. Those of e4m3
are multiplied as they are on 7x; elsewhere four are converted at a time (``tpu_float8``), and the
two codes that are not numbers are then 480 and -480.

Which blocks hold anything that a query may look at depends on the sequence's length; the others are
neither read nor computed: where a distance bounds the mask, arithmetic finds them, else lists do
(``rows``). A mask that is one rule on positions is computed in the kernel; of any other, and of
segments, a word of bits is read with each key, less than a hundredth of its bytes.
"""

import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels import pieces
from jaxcomp.kernels.calls import on_tpu
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.sparse_attention import rows as rows_of
from jaxcomp.kernels.sparse_attention import tpu
from jaxcomp.kernels.sparse_attention.rules import Mask
from jaxcomp.kernels.sparse_attention.tpu_columns import SUBLANES, Rows, divided, up
from jaxcomp.kernels.sparse_attention.tpu_decode_kernel import Config, decode_kernel
from jaxcomp.kernels.sparse_attention.tpu_kernels import sums
from jaxcomp.kernels.sparse_attention.tpu_walk import LANES, LOG2_E

# Bytes of keys in a block: enough that starting a step costs little beside reading it.
BLOCK_BYTES = 1 << 20
# Scores of a block: they and what is masked are in vector memory beside keys and values.
BLOCK_SCORES = 1 << 19
# Products of a block that are computed without a loop, each of whose iterations would wait for the
# matrix unit to fill and to empty: on 7x, with 64 heads, 1300 bundles of a bf16 block, not 998, and
# 1913 of an int8 one, not 1555. With as many v5e (and v5p, whose units are the same) and v6e spill.
WITHOUT_LOOP, WITHOUT_LOOP_ON = 1 << 17, {"7x": 1 << 18}

# Names of what some kernels lack: operands, scalars and memory.
MAYBE = (
    "k_scale", "v_scale", "bits", "span", "first", "listed", "number",
    "spread", "allowed", "bit", "distance", "products", "pieces",
)  # fmt: skip


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
      q: as for ``attention``, like k and v.
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


def attention(
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
    chip: Chip | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The kernel: arguments and results are those of ``decode.plain``.

    Further ones: ``whole_capacity`` of a cache of which k is a part, ``block_k`` keys of a block,
    ``layer`` of k and v, which then have an axis of layers in front, and the ``chip``.
    """
    batch, queries, heads, dim = q.shape
    capacity, kv_heads, out_dim = k.shape[-3], k.shape[-2], v.shape[-1]
    rows = Rows.of(q, k, v)
    block = block_k or block_size(
        capacity, kv_heads * dim * k.dtype.itemsize, kv_heads * rows.merged
    )
    merged = rows.sets, rows.merged, LANES
    lengths, first = lengths.astype(jnp.int32), jnp.asarray(start, jnp.int32).reshape(1)
    visits = _visits(mask, lengths, first, queries, capacity, whole_capacity or capacity, block)
    float8 = frozenset(n for n in (chip.products if chip else ()) if n.startswith("float8"))
    without_loop = WITHOUT_LOOP_ON.get(chip.name if chip else "", WITHOUT_LOOP)
    config = Config(
        rows, mask, rows_of.is_rule(mask, segment_ids is not None), block, visits.pop("steps"),
        scale / soft_cap if soft_cap else scale * LOG2_E, soft_cap, span_ramp,
        WITHOUT_LOOP if q.dtype == jnp.float32 else without_loop, float8,
        _code_parts(chip, rows, v.dtype.name, span is not None, bool(soft_cap)),
        pieces.count(q.dtype), bool(interpret),
    )  # fmt: skip
    scalars = {"lengths": lengths, "start": first} | visits
    if layer is not None:
        scalars["before"] = jnp.asarray(batch * layer, jnp.int32).reshape(1)

    def named(n):
        return types.SimpleNamespace(**dict(zip(scalars, n, strict=True)))

    def at(b, s, n):
        # Past the last block it stays there, and nothing is fetched.
        n = named(n)
        if "listed" in scalars:
            return n.listed[b * config.steps + s]
        return jnp.minimum(n.first[b] + s if "first" in scalars else s, n.last[b])

    def whole(width):
        shape = None, rows.sets, rows.count, width
        return pl.BlockSpec(shape, lambda b, s, *n: (b, 0, 0, 0))

    def cached(width):
        def place(b, s, *n):
            # Sequences of the layers before come first.
            return b if layer is None else named(n).before[0] + b, at(b, s, n), 0

        return pl.BlockSpec((1, block * kv_heads, width), place)

    def beside(height, width):
        return pl.BlockSpec((None, height, width), lambda b, s, *n: (b, 0, at(b, s, n)))

    # Positions and heads side by side: the same bytes, in the tiles of every TPU.
    flat = [x.reshape(-1, capacity * kv_heads, x.shape[-1]) for x in (k, v)]
    stacked = pieces.listed(rows.stacked(q))  # (pieces, batch, sets, rows, dim)
    stacked = jnp.moveaxis(stacked, 0, 2).reshape(batch, rows.sets, -1, dim)
    operands = {
        "q": (stacked, pl.BlockSpec((None, *stacked.shape[1:]), lambda b, s, *n: (b, 0, 0, 0))),
        "k": (flat[0], cached(dim)),
        "v": (flat[1], cached(out_dim)),
    }
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        if x is not None:
            x = jnp.moveaxis(x.astype(jnp.float32), 1, 2)
            operands[name] = x, beside(kv_heads, block)
    if not config.rule:
        positions = lengths[:, None] - queries + jnp.arange(queries, dtype=jnp.int32)
        bits = rows_of.allowed(
            mask, positions, lengths, first[0], capacity, segment_ids, kv_segment_ids
        )
        bits = rows_of.words(bits, kv_heads, heads).reshape(batch, capacity, rows.sets, -1)
        bits = jnp.swapaxes(bits, 1, 2).reshape(batch, rows.sets, -1)
        operands["bits"] = bits, beside(rows.sets, config.columns)
    if span is not None:
        spans = span.astype(jnp.float32)[rows.query_heads()]
        operands["span"] = spans, pl.BlockSpec(merged, lambda b, s, *n: (0, 0, 0))
    results = {
        "out": jax.ShapeDtypeStruct((batch, rows.sets, rows.count, out_dim), out_dtype or q.dtype),
        "lse": jax.ShapeDtypeStruct((batch, rows.sets, rows.count, LANES), jnp.float32),
    }
    scratch = {
        "top": pltpu.VMEM(merged, jnp.float32),
        "highest": pltpu.VMEM(merged, jnp.float32),
        "total": pltpu.VMEM(merged, jnp.float32),
        "sum": pltpu.VMEM((rows.sets, rows.count, out_dim), jnp.float32),
        "sums": pltpu.VMEM(
            (sums(config.columns), config.products(v.dtype) * rows.count, out_dim), jnp.float32
        ),
        "scores": pltpu.VMEM((rows.sets, rows.merged, config.columns), jnp.float32),
        "lane_heads": pltpu.VMEM((rows.merged, LANES), jnp.int32),
    }
    if config.rule:
        scratch["allowed"] = pltpu.VMEM((rows.merged, config.columns), jnp.float32)
    else:
        scratch["bit"] = pltpu.VMEM((rows.merged, LANES), jnp.int32)
    if span is not None:
        scratch["distance"] = pltpu.VMEM((rows.merged, config.columns), jnp.float32)
    if config.split > 1:
        shape = config.products(k.dtype) * rows.count, config.parts(edge=False)[0]
        scratch["products"] = pltpu.VMEM(shape, jnp.float32)
        if jnp.float32 in (k.dtype, v.dtype):
            shape = pieces.COUNT, shape[1] // 2, max(dim, out_dim)
            scratch["pieces"] = pltpu.VMEM(shape, jnp.int32)
    if k_scale is not None:
        shape = rows.sets, block // LANES, up(2 * rows.heads, SUBLANES), LANES
        scratch["spread"] = pltpu.VMEM(shape, jnp.float32)
    read = batch * config.steps * block * kv_heads
    names = [*scalars, *operands, *results, *scratch]
    lacking = dict.fromkeys(MAYBE)

    def body(*refs):
        decode_kernel(
            config, types.SimpleNamespace(**lacking | dict(zip(names, refs, strict=True)))
        )

    out, lse = on_tpu(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, config.steps),
            in_specs=[spec for _, spec in operands.values()],
            out_specs=[whole(out_dim), whole(LANES)],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=list(results.values()),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * read * rows.count * (dim + out_dim),
            transcendentals=read * rows.merged,
            bytes_accessed=read * (dim + out_dim) * k.dtype.itemsize,
        ),
        interpret=interpret,
        name="sparse_attention_decode",
    )(*scalars.values(), *(x for x, _ in operands.values()))
    return rows.apart(out), jnp.moveaxis(rows.apart(lse)[..., 0], 1, 2)


def _code_parts(chip: Chip | None, rows: Rows, dtype: str, span: bool, soft_cap: bool) -> int:
    """In how many parts the code of a full block is: most are as fast in one, and some spill there.

    What each takes was found with the compiler. More parts cost up to an eighth of the cycles, and
    these are mostly fewer than the bytes'. On 7x codes that are converted take fewer in two.

    Args:
      chip: a TPU, or None.
      rows: of queries.
      dtype: of the cache.
      span: whether there are adaptive spans.
      soft_cap: whether there is a soft cap.

    Returns:
      1; 2 with the sums in code of their own; 3 with also the scales and masks in such; 4 with
      those of each set; 5 with scales, masks, and the sums of some columns each in such.
    """
    name, several = chip.name if chip else "", rows.sets > 1
    if not rows.merges:
        return 5
    if jnp.dtype(dtype).itemsize > 1:
        return 1
    if span and name == "7x":
        return 2
    if span:
        return 4 if (name, dtype) == ("v6e", "int8") else 3
    if dtype != "int8":
        converted = chip is None or dtype not in chip.products
        return (2 if several else 3) if converted else 1
    if name == "7x":
        return 2 if several else 1
    if name == "v6e" or (rows.sets == 2 and not soft_cap):
        return 1
    return 2 if rows.sets > 2 else 3


def _visits(mask, lengths, start, queries, capacity, whole_capacity, block) -> dict:
    """Which blocks are visited.

    Returns:
      "steps" of each sequence; int32 "filled" (batch,), the keys here that there are; "last"
      (batch,), the last block that a query may look at, and "first", if it is another than 0; or
      "listed" (batch * steps,) blocks and their "number" (batch,).
    """
    batch, count = lengths.shape[0], -(-capacity // block)
    filled = jnp.clip(lengths - start, 0, capacity)
    blocks = divided(filled + (block - 1), block)[0]
    found = rows_of.lists(mask, queries, whole_capacity, block)
    if found and (whole_capacity == capacity or capacity % block == 0):
        steps = min(count, found.longest)
        if batch * steps <= rows_of.MOST_LISTED:
            listed, number = found.at(lengths - queries, divided(start, block)[0], blocks)
            last = jnp.clip(number, 1, steps)[:, None] - 1
            listed = jnp.take_along_axis(listed, jnp.minimum(jnp.arange(steps), last), axis=1)
            listed = jnp.clip(listed, 0, count - 1)
            return {
                "steps": steps, "filled": filled, "listed": listed.reshape(-1), "number": number
            }  # fmt: skip
    last = jnp.maximum(blocks - 1, 0)
    reach = mask.reach()
    if reach is None:
        return {"steps": count, "filled": filled, "last": last}
    nearest = jnp.maximum(lengths - queries - reach - start, 0)
    first = divided(nearest, block)[0]
    steps = min(count, (max(reach, 0) + queries - 2) // block + 2)
    return {"steps": steps, "filled": filled, "first": first, "last": last}


def block_size(capacity: int, row_bytes: int, scores: int) -> int:
    """Positions of a block of the cache.

    Args:
      capacity: positions of the cache.
      row_bytes: that the keys of a position take.
      scores: that are kept of a position.
    """
    wanted = min(BLOCK_BYTES // row_bytes, BLOCK_SCORES // scores)
    wanted = max(wanted // LANES * LANES, LANES)
    return min(wanted, 1024, up(capacity, LANES))
