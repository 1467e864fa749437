"""The quantized matmul in plain JAX: what every kernel must compute, and every backward pass."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxcomp.kernels.meshes import varied
from jaxcomp.kernels.quantized_matmul import weights
from jaxcomp.kernels.quantized_matmul.weights import FORMATS, Weight

ACTIVATIONS = {
    None: lambda z: z,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda z: jax.nn.gelu(z, approximate=True),
}
# Largest entries of the dtypes that rows are quantized to, and what is rounded to no more than they
# are: a row's own scale is rounded, too, and its largest entry over it may be a little more.
_TOP = {"int8": 127.0, "float8_e4m3fn": 448.0}
_CLIPPED = {"int8": 127.5, "float8_e4m3fn": 464.0}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is fused into the product.

    Attributes:
      activation: a key of ``ACTIVATIONS``, applied last.
      activation_dtype: name of the dtype that each row of x is quantized to, or None.
      out_dtype: name of the dtype of y.
    """

    activation: str | None
    activation_dtype: str | None
    out_dtype: str


def activation_dtypes(format: str) -> tuple[str, ...]:
    """The dtypes of rows whose products with the codes of a format are exact."""
    if format == "int8":
        return ("int8",)  # e4m3 has too few digits for its codes
    kinds = {"int": ("int8", "float8_e4m3fn"), "float": ("float8_e4m3fn",), "codebook": ()}
    return kinds[FORMATS[format].kind]


def quantize_rows(
    x: jax.Array, dtype: str, scales: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Divides each row by its scale, and rounds.

    Args:
      x: ``(M, K)``.
      dtype: "int8" or "float8_e4m3fn".
      scales: f32 ``(M, 1)``; None makes a row's largest entry the largest of the dtype.

    Returns:
      ``(M, K)`` of the dtype, what is beyond its ends at its ends, and f32 scales ``(M, 1)``; a row
      of zeros has the scale 1.

    Example:
      >>> import jax.numpy as jnp
      >>> xq, scale = quantize_rows(jnp.array([[1.0, -2.0]]), "int8")
      >>> xq.tolist(), round(float(scale[0, 0]), 4)
      ([[64, -127]], 0.0157)
    """
    x = x.astype(jnp.float32)
    if scales is None:
        scales = scales_of(jnp.max(jnp.abs(x), axis=-1, keepdims=True), dtype)
    entries = scaled(x, scales)
    # Integers have no NaN (and no infinity, which its own scale makes one): the scale carries it.
    undefined = jnp.any(jnp.isnan(entries), axis=-1, keepdims=True)
    return rounded(entries, dtype), jnp.where(undefined, jnp.nan, scales)


def scales_of(largest: jax.Array, dtype: str) -> jax.Array:
    """The scales that make entries the largest ones of a dtype; 1 for zeros.

    Compiled, XLA multiplies with the rounded reciprocal: a scale may be off by its last bit, which
    the entries are divided by as it is.
    """
    return jnp.where(largest > 0, largest / _TOP[dtype], 1.0)


def scaled(x: jax.Array, scales: jax.Array) -> jax.Array:
    """Rows over their scales, in f32."""
    x = x.astype(jnp.float32)
    # The maximum changes nothing: it keeps XLA from multiplying with a rounded reciprocal.
    return x / jnp.maximum(scales, -jnp.abs(x))


def rounded(entries: jax.Array, dtype: str) -> jax.Array:
    """Entries of a dtype: what is beyond its ends at its ends."""
    entries = jnp.round(entries) if dtype == "int8" else entries
    return jnp.clip(entries, -_TOP[dtype], _TOP[dtype]).astype(dtype)


def finish(y: jax.Array, bias: jax.Array | None, options: Options) -> jax.Array:
    """Bias, activation and output dtype of f32 ``(.., N)``."""
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return ACTIVATIONS[options.activation](y).astype(options.out_dtype)


def matmul(
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    options: Options,
    x_scales: jax.Array | None = None,
) -> jax.Array:
    """Y = activation(x Wᵀ + bias).

    Args:
      x: ``(M, K)``, bf16 or f32.
      weight: stored, without stack axes.
      bias: ``(N,)`` or None.
      options: what is fused.
      x_scales: f32 ``(M, 1)`` that rows are quantized with, or None.

    Returns:
      ``(M, N)``.
    """
    if options.activation_dtype is not None:
        xq, row_scales = quantize_rows(x, options.activation_dtype, x_scales)
        return finish(_quantized_product(xq, weight) * row_scales, bias, options)
    w = weights.dequantize(weight).astype(x.dtype)
    return finish(dot(x, w, ((1,), (1,))), bias, options)


def dot(a: jax.Array, b: jax.Array, axes: tuple[tuple[int], tuple[int]]) -> jax.Array:
    """Product with f32 sums, and with f32 factors where the operands are f32."""
    highest = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (axes, ((), ())), precision=highest, preferred_element_type=jnp.float32
    )


def _quantized_product(xq: jax.Array, weight: Weight) -> jax.Array:
    """f32 x Wᵀ of quantized x: one exact product a group, then its scale."""
    codes = weights.unpack(weight.codes, weight.format).astype(xq.dtype)
    xq = jnp.moveaxis(weights.grouped(xq, weight), 1, 0)
    codes = jnp.moveaxis(weights.grouped(codes, weight), 1, 0)
    sums = jnp.int32 if xq.dtype == jnp.int8 else jnp.float32
    scales = weight.scales.astype(jnp.float32)
    zeros = None if weight.zeros is None else weight.zeros.astype(jnp.float32)

    def step(y, group):
        xq, codes, scale, zero = group
        product = jax.lax.dot_general(
            xq, codes, (((1,), (1,)), ((), ())), preferred_element_type=sums
        ).astype(jnp.float32)
        if zero is not None:
            total = jnp.sum(xq.astype(jnp.float32), axis=1, keepdims=True)
            product = product - total * zero[None]
        return y + product * scale[None], None

    y = varied(jnp.zeros((xq.shape[1], weight.shape[0]), jnp.float32), xq)
    return jax.lax.scan(step, y, (xq, codes, scales, zeros))[0]


def multiplied(
    x: jax.Array, options: Options, x_scales: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """What a weight is multiplied with, for its cotangents: x, or what quantizing leaves of it.

    Args:
      x: ``(M, K)``.
      options: what is fused.
      x_scales: f32 ``(M, 1)`` that rows are quantized with, or None.

    Returns:
      ``(M, K)`` of x's dtype; and bool ``(M, K)``, which entries given scales do not clip, or None
      for all: a row's own largest entry is one of the dtype.
    """
    dtype = options.activation_dtype
    if dtype is None:
        return x, None
    codes, scales = quantize_rows(x, dtype, x_scales)
    inside = None if x_scales is None else jnp.abs(scaled(x, scales)) < _CLIPPED[dtype]
    return (codes.astype(jnp.float32) * scales).astype(x.dtype), inside


def gradients(
    x: jax.Array,
    weight: Weight,
    dz: jax.Array,
    options: Options,
    x_scales: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Cotangents of z = x Wᵀ; quantizing x passes them straight through where it does not clip.

    Args:
      x: ``(M, K)``.
      weight: stored, without stack axes.
      dz: f32 ``(M, N)``.
      options: what is fused.
      x_scales: f32 ``(M, 1)`` that rows are quantized with, or None.

    Returns:
      Cotangents of x, and of the scales, zeros and table of the weight.
    """
    w = weights.dequantize(weight).astype(x.dtype)
    rows, inside = multiplied(x, options, x_scales)
    dx = dot(dz.astype(x.dtype), w, ((1,), (0,))).astype(x.dtype)
    if inside is not None:
        dx = jnp.where(inside, dx, jnp.zeros((), dx.dtype))
    # Two bf16 operands give the sums of W's cotangent that a dense layer's would have.
    return dx, *part_gradients(weight, dot(dz.astype(x.dtype), rows, ((0,), (0,))))


def part_gradients(
    weight: Weight, dw: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Cotangents of what a weight is made of.

    Args:
      weight: stored, without stack axes.
      dw: f32 ``(N, K)``, its cotangent.

    Returns:
      Cotangents of the scales, zeros and table.
    """
    dw = weights.grouped(dw, weight)
    codes = weights.unpack(weight.codes, weight.format)
    each = weights.grouped(weights.values(codes, weight), weight).astype(jnp.float32)
    scales = jnp.swapaxes(weight.scales.astype(jnp.float32), 0, 1)
    dzeros = dtable = None
    if weight.zeros is not None:
        each = each - jnp.swapaxes(weight.zeros.astype(jnp.float32), 0, 1)[..., None]
        dzeros = -(jnp.sum(dw, axis=-1) * scales).T.astype(weight.zeros.dtype)
    dscales = jnp.sum(dw * each, axis=-1).T.astype(weight.scales.dtype)
    if FORMATS[weight.format].kind == "codebook":
        dvalues = (dw * scales[..., None]).reshape(codes.shape)
        dtable = jnp.stack([jnp.sum(jnp.where(codes == code, dvalues, 0.0)) for code in range(16)])
    return dscales, dzeros, dtable
