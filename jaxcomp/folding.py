"""Multiplying a channel scale into the parameters that make the channels."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import formats, host
from jaxcomp.formats import CompressedArray, is_compressed
from jaxcomp.graph import Layout


@dataclasses.dataclass(frozen=True)
class Fold:
    """A channel scale that moves into a parameter.

    Attributes:
      path: name of the parameter.
      kind: "vector" or "rows", see ``graph.coupling.Target``.
      axis: for vectors, the axis of the leaf that holds the channels.
      loops: axes of the leaf over which the scans run that enclose producer and consumer.
      vector: what to multiply by.
    """

    path: str
    kind: str
    axis: int
    loops: tuple[int, ...]
    vector: Any


def rows_scale_exactly(array: CompressedArray) -> bool:
    """Whether multiplying rows rounds nothing but float32 values or scales."""
    if len(array.parts) != 1:
        return False
    part = array.parts[0]
    while isinstance(part, (formats.InputScale, formats.InputQuant)):
        part = part.part
    held = {formats.Affine: "scale", formats.Dense: "values"}.get(type(part))
    return held is not None and getattr(part, held).dtype == jnp.float32


def scale_rows(array: CompressedArray, index: tuple, vector: jax.Array) -> CompressedArray:
    """A compressed linear layer with its rows multiplied.

    Args:
      array: the whole weight.
      index: position along its leading stack axes.
      vector: ``(out,)``.

    Returns:
      The weight.
    """
    stack = array.stack
    factor = jnp.ones((*stack, vector.shape[-1]), jnp.float32)
    factor = factor.at[index].set(vector)
    return array.replace(parts=tuple(p.scale_rows(factor) for p in array.parts))


def scale_leaf_rows(leaf: Any, layout: Layout, index: tuple, vector: Any) -> np.ndarray:
    """A dense linear layer with its rows multiplied; arguments as of ``scale_rows``."""
    leaf = np.array(host.fetch(leaf))
    order = (*layout.stack_axes, *layout.out_axes, *layout.in_axes)
    moved = leaf.transpose(order)
    sizes = layout.sizes(layout.out_axes)
    factor = np.asarray(vector, np.float64).reshape(sizes + (1,) * len(layout.in_axes))
    moved[index] = (moved[index].astype(np.float64) * factor).astype(leaf.dtype)
    return leaf


def scale_vector(leaf: Any, fold: Fold, index: tuple) -> np.ndarray:
    """A gain or bias with its channels multiplied.

    Args:
      leaf: the whole leaf.
      fold: which axes of it hold the channels and the loops.
      index: position along the loops.

    Returns:
      The leaf.
    """
    leaf = np.array(host.fetch(leaf))
    at = dict(zip(fold.loops, index, strict=True))
    where = tuple(at.get(a, slice(None)) for a in range(leaf.ndim))
    left = [a for a in range(leaf.ndim) if a not in at]
    factor = np.asarray(fold.vector, np.float64).reshape(
        [-1 if a == fold.axis else 1 for a in left]
    )
    leaf[where] = (leaf[where].astype(np.float64) * factor).astype(leaf.dtype)
    return leaf


def apply(leaf: Any, layout: Layout | None, fold: Fold, index: tuple) -> Any:
    """A parameter with a fold multiplied in.

    Args:
      leaf: the parameter as it is so far, dense or compressed.
      layout: its canonical matrix, for linear layers.
      fold: what to multiply.
      index: position of the fold's consumer along the loops.

    Returns:
      The parameter.
    """
    index = index if fold.loops else ()
    if fold.kind == "vector":
        return scale_vector(leaf, fold, index)
    if is_compressed(leaf):
        return scale_rows(leaf, index, jnp.asarray(fold.vector))
    return scale_leaf_rows(leaf, layout, index, fold.vector)
