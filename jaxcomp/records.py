"""Finished weights, as they wait for the end of a run of ``compress``: in memory or a journal."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxcomp import folding, formats, host
from jaxcomp.formats import CompressedArray
from jaxcomp.io.staged import Staged, stage
from jaxcomp.journal import JournalError
from jaxcomp.processes import Together

Index = tuple[int, ...]


@dataclasses.dataclass
class Record:
    """The finished weight at one position of its stack.

    Attributes:
      array: compressed, without loop axes.
      folds: channel scales that move into other parameters.
      metrics: numbers and notes for the report.
      seconds: time its algorithms took.
    """

    array: CompressedArray
    folds: list[folding.Fold]
    metrics: dict
    seconds: float

    def without_contents(self) -> "Record":
        """The same with shapes and dtypes in place of the arrays."""
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), self.array)
        # A vector that is mapped would keep its record's file open.
        folds = [dataclasses.replace(f, vector=np.array(f.vector)) for f in self.folds]
        return dataclasses.replace(self, array=shapes, folds=folds)


class Store:
    """Keeps finished weights. Without a journal the records that it is given are all there is.

    Attributes:
      journal: where they are kept, or None.
      streams: whether they leave memory as soon as the pass has gone on with them, and are written
        as a checkpoint will have them.
    """

    def __init__(
        self,
        together: Together,
        sizes: Callable[[str, Index], Sequence[int]],
        streams: bool = False,
    ) -> None:
        """Begins without a journal.

        Args:
          together: the processes of the run.
          sizes: those of the stack in which a path and index give a slice's position.
          streams: see the class.
        """
        self.journal: Any = None
        self.streams = streams
        self._together, self._sizes = together, sizes

    def has(self, path: str, index: Index) -> bool:
        """Whether the journal holds a record."""
        return self.journal is not None and self.journal.has(key(path, index))

    def get(self, path: str, index: Index, verify: bool = True) -> Record | None:
        """A record of the journal, its arrays memory-mapped or in memory; None where none is.

        Args:
          path: of the weight.
          index: position in its stack.
          verify: compare with the checksum, for which all of it is read. Without, of a run that
            streams, arrays may be ``Staged``.
        """
        found = None if self.journal is None else self.journal.get(key(path, index), verify)
        if found is None:
            return None
        arrays, meta = found
        for name, entry in meta.get("staged", {}).items():
            array = Staged(self.journal.beside(key(path, index)) / name.replace("/", "."), entry)
            if verify and (damaged := array.damaged()):
                raise JournalError(
                    f"journal {self.journal.path}: {damaged} is missing or does not match its "
                    f"checksum; delete {self.journal.record(key(path, index))} and run again: only "
                    "this weight is computed anew."
                )
            arrays[name] = np.asarray(array) if verify or not self.streams else array
        folds = [
            folding.Fold(p, kind, axis, tuple(loops), arrays[f"fold/{k}"])
            for k, (p, kind, axis, loops) in enumerate(meta["folds"])
        ]
        array = formats.from_arrays(arrays, meta["structure"])
        return Record(array, folds, meta["metrics"], meta["seconds"])

    def keep(self, keys: Sequence[tuple[str, Index]], records: list[Record]) -> list[Record]:
        """Stores finished weights.

        Args:
          keys: path and index of each.
          records: the weights, on all processes the same.

        Returns:
          The same, their arrays from now on memory-mapped, unless the run streams.

        Raises:
          JournalError: they could not be written, here or by another process.
        """
        if self.journal is None:
            return records

        def put() -> None:
            for (path, index), record in zip(keys, records, strict=True):
                self.put(path, index, record)

        # A full disk of one process is an error of all: they would wait for it at the next sum.
        self._together.step("keep " + key(*keys[0]), put)
        return records if self.streams else [self.get(*at, verify=False) for at in keys]

    def room(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array for a weight that grows slice by slice; with a journal on the journal's disk."""
        return (host.empty if self.journal is None else self.journal.room)(shape, dtype)

    def put(self, path: str, index: Index, record: Record) -> None:
        """Writes a record to the journal; of a shared one, one of the processes does."""
        arrays, structure = formats.to_arrays(record.array)
        name, staged = key(path, index), {}
        if not self.journal.claim(name, formats.nbits(record.array) // 8):
            return
        if self.streams:
            folder, sizes = self.journal.beside(name), self._sizes(path, index)
            for at, array in arrays.items():
                staged[at] = stage(folder / at.replace("/", "."), array, index, sizes)
            staged = {at: entry for at, entry in staged.items() if entry is not None}
            arrays = {at: array for at, array in arrays.items() if at not in staged}
        arrays |= {f"fold/{k}": fold.vector for k, fold in enumerate(record.folds)}
        meta = {
            "structure": structure,
            "folds": [[f.path, f.kind, f.axis, list(f.loops)] for f in record.folds],
            "metrics": record.metrics,
            "seconds": record.seconds,
            **({"staged": staged} if staged else {}),
        }
        self.journal.put(name, arrays, meta)


def key(path: str, index: Sequence[Any]) -> str:
    """The name of a record in the journal."""
    return f"{path}[{','.join(map(str, index))}]"
