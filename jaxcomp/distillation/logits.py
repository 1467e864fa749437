"""Losses between a student's and a teacher's logits.

With p the teacher's and q the student's softmax of logits divided by a temperature T:

    kl_divergence           T² KL(p || q)
    reverse_kl_divergence   T² KL(q || p)
    jensen_shannon          T² [β KL(p || m) + (1 - β) KL(q || m)],  m = β p + (1 - β) q
    soft_cross_entropy      T² CE(p, q) = T² (KL(p || q) + H(p))
    logits_mse              mean_i (z_i - v_i)²
    hinton_loss             a T² CE(p, q) + (1 - a) CE(y, softmax(z))   (T = 1 on the hard term)

The gradient of the divergences shrinks as 1/T², which the factor T² undoes, so that the mix with
other losses keeps its meaning when T changes; ``t_squared=False`` leaves it out. For T to infinity
the gradient of T² KL is that of matching centred logits, (z - v)/N.

All take logits in any float dtype and compute in float32 at least, return one loss for each
position, and share these rules. An entry of -inf has probability 0; one that both lack costs
nothing; one that only q lacks makes the loss infinite. ``where`` has the shape of a loss (positions
that count) or the number of axes of the logits (vocabulary entries that count, padding left out).
The loss of a position that does not count is 0, and its gradient too, even for NaN.

Differs from the paper in: a and 1 - a weigh the two terms of Hinton's loss, which the paper leaves
open ("a considerably lower weight on the second").

Source: Hinton et al., https://arxiv.org/abs/1503.02531; Jensen-Shannon with β as in generalized
knowledge distillation, https://arxiv.org/abs/2306.13649; logit matching as in
https://arxiv.org/abs/1903.12136.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.distillation import common
from jaxcomp.errors import JaxcompError


def _prepare(student_logits, teacher_logits, axis, where, stop_gradient):
    common.check_same_shape(
        student_logits,
        teacher_logits,
        "logits",
        "slice both to the vocabulary that they share, or map the positions onto each other first",
    )
    z, v = common.as_floats(student_logits=student_logits, teacher_logits=teacher_logits)
    axis = common.check_axis(axis, z.ndim, "logits")
    return z, common.as_constant(v, stop_gradient), axis, common.entry_mask(where, z.shape, axis)


def _distributions(student_logits, teacher_logits, temperature, axis, where, stop_gradient):
    common.check_positive("temperature", temperature)
    z, v, axis, where = _prepare(student_logits, teacher_logits, axis, where, stop_gradient)
    positions = z.shape[:axis] + z.shape[axis + 1 :]
    if jnp.ndim(temperature) and jnp.shape(temperature) != positions:
        raise JaxcompError(
            f"temperature {jnp.shape(temperature)} must be a number or have the shape of the loss, "
            f"{positions}"
        )
    if jnp.ndim(temperature):
        temperature = jnp.expand_dims(jnp.asarray(temperature), axis)
    log_q = common.log_softmax(z / temperature, where, axis)
    log_p = common.log_softmax(v / temperature, where, axis)
    return log_q, log_p, axis


def _scaled(loss, temperature, t_squared):
    return loss * temperature**2 if t_squared else loss


def kl_divergence(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
    *,
    t_squared: bool = True,
    stop_gradient: bool = True,
) -> jax.Array:
    """T² KL(teacher || student), the forward divergence that covers the teacher's modes.

    Args:
      student_logits: ``(..., vocabulary)``.
      teacher_logits: like those of the student.
      temperature: T, above 0; divides both logits.
      axis: axis of the vocabulary.
      where: positions, or entries of the vocabulary, that count.
      t_squared: whether to multiply by T².
      stop_gradient: whether the teacher is a constant.

    Returns:
      ``(...)``, nats for each position.

    Raises:
      JaxcompError: shapes or dtypes do not fit, or the temperature is not positive.

    Example:
      >>> loss = kl_divergence(jnp.log(jnp.array([0.75, 0.25])), jnp.zeros(2))
      >>> round(float(loss), 4)
      0.1438

    Source: https://arxiv.org/abs/1503.02531.
    """
    log_q, log_p, axis = _distributions(
        student_logits, teacher_logits, temperature, axis, where, stop_gradient
    )
    return _scaled(common.relative_entropy(log_p, log_q, axis), temperature, t_squared)


def reverse_kl_divergence(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
    *,
    t_squared: bool = True,
    stop_gradient: bool = True,
) -> jax.Array:
    """T² KL(student || teacher), the reverse divergence that seeks one of the teacher's modes.

    Args:
      student_logits: ``(..., vocabulary)``.
      teacher_logits: like those of the student.
      temperature: T, above 0; divides both logits.
      axis: axis of the vocabulary.
      where: positions, or entries of the vocabulary, that count.
      t_squared: whether to multiply by T².
      stop_gradient: whether the teacher is a constant.

    Returns:
      ``(...)``, nats for each position.

    Raises:
      JaxcompError: shapes or dtypes do not fit, or the temperature is not positive.

    Source: https://arxiv.org/abs/2306.08543 (its loss on given text).
    """
    log_q, log_p, axis = _distributions(
        student_logits, teacher_logits, temperature, axis, where, stop_gradient
    )
    return _scaled(common.relative_entropy(log_q, log_p, axis), temperature, t_squared)


def jensen_shannon(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
    *,
    beta: float = 0.5,
    t_squared: bool = True,
    stop_gradient: bool = True,
) -> jax.Array:
    """T² times the Jensen-Shannon divergence; at β = 0.5 symmetric and at most ln 2 (before T²).

    Divided by β it tends to the forward divergence for β to 0, divided by 1 - β to the reverse one
    for β to 1.

    Args:
      student_logits: ``(..., vocabulary)``.
      teacher_logits: like those of the student.
      temperature: T, above 0; divides both logits.
      axis: axis of the vocabulary.
      where: positions, or entries of the vocabulary, that count.
      beta: weight of the teacher in the mixture, between 0 and 1, both excluded.
      t_squared: whether to multiply by T².
      stop_gradient: whether the teacher is a constant.

    Returns:
      ``(...)``, nats for each position.

    Raises:
      JaxcompError: shapes or dtypes do not fit, or an option is out of its range.

    Source: https://arxiv.org/abs/2306.13649.
    """
    if common.is_concrete(beta) and not 0 < beta < 1:
        raise JaxcompError(
            f"beta {beta} must lie between 0 and 1, both excluded; for the limits use "
            "kl_divergence and reverse_kl_divergence"
        )
    log_q, log_p, axis = _distributions(
        student_logits, teacher_logits, temperature, axis, where, stop_gradient
    )
    parts = jnp.stack([log_p + jnp.log(beta), log_q + jnp.log1p(-beta)])
    log_m = common.logsumexp(parts, parts != -jnp.inf, axis=0)[0]
    loss = beta * common.relative_entropy(log_p, log_m, axis)
    loss += (1 - beta) * common.relative_entropy(log_q, log_m, axis)
    return _scaled(loss, temperature, t_squared)


def soft_cross_entropy(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
    *,
    t_squared: bool = True,
    stop_gradient: bool = True,
) -> jax.Array:
    """T² CE(teacher, student): the forward divergence plus the teacher's entropy.

    Args:
      student_logits: ``(..., vocabulary)``.
      teacher_logits: like those of the student.
      temperature: T, above 0; divides both logits.
      axis: axis of the vocabulary.
      where: positions, or entries of the vocabulary, that count.
      t_squared: whether to multiply by T².
      stop_gradient: whether the teacher is a constant.

    Returns:
      ``(...)``, nats for each position.

    Raises:
      JaxcompError: shapes or dtypes do not fit, or the temperature is not positive.

    Source: https://arxiv.org/abs/1503.02531.
    """
    log_q, log_p, axis = _distributions(
        student_logits, teacher_logits, temperature, axis, where, stop_gradient
    )
    return _scaled(common.expectation(log_p, -log_q, axis), temperature, t_squared)


def logits_mse(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    axis: int = -1,
    where: jax.Array | None = None,
    *,
    center: bool = False,
    stop_gradient: bool = True,
) -> jax.Array:
    """Mean squared difference of logits.

    Args:
      student_logits: ``(..., vocabulary)``.
      teacher_logits: like those of the student.
      axis: axis of the vocabulary.
      where: positions, or entries of the vocabulary, that count.
      center: whether to subtract each one's mean first. Then a shift of all logits, which leaves
        the softmax alone, changes nothing, and half of the loss is the limit of T² KL for large T.
      stop_gradient: whether the teacher is a constant.

    Returns:
      ``(...)``, for each position.

    Raises:
      JaxcompError: shapes or dtypes do not fit.

    Example:
      >>> float(logits_mse(jnp.array([1.0, 2.0]), jnp.array([1.0, 5.0])))
      4.5

    Source: https://arxiv.org/abs/1903.12136.
    """
    z, v, axis, where = _prepare(student_logits, teacher_logits, axis, where, stop_gradient)
    absent = (z == -jnp.inf, v == -jnp.inf)
    counts = jnp.ones(z.shape, bool) if where is None else where
    compared = counts & ~(absent[0] | absent[1])
    difference = jnp.where(compared, z, 0) - jnp.where(compared, v, 0)
    if center:
        mean = jnp.expand_dims(common.masked_mean(difference, compared, axis), axis)
        difference = jnp.where(compared, difference - mean, 0)
    loss = common.masked_mean(difference**2, compared, axis)
    infinite = jnp.any(counts & (absent[0] ^ absent[1]), axis=axis)
    return jnp.where(infinite, jnp.inf, loss)


def check_labels(labels: Any, vocab_size: int, where: Any = None) -> None:
    """Checks on the host that labels are in the vocabulary.

    Args:
      labels: integers.
      vocab_size: number of entries of the vocabulary.
      where: bool, or 0 and 1, broadcastable to ``labels``: those that count.

    Raises:
      JaxcompError: labels are not integers, or one that counts is below 0 or at least
        ``vocab_size``.

    Example:
      >>> check_labels(jnp.array([3, -100]), 10, where=jnp.array([True, False]))
    """
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise JaxcompError(
            f"labels {labels.shape} of dtype {labels.dtype} must be integers; for distributions "
            "use soft_cross_entropy"
        )
    wrong = (labels < 0) | (labels >= vocab_size)
    if where is not None:
        mask = common.as_mask(np.asarray(where), labels.shape, "the labels")
        wrong &= np.asarray(mask)
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise JaxcompError(
            f"labels {labels.shape}: labels[{', '.join(map(str, index))}] = {labels[index]} is "
            f"outside the vocabulary of {vocab_size} ({int(wrong.sum())} such labels); mask "
            "padding with where, or give the model a larger vocabulary"
        )


def hard_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """Cross entropy with integer labels.

    Args:
      logits: ``(..., vocabulary)``.
      labels: integers ``(...)``. Where a position does not count they may be anything.
      axis: axis of the vocabulary.
      where: positions, or entries of the vocabulary, that count.

    Returns:
      ``(...)``, nats for each position. Under jit, where labels cannot be looked at, a label
      outside the vocabulary makes the loss NaN.

    Raises:
      JaxcompError: shapes or dtypes do not fit, or a label is outside the vocabulary.

    Example:
      >>> round(float(hard_cross_entropy(jnp.zeros(4), jnp.array(1))), 4)
      1.3863
    """
    (z,) = common.as_floats(logits=logits)
    axis = common.check_axis(axis, z.ndim, "logits")
    where = common.entry_mask(where, z.shape, axis)
    positions = z.shape[:axis] + z.shape[axis + 1 :]
    if np.shape(labels) != positions:
        raise JaxcompError(
            f"labels {np.shape(labels)} must have the shape {positions} of logits {z.shape} "
            "without the axis of the vocabulary"
        )
    counts = None if where is None else jnp.any(where, axis=axis)
    if common.is_concrete(labels, counts):
        check_labels(labels, z.shape[axis], counts)
    log_q = common.log_softmax(z, where, axis)
    # A comparison, not a gather: it stays local when the vocabulary is sharded.
    entries = jax.lax.broadcasted_iota(jnp.int32, z.shape, axis)
    picked = jnp.sum(jnp.where(entries == jnp.expand_dims(labels, axis), log_q, 0), axis=axis)
    loss = jnp.where((labels >= 0) & (labels < z.shape[axis]), -picked, jnp.nan)
    return loss if counts is None else jnp.where(counts, loss, 0)


def hinton_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    alpha: float | jax.Array = 0.5,
    temperature: float | jax.Array = 2.0,
    axis: int = -1,
    where: jax.Array | None = None,
    *,
    t_squared: bool = True,
    stop_gradient: bool = True,
) -> jax.Array:
    """Hinton's mix: a T² CE(teacher, student) at T, plus (1 - a) CE(labels, student) at T = 1.

    Args:
      student_logits: ``(..., vocabulary)``.
      teacher_logits: like those of the student.
      labels: integers ``(...)``.
      alpha: a, weight of the soft term, 0 to 1; may be the value of a schedule.
      temperature: T of the soft term, above 0.
      axis: axis of the vocabulary.
      where: positions, or entries of the vocabulary, that count.
      t_squared: whether to multiply the soft term by T².
      stop_gradient: whether the teacher is a constant.

    Returns:
      ``(...)``, for each position.

    Raises:
      JaxcompError: shapes or dtypes do not fit, an option is out of its range, or a label is
        outside the vocabulary.

    Source: https://arxiv.org/abs/1503.02531, section 2.
    """
    if common.is_concrete(alpha) and not np.all(
        (np.asarray(alpha) >= 0) & (np.asarray(alpha) <= 1)
    ):
        raise JaxcompError(f"alpha {alpha} must lie between 0 and 1")
    soft = soft_cross_entropy(
        student_logits,
        teacher_logits,
        temperature,
        axis,
        where,
        t_squared=t_squared,
        stop_gradient=stop_gradient,
    )
    return alpha * soft + (1 - alpha) * hard_cross_entropy(student_logits, labels, axis, where)
