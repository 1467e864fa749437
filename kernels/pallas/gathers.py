"""Gathers inside kernels for TPUs."""

import jax
import jax.numpy as jnp


def along(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """``jnp.take_along_axis`` with indices that count from the front and lie within the axis.

    Newer versions of JAX would otherwise wrap negative ones, which costs arithmetic, and widen
    those of 8 bits to 32, which Mosaic does not gather bytes by.

    Args:
      x: entries.
      index: integers of x's width, of x's shape but along ``axis``.
      axis: along which they are taken.

    Returns:
      Entries, of index's shape.
    """
    return jnp.take_along_axis(
        x, index, axis=axis, mode="promise_in_bounds", wrap_negative_indices=False
    )
