"""The list of blocks of a schedule as the kernel for GPUs reads it."""

import numpy as np
from jaxcomp.kernels.sparse_attention.schedule import SKIP, TABLE, Schedule

BLOCK = 128  # queries of a block, and keys of one
WORDS = BLOCK // 32  # 32-bit words of a row of a bitmap


def codes(listed: Schedule) -> tuple[int, ...]:
    """What there is to do with blocks: full ones first, then bitmaps, then each rule."""
    return tuple(code for code in np.unique(listed.rows.code).tolist() if code != SKIP)


def arrays(listed: Schedule) -> dict[str, np.ndarray]:
    """A schedule as the kernel's operands.

    Args:
      listed: in blocks of 128 by 128.

    Returns:
      "rows" and "columns", and where it has bitmaps "tables" and "bits", as ``gpu_kernel.forward``
      takes them. Rows are in the order of their length, longest first, so that none of the long
      ones is started last.
    """
    steps, kinds = listed.rows, codes(listed)
    longest = max(1, int((steps.code != SKIP).sum(1).max()))
    columns = np.zeros((steps.lists, longest), np.int32)
    tables = np.zeros_like(columns)
    rows = np.zeros((steps.lists, listed.row_blocks, 2 + len(kinds)), np.int32)
    for i in range(steps.lists):
        kept = np.nonzero(steps.code[i] != SKIP)[0]
        kept = kept[np.lexsort((steps.minor[i, kept], steps.code[i, kept], steps.major[i, kept]))]
        columns[i, : len(kept)], tables[i, : len(kept)] = steps.minor[i, kept], steps.table[i, kept]
        which = np.searchsorted(kinds, steps.code[i, kept])
        counts = np.zeros((listed.row_blocks, len(kinds)), np.int64)
        np.add.at(counts, (steps.major[i, kept], which), 1)
        bounds = np.concatenate([[0], np.cumsum(counts.reshape(-1))])
        order = np.argsort(-counts.sum(1), kind="stable")
        rows[i, :, 0] = order
        rows[i, :, 1:] = bounds[order[:, None] * len(kinds) + np.arange(len(kinds) + 1)]
    found = {"rows": rows, "columns": columns}
    if TABLE in kinds:
        found |= {"tables": tables, "bits": _bits(listed.bitmaps)}
    return found


def _bits(bitmaps: np.ndarray) -> np.ndarray:
    """Bool (bitmaps, queries, keys) as int32 (bitmaps, words, queries): 32 keys a word."""
    packed = np.packbits(bitmaps, axis=2, bitorder="little")
    return np.ascontiguousarray(packed.view("<u4").view(np.int32).swapaxes(1, 2))
