"""Arrays that are read when they are written to a checkpoint, by the processes that share this."""

import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Index = tuple[slice, ...]


class Shares:
    """Who of several processes does the next piece of some work: the same answer on all of them.

    Attributes:
      rank: this process's position among them.
      count: how many they are.

    Example:
      >>> shares = Shares(rank=0, count=2)
      >>> [shares.take(nbytes) for nbytes in (5, 3, 1, 4)]
      [0, 1, 1, 1]
    """

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self._bytes = [0] * count

    def take(self, nbytes: int) -> int:
        """Gives a piece to the process that has the least so far; returns its rank."""
        rank = min(range(self.count), key=lambda r: self._bytes[r])
        self._bytes[rank] += nbytes
        return rank


class Later:
    """An array that is in no memory until it is asked for.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      read: gives it, as an array or a ``Stacked``: on every process, each time the same.
      files: where all its files are written, their paths and checksums by name.
    """

    files: Mapping[str, tuple[pathlib.Path, str]] = {}

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[], Any]) -> None:
        self.shape, self.dtype, self.read = shape, dtype, read

    @classmethod
    def of(cls, value: Any, read: Callable[[], Any] | None = None) -> "Later":
        """What stands for an array that ``read`` gives again; by default for the array itself."""
        return cls(tuple(value.shape), np.dtype(value.dtype), read or (lambda: value))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __getitem__(self, index: Any) -> Any:
        """A part of it, read now."""
        return self.read()[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it, read now."""
        return np.asarray(self.read(), dtype=dtype)

    def pieces(self, chunks: tuple[int, ...], shares: Shares) -> tuple[tuple[Index, "Later"], ...]:
        """What this process is to write.

        Args:
          chunks: shape of the files; none is written by two processes.
          shares: takes account of it.

        Returns:
          (position in the array, contents): files in a row where there are some for each process,
          else everything or nothing.
        """
        whole = tuple(slice(0, n) for n in self.shape)
        rows = -(-self.shape[0] // max(1, chunks[0])) if self.shape else 1
        if rows < shares.count:
            mine = shares.take(math.prod(self.shape) * self.dtype.itemsize) == shares.rank
            return ((whole, self),) if mine else ()
        start, stop = (
            min(rows * r // shares.count * chunks[0], self.shape[0])
            for r in (shares.rank, shares.rank + 1)
        )
        own = slice(start, stop)
        shape = (stop - start, *self.shape[1:])
        return (((own, *whole[1:]), Later(shape, self.dtype, lambda: self.read()[own])),)
