"""Arrays in the very files that a checkpoint will have of them, before there is one.

A checkpoint's files of an array do not depend on its other arrays, so those of a finished weight
can be written at once, and be linked to their place when all is done. So can those of a slice of a
stack, if no file holds a part of two slices: slices of 8 MB and more, which is nearly all of a
large model. Smaller ones (scales; layers of small models) are written twice, to the journal and
from there to the checkpoint: a file for each would be thousands of small ones in every checkpoint.
"""

import functools
import itertools
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcomp.io import arrays as storage
from jaxcomp.io.later import Later
from jaxcomp.io.stacked import Stacked
from jaxcomp.journal import dtype_of


class Staged(Later):
    """An array, or the slice of a stack, that was written by ``stage``.

    Attributes:
      whole: shape of the array that its files belong to.
      files: path and checksum of each file, by its name in a checkpoint.
    """

    def __init__(self, folder: pathlib.Path, entry: dict[str, Any]) -> None:
        """Nothing is read.

        Args:
          folder: as given to ``stage``.
          entry: what it returned.
        """
        self._folder, self._index = folder, tuple(entry["index"])
        self.whole = (*entry["stack"], *entry["shape"])
        self.files = {name: (folder / name, sha) for name, sha in entry["sha256"].items()}
        # Read again for each file of a checkpoint that is cut otherwise.
        read = functools.lru_cache(maxsize=1)(self._read)
        super().__init__(tuple(entry["shape"]), dtype_of(entry["dtype"]), read)

    def damaged(self) -> pathlib.Path | None:
        """A file that is missing or is not what was written, if there is one."""
        for path, expected in self.files.values():
            if not path.is_file() or storage.sha256(path) != expected:
                return path
        return None

    def _read(self) -> np.ndarray:
        stored = storage.open_store(self._folder.absolute(), open=True)[self._index].read().result()
        return stored if stored.dtype == self.dtype else stored.view(self.dtype)


def stage(
    folder: pathlib.Path, value: Any, index: Sequence[int], sizes: Sequence[int]
) -> dict[str, Any] | None:
    """Writes an array, or the slice of a stack, as a checkpoint does.

    Args:
      folder: is made anew.
      value: array of NumPy or JAX.
      index: its position in the stack; empty for all of an array.
      sizes: of the stack.

    Returns:
      What ``Staged`` needs, JSON-able; None where files of a checkpoint would hold other slices
      too, or the array is empty: nothing is written then.
    """
    dtype, shape = np.dtype(value.dtype), (*sizes, *value.shape)
    chunks = storage.chunks_of(shape, shape, dtype)
    if 0 in shape or any(size > 1 for size in chunks[: len(index)]):
        return None
    shutil.rmtree(folder, ignore_errors=True)
    at = (*(slice(k, k + 1) for k in index), *(slice(0, n) for n in value.shape))
    piece = np.asarray(value).reshape((*(1,) * len(index), *value.shape))
    storage.write_chunks(folder, storage.Source(shape, dtype, chunks, ((at, piece),)))
    files = storage.checksums(folder)
    del files[".zarray"]  # A checkpoint writes its own.
    return {
        "dtype": dtype.name,
        "shape": list(value.shape),
        "index": list(index),
        "stack": list(sizes),
        "sha256": files,
    }


def staged_files(value: Any) -> dict[str, tuple[pathlib.Path, str]]:
    """The files of an array, if all of it is in files as a checkpoint has them; else nothing.

    Args:
      value: any array, ``Staged``, or a ``Stacked`` of them.
    """
    parts = list(_parts(value))
    if not all(isinstance(p, Staged) and p.whole == tuple(value.shape) for p in parts):
        return {}
    return dict(itertools.chain.from_iterable(p.files.items() for p in parts))


def _parts(value: Any) -> Any:
    if isinstance(value, Stacked):
        for part in value.parts:
            yield from _parts(part)
    else:
        yield value
