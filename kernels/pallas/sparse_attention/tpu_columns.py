"""Rows and columns of the decoding kernel for TPUs: which heads they have, and how rows are merged.

A column is a position and a key head, as a cache lies in memory; a row is a query and a query head.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels import gathers
from jaxcomp.kernels.sparse_attention.tpu_kernels import lanes
from jaxcomp.kernels.sparse_attention.tpu_walk import LANES

SUBLANES = 8
# Codes of eight bits in a word, as memory is read.
WORD = 4


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of queries, by the key head that they look at, and which of them share registers.

    - A head's rows are its queries, and of each the query heads of its group; padded, they divide
      the sublanes or fill them.
    - Heads are in sets, which have rows and columns of their own. Codes of eight bits that share
      words of memory are a set, which can be read by itself; else there is one set.
    - Planes are as many rows as one head has, or as there are sublanes. Of a column, only rows of
      its own head count, and they are in one plane: merged, planes have the rows of one.
    - A merged row has a result in every lane, of the head of the lane's columns. Where heads do not
      divide the lanes columns of a lane have different ones: all rows are then one plane.

    Attributes:
      queries: newest tokens of a sequence.
      group: query heads of a key head.
      heads: key heads of a set.
      sets: their number.
    """

    queries: int
    group: int
    heads: int
    sets: int

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, v: jax.Array) -> "Rows":
        """Those of queries and a cache."""
        kv_heads = k.shape[-2]
        # Mosaic reads rows at a stride where they fill the lanes once.
        apart = k.dtype.itemsize == 1 and kv_heads % WORD == 0
        apart = apart and k.shape[-1] == v.shape[-1] == LANES
        heads = WORD if apart else kv_heads
        return cls(q.shape[1], q.shape[2] // kv_heads, heads, kv_heads // heads)

    @property
    def each(self) -> int:
        """Rows of a key head, padded."""
        rows = self.queries * self.group
        return 1 << (rows - 1).bit_length() if rows <= SUBLANES else up(rows, SUBLANES)

    @property
    def merges(self) -> bool:
        """Whether a lane's columns are all of one head."""
        return LANES % self.heads == 0

    @property
    def merged(self) -> int:
        """Rows of a plane."""
        if self.merges:
            return max(self.each, SUBLANES)
        return up(self.each * self.heads, SUBLANES)

    @property
    def planes(self) -> int:
        """Of a set."""
        return -(-self.each * self.heads // self.merged)

    @property
    def count(self) -> int:
        """All rows of a set."""
        return self.merged * self.planes

    def stacked(self, q: jax.Array) -> jax.Array:
        """(batch, queries, heads, dim) as (batch, sets, rows, dim)."""
        batch, dim = q.shape[0], q.shape[-1]
        q = q.reshape(batch, self.queries, -1, self.group, dim)
        q = jnp.swapaxes(q, 1, 2).reshape(batch, -1, self.queries * self.group, dim)
        q = jnp.pad(q, ((0, 0), (0, 0), (0, self.each - q.shape[2]), (0, 0)))
        q = q.reshape(batch, self.sets, -1, dim)
        return jnp.pad(q, ((0, 0), (0, 0), (0, self.count - q.shape[2]), (0, 0)))

    def apart(self, out: jax.Array) -> jax.Array:
        """(batch, sets, rows, dim) as (batch, queries, heads, dim)."""
        batch, dim = out.shape[0], out.shape[-1]
        out = out[:, :, : self.heads * self.each].reshape(batch, -1, self.each, dim)
        out = out[:, :, : self.queries * self.group]
        out = out.reshape(batch, -1, self.queries, self.group, dim)
        return jnp.swapaxes(out, 1, 2).reshape(batch, self.queries, -1, dim)

    def within(self, shape: tuple[int, ...]) -> jax.Array:
        """Of each row which of its head's: a query's number times ``group``, and a head's in it."""
        return divided(iota(shape, len(shape) - 2), self.each)[1]

    def query_heads(self) -> np.ndarray:
        """Query heads of merged rows' lanes, int (sets, merged, 128); any where there is none."""
        of, row, lane = np.indices((self.sets, self.merged, LANES))
        head = lane % self.heads if self.merges else row // self.each % self.heads
        return (of * self.heads + head) * self.group + row % self.each % self.group

    def lane_heads(self) -> jax.Array:
        """Heads of lanes' columns where rows are merged, int32 (merged, 128)."""
        return divided(iota((self.merged, LANES), 1), self.heads)[1]

    def own(self, plane: int, lane_heads: jax.Array) -> jax.Array:
        """Whether a lane's head is the row's, bool (merged, 128)."""
        if self.each == self.merged:
            return lane_heads == plane
        row = plane * self.merged + iota((self.merged, LANES), 0)
        return divided(row, self.each)[0] == lane_heads

    def merge(self, products: jax.Array, lane_heads: jax.Array) -> jax.Array:
        """(rows, columns) as (merged, columns): of each column its head's plane."""
        found, width = products[: self.merged], products.shape[1]
        for plane in range(1, self.planes):
            first = plane * self.merged
            later = lanes(lane_heads * self.each >= first, width)
            found = jnp.where(later, products[first : first + self.merged], found)
        return found

    def split(self, weights: jax.Array, lane_heads: jax.Array) -> jax.Array:
        """(merged, columns) as (rows, columns), with zeros for columns of other heads."""
        if not self.merges or self.heads == 1:
            return weights
        width = weights.shape[1]
        own = [lanes(self.own(i, lane_heads), width) for i in range(self.planes)]
        return jnp.concatenate([jnp.where(of, weights, 0.0) for of in own])

    def across(self, x: jax.Array, join) -> jax.Array:
        """(merged, 128): of all lanes of a head, joined by ``jnp.maximum`` or ``jnp.add``."""
        shift = self.heads if self.merges else 1
        while shift < LANES:
            x = join(x, pltpu.roll(x, shift, 1))
            shift *= 2
        return x

    def by_row(self, x: jax.Array) -> jax.Array:
        """(merged, 128), equal for all lanes of a head, to (rows, 128) of equal lanes."""
        if not self.merges or self.heads == 1:
            return x
        shape = self.merged, LANES
        parts = []
        for plane in range(self.planes):
            head = divided(plane * self.merged + iota(shape, 0), self.each)[0] & (LANES - 1)
            parts.append(gathers.along(x, head, 1))
        return jnp.concatenate(parts)


def columns_of(heads: int, part: Any) -> tuple[jax.Array, jax.Array]:
    """Positions of 128 columns, counted from a multiple of 128, and their key heads.

    Args:
      heads: of a set.
      part: number of the columns, counted in 128 from that position's.

    Returns:
      int32 (1, 128) each.
    """
    shape = 1, LANES
    if LANES % heads == 0:
        position, head = divided(iota(shape, 1), heads)
        return part * (LANES // heads) + position, head
    return divided(part * LANES + iota(shape, 1), heads)


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """int32 positions along an axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def multiple(x, of: int):
    """A number that is a multiple of another, which the compiler is told of one that is traced."""
    return x if isinstance(x, int) else pl.multiple_of(x, of)


def up(x: int, to: int) -> int:
    """The next multiple."""
    return -(-x // to) * to


def divided(x, by: int):
    """Quotient and remainder of numbers that are not negative."""
    if isinstance(x, int):
        return divmod(x, by)
    if by & (by - 1) == 0:
        return x >> (by.bit_length() - 1), x & (by - 1)
    by = x.dtype.type(by)  # no 64-bit number, where a program enables those
    return jax.lax.div(x, by), jax.lax.rem(x, by)
