"""Look-ups in compressed tables: only the rows that are asked for are dequantized."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import formats, matmul
from jaxcomp.graph.program import Op


def row_wise(op: Op, leaf: formats.CompressedArray) -> bool:
    """Whether a look-up's rows can be taken from the parts: a plain table ``(rows, features)``."""
    site, numbers = op.site, op.eqn.params["dimension_numbers"]
    view = site.view
    plain = view.axes == tuple((f,) for f in _leaf_factors(view)) and len(view.axes) == 2
    last = len(op.eqn.outvars[0].aval.shape) - 1
    return (
        plain
        and numbers.start_index_map == (0,)
        and numbers.offset_dims == (last,)
        and not site.batch_axes
        and not site.transposed
        and all(matmul.rows(part, None) for part in leaf.parts)
    )


def _leaf_factors(view: Any) -> list:
    gone = {f.axis for f in view.loops} | {f.axis for f, _ in view.fixed}
    whole = type(view).of(view.leaf_shape, view.dtype)
    return [a[0] for i, a in enumerate(whole.axes) if i not in gone]


def looked_up(op: Op, indices: jax.Array, weight: formats.CompressedArray) -> jax.Array:
    """The rows that a look-up asks for, dequantized; out of range as the equation's mode says.

    Args:
      op: a gather that ``row_wise`` accepts.
      indices: ``(.., 1)`` integers.
      weight: table ``(rows, features)``.

    Returns:
      ``(.., features)`` in the dtype of the equation's result.
    """
    params, aval = op.eqn.params, op.eqn.outvars[0].aval
    index = indices[..., 0]
    count = weight.parts[0].shape[-2]
    inside = (index >= 0) & (index < count)
    flat = jnp.clip(index, 0, count - 1).reshape(-1)
    rows = weight.replace(parts=tuple(matmul.rows(part, flat) for part in weight.parts))
    values = rows.matrix().reshape(*index.shape, -1).astype(aval.dtype)
    if params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        fill = params["fill_value"]
        values = jnp.where(inside[..., None], values, jnp.nan if fill is None else fill)
    return values.astype(aval.dtype)
