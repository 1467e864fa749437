"""Sparse matmuls in plain JAX: what every kernel must compute."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxcomp.kernels.quantized_matmul.reference import ACTIVATIONS
from jaxcomp.kernels.sparse_matmul import nm
from jaxcomp.kernels.sparse_matmul.blocks import BlockSparse
from jaxcomp.kernels.sparse_matmul.nm import NMSparse


@dataclasses.dataclass(frozen=True)
class Options:
    """What is fused into the product.

    Attributes:
      activation: a key of ``ACTIVATIONS``, applied last.
      out_dtype: name of the dtype of y.
    """

    activation: str | None
    out_dtype: str


def finish(y: jax.Array, bias: jax.Array | None, options: Options) -> jax.Array:
    """Bias, activation and output dtype of f32 ``(.., N)``."""
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return ACTIVATIONS[options.activation](y).astype(options.out_dtype)


def dot(a: jax.Array, b: jax.Array, axes: tuple, batch: tuple = ((), ())) -> jax.Array:
    """Product with f32 sums, and with f32 factors where the operands are f32."""
    highest = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b.astype(a.dtype), (axes, batch), precision=highest, preferred_element_type=jnp.float32
    )


def block_matmul(
    x: jax.Array, weight: BlockSparse, bias: jax.Array | None, options: Options
) -> jax.Array:
    """Y = activation(x Wᵀ + bias): a product for each block, added up by rows of blocks.

    Args:
      x: ``(M, K)``, bf16 or f32.
      weight: with float or int8 values.
      bias: ``(N,)`` or None.
      options: what is fused.

    Returns:
      ``(M, N)``.
    """
    products = dot(_parts(x, weight, 1), weight.values, ((2,), (2,)), ((0,), (0,)))
    if weight.scales is not None:
        products = products * weight.scales[:, None]
    return finish(_total(products, weight, 0), bias, options)


def block_gradients(
    x: jax.Array, weight: BlockSparse, dz: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of z = x Wᵀ.

    Args:
      x: ``(M, K)``.
      weight: with float or int8 values.
      dz: ``(M, N)``, of x's dtype.

    Returns:
      Cotangents of x, and of the blocks of W: in the dtype of float values, in f32 for int8 ones.
    """
    parts = _parts(dz, weight, 0)
    scaled = parts
    if weight.scales is not None:
        scaled = (parts.astype(jnp.float32) * weight.scales[:, None]).astype(x.dtype)
    dx = _total(dot(scaled, weight.values, ((2,), (1,)), ((0,), (0,))), weight, 1)
    dvalues = dot(parts, _parts(x, weight, 1), ((1,), (1,)), ((0,), (0,)))
    return dx.astype(x.dtype), dvalues.astype(gradient_dtype(weight))


def gradient_dtype(weight: BlockSparse) -> jax.typing.DTypeLike:
    """Dtype of the cotangent of the blocks."""
    return jnp.float32 if weight.scales is not None else weight.values.dtype


def _parts(x: jax.Array, weight: BlockSparse, axis: int) -> jax.Array:
    """Columns of x that meet the outputs (axis 0) or inputs (1) of each block: (blocks, M, b)."""
    x = pad_columns(x, weight.grid[axis] * weight.block[axis])
    x = x.reshape(len(x), weight.grid[axis], weight.block[axis]).swapaxes(0, 1)
    return x[(weight.rows, weight.columns)[axis]]


def _total(products: jax.Array, weight: BlockSparse, axis: int) -> jax.Array:
    """Inverse of ``_parts``: adds up the products (blocks, M, b) of the same columns."""
    total = jax.ops.segment_sum(products, (weight.rows, weight.columns)[axis], weight.grid[axis])
    total = total.swapaxes(0, 1).reshape(products.shape[1], weight.grid[axis] * weight.block[axis])
    return total[:, : weight.shape[axis]]


def nm_matmul(
    x: jax.Array, weight: NMSparse, bias: jax.Array | None, options: Options
) -> jax.Array:
    """Y = activation(x Wᵀ + bias) with W written out.

    Args:
      x: ``(M, K)``, bf16 or f32.
      weight: stored or prepared.
      bias: ``(N,)`` or None.
      options: what is fused.

    Returns:
      ``(M, N)``.
    """
    return finish(dot(x, nm.dense(weight), ((1,), (1,))), bias, options)


def nm_gradients(x: jax.Array, weight: NMSparse, dz: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cotangents of z = x Wᵀ.

    Args:
      x: ``(M, K)``.
      weight: stored or prepared.
      dz: ``(M, N)``, of x's dtype.

    Returns:
      Cotangents of x, and of the weight's values, or of its scales where the values are codes.
    """
    name = "values" if weight.scales is None else "scales"
    w, pullback = jax.vjp(
        lambda leaf: nm.dense(dataclasses.replace(weight, **{name: leaf})), getattr(weight, name)
    )
    dx = dot(dz, w, ((1,), (0,))).astype(x.dtype)
    return dx, pullback(dot(dz, x, ((0,), (0,))))[0]


def pad_columns(x: jax.Array, size: int) -> jax.Array:
    """Zeros after the last column of ``(M, ..)``, up to a size."""
    return x if x.shape[1] == size else jnp.pad(x, ((0, 0), (0, size - x.shape[1])))
