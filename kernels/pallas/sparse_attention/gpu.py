"""Block-sparse flash attention on Hopper GPUs: what fits, and the calls of its kernels.

Nothing here was run on a GPU so far: the kernels were compared with float64 in interpret mode, and
compiled for H100 by CUDA's assembler.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxcomp.kernels import chips, implementations
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.sparse_attention import gpu_lists
from jaxcomp.kernels.sparse_attention.gpu_lists import BLOCK
from jaxcomp.kernels.sparse_attention.rules import Mask
from jaxcomp.kernels.sparse_attention.schedule import schedule

_DIMS = (64, 128)
_LOG2_E = math.log2(math.e)


def unfit(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    chip: Chip | None,
    blocks: tuple[int | None, int | None] = (None, None),
) -> str | None:
    """Why the kernel does not take these operands.

    Args:
      q: (batch, queries, heads, head_dim).
      k: (batch, keys, kv_heads, head_dim).
      v: (batch, keys, kv_heads, value_dim).
      chip: that it would run on; ``chips.H100`` for interpret mode.
      blocks: queries and keys of a block, where the caller names them.

    Returns:
      The reason, or None where it does.
    """
    if lacking := chips.lacks_mosaic_gpu(chip, _kernels):
        return lacking
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
    return None


def _kernels():
    """The modules of kernels, imported late since that takes a second; None without Mosaic GPU."""
    try:
        from jaxcomp.kernels.sparse_attention import gpu_gradients, gpu_kernel
    except ImportError:
        return None
    return gpu_kernel, gpu_gradients


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
    span: jax.Array | None = None,
    span_ramp: float = 32.0,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention over the blocks of a mask, for operands for which ``unfit`` is None.

    Args and results are those of ``reference.attention``.
    """
    listed = schedule(mask, q.shape[2], q.shape[1], k.shape[1], BLOCK, BLOCK)
    segments = None
    if segment_ids is not None:
        # Padding of keys differs from padding of queries: no comparison finds them equal.
        segments = (
            jnp.where(segment_ids < 0, -1, segment_ids),
            jnp.where(kv_segment_ids < 0, -2, kv_segment_ids),
        )
    problem = _kernels()[0].Problem(
        codes=gpu_lists.codes(listed),
        rules=listed.rules,
        scale=float(scale),
        soft_cap=None if soft_cap is None else float(soft_cap),
        ramp=float(span_ramp),
        staged=bool(interpret),
    )
    span = None if span is None else span.astype(jnp.float32)
    return _attention(listed, problem, interpret, q, k, v, segments, span)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(listed, problem, interpret, q, k, v, segments, span):
    kernel, _ = _kernels()
    operands = _operands(listed, None, q, k, v, segments, span)
    if span is not None:
        operands["ticks"] = jnp.arange(BLOCK, dtype=jnp.float32)
    out, lse = kernel.forward(operands, problem, interpret)
    return out[:, : q.shape[1]], lse[:, :, : q.shape[1]]


_once = functools.partial(implementations.first_order, "attention", "mosaic_gpu")


def _forward(listed, problem, interpret, q, k, v, segments, span):
    forward = functools.partial(_attention, listed, problem, interpret)
    out, lse = _once(forward)(q, k, v, segments, span)
    return (out, lse), (q, k, v, segments, span, out, lse)


def _backward(listed, problem, interpret, saved, cotangents):
    q, k, v, segments, span, out, lse = saved
    d_out, d_lse = cotangents
    # The gradient of a score is its share times (d_share - delta).
    delta = jnp.einsum("bqhd,bqhd->bhq", d_out, out, preferred_element_type=jnp.float32) - d_lse
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse) * _LOG2_E
    padding = ((0, 0), (0, 0), (0, listed.row_blocks * BLOCK - q.shape[1]))
    statistics = [jnp.pad(lse, padding, constant_values=jnp.inf), jnp.pad(delta, padding)]
    extras = {"d_out": _aligned(d_out.astype(q.dtype)), "statistics": jnp.stack(statistics)}
    _, kernel = _kernels()

    def run(group):
        operands = _operands(listed, group, q, k, v, segments, span) | extras

        def gradients(operands):
            return kernel.gradients(operands, problem, group is not None, interpret)

        return _once(gradients)(operands)

    (dq, *d_span), (dk, dv) = run(None), run(q.shape[2] // k.shape[2])
    d_span = d_span[0].sum((0, 2)) if d_span else None
    return dq[:, : q.shape[1]], dk[:, : k.shape[1]], dv[:, : k.shape[1]], None, d_span


_attention.defvjp(_forward, _backward)


def _operands(listed, group, q, k, v, segments, span) -> dict[str, jax.Array]:
    """Operands that all kernels have, with the lists of queries or, for a group, of keys."""
    operands = {name: _aligned(x) for name, x in (("q", q), ("k", k), ("v", v))}
    lists = gpu_lists.arrays(listed, group)
    operands |= {name: jnp.asarray(array) for name, array in lists.items()}
    if segments is not None:
        names, sizes = ("segments", "kv_segments"), (listed.row_blocks, listed.column_blocks)
        for name, ids, count in zip(names, segments, sizes, strict=True):
            padding = ((0, 0), (0, count * BLOCK - ids.shape[1]))
            operands[name] = jnp.pad(ids.astype(jnp.int32), padding, constant_values=-3)
    return operands if span is None else operands | {"span": span}


def _aligned(x: jax.Array) -> jax.Array:
    """Positions up to a multiple of 8, the rows that tiles of shared memory have."""
    length = x.shape[1]
    rows = -length % 8 if length > 8 else 0
    return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, 0)))
