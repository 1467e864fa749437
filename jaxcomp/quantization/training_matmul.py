"""Matmuls on int8 or float8 codes in training, forward and, as an option, backward.

With per-token codes of the input, x ~ diag(s) X, and per-row codes of the weight, w ~ diag(t) W,

    forward     y  = diag(s) X W' diag(t)
    backward    dx = (g diag(t)) W           dw = (diag(s) g)' X

where g = dL/dy. The gradients of rounding are passed straight through. Backward, the scale that
would run along the contracted axis is multiplied into g first, so that g can be quantized too (a
scale a token for dx, a scale an output for dw) and both products are again of codes: int8, or e5m2
for the gradients of float8. What is kept for the backward pass are the codes.

Differs from the sources in: gradients are rounded to nearest, not stochastically.

Source: Micikevicius et al., FP8 formats for deep learning, https://arxiv.org/abs/2209.05433
(e4m3 forward, e5m2 for gradients); Xi et al., https://arxiv.org/abs/2306.11987 (integer training).
"""

import functools

import jax
import jax.numpy as jnp

from jaxcomp.errors import RecipeError
from jaxcomp.formats import grid
from jaxcomp.formats.spec import Element, Float, Int
from jaxcomp.quantization.activation import quantize_input, quantized_matmul
from jaxcomp.step import Activation

_GRADIENT = {"int8": "int8", "fp8": "e5m2"}


def check_matmul(kind: str, fmt: Element | None, activation: Activation | None, path: str) -> None:
    """Checks that a weight's and an input's formats give codes that can be multiplied.

    Args:
      kind: "int8" or "fp8".
      fmt: of the weight.
      activation: of the input.
      path: name of the weight, for the message.

    Raises:
      RecipeError: they do not; the message says what does.
    """
    if kind == "int8":
        fits = isinstance(fmt, Int) and fmt.symmetric and not fmt.full_range
        needed, types = "Int(8, full_range=False)", ("int8",)
    else:
        fits = isinstance(fmt, Float) and fmt.kind in ("e4m3", "e5m2")
        needed, types = 'Float("e4m3")', ("e4m3", "e5m2")
    fits = fits and fmt.group_size is None and fmt.out_group_size == 1
    token = activation is not None and activation.dynamic and activation.granularity == "token"
    if not fits or not token or not activation.symmetric or activation.format not in types:
        raise RecipeError(
            f'{path}: matmul="{kind}" needs a weight format with one scale a row, as {needed}, and '
            f"a dynamic, symmetric activation with one scale a token in {' or '.join(types)}; "
            f'got {fmt} and {activation}. Use matmul="simulated" for others'
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def training_matmul(
    x: jax.Array,
    w: jax.Array,
    fmt: Element,
    activation: Activation,
    quantize_gradients: bool = False,
) -> jax.Array:
    """``x wᵀ`` on codes, differentiable in both.

    Args:
      x: ``(tokens, in)``.
      w: ``(out, in)``.
      fmt: of the weight, with one scale a row.
      activation: of the input, one dynamic scale a token.
      quantize_gradients: also multiply codes in the backward pass.

    Returns:
      ``(tokens, out)`` float32: what dispatch computes on the converted weight.

    Example:
      >>> x, w = jnp.array([[127.0, 1.0]]), jnp.array([[2.0, 127.0]])
      >>> training_matmul(x, w, Int(8, full_range=False), Activation()).tolist()
      [[381.0]]
    """
    return _forward(x, w, fmt, activation, quantize_gradients)[0]


def _codes(w, fmt):
    """Codes of a weight, int8 or float8 ``(out, in)``, and scales ``(out,)``."""
    qparams = grid.fit(fmt, w)
    spread = grid.expand(fmt, qparams, *w.shape[-2:])
    if isinstance(fmt, Int):
        codes = grid.encode(fmt, w, spread).astype(jnp.int8)
    else:
        dtype = jnp.float8_e4m3fn if fmt.kind == "e4m3" else jnp.float8_e5m2
        elements = grid.QParams(jnp.ones_like(spread.scale))
        codes = grid.decode(fmt, grid.encode(fmt, w, spread), elements).astype(dtype)
    return codes, qparams.scale[..., 0]


def _forward(x, w, fmt, activation, quantize_gradients):
    del quantize_gradients
    x_codes, x_scale, _ = quantize_input(x, activation)
    w_codes, w_scale = _codes(w, fmt)
    y = quantized_matmul(x_codes, x_scale, None, w_codes, w_scale[None])
    # Empty arrays carry the dtypes that the gradients must have.
    return y, (x_codes, x_scale, w_codes, w_scale, x[:0], w[:0])


def _backward(fmt, activation, quantize_gradients, kept, g):
    del fmt
    x_codes, x_scale, w_codes, w_scale, x_like, w_like = kept
    g = g.astype(x_scale.dtype)
    for_x, for_w = g * w_scale, (g * x_scale).T
    if quantize_gradients:
        kind = "int8" if activation.format == "int8" else "fp8"
        spec = Activation(format=_GRADIENT[kind])
        one = lambda n: jnp.ones((1, n), x_scale.dtype)  # noqa: E731
        codes, scale, _ = quantize_input(for_x, spec)
        dx = quantized_matmul(codes, scale, None, w_codes.T, one(w_codes.shape[1]))
        codes, scale, _ = quantize_input(for_w, spec)
        dw = quantized_matmul(codes, scale, None, x_codes.T, one(x_codes.shape[1]))
    else:
        dx = for_x @ w_codes.astype(g.dtype)
        dw = for_w @ x_codes.astype(g.dtype)
    return dx.astype(x_like.dtype), dw.astype(w_like.dtype)


training_matmul.defvjp(_forward, _backward)
