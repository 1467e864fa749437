"""Long sequences on TPUs: queries in several calls, where one's list of blocks is too long.

A core holds the list of a call in its scalar memory (``tpu.SCALAR_BYTES``). Each row of blocks has
its result by itself, so some rows after the others give what all at once would: outputs to the bit,
and the gradients of keys and values as sums over the calls, each rounded once.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxcomp.kernels.sparse_attention import shifts, tpu
from jaxcomp.kernels.sparse_attention.rules import Mask
from jaxcomp.kernels.sparse_attention.schedule import SKIP, Schedule, schedule

# Each is compiled by itself.
MOST_CALLS = 16


@dataclasses.dataclass(frozen=True)
class Part:
    """Queries of one call.

    Attributes:
      queries: the first one, and how many.
      mask: of theirs, whose positions count from 0.
      blocks: queries and keys of a block.
    """

    queries: tuple[int, int]
    mask: Mask
    blocks: tuple[int, int]


def plan(
    q: jax.Array,
    k: jax.Array,
    mask: Mask,
    block_q: int | None = None,
    block_k: int | None = None,
    span: bool = False,
) -> tuple[tuple[Part, ...], str | None]:
    """How queries are computed, so that the lists of their blocks fit in scalar memory.

    Args:
      q: (batch, queries, heads, head_dim).
      k: (batch, keys, kv_heads, head_dim).
      mask: which query looks at which key.
      block_q: queries in a block, where the caller names it.
      block_k: keys in a block, likewise.
      span: whether heads have adaptive spans, which count from the first position.

    Returns:
      The calls, one where that is enough, and None; or why there are none.
    """
    queries, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    blocks, reason = tpu.fitting_blocks(q, k, mask, block_q, block_k)
    if reason is None:
        return (Part((0, queries), mask, blocks),), None
    listed = schedule(mask, q.shape[2], queries, keys, *blocks)
    if listed.scalar_bytes(group) <= tpu.SCALAR_BYTES:  # It is something else.
        return (), reason
    some = int((listed.rows.code != SKIP).sum()) * (group if listed.rows.lists == 1 else 1)
    told = f"; XLA would hold {4 * some * blocks[0] * blocks[1] >> 30} GiB of scores at once"
    if span:
        return (), f"{reason}, or leave out the span, with which queries are not divided{told}"
    starts = _starts(listed)
    if starts is None:
        return (), f"{reason}; {MOST_CALLS} calls for some queries each are not enough{told}"
    bound, parts = mask.bind(queries, keys), []
    for first, last in itertools.pairwise([*starts, listed.row_blocks]):
        own = first * blocks[0], min(last * blocks[0], queries) - first * blocks[0]
        parts.append(Part(own, shifts.part(bound, own, (0, keys)), blocks))
    return tuple(parts), None


def _starts(listed: Schedule) -> list[int] | None:
    """Rows of blocks with which calls begin, each of as many as fit; None where none do."""
    lists, rows = listed.rows.lists, listed.row_blocks
    kept = [code != SKIP for code in listed.rows.code]
    each = [np.bincount(m[k], minlength=rows) for m, k in zip(listed.rows.major, kept, strict=True)]
    steps = lists * np.maximum(np.max(each, axis=0), 1)
    # Of a step two words; and each block of keys has a step in the list of gradients.
    most = tpu.SCALAR_BYTES // 8 - lists * listed.column_blocks
    starts, taken = [0], 0
    for row, count in enumerate(steps.tolist()):
        if taken + count > most and taken:
            starts.append(row)
            taken = 0
        taken += count
        if taken > most or len(starts) > MOST_CALLS:
            return None
    return starts


def attention(
    parts: tuple[Part, ...],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array | None]:
    """Attention of all queries in the calls of ``plan``; further args are ``tpu.attention``'s."""
    if len(parts) == 1:
        own = parts[0]
        options |= {"segment_ids": segment_ids, "blocks": own.blocks}
        return tpu.attention(q, k, v, own.mask, **options)
    found = []
    for part in parts:
        place = slice(part.queries[0], sum(part.queries))
        ids = None if segment_ids is None else segment_ids[:, place]
        found.append(
            tpu.attention(
                q[:, place], k, v, part.mask, blocks=part.blocks, segment_ids=ids, **options
            )
        )
    outs, lses = zip(*found, strict=True)
    lse = None if lses[0] is None else jnp.concatenate(lses, axis=2)
    return jnp.concatenate(outs, axis=1), lse
