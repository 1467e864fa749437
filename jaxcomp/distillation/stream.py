"""A teacher's top-k distributions on disk: written once, read by many runs.

Layout of a folder:

    header.json          what it holds; ``count`` is null until the writer has finished
    shard-00000.bin      records one after the other, ``records_per_shard`` in all but the last
    shard-00001.bin      ..
    lock                 held (flock) by the process that writes

A record is one batch, of a fixed shape and size: log_probs, indices, log_tail, little endian, each
at a multiple of 8 bytes, and the CRC-32 of what precedes. Record i lies in shard
i // records_per_shard at a known place, so any batch is read in any order from a memory map. A
writer that was killed leaves at most one partial record, which the next one discards; then it goes
on, and the files in the end are those of a run that was never killed, byte for byte.
"""

import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, Self

import jax
import numpy as np

from jaxcomp.distillation.topk import TopK
from jaxcomp.errors import DataError
from jaxcomp.journal import sync, write_atomically

try:
    import fcntl
except ImportError:  # Windows: no guard against two writers.
    fcntl = None

_FORMAT = {"format": "jaxcomp top-k", "version": 1}
_DTYPES = ("float16", "float32", "float64")
_HEADER = "header.json"


def fingerprint(tree: Any) -> str:
    """Hash of the paths, shapes, dtypes and bytes of all leaves of a tree.

    Args:
      tree: parameters of a teacher, or a batch or list of batches of data.

    Returns:
      64 hexadecimal digits.

    Example:
      >>> fingerprint({"w": np.zeros(2)}) == fingerprint({"w": np.zeros(2)})
      True
      >>> fingerprint({"w": np.zeros(2)}) == fingerprint({"v": np.zeros(2)})
      False
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype} ".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _record_dtype(header: dict[str, Any]) -> np.dtype:
    shape, k = tuple(header["record_shape"]), header["k"]
    index = "<u2" if header["vocab_size"] <= 2**16 else "<i4"
    value = np.dtype(header["dtype"]).newbyteorder("<")
    fields = (
        ("log_probs", value, (*shape, k)),
        ("indices", index, (*shape, k)),
        ("log_tail", value, shape),
        ("crc", "<u4", ()),
    )
    offsets, end = [], 0
    for _, dtype, dims in fields:
        offsets.append(end)
        size = np.dtype(dtype).itemsize * int(np.prod(dims, dtype=np.int64))
        end = -(-(end + size) // 8) * 8
    return np.dtype(
        {
            "names": [name for name, _, _ in fields],
            "formats": [(dtype, dims) if dims else dtype for _, dtype, dims in fields],
            "offsets": offsets,
            "itemsize": end,
        }
    )


def _crc(record: np.ndarray) -> int:
    return zlib.crc32(record.view(np.uint8)[: record.dtype.fields["crc"][1]])


def _shard(path: pathlib.Path, index: int) -> pathlib.Path:
    return path / f"shard-{index:05d}.bin"


def _dump(path: pathlib.Path, header: dict[str, Any]) -> None:
    text = json.dumps(header, indent=2, sort_keys=True) + "\n"
    write_atomically(path / _HEADER, text.encode())


def _load(path: pathlib.Path) -> dict[str, Any]:
    file = path / _HEADER
    if not file.exists():
        raise DataError(f"{path}: holds no top-k logits (no {_HEADER}); write them with TopKWriter")
    try:
        header = json.loads(file.read_bytes())
        if {key: header[key] for key in _FORMAT} != _FORMAT:
            raise DataError(
                f"{file}: is not {_FORMAT['format']!r} of version {_FORMAT['version']}; write the "
                "logits again with this version"
            )
        _record_dtype(header)
        if not header["records_per_shard"] >= 1:
            raise ValueError("records_per_shard")
        if not (header["count"] is None or header["count"] >= 0):
            raise ValueError("count")
        header["teacher"], header["data"], header["temperature"]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{file}: cannot be read ({error!r}); restore it from a copy, or delete the folder and "
            "write the logits again"
        ) from error
    return header


class TopKWriter:
    """Writes batches of compressed logits to a folder, or goes on where a killed run stopped.

    ``len(writer)`` batches are there already: skip as many. Used as a context manager it finishes
    the folder, unless an exception ends the block: then what is written stays, and can be resumed.

    Attributes:
      path: the folder.
      header: what it holds.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from jaxcomp.distillation import compress_logits
      >>> batches = [jnp.ones((2, 5)), jnp.arange(10.0).reshape(2, 5)]  # of the teacher's inputs
      >>> teacher = lambda x: 2 * x
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with TopKWriter(folder, record_shape=(2,), vocab_size=5, k=3, teacher="t",
      ...                     data=fingerprint(batches)) as writer:
      ...         for batch in batches[len(writer):]:
      ...             writer.append(compress_logits(teacher(batch), k=3))
      ...     reader = TopKReader(folder, teacher="t", data=fingerprint(batches))
      ...     len(reader), reader[1].indices.tolist()
      (2, [[4, 3, 2], [4, 3, 2]])
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        record_shape: tuple[int, ...],
        vocab_size: int,
        k: int,
        teacher: str,
        data: str,
        temperature: float = 1.0,
        dtype: str = "float32",
        records_per_shard: int = 256,
    ) -> None:
        """Opens a folder for writing.

        Args:
          path: the folder; made if it is missing.
          record_shape: positions of one batch, for instance ``(batch, sequence)``.
          vocab_size: number of entries of the vocabulary.
          k: entries kept of each position.
          teacher: what identifies the teacher, for instance ``fingerprint(params)``.
          data: what identifies the batches and their order.
          temperature: of the compressed distributions.
          dtype: of the logarithms on disk, "float16", "float32" or "float64".
          records_per_shard: batches in one file.

        Raises:
          DataError: the folder holds something else (the message says what differs), another
            process writes it, a file is damaged, or an option is out of its range.
        """
        self.path = pathlib.Path(path)
        self.header = {
            **_FORMAT,
            "record_shape": [int(n) for n in record_shape],
            "vocab_size": int(vocab_size),
            "k": int(k),
            "teacher": str(teacher),
            "data": str(data),
            "temperature": float(temperature),
            "dtype": str(dtype),
            "records_per_shard": int(records_per_shard),
            "count": None,
        }
        if dtype not in _DTYPES:
            raise DataError(f"dtype {dtype!r} is none of {', '.join(_DTYPES)}")
        if not 1 <= k <= vocab_size:
            raise DataError(f"k {k} must lie between 1 and vocab_size {vocab_size}")
        if records_per_shard < 1 or min(record_shape, default=1) < 1:
            raise DataError(
                f"records_per_shard {records_per_shard} and record_shape {tuple(record_shape)} "
                "must be at least 1"
            )
        self._record = _record_dtype(self.header)
        self._file = self._lock = None
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"{self.path}: is a file; name a new folder")
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / _HEADER).exists():
            other = [
                p.name for p in self.path.iterdir() if not p.name.startswith((_HEADER, "lock"))
            ]
            if other:
                raise DataError(
                    f"{self.path}: holds something else ({min(other)}); name a new or empty folder"
                )
        self._lock = _acquire(self.path)
        try:
            self._open()
        except BaseException:
            self._release()
            raise

    def _open(self) -> None:
        if (self.path / _HEADER).exists():
            found = _load(self.path)
            differs = [
                f"{key} is {found.get(key)!r}, this run's {value!r}"
                for key, value in self.header.items()
                if key != "count" and found.get(key) != value
            ]
            if differs:
                raise DataError(
                    f"{self.path}: holds other top-k logits ({'; '.join(differs)}); name another "
                    "folder, or delete this one to write it anew"
                )
            self.header["count"] = found["count"]
        else:
            _dump(self.path, self.header)
        if self.header["count"] is None:
            self._count = self._whole_records()
        else:
            _check_sizes(self.path, self.header, self._record.itemsize)
            self._count = self.header["count"]

    def _whole_records(self) -> int:
        """Counts the records and cuts off what a killed writer left of the next one."""
        size, per_shard = self._record.itemsize, self.header["records_per_shard"]
        shards = sorted(self.path.glob("shard-*.bin"))
        for i, file in enumerate(shards):
            if file != _shard(self.path, i):
                raise DataError(
                    f"{_shard(self.path, i)}: is missing, but {file.name} is there; restore it "
                    "from a copy, or delete the folder and write it again"
                )
            if i < len(shards) - 1 and file.stat().st_size != per_shard * size:
                raise _truncated(file, per_shard * size)
        if not shards:
            return 0
        last = shards[-1]
        whole = min(last.stat().st_size // size, per_shard)
        if whole:
            # After a crash of the machine the last pages may be there without their data.
            records = np.memmap(last, self._record, "r", shape=(whole,))
            while whole and _crc(records[whole - 1 : whole]) != records["crc"][whole - 1]:
                whole -= 1
            del records
        os.truncate(last, whole * size)
        if not whole:
            last.unlink()
        return (len(shards) - 1) * per_shard + whole

    def append(self, batch: TopK) -> None:
        """Writes one batch.

        Args:
          batch: compressed logits of the folder's shape, k, vocabulary and temperature.

        Raises:
          DataError: the batch does not fit, holds NaN, or the writer is closed.
        """
        if self._lock is None:
            raise DataError(f"{self.path}: the writer is closed; open a new one to go on")
        shape = tuple(self.header["record_shape"])
        found = {
            "record_shape": tuple(np.shape(batch.log_tail)),
            "k": batch.k,
            "vocab_size": batch.vocab_size,
            "temperature": float(batch.temperature),
        }
        wanted = {**{key: self.header[key] for key in found}, "record_shape": shape}
        if found != wanted:
            differs = [key for key in found if found[key] != wanted[key]]
            raise DataError(
                f"{self.path}, batch {self._count}: "
                + "; ".join(f"{key} {found[key]} is not {wanted[key]}" for key in differs)
                + ("; pad the last batch, all have one shape" if "record_shape" in differs else "")
            )
        record = np.zeros(1, self._record)
        with np.errstate(over="ignore"):  # a logarithm below float16's range: no probability
            for name in ("log_probs", "indices", "log_tail"):
                record[name][0] = np.asarray(getattr(batch, name))
        if np.isnan(record["log_probs"]).any() or np.isnan(record["log_tail"]).any():
            raise DataError(
                f"{self.path}, batch {self._count}: the teacher's log probabilities hold NaN; "
                "check its logits on this batch"
            )
        record["crc"] = _crc(record)
        if self.header["count"] is not None:  # finished before: now it is not
            self.header["count"] = None
            _dump(self.path, self.header)
        shard, place = divmod(self._count, self.header["records_per_shard"])
        if self._file is None or place == 0:
            self._close_file()
            self._file = open(_shard(self.path, shard), "ab", buffering=0)
        data = memoryview(record.view(np.uint8))
        try:
            while data:
                data = data[self._file.write(data) :]
        except BaseException:  # a full disk, an interrupt: no half of a record stays
            os.truncate(self._file.name, place * self._record.itemsize)
            raise
        self._count += 1

    def _close_file(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def close(self, finished: bool = True) -> None:
        """Stops writing.

        Args:
          finished: whether all batches are there, so that the folder may be read.
        """
        if self._lock is None:
            return
        self._close_file()
        if finished and self.header["count"] is None:
            self.header["count"] = self._count
            sync(self.path)
            _dump(self.path, self.header)
        self._release()

    def __len__(self) -> int:
        """Number of batches written, by earlier runs too."""
        return self._count

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        """Closes it, as finished unless an exception was raised."""
        self.close(finished=kind is None)


class TopKReader:
    """Reads batches of compressed logits in any order, memory-mapped.

    ``reader[i]`` is the batch that was appended as number i, as NumPy arrays (a pytree that goes
    into a jitted step); negative indices count from the end. Half-precision logarithms come back
    normalised in float32.

    Attributes:
      path: the folder.
      header: what it holds.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        teacher: str | None = None,
        data: str | None = None,
        k: int | None = None,
        unfinished: bool = False,
    ) -> None:
        """Opens a folder.

        Args:
          path: the folder.
          teacher: what the teacher's fingerprint must be; None takes any.
          data: what the data's fingerprint must be; None takes any.
          k: what k must be; None takes any.
          unfinished: whether to read the whole records of a folder that is still being written.

        Raises:
          DataError: there are no such logits, they are another teacher's or of other data, they are
            unfinished, or files are missing or truncated.
        """
        self.path = pathlib.Path(path)
        self.header = _load(self.path)
        for name, value in (("teacher", teacher), ("data", data), ("k", k)):
            if value is not None and self.header[name] != value:
                raise DataError(
                    f"{self.path}: its {name} is {self.header[name]!r}, not {value!r}; name the "
                    "folder that was written for it, or write one"
                )
        self._record = _record_dtype(self.header)
        self._maps: dict[int, np.ndarray] = {}
        size, per_shard = self._record.itemsize, self.header["records_per_shard"]
        count = self.header["count"]
        if count is None:
            shards = sorted(self.path.glob("shard-*.bin"))
            whole = sum(min(file.stat().st_size // size, per_shard) for file in shards)
            if not unfinished:
                raise DataError(
                    f"{self.path}: is unfinished ({whole} batches); resume its writer, or pass "
                    "unfinished=True to read what is there"
                )
            self._count = whole
            return
        _check_sizes(self.path, self.header, size)
        self._count = count

    def __len__(self) -> int:
        """Number of batches."""
        return self._count

    def __getitem__(self, index: int) -> TopK:
        """Reads one batch.

        Args:
          index: number of the batch.

        Returns:
          The compressed logits.

        Raises:
          DataError: there is no such batch, or it is damaged.
        """
        if not -self._count <= index < self._count:
            raise DataError(f"{self.path}: has no batch {index}, it holds {self._count}")
        index = int(index) % self._count
        shard, place = divmod(index, self.header["records_per_shard"])
        if shard not in self._maps:
            size = _shard(self.path, shard).stat().st_size // self._record.itemsize
            self._maps[shard] = np.memmap(
                _shard(self.path, shard), self._record, "r", shape=(size,)
            )
        record = self._maps[shard][place : place + 1]
        if _crc(record) != record["crc"][0]:
            raise DataError(
                f"{_shard(self.path, shard)}: batch {index} is damaged: its checksum does not "
                "match; restore the file from a copy, or delete the folder and write it again"
            )
        log_probs, log_tail = record["log_probs"][0], record["log_tail"][0]
        if self.header["dtype"] == "float16":
            log_probs, log_tail = _normalised(log_probs, log_tail)
        return TopK(
            log_probs=log_probs,
            indices=record["indices"][0].astype(np.int32),
            log_tail=log_tail,
            vocab_size=self.header["vocab_size"],
            temperature=self.header["temperature"],
        )

    def __iter__(self) -> Iterator[TopK]:
        """The batches in order."""
        for i in range(self._count):
            yield self[i]


def _normalised(log_probs, log_tail):
    log_probs, log_tail = log_probs.astype(np.float32), log_tail.astype(np.float32)
    total = np.exp(log_probs).sum(-1) + np.exp(log_tail)
    log_total = np.log(np.where(total > 0, total, 1))
    return log_probs - log_total[..., None], log_tail - log_total


def _check_sizes(path: pathlib.Path, header: dict[str, Any], size: int) -> None:
    """Checks the files of a finished folder against its count."""
    count, per_shard = header["count"], header["records_per_shard"]
    for i in range(-(-count // per_shard)):
        file, wanted = _shard(path, i), min(per_shard, count - i * per_shard) * size
        if not file.exists():
            raise DataError(
                f"{file}: is missing; restore it from a copy, or delete the folder and write it "
                "again"
            )
        if file.stat().st_size != wanted:
            raise _truncated(file, wanted)


def _truncated(file: pathlib.Path, wanted: int) -> DataError:
    return DataError(
        f"{file}: has {file.stat().st_size:,} bytes instead of {wanted:,}: it was truncated or "
        "something was added; restore it from a copy, or delete the folder and write it again"
    )


def _acquire(path: pathlib.Path) -> Any:
    stream = open(path / "lock", "wb")
    if fcntl is not None:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise DataError(
                f"{path}: another process is writing it; wait for that run to end, or name another "
                "folder"
            ) from None
        except OSError:  # A file system without locks: go on without the guard.
            pass
    return stream
