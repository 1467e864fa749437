"""A checkpoint's folder: whole or absent, written by one save at a time and by all processes."""

import collections.abc
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

from jaxcomp.io import arrays as storage
from jaxcomp.io.arrays import CheckpointError, Source
from jaxcomp.journal import sync, write_atomically
from jaxcomp.processes import Together

try:
    import fcntl
except ImportError:  # Windows: works there, without the guard against two saves at a time.
    fcntl = None

METADATA = "jaxcomp.json"


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a folder is to hold.

    Attributes:
      sources: arrays by name; in the same order on all processes.
      files: further files: their bytes, or a path to copy.
      plain: the metadata, but for the arrays.
    """

    sources: dict[str, Source]
    files: dict[str, bytes | os.PathLike]
    plain: dict[str, Any]

    def on_host(self) -> "Contents":
        """The same where no later donation, assignment or change of a dict reaches it."""
        return Contents(
            {name: source.on_host() for name, source in self.sources.items()},
            dict(self.files),
            json.loads(json.dumps(self.plain)),
        )

    def layout(self) -> str:
        """Equal where arrays of the same names, shapes, dtypes and chunks are to be written."""
        lines = [f"{k} {s.shape} {s.dtype} {s.chunks}" for k, s in self.sources.items()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextlib.contextmanager
def locked(path: pathlib.Path) -> collections.abc.Iterator[None]:
    """Holds the lock of a folder (flock on a file beside it); the kernel frees it at death."""
    if fcntl is None:
        yield
        return
    file = path.with_name(f".{path.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        stream = open(file, "wb")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise CheckpointError(
                f"output {path}: another save writes to it; wait for that one to end (.wait() of "
                "what save returned), or name another folder."
            ) from None
        except OSError:  # A file system without locks: go on without the guard.
            break
        # Who held the lock before deleted the file: a lock on a deleted file guards nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(stream.fileno()).st_ino == file.stat().st_ino:
                break
        stream.close()
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        stream.close()


def publish(path: pathlib.Path, contents: Contents, together: Together) -> None:
    """Writes a folder under a temporary name and renames it, each process its own arrays.

    Args:
      path: absolute; missing, empty or to be replaced.
      contents: what it is to hold.
      together: this save, of all processes.

    Raises:
      CheckpointError: nothing could be written, here or by another process; nothing is left.
    """
    temporary = path.with_name(f".{path.name}.saving")
    own = temporary if together.first else path.with_name(f".{path.name}.saving.{together.index}")
    try:
        together.step("write", lambda: _write(own, contents, together.first))
        together.step("publish", lambda: together.first and _publish(path, contents, together))
    except OSError as error:
        raise _unwritable(path, error, contents) from error
    except CheckpointError:
        raise  # Another process's, or one that already says what is wrong.
    except BaseException as error:
        if "No space left on device" in str(error) or "ENOSPC" in str(error):  # From tensorstore.
            raise _unwritable(path, OSError(errno.ENOSPC, ""), contents) from error
        raise
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _write(own: pathlib.Path, contents: Contents, first: bool) -> None:
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    entries = storage.write(own / "arrays", contents.sources, first)
    write_atomically(own / METADATA, json.dumps(entries).encode())


def _publish(path: pathlib.Path, contents: Contents, together: Together) -> None:
    temporary = path.with_name(f".{path.name}.saving")
    entries = json.loads((temporary / METADATA).read_bytes())
    for index in together.processes[1:]:
        other = path.with_name(f".{path.name}.saving.{index}")
        storage.merge(entries, json.loads((other / METADATA).read_bytes()))
        storage.move(other / "arrays", temporary / "arrays")
    storage.check_whole(entries, contents.sources)
    for name, content in contents.files.items():
        if isinstance(content, bytes):
            write_atomically(temporary / name, content)
        else:
            shutil.copyfile(content, temporary / name)
    plain = {**contents.plain, "arrays": entries}
    write_atomically(temporary / METADATA, json.dumps(plain, indent=1, sort_keys=True).encode())
    for folder, _, names in os.walk(temporary):
        for name in names:  # Whoever deletes a journal now relies on these files.
            sync(os.path.join(folder, name))
    if path.exists():  # Checked before: empty, or a checkpoint that may be replaced.
        shutil.rmtree(path)
    os.replace(temporary, path)
    sync(path.parent)


def _unwritable(path: pathlib.Path, error: OSError, contents: Contents) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed = sum(source.nbytes for source in contents.sources.values())
        parent = path.parent
        while not parent.exists():
            parent = parent.parent
        return CheckpointError(
            f"output {path}: no space left on the disk: the arrays take {needed:,} bytes, "
            f"{shutil.disk_usage(parent).free:,} bytes are free; free some space and run again "
            "(with the same journal nothing is computed twice)."
        )
    return CheckpointError(f"output {path}: cannot be written: {error}.")
