"""Attention of few queries to a long cache on Hopper GPUs: what fits, how it is split, the merge.

Nothing here was run on a GPU so far: the kernel was compared with float64 in interpret mode, and
compiled for H100 by CUDA's assembler.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxcomp.kernels import chips
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.sparse_attention.masks import causal
from jaxcomp.kernels.sparse_attention.ring import share
from jaxcomp.kernels.sparse_attention.rules import Mask

_DIMS = (64, 128)
_CODES = ("int8", "float8_e4m3fn", "float8_e5m2")
_CORES = 132
# Steps that a thread block's start and end may cost: a guess, until one has run.
START = 4


def unfit(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    chip: Chip | None,
    block_k: int | None = None,
    rule: bool = True,
    span: bool = False,
) -> str | None:
    """Why the kernel does not take these operands.

    Args:
      q: (batch, queries, heads, head_dim).
      k: (batch, capacity, kv_heads, head_dim).
      v: (batch, capacity, kv_heads, value_dim).
      chip: that it would run on; ``chips.H100`` for interpret mode.
      block_k: keys of a block, where the caller names them.
      rule: whether the mask is one rule on positions.
      span: whether heads have adaptive spans.

    Returns:
      The reason, or None where it does.
    """
    if lacking := chips.lacks_mosaic_gpu(chip, _kernel):
        return lacking
    kernel = _kernel()
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, not {q.dtype}"
    if k.dtype != v.dtype or (k.dtype != q.dtype and jnp.dtype(k.dtype).name not in _CODES):
        return (
            f"it takes keys and values of q's dtype, or of one of int8 and fp8, not {k.dtype} and "
            f"{v.dtype}"
        )
    if q.shape[-1] not in _DIMS or v.shape[-1] != q.shape[-1]:
        return (
            f"it takes heads of 64 or 128, with values of the same width, not {q.shape[-1]} and "
            f"{v.shape[-1]}"
        )
    if not rule:
        return (
            "it takes a mask that is one rule on positions for all heads: no random(), blocks(), "
            "per_head() or segments"
        )
    if span:
        return "it takes no adaptive span"
    rows = q.shape[1] * q.shape[2] // k.shape[2]
    if rows > kernel.ROWS:
        return (
            f"it takes up to {kernel.ROWS} rows of queries and of heads that share a key head, not "
            f"{q.shape[1]} x {q.shape[2] // k.shape[2]}"
        )
    if k.shape[1] % 8:
        return f"it takes a capacity that is a multiple of 8, not {k.shape[1]}"
    if block_k is not None:
        return f"its blocks have {kernel.KEYS} keys; block_k is for TPUs"
    return None


def _kernel():
    """The module of the kernel, imported late since that takes a second; None without it."""
    try:
        from jaxcomp.kernels.sparse_attention import gpu_decode_kernel
    except ImportError:
        return None
    return gpu_decode_kernel


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
    start: int | jax.Array = 0,
    out_dtype: jax.typing.DTypeLike | None = None,
    interpret: Any = False,
    splits: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention to a cache, for operands for which ``unfit`` is None.

    Args and results are those of ``decode.plain``; ``splits`` parts of a sequence's blocks go to
    as many thread blocks.
    """
    kernel = _kernel()
    batch, queries, heads, dim = q.shape
    capacity, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    rows = queries * group
    by_head = jnp.moveaxis(q.reshape(batch, queries, kv_heads, group, dim), 1, 2)
    by_head = by_head.reshape(batch, kv_heads, rows, dim)
    aligned = -rows % 8 if rows > 8 else 0
    operands = {"q": jnp.pad(by_head, ((0, 0), (0, 0), (0, aligned), (0, 0))), "k": k, "v": v}
    blocks = -(-capacity // kernel.KEYS)
    if k_scale is not None:
        # What lies past the length may be no number, and that times a weight of zero is none.
        held = start + jnp.arange(capacity) < lengths[:, None]
        padding = ((0, 0), (0, 0), (0, blocks * kernel.KEYS - capacity))
        for name, scales in (
            ("k_scale", k_scale),
            ("v_scale", jnp.where(held[..., None], v_scale, 0)),
        ):
            scales = jnp.moveaxis(scales.astype(jnp.float32), 1, 2)
            operands[name] = jnp.pad(scales, padding)
    operands["lengths"] = lengths.astype(jnp.int32)
    operands["start"] = jnp.asarray(start, jnp.int32).reshape(1)
    problem = kernel.Problem(
        queries=queries,
        group=group,
        splits=splits or split(batch * kv_heads, -(-blocks // kernel.WORKERS)),
        rule=None if mask == causal() else mask,
        scale=float(scale),
        soft_cap=None if soft_cap is None else float(soft_cap),
        staged=bool(interpret),
    )
    parts, lses = kernel.decode(operands, problem, interpret)
    lses = lses[..., :rows]
    out, lse = _merged(parts[..., :rows, :], lses)
    out = out.astype(out_dtype or q.dtype).reshape(batch, kv_heads, queries, group, dim)
    lse = lse.reshape(batch, kv_heads, queries, group)
    lse = jnp.moveaxis(lse, 2, 3).reshape(batch, heads, queries)
    return jnp.moveaxis(out, 2, 1).reshape(batch, queries, heads, dim), lse


def split(cells: int, steps: int) -> int:
    """Thread blocks that share the blocks of a key head's cache, so that all cores have work.

    Args:
      cells: sequences times key heads.
      steps: that one thread block alone would take.

    Returns:
      The number for which the last thread block ends first.

    Example:
      >>> split(8, 256), split(132, 256), split(512, 256)
      (16, 1, 1)
    """

    def ends(splits):
        waves = -(-cells * splits // _CORES)
        return waves * (-(-steps // splits) + START)

    return min(range(1, max(1, min(steps, _CORES)) + 1), key=ends)


def _merged(parts, lses):
    """Results of parts, (batch, kv_heads, parts, rows, dim), from each part's own, exactly."""
    top = lses.max(axis=2)
    total = share(lses, top[:, :, None]).sum(axis=2)
    some = total > 0
    lse = jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)
    return (parts * share(lses, lse[:, :, None])[..., None]).sum(axis=2), lse
