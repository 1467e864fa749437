"""Statistics of a layer's input, gathered by streaming over calibration batches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


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

        def by(value, factor):
            return None if value is None else value * factor

        return Statistics(
            count=self.count,
            hessian=by(self.hessian, scale[..., :, None] * scale[..., None, :]),
            absmax=by(self.absmax, scale),
            abssum=by(self.abssum, scale),
            sumsq=by(self.sumsq, scale**2),
            minimum=by(self.minimum, scale),
            maximum=by(self.maximum, scale),
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
    start = {
        "hessian": lambda: jnp.zeros((*vector, in_size), jnp.float32),
        "absmax": lambda: jnp.zeros(vector, jnp.float32),
        "abssum": lambda: jnp.zeros(vector, jnp.float32),
        "sumsq": lambda: jnp.zeros(vector, jnp.float32),
        "minimum": lambda: jnp.full(vector, jnp.inf, jnp.float32),
        "maximum": lambda: jnp.full(vector, -jnp.inf, jnp.float32),
    }
    return Statistics(jnp.zeros(stack, jnp.float32), **{f: start[f]() for f in sorted(wanted)})


def update(statistics: Statistics, x: jax.Array, weight: jax.Array | None = None) -> Statistics:
    """Adds tokens to statistics.

    Args:
      statistics: what ``init`` or an earlier ``update`` returned.
      x: ``(*stack, tokens, in)`` inputs, any float dtype.
      weight: optional bool ``(*stack, tokens)``, False for tokens that do not count (padding of
        ragged expert groups).

    Returns:
      The statistics of all tokens so far.
    """
    x = x.astype(jnp.float32)
    low, high = x, x
    count = jnp.asarray(x.shape[-2], jnp.float32)
    if weight is not None:
        keep = weight[..., None]
        low, high = jnp.where(keep, x, jnp.inf), jnp.where(keep, x, -jnp.inf)
        x = jnp.where(keep, x, 0.0)
        count = weight.sum(-1).astype(jnp.float32)
    s = statistics

    def combine(old, op, new):
        return None if old is None else op(old, new())

    add = lambda a, b: a + b  # noqa: E731
    return Statistics(
        count=s.count + count,
        hessian=combine(
            s.hessian,
            add,
            lambda: jnp.einsum("...ti,...tj->...ij", x, x, precision=jax.lax.Precision.HIGHEST),
        ),
        absmax=combine(s.absmax, jnp.maximum, lambda: jnp.abs(x).max(-2)),
        abssum=combine(s.abssum, add, lambda: jnp.abs(x).sum(-2)),
        sumsq=combine(s.sumsq, add, lambda: (x * x).sum(-2)),
        minimum=combine(s.minimum, jnp.minimum, lambda: low.min(-2)),
        maximum=combine(s.maximum, jnp.maximum, lambda: high.max(-2)),
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
