"""LLM.int8(): int8 matmul with the few outlier features of the input taken out and kept dense.

    O = {feature j: |X_tj| >= threshold for some token t}
    Y = X_O W_Oᵀ + S_x S_w (int8(X_rest) int8(W_rest)ᵀ)
    S_x = max|X_t,rest| / 127,   S_w = max|W_o,rest| / 127

with one scale a token and one an output ("vector-wise"). ``llm_int8_matmul`` is this rule as it
stands, with O found in every call. ``llm_int8`` fixes O from calibration, which makes the weight
storable: int8 weights under a quantized input that does not see the outlier features, plus the
outlier columns.

Differs from the paper in: stored weights take O from calibration instead of from each call (an
input whose outliers lie elsewhere is quantized with them inside), and the dense part has the
weight's dtype instead of float16.

Source: LLM.int8(), https://arxiv.org/abs/2208.07339.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.errors import JaxcompError
from jaxcomp.formats.compressed import CompressedArray
from jaxcomp.formats.dense import Dense, DenseColumns
from jaxcomp.formats.spec import Int
from jaxcomp.formats.transforms import InputScale
from jaxcomp.quantization import checks, common
from jaxcomp.quantization.activation import quantize_input, quantized_matmul
from jaxcomp.step import Activation, Layer, Step, run

FORMAT = Int(8, full_range=False)
ACTIVATION = Activation()


class LLMInt8(Step, frozen=True, tag="llm_int8"):
    """Int8 weights and inputs, outlier features dense.

    Attributes:
      threshold: features that reach this magnitude in calibration stay dense.
    """

    threshold: float = 6.0

    def needs(self) -> frozenset[str]:
        """The largest magnitude of each input channel."""
        return frozenset({"absmax"})


def check_threshold(threshold: float, path: str = "") -> None:
    """Checks the magnitude from which a feature is an outlier.

    Args:
      threshold: the magnitude.
      path: name of the weight, for the message.

    Raises:
      JaxcompError: it is negative or NaN.
    """
    if not threshold >= 0:
        where = f"{path}: " if path else ""
        raise JaxcompError(f"{where}threshold {threshold} must be 0 or more; the paper's is 6.0")


@functools.partial(jax.jit, static_argnames=("count",))
def _columns(w, outlier, count):
    """The outlier columns and their positions, filled up to ``count`` with in_size."""
    size = w.shape[-1]
    order = jnp.argsort(~outlier, axis=-1, stable=True)[..., :count]
    used = jnp.take_along_axis(outlier, order, -1)
    values = jnp.take_along_axis(w, order[..., None, :], -1)
    return jnp.where(used[..., None, :], values, 0), jnp.where(used, order, size).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("count",))
def _split(w, outlier, count):
    wide = w.astype(common.working_dtype(w))
    rest = jnp.where(outlier[..., None, :], 0.0, wide)
    rounded = common.round_to_grid(FORMAT, rest, "minmax", 100.0, None)
    values, indices = _columns(w, outlier, count)
    return rounded, values, indices, jnp.where(outlier[..., None, :], wide, rounded.values)


def _parts(w, absmax, threshold, path, dtype=None, uniform=False):
    """The parts, outliers in ``dtype``; ``uniform`` ones have one structure for any outliers."""
    check_threshold(threshold, path)
    checks.check_format(FORMAT, w, None, None, path)
    checks.check_weight(w, path)
    if absmax.shape not in ((w.shape[-1],), (*w.shape[:-2], w.shape[-1])):
        raise JaxcompError(
            f"{path + ': ' if path else ''}a weight {tuple(w.shape)} needs ({w.shape[-1]},) "
            f"largest magnitudes of its input, got {tuple(absmax.shape)}"
        )
    outlier = np.broadcast_to(np.asarray(absmax) >= threshold, (*w.shape[:-2], w.shape[-1]))
    if outlier.all() and not uniform:
        return (Dense(jnp.asarray(w)),), jnp.asarray(w)
    count = int(outlier.sum(-1).max())
    rounded, values, indices, whole = _split(w, outlier, count)
    part = common.with_activation([rounded.part], ACTIVATION)[0]
    if not count and not uniform:
        return (part,), whole
    # The integer matmul must not see the outliers, or they would set its scale: they are
    # multiplied by 0.
    hidden = InputScale(part, jnp.asarray(np.where(outlier, 0.0, 1.0), jnp.float32))
    values = values.astype(dtype or values.dtype)
    return (hidden, DenseColumns(values, indices, in_size=w.shape[-1])), whole


def llm_int8(w: jax.Array, x: jax.Array, threshold: float = 6.0) -> CompressedArray:
    """Stores a weight as int8 plus the dense columns of outlier features.

    Args:
      w: ``(*stack, out, in)`` float.
      x: calibration inputs ``(tokens, in)``, or their largest magnitudes ``(in,)``.
      threshold: features that reach this magnitude stay dense. 0 keeps all dense, infinity none.

    Returns:
      A compressed array of the shape and dtype of ``w``.

    Raises:
      JaxcompError: shapes do not fit, or values are not finite.

    Example:
      >>> w = llm_int8(jnp.array([[0.5, 100.0, 0.25]]), jnp.array([1.0, 60.0, 2.0]))
      >>> w.materialize()[0, 1].item()
      100.0

    Source: https://arxiv.org/abs/2208.07339, equation 8.
    """
    x = jnp.asarray(x)
    absmax = x
    if x.ndim > 1:
        checks.check_inputs(x, w)
        absmax = jnp.abs(x).max(-2)
    parts, _ = _parts(w, absmax, threshold, "")
    return common.compressed(parts, w)


def llm_int8_matmul(x: jax.Array, w: jax.Array, threshold: float = 6.0) -> jax.Array:
    """The paper's matmul: outlier features of this very input in full precision, the rest in int8.

    Which features are outliers depends on data, so under jit both products run over all features,
    with zeros in place of the other kind.

    Args:
      x: ``(tokens, in)``.
      w: ``(out, in)``.
      threshold: magnitude from which a feature is an outlier.

    Returns:
      ``(tokens, out)`` in the dtype of ``x``.

    Raises:
      JaxcompError: ``threshold`` is negative.

    Source: https://arxiv.org/abs/2208.07339, equation 8.
    """
    check_threshold(threshold)
    return _matmul(x, w, threshold)


@jax.jit
def _matmul(x, w, threshold):
    dtype = common.working_dtype(x, w)
    wide, w = x.astype(dtype), w.astype(dtype)
    outlier = jnp.any(jnp.abs(wide) >= threshold, axis=0)
    dense = jnp.matmul(jnp.where(outlier, wide, 0.0), w.T, precision=jax.lax.Precision.HIGHEST)
    x_codes, x_scale, _ = quantize_input(jnp.where(outlier, 0.0, wide), ACTIVATION)
    w_codes, w_scale, _ = quantize_input(jnp.where(outlier, 0.0, w), ACTIVATION)
    rest = quantized_matmul(x_codes, x_scale, None, w_codes, w_scale.T)
    return (dense + rest).astype(x.dtype)


@run.register
def _(step: LLMInt8, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    results = []
    for layer in layers:
        checks.check_statistics(layer, "absmax")
        if layer.mask is not None:
            raise JaxcompError(
                f"{layer.path}: LLM.int8() stores dense int8 weights and cannot keep a mask; "
                "quantize the pruned weight with RTN or GPTQ, or exclude this path"
            )
        # Layers of a stack have more or fewer outliers, or none, and are to be stacked again.
        parts, values = _parts(
            layer.weight,
            layer.statistics.absmax,
            step.threshold,
            layer.path,
            layer.original_dtype,
            uniform=True,
        )
        layer = common.quantized(layer, parts, values, None).replace(activation=ACTIVATION)
        results.append(layer)
    return tuple(results)
