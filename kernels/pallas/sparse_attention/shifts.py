"""Masks as one part of the queries sees them in one part of the keys."""

# The methods are documented once, in ``Mask``.
# ruff: noqa: D102

import dataclasses

from jaxcomp.kernels.sparse_attention.rules import (
    AllOf,
    AnyOf,
    Band,
    Composition,
    Kind,
    Mask,
    Not,
    PerHead,
    full,
)


@dataclasses.dataclass(frozen=True)
class Shifted(Mask):
    """A rule whose positions start further on."""

    mask: Mask
    q_offset: int
    k_offset: int

    @property
    def lowers(self) -> bool:
        return self.mask.lowers

    def allowed(self, q, k):
        return self.mask.allowed(q + self.q_offset, k + self.k_offset)

    def kinds(self, q_start, q_size, k_starts, k_size):
        starts = q_start + self.q_offset, k_starts + self.k_offset
        return self.mask.kinds(starts[0], q_size, starts[1], k_size)

    def signatures(self, q_start, q_size, k_starts, k_size):
        starts = q_start + self.q_offset, k_starts + self.k_offset
        return self.mask.signatures(starts[0], q_size, starts[1], k_size)


def part(mask: Mask, queries: tuple[int, int], keys: tuple[int, int]) -> Mask:
    """The mask of some queries and some keys, whose positions then count from 0.

    Parts that hold the same are the same mask, as far as the rules tell: an empty one is
    ``~full()``, and ``causal()`` is itself wherever queries and keys start at the same position.

    Args:
      mask: bound to the whole sequence (``Mask.bind``).
      queries: first one, and how many.
      keys: first one, and how many.

    Returns:
      The mask.

    Example:
      >>> from jaxcomp.kernels.sparse_attention import causal
      >>> part(causal(), (64, 32), (64, 32)) == causal()
      True
      >>> part(causal(), (64, 32), (0, 32)) == full()
      True
      >>> is_empty(part(causal(), (64, 32), (96, 32)))
      True
    """
    if isinstance(mask, PerHead):
        heads = [part(one, queries, keys) for one in mask.masks]
        return heads[0] if len(set(heads)) == 1 else PerHead(tuple(heads))
    shifted = _shifted(mask, queries[0], keys[0])
    kind = shifted.kind(0, queries[1], 0, keys[1])
    return {Kind.EMPTY: ~full(), Kind.FULL: full()}.get(kind, shifted)


def is_empty(mask: Mask) -> bool:
    """Whether a mask from ``part`` allows nothing."""
    return mask == ~full()


def _shifted(mask: Mask, q_offset: int, k_offset: int) -> Mask:
    if isinstance(mask, Composition):
        kind = AnyOf if isinstance(mask, AnyOf) else AllOf
        return kind(tuple(_shifted(one, q_offset, k_offset) for one in mask.masks))
    if isinstance(mask, Not):
        return Not(_shifted(mask.mask, q_offset, k_offset))
    if isinstance(mask, Band):
        # q - k is all that counts, so the same band lies in all parts that are equally far apart.
        apart = q_offset - k_offset
        bounds = [None if x is None else x - apart for x in (mask.low, mask.high)]
        return Band(*bounds)
    return Shifted(mask, q_offset, k_offset) if q_offset or k_offset else mask
