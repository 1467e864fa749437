"""What masks are made of: rules on positions, and what they say of a whole block at a time."""

# The methods are documented once, in ``Mask``.
# ruff: noqa: D102

import dataclasses
import enum
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np


class Kind(enum.IntEnum):
    """What a block of a mask holds."""

    EMPTY = 0
    PARTIAL = 1
    FULL = 2


class Mask:
    """A rule that says which query position may look at which key position.

    Invariants:
      - immutable and hashable; equal masks are one mask;
      - ``allowed`` uses operators only, so that it takes NumPy arrays on the host and JAX arrays
        in a kernel, wherever ``lowers`` is true;
      - ``kinds`` is certain where it says EMPTY or FULL; PARTIAL may be either in a composition.
    """

    lowers: bool = True

    def allowed(self, q: Any, k: Any) -> Any:
        """Whether queries at positions ``q`` may look at keys at ``k``, broadcast together."""
        raise NotImplementedError

    def kinds(self, q_start: int, q_size: int, k_starts: np.ndarray, k_size: int) -> np.ndarray:
        """Kind of each block that starts at a query and one of many keys.

        Args:
          q_start: first query of the blocks.
          q_size: queries in each.
          k_starts: (blocks,), the first key of each.
          k_size: keys in each.

        Returns:
          int8 (blocks,), values of ``Kind``.
        """
        raise NotImplementedError

    def signatures(
        self, q_start: int, q_size: int, k_starts: np.ndarray, k_size: int
    ) -> np.ndarray:
        """int64 (blocks,): of two PARTIAL blocks of one size, equal numbers mean equal contents."""
        raise NotImplementedError

    def leaves(self) -> Iterator["Mask"]:
        """The rules that a composition is made of; itself where it is none."""
        yield self

    def combine(self, kinds: Iterator[np.ndarray]) -> np.ndarray:
        """``kinds`` of a composition, from those of each of ``leaves()`` in their order."""
        return next(kinds)

    def restrict(self, kinds: Iterator[int]) -> "Mask | None":
        """The part of a composition that still decides inside a block.

        Args:
          kinds: kind of the block in each of ``leaves()``, in their order.

        Returns:
          A mask that equals this one in the block: ``full()``, None for an empty one, or what is
          left when the parts that are empty or full there are dropped.
        """
        kind = next(kinds)
        return {Kind.EMPTY: None, Kind.FULL: full()}.get(kind, self)

    def bind(self, queries: int, keys: int) -> "Mask":
        """The mask for sequences of these lengths; only ``random`` depends on them."""
        del queries, keys
        return self

    def head(self, index: int) -> "Mask":
        """The mask of one head: itself, except after ``per_head``."""
        del index
        return self

    def reach(self) -> int | None:
        """How far back a query looks at most, ``max(q - k)``; None where nothing bounds it."""
        return None

    def block(self, q_start: int, q_size: int, k_start: int, k_size: int) -> np.ndarray:
        """One block as bool (q_size, k_size).

        Example:
          >>> from jaxcomp.kernels.sparse_attention import causal
          >>> causal().block(4, 2, 4, 2).astype(int)
          array([[1, 0],
                 [1, 1]])
        """
        q = np.arange(q_start, q_start + q_size)[:, None]
        k = np.arange(k_start, k_start + k_size)[None, :]
        return np.broadcast_to(self.allowed(q, k), (q_size, k_size))

    def kind(self, q_start: int, q_size: int, k_start: int, k_size: int) -> Kind:
        """Kind of one block, without making it; EMPTY and FULL are certain.

        Example:
          >>> from jaxcomp.kernels.sparse_attention import causal
          >>> [causal().kind(4, 4, start, 4).name for start in (0, 4, 8)]
          ['FULL', 'PARTIAL', 'EMPTY']
        """
        return Kind(int(self.kinds(q_start, q_size, np.array([k_start]), k_size)[0]))

    def picture(self, queries: int, keys: int | None = None) -> str:
        """The mask as text, a row a query: ``#`` where it looks, ``.`` where it does not."""
        keys = queries if keys is None else keys
        rows = self.bind(queries, keys).block(0, queries, 0, keys)
        return "\n".join(" ".join(".#"[int(x)] for x in row) for row in rows)

    def __or__(self, other: "Mask") -> "Mask":
        """Where either allows it."""
        return _compose(AnyOf, self, other)

    def __and__(self, other: "Mask") -> "Mask":
        """Where both allow it."""
        return _compose(AllOf, self, other)

    def __invert__(self) -> "Mask":
        """Where this does not allow it."""
        return Not(self)

    def __bool__(self) -> bool:
        """Refused: ``a and b`` would be ``b``, and ``not a`` False."""
        raise TypeError("a mask is neither true nor false: use & for and, | for or, ~ for not")


# -- rules -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Band(Mask):
    """low <= q - k <= high; None for no bound."""

    low: int | None
    high: int | None

    def allowed(self, q, k):
        distance = q - k
        if self.low is None and self.high is None:
            return distance == distance
        if self.low is None:
            return distance <= self.high
        if self.high is None:
            return distance >= self.low
        return (distance >= self.low) & (distance <= self.high)

    def kinds(self, q_start, q_size, k_starts, k_size):
        nearest, furthest = q_start - k_starts - (k_size - 1), q_start + q_size - 1 - k_starts
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        return _kinds((furthest < low) | (nearest > high), (nearest >= low) & (furthest <= high))

    def signatures(self, q_start, q_size, k_starts, k_size):
        return q_start - k_starts

    def reach(self):
        return self.high


@dataclasses.dataclass(frozen=True)
class Periodic(Mask):
    """q - k is a multiple of the period."""

    period: int

    def allowed(self, q, k):
        # On each side apart: these are a column and a row, their difference is a whole block.
        return q % self.period == k % self.period

    def kinds(self, q_start, q_size, k_starts, k_size):
        nearest, furthest = q_start - k_starts - (k_size - 1), q_start + q_size - 1 - k_starts
        none = furthest // self.period * self.period < nearest
        every = (self.period == 1) | (nearest == furthest)
        return _kinds(none, ~none & every)

    def signatures(self, q_start, q_size, k_starts, k_size):
        return (q_start - k_starts) % self.period


@dataclasses.dataclass(frozen=True)
class SameChunk(Mask):
    """q and k lie in the same chunk of a size."""

    size: int

    def allowed(self, q, k):
        # Where each one's chunk starts: remainders compile for a TPU that is not here, quotients of
        # integers ask which one it is.
        return q - q % self.size == k - k % self.size

    def kinds(self, q_start, q_size, k_starts, k_size):
        q_first, q_last = q_start // self.size, (q_start + q_size - 1) // self.size
        k_first, k_last = k_starts // self.size, (k_starts + k_size - 1) // self.size
        one = (q_first == q_last) & (k_first == k_last) & (q_first == k_first)
        return _kinds((k_last < q_first) | (k_first > q_last), one)

    def signatures(self, q_start, q_size, k_starts, k_size):
        # Where the chunks start in each, and how many chunks apart they are.
        apart = q_start // self.size - k_starts // self.size
        return (apart * self.size + k_starts % self.size) * self.size + q_start % self.size


@dataclasses.dataclass(frozen=True)
class ChunkTail(Mask):
    """k is one of the last keys of its chunk."""

    size: int
    count: int

    def allowed(self, q, k):
        return (k % self.size >= self.size - self.count) & (q == q)

    def kinds(self, q_start, q_size, k_starts, k_size):
        def before(position):
            """Tail keys before a position."""
            whole, rest = position // self.size, position % self.size
            return whole * self.count + np.maximum(rest - (self.size - self.count), 0)

        count = before(k_starts + k_size) - before(k_starts)
        return _kinds(count == 0, count == k_size)

    def signatures(self, q_start, q_size, k_starts, k_size):
        return k_starts % self.size


@dataclasses.dataclass(frozen=True)
class Global(Mask):
    """The first positions look at all and are looked at by all."""

    count: int

    def allowed(self, q, k):
        return (q < self.count) | (k < self.count)

    def kinds(self, q_start, q_size, k_starts, k_size):
        none = (q_start >= self.count) & (k_starts >= self.count)
        every = (q_start + q_size <= self.count) | (k_starts + k_size <= self.count)
        return _kinds(none, every)

    def signatures(self, q_start, q_size, k_starts, k_size):
        return min(q_start, self.count) * (self.count + 1) + np.minimum(k_starts, self.count)


@dataclasses.dataclass(frozen=True)
class KeysBefore(Mask):
    """The first keys only: what is left of a mask where the last block is longer than the keys."""

    count: int

    def allowed(self, q, k):
        """Whether a key is one of the first."""
        return (k < self.count) & (q == q)

    def kinds(self, q_start, q_size, k_starts, k_size):
        """Kinds of blocks."""
        return _kinds(k_starts >= self.count, k_starts + k_size <= self.count)

    def signatures(self, q_start, q_size, k_starts, k_size):
        """Where in a block the keys end."""
        return self.count - k_starts


class Cells(Mask):
    """A mask that is constant on square cells; rows of cells come from ``rows``."""

    lowers = False
    block_size: int

    def rows(self, first: int, last: int) -> np.ndarray:
        """Rows ``first`` to ``last - 1`` of the cells as bool (rows, cells)."""
        raise NotImplementedError

    def allowed(self, q, k):
        q, k = np.asarray(q), np.asarray(k)
        first = int(q.min()) // self.block_size
        cells = self.rows(first, int(q.max()) // self.block_size + 1)
        column = k // self.block_size
        inside = column < cells.shape[1]
        return cells[q // self.block_size - first, np.where(inside, column, 0)] & inside

    def _cells(self, q_start, q_size, k_starts, k_size):
        size = self.block_size
        rows = self.rows(q_start // size, (q_start + q_size - 1) // size + 1)
        return rows, k_starts // size, (k_starts + k_size - 1) // size + 1

    def kinds(self, q_start, q_size, k_starts, k_size):
        rows, first, last = self._cells(q_start, q_size, k_starts, k_size)
        sums = np.concatenate([[0], np.cumsum(rows.sum(0))])
        width = rows.shape[1]
        count = sums[np.minimum(last, width)] - sums[np.minimum(first, width)]
        return _kinds(count == 0, count == (last - first) * rows.shape[0])

    def signatures(self, q_start, q_size, k_starts, k_size):
        rows, first, last = self._cells(q_start, q_size, k_starts, k_size)
        at = q_start % self.block_size
        return np.array(
            [
                hash((at, int(start % self.block_size), int(b - a), rows[:, a:b].tobytes()))
                for start, a, b in zip(k_starts, first, last, strict=True)
            ],
            np.int64,
        )


@dataclasses.dataclass(frozen=True)
class Random(Cells):
    """A few key cells for each row of cells, drawn uniformly without replacement."""

    blocks_per_row: int
    seed: int
    block_size: int
    keys: int | None = None

    def bind(self, queries, keys):
        del queries
        return self if self.keys is not None else dataclasses.replace(self, keys=keys)

    def rows(self, first, last):
        if self.keys is None:
            raise ValueError(
                "random draws among the keys there are: call mask.bind(queries, keys) first"
            )
        cells = -(-self.keys // self.block_size)
        rows = np.zeros((last - first, cells), bool)
        np.put_along_axis(rows, self.drawn(last, first), True, axis=1)
        return rows

    def drawn(self, last, first=0):
        """The key cells of rows ``first`` to ``last - 1``: int (rows, drawn)."""
        cells = -(-self.keys // self.block_size)
        each = [_draw(self.seed, row, self.blocks_per_row, cells) for row in range(first, last)]
        return np.array(each, np.int32).reshape(last - first, -1)


@functools.lru_cache(maxsize=1 << 14)
def _draw(seed: int, row: int, count: int, cells: int) -> np.ndarray:
    return np.random.default_rng([seed, row]).choice(cells, min(count, cells), replace=False)


@dataclasses.dataclass(frozen=True)
class Blocks(Cells):
    """Cells that are listed one by one, packed eight a byte; nothing outside them."""

    shape: tuple[int, int]
    packed: bytes = dataclasses.field(repr=False)
    block_size: int

    def rows(self, first, last):
        bits = np.frombuffer(self.packed, np.uint8).reshape(self.shape[0], -1)[first:last]
        cells = np.unpackbits(bits, axis=1, count=self.shape[1]).astype(bool)
        return np.pad(cells, ((0, last - first - len(cells)), (0, 0)))


# -- compositions ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Composition(Mask):
    """Masks under one operator."""

    masks: tuple[Mask, ...]

    @property
    def lowers(self) -> bool:
        return all(mask.lowers for mask in self.masks)

    def leaves(self):
        for mask in self.masks:
            yield from mask.leaves()

    def bind(self, queries, keys):
        return type(self)(tuple(mask.bind(queries, keys) for mask in self.masks))

    def combine(self, kinds):
        return functools.reduce(self.merge, [mask.combine(kinds) for mask in self.masks])

    def kinds(self, q_start, q_size, k_starts, k_size):
        return self.combine(x.kinds(q_start, q_size, k_starts, k_size) for x in self.leaves())


class AnyOf(Composition):
    """Where one of them allows it."""

    merge = staticmethod(np.maximum)

    def allowed(self, q, k):
        return functools.reduce(lambda a, b: a | b, (mask.allowed(q, k) for mask in self.masks))

    def restrict(self, kinds):
        rest = [part for mask in self.masks if (part := mask.restrict(kinds)) is not None]
        if full() in rest or not rest:
            return full() if rest else None
        return functools.reduce(lambda a, b: a | b, rest)

    def reach(self):
        reaches = [mask.reach() for mask in self.masks]
        return None if None in reaches else max(reaches)


class AllOf(Composition):
    """Where all of them allow it."""

    merge = staticmethod(np.minimum)

    def allowed(self, q, k):
        return functools.reduce(lambda a, b: a & b, (mask.allowed(q, k) for mask in self.masks))

    def restrict(self, kinds):
        rest = [mask.restrict(kinds) for mask in self.masks]
        if None in rest:
            return None
        return functools.reduce(lambda a, b: a & b, [x for x in rest if x != full()] or [full()])

    def reach(self):
        return min((x for mask in self.masks if (x := mask.reach()) is not None), default=None)


@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """Where the mask does not allow it."""

    mask: Mask

    @property
    def lowers(self) -> bool:
        return self.mask.lowers

    def allowed(self, q, k):
        return ~self.mask.allowed(q, k)

    def combine(self, kinds):
        return np.int8(Kind.FULL) - self.mask.combine(kinds)

    def kinds(self, q_start, q_size, k_starts, k_size):
        return self.combine(x.kinds(q_start, q_size, k_starts, k_size) for x in self.leaves())

    def leaves(self):
        yield from self.mask.leaves()

    def bind(self, queries, keys):
        return Not(self.mask.bind(queries, keys))

    def restrict(self, kinds):
        rest = self.mask.restrict(kinds)
        if rest is None or rest == full():
            return full() if rest is None else None
        return ~rest

    def __invert__(self):
        return self.mask


@dataclasses.dataclass(frozen=True)
class PerHead(Mask):
    """One mask for each query head; it has blocks only through ``head``."""

    masks: tuple[Mask, ...]

    @property
    def lowers(self) -> bool:
        """Whether the masks of all heads do."""
        return all(mask.lowers for mask in self.masks)

    def head(self, index):
        """The mask of a head."""
        return self.masks[index]

    def bind(self, queries, keys):
        """The masks of all heads for these lengths."""
        return PerHead(tuple(mask.bind(queries, keys) for mask in self.masks))

    def reach(self):
        """How far back any head looks."""
        return AnyOf(self.masks).reach()

    def allowed(self, q, k):
        """Refused: heads differ."""
        raise ValueError("a per-head mask has no block of its own: use mask.head(index)")

    kinds = signatures = leaves = allowed

    def __invert__(self):
        """The complement of each head's mask."""
        return PerHead(tuple(~mask for mask in self.masks))


def _compose(kind: type[Composition], a: Mask, b: Mask) -> Mask:
    if not isinstance(b, Mask):
        return NotImplemented
    lengths = {len(mask.masks) for mask in (a, b) if isinstance(mask, PerHead)}
    if lengths:
        if len(lengths) > 1:
            raise ValueError(f"masks for {len(a.masks)} and {len(b.masks)} heads do not combine")
        return PerHead(tuple(_compose(kind, a.head(i), b.head(i)) for i in range(lengths.pop())))
    parts = [part for mask in (a, b) for part in (mask.masks if type(mask) is kind else (mask,))]
    parts = list(dict.fromkeys(parts))
    return parts[0] if len(parts) == 1 else kind(tuple(parts))


def _kinds(empty: np.ndarray, every: np.ndarray) -> np.ndarray:
    return np.where(empty, _EMPTY, np.where(every, _FULL, _PARTIAL))


_EMPTY, _PARTIAL, _FULL = (np.int8(kind) for kind in Kind)


def full() -> Mask:
    """Every query looks at every key."""
    return Band(None, None)
