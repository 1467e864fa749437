"""Sums over units: rows, columns, neurons or heads, within one array or across coupled arrays."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.errors import JaxcompError


class Units(NamedTuple):
    """Where the units of an array lie.

    Attributes:
      axes: the axis, or axes, that index units; all others belong to one unit. A stacked array's
        layer axis is among them: (0, -1).
      block_size: consecutive indices of the last of these axes that make one unit, as the size of
        a head.
    """

    axes: int | tuple[int, ...]
    block_size: int = 1


def as_units(units: Any) -> Units:
    """An axis, several axes, or ``Units`` as ``Units``."""
    return units if isinstance(units, Units) else Units(units)


def _split(shape: tuple[int, ...], units: Units, path: str = "") -> tuple[tuple, tuple, tuple]:
    """The shape with the block axis apart, the axes of it to reduce, and the shape of the units."""
    given = (units.axes,) if isinstance(units.axes, int) else tuple(units.axes)
    where = f"{path} " if path else ""
    if not given or any(not -len(shape) <= a < len(shape) for a in given):
        raise JaxcompError(f"{where}{tuple(shape)}: there are no unit axes {units.axes}")
    axes = tuple(a % len(shape) for a in given)
    last, block = axes[-1], units.block_size
    if len(set(axes)) != len(axes) or tuple(sorted(axes)) != axes:
        raise JaxcompError(f"{where}{tuple(shape)}: unit axes {units.axes} must be in order")
    if block < 1 or shape[last] % block:
        raise JaxcompError(
            f"{where}{tuple(shape)}: units of {block} do not divide axis {last} of size "
            f"{shape[last]}; use a block_size that divides it"
        )
    split = (*shape[:last], shape[last] // block, block, *shape[last + 1 :])
    keep = axes
    reduced = tuple(a for a in range(len(split)) if a not in keep)
    return split, reduced, tuple(split[a] for a in keep)


def unit_shape(shape: tuple[int, ...], units: Any, path: str = "") -> tuple[int, ...]:
    """Shape of the units of an array.

    Args:
      shape: shape of the array.
      units: an axis, axes, or ``Units``.
      path: name of the array, for messages.

    Returns:
      One size for each unit axis.

    Raises:
      JaxcompError: there are no such axes, or blocks do not divide.

    Example:
      >>> unit_shape((64, 48), Units(-1, block_size=16))
      (3,)
    """
    return _split(tuple(shape), as_units(units), path)[2]


def unit_size(shape: tuple[int, ...], units: Any) -> int:
    """Weights of one unit in an array of a shape."""
    return math.prod(shape) // max(1, math.prod(unit_shape(shape, units)))


def unit_sum(x: jax.Array, units: Any) -> jax.Array:
    """Sums an array over each unit.

    Args:
      x: any shape.
      units: an axis, axes, or ``Units``.

    Returns:
      One sum a unit, at least float32.

    Raises:
      JaxcompError: there are no such axes, or blocks do not divide.

    Example:
      >>> unit_sum(jnp.ones((3, 4)), Units(-1, block_size=2)).tolist()
      [6.0, 6.0]
    """
    split, reduced, _ = _split(x.shape, as_units(units))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return x.reshape(split).sum(reduced, dtype=wide)


def spread(values: jax.Array, shape: tuple[int, ...], units: Any) -> jax.Array:
    """Gives each weight the value of its unit.

    Args:
      values: one value a unit.
      shape: shape of the array.
      units: an axis, axes, or ``Units``.

    Returns:
      Array of the shape.

    Example:
      >>> spread(jnp.array([1, 2]), (1, 4), Units(-1, block_size=2)).tolist()
      [[1, 1, 2, 2]]
    """
    split, reduced, _ = _split(tuple(shape), as_units(units))
    return jnp.broadcast_to(jnp.expand_dims(values, reduced), split).reshape(shape)


def unit_norms(arrays: Any, units: Any) -> jax.Array:
    """The l2 norm of all the weights of each unit, across coupled arrays.

    Args:
      arrays: an array, or a sequence of arrays that share their units: a neuron's column of the
        first weight, its bias and its row of the second.
      units: an axis, axes or ``Units`` for each array.

    Returns:
      ``(units,)`` norms.

    Raises:
      JaxcompError: the arrays have different numbers of units.

    Example:
      >>> up, bias, down = jnp.ones((2, 3)), jnp.zeros(3), jnp.ones((3, 2))
      >>> unit_norms([up, bias, down], [-1, -1, -2]).tolist()
      [2.0, 2.0, 2.0]
    """
    if hasattr(arrays, "shape"):
        arrays, units = [arrays], [units]
    check_coupled([a.shape for a in arrays], units)
    wide = [a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in arrays]
    return jnp.sqrt(sum(unit_sum(a**2, u) for a, u in zip(wide, units, strict=True)))


def check_coupled(shapes: Any, units: Any, names: Any = None) -> tuple[int, ...]:
    """Checks that arrays have the same units.

    Args:
      shapes: shapes of the arrays.
      units: an axis, axes or ``Units`` for each.
      names: names of the arrays, for the message.

    Returns:
      The common shape of the units.

    Raises:
      JaxcompError: they differ.
    """
    names = names or [f"array {i}" for i in range(len(shapes))]
    if len(shapes) != len(units):
        raise JaxcompError(f"{len(shapes)} coupled arrays need a unit axis each, got {len(units)}")
    found = [unit_shape(s, u, n) for s, u, n in zip(shapes, units, names, strict=True)]
    if len(set(found)) != 1:
        listed = ", ".join(
            f"{n} {tuple(s)} has {f}" for n, s, f in zip(names, shapes, found, strict=True)
        )
        raise JaxcompError(f"coupled arrays must have the same units: {listed}; correct the axes")
    return found[0]
