"""What compression costs: perplexity, and divergence from the dense model."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import host
from jaxcomp.errors import DataError, JaxcompError


class Evaluation(NamedTuple):
    """Means over the predicted tokens (all but the first of each sequence).

    Attributes:
      nats: cross entropy in nats per token.
      perplexity: its exponential.
      kl: divergence KL(reference || model) in nats per token, None without a reference.
      agreement: share of tokens of which both models hold the same one likeliest, or None.
      tokens: number of predicted tokens.
    """

    nats: float
    perplexity: float
    kl: float | None
    agreement: float | None
    tokens: int


def evaluate(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    *,
    reference: tuple[Callable[..., Any], Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Perplexity of a causal language model, and its divergence from another, in one pass.

    The logits of one batch at a time are held; sums are kept in float64 and in the order of the
    batches, so that the same data gives the same numbers.

    Args:
      apply: ``apply(params, tokens)`` to logits ``(batch, length, vocab)``.
      params: dense or (with a dispatched ``apply``) compressed weights.
      batches: one-element tuples of ``(batch, length)`` token ids; a smaller last batch is padded,
        so that one compilation serves all.
      reference: apply and params of the model to compare with.
      progress: called after each batch with the number of batches done.

    Returns:
      The means.

    Raises:
      DataError: there are no tokens to predict.
      JaxcompError: logits are NaN or infinite.
    """
    totals = np.zeros(4, np.float64)
    other_apply, other_params = (None, None) if reference is None else reference
    # Memory-mapped weights are brought to the device once, not at each batch.
    params, other_params = jax.tree.map(jnp.asarray, (params, other_params))
    rows = 0
    for number, batch in enumerate(batches):
        tokens = np.asarray(batch[0] if isinstance(batch, tuple | list) else batch)
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise DataError(
                f"batch {number}: expected token ids (batch, length) with at least 2 tokens a "
                f"sequence, got shape {tokens.shape}"
            )
        count = len(tokens)
        rows = rows or count
        if count < rows:
            tokens = np.concatenate([tokens, np.repeat(tokens[-1:], rows - count, axis=0)])
        weights = (np.arange(len(tokens)) < count).astype(np.float32)
        sums = _sums(apply, other_apply, params, other_params, tokens, weights)
        sums = host.fetch(sums).astype(np.float64).sum(axis=1)
        if not np.isfinite(sums).all():
            raise JaxcompError(
                f"batch {number}: the logits are NaN or infinite; the weights or the scales of the "
                "compressed model are, or an activation overflowed"
            )
        totals += (*sums, count * (tokens.shape[1] - 1))
        if progress is not None:
            progress(number + 1)
    if not totals[3]:
        raise DataError("no batches to evaluate on; give a text with at least one window")
    loss, divergence, same = (float(t) for t in totals[:3] / totals[3])
    perplexity = math.exp(loss) if loss < 700 else math.inf
    compared = reference is not None
    return Evaluation(
        nats=loss,
        perplexity=perplexity,
        kl=divergence if compared else None,
        agreement=same if compared else None,
        tokens=int(totals[3]),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(apply, other_apply, params, other_params, tokens, weights):
    """Per sequence sums ``(3, batch)`` of cross entropy, divergence and agreement."""

    def log_probabilities(apply, params):
        logits = apply(params, tokens)[:, :-1]
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return jax.nn.log_softmax(logits, axis=-1)

    ours = log_probabilities(apply, params)
    loss = -jnp.take_along_axis(ours, tokens[:, 1:, None], axis=-1)[..., 0].sum(-1)
    divergence = same = jnp.zeros_like(loss)
    if other_apply is not None:
        theirs = log_probabilities(other_apply, other_params)
        divergence = (jnp.exp(theirs) * (theirs - ours)).sum((-1, -2))
        same = (ours.argmax(-1) == theirs.argmax(-1)).sum(-1).astype(loss.dtype)
    sums = jnp.stack([loss, divergence, same])
    # Padding rows count nothing, but 0 * NaN must not hide what the model did to real rows.
    return jnp.where(weights > 0, sums, 0)


def perplexity(apply: Callable[..., Any], params: Any, batches: Iterable[tuple[Any, ...]]) -> float:
    """Perplexity of a causal language model.

    Args:
      apply: ``apply(params, tokens)`` to logits ``(batch, length, vocab)``.
      params: its weights.
      batches: one-element tuples of ``(batch, length)`` token ids.

    Returns:
      The exponential of the mean cross entropy over predicted tokens.

    Raises:
      DataError: there are no tokens to predict.
      JaxcompError: logits are NaN or infinite.
    """
    return evaluate(apply, params, batches).perplexity


def kl(
    dense_apply: Callable[..., Any],
    dense_params: Any,
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
) -> float:
    """Mean divergence KL(dense || model) of the next-token distributions, in nats per token.

    Args:
      dense_apply: the reference.
      dense_params: its weights.
      apply: the model compared with it, ``apply(params, tokens)`` to logits.
      params: its weights.
      batches: one-element tuples of ``(batch, length)`` token ids.

    Returns:
      The mean over predicted tokens, zero for equal models.

    Raises:
      DataError: there are no tokens to predict.
      JaxcompError: logits are NaN or infinite.
    """
    result = evaluate(apply, params, batches, reference=(dense_apply, dense_params)).kl
    assert result is not None
    return result
