"""Attention masks as small immutable objects: which query may look at which key.

A mask is a rule on positions, ``allowed(q, k)``, and never an array of queries by keys. Masks
compose with ``|``, ``&`` and ``~``, are hashable (so they are static arguments of ``jax.jit``), and
tell of a whole block at a time whether it is empty, full or in between: that is all a kernel needs
to know of a million tokens before it starts.

    >>> print((window(3, causal=True) | global_(1)).picture(5))
    # # # # #
    # # . . .
    # # # . .
    # # # # .
    # . # # #

Sources: Sparse Transformer, arXiv 1904.10509 (``strided``, ``fixed``); Longformer, arXiv 2004.05150
(``window``, ``dilated``, ``global_``); BigBird, arXiv 2007.14062 (``random``).
"""

import typing
from collections.abc import Sequence

import numpy as np
from jaxcomp.kernels import arguments
from jaxcomp.kernels.sparse_attention.rules import (
    Band,
    Blocks,
    ChunkTail,
    Global,
    Mask,
    PerHead,
    Periodic,
    Random,
    SameChunk,
    full,
)

__all__ = [
    "blocks",
    "causal",
    "chunked",
    "dilated",
    "fixed",
    "full",
    "global_",
    "per_head",
    "random",
    "strided",
    "window",
]


def causal(offset: int = 0) -> Mask:
    """Keys up to the query's own position plus an offset: ``k <= q + offset``.

    Args:
      offset: keys minus queries, where the queries are the last positions of a longer sequence.

    Example:
      >>> print(causal().picture(3))
      # . .
      # # .
      # # #
    """
    _integers(offset=offset)
    return Band(-offset, None)


def window(size: int, *, causal: bool = False) -> Mask:
    """A sliding window.

    Args:
      size: Longformer's window: ``size // 2`` keys on each side of the query, and itself. With
        ``causal``, the last ``size`` keys, the query's own among them.
      causal: whether it looks back only.

    Example:
      >>> print(window(2).picture(4))
      # # . .
      # # # .
      . # # #
      . . # #
      >>> print(window(2, causal=True).picture(4))
      # . . .
      # # . .
      . # # .
      . . # #
    """
    _positive(size=size)
    return Band(0, size - 1) if causal else Band(-(size // 2), size // 2)


def dilated(size: int, rate: int, *, causal: bool = False) -> Mask:
    """A sliding window with gaps: of every ``rate`` keys it looks at one.

    Args:
      size: keys as in ``window``; it reaches ``rate`` times as far.
      rate: distance between neighbouring keys.
      causal: whether it looks back only.

    Example:
      >>> print(dilated(2, 2).picture(5))
      # . # . .
      . # . # .
      # . # . #
      . # . # .
      . . # . #
    """
    _positive(size=size, rate=rate)
    side = (size - 1 if causal else size // 2) * rate
    return Band(0 if causal else -side, side) & Periodic(rate)


def strided(stride: int) -> Mask:
    """Sparse Transformer's strided pattern: the last ``stride`` keys, and every stride-th before.

    ``0 <= q - k <= stride`` or ``(q - k) % stride == 0``, causal: both of the paper's heads in one.

    Example:
      >>> print(strided(2).picture(5))
      # . . . .
      # # . . .
      # # # . .
      . # # # .
      # . # # #
    """
    _positive(stride=stride)
    return Band(0, stride) | (Band(0, None) & Periodic(stride))


def fixed(stride: int, summary: int = 1) -> Mask:
    """Sparse Transformer's fixed pattern: the query's own chunk, and the last keys of each chunk.

    Args:
      stride: size of a chunk.
      summary: keys at the end of each chunk that later queries look at (``c`` in the paper).

    Example:
      >>> print(fixed(3).picture(6))
      # . . . . .
      # # . . . .
      # # # . . .
      . . # # . .
      . . # # # .
      . . # # # #
    """
    _positive(stride=stride, summary=summary)
    if summary > stride:
        raise ValueError(f"summary {summary} is more than the {stride} keys of a chunk")
    return Band(0, None) & (SameChunk(stride) | ChunkTail(stride, summary))


def chunked(size: int) -> Mask:
    """Keys of the query's own chunk: queries ``size * i`` to ``size * i + size - 1`` and no others.

    Llama 4's local layers have ``chunked(8192) & causal()``.

    Args:
      size: of a chunk.

    Example:
      >>> print(chunked(3).picture(5))
      # # # . .
      # # # . .
      # # # . .
      . . . # #
      . . . # #
      >>> print((chunked(3) & causal()).picture(5))
      # . . . .
      # # . . .
      # # # . .
      . . . # .
      . . . # #
    """
    _positive(size=size)
    return SameChunk(size)


def global_(count: int) -> Mask:
    """The first tokens look at all keys, and all queries look at them (Longformer, BigBird).

    Example:
      >>> print(global_(1).picture(3))
      # # #
      # . .
      # . .
    """
    _positive(count=count)
    return Global(count)


def random(blocks_per_row: int, seed: int = 0, block_size: int = 128) -> Mask:
    """BigBird's random blocks: each row of blocks looks at a few blocks of keys.

    Args:
      blocks_per_row: blocks of keys that each block of queries looks at.
      seed: of the draw; the same for every process.
      block_size: queries and keys in a block. Kernels work on tiles of 128 and more: a smaller
        block costs as much as a whole tile.

    Example:
      >>> print(random(1, seed=1, block_size=2).picture(4))
      # # . .
      # # . .
      . . # #
      . . # #
    """
    _positive(blocks_per_row=blocks_per_row, block_size=block_size)
    return Random(blocks_per_row, seed, block_size)


def blocks(allowed: typing.Any, block_size: int) -> Mask:
    """Any pattern of blocks.

    Args:
      allowed: bool (query blocks, key blocks), as many as it takes to cover the sequences: the
        attention of others than these is an error.
      block_size: queries and keys in a block.

    Example:
      >>> print(blocks([[1, 0], [0, 1]], block_size=2).picture(4))
      # # . .
      # # . .
      . . # #
      . . # #
    """
    _positive(block_size=block_size)
    array = np.asarray(allowed).astype(bool)
    if array.ndim != 2:
        raise ValueError(f"blocks take a matrix of query by key blocks, not shape {array.shape}")
    return Blocks(array.shape, np.packbits(array, axis=1).tobytes(), block_size)


def per_head(masks: Sequence[Mask]) -> Mask:
    """A mask for each query head.

    Example:
      >>> per_head([causal(), window(8)]).head(1) == window(8)
      True
    """
    if not masks or any(isinstance(mask, PerHead) for mask in masks):
        raise ValueError("per_head takes one mask for each head, and no per-head masks")
    for mask in masks:
        if not isinstance(mask, Mask):
            raise TypeError(f"per_head takes masks, not a {type(mask).__name__}")
    return PerHead(tuple(masks))


def _integers(**values: int) -> None:
    for name, value in values.items():
        arguments.integer(name, value)


def _positive(**values: int) -> None:
    _integers(**values)
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
