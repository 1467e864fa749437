"""SmoothQuant: moves the spread of activations into the weights so that both quantize well.

    s_j = max|X_:j|^alpha / max|W_:j|^(1-alpha),   Xhat_:j = X_:j / s_j,   What_:j = W_:j s_j

with j an input channel and the maximum over all weights that read the input (q, k and v). The
function does not change; at alpha = 0.5 both maxima of every channel become sqrt(max|X_j|
max|W_j|). Quantization is a later step (RTN or GPTQ with ``activation``), and folding 1/s into the
producer of the input a matter of the graph.

Differs from the paper in: channels that are always zero (in the input or in all weights) keep s = 1
where the released code clamps the maxima at 1e-5; other scales are clamped at 1e-5 as there.

Source: SmoothQuant, https://arxiv.org/abs/2211.10438.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import host
from jaxcomp.errors import JaxcompError
from jaxcomp.quantization import checks, common
from jaxcomp.step import Layer, Step, run

# Rows of a weight on the host that are looked at together.
_ROWS = 256


class SmoothQuant(Step, frozen=True, tag="smoothquant"):
    """Divides the input of weights by a scale a channel, and multiplies their columns by it.

    Attributes:
      alpha: how much of the spread moves to the weights, 0 to 1.
    """

    alpha: float = 0.5

    def needs(self) -> frozenset[str]:
        """The largest magnitude of each input channel."""
        return frozenset({"absmax"})

    def by_matrix(self) -> bool:
        """Yes: layers of one stack share a scale for each of its matrices."""
        return True


def smoothquant_scales(x_absmax: jax.Array, w_absmax: jax.Array, alpha: float = 0.5) -> jax.Array:
    """Scales s by which activations are divided and weight columns multiplied.

    Args:
      x_absmax: ``(*stack, in)`` largest magnitude of each input channel.
      w_absmax: ``(*stack, in)`` largest magnitude of each weight column, over all weights that read
        the input.
      alpha: how much of the spread moves to the weights, 0 to 1.

    Returns:
      ``(*stack, in)`` positive scales.

    Raises:
      JaxcompError: ``alpha`` is not from 0 to 1, or the shapes differ.

    Example:
      >>> smoothquant_scales(jnp.array([16.0, 1.0, 0.0]), jnp.array([1.0, 4.0, 1.0])).tolist()
      [4.0, 0.5, 1.0]

    Source: https://arxiv.org/abs/2211.10438, equation 4.
    """
    if not 0 <= alpha <= 1:
        raise JaxcompError(f"alpha {alpha} is not from 0 to 1; SmoothQuant's default is 0.5")
    x_absmax, w_absmax = jnp.asarray(x_absmax), jnp.asarray(w_absmax)
    if x_absmax.shape != w_absmax.shape:
        raise JaxcompError(
            f"one maximum an input channel is needed of both, got {x_absmax.shape} of the "
            f"activations and {w_absmax.shape} of the weights"
        )
    return _scales(x_absmax, w_absmax, alpha)


@jax.jit
def _scales(x_absmax, w_absmax, alpha):
    dtype = common.working_dtype(x_absmax, w_absmax)
    x, w = x_absmax.astype(dtype), w_absmax.astype(dtype)
    used = (x > 0) & (w > 0)
    x, w = jnp.where(used, x, 1.0), jnp.where(used, w, 1.0)
    scale = x**alpha / w ** (1 - alpha)
    return jnp.where(used, jnp.maximum(scale, 1e-5), 1.0)


def _column_maxima(w: Any) -> Any:
    """Largest magnitude of each column ``(*stack, in)``, on the host without a whole copy."""
    w = host.numpy(w)
    if not isinstance(w, np.ndarray):
        return jnp.abs(w).max(-2)
    wide = common.working_dtype(w)
    blocks = (w[..., start : start + _ROWS, :] for start in range(0, w.shape[-2], _ROWS))
    maxima = (np.abs(block).max(-2) for block in blocks)
    return functools.reduce(np.maximum, maxima).astype(wide)


@run.register
def _(step: SmoothQuant, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    for layer in layers:
        checks.check_weight(layer.stored_weight, layer.path)
        checks.check_statistics(layer, "absmax")
    stack = common.shared_stack(layers)
    x_absmax = common.shared(
        [jnp.broadcast_to(a.statistics.absmax, common.input_shape(a)) for a in layers], stack
    )
    w_absmax = common.shared([_column_maxima(a.stored_weight) for a in layers], stack)
    scale = smoothquant_scales(x_absmax, w_absmax, step.alpha)
    results = []
    for layer in layers:
        nm = common.pattern(layer)
        result = common.rescaled(layer, scale)
        if result.mask is not None:
            parts = common.sparse_parts(result.weight, result.mask, nm, result.original_dtype)
            result = result.replace(parts=parts)
        results.append(result)
    return tuple(results)
