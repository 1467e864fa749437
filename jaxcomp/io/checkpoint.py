"""Checkpoints of compressed models, on orbax.

Layout of a folder that ``save`` writes:

    jaxcomp.json       format version, structure of the tree, recipe, report, checksums of all files
    arrays/00000/..    orbax PyTree checkpoints (zarr) of about 32 MB, so that saving memory-mapped
                       results takes little memory
    ...                further files given to ``save``: a model's configuration, its tokenizer

Equal results give equal bytes: no times are stored. The folder appears whole, under a temporary
name first, or not at all.
"""

import collections.abc
import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from jaxcomp.errors import JaxcompError
from jaxcomp.formats import is_compressed, serialize
from jaxcomp.journal import dtype_of, sync, write_atomically
from jaxcomp.recipe import Recipe
from jaxcomp.report import Report

FORMAT_VERSION = 1
METADATA = "jaxcomp.json"
_SHARD_BYTES = 32 * 10**6
# Dtypes that orbax stores as they are; any other is stored as the unsigned integers of its bytes.
_STORED = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 "
    "complex128 bfloat16 float8_e4m3fn float8_e5m2".split()
)


class CheckpointError(JaxcompError):
    """A checkpoint that cannot be written or read."""


class Saved(NamedTuple):
    """What ``load`` returns.

    Attributes:
      params: the tree, compressed leaves as compressed arrays.
      report: the report, without times.
      recipe: the recipe, or None where none was saved.
      metadata: what was given to ``save``.
    """

    params: Any
    report: Report | None
    recipe: Recipe | None
    metadata: dict[str, Any]


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether a folder was written by ``save``."""
    return (pathlib.Path(path) / METADATA).is_file()


def save(
    path: str | os.PathLike,
    result: Any,
    *,
    files: collections.abc.Mapping[str, bytes | os.PathLike] | None = None,
    metadata: collections.abc.Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a compressed model to a folder.

    Args:
      path: the folder; missing or empty, or with ``overwrite`` an earlier checkpoint.
      result: has ``params`` (a tree of dicts, lists and tuples of arrays and compressed arrays),
        and may have ``report`` and ``recipe``; what ``jc.compress`` or ``load`` returned.
      files: further files to lay into the folder, by name: their bytes, or a path to copy.
      metadata: JSON-able, given back by ``load``.
      overwrite: replace an earlier checkpoint. A folder that holds anything else is never touched.

    Raises:
      CheckpointError: the folder holds something, the disk is full, or the tree has nodes or leaves
        that cannot be stored.
    """
    path = pathlib.Path(os.path.abspath(path))
    check_output(path, overwrite)
    shards = _Shards()
    tree = _describe(result.params, "", shards)
    report, recipe = getattr(result, "report", None), getattr(result, "recipe", None)
    temporary = path.with_name(f".{path.name}.saving")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        arrays = shards.write(temporary / "arrays")
        for name, content in (files or {}).items():
            if isinstance(content, bytes):
                write_atomically(temporary / name, content)
            else:
                shutil.copyfile(content, temporary / name)
        plain = {
            "format_version": FORMAT_VERSION,
            "tree": tree,
            "arrays": arrays,
            "recipe": None if recipe is None else msgspec.to_builtins(recipe),
            "report": None if report is None else msgspec.to_builtins(report.without_times()),
            "metadata": dict(metadata or {}),
        }
        write_atomically(temporary / METADATA, json.dumps(plain, indent=1, sort_keys=True).encode())
        for folder, _, names in os.walk(temporary):
            for name in names:  # Whoever deletes a journal now relies on these files.
                sync(os.path.join(folder, name))
        if path.exists():  # Checked above: empty, or a checkpoint that may be replaced.
            shutil.rmtree(path)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _unwritable(path, error, shards.nbytes) from error
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if "No space left on device" in str(error) or "ENOSPC" in str(error):  # From tensorstore.
            raise _unwritable(path, OSError(errno.ENOSPC, ""), shards.nbytes) from error
        raise


def check_output(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Raises a ``CheckpointError`` unless ``save`` may write to ``path``."""
    path = pathlib.Path(path)
    if path.is_dir():
        entries = sorted(entry.name for entry in path.iterdir())
        if not entries or (overwrite and METADATA in entries):
            return
        if METADATA in entries:
            raise CheckpointError(
                f"output {path}: already holds a compressed model; name another folder, delete "
                "it, or say that it is to be overwritten."
            )
        raise CheckpointError(
            f"output {path}: is a folder that holds something else ({entries[0]}); name a new or "
            "empty folder."
        )
    if path.exists():
        raise CheckpointError(f"output {path}: is a file; name a new or empty folder.")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"output {path}: {parent} is no folder that can be written to.")


def load(path: str | os.PathLike) -> Saved:
    """Reads a folder that ``save`` wrote.

    Args:
      path: the folder.

    Returns:
      The parameters, report, recipe and metadata.

    Raises:
      CheckpointError: no checkpoint, a newer version's, or a damaged one; the message names
        the array.
    """
    path = pathlib.Path(path)
    plain = read_metadata(path)
    arrays = _Loaded(path / "arrays", plain["arrays"])
    try:
        recipe = plain["recipe"] and msgspec.convert(plain["recipe"], Recipe)
        report = plain["report"] and msgspec.convert(plain["report"], Report)
        params = _rebuild(plain["tree"], arrays)
    except (KeyError, TypeError, msgspec.ValidationError) as error:
        raise CheckpointError(
            f"checkpoint {path / METADATA}: is damaged or of another version ({error!r}); make the "
            "checkpoint again."
        ) from error
    return Saved(params, report or None, recipe or None, plain["metadata"])


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The contents of ``jaxcomp.json`` of a checkpoint folder, checked for its version."""
    file = pathlib.Path(path) / METADATA
    try:
        plain = json.loads(file.read_bytes())
        version = plain["format_version"]
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path}: cannot read {METADATA} ({error.strerror}); is this a folder that "
            "`jaxcomp compress` or jc.save wrote?"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {file}: is damaged ({error}); make the checkpoint again."
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {file}: has format version {version}, and this jaxcomp reads version "
            f"{FORMAT_VERSION}; install a jaxcomp that is as new as the one that wrote it."
        )
    return plain


class _Shards:
    """The arrays of a tree, grouped in order so that a group is small enough to hold in memory."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._values: list[Any] = []

    @property
    def nbytes(self) -> int:
        return sum(value.size * dtype_of(value.dtype.name).itemsize for value in self._values)

    def add(self, name: str, value: Any) -> str:
        self._names.append(name)
        self._values.append(value)
        return name

    def write(self, folder: pathlib.Path) -> dict[str, dict[str, Any]]:
        """Writes all arrays; returns by name their shard, key in it, dtype, shape and checksums."""
        entries: dict[str, dict[str, Any]] = {}
        folder.mkdir()
        group: dict[str, np.ndarray] = {}
        size = shard = 0
        for index, (name, value) in enumerate(zip(self._names, self._values, strict=True)):
            array = np.asarray(value)
            key = f"a{index:05d}"
            entries[name] = {
                "shard": None if array.size == 0 else f"{shard:05d}",  # orbax stores none empty.
                "key": key,
                "dtype": array.dtype.name,
                "shape": list(array.shape),
            }
            if array.size:
                group[key] = _storable(array)
                size += array.nbytes
            if size >= _SHARD_BYTES:
                _write_shard(folder / f"{shard:05d}", group)
                group, size, shard = {}, 0, shard + 1
        if group:
            _write_shard(folder / f"{shard:05d}", group)
        for entry in entries.values():
            if entry["shard"] is not None:
                entry["sha256"] = _checksums(folder / entry["shard"] / entry["key"])
        return entries


class _Loaded:
    """The arrays of a checkpoint, read shard by shard."""

    def __init__(self, folder: pathlib.Path, entries: dict[str, Any]) -> None:
        self._folder = folder
        self._entries = entries
        self._shard: tuple[str | None, dict[str, np.ndarray]] = (None, {})

    def __call__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        dtype, shape = dtype_of(entry["dtype"]), tuple(entry["shape"])
        if entry["shard"] is None:
            return np.zeros(shape, dtype)
        if self._shard[0] != entry["shard"]:
            self._shard = (entry["shard"], self._read(entry["shard"]))
        stored = self._shard[1][entry["key"]]
        return stored if stored.dtype == dtype else stored.view(dtype)

    def _read(self, shard: str) -> dict[str, np.ndarray]:
        # All files are compared with their checksums before orbax sees them: its reads run in
        # threads, which complain on standard error when one of them fails.
        wanted = {n: e for n, e in self._entries.items() if e["shard"] == shard}
        for name, entry in wanted.items():
            path = self._folder / shard / entry["key"]
            if _checksums(path) != entry["sha256"]:
                raise CheckpointError(
                    f"checkpoint {self._folder.parent}: array {name!r} is damaged: files in "
                    f"{path} are missing or do not match their checksums; make the checkpoint "
                    "again, or restore it from a copy."
                )
        return _read_shard(self._folder / shard, [entry["key"] for entry in wanted.values()])


def _describe(node: Any, path: str, shards: _Shards) -> dict[str, Any]:
    """The structure of a tree as JSON-able data; its arrays are added to ``shards``."""

    def child(key: Any) -> str:
        return f"{path}/{key}" if path else str(key)

    if is_compressed(node):
        arrays, structure = serialize.to_arrays(node)
        names = {key: shards.add(child(key), value) for key, value in arrays.items()}
        return {"kind": "compressed", "structure": structure, "arrays": names}
    if node is None:
        return {"kind": "none"}
    if isinstance(node, collections.abc.Mapping):
        if not all(isinstance(key, str | int) for key in node):
            raise CheckpointError(f"{path or 'params'}: keys of a dict must be text or integers.")
        keys = sorted(node, key=lambda key: (isinstance(key, str), key))  # As JAX orders them.
        items = [[key, _describe(node[key], child(key), shards)] for key in keys]
        return {"kind": "dict", "items": items}
    if type(node) in (list, tuple):
        items = [_describe(value, child(i), shards) for i, value in enumerate(node)]
        return {"kind": type(node).__name__, "items": items}
    if isinstance(node, np.ndarray | np.generic | jax.Array):
        if jnp.issubdtype(node.dtype, jax.dtypes.extended):
            raise CheckpointError(
                f"{path or 'params'}: a {node.dtype} cannot be stored; keep it out of the "
                "parameters, or store jax.random.key_data of it."
            )
        return {"kind": "array", "name": shards.add(path or "params", node)}
    if isinstance(node, bool | int | float):
        return {"kind": "scalar", "value": node}
    raise CheckpointError(
        f"{path or 'params'}: a {type(node).__name__} cannot be stored; checkpoints hold dicts, "
        "lists and tuples of arrays and compressed arrays; turn it into those first."
    )


def _rebuild(node: dict[str, Any], arrays: _Loaded) -> Any:
    match node["kind"]:
        case "compressed":
            loaded = {key: _on_device(arrays(name)) for key, name in node["arrays"].items()}
            return serialize.from_arrays(loaded, node["structure"])
        case "none":
            return None
        case "dict":
            return {key: _rebuild(value, arrays) for key, value in node["items"]}
        case "list":
            return [_rebuild(value, arrays) for value in node["items"]]
        case "tuple":
            return tuple(_rebuild(value, arrays) for value in node["items"])
        case "scalar":
            return node["value"]
        case "array":
            return _on_device(arrays(node["name"]))
    raise KeyError(node["kind"])


def _on_device(array: np.ndarray) -> Any:
    """As a JAX array, unless JAX would change its dtype (64 bits without x64)."""
    same = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
    return jnp.asarray(array) if same else array


def _checksums(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of each file of a folder, by name; empty without the folder."""
    found = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        with open(file, "rb") as stream:
            found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _storable(array: np.ndarray) -> np.ndarray:
    if array.dtype.name in _STORED:
        return array
    return np.ascontiguousarray(array).view(f"uint{8 * array.dtype.itemsize}")


def _checkpointer() -> Any:
    # Imported here: orbax takes seconds to import, and most uses of jaxcomp do not need it. zarr,
    # one file an array: the OCDBT layout names its files at random, so that no two saves are the
    # same.
    import orbax.checkpoint as ocp

    return ocp, ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False))


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


def _write_shard(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    ocp, checkpointer = _checkpointer()
    with _quiet(), checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(arrays))
    # The only bytes that differ from one save to the next: times, and the name of the folder.
    file = folder / "_CHECKPOINT_METADATA"
    plain = json.loads(file.read_bytes())
    plain.update({key: 0 for key in plain if key.endswith("_nsecs")})
    write_atomically(file, json.dumps(plain).encode())
    (folder / "commit_success.txt").unlink(missing_ok=True)


def _read_shard(folder: pathlib.Path, keys: list[str]) -> dict[str, np.ndarray]:
    ocp, checkpointer = _checkpointer()
    tree = ocp.args.PyTreeRestore(
        item={key: 0 for key in keys},
        restore_args={key: ocp.RestoreArgs(restore_type=np.ndarray) for key in keys},
    )
    try:
        with _quiet(), checkpointer:
            return checkpointer.restore(folder.absolute(), args=tree)
    except Exception as error:  # orbax raises many kinds.
        raise CheckpointError(
            f"checkpoint {folder}: cannot be read by orbax ({type(error).__name__}: {error}); "
            "make the checkpoint again, or restore it from a copy."
        ) from error


def _unwritable(path: pathlib.Path, error: OSError, needed: int) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        parent = path.parent
        while not parent.exists():
            parent = parent.parent
        return CheckpointError(
            f"output {path}: no space left on the disk: the arrays take {needed:,} bytes, "
            f"{shutil.disk_usage(parent).free:,} bytes are free; free some space and run again "
            "(with the same journal nothing is computed twice)."
        )
    return CheckpointError(f"output {path}: cannot be written: {error}.")
