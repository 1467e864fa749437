"""``compress``: a recipe applied to a model in one pass over the calibration data."""

import dataclasses
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp
from jaxcomp import (
    agreement,
    calibration,
    folding,
    formats,
    host,
    out_of_memory,
    placing,
    slices,
    streaming,
)
from jaxcomp.assembly import Assembly
from jaxcomp.dispatch import Dispatcher, check_activation_site
from jaxcomp.errors import DataError, JaxcompError, OutOfMemoryError
from jaxcomp.fingerprint import fingerprints, weight_digests
from jaxcomp.formats import CompressedArray, is_compressed
from jaxcomp.formats.assemble import describe
from jaxcomp.graph import Graph, trace
from jaxcomp.graph.coupling import producers
from jaxcomp.graph.interpret import quantizes_input
from jaxcomp.graph.program import Program
from jaxcomp.graph.sequential import Many, Sequential, Target, _Leaf
from jaxcomp.graph.sites import Layout, Site
from jaxcomp.graph.trace import flatten_inputs, leaf_paths
from jaxcomp.io.checkpoint import check_extras, check_output, is_checkpoint, save_among
from jaxcomp.io.later import Shares
from jaxcomp.io.output import Output, begin, clear, may_be_complete
from jaxcomp.io.stacked import Stacked, densified
from jaxcomp.journal import JournalError
from jaxcomp.plan import make_plan
from jaxcomp.processes import Together
from jaxcomp.progress import Progress
from jaxcomp.recipe import Recipe
from jaxcomp.records import Index, Record, Store
from jaxcomp.report import Report, Row
from jaxcomp.step import Deferred, Layer, run


@dataclasses.dataclass(frozen=True)
class Result:
    """What ``compress`` returns.

    Attributes:
      params: the parameter tree with compressed arrays in place of the weights that the recipe
        names. With ``save_to`` the arrays are ``ShapeDtypeStruct``s: ``jc.load`` reads them.
      report: one row a compressed weight, and totals.
      recipe: what was applied.
    """

    params: Any
    report: Report
    recipe: Recipe


def compress(
    apply: Callable,
    params: Any,
    recipe: Recipe,
    batches: Iterable[tuple],
    journal: str | None = None,
    mesh: Any = None,
    progress: bool = True,
    save_to: str | os.PathLike | Output | None = None,
) -> Result:
    r"""Compresses the weights of a model as a recipe says.

    The model is evaluated once on the calibration batches, operation by operation; each weight is
    compressed when its input, made by already compressed predecessors, is at hand. Recipes that
    need no statistics compress without evaluating anything.

    Args:
      apply: pure function ``apply(params, *inputs)``.
      params: parameter tree, device arrays or host arrays (memory-mapped ones are read once, a
        weight at a time).
      recipe: what to do to which weight.
      batches: sequence or other re-iterable of tuples of the inputs that follow ``params``.
      journal: folder where finished weights are kept as they come. A run that was killed goes on
        from it, and gives the same bytes; the result's arrays are then memory-mapped files of it.
        Over several processes each keeps its own in ``process-I-of-N`` of the folder.
      mesh: devices to compress on, a ``jax.sharding.Mesh`` of any shape and axis types; None is
        the default device. Batches are split along their leading axis and weights over their
        outputs, over as many mesh axes as divide them; the result is that of one device up to the
        rounding of sums over the batch. One input group's weights are on the devices at a time:
        activations between layers and finished weights wait in host memory, and the result holds
        NumPy arrays. The devices may belong to several processes (``jax.distributed``): all of
        these call ``compress`` with the same arguments, as if alone, and get the whole result.
        Each reads from ``params`` and ``batches`` what its devices need; where it has only its own
        part of one, that is a ``jax.Array`` over the mesh
        (``jax.make_array_from_process_local_data``).
      progress: shows progress on standard error, if that is a terminal.
      save_to: folder of a checkpoint to write, the same as ``jc.save`` of the result, or a
        ``jc.Output`` with what more it is to hold; for models whose compressed weights should not
        wait in memory. Finished weights go to ``FOLDER.unfinished`` (or to ``journal``) as they
        come, in the files that the checkpoint will have, and are then in no memory: the result
        holds shapes. The folder appears when all is done, and the other one goes (a ``journal``
        stays); a run that was killed goes on from it.
        Over several processes each writes its share of everything, to a disk that all reach.

    Returns:
      Compressed parameters (with ``save_to`` their shapes), report and recipe.

    Raises:
      RecipeError: the recipe does not fit the model; nothing was computed.
      DataError: no batches, inputs that differ in structure, NaN on the way.
      OutOfMemoryError: on the host or a device; the message names the weight, what was asked for
        and what to change.
      JaxcompError: a format that does not fit a weight; the message names path, shape, rule and
        fix. Or processes of the mesh were given different things, before anything is computed.
      CheckpointError: ``save_to`` holds something, before anything is computed; or the disk is
        full, on any of the processes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxcomp as jc
      >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> x = jax.random.normal(jax.random.key(1), (16, 64))
      >>> result = jc.compress(
      ...     lambda p, x: x @ p["w"], params, jc.presets.w4a16_gptq(group_size=32), [(x,)]
      ... )
      >>> result.params["w"].shape, result.report.rows[0].bits_per_weight
      ((64, 32), 4.5)
    """
    place = placing.place(mesh)
    if save_to is not None and not isinstance(save_to, Output):
        save_to = Output(save_to)
    return _compress(apply, params, recipe, batches, journal, place, progress, save_to)


def _compress(apply, params, recipe, batches, journal, place, progress, output) -> Result:
    started = time.perf_counter()
    together = Together("compress", place.processes)
    several = len(together.processes) > 1
    named, treedef = leaf_paths(params)
    prepared = []
    complete = False
    if output is not None and journal is None:
        told = together.step("look", lambda: together.first and may_be_complete(output))
        complete = told[0]

    def prepare():
        if output is not None:
            check_extras(dict(output.files or {}), dict(output.metadata or {}))
        if output is not None and together.first and not complete:
            check_output(output.path, output.overwrite)
        chosen = _batches(batches)
        graph = trace(apply, place.abstract(params), *place.abstract(chosen[0]))
        prepared[:] = chosen, graph, make_plan(graph, recipe)
        if several:
            return agreement.given(recipe, graph, named, chosen, place.mesh)

    with place.context():
        told = together.step("compare", prepare)
    agreement.check(together.processes, told)
    batches, graph, plan = prepared
    shown = progress and together.first
    run_ = _Run(graph, recipe, plan, dict(named), shown, place, together, output is not None)
    folder = journal if journal is not None or output is None else output.unfinished
    if folder is not None:
        shares = Shares(together.rank, len(together.processes))
        parts = run_.parts if several else lambda path, leaf: None
        read = together.step("read", lambda: weight_digests(named, shares, parts))
        digests = {path: "".join(r.get(path, "") for r in read) for path, _ in named}
        manifest = functools.partial(fingerprints, recipe, graph, named, batches, digests)
        try:
            streams = run_.store.streams
            run_.store.journal = agreement.open_journal(folder, manifest, together, streams)
        except JournalError:
            if complete:  # By another run.
                check_output(output.path, output.overwrite)
            raise
    try:
        if complete and not run_.is_finished():
            check_output(output.path, output.overwrite)
        if output is not None and journal is None and together.first:
            begin(output, output.overwrite and is_checkpoint(output.path))
        with place.context():
            if run_.calibrates:
                run_.calibrated(named, batches)
            else:
                run_.data_free()
            if output is None:
                leaves = stored = run_.assemble(named)
        if output is not None:  # Without the mesh: what one process writes it makes alone.
            leaves, stored = streaming.leaves(run_.assembly(named), named)
        report = run_.report(dict(named), leaves, time.perf_counter() - started)
        if output is not None:
            done = Result(jax.tree.unflatten(treedef, stored), report, recipe)
            options = (output.files, output.metadata, output.overwrite)
            if not complete:
                save_among(place.processes, output.path, done, *options)
    except OutOfMemoryError as error:
        raise OutOfMemoryError(f"{error}; {run_.kept()}") from error.__cause__
    except jax.errors.JaxRuntimeError as error:
        if several:
            error.add_note(_others_ended(together, folder))
        raise
    finally:
        run_.close()
    if output is not None and journal is None:  # All is in the checkpoint, and on the disk.
        together.step("close", lambda: None)
        if together.first:
            clear(output.path)
    return Result(jax.tree.unflatten(treedef, leaves), report, recipe)


def _others_ended(together: Together, journal: str | None) -> str:
    count = len(together.processes)
    resume = f" with the same journal ({journal}) to go on from there" if journal else ""
    return (
        f"compress(mesh=..) over {count} processes: if this is an error of communication, another "
        "process has ended or cannot be reached; its own output says why. Start all "
        f"{count} again{resume}."
    )


def _batches(batches: Iterable[tuple]) -> list[tuple]:
    batches = list(batches)
    if not batches:
        raise DataError(
            "no calibration batches: give at least one tuple of the inputs that follow params (its "
            "shapes are needed even for recipes without calibration)"
        )
    batches = [b if isinstance(b, tuple) else (b,) for b in batches]
    for k, batch in enumerate(batches):
        if jax.tree.structure(batch) != jax.tree.structure(batches[0]):
            raise DataError(
                f"calibration batch {k} has the structure {jax.tree.structure(batch)}, batch 0 has "
                f"{jax.tree.structure(batches[0])}; all batches must have the same inputs"
            )
        for j, (value, first) in enumerate(
            zip(jax.tree.leaves(batch), jax.tree.leaves(batches[0]), strict=True)
        ):
            if _signature(value) != _signature(first):
                raise DataError(
                    f"input {j} of calibration batch {k} is {_signature(value)}, of batch 0 "
                    f"{_signature(first)}: the model is traced once, so shapes, dtypes and Python "
                    "scalars must be the same in all batches; drop or pad the uneven batch, or "
                    "pass scalars as arrays"
                )
    return batches


def _signature(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} {tuple(value.shape)}"
    return repr(value)


class _Run:
    """The state of one run of ``compress``: the ``Compressor`` of the sequential pass."""

    def __init__(
        self,
        graph: Graph,
        recipe: Recipe,
        plan: dict,
        leaves: dict,
        progress: bool,
        place: placing.Here | None = None,
        together: Together | None = None,
        streams: bool = False,
    ):
        self.graph, self.recipe, self.plan, self.leaves = graph, recipe, plan, leaves
        self.place = place or placing.Here()
        self.records: dict[str, dict[Index, Record]] = {path: {} for path in plan}
        self.together = together or Together("compress", self.place.processes)
        self.store = Store(self.together, self._sizes, streams)
        self.contractions = 0
        uses: dict[str, int] = {}
        for item in (*graph.sites, *graph.other_uses):
            uses[item.path] = uses.get(item.path, 0) + 1
        # Other uses are noted once for each reader, sites once each.
        self.single_use = {path for path in graph.paths if uses.get(path, 0) <= 1}
        self.calibrates = any(recipe.steps[k].needs() for steps in plan.values() for k in steps)
        total = sum(_positions(graph, path) for path in plan)
        self.progress = Progress("compress", total, progress and sys.stderr.isatty())

    # The protocol of the sequential pass.

    def needs(self, site: Site) -> frozenset[str] | None:
        """What the steps for a site's weight read."""
        if site.path not in self.plan or (not site.is_contraction and self._contracted(site.path)):
            return None
        steps = (self.recipe.steps[k] for k in self.plan[site.path])
        needs = frozenset().union(*(s.needs() for s in steps))
        return needs if site.is_contraction else frozenset()

    def parts(self, path: str, leaf: Any) -> Sequence[tuple] | None:
        """What of a leaf this process reads to compress it; None where it reads all or nothing."""
        if path not in self.plan or not isinstance(leaf, np.ndarray | Stacked):
            return None
        layout = self.graph.layouts[path]
        depth = len(_stack(self.graph, path)) if self.calibrates else 0
        axes = layout.stack_axes[depth:], layout.out_axes, layout.in_axes
        return self.place.parts(leaf.shape, axes)

    def _sizes(self, path: str, index: Index) -> Sequence[int]:
        layout = self.graph.layouts[path]
        return layout.sizes(layout.stack_axes[: len(index)])

    def _contracted(self, path: str) -> bool:
        return any(s.is_contraction for s in self.graph.sites_of(path))

    def compress(self, program: Program, group: Sequence[Target], statistics: Any) -> list[Record]:
        """Compresses an input group, or reads it from the journal."""
        records = [self.store.get(t.site.path, t.index) for t in group]
        if any(r is None for r in records):
            records = self._compress(program, group, statistics)
        for target, record in zip(group, records, strict=True):
            self.records[target.site.path][target.index] = record
            self.progress.advance(target.site.path)
        return records

    def for_evaluation(self, group: Sequence[Target], records: list[Record]) -> list[Any]:
        """What the group's weights are evaluated with."""
        # What the scale was folded into has been evaluated without it: the pass goes on with the
        # scale at the input.
        scale = next((jnp.asarray(fold.vector) for r in records for fold in r.folds), None)
        results = [self._leaf(_input_scaled(r.array, scale)) for r in records]
        # Files that were read on the way: the weights (where the device array shares the file's
        # memory, they were read again after ``_matrix``) and the journal's records.
        for target, record in zip(group, records, strict=True):
            for leaf in (target.leaf, *jax.tree.leaves(record.array)):
                jaxcomp.io.safetensors.release(leaf)
            if self.store.streams:
                self.records[target.site.path][target.index] = record.without_contents()
        return results

    def _leaf(self, array: CompressedArray) -> Any:
        """Dense, once for all batches, unless the input is to be quantized at run time."""
        return self.place.shared(array) if quantizes_input(array) else self.place.weight(array)

    def takes_apart(self, group: Sequence[Target]) -> bool:
        """Whether the stacks of a group go through the steps one matrix after the other."""
        shapes = []
        for target in group:
            axes = _slice_axes(target, self.graph.layouts[target.site.path])
            shapes.append(_matrix_shape(target.leaf, axes))
        return self._takes_apart([t.site.path for t in group], shapes)

    def _takes_apart(self, paths: Sequence[str], shapes: Sequence[Sequence[int]]) -> bool:
        steps = {k for path in paths for k in self.plan[path]}
        return self.place.takes_apart() and slices.can_be_taken_apart(
            shapes, [self.recipe.steps[k] for k in steps]
        )

    def overwrites_hessian(self, group: Sequence[Target]) -> bool:
        """Whether one step alone reads the Hessian, which is then summed where it computes."""
        steps = {k for target in group for k in self.plan[target.site.path]}
        return (
            self.place.takes_apart()
            and len(steps) == 1
            and self.recipe.steps[steps.pop()].overwrites_hessian()
        )

    def _compress(self, program, group, statistics) -> list[Record]:
        started = time.perf_counter()
        for target in group:
            self._check_static(program, target.site)
        empty = statistics is not None and not bool(np.asarray(statistics.count).all())
        weights = [
            (t.site.path, t.leaf, _slice_axes(t, self.graph.layouts[t.site.path])) for t in group
        ]
        layers = self._layers(weights, statistics)
        targets = self._producers(program, group, layers)
        records = []
        seconds = (time.perf_counter() - started) / len(group)
        for k, (target, layer) in enumerate(zip(group, layers, strict=True)):
            scale = layer.input_scale
            folds = []
            if scale is not None and targets is not None:
                if k == 0:
                    vector = host.fetch(scale)
                    folds = [folding.Fold(t.path, t.kind, t.axis, t.loops, vector) for t in targets]
                scale = None
            array = _array(layer, scale, self.graph.layouts[target.site.path], target)
            array = self.place.finished(array)
            check_activation_site(target.site, array)
            metrics = {name: _plain(v) for name, v in layer.metrics.items()}
            notes = []
            if targets is not None:
                notes.append("input scale folded into " + ", ".join(t.path for t in targets))
            if empty:
                notes.append("some experts saw no calibration tokens")
            metrics["notes"] = "; ".join(notes)
            records.append(Record(array, folds, metrics, seconds))
        return self.store.keep([(t.site.path, t.index) for t in group], records)

    def _layers(self, weights: Sequence[tuple[str, Any, tuple]], statistics: Any) -> Any:
        """The layers of an input group after all steps.

        Args:
          weights: path, leaf and its axes (stack, out, in) of each.
          statistics: of their input, or None.
        """
        shapes = [_matrix_shape(leaf, axes) for _, leaf, axes in weights]
        if not self._takes_apart([path for path, _, _ in weights], shapes):
            # Not by a name: each step's weights can go when the next has made its own.
            return self._steps(tuple(self._layer(*w, statistics) for w in weights))
        whole = [
            Layer(path, Deferred(functools.partial(self._matrix, leaf, axes), shape),
                  original_dtype=leaf.dtype)
            for (path, leaf, axes), shape in zip(weights, shapes, strict=True)
        ]  # fmt: skip

        def slice_of(k: int) -> tuple[Layer, ...]:
            for _, leaf, axes in weights if k else ():
                jaxcomp.io.safetensors.release(_slice(leaf, axes, k - 1)[0])
            own = None if statistics is None else _of_slice(statistics, k)
            return tuple(self._layer(p, *_slice(leaf, axes, k), own) for p, leaf, axes in weights)

        return slices.one_by_one(whole, slice_of, self._steps, self.store.room)

    def _layer(self, path: str, leaf: Any, axes: tuple, statistics: Any) -> Layer:
        if self.place.rereads(leaf):
            shape = _matrix_shape(leaf, axes)
            stored = formats.to_matrix(leaf, *axes) if isinstance(leaf, np.ndarray) else None
            if stored is not None and not np.may_share_memory(stored, leaf):
                stored = None
            weight = Deferred(functools.partial(self._matrix, leaf, axes), shape, stored)
        else:
            weight = self._matrix(leaf, axes)
        return Layer(path, weight, statistics=statistics, original_dtype=leaf.dtype)

    def _matrix(self, leaf: Any, axes: tuple) -> jax.Array:
        matrix = self.place.matrix(leaf, axes)
        jaxcomp.io.safetensors.release(leaf)
        return matrix

    def _steps(self, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
        for k, step in enumerate(self.recipe.steps):
            chosen = [i for i, layer in enumerate(layers) if k in self.plan[layer.path]]
            if chosen:
                last = [k == max(self.plan[layers[i].path]) for i in chosen]
                done = run(
                    step,
                    tuple(layers[i].replace(is_last=n) for i, n in zip(chosen, last, strict=True)),
                )
                layers = tuple(
                    done[chosen.index(i)] if i in chosen else layer
                    for i, layer in enumerate(layers)
                )
        return layers

    def _check_static(self, program: Program, site: Site) -> None:
        """A frozen activation scale holds for one input; some weights have several."""
        activations = [
            getattr(self.recipe.steps[k], "activation", None) for k in self.plan[site.path]
        ]
        if not any(a is not None and not a.dynamic for a in activations):
            return
        contractions = [s for s in self.graph.sites_of(site.path) if s.is_contraction]
        shared = len(site.view.loops) < program.depth
        if shared or len(contractions) > len({s.view.fixed for s in contractions}):
            raise JaxcompError(
                f"{site.path} {site.layout.leaf_shape}: used on several inputs, for which one "
                "static activation scale cannot be calibrated; use dynamic activations for it, or "
                "exclude this path"
            )

    def _producers(self, program, group, layers):
        """Parameters that can take the group's input scale, if all its layers share one."""
        scales = host.fetch([layer.input_scale for layer in layers])
        if any(s is None or s.ndim != 1 for s in scales):
            return None
        if any(not np.array_equal(scales[0], s) for s in scales[1:]):
            return None
        targets = producers(program, [t.op for t in group], self.single_use)
        for target in targets or ():
            if target.kind != "rows":
                continue
            arrays = [r.array for r in self.records.get(target.path, {}).values()]
            if is_compressed(self.leaves[target.path]):
                arrays.append(self.leaves[target.path])
            if not all(folding.rows_scale_exactly(array) for array in arrays):
                return None
        return targets

    # Running.

    def calibrated(self, named, batches) -> None:
        """One forward pass over all batches."""
        for path in self.plan:
            sites = [s for s in self.graph.sites_of(path) if self.needs(s) is not None]
            if len({frozenset(s.loop_axes) for s in sites}) > 1:
                raise JaxcompError(
                    f"{path} {sites[0].layout.leaf_shape}: its stack is looped over or indexed at "
                    "one use and contracted whole at another, so its slices have no one input "
                    "each; use a recipe without calibration for it, or exclude this path"
                )
        if self._recalled():
            return
        passes = Sequential(self, Dispatcher(), len(batches), self.place)
        arrays = [self.place.parameter(leaf) for _, leaf in named if hasattr(leaf, "shape")]
        program = self.graph.program
        leaves = [
            _Leaf(leaf) if i in program.weights else leaf
            for i, leaf in zip(program.inputs, arrays, strict=False)
        ]
        columns = [flatten_inputs(batch, {})[0] for batch in batches]
        inputs = [Many(map(self.place.inputs, column)) for column in zip(*columns, strict=True)]
        # Nobody asks for the outputs: what comes after the last site is left out.
        program = dataclasses.replace(program, outputs=())
        passes.run(program, [*leaves, *inputs], list(range(len(batches))))
        self.contractions = passes.contractions
        missing = [p for p in self.plan if len(self.records[p]) < _positions(self.graph, p)]
        if missing:
            path = missing[0]
            raise DataError(
                f"{path} {tuple(self.graph.shapes[path].shape)}: the calibration data never "
                f"reached it ({len(self.records[path])} of {_positions(self.graph, path)} "
                "positions); give data that does, or exclude this path"
            )

    def _indices(self, path: str) -> list[Index]:
        """Those of a weight's records."""
        return list(np.ndindex(*_stack(self.graph, path))) if self.calibrates else [()]

    def is_finished(self) -> bool:
        """Whether the journal has all weights."""
        return all(self.store.has(path, i) for path in self.plan for i in self._indices(path))

    def _recalled(self) -> bool:
        """Whether a run that ended later had finished all weights; they are read then."""
        if not self.is_finished():
            return False
        for path in self.plan:
            for index in self._indices(path):
                record = self.store.get(path, index)
                for leaf in jax.tree.leaves(record.array):
                    jaxcomp.io.safetensors.release(leaf)
                if self.store.streams:
                    record = record.without_contents()
                self.records[path][index] = record
                self.progress.advance(path)
        return True

    def data_free(self) -> None:
        """Each weight by itself, as a whole stack, without evaluating the model."""
        for path in self.plan:
            layout = self.graph.layouts[path]
            record = self.store.get(path, ())
            if record is None:
                started = time.perf_counter()
                leaf = self.leaves[path]
                axes = (layout.stack_axes, layout.out_axes, layout.in_axes)
                with out_of_memory.compressing([path], [leaf.shape]):
                    (layer,) = self._layers([(path, leaf, axes)], None)
                array = CompressedArray.from_matrix(
                    _parts(layer, None), leaf.shape, leaf.dtype, *axes
                )
                array = self.place.finished(array)
                for site in self.graph.sites_of(path):
                    check_activation_site(site, array)
                metrics = {name: _plain(v) for name, v in layer.metrics.items()}
                record = Record(array, [], metrics, time.perf_counter() - started)
                (record,) = self.store.keep([(path, ())], [record])
            for leaf in (self.leaves[path], *jax.tree.leaves(record.array)):
                jaxcomp.io.safetensors.release(leaf)
            self.records[path][()] = record.without_contents() if self.store.streams else record
            self.progress.advance(path)

    def kept(self) -> str:
        """What becomes of the weights that are finished, for an error's message."""
        count = sum(map(len, self.records.values()))
        if self.store.journal is None:
            return f"the {count} weights finished before are lost, with journal=.. they are kept"
        return (
            f"the {count} weights finished before are kept in the journal "
            f"{self.store.journal.path}, the same call goes on from there"
        )

    def close(self) -> None:
        """Ends the progress display and lets go of the journal."""
        self.progress.close()
        if self.store.journal is not None:
            self.store.journal.close()

    # What comes out.

    def assemble(self, named) -> list[Any]:
        """The leaves of the result."""
        assembly = self.assembly(named)
        return [densified(assembly.leaf(path)) for path, _ in named]

    def assembly(self, named) -> Assembly:
        """What makes the leaves of the result."""
        return Assembly(
            self.graph,
            dict(named),
            self.records,
            self.store,
            self.place.finished,
            self.together.step,
        )

    def report(self, dense: dict, leaves: list, seconds: float) -> Report:
        """The report."""
        rows = []
        after = dict(zip(dense, leaves, strict=True))
        for path in self.plan:
            records = list(self.records[path].values())
            errors = [r.metrics["error"] for r in records if r.metrics.get("error") is not None]
            notes = {r.metrics["notes"] for r in records if r.metrics.get("notes")}
            uses = self.graph.sites_of(path)
            rows.append(
                Row(
                    path=path,
                    kind=uses[0].kind,
                    shape=tuple(dense[path].shape),
                    format=describe(after[path]),
                    nbits=formats.nbits(after[path]),
                    error=float(np.mean(errors)) if errors else None,
                    seconds=sum(r.seconds for r in records),
                    notes="; ".join(sorted(notes)),
                )
            )
        others = [
            leaf for path, leaf in after.items() if path not in self.plan and hasattr(leaf, "shape")
        ]
        return Report(
            rows=tuple(rows),
            other_weights=sum(int(np.prod(leaf.shape)) for leaf in others),
            other_nbits=sum(formats.nbits(leaf) for leaf in others),
            original_nbits=sum(formats.nbits(v) for v in dense.values() if hasattr(v, "shape")),
            seconds=seconds,
        )


def _positions(graph: Graph, path: str) -> int:
    """At how many positions of loops and fixed axes a weight is used."""
    return int(np.prod(_stack(graph, path), dtype=int))


def _stack(graph: Graph, path: str) -> Sequence[int]:
    """The sizes of these loops and fixed axes."""
    site = next(s for s in graph.sites_of(path))
    depth = len(site.view.loops) + len(site.view.fixed)
    return site.layout.sizes(site.layout.stack_axes[:depth])


def _slice_axes(target: Target, layout: Layout) -> tuple:
    """Axes of a leaf without its loop axes: stack (batch axes), out, in."""
    depth = len(target.index)
    gone = layout.stack_axes[:depth]

    def left(axes):
        return tuple(a - sum(g < a for g in gone) for a in axes)

    return left(layout.stack_axes[depth:]), left(layout.out_axes), left(layout.in_axes)


def _matrix_shape(leaf: Any, axes: tuple) -> tuple[int, ...]:
    stack, out, in_ = ([leaf.shape[a] for a in given] for given in axes)
    return (*stack, math.prod(out), math.prod(in_))


def _slice(leaf: Any, axes: tuple, k: int) -> tuple[Any, tuple]:
    """A leaf at position ``k`` of its first stack axis, and the axes that are left."""
    gone = axes[0][0]
    left = tuple(tuple(a - (a > gone) for a in given if a != gone) for given in axes)
    leaf = host.numpy(leaf) if isinstance(leaf, jax.Array) else leaf  # A ``Stacked`` stays one.
    return leaf[(slice(None),) * gone + (k,)], left


def _of_slice(statistics: calibration.Statistics, k: int) -> calibration.Statistics:
    """The statistics of a stack's inputs at position ``k``."""
    hessian, rest = statistics.hessian, statistics._replace(hessian=None)
    rest = host.to_device(jax.tree.map(lambda a: host.numpy(a)[k], rest))
    if hessian is not None and not isinstance(hessian, calibration.Hessians):
        hessian = host.numpy(hessian)
    return rest._replace(hessian=None if hessian is None else hessian[k])


def _parts(layer: Layer, scale: jax.Array | None) -> tuple:
    parts = slices.parts_of(layer)
    if scale is not None:
        parts = tuple(formats.InputScale(p, scale) for p in parts)
    return parts


def _array(layer: Layer, scale, layout: Layout, target: Target) -> CompressedArray:
    axes = _slice_axes(target, layout)
    return CompressedArray.from_matrix(
        _parts(layer, scale), target.leaf.shape, layer.original_dtype, *axes
    )


def _input_scaled(array: CompressedArray, scale: jax.Array | None) -> CompressedArray:
    if scale is None:
        return array
    return array.replace(parts=tuple(formats.InputScale(p, scale) for p in array.parts))


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else float(value)
