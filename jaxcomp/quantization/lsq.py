"""LSQ and LSQ+: the step size of a grid is learned together with the weights.

    u = w / S + Z,   what = S (code(u) - Z),   code(u) = the nearest code in [low, high]

    d what / d w = 1 inside the grid, else 0
    d what / d S = code(u) - Z - w / S inside, code(u) - Z outside
    d what / d offset = 0 inside, 1 outside                       (LSQ+, Z = round(-offset / S))

The gradients of step size and offset are multiplied by 1 / sqrt(N high), N the number of values
that share the step size, so that they move in proportion to the weights. The start of LSQ is
S = 2 mean|w| / sqrt(high).

Differs from the papers in: any element format may have a learned step size, per tensor, row or
group; the offset of LSQ+ is rounded to a whole code, so that integer kernels can apply it; the
sign of a step size is ignored, so that a step that crosses zero cannot turn a grid around; the
step size is rounded to the dtype in which it will be stored.

Source: Esser et al., LSQ, https://arxiv.org/abs/1902.08153; Bhalgat et al., LSQ+,
https://arxiv.org/abs/2004.09576.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxcomp.errors import JaxcompError
from jaxcomp.formats import grid
from jaxcomp.formats.floating import BLOCK
from jaxcomp.formats.spec import Codebook, Element, Float, Int
from jaxcomp.quantization import checks
from jaxcomp.quantization.activation import code_range, dequantize_input, quantize_input
from jaxcomp.quantization.ste import code_limits, scale_gradient, straight_through
from jaxcomp.step import Activation

Start = Literal["minmax", "mse", "lsq"]
STARTS = ("minmax", "mse", "lsq")
_SMALLEST = 2.0**-40


def check_learnable(fmt: Element, path: str = "weight") -> None:
    """Checks that the scales of a format are free to be learned.

    Args:
      fmt: the format.
      path: name of the weight, for the message.

    Raises:
      JaxcompError: its scales are tied to powers of two, to a second scale, or there are none.
    """
    fixed = isinstance(fmt, Float) and fmt.kind in BLOCK
    fixed |= isinstance(fmt, Codebook) and fmt.kind == "kmeans"
    if fixed:
        raise JaxcompError(
            f"{path}: {fmt} has no free scale to learn; use Int, Float e4m3, e5m2 or e2m1, or a "
            'codebook with scales, or scale="dynamic"'
        )


def initial_scales(w: jax.Array, fmt: Element, start: Start = "mse") -> dict[str, jax.Array]:
    """Where the learned parameters of a weight's grid start.

    Args:
      w: ``(*stack, out, in)``.
      fmt: the format.
      start: "mse" is the search of ``rtn``, so that training starts from the best rounding; "lsq"
        is the paper's 2 mean|w| / sqrt(high); "minmax" covers the range.

    Returns:
      "scale" and, for asymmetric integers, "offset", ``(*stack, out_groups, in_groups)``: the value
      that code low + 2^(bits-1) stands for, -S Z.

    Raises:
      JaxcompError: the format has no free scale, or does not fit.
    """
    check_learnable(fmt)
    checks.check_format(fmt, w, None, None, "")
    checks.check_choice("start", start, STARTS, "")
    context = grid.prepare(fmt, w)
    qparams = grid.fit(fmt, w, context, "mse" if start == "mse" else "minmax")
    scale = qparams.scale
    if start == "lsq":
        *stack, og, cg = scale.shape
        out, cols = w.shape[-2:]
        groups = jnp.abs(w).reshape(*stack, og, out // og, cg, cols // cg)
        scale = 2 * groups.mean((-3, -1)) / math.sqrt(_high(fmt))
        scale = jnp.maximum(scale.astype(qparams.scale.dtype), _SMALLEST)
    if qparams.zero_point is None:
        return {"scale": scale}
    return {"scale": scale, "offset": -scale * qparams.zero_point}


def learned_qparams(fmt: Element, learned: dict[str, jax.Array]) -> grid.QParams:
    """The grid that learned parameters mean: what ``lsq`` rounds to and what is stored.

    Args:
      fmt: the format.
      learned: from ``initial_scales``.

    Returns:
      Parameters of groups, scales positive and representable, zero points whole.
    """
    scale = grid.representable(fmt, jnp.maximum(jnp.abs(learned["scale"]), _SMALLEST))
    if "offset" not in learned:
        return grid.QParams(scale)
    low, high = code_limits(fmt)
    zero = jnp.clip(jnp.round(-learned["offset"] / scale), low, high)
    return grid.QParams(scale, zero.astype(jnp.int32))


def lsq(w: jax.Array, fmt: Element, learned: dict[str, jax.Array]) -> jax.Array:
    """A weight rounded to a grid whose step size, and offset, get gradients.

    Args:
      w: ``(*stack, out, in)``.
      fmt: the format.
      learned: "scale" and for asymmetric integers "offset", ``(*stack, out_groups, in_groups)``.

    Returns:
      Like ``w``; exactly what ``learned_qparams`` and the format's grid give.

    Raises:
      JaxcompError: the format has no free scale, or does not fit.

    Example:
      >>> w = jnp.array([[0.9, -2.2, 9.0]])
      >>> out = lsq(w, Int(3, full_range=False), {"scale": jnp.ones((1, 1))})
      >>> out.tolist()
      [[1.0, -2.0, 3.0]]
    """
    check_learnable(fmt)
    checks.check_format(fmt, w, None, None, "")
    out, cols = w.shape[-2:]
    fixed = jax.lax.stop_gradient(w)
    context = grid.prepare(fmt, fixed)
    stored = learned_qparams(fmt, jax.lax.stop_gradient(learned))
    groups = stored.scale.shape[-2] * stored.scale.shape[-1]
    factor = 1 / math.sqrt(out * cols / groups * _high(fmt))
    moving = grid.QParams(*_with_gradients(learned, stored, factor))
    at, moving = (grid.expand(fmt, q, out, cols) for q in (stored, moving))
    codes = grid.encode(fmt, fixed, at, context)
    element = grid.decode(fmt, codes, grid.QParams(jnp.ones_like(at.scale)), context)
    rounded = _rounded(w, moving.scale, moving.zero_point, element, *code_limits(fmt, context))
    # The same values to the last bit as those of the stored grid.
    return straight_through(rounded, grid.decode(fmt, codes, at, context)).astype(w.dtype)


def _with_gradients(learned, stored, factor):
    """The values of a grid's stored scale and zero point with the gradients of what is learned."""
    scale = straight_through(scale_gradient(jnp.abs(learned["scale"]), factor), stored[0])
    if stored[1] is None:
        return scale, None
    offset = scale_gradient(learned["offset"], factor)
    return scale, straight_through(-offset / scale, stored[1])


def _rounded(x, scale, zero, code, low, high):
    """``scale (code - zero)``, with the gradient of rounding passed straight through."""
    zero = 0 if zero is None else zero
    u = x / scale + zero
    return scale * (straight_through(u, code, (u >= low) & (u <= high)) - zero)


def _high(fmt: Element) -> float:
    """The largest code: what the gradient and the start are normalised by."""
    if isinstance(fmt, Int) and not fmt.symmetric:
        return 2**fmt.bits - 1
    return 1 if isinstance(fmt, Codebook) else code_limits(fmt)[1]


def initial_input_scale(low: jax.Array, high: jax.Array, mean_abs: jax.Array, activation) -> dict:
    """Where the learned grid of an input starts, from what calibration saw.

    Args:
      low: smallest value seen.
      high: largest.
      mean_abs: mean magnitude.
      activation: what to quantize to.

    Returns:
      "scale" as in LSQ, and for asymmetric activations of LSQ+ "scale" and "offset" that cover the
      range.
    """
    least, most = code_range(activation)
    if activation.symmetric:
        return {"scale": jnp.maximum(2 * mean_abs / math.sqrt(most), _SMALLEST)}
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    scale = jnp.maximum((high - low) / (most - least), _SMALLEST)
    return {"scale": scale, "offset": low - least * scale}


def learned_input_qparams(activation: Activation, learned: dict) -> tuple:
    """Scale and zero point (int32, None for symmetric) that learned parameters mean."""
    scale = jnp.maximum(jnp.abs(learned["scale"]), _SMALLEST)
    if "offset" not in learned:
        return scale, None
    zero = jnp.clip(jnp.round(-learned["offset"] / scale), *code_range(activation))
    return scale, zero.astype(jnp.int32)


def lsq_input(x: jax.Array, activation: Activation, learned: dict) -> jax.Array:
    """A matmul's input rounded to a grid whose step size, and offset, get gradients.

    Args:
      x: any shape.
      activation: the element type, one scale for the tensor.
      learned: "scale" and for asymmetric ones "offset", scalars.

    Returns:
      Like ``x``.
    """
    fixed = jax.lax.stop_gradient(x)
    stored = learned_input_qparams(activation, jax.lax.stop_gradient(learned))
    low, high = code_range(activation)
    factor = 1 / math.sqrt(x.size * (high if activation.symmetric else high - low))
    scale, zero = _with_gradients(learned, stored, factor)
    codes, *_ = quantize_input(fixed, activation, *stored)
    rounded = _rounded(x, scale, zero, codes.astype(scale.dtype), low, high)
    return straight_through(rounded, dequantize_input(codes, *stored)).astype(x.dtype)
