"""Fake quantization with straight-through estimators: quantized forward, float gradient.

    forward    Q(x)
    backward   dL/dx = dL/dQ                        plain
               dL/dx = dL/dQ where low <= x <= high, else 0     clipped

with low and high the ends of the grid. The scale of the grid is a constant of the gradient: it is
computed from the weights at each call, or comes from outside. The forward value is Q(x) to the
last bit, so a model trained this way and the compressed model compute the same.

Source: Bengio et al., https://arxiv.org/abs/1308.3432; Jacob et al.,
https://arxiv.org/abs/1712.05877 (quantization-aware training); Liu et al., LLM-QAT,
https://arxiv.org/abs/2305.17888.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from jaxcomp.formats import grid
from jaxcomp.formats.floating import ELEMENT_OF, ELEMENTS
from jaxcomp.formats.spec import Element, Float, Int
from jaxcomp.quantization import checks
from jaxcomp.quantization.activation import (
    activation_scales,
    check_activation,
    code_range,
    dequantize_input,
    quantize_input,
)
from jaxcomp.step import Activation

Estimator = Literal["ste", "clipped"]
ESTIMATORS = ("ste", "clipped")


def straight_through(x: jax.Array, q: jax.Array, inside: jax.Array | None = None) -> jax.Array:
    """The value of ``q`` with the gradient of ``x``.

    Args:
      x: float array, what the gradient goes to.
      q: the value, of the same shape.
      inside: bool, where the gradient passes; everywhere if None.

    Returns:
      ``q``, exactly where ``x`` is finite.

    Example:
      >>> value, slope = jax.value_and_grad(lambda x: 3 * straight_through(x, jnp.round(x)))(1.2)
      >>> float(value), float(slope)
      (3.0, 3.0)
    """
    carrier = x - jax.lax.stop_gradient(x)
    if inside is not None:
        carrier = jnp.where(inside, carrier, 0)
    return jax.lax.stop_gradient(q).astype(x.dtype) + carrier


def scale_gradient(x: jax.Array, factor: float | jax.Array) -> jax.Array:
    """``x``, its gradient multiplied by ``factor``."""
    fixed = jax.lax.stop_gradient(x)
    return fixed + factor * (x - fixed)


def code_limits(fmt: Element, context: grid.Context = grid.EMPTY) -> tuple:
    """Smallest and largest element of a grid before its scale and zero point.

    Args:
      fmt: ``Int``, ``Float`` or ``Codebook``.
      context: of the matrix, for codebooks.

    Returns:
      Numbers, or arrays ``(*stack, 1 or out, 1)`` for codebooks.
    """
    if isinstance(fmt, Int):
        high = 2 ** (fmt.bits - 1) - 1
        return (-high if fmt.symmetric and not fmt.full_range else -high - 1), high
    if isinstance(fmt, Float):
        largest = float(ELEMENTS[ELEMENT_OF[fmt.kind]].largest)
        return -largest, largest
    return context.levels[..., :1], context.levels[..., -1:]


def _inside(fmt, w, qparams, context):
    """Which weights lie between the ends of their grid."""
    low, high = code_limits(fmt, context)
    if qparams.zero_point is not None:
        low, high = low - qparams.zero_point, high - qparams.zero_point
    scale = 1 if qparams.scale is None else qparams.scale
    return (w >= low * scale) & (w <= high * scale)


def fake_quantize(
    w: jax.Array,
    fmt: Element,
    clipping: grid.Clipping = "minmax",
    percentile: float = 99.9,
    estimator: Estimator = "ste",
) -> jax.Array:
    """A weight rounded to the nearest values of a format, with a straight-through gradient.

    Args:
      w: ``(*stack, out, in)`` float.
      fmt: ``Int``, ``Float`` or ``Codebook``.
      clipping: "minmax", "mse" or "percentile": how the grid is placed on each group, anew at each
        call and without a gradient.
      percentile: of the magnitudes in a group, in percent.
      estimator: "ste" lets every gradient through, "clipped" those of weights inside the grid.

    Returns:
      The values that ``rtn`` would store, in the dtype of ``w``.

    Raises:
      JaxcompError: the format does not fit the shape, or an option does not exist.

    Example:
      >>> fake_quantize(jnp.array([[1.0, -7.0, 3.4]]), Int(4, full_range=False)).tolist()
      [[1.0, -7.0, 3.0]]
    """
    checks.check_format(fmt, w, None, None, "")
    checks.check_choice("clipping", clipping, checks.CLIPPINGS, "")
    checks.check_choice("estimator", estimator, ESTIMATORS, "")
    fixed = jax.lax.stop_gradient(w)
    context = grid.prepare(fmt, fixed)
    qparams = grid.fit(fmt, fixed, context, clipping, percentile)
    spread = grid.expand(fmt, qparams, *w.shape[-2:])
    values = grid.decode(fmt, grid.encode(fmt, fixed, spread, context), spread, context)
    inside = None if estimator == "ste" else _inside(fmt, fixed, spread, context)
    return straight_through(w, values, inside)


def fake_quantize_input(
    x: jax.Array,
    activation: Activation,
    axes: Sequence[int] = (-1,),
    scale: jax.Array | None = None,
    zero_point: jax.Array | None = None,
) -> jax.Array:
    """A matmul's input quantized and dequantized, with a straight-through gradient.

    Args:
      x: any shape, float.
      activation: the element type, and one scale a token or one for the tensor.
      axes: the features of a token: axes that share a scale with ``granularity="token"``.
      scale: frozen scale that broadcasts against ``x``; its gradient is clipped at the ends of the
        range. None computes scales from ``x``, and every gradient passes.
      zero_point: frozen zero point, with ``scale``.

    Returns:
      Like ``x``.

    Raises:
      JaxcompError: the options do not go together.
    """
    check_activation(activation)
    fixed = jax.lax.stop_gradient(x)
    inside = None
    if scale is None:
        over = tuple(axes) if activation.granularity == "token" else None
        low, high = fixed.min(over, keepdims=True), fixed.max(over, keepdims=True)
        scale, zero_point = activation_scales(low, high, activation)
    else:
        scale = jax.lax.stop_gradient(scale)
        low, high = code_range(activation)
        code = fixed / scale + (0 if zero_point is None else zero_point)
        inside = (code >= low) & (code <= high)
    codes, scale, zero_point = quantize_input(fixed, activation, scale, zero_point)
    return straight_through(x, dequantize_input(codes, scale, zero_point), inside)
