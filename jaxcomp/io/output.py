"""Where ``jc.compress(.., save_to=..)`` writes."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from jaxcomp.io.folder import METADATA

_UNFINISHED, _REPLACES = ".unfinished", "replaces"


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


def begin(output: Output, replaces: bool) -> None:
    """Removes what an earlier run left of its clean-up, and notes what only the start can tell.

    Args:
      output: where a run writes, whose folder ``unfinished`` is there.
      replaces: whether there is a checkpoint, which is to be replaced.
    """
    shutil.rmtree(_cleared(output.path), ignore_errors=True)
    if replaces:
        (output.unfinished / _REPLACES).touch()


def may_be_complete(output: Output) -> bool:
    """Whether what lies there may be a run that was killed after its checkpoint was published.

    It began without a checkpoint, and now there is one. Whether it is the same run, and had
    finished all weights, its journal tells.
    """
    if output.overwrite or not (pathlib.Path(output.path) / METADATA).is_file():
        return False
    return output.unfinished.is_dir() and not (output.unfinished / _REPLACES).exists()


def clear(path: str | os.PathLike) -> None:
    """Deletes the finished weights of a checkpoint that is complete: at once, for who looks."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(_cleared(path), ignore_errors=True)
        os.replace(unfinished(path), _cleared(path))
    shutil.rmtree(_cleared(path), ignore_errors=True)


def _cleared(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(os.path.abspath(path))
    return path.with_name(f".{path.name}.finished")


def unfinished(path: str | os.PathLike) -> pathlib.Path:
    """The folder of finished weights of a checkpoint that is not complete yet."""
    path = pathlib.Path(os.path.abspath(path))
    return path.with_name(path.name + _UNFINISHED)
