"""What the losses share: masks, reductions, dtypes, and logarithms that survive masked entries."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.errors import JaxcompError


def is_concrete(*values: Any) -> bool:
    """Whether values can be looked at here: not traced, and not on other hosts.

    Args:
      *values: arrays or numbers; None is passed over.

    Returns:
      False when one of them cannot.
    """
    return not any(
        isinstance(v, jax.core.Tracer) or not getattr(v, "is_fully_addressable", True)
        for v in values
    )


def as_floats(**arrays: Any) -> list[jax.Array]:
    """Brings arrays to one dtype that is wide enough to compute in.

    Args:
      **arrays: floating arrays by the name that a message calls them.

    Returns:
      The arrays, in float64 when one of them is, in float32 otherwise.

    Raises:
      JaxcompError: one of them is not floating.
    """
    for name, value in arrays.items():
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise JaxcompError(
                f"{name.replace('_', ' ')} {np.shape(value)} of dtype {jnp.result_type(value)}: "
                "a loss needs floating values; pass them before any rounding or argmax"
            )
    dtype = jnp.result_type(jnp.float32, *(jnp.result_type(v) for v in arrays.values()))
    return [jnp.asarray(v).astype(dtype) for v in arrays.values()]


def as_constant(teacher: jax.Array, stop_gradient: bool) -> jax.Array:
    """The teacher's value, without its gradient if so asked.

    Args:
      teacher: array.
      stop_gradient: whether gradients end here.

    Returns:
      The array.
    """
    return jax.lax.stop_gradient(teacher) if stop_gradient else teacher


def check_same_shape(student: Any, teacher: Any, what: str, hint: str) -> None:
    """Checks that two arrays can be compared entry by entry.

    Args:
      student: array.
      teacher: array.
      what: their name, for the message.
      hint: what to do about it, for the message.

    Raises:
      JaxcompError: their shapes differ.
    """
    if np.shape(student) != np.shape(teacher):
        raise JaxcompError(
            f"{what}: student {np.shape(student)} and teacher {np.shape(teacher)} must have the "
            f"same shape; {hint}"
        )


def check_axis(axis: int, ndim: int, what: str) -> int:
    """Checks an axis.

    Args:
      axis: may count from the end.
      ndim: number of axes there are.
      what: name of the array, for the message.

    Returns:
      The axis, counted from the start.

    Raises:
      JaxcompError: there is no such axis.
    """
    if not -ndim <= axis < ndim:
        raise JaxcompError(f"{what}: axis {axis} is not one of its {ndim} axes")
    return axis % ndim


def check_positive(name: str, value: Any) -> None:
    """Checks a number, unless it is traced.

    Args:
      name: the option.
      value: a number or scalar array.

    Raises:
      JaxcompError: it is not a finite number above zero.
    """
    if is_concrete(value) and not bool(np.all((np.asarray(value) > 0) & np.isfinite(value))):
        raise JaxcompError(f"{name} {value} must be a finite number above 0")


def as_mask(where: Any, shape: tuple[int, ...], what: str) -> jax.Array | None:
    """A mask brought to a shape.

    Args:
      where: bool, or 0 and 1, broadcastable to ``shape``; None means everywhere.
      shape: shape wanted.
      what: what is masked, for the message.

    Returns:
      A bool array of that shape, or None.

    Raises:
      JaxcompError: the mask does not broadcast.
    """
    if where is None:
        return None
    where = jnp.asarray(where)
    try:
        fits = np.broadcast_shapes(where.shape, shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise JaxcompError(
            f"where {where.shape} does not broadcast to {tuple(shape)}, the shape of {what}"
        )
    return jnp.broadcast_to(where.astype(bool), shape)


def entry_mask(where: Any, shape: tuple[int, ...], axis: int) -> jax.Array | None:
    """The mask of logits that a mask of positions or of entries stands for.

    Args:
      where: bool, or 0 and 1, broadcastable to the positions, or with as many axes as the logits
        and broadcastable to them; None means everywhere.
      shape: of the logits.
      axis: of the vocabulary, counted from the start.

    Returns:
      A bool array of that shape, or None.

    Raises:
      JaxcompError: the mask does not fit.
    """
    if where is None:
        return None
    if np.ndim(where) == len(shape) - 1:
        mask = as_mask(where, shape[:axis] + shape[axis + 1 :], "a loss")
        return jnp.broadcast_to(jnp.expand_dims(mask, axis), shape)
    if np.ndim(where) != len(shape):
        raise JaxcompError(
            f"where {np.shape(where)} must have the axes of a loss ({len(shape) - 1}, positions "
            f"that count) or of the logits ({len(shape)}, vocabulary entries that count), logits "
            f"{tuple(shape)}"
        )
    return as_mask(where, shape, "the logits")


def masked_mean(
    values: jax.Array,
    where: jax.Array | None = None,
    axis: int | tuple[int, ...] | None = None,
) -> jax.Array:
    """Mean over the entries that count; 0, with gradients of 0, where none does.

    Args:
      values: array, for instance losses ``(batch, positions)``.
      where: bool, or 0 and 1, broadcastable to ``values``: True where an entry counts.
      axis: axes to reduce, all by default.

    Returns:
      The mean, in float32 at least. Entries that do not count may be NaN.

    Raises:
      JaxcompError: the mask does not broadcast to the values.

    Example:
      >>> float(masked_mean(jnp.array([1.0, 3.0, 100.0]), jnp.array([True, True, False])))
      2.0
      >>> float(masked_mean(jnp.array([1.0]), jnp.array([False])))
      0.0
    """
    (values,) = as_floats(values=values)
    return _masked_mean(values, as_mask(where, values.shape, "the values"), axis)


@functools.partial(jax.jit, static_argnums=2)
def _masked_mean(values, where, axis):
    if where is None:
        where = jnp.ones(values.shape, bool)
    count = jnp.sum(where, axis=axis).astype(values.dtype)
    return jnp.sum(jnp.where(where, values, 0), axis=axis) / jnp.maximum(count, 1)


@functools.partial(jax.jit, static_argnames="axis")
def logsumexp(z: jax.Array, valid: jax.Array, axis: int = -1) -> jax.Array:
    """Log of the sum of exponentials of the entries that count.

    Args:
      z: array; entries that do not count may be anything.
      valid: bool, like ``z``.
      axis: axis to reduce.

    Returns:
      The logarithm with ``axis`` kept as 1; -inf, without a gradient, where no entry counts.
    """
    top = jax.lax.stop_gradient(jnp.max(jnp.where(valid, z, -jnp.inf), axis=axis, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0)
    powers = jnp.where(valid, jnp.exp(jnp.where(valid, z, top) - top), 0)
    some = jnp.any(valid, axis=axis, keepdims=True)
    total = jnp.where(some, jnp.sum(powers, axis=axis, keepdims=True), 1)
    return jnp.where(some, jnp.log(total) + top, -jnp.inf)


@functools.partial(jax.jit, static_argnames="axis")
def log_softmax(z: jax.Array, where: jax.Array | None = None, axis: int = -1) -> jax.Array:
    """Log probabilities of the entries that count and are not -inf.

    Args:
      z: logits.
      where: bool, like ``z``; None is everywhere.
      axis: axis of the distribution.

    Returns:
      Log probabilities; -inf, without a gradient, for the entries left out.
    """
    valid = z != -jnp.inf  # NaN counts, so that it is seen
    if where is not None:
        valid &= where
    log_total = logsumexp(z, valid, axis)
    log_total = jnp.where(log_total == -jnp.inf, 0, log_total)
    return jnp.where(valid, jnp.where(valid, z, 0) - log_total, -jnp.inf)


@functools.partial(jax.jit, static_argnames="axis")
def expectation(log_p: jax.Array, values: jax.Array, axis: int = -1) -> jax.Array:
    """Sum over i of p_i values_i, where 0 times infinity is 0.

    Args:
      log_p: log probabilities, -inf for entries left out.
      values: like ``log_p``.
      axis: axis of the distribution.

    Returns:
      The sum; infinite, without a gradient from there, where a value with p_i > 0 is.
    """
    p, counts, infinite = jnp.exp(log_p), log_p != -jnp.inf, jnp.isinf(values)
    total = jnp.sum(p * jnp.where(counts & ~infinite, values, 0), axis=axis)
    beyond = jnp.where(counts & infinite & (p > 0), values, 0)
    return total + jax.lax.stop_gradient(jnp.sum(beyond, axis=axis))


@functools.partial(jax.jit, static_argnames="axis")
def relative_entropy(log_p: jax.Array, log_q: jax.Array, axis: int = -1) -> jax.Array:
    """KL(p || q) of distributions given by their log probabilities.

    Args:
      log_p: log probabilities, -inf for entries left out.
      log_q: like ``log_p``.
      axis: axis of the distribution.

    Returns:
      The divergence in nats; 0 where nothing counts, infinite where q excludes what p has.
    """
    return expectation(log_p, jnp.where(log_p == -jnp.inf, 0, log_p) - log_q, axis)


@functools.partial(jax.jit, static_argnames="axis")
def unit(x: jax.Array, axis: int = -1) -> jax.Array:
    """Vectors divided by their length, at any scale; 0 stays 0.

    Args:
      x: array.
      axis: axis of the vectors.

    Returns:
      Vectors of length 1, or 0.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
    x = x / jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    square = jnp.sum(x * x, axis=axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square > 0, square, 1))


def zero_outside(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Features with those of padded positions set to 0, so that no NaN comes from there.

    Args:
      x: ``(..., width)``.
      mask: bool ``(...)``, or None.

    Returns:
      The features.
    """
    return x if mask is None else jnp.where(mask[..., None], x, 0)
