"""A folder of finished results: a long run that is killed goes on where it was.

Layout:

    manifest.json          what the records belong to: recipe, model, data, versions
    records/NAME.record    one result each, written to a temporary file, synced, then renamed
    lock                   held (flock) by the process that writes; freed by the kernel when it dies

A record is: 8 bytes magic, the SHA-256 of all that follows (32 bytes), the length of the header (8
bytes, little endian), the header (JSON: key, meta, and name, dtype, shape, offset of each array),
padding, and the arrays, each at a multiple of 64 bytes, so that they are memory-mapped back and not
copied. Equal contents give equal bytes.
"""

import collections.abc
import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import pathlib
import re
import shutil
import struct
import sys
import tempfile
from typing import Any, Self

import ml_dtypes
import numpy as np

from jaxcomp.errors import JaxcompError

try:
    import fcntl
    import resource
except ImportError:  # Windows: a journal works there, without the guard against two writers.
    fcntl = resource = None

FORMAT_VERSION = 1
_MAGIC = b"JCREC\x00\x00\x01"
_ALIGNMENT = 64
_PREFIX = struct.Struct("<8s32sQ")
_TEMPORARY = ".tmp"
# Bytes from which on an array is better in a file.
_LARGE = 2**20


class JournalError(JaxcompError):
    """A journal that belongs to another run, is damaged, or cannot be written."""


class Journal:
    """Finished results of one run, by key. ``open`` makes or continues one.

    Invariants: a record is either whole or absent, whenever the process dies; a second ``put``
    replaces it whole; all belong to the run that ``manifest`` describes.

    Attributes:
      path: the folder.
      manifest: what the records belong to.
    """

    def __init__(self, path: pathlib.Path, manifest: dict[str, Any], lock: Any) -> None:
        """Use ``Journal.open``."""
        self.path = path
        self.manifest = manifest
        self._records = path / "records"
        self._lock = lock

    @classmethod
    def open(
        cls, path: str | os.PathLike, manifest: collections.abc.Mapping[str, Any]
    ) -> "Journal":
        """Opens the journal of a run, or starts one.

        Args:
          path: folder of the journal; made if it is missing.
          manifest: what identifies the run, JSON-able: for instance fingerprints of recipe, model
            and data, and library versions. Compared key by key with that of the folder; keys that
            end in ``_text`` are for people and not compared.

        Returns:
          The journal, with the records of an earlier, interrupted run of the same manifest.

        Raises:
          JournalError: the folder belongs to another run (the message says what differs), holds
            something else, or is in use.
        """
        path = pathlib.Path(path)
        wanted = json.loads(json.dumps({"format_version": FORMAT_VERSION, **manifest}))
        if path.exists() and not path.is_dir():
            raise JournalError(f"journal {path}: is a file; name a new folder.")
        file = path / "manifest.json"
        foreign = path.is_dir() and not file.exists() and _foreign(path)
        if foreign:
            raise JournalError(
                f"journal {path}: is a folder that holds something else ({foreign}); name a new or "
                "empty folder."
            )
        with _disk_full(path, 0):
            (path / "records").mkdir(parents=True, exist_ok=True)
            lock = _acquire(path)
        try:
            if file.exists():
                _compare(path, _read_manifest(file), wanted)
            else:
                _write(file, [json.dumps(wanted, indent=2, sort_keys=True).encode()])
            for leftover in (path / "records").glob(f"*{_TEMPORARY}"):
                leftover.unlink()
        except BaseException:
            _release(lock)
            raise
        return cls(path, wanted, lock)

    def get(self, key: str, verify: bool = True) -> tuple[dict[str, np.ndarray], Any] | None:
        """Reads a record.

        Args:
          key: as given to ``put``.
          verify: compare with the checksum, for which all of it is read.

        Returns:
          The arrays (read-only, memory-mapped) and the meta data, or None if there is no such
          record.

        Raises:
          JournalError: the record is damaged.
        """
        file = self._file(key)
        return _read_record(file, key, verify) if file.exists() else None

    def has(self, key: str) -> bool:
        """Whether there is a record; nothing of it is read."""
        return self._file(key).exists()

    def claim(self, key: str, nbytes: int) -> bool:
        """Whether this process is to write a record: always, for it writes all of them."""
        return True

    def record(self, key: str) -> pathlib.Path:
        """The file of a record."""
        return self._file(key)

    def beside(self, key: str) -> pathlib.Path:
        """A folder for further files of a record, which its meta data may name."""
        return self.path / "arrays" / self._file(key).stem

    def put(
        self, key: str, arrays: collections.abc.Mapping[str, Any], meta: Any = None
    ) -> tuple[dict[str, np.ndarray], Any]:
        """Writes a record; on return it survives a crash of the machine.

        Args:
          key: name of the record, any text.
          arrays: named NumPy or JAX arrays of any dtype, or a ``Stacked`` of them, which is
            written part by part.
          meta: JSON-able.

        Returns:
          What ``get`` would return: the arrays memory-mapped, so that the caller can drop its own.

        Raises:
          JournalError: the disk is full. Finished records stay.
        """
        file = self._file(key)
        held = {name: [_contiguous(a) for a in _parts(value)] for name, value in arrays.items()}
        entries, offset = [], 0
        for name, parts in held.items():
            offset = _aligned(offset)
            entries.append(
                {
                    "name": name,
                    "dtype": parts[0].dtype.name,
                    "shape": list(np.shape(arrays[name])),
                    "offset": offset,
                }
            )
            offset += sum(part.nbytes for part in parts)
        header = {"arrays": entries, "key": key, "meta": meta}
        encoded = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
        start = _aligned(_PREFIX.size + len(encoded))
        pieces: list[Any] = [encoded, bytes(start - _PREFIX.size - len(encoded))]
        position = 0
        for parts in held.values():
            pieces += [bytes(_aligned(position) - position), *map(_raw, parts)]
            position = _aligned(position) + sum(part.nbytes for part in parts)
        digest = hashlib.sha256(len(encoded).to_bytes(8, "little"))
        for piece in pieces:
            digest.update(piece)
        prefix = _PREFIX.pack(_MAGIC, digest.digest(), len(encoded))
        with _disk_full(self.path, start + position):
            _write(file, [prefix, *pieces])
        return _read_record(file, key, verify=False)

    def room(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array that is filled bit by bit, in a file of the folder that goes with the array.

        Args:
          shape: its shape.
          dtype: its dtype.

        Returns:
          Zeros, memory-mapped, so that the system can take their memory back at any time; small
          ones are in memory.

        Raises:
          JournalError: the disk is full.
        """
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size < _LARGE:
            return np.zeros(shape, dtype)
        with _disk_full(self.path, size), tempfile.TemporaryFile(dir=self.path) as file:
            if hasattr(os, "posix_fallocate"):  # A full disk is an error now, not a signal then.
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return (
                np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8).view(dtype).reshape(shape)
            )

    def keys(self) -> list[str]:
        """Keys of the finished records, sorted."""
        return sorted(_header(file, _start(file))[0]["key"] for file in self._all())

    def verified(self) -> list[str]:
        """As ``keys``, after a look at all contents.

        Returns:
          Keys of the finished records, sorted.

        Raises:
          JournalError: a record is damaged.
        """
        found = self.keys()
        for key in found:
            self.get(key)
        return found

    def keep(self, keys: collections.abc.Container[str]) -> None:
        """Deletes the records of all other keys."""
        for key in self.keys():
            if key not in keys:
                self._file(key).unlink()
        sync(self._records)

    def __len__(self) -> int:
        """Number of finished records."""
        return len(self._all())

    def close(self) -> None:
        """Lets another process open the journal."""
        _release(self._lock)
        self._lock = None

    def remove(self) -> None:
        """Deletes the journal, once its results are stored elsewhere."""
        self.close()
        shutil.rmtree(self.path)

    def __enter__(self) -> Self:
        """The journal itself."""
        return self

    def __exit__(self, *exception: Any) -> None:
        """Closes it."""
        self.close()

    def _all(self) -> list[pathlib.Path]:
        return sorted(self._records.glob("*.record"))

    def _file(self, key: str) -> pathlib.Path:
        readable = re.sub(r"[^A-Za-z0-9._-]+", ".", key)[-100:].strip(".")
        return self._records / f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.record"


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Replaces a file so that a reader or a crash sees the old or the new one, never half of it."""
    _write(pathlib.Path(path), [data])


def sync(path: str | os.PathLike) -> None:
    """Makes a file's contents, or a folder's names, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def dtype_of(name: str) -> np.dtype:
    """The NumPy dtype called ``name``, those of ml_dtypes (bfloat16, int4, ..) included."""
    return np.dtype(getattr(ml_dtypes, name, name))


def _write(file: pathlib.Path, pieces: list[Any]) -> None:
    temporary = file.with_name(file.name + _TEMPORARY)
    try:
        with open(temporary, "wb") as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(file.parent)


def _read_record(
    file: pathlib.Path, key: str, verify: bool = True
) -> tuple[dict[str, np.ndarray], Any]:
    data = _mapped(file)
    header, start = _header(file, data)
    if verify and hashlib.sha256(memoryview(data)[40:]).digest() != data[8:40]:
        raise _damaged(file, "its checksum does not match its contents")
    if header["key"] != key:
        raise _damaged(file, f"it holds {header['key']!r}, not {key!r}")
    arrays, whole = {}, np.frombuffer(data, np.uint8)
    for entry in header["arrays"]:
        dtype = dtype_of(entry["dtype"])
        count = int(np.prod(entry["shape"], dtype=np.int64))
        if count == 0:
            arrays[entry["name"]] = np.zeros(entry["shape"], dtype)
            continue
        first = start + entry["offset"]
        array = whole[first : first + count * dtype.itemsize]
        arrays[entry["name"]] = array.view(dtype).reshape(entry["shape"])
    return arrays, header["meta"]


def _mapped(file: pathlib.Path) -> mmap.mmap:
    """A file's contents. A map keeps a descriptor open, and there is one for each weight."""
    try:
        return _map(file)
    except OSError as error:
        if error.errno != errno.EMFILE or resource is None:
            raise
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        raise JournalError(
            f"journal record {file}: {soft} files are open, which is the limit, and each finished "
            "weight keeps one open; raise it (ulimit -n) and run again, finished records are kept."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return _map(file)


def _map(file: pathlib.Path) -> mmap.mmap:
    options: dict[str, Any] = {"access": mmap.ACCESS_READ}
    if sys.version_info >= (3, 13):
        options["trackfd"] = False
    with open(file, "rb") as stream:
        if os.fstat(stream.fileno()).st_size < _PREFIX.size:
            raise _damaged(file, "it is cut short")
        return mmap.mmap(stream.fileno(), 0, **options)


def _start(file: pathlib.Path) -> bytes:
    """A record's bytes up to its arrays; fewer where it is cut short."""
    with open(file, "rb") as stream:
        prefix = stream.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size:
            return prefix
        return prefix + stream.read(
            min(_PREFIX.unpack(prefix)[2], os.fstat(stream.fileno()).st_size)
        )


def _header(file: pathlib.Path, data: Any) -> tuple[dict[str, Any], int]:
    try:
        magic, _, length = _PREFIX.unpack_from(data)
        if magic != _MAGIC:
            raise _damaged(file, "it is no record of this version")
        return json.loads(data[_PREFIX.size : _PREFIX.size + length]), _aligned(
            _PREFIX.size + length
        )
    except (struct.error, ValueError, OverflowError) as error:
        if isinstance(error, JournalError):
            raise
        raise _damaged(file, "its header cannot be read") from error


def _damaged(file: pathlib.Path, what: str) -> JournalError:
    return JournalError(
        f"journal record {file}: is damaged: {what}; delete this file and run again, the other "
        "records are kept and only this weight is computed anew."
    )


def _read_manifest(file: pathlib.Path) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_bytes())
        if not isinstance(manifest, dict):
            raise ValueError("not an object")
        return manifest
    except ValueError as error:
        raise JournalError(
            f"journal {file}: cannot be read ({error}); delete the folder {file.parent} to start "
            "over."
        ) from error


def _compare(path: pathlib.Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    keys = [k for k in dict.fromkeys((*wanted, *found)) if not k.endswith("_text")]
    differs = [k for k in keys if found.get(k) != wanted.get(k)]
    if differs:
        details = "; ".join(
            f"{k.replace('_', ' ')}: journal {_short(found.get(k))}, this run "
            f"{_short(wanted.get(k))}"
            for k in differs
        )
        names = ", ".join(k.replace("_", " ") for k in differs)
        raise JournalError(
            f"journal {path}: belongs to a run with another {names} ({details}); run with the "
            "same ones to resume, or name another journal folder, or delete this one to start over."
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + ".."


def _foreign(path: pathlib.Path) -> str | None:
    """Name of something in a folder without manifest that a journal being born does not hold."""
    for entry in sorted(path.iterdir()):
        own = entry.name in ("lock", "manifest.json" + _TEMPORARY)
        if not own and not (
            entry.name == "records" and entry.is_dir() and not any(entry.iterdir())
        ):
            return entry.name
    return None


def _acquire(path: pathlib.Path) -> Any:
    if fcntl is None:
        return None
    stream = open(path / "lock", "wb")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise JournalError(
            f"journal {path}: another process is using it; wait for that run to end, or name "
            "another folder."
        ) from None
    except OSError:  # A file system without locks: go on without the guard.
        pass
    return stream


def _release(lock: Any) -> None:
    if lock is not None:
        lock.close()


@contextlib.contextmanager
def _disk_full(path: pathlib.Path, needed: int) -> collections.abc.Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise JournalError(
            f"journal {path}: no space left on the disk: a record of {needed:,} bytes was to be "
            f"written, {_free(path):,} bytes are free; free some space and run the same command "
            "again, the finished records are kept."
        ) from error


def _free(path: pathlib.Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _contiguous(value: Any) -> np.ndarray:
    array = np.asarray(value)
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def _parts(value: Any) -> list[Any]:
    """The arrays that follow one another in a stack, however deep; an array is one by itself."""
    parts = getattr(value, "parts", None)
    return [value] if parts is None else [a for part in parts for a in _parts(part)]


def _raw(array: np.ndarray) -> memoryview | bytes:
    return memoryview(array.reshape(-1).view(np.uint8)) if array.size else b""


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
