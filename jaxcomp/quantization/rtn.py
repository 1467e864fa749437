"""Round to nearest: every weight to the nearest point of its group's grid, no data needed.

    What = Q(W),  e.g. S * (clip(round(W / S) + Z, qmin, qmax) - Z)

with the grid placed on each group by its extremes, by percentiles, or by the search over shrunken
ranges that minimises the l2.4 norm of the error (the one of GPTQ's code). The baseline of all
other methods.
"""

import functools

import jax

from jaxcomp.formats.compressed import CompressedArray
from jaxcomp.formats.spec import Element
from jaxcomp.quantization import checks, common
from jaxcomp.step import Activation, Layer, Step, run


class RTN(Step, frozen=True, tag="rtn"):
    """Rounds weights to the nearest value of a format.

    Attributes:
      format: what weights become.
      clipping: how a group's range is chosen.
      percentile: of the magnitudes, for ``clipping="percentile"``.
      activation: how the input is quantized at run time; None leaves it alone.
    """

    format: Element
    clipping: str = "minmax"
    percentile: float = 99.9
    activation: Activation | None = None

    def needs(self) -> frozenset[str]:
        """Nothing, or the inputs' range for static activation scales."""
        return common.activation_needs(self.activation)

    def by_matrix(self) -> bool:
        """Yes."""
        return True


@functools.partial(jax.jit, static_argnames=("fmt", "clipping", "percentile"))
def _rtn(w, mask, *, fmt, clipping, percentile):
    w = w.astype(common.working_dtype(w))
    return common.round_to_grid(fmt, w, clipping, percentile, mask)


def rtn(
    w: jax.Array,
    fmt: Element,
    clipping: str = "minmax",
    percentile: float = 99.9,
    activation: Activation | None = None,
    mask: jax.Array | None = None,
    nm: tuple[int, int] | None = None,
) -> CompressedArray:
    """Rounds a weight to the nearest values of a format.

    Args:
      w: ``(*stack, out, in)`` float.
      fmt: element format, ``Int``, ``Float`` or ``Codebook``.
      clipping: "minmax", "mse" or "percentile".
      percentile: of the magnitudes in a group, in percent, for ``clipping="percentile"``.
      activation: how the input is quantized when the weight is used; dynamic scales only, as no
        data is given.
      mask: bool like ``w``, False where the weight is zero and stays so.
      nm: (n, m) if ``mask`` has that pattern, to store it as such.

    Returns:
      A compressed array of the shape and dtype of ``w``.

    Raises:
      JaxcompError: the format does not fit the shape, or weights are not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcomp.formats import Int
      >>> rtn(jnp.array([[1.0, -7.0, 3.4]]), Int(4, full_range=False)).materialize().tolist()
      [[1.0, -7.0, 3.0]]
    """
    parts, _ = _parts(w, mask, nm, fmt, clipping, percentile, "")
    return common.compressed(common.with_activation(parts, activation), w)


def _parts(w, mask, nm, fmt, clipping, percentile, path):
    checks.check_format(fmt, w, mask, nm, path)
    checks.check_choice("clipping", clipping, checks.CLIPPINGS, path)
    checks.check_weight(w, path)
    rounded = _rtn(w, mask, fmt=fmt, clipping=clipping, percentile=percentile)
    return common.store(fmt, rounded, mask, nm), rounded.values


@run.register
def _(step: RTN, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    return tuple(_quantized(step, layer) for layer in layers)


def _quantized(step: RTN, layer: Layer) -> Layer:
    parts, values = _parts(
        layer.weight,
        layer.mask,
        common.pattern(layer),
        step.format,
        step.clipping,
        step.percentile,
        layer.path,
    )
    return common.quantized(layer, parts, values, step.activation)
