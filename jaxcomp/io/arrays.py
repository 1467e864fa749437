"""The arrays of a checkpoint on disk: orbax PyTree checkpoints, written and read piece by piece.

Every array is one zarr array (version 2, zstd), as orbax writes a sharded ``jax.Array``: a file for
each shard, and a shard of more than ``_CHUNK_BYTES`` in several. The process that holds a shard
writes its files, so no array is gathered, on a device or on a host; a process that restores reads
the files which overlap what its devices need, whatever the mesh that wrote them.

Two things differ from orbax's own handler of jax.Array. Dtypes that zarr has not (int4, uint4, fp4)
are stored as the unsigned integers of their bytes. And it runs no collective on the devices, so
that a checkpoint can be written while they work. (orbax's default layout, OCDBT, would name its
files at random: no two saves would be equal.)
"""

import collections
import collections.abc
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from jaxcomp.errors import JaxcompError
from jaxcomp.io.later import Index, Later, Shares
from jaxcomp.io.safetensors import release
from jaxcomp.journal import write_atomically

_GROUP_BYTES = 32 * 10**6
_CHUNK_BYTES = 8 * 10**6
_IN_FLIGHT = 4  # Chunks that are encoded and written at the same time.
# Dtypes that zarr stores as they are; any other is stored as the unsigned integers of its bytes.
_STORED = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 "
    "complex128 bfloat16 float8_e4m3fn float8_e5m2".split()
)
_CODEC = {"id": "zstd", "level": 1}  # What orbax uses for zarr 2.


class CheckpointError(JaxcompError):
    """A checkpoint that cannot be written or read."""


@dataclasses.dataclass(frozen=True)
class Source:
    """An array to be written, and what of it this process holds.

    Attributes:
      shape: of the whole array.
      dtype: of the whole array.
      chunks: shape of the pieces that become files; divides the shape of a shard along the axes
        that are split over devices.
      pieces: (position in the array, contents) of what this process is to write.
      files: where there are no pieces because all its files are written, their paths and checksums
        by name.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]
    pieces: tuple[tuple[Index, Any], ...]
    files: collections.abc.Mapping[str, tuple[pathlib.Path, str]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def on_host(self) -> "Source":
        """The same contents where no later donation or assignment can change them.

        What is read-only already (memory-mapped results of a journal) is not copied.
        """
        return dataclasses.replace(self, pieces=tuple((i, _frozen(p)) for i, p in self.pieces))


def source(value: Any, shares: Shares | None = None) -> Source:
    """What this process is to write of an array.

    Args:
      value: array of NumPy or JAX, or a ``Later``. A JAX array that is spread over several devices
        is written shard by shard by the processes that hold the shards, of equal ones the first; a
        ``Later`` by all, each a part; any other by the first process.
      shares: the processes that write; None is all.

    Returns:
      The array as ``write`` takes it; nothing is copied yet.
    """
    shares = shares or Shares(jax.process_index(), jax.process_count())
    shape, dtype = tuple(value.shape), np.dtype(value.dtype)
    if isinstance(value, Later):
        chunks = chunks_of(shape, shape, dtype)
        pieces = () if value.files else value.pieces(chunks, shares)
        return Source(shape, dtype, chunks, pieces, value.files)
    whole = tuple(slice(0, n) for n in shape)
    if not isinstance(value, jax.Array) or len(value.sharding.device_set) == 1:
        # As every process has it: the same for one device and one process.
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            pieces: tuple = ()  # The one device is another process's.
        elif isinstance(value, jax.Array) or shares.rank == 0:
            pieces = ((whole, value),)
        else:
            pieces = ()
        return Source(shape, dtype, chunks_of(shape, shape, dtype), pieces)
    shard = tuple(value.sharding.shard_shape(shape))
    pieces = tuple(
        (bounded(s.index, shape), s.data) for s in value.addressable_shards if s.replica_id == 0
    )
    return Source(shape, dtype, chunks_of(shape, shard, dtype), pieces)


def bounded(index: Index, shape: tuple[int, ...]) -> Index:
    """A position in an array with its bounds as numbers."""
    return tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True))


def _frozen(piece: Any) -> np.ndarray:
    if isinstance(piece, np.ndarray) and not piece.flags.writeable:
        return piece
    return np.array(piece)


def chunks_of(shape: tuple[int, ...], shard: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """Shape of the files of an array: shards, cut along the first axes to ``_CHUNK_BYTES``.

    Along an axis that is split over devices only a divisor of the shard's size will do, so that no
    file belongs to two shards.
    """
    chunks = [max(1, n) for n in shard]
    for axis, size in enumerate(shard):
        excess = math.prod(chunks) * dtype.itemsize / _CHUNK_BYTES
        if excess <= 1:
            break
        wanted = min(size, math.ceil(excess))
        if size == shape[axis]:
            chunks[axis] = -(-size // wanted)
            continue
        for parts in range(wanted, min(size, 4 * wanted) + 1):
            if size % parts == 0:
                chunks[axis] = size // parts
                break
    return tuple(chunks)


def write(
    folder: pathlib.Path, sources: collections.abc.Mapping[str, Source], first: bool
) -> dict[str, dict[str, Any]]:
    """Writes what this process holds of some arrays.

    Memory: a few chunks beside the arrays themselves, and one shard copied from a device.

    Args:
      folder: where this process writes; is made.
      sources: the arrays by name, in the same order on all processes.
      first: whether this process writes orbax's own files too.

    Returns:
      By name: the group, the key in it, dtype, shape, and the checksums of the files that this
      process wrote.
    """
    entries: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Source]] = [{}]
    size = 0
    for index, (name, held) in enumerate(sources.items()):
        key = f"a{index:05d}"
        empty = held.nbytes == 0  # zarr stores none.
        entries[name] = {
            "shard": None if empty else f"{len(groups) - 1:05d}",
            "key": key,
            "dtype": held.dtype.name,
            "shape": list(held.shape),
        }
        if not empty:
            groups[-1][key] = held
            size += held.nbytes
        if size >= _GROUP_BYTES:
            groups.append({})
            size = 0
    folder.mkdir()
    for number, group in enumerate(groups):
        if group and first:
            _write_group(folder / f"{number:05d}", group)
        elif group:  # Only the first process writes orbax's own files beside the chunks.
            for key, held in group.items():
                if held.pieces:
                    write_chunks(folder / f"{number:05d}" / key, held)
    for name, entry in entries.items():
        if entry["shard"] is not None:
            place, known = folder / entry["shard"] / entry["key"], {}
            if first:
                for file, (path, known[file]) in sources[name].files.items():
                    link(path, place / file)
            entry["sha256"] = checksums(place, known)
    return entries


def _write_group(folder: pathlib.Path, arrays: dict[str, Source]) -> None:
    ocp, handler = _orbax()
    # This process waits for no other in orbax: what it writes is its own.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    registry = ocp.type_handlers.create_type_handler_registry((Source, handler()))
    with _quiet():
        pytrees = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False,
            use_zarr3=False,
            type_handler_registry=registry,
            multiprocessing_options=alone,
        )
        with ocp.Checkpointer(pytrees, multiprocessing_options=alone) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(arrays))
    # The only bytes that differ from one save to the next: times, and the name of the folder.
    file = folder / "_CHECKPOINT_METADATA"
    plain = json.loads(file.read_bytes())
    plain.update({key: 0 for key in plain if key.endswith("_nsecs")})
    write_atomically(file, json.dumps(plain).encode())
    (folder / "commit_success.txt").unlink(missing_ok=True)


@functools.cache
def _orbax() -> tuple[Any, Any]:
    # Imported here: orbax takes seconds to import, and most uses of jaxcomp do not need it.
    import orbax.checkpoint as ocp

    class Handler(ocp.type_handlers.NumpyHandler):
        """Writes ``Source``; orbax itself reads it back, as NumPy or onto any sharding."""

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> list:
            for value, info in zip(values, infos, strict=True):
                await info.await_path_creation()
                write_chunks(pathlib.Path(info.path), value)
            return []

    return ocp, Handler


def write_chunks(folder: pathlib.Path, held: Source) -> None:
    """Writes the pieces of an array, and what zarr says of it."""
    store = open_store(
        folder,
        create=True,
        open=True,
        dtype=_stored(held.dtype).name,
        shape=held.shape,
        metadata={"chunks": held.chunks, "compressor": _CODEC},
    )
    pending: collections.deque = collections.deque()
    read = []
    for index, piece in held.pieces:
        # A ``Later`` may be a stack that is not made: only the parts that are written are.
        array = piece.read() if isinstance(piece, Later) else np.asarray(piece)
        read.append(array)
        for part in parts(index, held.chunks):
            inside = tuple(
                slice(p.start - i.start, p.stop - i.start) for p, i in zip(part, index, strict=True)
            )
            pending.append(
                store[part].write(
                    _storable(np.asarray(array[inside])),
                    can_reference_source_data_indefinitely=True,
                )
            )
            if len(pending) >= _IN_FLIGHT:
                pending.popleft().result()
    for future in pending:
        future.result()
    for array in read:
        release(array)


def parts(index: Index, chunks: tuple[int, ...]) -> collections.abc.Iterator[Index]:
    """The parts of a position in an array that lie in one chunk each."""
    axes = []
    for bounds, size in zip(index, chunks, strict=True):
        first = bounds.start // size * size
        axes.append(
            [
                slice(max(at, bounds.start), min(at + size, bounds.stop))
                for at in range(first, bounds.stop, size)
            ]
        )
    return itertools.product(*axes)


def open_store(folder: pathlib.Path, **options: Any) -> Any:
    """Opens a zarr array with tensorstore, or makes it."""
    import tensorstore as ts

    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
        "store_data_equal_to_fill_value": True,  # A file that is missing is a fault.
    }
    if metadata := options.pop("metadata", None):
        spec["metadata"] = metadata
    return ts.open(spec, **options).result()


def checksums(
    folder: pathlib.Path, known: collections.abc.Mapping[str, str] | None = None
) -> dict[str, str]:
    """SHA-256 of each file of a folder, by name; empty without the folder.

    Args:
      folder: of an array.
      known: those of some of its files, which are not read.
    """
    files, known = sorted(folder.iterdir()) if folder.is_dir() else (), known or {}
    return {file.name: known.get(file.name) or sha256(file) for file in files}


def link(path: pathlib.Path, target: pathlib.Path) -> None:
    """Gives a file a second name; copies it where another disk or the file system forbids that."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def merge(entries: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> None:
    """Adds to what ``write`` returned to the first process the files of another."""
    for name, entry in other.items():
        for file, checksum in entry.get("sha256", {}).items():
            entries[name]["sha256"].setdefault(file, checksum)


def move(other: pathlib.Path, folder: pathlib.Path) -> None:
    """Moves the files of another process's arrays to those of the first, which has what both do."""
    for file in sorted(other.glob("*/*/*")):
        if not (target := folder / file.relative_to(other)).exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


def check_whole(
    entries: dict[str, dict[str, Any]], sources: collections.abc.Mapping[str, Source]
) -> None:
    """Raises a ``CheckpointError`` where no process has written some part of an array."""
    for name, entry in entries.items():
        if entry["shard"] is None:
            continue
        shape, chunks = entry["shape"], sources[name].chunks
        wanted = math.prod(-(-n // c) for n, c in zip(shape, chunks, strict=True))
        if (found := len(entry["sha256"]) - 1) != wanted:
            raise CheckpointError(
                f"array {name!r} {tuple(shape)}: {found} of its {wanted} files were written; every "
                "process that holds a part of it must call save."
            )
        entry["sha256"] = dict(sorted(entry["sha256"].items()))


def sha256(path: pathlib.Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stored(dtype: np.dtype) -> np.dtype:
    return dtype if dtype.name in _STORED else np.dtype(f"uint{8 * dtype.itemsize}")


def _storable(array: np.ndarray) -> np.ndarray:
    stored = _stored(array.dtype)
    return array if stored == array.dtype else np.asarray(array, order="C").view(stored)


@contextlib.contextmanager
def _quiet() -> collections.abc.Iterator[None]:
    """Keeps orbax from logging warnings about what is as intended here."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
