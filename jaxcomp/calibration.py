"""Statistics of a layer's input, gathered by streaming over calibration batches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import host


class Statistics(NamedTuple):
    """Sums over tokens of what algorithms ask of a layer's input; fields not asked for are None.

    Attributes:
      count: ``(*stack,)`` float32, tokens seen.
      hessian: ``(*stack, in, in)`` float32, sum over tokens of x xᵀ.
      absmax: ``(*stack, in)`` largest magnitude.
      abssum: ``(*stack, in)`` sum of magnitudes.
      sumsq: ``(*stack, in)`` sum of squares.
      minimum: ``(*stack, in)`` smallest value.
      maximum: ``(*stack, in)`` largest value.
    """

    count: jax.Array
    hessian: jax.Array | None = None
    absmax: jax.Array | None = None
    abssum: jax.Array | None = None
    sumsq: jax.Array | None = None
    minimum: jax.Array | None = None
    maximum: jax.Array | None = None

    def scaled(self, scale: jax.Array) -> "Statistics":
        """Statistics of ``x * scale``, for a positive per-channel ``scale (*stack, in)``."""
        return host.call(_scaled, self, scale)


def _scaled(s: Statistics, scale: jax.Array) -> Statistics:
    def by(value, factor):
        return None if value is None else value * factor

    return Statistics(
        count=s.count,
        hessian=by(s.hessian, scale[..., :, None] * scale[..., None, :]),
        absmax=by(s.absmax, scale),
        abssum=by(s.abssum, scale),
        sumsq=by(s.sumsq, scale**2),
        minimum=by(s.minimum, scale),
        maximum=by(s.maximum, scale),
    )


FIELDS = {
    "hessian": ("hessian",),
    "absmax": ("absmax",),
    "absmean": ("abssum",),
    "sumsq": ("sumsq",),
    "range": ("minimum", "maximum"),
}


def init(in_size: int, needs: frozenset[str], stack: tuple[int, ...] = ()) -> Statistics:
    """Empty statistics of a layer with ``in_size`` inputs that hold what ``needs`` names.

    Args:
      in_size: length of the contracted axis.
      needs: names out of ``FIELDS``.
      stack: leading axes (experts) that have statistics of their own.

    Returns:
      Statistics over zero tokens.
    """
    wanted = {field for need in needs for field in FIELDS[need]}
    vector = (*stack, in_size)
    start = {"minimum": np.inf, "maximum": -np.inf}
    shape = {"hessian": (*vector, in_size), "count": stack}
    return host.to_device(
        Statistics(
            **{
                field: np.full(shape.get(field, vector), start.get(field, 0), np.float32)
                for field in ("count", *sorted(wanted))
            }
        )
    )


def update(statistics: Statistics, x: jax.Array, weight: jax.Array | None = None) -> Statistics:
    """Adds tokens to statistics.

    Args:
      statistics: what ``init`` or an earlier ``update`` returned.
      x: ``(*stack, tokens, in)`` inputs, any float dtype, of JAX or NumPy; the result is of the
        same library.
      weight: optional bool ``(*stack, tokens)``, False for tokens that do not count (padding of
        ragged expert groups).

    Returns:
      The statistics of all tokens so far.
    """
    xp = np if isinstance(x, np.ndarray) else jnp
    x = x.astype(xp.float32, copy=False)
    low, high = x, x
    count = xp.float32(x.shape[-2])
    if weight is not None:
        keep = weight[..., None]
        low, high = xp.where(keep, x, xp.inf), xp.where(keep, x, -xp.inf)
        x = xp.where(keep, x, 0.0)
        count = weight.sum(-1).astype(xp.float32)
    s = statistics

    def combine(old, op, new):
        return None if old is None else op(old, new())

    def add(old, new):
        # A Hessian may be the largest array there is: NumPy's takes the place of what is added.
        return np.add(old, new, out=new) if xp is np else old + new

    return Statistics(
        count=s.count + count,
        hessian=combine(s.hessian, add, lambda: _gram(x)),
        absmax=combine(s.absmax, xp.maximum, lambda: abs(x).max(-2)),
        abssum=combine(s.abssum, add, lambda: abs(x).sum(-2)),
        sumsq=combine(s.sumsq, add, lambda: (x * x).sum(-2)),
        minimum=combine(s.minimum, xp.minimum, lambda: low.min(-2)),
        maximum=combine(s.maximum, xp.maximum, lambda: high.max(-2)),
    )


def _gram(x: jax.Array) -> jax.Array:
    """Xᵀ X of ``(*stack, tokens, in)``."""
    if isinstance(x, np.ndarray):
        # NumPy sees that the result is symmetric, and does half of the work.
        size = x.shape[-1]
        return np.matmul(
            x.swapaxes(-1, -2), x, out=host.empty((*x.shape[:-2], size, size), x.dtype)
        )
    return jnp.einsum("...ti,...tj->...ij", x, x, precision=jax.lax.Precision.HIGHEST)


def total(parts: Statistics) -> Statistics:
    """Statistics of all tokens from those of parts of them.

    Args:
      parts: statistics with one more axis in front, over the parts.

    Returns:
      Sums added, extremes combined.

    Example:
      >>> total(Statistics(count=jnp.ones(2), absmax=jnp.array([[3.0], [4.0]]))).absmax.tolist()
      [4.0]
    """
    ops = {"absmax": jnp.max, "maximum": jnp.max, "minimum": jnp.min}
    return Statistics(
        **{
            name: None if x is None else ops.get(name, jnp.sum)(x, axis=0)
            for name, x in parts._asdict().items()
        }
    )


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Statistics of the tokens of both.

    Args:
      a: statistics.
      b: statistics with the same fields.

    Returns:
      Sums added, extremes combined.
    """
    ops = {"absmax": jnp.maximum, "maximum": jnp.maximum, "minimum": jnp.minimum}
    return Statistics(
        **{
            name: None if x is None else ops.get(name, jnp.add)(x, getattr(b, name))
            for name, x in a._asdict().items()
        }
    )
