"""What arguments must be, for all operations: arrays, numbers, integers, dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType


def is_traced(x: Any) -> bool:
    """Whether a number is known only when the program runs."""
    return isinstance(x, jax.core.Tracer)


def is_array(x: Any) -> bool:
    """Whether something has a shape and a dtype: an array, a tracer, or a shape of one."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def array(name: str, x: Any) -> None:
    """Refuses what is no array.

    Raises:
      TypeError: naming the argument and its type.

    Example:
      >>> array("bias", [1.0])
      Traceback (most recent call last):
      TypeError: bias is a list; it must be an array: use jnp.asarray
    """
    if not is_array(x):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be an array: use jnp.asarray")


def number(name: str, x: Any) -> float | jax.Array:
    """A number as a float, or as it is where it is traced.

    Raises:
      TypeError: it is no number.
      ValueError: it is an array of several.
    """
    if not isinstance(x, str):
        if np.shape(x):
            raise ValueError(f"{name} {np.shape(x)} must be one number")
        if is_traced(x):
            return x
        try:
            return float(x)
        except (TypeError, ValueError):
            pass
    raise TypeError(f"{name} is {x!r}; it must be a number")


def integer(name: str, x: Any, otherwise: str = "") -> int:
    """A Python or NumPy integer as a Python one; a bool is none.

    Args:
      name: of the argument.
      x: what was given.
      otherwise: what else it may be, for the message.

    Raises:
      TypeError: it is none.

    Example:
      >>> integer("group_size", np.int64(32))
      32
    """
    if isinstance(x, bool | np.bool_) or not isinstance(x, int | np.integer):
        raise TypeError(f"{name} is {x!r}; it must be an integer{otherwise}")
    return int(x)


def index(name: str, x: jax.Array | int, count: int, of: str) -> jax.Array:
    """An index as int32, counted from 0.

    Args:
      name: of the argument.
      x: from ``-count`` to ``count - 1``; an array is believed.
      count: how many there are.
      of: what they are, for the message.

    Raises:
      TypeError: it is no integer.
      ValueError: it is none of them.
    """
    if isinstance(x, jax.Array):
        if x.shape or not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{name} is {x.dtype}{x.shape}; it must be one integer")
        x = x.astype(jnp.int32)
        return jnp.where(x < 0, x + count, x)
    x = integer(name, x)
    if not -count <= x < count:
        raise ValueError(f"{name} is {x}, and {of}: it must be from 0 to {count - 1}")
    return jnp.asarray(x % count, jnp.int32)


def dtype(name: str, given: jax.typing.DTypeLike) -> str:
    """The name of a dtype.

    Raises:
      TypeError: it is none.
    """
    try:
        return jnp.dtype(given).name
    except TypeError:
        raise TypeError(f"{name} {given!r} is no dtype") from None


def out_dtype(given: jax.typing.DTypeLike) -> str:
    """The name of the dtype of a product's result.

    Raises:
      TypeError: it is none, or no float.
    """
    out = dtype("out_dtype", given)
    if not jnp.issubdtype(out, jnp.floating):
        raise TypeError(f"out_dtype is {out}; y is a float")
    return out


def in_parts(fields: str) -> str:
    """What to add to an error about a weight's shapes: inside a shard_map, why they may differ.

    Args:
      fields: those of the weight that are not split with its arrays.
    """
    if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return ""
    return (
        f"; inside a jax.shard_map arrays are a device's part, and {fields} must be, too: use "
        "dataclasses.replace(weight, ..) there, or call this outside with weight_spec="
    )
