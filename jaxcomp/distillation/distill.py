"""Student, teacher and losses as one function of parameters and batch."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.errors import JaxcompError

Term = Callable[[Any, Any, Any], jax.Array]


def distill(
    student_apply: Callable[..., Any],
    teacher_apply: Callable[..., Any] | None,
    losses: Mapping[str, Term],
    weights: Mapping[str, float | Callable[[Any], Any]] | None = None,
    inputs: Callable[[Any], tuple] = lambda batch: (batch,),
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Builds a loss with the teacher's forward pass in it, for ``jax.value_and_grad`` and jit.

    Args:
      student_apply: ``(params, *inputs) -> output``, any pytree: logits, or logits and taps.
      teacher_apply: the same of the teacher; None if its outputs come with the batch.
      losses: terms by name, ``(student_output, teacher_output, batch) -> scalar``.
      weights: numbers, or schedules of the step, by name of the term; 1 by default.
      inputs: what of a batch both models take, a tuple; the batch itself by default.

    Returns:
      ``loss(student_params, teacher_params, batch, step=None) -> (scalar, metrics)``. The teacher's
      parameters and outputs are constants. Metrics: each term by name, unweighted, and "loss".

    Raises:
      JaxcompError: there are no losses, or a weight is of none of them; when called, a term is no
        scalar, or a schedule gets no step.

    Example:
      >>> from jaxcomp.distillation import kl_divergence
      >>> apply = lambda w, x: x @ w
      >>> loss = distill(apply, apply, {"kd": lambda s, t, batch: kl_divergence(s, t).mean()})
      >>> value, metrics = loss(jnp.eye(2), jnp.eye(2), jnp.ones((3, 2)))
      >>> float(value), sorted(metrics)
      (0.0, ['kd', 'loss'])
    """
    weights = dict(weights or {})
    unknown = sorted(set(weights) - set(losses))
    if not losses or unknown or "loss" in losses:
        raise JaxcompError(
            f"losses {sorted(losses)} with weights of {unknown}, which are none of them"
            if unknown
            else f"losses {sorted(losses)}: give at least one, and none called 'loss'"
        )

    def loss(student_params, teacher_params, batch, step=None):
        arguments = inputs(batch)
        if not isinstance(arguments, tuple):
            raise JaxcompError(
                f"inputs gave a {type(arguments).__name__}; it must give the tuple of what both "
                'models take, as in lambda batch: (batch["tokens"],)'
            )
        theirs = None
        if teacher_apply is not None:
            theirs = teacher_apply(jax.lax.stop_gradient(teacher_params), *arguments)
            theirs = jax.lax.stop_gradient(theirs)
        ours = student_apply(student_params, *arguments)
        metrics = {name: term(ours, theirs, batch) for name, term in losses.items()}
        total = 0.0
        for name, value in metrics.items():
            if jnp.shape(value) != ():
                raise JaxcompError(
                    f"loss {name!r} has shape {jnp.shape(value)}; reduce it to a scalar with "
                    "masked_mean"
                )
            weight = weights.get(name, 1.0)
            if callable(weight):
                if step is None:
                    raise JaxcompError(f"the weight of loss {name!r} is a schedule; pass step")
                weight = weight(step)
            total = total + weight * value
        return total, {**metrics, "loss": total}

    return loss
