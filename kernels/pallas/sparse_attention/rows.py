"""Of a cache, what the newest queries may look at: keys one by one, and the blocks that hold any.

A decoding step knows its position only when it runs. So a mask's rows are looked up by a traced
position: rules on positions are computed, cells are read from a small table, and the blocks of a
row come from a list that is made once on the host, like ``schedule``'s, in memory proportional to
the blocks that are not empty.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jaxcomp.kernels.sparse_attention.rules import (
    AnyOf,
    Blocks,
    Cells,
    Composition,
    Kind,
    Mask,
    Not,
    PerHead,
    Random,
)

# Positions that share a list of blocks: fewer make more lists, more make longer ones.
ROWS = 128
# Where a row's list has more of the blocks before it than this, they are all read.
DENSE_FROM = 0.75
# Numbers of all lists that a kernel keeps in scalar memory.
MOST_LISTED = 1 << 16
# Bits of a word: the queries of one key head that a kernel takes with an arbitrary mask.
BITS = 32


def is_rule(mask: Mask, segments: bool = False) -> bool:
    """Whether arithmetic on positions, the same for all heads and sequences, is the whole mask."""
    return mask.lowers and not isinstance(mask, PerHead) and not segments


def allowed(
    mask: Mask,
    positions: jax.Array,
    lengths: jax.Array,
    start: int | jax.Array,
    keys: int,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Which key of a cache, or a part of one, each query may look at.

    Args:
      mask: bound to the cache's capacity.
      positions: int32 (batch, queries); negative ones look at nothing.
      lengths: int32 (batch,), keys that there are of the whole cache.
      start: position of the first key here.
      keys: how many are here.
      segment_ids: int (batch, queries).
      kv_segment_ids: int (batch, keys).

    Returns:
      bool (batch, heads or 1, queries, keys): a mask for each head where they differ.
    """
    k = start + jnp.arange(keys, dtype=jnp.int32)
    inside = (k < lengths[:, None])[:, None] & (positions >= 0)[:, :, None]
    if segment_ids is not None:
        same = segment_ids[:, :, None] == kv_segment_ids[:, None, :]
        inside &= same & (segment_ids >= 0)[:, :, None]
    masks = mask.masks if isinstance(mask, PerHead) else (mask,)
    each = {m: _row(m, positions, k, start) & inside for m in dict.fromkeys(masks)}
    order = [list(each).index(m) for m in masks]
    stacked = jnp.stack(list(each.values()), axis=1)
    return stacked if len(each) == len(masks) else stacked[:, np.array(order)]


def _row(mask: Mask, q: jax.Array, k: jax.Array, start: int | jax.Array) -> jax.Array:
    """One mask as bool (batch, queries, keys), for q (batch, queries) and consecutive k (keys,)."""
    if mask.lowers:
        return jnp.broadcast_to(mask.allowed(q[..., None], k), (*q.shape, *k.shape))
    if isinstance(mask, Not):
        return ~_row(mask.mask, q, k, start)
    if isinstance(mask, Composition):
        join = operator.or_ if isinstance(mask, AnyOf) else operator.and_
        return functools.reduce(join, (_row(part, q, k, start) for part in mask.masks))
    size, count = mask.block_size, k.shape[0]
    cells = _cells(mask, jnp.maximum(q, 0) // size)
    # Repeated and cut, where looking each key's cell up would be a gather.
    each = jnp.repeat(cells, size, axis=-1)
    each = jnp.pad(each, ((0, 0), (0, 0), (0, count)))
    return jax.lax.dynamic_slice_in_dim(each, start, count, axis=-1)


def _cells(mask: Cells, row: jax.Array) -> jax.Array:
    """Rows of a mask's cells: bool (batch, queries, cells)."""
    if isinstance(mask, Random):
        drawn = jnp.asarray(mask.drawn(-(-mask.keys // mask.block_size)))
        drawn = jnp.take(drawn, row, axis=0, mode="clip")
        cells = jnp.arange(-(-mask.keys // mask.block_size))
        return (drawn[..., None] == cells).any(axis=-2)
    if not isinstance(mask, Blocks):
        raise TypeError(f"decoding knows no rows of a {type(mask).__name__}")
    packed = np.frombuffer(mask.packed, np.uint8).reshape(mask.shape[0], -1)
    found = jnp.take(jnp.asarray(packed), row, axis=0, mode="fill", fill_value=0)
    bits = found[..., None] >> jnp.arange(7, -1, -1, dtype=jnp.uint8) & 1
    return bits.reshape(*row.shape, -1)[..., : mask.shape[1]].astype(bool)


def words(allowed: jax.Array, kv_heads: int, heads: int) -> jax.Array:
    """A bit for each query and each query head that share a key head, packed.

    Args:
      allowed: bool (batch, heads or 1, queries, keys).
      kv_heads: key heads.
      heads: query heads.

    Returns:
      int32 (batch, 1, keys * kv_heads): of a key and its head, bit ``query * group + head`` says
      whether that query, with that head of the group, looks at it.
    """
    batch, found, queries, keys = allowed.shape
    group = heads // kv_heads
    shape = (batch, kv_heads, group, queries, keys) if found > 1 else (batch, 1, 1, queries, keys)
    each = allowed.reshape(shape).astype(jnp.uint32)
    each = jnp.broadcast_to(each, (batch, shape[1], group, queries, keys))
    bit = jnp.arange(queries) * group + jnp.arange(group)[:, None]
    packed = (each << bit[None, None, :, :, None].astype(jnp.uint32)).sum((2, 3), dtype=jnp.uint32)
    packed = jnp.broadcast_to(packed, (batch, kv_heads, keys))
    packed = jnp.moveaxis(packed, 1, 2).reshape(batch, 1, keys * kv_heads)
    return jax.lax.bitcast_convert_type(packed, jnp.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Lists:
    """The blocks of a cache that hold anything for the queries from a position on.

    Attributes:
      offsets: int32 (rows + 1,): of ``ROWS`` positions each, where their list begins.
      columns: int32 (entries,): the blocks, ascending.
      longest: the longest list.
    """

    offsets: np.ndarray
    columns: np.ndarray
    longest: int

    def at(
        self, first: jax.Array, skipped: int | jax.Array, count: int | jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The lists of some positions.

        Args:
          first: int32 (batch,), the first query of each sequence.
          skipped: blocks of the cache that lie before the part that is here.
          count: int32 (batch,), blocks that are here and filled.

        Returns:
          int32 (batch, longest), blocks counted from the first one here, and (batch,), how many of
          them are listed.
        """
        row = jnp.clip(first // ROWS, 0, len(self.offsets) - 2)
        offsets = jnp.asarray(self.offsets)
        begin, end = offsets[row], offsets[row + 1]
        at = begin[:, None] + jnp.arange(self.longest)
        # Flat lists, cut where the next one begins.
        column = jnp.take(jnp.asarray(self.columns), at, mode="clip") - skipped
        listed = at < end[:, None]
        before = (listed & (column < 0)).sum(1)
        kept = (listed & (column >= 0) & (column < jnp.asarray(count)[..., None])).sum(1)
        column = jnp.take_along_axis(
            column, jnp.minimum(before[:, None] + jnp.arange(self.longest), self.longest - 1), 1
        )
        return column.astype(jnp.int32), kept.astype(jnp.int32)


@functools.lru_cache(maxsize=32)
def lists(mask: Mask, queries: int, capacity: int, block: int) -> Lists | None:
    """Lists the blocks of a mask, by position.

    Args:
      mask: bound to the capacity.
      queries: newest tokens of a step.
      capacity: of the whole cache.
      block: keys in a block.

    Returns:
      The lists; None where a distance bounds the mask, or where nearly all blocks are listed, so
      that arithmetic finds them.

    Example:
      >>> from jaxcomp.kernels.sparse_attention import global_, window
      >>> found = lists(window(64) | global_(4), 1, 1024, 128)
      >>> found.columns[found.offsets[7] :].tolist(), found.longest
      ([0, 6, 7], 3)
    """
    if mask.reach() is not None:
        return None
    masks = tuple(dict.fromkeys(mask.masks if isinstance(mask, PerHead) else (mask,)))
    columns, offsets, all_before = [], [0], 0
    for row in range(-(-capacity // ROWS)):
        size = ROWS + queries - 1
        starts = np.arange(0, min(row * ROWS + size, capacity), block)
        kinds = [
            m.combine(leaf.kinds(row * ROWS, size, starts, block) for leaf in m.leaves())
            for m in masks
        ]
        columns.append(np.nonzero(functools.reduce(np.maximum, kinds) != Kind.EMPTY)[0])
        offsets.append(offsets[-1] + len(columns[-1]))
        all_before += len(starts)
    if offsets[-1] > DENSE_FROM * all_before:
        return None
    flat = np.concatenate(columns).astype(np.int32)
    longest = max(len(each) for each in columns)
    return Lists(np.array(offsets, np.int32), flat, longest)


__all__ = ["Lists", "allowed", "is_rule", "lists", "words"]
