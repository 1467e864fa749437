"""Block-sparse flash attention for TPUs: forward, and gradients from recomputed scores.

Each kernel walks the flat list of blocks of ``schedule``, which it holds in scalar memory
(``tpu_walk``). A full block costs no mask arithmetic; each rule of the schedule is a branch with
arithmetic of its own (``tpu_kernels``).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels import arguments, chips, implementations
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.sparse_attention.rules import Mask
from jaxcomp.kernels.sparse_attention.schedule import schedule
from jaxcomp.kernels.sparse_attention.tpu_kernels import (
    forward_kernel,
    key_kernel,
    query_kernel,
    sums,
)
from jaxcomp.kernels.sparse_attention.tpu_walk import (
    LANES,
    LOG2_E,
    Config,
    Part,
    Walk,
    gradient_walk,
    run,
    together,
)

# Sizes of blocks, of which the one with the least cost is taken where the caller names none: larger
# ones compute more of what a mask leaves out, and have fewer steps. In scheduled cycles of v6e a
# step costs about as much as a quarter of a block of 512 by 512 (benchmarks/results), which the
# heads that it computes together share.
BLOCKS = (512, 1024)
STEP = 512 * 512 // 4
# A core has 1 MiB of scalar memory, as far as the compiler gives it out on every chip of
# ``chips``; what is kept free of it is for the span and for what the compiler keeps there itself.
SCALAR_BYTES = (1 << 20) - (1 << 14)
# Where maxima of scores wait in memory (``Config.maxima``), by which the compiler spills nothing.
# Of scaled keys one does.
MAXIMA = {"v5e": 0, "v5p": 0, "v6e": 1, "7x": 2}
# Heads that fit in a step's word.
MOST_GROUP = 1 << 8


def _maxima(chip: Chip | None) -> int:
    return MAXIMA.get(chip.name if chip else "", 2)


def unfit(
    q: jax.Array, k: jax.Array, v: jax.Array, chip: Chip | None, interpret: Any
) -> str | None:
    """Why the kernels do not take these operands, or None."""
    del k, v
    if not interpret and (chip is None or chip.platform != "tpu"):
        return f"it runs on TPU, not on {chip.name if chip else 'an unknown chip'}"
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it computes in float32 and bfloat16, not {q.dtype}"
    return None


def fitting_blocks(
    q: jax.Array,
    k: jax.Array,
    mask: Mask,
    block_q: int | None = None,
    block_k: int | None = None,
) -> tuple[tuple[int, int], str | None]:
    """The blocks to compute in, so that their lists fit in scalar memory.

    Args:
      q: (batch, queries, heads, head_dim).
      k: (batch, keys, kv_heads, head_dim).
      mask: which query looks at which key.
      block_q: queries in a block, where the caller names it.
      block_k: keys in a block, likewise.

    Returns:
      (queries, keys) of a block, and None; or the last that were tried and why they do not fit.
    """
    (queries, heads), (keys, kv_heads) = q.shape[1:3], k.shape[1:3]
    group = heads // kv_heads
    best, lowest = None, float("inf")
    for most in BLOCKS:
        size = block_q or _block(queries, most), block_k or _block(keys, most)
        listed = schedule(mask, heads, queries, keys, *size)
        if listed.rows.lists > 1 and group > MOST_GROUP:
            return size, (
                f"where heads have masks of their own it takes at most {MOST_GROUP} query heads a "
                f"key head, not {group}"
            )
        area = size[0] * size[1]
        cost = listed.rows.count * (
            area + STEP // together(heads, kv_heads, listed.rows.lists, area)
        )
        needed = listed.scalar_bytes(group)
        # Larger blocks make larger bitmaps, of what may have needed none.
        if needed <= SCALAR_BYTES and cost < lowest and not (best and len(listed.bitmaps)):
            best, lowest = size, cost
    if best:
        return best, None
    return size, (
        f"its list of blocks of {size[0]} queries by {size[1]} keys takes {needed} bytes of scalar "
        f"memory, and a core has {SCALAR_BYTES} for it: use larger block_q and block_k, a sparser "
        "mask, or the same mask for all heads"
    )


def _block(length: int, most: int) -> int:
    return min(most, _round_up(length, LANES))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float,
    blocks: tuple[int, int],
    soft_cap: float | None = None,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    span: jax.Array | None = None,
    span_ramp: float = 32.0,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    logsumexp: bool = True,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Attention over the blocks of a mask.

    Args and results are those of ``reference.attention``, and ``blocks``: (queries, keys) of one;
    without ``logsumexp`` None is returned in their place, and only a gradient computes them. Of the
    numbers only ``scale`` may be traced.
    """
    chip = chips.chip_of(q, k, v)
    if arguments.is_traced(scale):
        q, scale = scaled(q, scale, soft_cap)
    config = Config(
        mask=mask,
        heads=q.shape[2],
        kv_heads=k.shape[2],
        queries=q.shape[1],
        keys=k.shape[1],
        block_q=blocks[0],
        block_k=blocks[1],
        scale=float(scale),
        soft_cap=soft_cap,
        ramp=float(span_ramp),
        interpret=interpret,
        logsumexp=logsumexp,
        wide=chip is None or chip.platform != "tpu" or chip.mxu > LANES,
        maxima=_maxima(chip) if k_scale is None else 1,
    )
    extras = {
        "segments": None if segment_ids is None else _ids(segment_ids, -1),
        # Padding of keys differs from padding of queries: no comparison finds them equal.
        "kv_segments": None if kv_segment_ids is None else _ids(kv_segment_ids, -2),
        "span": None if span is None else span.astype(jnp.float32),
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    return _attention(config, q, k, v, {n: x for n, x in extras.items() if x is not None})


def scaled(q: jax.Array, scale: jax.Array, soft_cap: float | None) -> tuple[jax.Array, float]:
    """Queries times all that the kernels multiply them with, and the scale that leaves them so.

    They are rounded once then, as in the kernels.
    """
    factor = scale / soft_cap if soft_cap else scale * LOG2_E
    return (q.astype(jnp.float32) * factor).astype(q.dtype), soft_cap or 1 / LOG2_E


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config, q, k, v, extras):
    return _forward(config, q, k, v, extras, config.logsumexp)


def _attention_forward(config, q, k, v, extras):
    forward = functools.partial(_forward, logsumexp=True)
    out, lse = _once_differentiable(forward, config)(q, k, v, extras)
    return (out, lse if config.logsumexp else None), (q, k, v, extras, out, lse)


def _attention_backward(config, residuals, cotangents):
    q, k, v, extras, out, lse = residuals
    d_out, d_lse = cotangents
    # The gradient of a score is its share times (d_share - delta).
    delta = jnp.einsum("bqhd,bqhd->bhq", d_out, out, preferred_element_type=jnp.float32)
    delta = delta if d_lse is None else delta - d_lse
    d_out = d_out.astype(q.dtype)
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse) * LOG2_E
    statistics = {"lse": lse, "delta": delta, "d_out": d_out}
    operands = (q, k, v, extras, statistics)
    dq, d_span = _once_differentiable(_query_gradients, config)(*operands)
    none = dict.fromkeys(extras)
    if d_span is not None:
        none["span"] = d_span
    if "k_scale" in extras:
        return dq, None, None, none
    return dq, *_once_differentiable(_key_gradients, config)(*operands), none


def _once_differentiable(kernel, config: Config):
    """A kernel in what computes gradients, whose own gradient is an error."""
    return implementations.first_order("attention", "mosaic_tpu", functools.partial(kernel, config))


_attention.defvjp(_attention_forward, _attention_backward)


def _ids(segment_ids: jax.Array, padding: int) -> jax.Array:
    """int32 ids of segments, with one number for all padding."""
    return jnp.where(segment_ids < 0, padding, segment_ids).astype(jnp.int32)


def _round_up(length: int, block: int) -> int:
    return -(-length // block) * block


def _by_position(x: jax.Array, block: int) -> jax.Array:
    """(batch, positions, heads, dim) padded to whole blocks, so that a block has one head.

    Where heads fill whole lanes they lie beside each other, as they are stored; else heads go
    first, which costs a copy.
    """
    batch, length, heads, dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, _round_up(length, block) - length), (0, 0), (0, 0)))
    return x.reshape(batch, -1, heads * dim) if dim % LANES == 0 else jnp.moveaxis(x, 1, 2)


def _restored(x: jax.Array, length: int, heads: int, dim: int) -> jax.Array:
    """The reverse of ``_by_position``."""
    if dim % LANES == 0:
        return x[:, :length].reshape(x.shape[0], length, heads, dim)
    return jnp.moveaxis(x, 1, 2)[:, :length]


def _blank(x: jax.Array, length: int, dtype: jnp.dtype, block: int) -> jax.ShapeDtypeStruct:
    """Shape of an output like x (batch, positions, heads, dim)."""
    batch, _, heads, dim = x.shape
    length = _round_up(length, block)
    flat = (batch, length, heads * dim)
    return jax.ShapeDtypeStruct(flat if dim % LANES == 0 else (batch, heads, length, dim), dtype)


def _padded(x: jax.Array, block: int, value: float = 0) -> jax.Array:
    """Pads the last axis to whole blocks."""
    length = x.shape[-1]
    pad = [(0, 0)] * (x.ndim - 1) + [(0, _round_up(length, block) - length)]
    return jnp.pad(x, pad, constant_values=value)


def _inputs(walk: Walk, q, k, v, extras) -> dict[str, tuple[jax.Array, Part]]:
    """Operands that all kernels have."""
    config = walk.config
    sizes = (config.block_q, config.block_k)
    inputs = {
        "q": (_by_position(q, sizes[0]), walk.rows_of(0, q.shape[-1])),
        "k": (_by_position(k, sizes[1]), walk.rows_of(1, k.shape[-1])),
        "v": (_by_position(v, sizes[1]), walk.rows_of(1, v.shape[-1])),
    }
    for side, name in enumerate(("segments", "kv_segments")):
        if name in extras:
            ids = _padded(extras[name], sizes[side], -1 - side)
            if walk.by_rows == (side == 0):
                # Spread over lanes here: in the kernel that would take more registers than it has.
                spread = jnp.broadcast_to(ids[:, :, None], (*ids.shape, LANES))
                inputs[name] = (spread, walk.down_rows(side))
            else:
                inputs[name] = (ids[:, None, None], walk.along_lanes(side, per_head=False))
    for name in ("k_scale", "v_scale"):
        if name in extras:
            scale = jnp.moveaxis(extras[name].astype(jnp.float32), 1, 2)
            inputs[name] = (_padded(scale, sizes[1])[:, :, None], walk.along_lanes(1))
    if "span" in extras:
        inputs["span"] = (extras["span"], Part(pl.BlockSpec(memory_space=pltpu.SMEM)))
    return inputs


def _statistics(walk: Walk, statistics) -> dict[str, tuple[jax.Array, Part]]:
    """Operands of the gradients."""
    d_out, block_q = statistics["d_out"], walk.config.block_q
    inputs = {"d_out": (_by_position(d_out, block_q), walk.rows_of(0, d_out.shape[-1]))}
    for name in ("lse", "delta"):
        inputs[name] = (_padded(statistics[name], block_q)[:, :, None], walk.along_lanes(0))
    return inputs


def _forward(config: Config, q, k, v, extras, logsumexp: bool):
    walk = Walk(config, config.blocks.rows, by_rows=True, together=config.together)
    batch, size, dim, out_dim = q.shape[0], config.block_q, q.shape[-1], v.shape[-1]
    rows, columns = walk.tile
    like = jax.ShapeDtypeStruct((*q.shape[:3], out_dim), q.dtype)
    lse_shape = (batch, config.heads, 1, _round_up(config.queries, size))
    outputs = {"out": (_blank(like, config.queries, q.dtype, size), walk.rows_of(0, out_dim))}
    if logsumexp:
        # One more array costs scalar arithmetic at every step, too.
        outputs["lse"] = jax.ShapeDtypeStruct(lse_shape, jnp.float32), walk.along_lanes(0)
    kept = {
        "scaled": ((rows, dim), q.dtype),
        "total": ((rows, LANES), jnp.float32),
        "sum": ((rows, out_dim), jnp.float32),
    }
    passing = {
        "products": ((rows, columns), jnp.float32),
        "weights": ((rows, columns), q.dtype),
        "sums": ((sums(columns), rows, out_dim), jnp.float32),
    }
    if not config.bounded:
        kept["top"] = passing["fade"] = ((rows, LANES), jnp.float32)
        count = 1 if config.forward_apart else min(config.maxima, columns // LANES)
        if count:
            passing["maxima"] = ((count, rows, LANES), jnp.float32)
    out, *lse = run(
        forward_kernel,
        walk,
        batch,
        _inputs(walk, q, k, v, extras),
        outputs,
        kept,
        passing,
        "sparse_attention_forward",
        dim + out_dim,
    )
    out = _restored(out, config.queries, config.heads, out_dim)
    return out, lse[0][:, :, 0, : config.queries] if lse else None


def _row_bytes(q, v) -> int:
    return max(q.shape[-1], v.shape[-1]) * q.dtype.itemsize


def _query_gradients(config: Config, q, k, v, extras, statistics):
    walk = gradient_walk(config, True, _row_bytes(q, v))
    batch, size, dim = q.shape[0], config.block_q, q.shape[-1]
    outputs = {"dq": (_blank(q, config.queries, q.dtype, size), walk.rows_of(0, dim))}
    rows, columns = walk.tile
    kept = {
        "scaled": ((rows, dim), q.dtype),
        "lse_column": ((rows, LANES), jnp.float32),
        "delta_column": ((rows, LANES), jnp.float32),
        "sum": ((rows, dim), jnp.float32),
    }
    passing = {
        "products": ((rows, columns), jnp.float32),
        "d_shares": ((rows, columns), jnp.float32),
        "d_scores": ((rows, columns), q.dtype),
        "sums": ((sums(columns), rows, dim), jnp.float32),
    }
    if "span" in extras:
        block = (walk.parts, 1, LANES)
        shape = (batch, config.heads, config.blocks.row_blocks, *block)
        spec = walk.spec(
            (None, walk.wide(0), None, *block), lambda i, b, h, _: (i[0], h[0], b[0], 0, 0, 0)
        )
        outputs["d_span"] = (
            jax.ShapeDtypeStruct(shape, jnp.float32),
            Part(spec, lambda ref, tile: ref.at[tile.head, tile.part]),
        )
        kept["span_sum"] = ((rows, LANES), jnp.float32)
    inputs = _inputs(walk, q, k, v, extras) | _statistics(walk, statistics)
    name = "sparse_attention_dq"
    width = 2 * dim + v.shape[-1]
    dq, *d_span = run(query_kernel, walk, batch, inputs, outputs, kept, passing, name, width)
    dq = _restored(dq, config.queries, config.heads, dim)
    return dq, d_span[0].sum((0, 2, 3, 4, 5)) if d_span else None


def _key_gradients(config: Config, q, k, v, extras, statistics):
    walk = gradient_walk(config, False, _row_bytes(q, v))
    batch, size = q.shape[0], config.block_k
    dims, (rows, columns) = (k.shape[-1], v.shape[-1]), walk.tile
    inputs = _inputs(walk, q, k, v, extras) | _statistics(walk, statistics)
    dk, dv = run(
        key_kernel,
        walk,
        batch,
        inputs,
        {
            "dk": (_blank(k, config.keys, q.dtype, size), walk.rows_of(1, dims[0])),
            "dv": (_blank(v, config.keys, q.dtype, size), walk.rows_of(1, dims[1])),
        },
        {
            "scaled": ((rows, dims[0]), q.dtype),
            "k_sum": ((rows, dims[0]), jnp.float32),
            "v_sum": ((rows, dims[1]), jnp.float32),
        },
        {
            "products": ((rows, columns), jnp.float32),
            "d_shares": ((rows, columns), jnp.float32),
            "weights": ((rows, columns), q.dtype),
            "d_scores": ((rows, columns), q.dtype),
            "k_sums": ((sums(columns), rows, dims[0]), jnp.float32),
            "v_sums": ((sums(columns), rows, dims[1]), jnp.float32),
        },
        "sparse_attention_dkv",
        2 * sum(dims),
    )
    sizes = (config.keys, config.kv_heads)
    return _restored(dk, *sizes, dims[0]), _restored(dv, *sizes, dims[1])
