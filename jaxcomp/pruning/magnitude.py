"""Magnitude pruning: drops the weights that are smallest in themselves, no data needed.

    score = |W|, the smallest dropped: of each matrix, of each row, or of every m consecutive
    inputs (N:M)

Differs from the released codes in: exactly round(sparsity * size) weights go, ties included (a
threshold compared with <= takes one too many, and all ties).

Source: Han et al., https://arxiv.org/abs/1506.02626.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcomp.formats.compressed import CompressedArray
from jaxcomp.pruning import masks
from jaxcomp.quantization import checks, common
from jaxcomp.step import Layer, Step, run

SCOPES = ("tensor", "row")


class Magnitude(Step, frozen=True, tag="magnitude"):
    """Drops the smallest weights.

    Attributes:
      sparsity: fraction to drop; or ``n`` and ``m`` instead.
      n: weights kept of each block.
      m: consecutive inputs in a block.
      scope: what a weight is compared with, the whole matrix or its row; not for N:M.
    """

    sparsity: float | None = None
    n: int | None = None
    m: int | None = None
    scope: Literal["tensor", "row"] = "tensor"


@functools.partial(jax.jit, static_argnames=("sparsity", "nm", "scope"))
def _mask(scores, allowed, *, sparsity, nm, scope):
    scores = jnp.abs(scores)
    if allowed is not None:
        scores = jnp.where(allowed, scores, 0)
    if nm is not None:
        mask = masks.nm_mask(scores, *nm)
    elif scope == "row":
        mask = masks.row_mask(scores, sparsity)
    else:
        mask = masks.tensor_mask(scores, sparsity)
    return mask if allowed is None else mask & allowed


def prune(
    w: jax.Array,
    scores: jax.Array,
    sparsity: float | None,
    nm: tuple[int, int] | None,
    scope: str,
    allowed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, tuple[Any, ...]]:
    """Drops the weights with the smallest scores.

    Args:
      w: ``(*stack, out, in)``.
      scores: like ``w``; their magnitudes count.
      sparsity: fraction to drop, or None.
      nm: (n, m) to keep n of m consecutive inputs, or None.
      scope: "tensor" or "row".
      allowed: bool like ``w``, weights that were not dropped before.

    Returns:
      The mask, the pruned weight and the parts that hold it.
    """
    mask = _mask(scores, allowed, sparsity=sparsity, nm=nm, scope=scope)
    weight = masks.apply_mask(w, mask)
    kept = None
    if allowed is None and nm is None:
        # Known without looking, so that this also runs under jit.
        out, size = w.shape[-2:]
        rows, group = (out, size) if scope == "row" else (1, out * size)
        kept = rows * (group - masks.dropped_count(sparsity, group))
    return mask, weight, common.sparse_parts(weight, mask, nm, kept=kept)


def magnitude(
    w: jax.Array,
    sparsity: float | None = None,
    n: int | None = None,
    m: int | None = None,
    scope: Literal["tensor", "row"] = "tensor",
) -> CompressedArray:
    """Drops the smallest weights of a matrix.

    Args:
      w: ``(*stack, out, in)`` float.
      sparsity: fraction to drop, 0 to 1; or ``n`` and ``m`` instead.
      n: weights kept of each m consecutive inputs.
      m: size of such a block.
      scope: "tensor" compares all weights of a matrix, "row" those of one output.

    Returns:
      A compressed array of the shape and dtype of ``w``.

    Raises:
      JaxcompError: an option is out of its range, or weights are not finite.

    Example:
      >>> magnitude(jnp.array([[1.0, -3.0, 2.0, 0.5]]), 0.5).materialize().tolist()
      [[0.0, -3.0, 2.0, 0.0]]

    Source: https://arxiv.org/abs/1506.02626.
    """
    nm = masks.check_target(sparsity, n, m, w.shape[-1])
    checks.check_choice("scope", scope, SCOPES)
    checks.check_weight(w)
    _, _, parts = prune(w, w, sparsity, nm, scope)
    return common.compressed(parts, w)


@run.register
def _(step: Magnitude, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    results = []
    for layer in layers:
        w = layer.weight
        nm = masks.check_target(step.sparsity, step.n, step.m, w.shape[-1], layer.path)
        checks.check_choice("scope", step.scope, SCOPES, layer.path)
        checks.check_weight(w, layer.path)
        mask, weight, parts = prune(w, w, step.sparsity, nm, step.scope, layer.mask)
        results.append(common.pruned(layer, mask, weight, parts))
    return tuple(results)
