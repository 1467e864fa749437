"""Where ``jc.compress(.., save_to=..)`` writes."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

_UNFINISHED = ".unfinished"


@dataclasses.dataclass(frozen=True)
class Output:
    """Where ``jc.compress(.., save_to=..)`` writes, with what else the checkpoint is to hold.

    Attributes:
      path: the folder, as of ``jc.save``: missing or empty, or with ``overwrite`` an earlier
        checkpoint. It appears when all is done.
      files: further files to lay into it, by name: their bytes, or a path to copy.
      metadata: JSON-able, given back by ``jc.load``.
      overwrite: replace an earlier checkpoint.

    Example:
      >>> Output("compressed", metadata={"from": "llama"}).unfinished.name
      'compressed.unfinished'
    """

    path: str | os.PathLike
    files: Mapping[str, bytes | os.PathLike] | None = None
    metadata: Mapping[str, Any] | None = None
    overwrite: bool = False

    @property
    def unfinished(self) -> pathlib.Path:
        """The folder beside it that holds finished weights until all are."""
        return unfinished(self.path)


def unfinished(path: str | os.PathLike) -> pathlib.Path:
    """The folder of finished weights of a checkpoint that is not complete yet."""
    path = pathlib.Path(os.path.abspath(path))
    return path.with_name(path.name + _UNFINISHED)
