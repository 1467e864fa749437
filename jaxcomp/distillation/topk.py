"""The k largest of a teacher's probabilities and the mass of the rest.

With p the teacher's distribution at a temperature T and S its k most likely entries, a position is
stored as log p_i for i in S, the indices i, and log p_rest, p_rest = 1 - sum_{i in S} p_i. The
student is compared on the same k + 1 outcomes:

    T² [ sum_{i in S} p_i log(p_i / q_i) + p_rest log(p_rest / q_rest) ]

This is the divergence of distributions that were merged alike, so by the data-processing inequality
it is never above the full one, and equals it for k = vocabulary size. Dropping the tail and
renormalising instead, as is often done, teaches a student that the rest is impossible.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.distillation import common
from jaxcomp.errors import JaxcompError


@dataclasses.dataclass(frozen=True, eq=False)
class TopK:
    """A teacher's distributions, compressed; a pytree.

    - ``log_probs`` fall along the last axis; -inf where fewer than k entries are possible.
    - exp(log_probs) and exp(log_tail) sum to 1, or to 0 at a position that did not count.

    Attributes:
      log_probs: ``(..., k)``, of the most likely entries.
      indices: int32 ``(..., k)``, their places in the vocabulary.
      log_tail: ``(...)``, log of the probability of all other entries.
      vocab_size: number of entries of the vocabulary.
      temperature: by which the logits were divided.
    """

    log_probs: jax.Array
    indices: jax.Array
    log_tail: jax.Array
    vocab_size: int
    temperature: float = 1.0

    @property
    def k(self) -> int:
        """Number of entries kept."""
        return self.log_probs.shape[-1]


jax.tree_util.register_dataclass(
    TopK, ["log_probs", "indices", "log_tail"], ["vocab_size", "temperature"]
)


def compress_logits(
    teacher_logits: jax.Array,
    k: int,
    temperature: float = 1.0,
    where: jax.Array | None = None,
) -> TopK:
    """Keeps the k most likely entries of each position, and the mass of the rest.

    Args:
      teacher_logits: ``(..., vocabulary)``.
      k: entries to keep, 1 to the size of the vocabulary.
      temperature: T, above 0. The mass of the rest is known at this temperature only, so the
        student is compared at the same.
      where: positions, or entries of the vocabulary, that count.

    Returns:
      The compressed distributions, float32 at least. Of equal entries the first are kept.

    Raises:
      JaxcompError: k or the temperature is out of its range, or the logits are not floating.

    Example:
      >>> top = compress_logits(jnp.log(jnp.array([0.5, 0.125, 0.25, 0.125])), k=2)
      >>> top.indices.tolist(), jnp.exp(top.log_tail).round(3).item()
      ([0, 2], 0.25)
    """
    (z,) = common.as_floats(teacher_logits=teacher_logits)
    if not isinstance(temperature, (int, float)):
        raise JaxcompError(
            f"temperature {temperature} must be a Python number: it is stored with the result"
        )
    common.check_positive("temperature", temperature)
    if z.ndim < 1 or not 1 <= k <= z.shape[-1]:
        raise JaxcompError(f"k {k} must lie between 1 and the vocabulary's size, logits {z.shape}")
    where = common.entry_mask(where, z.shape, z.ndim - 1)
    log_p = common.log_softmax(z / temperature, where)
    log_probs, indices = jax.lax.top_k(log_p, k)
    return TopK(
        log_probs=log_probs,
        indices=indices.astype(jnp.int32),
        log_tail=_log_rest(log_p, indices),
        vocab_size=z.shape[-1],
        temperature=float(temperature),
    )


def _log_rest(log_p, indices):
    def without(present, kept):
        return present.at[kept].set(False)

    for _ in range(indices.ndim - 1):  # mapped, which explicit meshes allow
        without = jax.vmap(without)
    rest = without(log_p != -jnp.inf, indices)
    return common.logsumexp(log_p, rest)[..., 0]


def topk_kl_divergence(
    student_logits: jax.Array,
    teacher: TopK,
    where: jax.Array | None = None,
    *,
    t_squared: bool = True,
) -> jax.Array:
    """T² KL(teacher || student) on the k entries that the teacher kept and the rest as one.

    Args:
      student_logits: ``(..., vocabulary)``.
      teacher: compressed distributions ``(...)``; its temperature is used.
      where: positions, or entries of the vocabulary, that count; the entries must be those of
        the teacher.
      t_squared: whether to multiply by T².

    Returns:
      ``(...)``, nats for each position; 0 for those that do not count.

    Raises:
      JaxcompError: positions or vocabulary differ from the teacher's.

    Example:
      >>> z = jnp.array([2.0, 1.0, 0.0, -1.0])
      >>> loss = topk_kl_divergence(jnp.zeros(4), compress_logits(z, k=4))
      >>> round(float(loss), 4)
      0.4388
    """
    (z,) = common.as_floats(student_logits=student_logits)
    if z.ndim < 1 or z.shape[-1] != teacher.vocab_size:
        raise JaxcompError(
            f"student logits {z.shape}: the teacher's vocabulary has {teacher.vocab_size} entries; "
            "slice the student's logits to the vocabulary that they share, or compress the "
            "teacher's sliced to it"
        )
    if z.shape[:-1] != np.shape(teacher.log_tail):
        raise JaxcompError(
            f"student logits {z.shape}: the teacher's positions are {np.shape(teacher.log_tail)}; "
            "give both the same batch"
        )
    where = common.entry_mask(where, z.shape, z.ndim - 1)
    log_q = common.log_softmax(z / teacher.temperature, where)
    merged_q = _merge(
        jnp.take_along_axis(log_q, teacher.indices, -1), _log_rest(log_q, teacher.indices)
    )
    merged_p = _merge(teacher.log_probs, teacher.log_tail).astype(z.dtype)
    if where is not None:
        merged_p = jnp.where(jnp.any(where, axis=-1, keepdims=True), merged_p, -jnp.inf)
    loss = common.relative_entropy(jax.lax.stop_gradient(merged_p), merged_q)
    return loss * teacher.temperature**2 if t_squared else loss


def _merge(log_top, log_rest):
    return jnp.concatenate([jnp.asarray(log_top), jnp.asarray(log_rest)[..., None]], axis=-1)
