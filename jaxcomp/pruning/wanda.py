"""Wanda: drops the weights whose product with the norm of their input is smallest, row by row.

    S_ij = |W_ij| * ||X_j||₂,
    the smallest round(sparsity * in) of each row dropped, or all but n of every m inputs

with ||X_j|| over all calibration tokens. Weights that stay are not changed. S² is, up to a factor,
the loss of the layer's squared output when one weight goes and the inputs are uncorrelated.

Differs from the paper's code in: exactly that many weights go in each row, ties included.

Source: Wanda, https://arxiv.org/abs/2306.11695.
"""

import jax
import jax.numpy as jnp

from jaxcomp.errors import JaxcompError
from jaxcomp.formats.compressed import CompressedArray
from jaxcomp.pruning import masks
from jaxcomp.pruning.magnitude import prune
from jaxcomp.quantization import checks, common
from jaxcomp.step import Layer, Step, run


class Wanda(Step, frozen=True, tag="wanda"):
    """Drops the weights of each row that matter least to its output.

    Attributes:
      sparsity: fraction to drop; or ``n`` and ``m`` instead.
      n: weights kept of each block.
      m: consecutive inputs in a block.
    """

    sparsity: float | None = None
    n: int | None = None
    m: int | None = None

    def needs(self) -> frozenset[str]:
        """The inputs' sums of squares."""
        return frozenset({"sumsq"})


def _scores(w, x_norm):
    dtype = common.working_dtype(w, x_norm)
    return jnp.abs(w).astype(dtype) * x_norm.astype(dtype)[..., None, :]


def wanda(
    w: jax.Array,
    x_norm: jax.Array,
    sparsity: float | None = None,
    n: int | None = None,
    m: int | None = None,
) -> CompressedArray:
    """Drops the weights with the smallest |W_ij| ||X_j|| of each row.

    Args:
      w: ``(*stack, out, in)`` float.
      x_norm: ``(in,)`` or ``(*stack, in)``, l2 norm of each input channel over the calibration
        tokens (any positive multiple gives the same mask).
      sparsity: fraction of each row to drop, 0 to 1; or ``n`` and ``m`` instead.
      n: weights kept of each m consecutive inputs.
      m: size of such a block.

    Returns:
      A compressed array of the shape and dtype of ``w``.

    Raises:
      JaxcompError: an option is out of its range, shapes do not fit, or values are not finite.

    Example:
      >>> w = jnp.array([[1.0, -3.0, 2.0, 0.5]])
      >>> wanda(w, jnp.array([9.0, 1.0, 1.0, 8.0]), 0.5).materialize().tolist()
      [[1.0, 0.0, 0.0, 0.5]]

    Source: https://arxiv.org/abs/2306.11695, equation 1.
    """
    nm = masks.check_target(sparsity, n, m, w.shape[-1])
    checks.check_weight(w)
    if tuple(x_norm.shape) not in ((w.shape[-1],), (*w.shape[:-2], w.shape[-1])):
        raise JaxcompError(
            f"a weight {tuple(w.shape)} needs norms ({w.shape[-1]},) of its input, got "
            f"{tuple(x_norm.shape)}"
        )
    checks.check_finite(x_norm, "the norms of the inputs")
    _, _, parts = prune(w, _scores(w, jnp.asarray(x_norm)), sparsity, nm, "row")
    return common.compressed(parts, w)


@run.register
def _(step: Wanda, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    results = []
    for layer in layers:
        w = layer.weight
        nm = masks.check_target(step.sparsity, step.n, step.m, w.shape[-1], layer.path)
        checks.check_weight(w, layer.path)
        checks.check_statistics(layer, "sumsq")
        # An expert that saw no tokens is pruned by magnitude.
        seen = layer.statistics.count[..., None] > 0
        scores = _scores(w, jnp.where(seen, jnp.sqrt(layer.statistics.sumsq), 1.0))
        mask, weight, parts = prune(w, scores, step.sparsity, nm, "row", layer.mask)
        results.append(common.pruned(layer, mask, weight, parts))
    return tuple(results)
