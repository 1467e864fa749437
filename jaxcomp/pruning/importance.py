"""How much the loss would change: first-order Taylor scores, and head importance.

Removing a weight w changes the loss by L(w=0) - L(w) = -w g + 1/2 w² H + .., g its gradient:

    signed    -w g          the change itself, to first order: large means important
    abs       |w g|
    square    (w g)²
    of a unit |sum w g| or (sum w g)², the sum over its weights: the change when all of it goes

    head importance   I_h = E_x |dL(x) / dxi_h|,   xi_h = 1 a factor on the output of head h

normalised in each layer by the l2 norm over its heads.

The mean over x in head importance is outside the magnitude. The gradient of a batch's mean loss has
it inside, where examples cancel: |E_x g| is not E_x |g| unless the batch is one example.
``head_importance`` takes each example's gradient for itself, by vmap.

Differs from the paper in: nothing; many released codes take |gradient of the batch mean|.

Source: Molchanov et al., https://arxiv.org/abs/1611.06440 and https://arxiv.org/abs/1906.10771;
Michel, Levy, Neubig, https://arxiv.org/abs/1905.10650.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcomp.errors import JaxcompError
from jaxcomp.pruning import masks
from jaxcomp.pruning.blocks import check_coupled, unit_sum

Reduction = Literal["signed", "abs", "square"]


def reduce_taylor(first_order: jax.Array, reduction: Reduction) -> jax.Array:
    """Makes a score of w g.

    Args:
      first_order: w g, or its sums over units.
      reduction: "signed" for -w g, "abs" or "square".

    Returns:
      The score.

    Raises:
      JaxcompError: there is no such reduction.
    """
    if reduction == "signed":
        return -first_order
    if reduction == "abs":
        return jnp.abs(first_order)
    if reduction == "square":
        return first_order**2
    raise JaxcompError(f"reduction {reduction!r} must be 'signed', 'abs' or 'square'")


def taylor_scores(
    weights: jax.Array, gradients: jax.Array, reduction: Reduction = "abs"
) -> jax.Array:
    """First-order Taylor scores of weights.

    Args:
      weights: any shape.
      gradients: dL/dw like ``weights``.
      reduction: "signed" for the change of the loss itself, "abs" or "square".

    Returns:
      Scores like ``weights``, at least float32.

    Raises:
      JaxcompError: shapes differ, or there is no such reduction.

    Example:
      >>> taylor_scores(jnp.array([2.0, -1.0]), jnp.array([0.5, 0.5]), "signed").tolist()
      [-1.0, 0.5]

    Source: https://arxiv.org/abs/1906.10771, equation 8.
    """
    return reduce_taylor(_product(weights, gradients), reduction)


def _product(w, g):
    if w.shape != g.shape:
        raise JaxcompError(f"weights {tuple(w.shape)} and gradients {tuple(g.shape)} must agree")
    wide = jnp.promote_types(jnp.result_type(w, g), jnp.float32)
    return w.astype(wide) * g.astype(wide)


def taylor_unit_scores(
    weights: Any, gradients: Any, units: Any, reduction: Reduction = "abs"
) -> jax.Array:
    """First-order Taylor scores of units: w g is summed over all weights of a unit first.

    Args:
      weights: an array, or a sequence of arrays whose units are coupled.
      gradients: like ``weights``.
      units: an axis, axes or ``Units`` for each array.
      reduction: "signed", "abs" for |sum w g| or "square" for (sum w g)².

    Returns:
      One score a unit.

    Raises:
      JaxcompError: shapes or units differ.

    Example:
      >>> w, g = jnp.array([[1.0, 2.0], [1.0, 2.0]]), jnp.array([[1.0, 1.0], [-1.0, 1.0]])
      >>> taylor_unit_scores(w, g, -1).tolist()
      [0.0, 4.0]

    Source: https://arxiv.org/abs/1906.10771, equations 7 and 8.
    """
    if hasattr(weights, "shape"):
        weights, gradients, units = [weights], [gradients], [units]
    check_coupled([w.shape for w in weights], units)
    pairs = zip(weights, gradients, units, strict=True)
    return reduce_taylor(sum(unit_sum(_product(w, g), u) for w, g, u in pairs), reduction)


def normalize_layers(scores: jax.Array, axis: int = -1) -> jax.Array:
    """Divides scores by their l2 norm in each layer.

    Args:
      scores: ``(layers, units)``.
      axis: axis of the units.

    Returns:
      Scores of norm 1 a layer; a layer of zeros stays zero.

    Example:
      >>> [[round(x, 6) for x in row] for row in normalize_layers(jnp.array([[3.0, 4.0]])).tolist()]
      [[0.6, 0.8]]
    """
    norm = jnp.linalg.norm(scores, axis=axis, keepdims=True)
    return scores / jnp.where(norm > 0, norm, 1)


def head_importance(
    loss: Callable[[Any, Any], jax.Array],
    gates: Any,
    examples: Any,
    *,
    normalize: bool = True,
    example_weights: jax.Array | None = None,
) -> Any:
    """Expected sensitivity of the loss to each head's gate.

    Args:
      loss: ``loss(gates, example) -> scalar`` of ONE example (no batch axis), with each head's
        output multiplied by its gate.
      gates: array ``(layers, heads)`` of ones, or a pytree of arrays ``(.., heads)``; where the
        gates stand is where the gradients are taken.
      examples: pytree of arrays with a leading axis of examples.
      normalize: divide each layer's scores by their l2 norm.
      example_weights: ``(examples,)``, 0 for padding examples; None counts all alike.

    Returns:
      Like ``gates``: the weighted mean over examples of |dL/dxi|. Over several batches of the same
      size take the mean of unnormalised results, then ``normalize_layers``.

    Raises:
      JaxcompError: the loss is no scalar.

    Example:
      >>> def loss(gates, x):
      ...     return (gates * x).sum()
      >>> x = jnp.array([[1.0, 2.0], [-1.0, 2.0]])  # the mean gradient of head 0 is zero
      >>> head_importance(loss, jnp.ones(2), x, normalize=False).tolist()
      [1.0, 2.0]

    Source: https://arxiv.org/abs/1905.10650, equation 2 and section 2.4.
    """
    first = jax.tree.map(lambda x: x[0], examples)
    shape = jax.eval_shape(loss, gates, first)
    if getattr(shape, "shape", None) != ():
        raise JaxcompError(
            f"the loss of one example must be a scalar, got {shape}; it is called without a batch "
            "axis"
        )
    gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0))(gates, examples)

    def score(g):
        sizes = jnp.abs(g)
        if example_weights is None:
            mean = sizes.mean(0)
        else:
            total = example_weights.sum()
            mean = jnp.tensordot(example_weights, sizes, 1) / jnp.where(total > 0, total, 1)
        return normalize_layers(mean) if normalize else mean

    return jax.tree.map(score, gradients)


def prune_units(
    scores: Any,
    fraction: float,
    scope: Literal["global", "layer"] = "global",
    keep_one: bool = True,
) -> Any:
    """Selects the units to keep.

    Args:
      scores: pytree of ``(.., units)`` scores, larger for more important; leading axes are layers.
      fraction: of the units to drop, 0 to 1: of each layer, or of all.
      scope: what a unit is compared with: "layer" or "global".
      keep_one: never drop the best unit of a layer.

    Returns:
      Tree of bool, True for units to keep: exactly round(fraction * units) are dropped, ties
      broken in order.

    Raises:
      JaxcompError: the fraction is none, the scope is unknown, or one unit a layer cannot be kept.

    Example:
      >>> prune_units(jnp.array([[1.0, 2.0], [3.0, 4.0]]), 0.5).tolist()
      [[False, True], [False, True]]
      >>> prune_units(jnp.array([[1.0, 2.0], [3.0, 4.0]]), 0.5, keep_one=False).tolist()
      [[False, False], [True, True]]
    """
    masks.check_sparsity(fraction)
    if scope not in ("global", "layer"):
        raise JaxcompError(f"scope {scope!r} must be 'global' or 'layer'")
    leaves, structure = jax.tree.flatten(scores)
    groups = [(leaf.size // max(1, leaf.shape[-1]), leaf.shape[-1]) for leaf in leaves]
    if scope == "global":
        groups = [(sum(layers for layers, _ in groups), sum(leaf.size for leaf in leaves))]
    for layers, size in groups:
        needed = layers if scope == "global" else 1
        dropped = masks.dropped_count(fraction, size)
        if keep_one and dropped > size - needed:
            raise JaxcompError(
                f"dropping {dropped} of {size} units leaves fewer than one in each layer; lower "
                f"the fraction {fraction} or pass keep_one=False"
            )
    if keep_one:
        leaves = [_protect_best(leaf) for leaf in leaves]
    if scope == "layer":
        kept = [
            masks.drop_smallest(s, masks.dropped_count(fraction, s.shape[-1]), signed=True)
            for s in leaves
        ]
    else:
        count = masks.dropped_count(fraction, groups[0][1])
        kept = masks.drop_smallest_of_all(leaves, count, signed=True)
    return structure.unflatten(kept)


def _protect_best(scores: jax.Array) -> jax.Array:
    best = jnp.argmax(scores, -1, keepdims=True)
    index = jax.lax.broadcasted_iota(best.dtype, scores.shape, scores.ndim - 1)
    return jnp.where(index == best, jnp.inf, scores)


def mean_importance(scores: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
    """Averages the scores of several batches.

    Args:
      scores: one tree a batch, not normalised.
      weights: examples of each batch; None for batches of the same size.

    Returns:
      The mean tree.

    Example:
      >>> mean_importance([jnp.array([1.0]), jnp.array([4.0])], [2, 1]).tolist()
      [2.0]
    """
    weights = [1.0] * len(scores) if weights is None else list(weights)
    total = sum(weights)
    return jax.tree.map(
        lambda *s: sum(w * x for w, x in zip(weights, s, strict=True)) / total, *scores
    )
