"""The list of blocks that a mask leaves to compute, in the order that a kernel visits them.

A kernel walks one flat list: no step is spent on an empty block, and a row without blocks keeps one
step, which writes its zeros. The list is made on the host from ``Mask.kinds``, a row of blocks at a
time; a block's contents are looked at only where a composition leaves doubt, and once for all
blocks with the same signature.
"""

import collections
import dataclasses
import functools

import numpy as np
from jaxcomp.kernels.sparse_attention.rules import KeysBefore, Kind, Mask, PerHead, full

# What a step does with its block. From RULE on: apply ``rules[code - RULE]``.
SKIP, FULL, TABLE, RULE = 0, 1, 2, 3

# Each rule is a branch of the kernel: more of them save arithmetic, and cost code.
MOST_RULES = 4
MOST_TABLE_BYTES = 1 << 30
MOST_BLOCKS = 1 << 15


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """Steps of a kernel, a list for each head, or one list for all.

    Attributes:
      major: int32 (lists, steps), the block whose result is summed up; never decreasing.
      minor: int32 (lists, steps), the block that is added to it.
      code: int32 (lists, steps), SKIP, FULL, TABLE, or RULE and more.
      table: int32 (lists, steps), the bitmap of the step, or of the last step that had one.
      group: int32 (lists, steps), the query head within those that share a key head.
    """

    major: np.ndarray
    minor: np.ndarray
    code: np.ndarray
    table: np.ndarray
    group: np.ndarray

    @property
    def lists(self) -> int:
        """Lists: 1, or one for each head."""
        return self.major.shape[0]

    @property
    def count(self) -> int:
        """Steps of each list."""
        return self.major.shape[1]

    def packed(self) -> tuple[np.ndarray, np.ndarray]:
        """Two int32 words a step: major and minor; table, group, code, last and first.

        Kernels keep them in scalar memory, which is small.
        """
        change = self.major[:, 1:] != self.major[:, :-1]
        edge = np.ones((self.lists, 1), bool)
        first = np.concatenate([edge, change], axis=1)
        last = np.concatenate([change, edge], axis=1)
        where = self.major << 16 | self.minor
        what = self.table << 16 | self.group << 8 | self.code << 2 | last << 1 | first
        return where.reshape(-1).astype(np.int32), what.reshape(-1).astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The blocks of a mask.

    Attributes:
      rows: steps by block of queries, for the output and the queries' gradient.
      rules: masks that are computed inside the kernel.
      bitmaps: bool (bitmaps, block_q, block_k), those that are not.
      row_blocks: blocks of queries.
      column_blocks: blocks of keys.
    """

    rows: Steps
    rules: tuple[Mask, ...]
    bitmaps: np.ndarray
    row_blocks: int
    column_blocks: int

    @property
    def blocks(self) -> float:
        """Blocks to compute, the mean over the lists."""
        return float((self.rows.code != SKIP).sum() / self.rows.lists)

    @property
    def density(self) -> float:
        """Blocks to compute over all blocks."""
        return self.blocks / (self.row_blocks * self.column_blocks)

    def scalar_bytes(self, group_size: int) -> int:
        """Bytes of the longest lists that a kernel keeps in scalar memory, forward or backward.

        Args:
          group_size: query heads that share a key head.
        """
        rows = self.rows
        if rows.lists == 1:
            group_size = 1
        longest = 0
        for start in range(0, rows.lists, group_size):
            kept = rows.code[start : start + group_size] != SKIP
            reached = np.unique(rows.minor[start : start + group_size][kept])
            # A block of keys that no query looks at has one step, which writes its zeros.
            longest = max(longest, int(kept.sum()) + self.column_blocks - len(reached))
        return 2 * 4 * max(rows.code.size, longest * (rows.lists // group_size))

    def columns(self, group_size: int) -> Steps:
        """The same blocks by block of keys, for the gradients of keys and values.

        Args:
          group_size: query heads that share a key head. Where heads have masks of their own, each
            list holds the steps of a whole group.
        """
        if self.rows.lists == 1:
            group_size = 1
        rows = self.rows
        lists = []
        for start in range(0, rows.lists, group_size):
            heads = range(start, start + group_size)
            entries = [
                (
                    rows.minor[h][keep],
                    rows.major[h][keep],
                    rows.code[h][keep],
                    rows.table[h][keep],
                    np.full(keep.sum(), h - start),
                )
                for h in heads
                for keep in (rows.code[h] != SKIP,)
            ]
            lists.append(_Entries(*map(np.concatenate, zip(*entries, strict=True))))
        return _steps(lists, self.column_blocks)


@dataclasses.dataclass
class _Entries:
    major: np.ndarray
    minor: np.ndarray
    code: np.ndarray
    table: np.ndarray
    group: np.ndarray


@functools.lru_cache(maxsize=32)
def schedule(
    mask: Mask, heads: int, queries: int, keys: int, block_q: int, block_k: int
) -> Schedule:
    """Lists the blocks of a mask.

    Args:
      mask: mask of all heads, or ``per_head`` masks.
      heads: query heads.
      queries: length of the queries; the last block may be longer than what is left of them.
      keys: length of the keys; what the last block has past them is masked.
      block_q: queries in a block.
      block_k: keys in a block.

    Returns:
      The schedule: memory in proportion to the blocks that are not empty.

    Example:
      >>> from jaxcomp.kernels.sparse_attention import masks
      >>> blocks = schedule(masks.causal(), 1, 512, 512, 128, 128)
      >>> blocks.rows.count, blocks.density
      (10, 0.625)
      >>> (blocks.rows.code == FULL).sum().item(), blocks.rules == (masks.causal(),)
      (6, True)
    """
    row_blocks, column_blocks = -(-queries // block_q), -(-keys // block_k)
    if max(row_blocks, column_blocks) > MOST_BLOCKS:
        raise ValueError(
            f"{queries} queries by {keys} keys are {row_blocks} by {column_blocks} blocks of "
            f"{block_q} by {block_k}; more than {MOST_BLOCKS} are not supported: use larger blocks"
        )
    bound = mask.bind(queries, keys)
    masks = [bound.head(h) for h in range(heads)] if isinstance(bound, PerHead) else [bound]
    if keys % block_k:
        masks = [m & KeysBefore(keys) for m in masks]
    listed = {m: _list(m, row_blocks, column_blocks, block_q, block_k) for m in set(masks)}
    partial = collections.Counter(
        found for m in masks for found in listed[m][1] if isinstance(found, tuple)
    )
    coded, rules, bitmaps = _code(masks, partial, block_q, block_k)
    coded |= {Kind.FULL: (FULL, 0), Kind.EMPTY: (SKIP, 0)}
    entries = []
    for m in masks:
        where, found = listed[m]
        what = np.array([coded[f] for f in found], np.int64).reshape(-1, 2)
        keep = what[:, 0] != SKIP
        where, what = where[keep], what[keep]
        entries.append(
            _Entries(where[:, 0], where[:, 1], what[:, 0], what[:, 1], np.zeros(len(where), int))
        )
    return Schedule(_steps(entries, row_blocks), rules, bitmaps, row_blocks, column_blocks)


def _list(
    mask: Mask, row_blocks: int, column_blocks: int, block_q: int, block_k: int
) -> tuple[np.ndarray, list]:
    """Blocks that may not be empty, and for each a Kind or (what decides in it, how to make it)."""
    starts = np.arange(column_blocks) * block_k
    leaves = list(mask.leaves())
    known: dict[bytes, object] = {}
    where, found = [], []
    for row in range(row_blocks):
        at = row * block_q
        of_leaves = np.stack([leaf.kinds(at, block_q, starts, block_k) for leaf in leaves])
        kinds = mask.combine(iter(of_leaves))
        columns = np.nonzero(kinds)[0]
        where.append(np.stack([np.full_like(columns, row), columns], axis=1))
        doubtful = columns[kinds[columns] == Kind.PARTIAL]
        keys = np.zeros((len(doubtful), 2, len(leaves)), np.int64)
        keys[:, 0] = of_leaves[:, doubtful].T
        for i, leaf in enumerate(leaves):
            part = np.nonzero(keys[:, 0, i] == Kind.PARTIAL)[0]
            if len(part):
                keys[part, 1, i] = leaf.signatures(at, block_q, starts[doubtful[part]], block_k)
        here: dict[int, object] = {}
        for column, key in zip(doubtful.tolist(), keys, strict=True):
            if (name := key.tobytes()) not in known:
                block = (at, block_q, column * block_k, block_k)
                known[name] = _resolve(mask, key[0], len(leaves) > 1, block)
            here[column] = known[name]
        found += [here.get(column, Kind.FULL) for column in columns.tolist()]
    return np.concatenate(where), found


def _resolve(mask: Mask, kinds: np.ndarray, composed: bool, block: tuple[int, int, int, int]):
    rest = mask.restrict(iter(kinds.tolist()))
    if rest is None or rest == full():
        return Kind.EMPTY if rest is None else Kind.FULL
    if composed:
        allowed = rest.block(*block)
        if not allowed.any() or allowed.all():
            return Kind.FULL if allowed.any() else Kind.EMPTY
    return rest, block


def _code(masks: list[Mask], partial: collections.Counter, block_q: int, block_k: int):
    """Chooses for each partial block a rule or a bitmap."""
    rules = collections.Counter()
    for (rest, _), count in partial.items():
        if rest.lowers:
            rules[rest] += count
    kept = [rule for rule, _ in rules.most_common(MOST_RULES)]
    if len(rules) > MOST_RULES and len(masks) == 1 and masks[0].lowers:
        kept = [*kept[: MOST_RULES - 1], masks[0]]
    coded, bitmaps = {}, {}
    for rest, block in partial:
        if rest in kept:
            coded[rest, block] = (RULE + kept.index(rest), 0)
        elif masks[0] in kept and len(masks) == 1:
            coded[rest, block] = (RULE + kept.index(masks[0]), 0)
        else:
            packed = np.packbits(rest.block(*block)).tobytes()
            coded[rest, block] = (TABLE, bitmaps.setdefault(packed, len(bitmaps)))
    if len(bitmaps) >= MOST_BLOCKS or len(bitmaps) * block_q * block_k > MOST_TABLE_BYTES:
        raise ValueError(
            f"{len(bitmaps)} different partial blocks of {block_q} by {block_k} need more than "
            f"{MOST_TABLE_BYTES >> 20} MiB; use a block_size in random() and blocks() that the "
            "kernel's blocks divide, or smaller block_q and block_k"
        )
    bits = block_q * block_k
    packed = np.frombuffer(b"".join(bitmaps), np.uint8).reshape(len(bitmaps), -(-bits // 8))
    table = np.unpackbits(packed, axis=1, count=bits).astype(bool)
    return coded, tuple(kept), table.reshape(-1, block_q, block_k)


def _steps(lists: list[_Entries], majors: int) -> Steps:
    """Sorts entries, adds a step for each result without any, and makes lists equally long."""
    fields = []
    for entries in lists:
        missing = np.setdiff1d(np.arange(majors), entries.major)
        zeros = np.zeros_like(missing)
        columns = [
            np.concatenate([a, b])
            for a, b in zip(
                dataclasses.astuple(entries), (missing, zeros, zeros, zeros, zeros), strict=True
            )
        ]
        order = np.lexsort((columns[1], columns[0]))
        fields.append([column[order] for column in columns])
    longest = max(len(columns[0]) for columns in fields)
    for columns in fields:
        short = longest - len(columns[0])
        for i, column in enumerate(columns):
            # A step that is skipped stays where the last one was, and fetches nothing.
            rest = np.full(short, SKIP if i == 2 else column[-1])
            columns[i] = np.concatenate([column, rest])
        columns[3] = _held(columns[3], columns[2] == TABLE)
    stacked = [np.stack([columns[i] for columns in fields]).astype(np.int32) for i in range(5)]
    return Steps(*stacked)


def _held(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Each value, or the last valid one before it, or 0."""
    last = np.maximum.accumulate(np.where(valid, np.arange(len(values)), -1))
    return np.where(last >= 0, values[np.maximum(last, 0)], 0)
