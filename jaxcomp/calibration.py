"""Statistics of a layer's input, gathered by streaming over calibration batches."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import host
from jaxcomp.triangle import Triangle

# Rows of a Hessian on the host that are computed at a time.
_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Hessians:
    """The Hessians of a stack, each computed when it is asked for, and by whoever asked let go.

    Attributes:
      read: gives one, ``(*stack[1:], in, in)``, by its position along the leading axis.
      shape: of all, ``(*stack, in, in)``.
    """

    read: Callable[[int], np.ndarray]
    shape: tuple[int, ...]

    def __getitem__(self, k: int) -> np.ndarray:
        """The Hessian at position ``k``."""
        return self.read(k)


@dataclasses.dataclass(frozen=True, eq=False)
class Unsummed:
    """A Hessian that is summed for each who asks for it, and theirs to overwrite.

    Attributes:
      read: sums it.
      shape: ``(in, in)``.
    """

    read: Callable[[], Triangle]
    shape: tuple[int, int]

    def whole(self) -> np.ndarray:
        """The Hessian, of NumPy, symmetric to the bit."""
        return self.read().whole()


class Statistics(NamedTuple):
    """Sums over tokens of what algorithms ask of a layer's input; fields not asked for are None.

    Attributes:
      count: ``(*stack,)`` float32, tokens seen.
      hessian: ``(*stack, in, in)`` float32, sum over tokens of x xᵀ, symmetric to the bit. It may
        be the largest array there is; of NumPy and writeable it belongs to the layers of one input
        group, and a step may compute in its memory if it puts back what was there. Of a stack that
        is compressed matrix by matrix, ``Hessians``; for a step that says so, ``Unsummed``.
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
        rest = self._replace(hessian=None)
        if isinstance(self.hessian, Unsummed):
            return self._replace(hessian=self.hessian.whole()).scaled(scale)
        if isinstance(self.hessian, np.ndarray) and host.is_on_host(scale):
            hessian = _scaled_on_host(self.hessian, np.asarray(scale))
            return host.call(_scaled, rest, scale)._replace(hessian=hessian)
        return host.call(_scaled, self, scale)


def _scaled_on_host(hessian: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The same numbers as ``_scaled`` without a matrix of the factors."""
    *stack, size = np.broadcast_shapes(scale.shape, hessian.shape[:-1])
    out = host.empty((*stack, size, size), hessian.dtype)
    for start in range(0, size, _ROWS):
        rows = slice(start, start + _ROWS)
        np.multiply(scale[..., rows, None], scale[..., None, :], out=out[..., rows, :])
        out[..., rows, :] *= hessian[..., rows, :]
    return out


def _scaled(s: Statistics, scale: jax.Array) -> Statistics:
    def by(value, factor):
        return None if value is None else value * factor

    return Statistics(
        count=s.count,
        hessian=None
        if s.hessian is None
        else s.hessian * (scale[..., :, None] * scale[..., None, :]),
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
      Statistics over zero tokens, NumPy arrays.
    """
    wanted = {field for need in needs for field in FIELDS[need]}
    vector = (*stack, in_size)
    start = {"minimum": np.inf, "maximum": -np.inf}
    shape = {"hessian": (*vector, in_size), "count": stack}

    def full(field):
        # JAX takes it without a copy.
        array = host.empty(shape.get(field, vector), np.float32)
        array.fill(start.get(field, 0))
        return array

    return Statistics(**{field: full(field) for field in ("count", *sorted(wanted))})


def update(
    statistics: Statistics,
    x: jax.Array,
    weight: jax.Array | None = None,
    in_place: bool = False,
) -> Statistics:
    """Adds tokens to statistics.

    Args:
      statistics: what ``init`` or an earlier ``update`` returned.
      x: ``(*stack, tokens, in)`` inputs, any float dtype, of JAX or NumPy; the result is of the
        same library.
      weight: optional bool ``(*stack, tokens)``, False for tokens that do not count (padding of
        ragged expert groups).
      in_place: with NumPy, add to the given Hessian in its own memory, if it may be written to.

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
        return old + new

    hessian = s.hessian
    if hessian is not None and xp is np:
        hessian = hessian if in_place and hessian.flags.writeable else np.array(hessian)
        _add_gram(hessian, x)
    elif hessian is not None:
        exact = jax.lax.Precision.HIGHEST
        hessian = hessian + jnp.einsum("...ti,...tj->...ij", x, x, precision=exact)
    return Statistics(
        count=s.count + count,
        hessian=hessian,
        absmax=combine(s.absmax, xp.maximum, lambda: abs(x).max(-2)),
        abssum=combine(s.abssum, add, lambda: abs(x).sum(-2)),
        sumsq=combine(s.sumsq, add, lambda: (x * x).sum(-2)),
        minimum=combine(s.minimum, xp.minimum, lambda: low.min(-2)),
        maximum=combine(s.maximum, xp.maximum, lambda: high.max(-2)),
    )


def _add_gram(total: np.ndarray, x: np.ndarray) -> None:
    """Adds Xᵀ X of ``(*stack, tokens, in)`` to a symmetric matrix, some rows at a time.

    Only what is right of the diagonal is computed: half of the work, and symmetric to the bit.
    """
    for start in range(0, x.shape[-1], _ROWS):
        rows, after = slice(start, start + _ROWS), slice(start + _ROWS, None)
        total[..., rows, start:] += np.matmul(x[..., rows].swapaxes(-1, -2), x[..., start:])
        corner = total[..., rows, rows]
        corner[...] = np.triu(corner) + np.triu(corner, 1).swapaxes(-1, -2)
        total[..., after, rows] = total[..., rows, after].swapaxes(-1, -2)


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
