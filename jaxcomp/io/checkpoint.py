"""Checkpoints of compressed models, on orbax.

Layout of a folder that ``save`` writes:

    jaxcomp.json       format version, structure of the tree, recipe, report, checksums of arrays
    arrays/00000/..    orbax PyTree checkpoints (zarr) of about 32 MB: a file for each shard of an
                       array, so that none is gathered to be written, and a part of one can be read
    ...                further files given to ``save``: a model's configuration, its tokenizer

Equal arrays that are split in the same way give equal bytes: no times are stored. The folder
appears whole, under a temporary name first, or not at all.
"""

import collections.abc
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import threading
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np

from jaxcomp import out_of_memory, sharding
from jaxcomp import rules as names
from jaxcomp.io import arrays as storage
from jaxcomp.io.arrays import CheckpointError
from jaxcomp.io.folder import METADATA, Contents, locked, publish
from jaxcomp.io.later import Shares
from jaxcomp.io.output import unfinished
from jaxcomp.io.reading import Reader
from jaxcomp.io.state import describe_state, rebuild_state
from jaxcomp.io.structure import Arrays, assemble, describe, rebuild
from jaxcomp.processes import Together
from jaxcomp.recipe import Recipe
from jaxcomp.report import Report

FORMAT_VERSION = 1


class Saved(NamedTuple):
    """What ``load`` returns.

    Attributes:
      params: the tree, compressed leaves as compressed arrays.
      report: the report, without times.
      recipe: the recipe, or None where none was saved.
      metadata: what was given to ``save``.
      state: the training state, if ``load`` was given a template of it.
    """

    params: Any
    report: Report | None
    recipe: Recipe | None
    metadata: dict[str, Any]
    state: Any = None


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether a folder was written by ``save``."""
    return (pathlib.Path(path) / METADATA).is_file()


def save(
    path: str | os.PathLike,
    result: Any = None,
    *,
    state: Any = None,
    files: collections.abc.Mapping[str, bytes | os.PathLike] | None = None,
    metadata: collections.abc.Mapping[str, Any] | None = None,
    overwrite: bool = False,
    wait: bool = True,
) -> "Saving | None":
    """Writes a compressed model, the state of its training, or both to a folder.

    Args:
      path: the folder; missing or empty, or with ``overwrite`` an earlier checkpoint.
      result: has ``params`` (a tree of dicts, lists and tuples of arrays and compressed arrays),
        and may have ``report`` and ``recipe``; what ``jc.compress`` or ``load`` returned. None
        where there is only a state.
      state: any pytree of arrays, PRNG keys and numbers: parameters in training, what ``jc.qat``
        and optimizers keep. ``load`` gives it back bit for bit with ``like=``.
      files: further files to lay into the folder, by name: their bytes, or a path to copy.
      metadata: JSON-able, given back by ``load``.
      overwrite: replace an earlier checkpoint. A folder that holds anything else is never touched.
      wait: with False return as soon as all arrays are copied to the host, where donating or
        changing them is of no matter, and write them in a thread. Read-only NumPy arrays, such as
        memory-mapped ones, are not copied.

    In a distributed run all processes call it, with a folder that all can reach. Each writes the
    shards that it holds, the first what it has of arrays that are not spread over devices; an error
    of one is an error on all.

    Returns:
      None, or without ``wait`` what to wait for before the program ends.

    Raises:
      CheckpointError: the folder holds something or another save writes to it, the disk is full, or
        the tree has nodes or leaves, or files or metadata are given, that cannot be stored.
    """
    shares = Shares(jax.process_index(), jax.process_count())
    prepared = functools.partial(_contents, result, state, files, metadata, shares)
    return _save(path, prepared, Together("save", error=CheckpointError), overwrite, wait)


def save_among(
    processes: collections.abc.Sequence[int],
    path: str | os.PathLike,
    result: Any,
    files: collections.abc.Mapping[str, bytes | os.PathLike] | None,
    metadata: collections.abc.Mapping[str, Any] | None,
    overwrite: bool,
) -> None:
    """``save`` of a result whose leaves may be ``Later``, by some of the processes.

    Args:
      processes: those that call it.
      path: as of ``save``, and so are the others.
      result: its arrays that are ``Later`` are read and written by all, each a share.
      files: further files.
      metadata: JSON-able.
      overwrite: replace an earlier checkpoint.
    """
    together = Together("save", processes, CheckpointError)
    shares = Shares(together.rank, len(together.processes))
    prepared = functools.partial(_contents, result, None, files, metadata, shares)
    _save(path, prepared, together, overwrite, wait=True)


def _save(
    path: str | os.PathLike,
    contents_of: collections.abc.Callable[[], Contents],
    together: Together,
    overwrite: bool,
    wait: bool,
) -> "Saving | None":
    path = pathlib.Path(os.path.abspath(path))
    with contextlib.ExitStack() as stack:

        def prepare() -> str:
            if together.first:
                check_output(path, overwrite)
            contents = contents_of()
            if together.first:
                stack.enter_context(locked(path))
            prepared.append(contents if wait else contents.on_host())
            return contents.layout()

        prepared: list[Contents] = []
        layouts = together.step("prepare", prepare)
        if len(set(layouts)) > 1:
            raise CheckpointError(
                f"output {path}: the processes save different trees; give arrays of the same "
                "paths, shapes, dtypes and shardings on all of them."
            )
        (contents,) = prepared
        if wait:
            publish(path, contents, together)
            return None
        return Saving(path, contents, together, stack.pop_all())


class Saving:
    """A save that goes on in a thread of its own, what ``save(.., wait=False)`` returned.

    Attributes:
      path: the folder, which appears when all of it is on the disk.
    """

    def __init__(
        self,
        path: pathlib.Path,
        contents: Contents,
        together: Together,
        held: contextlib.ExitStack,
    ) -> None:
        """Use ``save``."""
        self.path = path
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(contents, together, held))
        self._thread.start()

    def _run(self, contents: Contents, together: Together, held: contextlib.ExitStack) -> None:
        try:
            with held:
                publish(self.path, contents, together)
        except BaseException as error:
            self._error = error

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Waits for the end.

        Raises:
          CheckpointError: as ``save``.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error


def _contents(result: Any, state: Any, files: Any, metadata: Any, shares: Shares) -> Contents:
    _check_result(result, state)
    held = Arrays()
    tree = describe(None if result is None else result.params, held)
    leaves = None if state is None else describe_state(state, held)
    report, recipe = getattr(result, "report", None), getattr(result, "recipe", None)
    plain = {
        "format_version": FORMAT_VERSION,
        "tree": tree,
        "recipe": None if recipe is None else msgspec.to_builtins(recipe),
        "report": None if report is None else msgspec.to_builtins(report.without_times()),
        "metadata": dict(metadata or {}),
        **({} if leaves is None else {"state": leaves}),
    }
    files = dict(files or {})
    check_extras(files, plain["metadata"])
    sources = {name: storage.source(value, shares) for name, value in held.items()}
    return Contents(sources, files, plain)


def check_extras(files: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Raises a ``CheckpointError`` unless ``save`` can lay these into a folder."""
    for name, content in files.items():
        if name in (METADATA, "arrays", "", ".", "..") or pathlib.PurePath(name).name != name:
            raise CheckpointError(
                f"files: {name!r} cannot be the name of a file of its own in the checkpoint; use a "
                f"name without folders, and not {METADATA} or arrays."
            )
        if not isinstance(content, bytes) and not os.path.isfile(content):
            raise CheckpointError(f"files: {name!r}: {content}, to be copied, is no file.")
    try:
        json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"metadata: {error}; give what JSON has: dicts with names, lists, text, numbers."
        ) from error


def _check_result(result: Any, state: Any) -> None:
    if hasattr(result, "opt_state"):
        raise CheckpointError(
            f"result: a {type(result).__name__} holds the state of an optimizer, and result= would "
            "store its params only; give it as state=."
        )
    if result is None and state is None:
        raise CheckpointError("there is nothing to save; give result=, state= or both.")
    if result is not None and not hasattr(result, "params"):
        raise CheckpointError(
            f"result: a {type(result).__name__} has no params; give what jc.compress returned, or "
            "a training state as state=."
        )


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


def load(
    path: str | os.PathLike,
    *,
    include: collections.abc.Sequence[str] = ("*",),
    mesh: jax.sharding.Mesh | None = None,
    rules: Any = (),
    like: Any = None,
) -> Saved:
    """Reads a folder that ``save`` wrote, all of it or some weights, onto one device or a mesh.

    Every file that is read is compared with its checksum first.

    Args:
      path: the folder.
      include: rules that name leaves, as in a recipe. Any other leaf is not read: in its place is a
        ``ShapeDtypeStruct`` of its dense shape, so that all paths stay what they were.
      mesh: place the arrays on these devices, whatever mesh they were saved from: each process
        reads only what its devices hold, in files of at most about 8 MB. Without it they are placed
        on the default device.
      rules: how the mesh splits the dense weights (see the head of ``jaxcomp.sharding``); leaves
        that no rule names are replicated.
      like: template of the training state that was given to ``save``, such as a fresh one: each
        array is placed like the template's (arrays, or ShapeDtypeStructs that may have a sharding),
        NumPy arrays stay so. Without it no state is read.

    Returns:
      The parameters, report, recipe, metadata and state. An array of 64 bits stays on the host,
      as NumPy, where JAX does not have 64 bits enabled.

    Raises:
      CheckpointError: no checkpoint, a newer version's, or a damaged one, and the message names
        the array; a rule of ``include`` matches nothing; or the state differs from ``like`` in a
        path, shape or dtype, which the message names.
      JaxcompError: ``rules`` do not fit the weights or the mesh.
      OutOfMemoryError: of a device or the host; the message names the weight.

    Example:
      >>> import tempfile, types
      >>> import jax.numpy as jnp
      >>> params = {"embed": jnp.ones((4, 2)), "head": jnp.ones((2, 4))}
      >>> folder = tempfile.mkdtemp()
      >>> save(folder, types.SimpleNamespace(params=params))
      >>> params = load(folder, include=["head"]).params
      >>> type(params["embed"]).__name__, params["embed"].shape, float(params["head"].sum())
      ('ShapeDtypeStruct', (4, 2), 8.0)
    """
    path = pathlib.Path(path)
    plain = read_metadata(path)
    try:
        reader = Reader(path / "arrays", plain["arrays"])
        recipe = plain["recipe"] and msgspec.convert(plain["recipe"], Recipe)
        report = plain["report"] and msgspec.convert(plain["report"], Report)
        chosen = _chosen(path, plain["tree"], include)
        placed = _placed(path, plain["tree"], reader, mesh, rules)

        def leaf(at: str, node: dict[str, Any]) -> Any:
            shapes = assemble(node, reader.struct)
            if at in chosen:
                with out_of_memory.placing(at, np.shape(shapes)):
                    return assemble(node, lambda name: reader.array(name, placed.get(name)))
            return jax.ShapeDtypeStruct(tuple(shapes.shape), shapes.dtype)

        if like is not None:
            like = rebuild_state(path, plain.get("state"), like, reader)
        params = rebuild(plain["tree"], leaf)
    except (KeyError, TypeError, msgspec.ValidationError) as error:
        raise CheckpointError(
            f"checkpoint {path / METADATA}: is damaged or of another version ({error!r}); make the "
            "checkpoint again."
        ) from error
    return Saved(params, report or None, recipe or None, plain["metadata"], like)


def verify(
    path: str | os.PathLike, each: collections.abc.Callable[[str], None] | None = None
) -> dict[str, int]:
    """Reads every file of a checkpoint and compares it with its checksum; loads nothing.

    Args:
      path: the folder.
      each: called with the name of an array after its files were found whole.

    Returns:
      By name of an array the bytes of its files.

    Raises:
      CheckpointError: no checkpoint, a newer version's, or a damaged one; the message names the
        array and the file.

    Example:
      >>> import tempfile, types
      >>> folder = tempfile.mkdtemp()
      >>> save(folder, types.SimpleNamespace(params={"w": np.ones(3)}))
      >>> list(verify(folder))
      ['w']
    """
    path = pathlib.Path(path)
    reader = Reader(path / "arrays", read_metadata(path)["arrays"])
    found = {}
    for name in reader.entries:
        found[name] = reader.verify(name)
        if each is not None:
            each(name)
    return found


def _chosen(
    path: pathlib.Path, tree: dict[str, Any], include: collections.abc.Sequence[str]
) -> set[str]:
    """Paths of the leaves that are to be read."""
    leaves: list[str] = []
    rebuild(tree, lambda at, node: leaves.append(at))
    if isinstance(include, str):
        raise CheckpointError(
            f"include={include!r}: is one text, where a sequence of rules is wanted; write "
            f"include=[{include!r}]."
        )
    for rule in include:
        if leaves and not any(names.fits(rule, leaf) for leaf in leaves):
            raise CheckpointError(
                f"checkpoint {path}: include rule {rule!r} matches none of its {len(leaves)} "
                f"arrays; the closest are {', '.join(names.close_names(rule, leaves))}. Correct or "
                "remove the rule."
            )
    return {leaf for leaf in leaves if any(names.fits(rule, leaf) for rule in include)}


@dataclasses.dataclass(frozen=True)
class _Stub:
    """Stands for an array in the tree that sharding rules are matched against."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


def _placed(
    path: pathlib.Path,
    tree: dict[str, Any],
    reader: Reader,
    mesh: jax.sharding.Mesh | None,
    rules: Any,
) -> dict[str, jax.sharding.Sharding]:
    """By name of an array how it is to be spread over the mesh; empty without one."""
    if mesh is None:
        if rules:
            raise CheckpointError(
                f"checkpoint {path}: sharding rules say how a mesh splits the weights; give mesh= "
                "too."
            )
        return {}

    def stub(name: str) -> _Stub:
        struct = reader.struct(name)
        return _Stub(name, struct.shape, struct.dtype)

    stubs = rebuild(tree, lambda at, node: assemble(node, stub))
    pairs = zip(
        jax.tree.leaves(stubs),
        jax.tree.leaves(sharding.shardings(stubs, rules, mesh)),
        strict=True,
    )
    return {value.name: spread for value, spread in pairs if isinstance(value, _Stub)}


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The contents of ``jaxcomp.json`` of a checkpoint folder, checked for its version."""
    file = pathlib.Path(path) / METADATA
    try:
        plain = json.loads(file.read_bytes())
        version = plain["format_version"]
    except OSError as error:
        if unfinished(path).is_dir():
            raise CheckpointError(
                f"checkpoint {path}: is not finished: {unfinished(path)} holds the weights that an "
                "interrupted jc.compress(.., save_to=..) had done; run it again to finish it."
            ) from error
        raise CheckpointError(
            f"checkpoint {path}: cannot read {METADATA} ({error.strerror}); is this a folder that "
            "`jaxcomp compress` or jc.save wrote? One in Hugging Face layout is for jc.models.load."
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
