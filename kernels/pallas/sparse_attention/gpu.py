"""Block-sparse flash attention on Hopper GPUs: what fits, and the call of its kernel.

The forward pass is the kernel's. Its gradient goes through plain JAX over the same listed blocks
(``xla``), which computes the scores again. Nothing here was run on a GPU so far: the kernel was
compared with float64 in interpret mode, and compiled for H100 by CUDA's assembler.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.sparse_attention import gpu_lists, xla
from jaxcomp.kernels.sparse_attention.gpu_lists import BLOCK
from jaxcomp.kernels.sparse_attention.rules import Mask
from jaxcomp.kernels.sparse_attention.schedule import schedule

_OLDEST = (0, 11)
_DIMS = (64, 128)


def unfit(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    chip: Chip | None,
    blocks: tuple[int | None, int | None] = (None, None),
    span: jax.Array | None = None,
) -> str | None:
    """Why the kernel does not take these operands.

    Args:
      q: (batch, queries, heads, head_dim).
      k: (batch, keys, kv_heads, head_dim).
      v: (batch, keys, kv_heads, value_dim).
      chip: that it would run on; ``chips.H100`` for interpret mode.
      blocks: queries and keys of a block, where the caller names them.
      span: of the adaptive span, or None.

    Returns:
      The reason, or None where it does.
    """
    if chip is None or chip.name != "h100":
        return f"it runs on Hopper GPUs, not on {chip.name if chip else 'an unknown chip'}"
    version = tuple(int(part) for part in jax.__version__.split(".")[:2])
    if version < _OLDEST or not _kernels():
        return f"it needs jax {'.'.join(map(str, _OLDEST))}, and this is {jax.__version__}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, not {q.dtype}"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"it takes keys and values of q's dtype, not {k.dtype} and {v.dtype}"
    if q.shape[-1] not in _DIMS or v.shape[-1] != q.shape[-1]:
        return (
            f"it takes heads of 64 or 128, with values of the same width, not {q.shape[-1]} and "
            f"{v.shape[-1]}"
        )
    if any(block not in (None, BLOCK) for block in blocks):
        return f"its blocks are {BLOCK} by {BLOCK}, not {blocks[0]} by {blocks[1]}"
    if span is not None:
        return "it has no adaptive span"
    return None


def _kernels():
    """The module of kernels, imported late since that takes a second; None without Mosaic GPU."""
    try:
        from jaxcomp.kernels.sparse_attention import gpu_kernel
    except ImportError:
        return None
    return gpu_kernel


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float,
    soft_cap: float | None = None,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    span_ramp: float = 32.0,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention over the blocks of a mask, for operands for which ``unfit`` is None.

    Args and results are those of ``reference.attention``.
    """
    del span_ramp
    listed = schedule(mask, q.shape[2], q.shape[1], k.shape[1], BLOCK, BLOCK)
    segments = None
    if segment_ids is not None:
        # Padding of keys differs from padding of queries: no comparison finds them equal.
        segments = (
            jnp.where(segment_ids < 0, -1, segment_ids),
            jnp.where(kv_segment_ids < 0, -2, kv_segment_ids),
        )
    cap = None if soft_cap is None else float(soft_cap)
    return _attention(listed, float(scale), cap, interpret, q, k, v, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attention(listed, scale, soft_cap, interpret, q, k, v, segments):
    gpu_kernel = _kernels()
    operands = {name: _aligned(x) for name, x in (("q", q), ("k", k), ("v", v))}
    operands |= {name: jnp.asarray(array) for name, array in gpu_lists.arrays(listed).items()}
    if segments is not None:
        names, sizes = ("segments", "kv_segments"), (listed.row_blocks, listed.column_blocks)
        for name, ids, count in zip(names, segments, sizes, strict=True):
            padding = ((0, 0), (0, count * BLOCK - ids.shape[1]))
            operands[name] = jnp.pad(ids.astype(jnp.int32), padding, constant_values=-3)
    problem = gpu_kernel.Problem(
        codes=gpu_lists.codes(listed),
        rules=listed.rules,
        scale=scale,
        soft_cap=soft_cap,
        staged=bool(interpret),
    )
    out, lse = gpu_kernel.forward(operands, problem, interpret)
    return out[:, : q.shape[1]], lse[:, :, : q.shape[1]]


def _aligned(x: jax.Array) -> jax.Array:
    """Positions up to a multiple of 8, the rows that tiles of shared memory have."""
    length = x.shape[1]
    rows = -length % 8 if length > 8 else 0
    return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, 0)))


def _forward(listed, scale, soft_cap, interpret, q, k, v, segments):
    results = _attention(listed, scale, soft_cap, interpret, q, k, v, segments)
    return results, (q, k, v, segments)


def _backward(listed, scale, soft_cap, interpret, saved, cotangents):
    del interpret
    *operands, segments = saved

    def plain(q, k, v):
        ids, kv_ids = (None, None) if segments is None else segments
        return xla.attention(
            q,
            k,
            v,
            listed,
            block_q=BLOCK,
            block_k=BLOCK,
            scale=scale,
            soft_cap=soft_cap,
            segment_ids=ids,
            kv_segment_ids=kv_ids,
        )

    return *jax.vjp(plain, *operands)[1](cotangents), None


_attention.defvjp(_forward, _backward)
