"""Arrays of one shape that stand for their stack, which is not made before it is asked for.

A checkpoint stores each expert, and each layer, by itself; a model may want them as one leaf. A
``Stacked`` has the shape and dtype of that leaf and holds the memory-mapped arrays. What reads a
slice of it (a scanned layer, an expert) reads that file's part only, and ``np.asarray`` makes a
stack that lives as long as its reader: so ``jc.compress`` has one layer's experts in memory at a
time. JAX's own functions take arrays only: ``densified`` makes them.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


class Stacked:
    """Parts along a new leading axis.

    Attributes:
      parts: arrays (or ``Stacked``) of one shape and dtype, at least one.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = tuple(parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stack."""
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype:
        """Of the parts."""
        return self.parts[0].dtype

    @property
    def ndim(self) -> int:
        """Of the stack."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the stack."""
        return self.size * self.dtype.itemsize

    def __getitem__(self, index: Any) -> Any:
        """A part, a ``Stacked`` of some, or an array sliced from them."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(first, slice):
            chosen = self.parts[first]
            if not rest or not chosen:
                return Stacked(chosen) if chosen else np.asarray(self)[index]
            return Stacked([part[tuple(rest)] for part in chosen])
        if isinstance(first, int | np.integer):
            part = self.parts[first]
            return part[tuple(rest)] if rest else part
        return np.asarray(self)[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The stack, in new memory; what reading has filled of memory maps is let go.

        Raises:
          ValueError: with ``copy=False``.
        """
        from jaxcomp.io.safetensors import release

        if copy is False:
            raise ValueError(f"a stack {self.shape} of separate arrays is always a copy")
        out = np.empty(self.shape, self.dtype if dtype is None else dtype)
        for i, part in enumerate(self.parts):
            out[i] = part
            release(part)
        return out

    def __repr__(self) -> str:
        """Shape and dtype."""
        return f"Stacked({self.shape}, {self.dtype})"


def densified(tree: Any) -> Any:
    """A tree with arrays in place of every ``Stacked``.

    Args:
      tree: of arrays and ``Stacked``.

    Returns:
      The tree; its stacks are in host memory, all else is as it was.

    Example:
      >>> lazy = Stacked([np.zeros(3), np.ones(3)])
      >>> lazy.shape, densified({"w": lazy})["w"].sum(1).tolist()
      ((2, 3), [0.0, 3.0])
    """
    return jax.tree.map(lambda a: np.asarray(a) if isinstance(a, Stacked) else a, tree)
