"""What several processes must agree on when they compress one model together.

Each runs the same program. Where they are given different things, they would compute nonsense, or
wait for each other for ever: so what they were given is compared before anything is computed, and
their journals are brought to the same records before they go on from them.
"""

import collections.abc
import contextlib
import hashlib
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

import jaxcomp
from jaxcomp.errors import JaxcompError
from jaxcomp.fingerprint import equations, leaf_bytes
from jaxcomp.graph import Graph
from jaxcomp.journal import Journal, JournalError
from jaxcomp.processes import Together
from jaxcomp.recipe import Recipe
from jaxcomp.shares import SharedJournal

_SAMPLE = 2**20  # Bytes that are compared of each weight: all would be read twice.

Given = dict[str, dict[str, str]]


def given(
    recipe: Recipe, graph: Graph, named: Sequence[tuple[str, Any]], batches: list[tuple], mesh: Any
) -> Given:
    """What this process was given, part by part.

    Of weights and inputs that the processes hold parts of, shape and sharding are compared; of
    weights that each has whole, a MiB in eight pieces that are spread from start to end: a file
    that was cut short, or whose copy went wrong from somewhere on, is found; one other byte is not.

    Args:
      recipe: the recipe.
      graph: the traced function.
      named: leaves of the model by name.
      batches: calibration data.
      mesh: the devices.

    Returns:
      For each thing the digests of its parts by name.
    """
    function = hashlib.sha256()
    for line in equations(graph.program):
        function.update(line)
    steps = {
        f"step {k} {type(step).__name__}": _digest([Recipe(steps=(step,)).fingerprint().encode()])
        for k, step in enumerate(recipe.steps)
    }
    return {
        "recipe": steps,
        "function": {f"{len(graph.program.ops)} operations": function.hexdigest()[:16]},
        "weights": {
            f"{path} {_described(leaf)}": _digest(_contents(leaf, _SAMPLE)) for path, leaf in named
        },
        "data": {
            f"batch {k}: {', '.join(map(_described, jax.tree.leaves(batch)))}": _digest(
                itertools.chain.from_iterable(_contents(v) for v in jax.tree.leaves(batch))
            )
            for k, batch in enumerate(batches)
        },
        "mesh": {f"{dict(mesh.shape)} of the devices {[d.id for d in mesh.devices.flat]}": ""},
        "versions": {f"jax {jax.__version__}, jaxcomp {jaxcomp.__version__}": ""},
        "settings": {f"jax_enable_x64={jax.config.jax_enable_x64}": ""},
    }


def check(processes: Sequence[int], told: Sequence[Given]) -> None:
    """Compares what the processes were given.

    Args:
      processes: their indices.
      told: what ``given`` returned on each.

    Raises:
      JaxcompError: it differs; the message names the processes, and what differs in which part.
    """
    first, others = told[0], list(zip(processes[1:], told[1:], strict=True))
    texts = [
        f"process {index} differs from process {processes[0]} in its {', '.join(differences)}"
        for index, mine in others
        if (differences := _differences(first, mine))
    ]
    if texts:
        raise JaxcompError(
            f"compress(mesh=..) over the processes {', '.join(map(str, processes))}: "
            f"{'; '.join(texts)}. Give every process the same recipe, function, weights and "
            "batches; a batch of which each has its own part is a jax.Array made by "
            "jax.make_array_from_process_local_data."
        )


def _differences(first: Given, mine: Given) -> list[str]:
    found = []
    for what, parts in first.items():
        names = [n for n in {**mine[what], **parts} if mine[what].get(n) != parts.get(n)]
        if names:
            own = [n for n in names if n in mine[what]] or [f"{names[0]} is missing"]
            more = f" and {len(own) - 3} more" if len(own) > 3 else ""
            found.append(f"{what} ({', '.join(own[:3])}{more})")
    return found


def _described(leaf: Any) -> str:
    text = f"{getattr(leaf, 'dtype', type(leaf).__name__)} {tuple(getattr(leaf, 'shape', ()))}"
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        text += f" split as {getattr(leaf.sharding, 'spec', leaf.sharding)}"
    return text


def _contents(leaf: Any, most: int | None = None) -> collections.abc.Iterator[bytes]:
    for array in jax.tree.leaves(leaf):
        if not isinstance(array, jax.Array) or array.is_fully_addressable:
            yield from leaf_bytes(array, most)


def _digest(pieces: collections.abc.Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()[:16]


def open_journal(
    path: str,
    manifest: collections.abc.Callable[[], dict[str, Any]],
    together: Together,
    shared: bool = False,
) -> Journal | SharedJournal:
    """Opens this process's journal, with the records that all processes have.

    Each process writes the folder ``process-I-of-N`` in ``path``, which may be on a disk of its own
    or on one that all share. A process that was killed may lack the records of the last weights:
    those are dropped by the others, and computed again.

    Args:
      path: folder of the journal.
      manifest: says what identifies the run, after a look at all weights and data.
      together: the processes.
      shared: whether each is to write its share of the records only, and all read all: the folder
        is one that all reach. None is dropped then.

    Returns:
      The journal: that of the folder itself where there is one process only.

    Raises:
      JournalError: as ``Journal.open``, on any of the processes, or the folder is that of a run
        over another number of processes.
    """
    count = len(together.processes)
    if count == 1:
        return Journal.open(path, manifest())
    folder = pathlib.Path(path)
    folders = [folder / f"process-{rank}-of-{count}" for rank in range(count)]
    with contextlib.ExitStack() as stack:
        opened: list[Journal] = []

        def begin() -> list[str]:
            _check_count(folder, count)
            opened.append(stack.enter_context(Journal.open(folders[together.rank], manifest())))
            return opened[0].keys() if shared else opened[0].verified()

        told = together.step("journal", begin)
        if shared:
            together.step("see", lambda: _check_reached(folders))
            journal = SharedJournal(folder, together.rank, opened[0], folders, told)
        else:
            (journal,) = opened
            journal.keep(set.intersection(*map(set, told)))
        stack.pop_all()
    return journal


def _check_reached(folders: Sequence[pathlib.Path]) -> None:
    missing = [str(f) for f in folders if not f.is_dir()]
    if missing:
        raise JournalError(
            f"journal {missing[0]}: was made by another process and is not seen by this one; "
            "save_to= (and journal= with it) must be on a disk that all processes reach."
        )


def _check_count(folder: pathlib.Path, count: int) -> None:
    other = [f.name for f in folder.glob("process-*-of-*") if not f.name.endswith(f"-of-{count}")]
    found = (folder / "manifest.json").exists()
    if other or found:
        what = "one process" if found else f"{other[0].rpartition('-')[2]} processes"
        raise JournalError(
            f"journal {folder}: belongs to a run of {what}, and this one has {count}, whose sums "
            "are rounded otherwise; run with as many to resume, or name another journal folder, "
            "or delete this one to start over."
        )
