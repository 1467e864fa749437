"""The list of blocks of a schedule as the kernels for GPUs read it."""

import numpy as np
from jaxcomp.kernels.sparse_attention.schedule import SKIP, TABLE, Schedule

BLOCK = 128  # queries of a block, and keys of one
WORDS = BLOCK // 32  # 32-bit words of a row of a bitmap


def codes(listed: Schedule) -> tuple[int, ...]:
    """What there is to do with blocks: full ones first, then bitmaps, then each rule."""
    return tuple(code for code in np.unique(listed.rows.code).tolist() if code != SKIP)


def arrays(listed: Schedule, group: int | None = None) -> dict[str, np.ndarray]:
    """A schedule as the kernels' operands.

    Args:
      listed: in blocks of 128 by 128.
      group: None for lists of each block of queries. Else the query heads that share a key head,
        for lists of each block of keys.

    Returns:
      int32 "rows" (lists, blocks, 2 + codes): a block, then where each code's part of its list
      starts and the last one ends; and "columns" (lists, steps), the blocks of the list. Where
      codes have TABLE, also "tables" (lists, steps) and "bits" (bitmaps, WORDS, BLOCK), 32 columns
      a word; where heads have lists of their own, those of keys also have "members" (lists, steps),
      the query head of a group. Blocks are in the order of their lists' length, longest first, so
      that none of the long ones is started last.
    """
    steps, kinds = listed.rows if group is None else listed.columns(group), codes(listed)
    majors = listed.row_blocks if group is None else listed.column_blocks
    longest = max(1, int((steps.code != SKIP).sum(1).max()))
    columns = np.zeros((steps.lists, longest), np.int32)
    tables, members = np.zeros_like(columns), np.zeros_like(columns)
    rows = np.zeros((steps.lists, majors, 2 + len(kinds)), np.int32)
    for i in range(steps.lists):
        kept = np.nonzero(steps.code[i] != SKIP)[0]
        kept = kept[np.lexsort((steps.minor[i, kept], steps.code[i, kept], steps.major[i, kept]))]
        filled = ((columns, steps.minor), (tables, steps.table), (members, steps.group))
        for to, values in filled:
            to[i, : len(kept)] = values[i, kept]
        which = np.searchsorted(kinds, steps.code[i, kept])
        counts = np.zeros((majors, len(kinds)), np.int64)
        np.add.at(counts, (steps.major[i, kept], which), 1)
        bounds = np.concatenate([[0], np.cumsum(counts.reshape(-1))])
        order = np.argsort(-counts.sum(1), kind="stable")
        rows[i, :, 0] = order
        rows[i, :, 1:] = bounds[order[:, None] * len(kinds) + np.arange(len(kinds) + 1)]
    found = {"rows": rows, "columns": columns}
    if TABLE in kinds:
        bitmaps = listed.bitmaps if group is None else listed.bitmaps.swapaxes(1, 2)
        found |= {"tables": tables, "bits": _bits(bitmaps)}
    if group is not None and steps.lists > 1:
        found["members"] = members
    return found


def _bits(bitmaps: np.ndarray) -> np.ndarray:
    """Bool (bitmaps, rows, columns) as int32 (bitmaps, words, rows): 32 columns a word."""
    packed = np.packbits(bitmaps, axis=2, bitorder="little")
    return np.ascontiguousarray(packed.view("<u4").view(np.int32).swapaxes(1, 2))
