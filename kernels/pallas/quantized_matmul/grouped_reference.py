"""Products with the quantized weights of experts in plain JAX, forward and backward.

One expert after the other is made dense, and multiplies its own rows, a few at a time: how many
steps that takes is known only when it runs, so these are loops with bounds that are data. Rows of
a step that are not the expert's are computed and thrown away, at most one step's an expert.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxcomp.kernels.meshes import varied
from jaxcomp.kernels.quantized_matmul import reference, weights
from jaxcomp.kernels.quantized_matmul.reference import Options
from jaxcomp.kernels.quantized_matmul.weights import Weight

# Rows that one step multiplies, at most: beyond, a matrix product gains nothing from more.
_MOST_ROWS = 256


def matmul(
    x: jax.Array, bounds: jax.Array, weight: Weight, bias: jax.Array | None, options: Options
) -> jax.Array:
    """Multiplies the rows of each expert: y = activation(x W[e]ᵀ + bias[e]).

    Args:
      x: ``(M, K)``, bf16 or f32, sorted by expert.
      bounds: int32 ``(E + 1,)``: rows ``bounds[e]:bounds[e + 1]`` are those of expert e.
      weight: stored, with one stack axis of E experts.
      bias: ``(E, N)`` or None.
      options: what is fused.

    Returns:
      ``(M, N)``; rows of no expert are zeros.
    """

    def multiply(rows, expert):
        weight, w, bias = expert
        if w is None:
            return reference.matmul(rows, weight, bias, options)
        return reference.finish(reference.dot(rows, w, ((1,), (1,))), bias, options)

    def dense(weight, bias):
        # Quantized rows are multiplied by codes.
        simple = options.activation_dtype is None
        return weight, weights.dequantize(weight).astype(x.dtype) if simple else None, bias

    y = jnp.zeros((x.shape[0], weight.shape[0]), options.out_dtype)
    return _by_expert(x, bounds, weight, bias, y, dense, multiply)


def input_gradient(x: jax.Array, bounds: jax.Array, weight: Weight, dz: jax.Array) -> jax.Array:
    """Cotangent of x for z = x W[e]ᵀ; quantizing x passes it on as it is (straight through).

    Args:
      x: ``(M, K)``.
      bounds: int32 ``(E + 1,)``.
      weight: stored, with one stack axis of E experts.
      dz: f32 ``(M, N)``.

    Returns:
      ``(M, K)``; zeros for rows of no expert.
    """

    def multiply(rows, w):
        return reference.dot(rows, w, ((1,), (0,))).astype(x.dtype)

    def dense(weight, bias):
        del bias
        return weights.dequantize(weight).astype(x.dtype)

    dz = dz.astype(x.dtype)
    return _by_expert(dz, bounds, weight, None, jnp.zeros_like(x), dense, multiply)


def weight_gradients(
    x: jax.Array, bounds: jax.Array, weight: Weight, dz: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Cotangents of what the weights are made of.

    Args:
      x: ``(M, K)``.
      bounds: int32 ``(E + 1,)``.
      weight: stored, with one stack axis of E experts.
      dz: f32 ``(M, N)``.

    Returns:
      Cotangents of the scales and zeros, with the stack axis, and of the shared table.
    """
    size = _rows_of_a_step(x.shape[0], weight.stack[0])
    x, dz = _padded(x, size), _padded(dz.astype(x.dtype), size)

    def expert(dtable, part):
        weight, start, end = part

        def add(i, dw):
            mine, rows = _window(start + i * size, end, size, dz)
            of_x = jax.lax.dynamic_slice_in_dim(x, start + i * size, size)
            rows = jnp.where(mine, rows, jnp.zeros((), rows.dtype))
            # A row that is not the expert's may hold infinities.
            of_x = jnp.where(mine, of_x, jnp.zeros((), of_x.dtype))
            return dw + reference.dot(rows, of_x, ((0,), (0,)))

        steps = (end - start + size - 1) // size
        dw = varied(jnp.zeros(weight.shape, jnp.float32), dz)
        dw = jax.lax.fori_loop(0, steps, add, dw)
        dscales, dzeros, more = reference.part_gradients(weight, dw)
        return None if more is None else dtable + more, (dscales, dzeros)

    dtable = None if weight.table is None else jnp.zeros_like(weight.table)
    dtable, (dscales, dzeros) = _scan(expert, dtable, weight, bounds)
    return dscales, dzeros, dtable


def bias_gradient(bounds: jax.Array, dz: jax.Array) -> jax.Array:
    """Cotangent of the bias.

    Args:
      bounds: int32 ``(E + 1,)``.
      dz: f32 ``(M, N)``.

    Returns:
      f32 ``(E, N)``.
    """
    owners = owner(bounds, dz.shape[0])
    return jax.ops.segment_sum(dz, owners, bounds.shape[0])[:-1]


def owner(bounds: jax.Array, m: int) -> jax.Array:
    """The expert of each of m rows, E where there is none: int32 ``(M,)``."""
    row = jnp.arange(m, dtype=jnp.int32)
    expert = jnp.sum(bounds[None] <= row[:, None], axis=1, dtype=jnp.int32) - 1
    return jnp.where(expert < 0, bounds.shape[0] - 1, expert)


def _by_expert(
    x: jax.Array,
    bounds: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    y: jax.Array,
    dense: Callable,
    multiply: Callable,
) -> jax.Array:
    """Writes ``multiply(rows, dense(weight, bias))`` of each expert and its rows to y."""
    m = x.shape[0]
    size = _rows_of_a_step(m, weight.stack[0])
    x, y = _padded(x, size), varied(_padded(y, size), x)

    def expert(y, part):
        weight, bias, start, end = part

        def rows_of(y):
            ready = dense(weight, bias)

            def step(i, y):
                at = start + i * size
                rows = jax.lax.dynamic_slice_in_dim(x, at, size)
                mine, old = _window(at, end, size, y)
                new = jnp.where(mine, multiply(rows, ready), old)
                return jax.lax.dynamic_update_slice_in_dim(y, new, at, 0)

            return jax.lax.fori_loop(0, (end - start + size - 1) // size, step, y)

        return jax.lax.cond(end > start, rows_of, lambda y: y, y), None

    return _scan(expert, y, weight, bounds, bias)[0][:m]


def _scan(step: Callable, carry, weight: Weight, bounds: jax.Array, *arrays):
    """Scans over experts: ``step(carry, (weight, *arrays, start, end))``."""
    table = weight.table

    def one(carry, part):
        weight, *rest = part
        return step(carry, (dataclasses.replace(weight, table=table), *rest))

    experts = dataclasses.replace(weight, table=None)
    return jax.lax.scan(one, carry, (experts, *arrays, bounds[:-1], bounds[1:]))


def _window(at: jax.Array, end: jax.Array, size: int, array: jax.Array):
    """Which of some rows are before an end, ``(size, 1)``, and the rows of an array."""
    mine = (at + jnp.arange(size, dtype=jnp.int32) < end)[:, None]
    return mine, jax.lax.dynamic_slice_in_dim(array, at, size)


def _rows_of_a_step(m: int, experts: int) -> int:
    """As many as an expert has on average, as a power of two: few are computed in vain."""
    each = -(-m // experts)
    return int(np.clip(1 << (each - 1).bit_length(), min(8, m), min(_MOST_ROWS, m)))


def _padded(array: jax.Array, size: int) -> jax.Array:
    """More rows at the end, so that a step's are never beyond it."""
    return jnp.pad(array, ((0, size), (0, 0)))
