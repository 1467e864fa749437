"""A journal that several processes write together: each its share of the records, all read all."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcomp.io.later import Shares
from jaxcomp.journal import Journal, JournalError


class SharedJournal:
    """The journals of all processes, in one folder that all can reach.

    Invariants: every process makes the same calls in the same order, and waits for the others
    between a ``put`` and the first ``get`` of it.

    Attributes:
      path: the folder.
    """

    def __init__(
        self,
        path: pathlib.Path,
        rank: int,
        own: Journal,
        folders: Sequence[pathlib.Path],
        held: Sequence[Sequence[str]],
    ) -> None:
        """Goes on from the records that there are.

        Args:
          path: the folder.
          rank: this process's position among them.
          own: this process's journal, open.
          folders: those of all processes' journals.
          held: the keys of each one's records.
        """
        self.path = path
        self._own = own
        self._all = [own if r == rank else Journal(f, {}, None) for r, f in enumerate(folders)]
        self._holder = {key: r for r in reversed(range(len(held))) for key in held[r]}
        self._shares = Shares(rank, len(folders))

    def get(self, key: str, verify: bool = True) -> tuple[dict[str, np.ndarray], Any] | None:
        """As ``Journal.get``, whoever wrote it."""
        if key not in self._holder:
            return None
        holder = self._all[self._holder[key]]
        found = holder.get(key, verify)
        if found is None:
            raise JournalError(
                f"journal {holder.path}: the record of {key}, which another process has written, "
                "is not there; the folder must be on a disk that all processes reach."
            )
        return found

    def has(self, key: str) -> bool:
        """As ``Journal.has``, whoever wrote it."""
        return key in self._holder

    def claim(self, key: str, nbytes: int) -> bool:
        """Whether this process is to ``put`` a record, of about so many bytes; one of them is."""
        self._holder[key] = self._shares.take(nbytes)
        return self._holder[key] == self._shares.rank

    def room(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """As of ``Journal``."""
        return self._own.room(shape, dtype)

    def put(self, key: str, arrays: Mapping[str, Any], meta: Any = None) -> None:
        """As ``Journal.put``, where the record was claimed."""
        self._own.put(key, arrays, meta)

    def record(self, key: str) -> pathlib.Path:
        """As of ``Journal``, whoever wrote it."""
        return self._all[self._holder[key]].record(key)

    def beside(self, key: str) -> pathlib.Path:
        """As of ``Journal``, whoever wrote it."""
        return self._all[self._holder[key]].beside(key)

    def close(self) -> None:
        """As ``Journal.close``, of this process's."""
        self._own.close()
