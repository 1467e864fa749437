"""Quantization of a matmul's input, and the integer matmul that takes it.

    codes = clip(round(x / S) + Z),   x ~ S (codes - Z)

with S from the largest magnitude (symmetric: absmax / 127, / 7, / 448, / 57344 for int8, int4,
e4m3, e5m2) or from the range with zero in it (asymmetric, integers only: 2^b levels). One scale a
token or one a tensor; dynamic scales come from the tensor itself, static ones from calibration.
For integer codes of x and w

    Y = S_x S_w ( Xq Wqᵀ - Z_x rowsum(Wq) - Z_w rowsum(Xq) + n Z_x Z_w )

with Xq Wqᵀ summed in int32, which equals the product of the dequantized matrices.

Source: SmoothQuant, https://arxiv.org/abs/2211.10438; Jacob et al.,
  https://arxiv.org/abs/1712.05877;
FP8 formats for deep learning, https://arxiv.org/abs/2209.05433.
"""

import jax
import jax.numpy as jnp

from jaxcomp.calibration import Statistics
from jaxcomp.errors import JaxcompError
from jaxcomp.formats.grid import divided
from jaxcomp.step import Activation

_LARGEST = {"int8": 127, "int4": 7, "e4m3": 448.0, "e5m2": 57344.0}
_FLOAT8 = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
# Bits of the mantissa, and the smallest number that has them all.
_PRECISION = {"e4m3": (3, 2.0**-6), "e5m2": (2, 2.0**-14)}


def check_activation(activation: Activation, path: str = "") -> None:
    """Checks that a combination of options exists.

    Args:
      activation: how inputs are to be quantized.
      path: name of the weight, for the message.

    Raises:
      JaxcompError: it does not.
    """
    where = f"{path}: " if path else ""
    if not activation.dynamic and activation.granularity != "tensor":
        raise JaxcompError(
            f'{where}static activation scales need granularity="tensor": the tokens of a later '
            "run are not known at calibration"
        )
    if not activation.symmetric and activation.format in _FLOAT8:
        raise JaxcompError(
            f"{where}{activation.format} activations have no zero point; use symmetric"
        )


def activation_scales(
    low: jax.Array, high: jax.Array, activation: Activation
) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point of a grid that covers a range.

    Args:
      low: smallest values, any shape.
      high: largest values, likewise.
      activation: what to quantize to.

    Returns:
      Scale (float32, or float64 for float64 values) and zero point (int32; None for a symmetric
      grid), of that shape.
    """
    dtype = jnp.float64 if low.dtype == jnp.float64 else jnp.float32
    low, high = low.astype(dtype), high.astype(dtype)
    largest = _LARGEST[activation.format]
    if activation.symmetric:
        scale = jnp.maximum(jnp.abs(low), jnp.abs(high)) / largest
        return jnp.where(scale > 0, scale, 1.0), None
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    scale = (high - low) / (2 * largest + 1)
    scale = jnp.where(scale > 0, scale, 1.0)
    return scale, (-(largest + 1) - jnp.round(low / scale)).astype(jnp.int32)


def code_range(activation: Activation) -> tuple[float, float]:
    """Smallest and largest code of a grid."""
    largest = _LARGEST[activation.format]
    return (-largest if activation.symmetric else -largest - 1), largest


def static_scales(
    statistics: Statistics, activation: Activation
) -> tuple[jax.Array, jax.Array | None]:
    """Scale of a layer's whole input from calibration.

    Args:
      statistics: with ``minimum`` and ``maximum``, ``(*stack, in)``.
      activation: what to quantize to.

    Returns:
      Scale and zero point ``(*stack,)``; the zero point is None for a symmetric grid.

    Raises:
      JaxcompError: the statistics hold no range.
    """
    if statistics is None or statistics.minimum is None:
        raise JaxcompError(
            "static activation scales need the range of the inputs: calibrate with needs={'range'}"
        )
    seen = statistics.count[..., None] > 0
    low = jnp.where(seen, statistics.minimum, 0.0).min(-1)
    high = jnp.where(seen, statistics.maximum, 0.0).max(-1)
    return activation_scales(low, high, activation)


def input_scales(x: jax.Array, activation: Activation) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point of a matmul's input at hand.

    Args:
      x: ``(..., in)``, any float dtype.
      activation: what to quantize to.

    Returns:
      Scale and zero point, both ``(..., 1)`` or, for one a tensor, ``(1, .., 1)``; the zero point
      is None for a symmetric grid.
    """
    axes = -1 if activation.granularity == "token" else None
    return activation_scales(x.min(axes, keepdims=True), x.max(axes, keepdims=True), activation)


def quantize_input(
    x: jax.Array,
    activation: Activation,
    scale: jax.Array | None = None,
    zero_point: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Quantizes the input of a matmul.

    Args:
      x: ``(..., in)``, any float dtype.
      activation: the element type, and one scale a token or one for the tensor.
      scale: frozen scale that broadcasts against ``x``; None computes it from ``x``.
      zero_point: frozen zero point, with ``scale``.

    Returns:
      Codes like ``x`` (int8 for the integer types, a float8 otherwise), scale and zero point, both
      ``(..., 1)`` or, for one a tensor, ``(1, .., 1)``; the zero point is None for a symmetric
      grid.

    Raises:
      JaxcompError: the options do not go together.

    Example:
      >>> codes, scale, _ = quantize_input(jnp.array([[1.0, -2.0], [0.0, 0.0]]), Activation())
      >>> codes.tolist()
      [[64, -127], [0, 0]]
    """
    check_activation(activation)
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    x = x.astype(dtype)
    if scale is None:
        scale, zero_point = input_scales(x, activation)
    largest = _LARGEST[activation.format]
    scaled = divided(x, scale)
    if activation.format in _FLOAT8:
        return jnp.clip(scaled, -largest, largest).astype(_FLOAT8[activation.format]), scale, None
    rounded = jnp.round(scaled)
    if zero_point is None:
        return jnp.clip(rounded, -largest, largest).astype(jnp.int8), scale, None
    codes = jnp.clip(rounded + zero_point, -largest - 1, largest)
    return codes.astype(jnp.int8), scale, zero_point


def dequantize_input(codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
    """What quantized inputs stand for: scale * (codes - zero_point).

    Args:
      codes: from ``quantize_input``.
      scale: its scale.
      zero_point: its zero point or None.

    Returns:
      Values like ``codes`` in the dtype of ``scale``.
    """
    values = codes.astype(scale.dtype)
    return (values if zero_point is None else values - zero_point.astype(scale.dtype)) * scale


def rounded_input(
    x: jax.Array,
    activation: Activation,
    scale: jax.Array | None = None,
    zero_point: jax.Array | None = None,
) -> jax.Array:
    """``dequantize_input(*quantize_input(..))``, without codes in between.

    Conversions to and from the type of the codes take longer on a CPU than the rounding.

    Args:
      x: ``(..., in)``, any float dtype.
      activation: the element type, and one scale a token or one for the tensor.
      scale: frozen scale that broadcasts against ``x``; None computes it from ``x``.
      zero_point: frozen zero point, with ``scale``.

    Returns:
      Values like ``x``, float32 (float64 for float64).

    Raises:
      JaxcompError: the options do not go together.

    Example:
      >>> rounded_input(jnp.array([[1.0, 2.54]]), Activation()).round(2).tolist()
      [[1.0, 2.5399999618530273]]
    """
    check_activation(activation)
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    x = x.astype(wide)
    if scale is None:
        scale, zero_point = input_scales(x, activation)
    low, high = code_range(activation)
    scaled = divided(x, scale)
    if activation.format in _FLOAT8:
        scaled = jnp.clip(scaled, low, high)
        mantissa, smallest = _PRECISION[activation.format]
        step = smallest * 2.0**-mantissa
        exponent = jnp.finfo(wide).nexp
        normal = jax.lax.reduce_precision(scaled, exponent, mantissa)
        return (
            jnp.where(jnp.abs(scaled) < smallest, jnp.round(scaled / step) * step, normal) * scale
        )
    codes = jnp.round(scaled)
    if zero_point is None:
        return jnp.clip(codes, low, high) * scale
    zero_point = zero_point.astype(wide)
    return (jnp.clip(codes + zero_point, low, high) - zero_point) * scale


def quantized_matmul(
    x_codes: jax.Array,
    x_scale: jax.Array,
    x_zero_point: jax.Array | None,
    w_codes: jax.Array,
    w_scale: jax.Array,
    w_zero_point: jax.Array | None = None,
) -> jax.Array:
    """Product of a quantized input and a quantized weight, integers summed in int32.

    Args:
      x_codes: ``(..., in)`` int8, or a float8.
      x_scale: ``(..., 1)`` or a scalar.
      x_zero_point: like ``x_scale``, or None.
      w_codes: ``(out, in)`` int8, or a float8 when ``x_codes`` is one.
      w_scale: ``(groups, out)`` scales, a group being in / groups consecutive inputs. A second axis
        of one or of whole blocks of outputs is spread over the outputs.
      w_zero_point: like ``w_scale``, or None.

    Returns:
      ``(..., out)`` float, in the dtype of ``x_scale``.

    Raises:
      JaxcompError: shapes that do not fit.

    Source: Jacob et al., https://arxiv.org/abs/1712.05877, section 2.3.
    """
    out, size = w_codes.shape
    groups = w_scale.shape[0]
    if x_codes.shape[-1] != size or size % groups:
        raise JaxcompError(
            f"quantized_matmul: input {x_codes.shape}, weight {w_codes.shape} and scales "
            f"{w_scale.shape} do not fit; expected (.., in), (out, in) and (groups, out)"
        )
    wide = x_scale.dtype
    integer = jnp.issubdtype(x_codes.dtype, jnp.integer)
    # (groups, .., out), as the products come: transposed operands make a CPU several times slower.
    rows = x_codes.shape[:-1]

    def each(a):
        return jnp.repeat(a, out // a.shape[1], axis=1).reshape(groups, *(1 for _ in rows), out)

    x = x_codes.reshape(*rows, groups, size // groups)
    w = w_codes.reshape(out, groups, size // groups)
    # The products of float8 values and their float32 sums are what a float8 unit gives.
    options = {"preferred_element_type": jnp.int32}
    if not integer:
        x, w, options = x.astype(wide), w.astype(wide), {"precision": jax.lax.Precision.HIGHEST}
    last, group = len(rows) + 1, len(rows)
    if groups == 1:
        dot = jax.lax.dot_general(x[..., 0, :], w[:, 0], (((group,), (1,)), ((), ())), **options)[
            None
        ]
    else:
        dot = jax.lax.dot_general(x, w, (((last,), (2,)), ((group,), (1,))), **options)
    if w_zero_point is not None:
        w_zero = each(w_zero_point).astype(dot.dtype)
        x_sum = jnp.moveaxis(x.astype(dot.dtype).sum(-1), -1, 0)
        dot = dot - w_zero * x_sum[..., None]
    if x_zero_point is not None:
        w_sum = each(w.astype(dot.dtype).sum(-1).T)
        if w_zero_point is not None:
            w_sum = w_sum - (size // groups) * w_zero
        dot = dot - jnp.asarray(x_zero_point, dot.dtype)[None] * w_sum
    return (dot.astype(wide) * each(w_scale).astype(wide)).sum(0) * x_scale
