"""A stack of matrices that goes through the steps of a recipe one matrix after the other.

The experts of a layer are one weight, the largest there is. A step that treats each matrix of a
stack by itself (``Step.by_matrix``) need not see all: so what it computes with, a float32 copy, the
codes, a Hessian for each expert, is there for one expert at a time, and only the result is whole.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxcomp import host
from jaxcomp.formats import CompressedArray, Dense
from jaxcomp.formats.assemble import stack_arrays
from jaxcomp.step import Error, Layer, Step

# Elements from which on a matrix is worth a turn of its own.
SMALLEST = 2**16


def can_be_taken_apart(shapes: Sequence[Sequence[int]], steps: Sequence[Step]) -> bool:
    """Whether the weights of an input group can go through steps by slices of their stack.

    Args:
      shapes: ``(*stack, out, in)`` of each.
      steps: what is to be applied to any of them.

    Returns:
      True if they have a stack, the same for all (a scale that they share is then one for each
      slice), of matrices that are worth it, and no step looks at several.
    """
    stacks = {tuple(shape[:-2]) for shape in shapes}
    if len(stacks) != 1 or stacks == {()}:
        return False
    if any(np.prod(shape[1:]) < SMALLEST for shape in shapes):
        return False
    return all(step.by_matrix() for step in steps)


def one_by_one(
    layers: Sequence[Layer],
    slice_of: Callable[[int], tuple[Layer, ...]],
    steps: Callable[[tuple[Layer, ...]], tuple[Layer, ...]],
    room: Callable[[tuple[int, ...], Any], np.ndarray] = host.empty,
) -> tuple[Layer, ...]:
    """Applies steps to the slices of an input group's stack, in turn.

    Args:
      layers: the whole weights, of one stack; they are not read.
      slice_of: gives the layers at a position along the stack's leading axis.
      steps: applied to these.
      room: gives an array of a shape and dtype in which the results grow.

    Returns:
      The whole layers with the parts, scale and metrics that the steps found.
    """
    count = layers[0].shape[0]
    grown = [_Growing(count, room) for _ in layers]
    for k in range(count):
        for found, layer in zip(grown, steps(slice_of(k)), strict=True):
            found.add(layer)
    return tuple(found.whole(layer) for found, layer in zip(grown, layers, strict=True))


def parts_of(layer: Layer) -> tuple[Any, ...]:
    """What holds a layer's weight after all steps: dense where none made parts of it."""
    if layer.parts is not None:
        return layer.parts
    return (Dense(layer.weight.astype(layer.original_dtype)),)


class _Growing:
    """What became of the slices of one weight, put together as they come."""

    def __init__(self, count: int, room: Callable[[tuple[int, ...], Any], np.ndarray]) -> None:
        self._count, self._make = count, room
        self._slices: list[tuple[CompressedArray, Any]] = []
        self._metrics: list[dict] = []
        self._room: list[np.ndarray] = []
        self._activation: Any = None

    def add(self, layer: Layer) -> None:
        """Takes the next slice."""
        *stack, _, _ = layer.shape
        axes = tuple(range(len(stack))), (len(stack),), (len(stack) + 1,)
        array = CompressedArray.from_matrix(
            parts_of(layer), layer.shape, layer.original_dtype, *axes
        )
        self._slices.append(self._kept((array, layer.input_scale)))
        self._metrics.append(layer.metrics)
        self._activation = layer.activation

    def _kept(self, tree: Any) -> Any:
        """The same arrays, in the memory of the stack where all slices are equal so far."""
        leaves, structure = jax.tree.flatten(tree)
        position = len(self._slices)
        if not self._slices:
            self._structure = structure
            self._room = [self._make((self._count, *a.shape), a.dtype) for a in leaves]
        fits = structure == self._structure and [a.shape[1:] for a in self._room] == [
            a.shape for a in leaves
        ]
        if not fits:
            self._room = []
            return tree
        for room, leaf in zip(self._room, leaves, strict=True):
            room[position] = leaf
        return jax.tree.unflatten(structure, [room[position] for room in self._room])

    def whole(self, layer: Layer) -> Layer:
        """The layer of all slices."""
        if self._room:
            array, scale = jax.tree.unflatten(self._structure, host.to_device(self._room))
        else:  # Outlier columns, kept values: of another number in each.
            arrays, scales = zip(*self._slices, strict=True)
            array = host.to_device(stack_arrays([jax.tree.map(np.asarray, a) for a in arrays]))
            scale = None if scales[0] is None else host.to_device(np.stack(scales))
        return layer.replace(
            parts=array.parts,
            input_scale=scale,
            activation=self._activation,
            metrics=combined(self._metrics),
            statistics=None,
        )


def combined(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics of a stack from those of its slices, which have the same names.

    Args:
      metrics: of each slice: errors are of the whole stack's output, dampings the largest, anything
        else the mean.

    Returns:
      By name.
    """
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for m in metrics for name in m):
        values = [m[name] for m in metrics if name in m]
        if name == "error" and all(isinstance(v, Error) for v in values):
            found[name] = Error.of_all(values)
        else:
            found[name] = max(values) if name == "damping" else float(np.mean(values))
    return found
