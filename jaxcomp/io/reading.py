"""Reading the arrays of a checkpoint: whole, or only the parts that the devices of a mesh hold."""

import collections.abc
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.io.arrays import CheckpointError, Index, bounded, open_store, parts, sha256
from jaxcomp.journal import dtype_of


class Reader:
    """Reads the arrays of a checkpoint, whole or in part, and checks every file that it reads.

    Attributes:
      entries: by name what ``write`` returned, the files of all processes in it.
    """

    def __init__(self, folder: pathlib.Path, entries: dict[str, Any]) -> None:
        self._folder = folder
        self.entries = entries

    def struct(self, name: str) -> jax.ShapeDtypeStruct:
        """Shape and dtype of an array; nothing is read."""
        entry = self.entries[name]
        return jax.ShapeDtypeStruct(tuple(entry["shape"]), dtype_of(entry["dtype"]))

    def array(self, name: str, sharding: jax.sharding.Sharding | None = None) -> Any:
        """An array on the default device, or spread as told; NumPy where JAX has not the dtype."""
        dtype = dtype_of(self.entries[name]["dtype"])
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:  # 64 bits without x64.
            return self.whole(name)
        return jnp.asarray(self.whole(name)) if sharding is None else self.spread(name, sharding)

    def whole(self, name: str) -> np.ndarray:
        """A whole array as NumPy."""
        return self._read(name)(tuple(slice(0, n) for n in self.entries[name]["shape"]))

    def spread(self, name: str, sharding: jax.sharding.Sharding) -> jax.Array:
        """An array spread over devices; only what those of this process hold is read."""
        shape = tuple(self.entries[name]["shape"])
        read = self._read(name)
        found: dict[Any, np.ndarray] = {}

        def piece(index: Index | None) -> np.ndarray:
            bounds = bounded(index or (), shape)
            key = tuple((b.start, b.stop) for b in bounds)
            if key not in found:  # Replicas ask for the same.
                found[key] = read(bounds)
            return found[key]

        return jax.make_array_from_callback(shape, sharding, piece)

    def verify(self, name: str) -> int:
        """Compares all files of an array with their checksums; returns their bytes."""
        entry = self.entries[name]
        if entry["shard"] is None:
            return 0
        for file in entry["sha256"]:
            self._check(name, file)
        folder = self._path(name)
        return sum((folder / file).stat().st_size for file in entry["sha256"])

    def _path(self, name: str) -> pathlib.Path:
        entry = self.entries[name]
        return self._folder / entry["shard"] / entry["key"]

    def _check(self, name: str, file: str) -> None:
        expected = self.entries[name]["sha256"].get(file)
        path = self._path(name) / file
        if expected is None:
            what = f"its shard {file} was never written"
        elif not path.is_file():
            what = f"its file {path} is missing"
        elif sha256(path) != expected:
            what = f"its file {path} does not match its checksum"
        else:
            return
        raise CheckpointError(
            f"checkpoint {self._folder.parent}: array {name!r} is damaged: {what}; make the "
            "checkpoint again, or restore it from a copy."
        )

    def _read(self, name: str) -> collections.abc.Callable[[Index], np.ndarray]:
        """A function that reads a part of an array."""
        entry = self.entries[name]
        dtype = dtype_of(entry["dtype"])
        if entry["shard"] is None:
            return lambda index: np.zeros([i.stop - i.start for i in index], dtype)
        # Files are compared with their checksums before tensorstore sees them.
        self._check(name, ".zarray")
        checked: set[str] = set()
        folder = self._path(name)
        chunks = json.loads((folder / ".zarray").read_bytes())["chunks"]
        try:
            store = open_store(folder.absolute(), open=True)
        except ValueError as error:
            raise self._unreadable(name, error) from error

        one_file = all(c >= n for c, n in zip(chunks, entry["shape"], strict=True))
        whole = functools.cache(lambda: store.read().result())

        def read(index: Index) -> np.ndarray:
            for part in parts(index, chunks):
                file = ".".join(str(p.start // c) for p, c in zip(part, chunks, strict=True)) or "0"
                if file not in checked:
                    self._check(name, file)
                    checked.add(file)
            try:
                # A file is decoded once, however many devices hold a part of it.
                stored = whole()[index] if one_file else store[index].read().result()
            except ValueError as error:
                raise self._unreadable(name, error) from error
            return stored if stored.dtype == dtype else stored.view(dtype)

        return read

    def _unreadable(self, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self._folder.parent}: array {name!r} cannot be read by tensorstore "
            f"({type(error).__name__}: {error}); make the checkpoint again, or restore it from a "
            "copy."
        )
