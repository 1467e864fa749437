"""What this process has read of files, told by the kernel: for tests of "reads only its share".

Of a memory-mapped file those pages count that are in the process's page table, whatever read them:
NumPy, JAX, a checksum. The kernel maps with a page what its cache holds around it: up to 64 KiB, or
the pages that were written to the file together, which is why ``write`` writes page by page.
"""

import mmap
import pathlib
from collections.abc import Mapping

import numpy as np

from jaxcomp.io import arrays, safetensors

_PAGE = mmap.PAGESIZE


def write(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A safetensors file of which the kernel tells what is read."""
    safetensors.write(path, tensors)
    contents = path.read_bytes()
    path.unlink()
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(contents), _PAGE):
            file.write(contents[start : start + _PAGE])


class Mapped:
    """Which pages of one memory-mapped file this process has touched."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        """Watches a file from now on.

        Args:
          tensors: what ``safetensors.read`` returned, of a file that ``write`` wrote.
        """
        root = next(iter(tensors.values()))
        while not isinstance(root.base, mmap.mmap):
            root = root.base
        self._map = root.base
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self._map.madvise(mmap.MADV_RANDOM)  # Should the cache have lost it: no pages together.
        # Pages that are let go leave the table.
        safetensors.release = arrays.release = lambda array: None
        self.forget()
        # Whether this kernel tells.
        first = next(iter(tensors.values())).reshape(-1)
        first[: first.size // 4].sum()
        assert 0.25 <= self.share(first) <= 0.25 + 2**16 / first.nbytes, self.share(first)
        self.forget()

    def forget(self) -> None:
        """Begins anew."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def share(self, tensor: np.ndarray) -> float:
        """Of a tensor of the file, the share of its pages that were touched."""
        low, high = np.lib.array_utils.byte_bounds(tensor)
        first, end = low // _PAGE, -(-high // _PAGE)
        with open("/proc/self/pagemap", "rb") as table:
            table.seek(8 * first)
            entries = np.frombuffer(table.read(8 * (end - first)), np.uint64)
        return float((entries >> np.uint64(63)).mean())


def bytes_read() -> int:
    """Bytes that this process's system calls have read so far, from a disk or its cache."""
    with open("/proc/self/io") as file:
        return int(file.readline().removeprefix("rchar:"))
