"""The leaves of a result, each put together from the finished records of its weight."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import folding
from jaxcomp.formats import CompressedArray
from jaxcomp.formats.assemble import stack_arrays
from jaxcomp.graph import Graph
from jaxcomp.io.later import Later
from jaxcomp.io.stacked import Stacked
from jaxcomp.records import Index, Record, Store

_STACK = ("stack",)  # In place of an index: all slices of a weight, in one record.


class Assembly:
    """Makes the leaves of a result, in any order, with the channel scales of others folded in."""

    def __init__(
        self,
        graph: Graph,
        dense: Mapping[str, Any],
        records: Mapping[str, Mapping[Index, Record]],
        store: Store,
        finished: Callable[[Any], Any],
        step: Callable[[str, Callable[[], Any]], Any],
    ) -> None:
        """Takes what a run has found.

        Args:
          graph: the traced function.
          dense: leaves of the model by path.
          records: by path and index; those of the paths that were compressed.
          store: where records are read from that are not in memory.
          finished: brings arrays to where finished ones wait.
          step: does something on all processes, ``Together.step``.
        """
        self._graph, self._dense, self._records = graph, dense, records
        self._store, self._finished, self._step = store, finished, step
        self._folds: dict[str, list[tuple[Index, folding.Fold]]] = {}
        for found in records.values():
            for index, record in sorted(found.items()):
                for fold in record.folds:
                    target = self._folds.setdefault(fold.path, [])
                    target.append((index if fold.loops else (), fold))

    def leaf(self, path: str) -> Any:
        """The leaf at a path: compressed, or dense with what was folded into it."""
        if path in self._records:
            return self._compressed(path)
        leaf, layout = self._dense[path], self._graph.layouts.get(path)
        for index, fold in self._folds.get(path, ()):
            leaf = self._finished(folding.apply(leaf, layout, fold, index))
        return leaf

    def is_changed(self, path: str) -> bool:
        """Whether the leaf is not that of the model."""
        return path in self._records or path in self._folds

    def _compressed(self, path: str) -> CompressedArray:
        indices = sorted(self._records[path])
        if indices == [()]:
            return self._slice(path, ())
        if self._store.journal is None or self._store.streams:
            return self._stack(path, indices)

        def put() -> None:
            if self._store.get(path, _STACK) is None:
                self._store.put(path, _STACK, Record(self._stack(path, indices), [], {}, 0.0))

        # From slice to slice, on the disk: the stack is never in memory.
        self._step("stack " + path, put)
        return self._store.get(path, _STACK).array

    def _slice(self, path: str, index: Index) -> CompressedArray:
        """What was compressed at one position, times the scales of its rows."""
        array = self._records[path][index].array
        if self._store.streams:
            array = self._store.get(path, index, verify=False).array
        folds = self._folds.get(path, ())
        if not folds:
            return array
        before = jax.tree.map(lambda a: np.asarray(a) if isinstance(a, Later) else a, array)
        held = dict(zip(map(id, jax.tree.leaves(before)), jax.tree.leaves(array), strict=True))
        array = before
        for at, fold in folds:
            depth = min(len(at), len(index))
            # Where it is another slice's, rows are multiplied by one: so all keep equal shapes.
            here = at[:depth] == index[:depth]
            vector = jnp.asarray(fold.vector if here else np.ones_like(fold.vector))
            array = folding.scale_rows(array, at[depth:] if here else (), vector)
        array = self._finished(array)
        if self._store.journal is None:
            return array
        # What was not multiplied is in its file as it was.
        return jax.tree.map(lambda a: held[id(a)] if id(a) in held else np.asarray(a), array)

    def _stack(self, path: str, indices: Sequence[Index]) -> CompressedArray:
        layout = self._graph.layouts[path]
        sizes = layout.sizes(layout.stack_axes[: len(indices[0])])
        arrays = [self._slice(path, index) for index in indices]
        on_disk = self._store.journal is not None
        stack = functools.partial(_unmade, sizes=sizes) if on_disk else np.stack
        parts = jax.tree.map(
            lambda a: a if isinstance(a, Stacked) else a.reshape((*sizes, *a.shape[1:])),
            stack_arrays(arrays, stack).parts,
        )
        axes = (layout.stack_axes, layout.out_axes, layout.in_axes)
        return CompressedArray.from_matrix(parts, layout.leaf_shape, arrays[0].dtype, *axes)


def _unmade(leaves: Sequence[Any], sizes: Sequence[int]) -> Stacked:
    """Slices in the order of their indices, as a stack ``(*sizes, ..)`` that is not made."""
    for size in reversed(sizes[1:]):
        leaves = [Stacked(leaves[i : i + size]) for i in range(0, len(leaves), size)]
    return Stacked(leaves)
