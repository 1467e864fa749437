"""Multiplying a channel scale into the parameters that make the channels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import formats
from jaxcomp.formats import CompressedArray
from jaxcomp.graph import Layout


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
    factor = factor.at[index[: len(stack)]].set(vector)
    return array.replace(parts=tuple(p.scale_rows(factor) for p in array.parts))


def scale_leaf_rows(leaf: Any, layout: Layout, index: tuple, vector: Any) -> np.ndarray:
    """A dense linear layer with its rows multiplied; arguments as of ``scale_rows``."""
    leaf = np.array(leaf)
    order = (*layout.stack_axes, *layout.out_axes, *layout.in_axes)
    moved = leaf.transpose(order)
    sizes = layout.sizes(layout.out_axes)
    factor = np.asarray(vector, np.float64).reshape(sizes + (1,) * len(layout.in_axes))
    moved[index] = (moved[index].astype(np.float64) * factor).astype(leaf.dtype)
    return leaf


def scale_vector(leaf: Any, index: tuple, axis: int, vector: Any) -> np.ndarray:
    """A gain or bias times a vector, at one position of the loops; its loop axes lead."""
    leaf = np.array(leaf)
    shape = [1] * (leaf.ndim - len(index))
    shape[axis - len(index)] = -1
    factor = np.asarray(vector, np.float64).reshape(shape)
    leaf[index] = (leaf[index].astype(np.float64) * factor).astype(leaf.dtype)
    return leaf
