"""Losses between hidden states, attention scores and other features of paired layers.

With u the teacher's feature at a position, v the student's, d the width, r a learned projection:

    hint_loss              1/2 ||u - r(v)||²                       (FitNets)
    hidden_mse             1/d ||u - r(v)||²                       (TinyBERT, TernaryBERT)
    pkd_loss               1/d ||u/||u|| - v/||v|| ||²             (PKD; u, v of [CLS])
    cosine_loss            1 - cos(u, v)                           (DistilBERT)
    attention_score_loss   mean over heads, queries, keys of (A_u - A_v)², A <= -100 set to 0

The width is the last axis, all other axes are positions (batch, tokens, rows, layers, ..); a loss
has their shape. ``where`` has that shape too: a position that does not count has a loss and a
gradient of 0, whatever is there.

Differs from the papers in: PKD sums the squares of a state where its code averages them; this is
the code's, d times smaller. The average over layers and examples is the caller's (``masked_mean``).

Source: FitNets https://arxiv.org/abs/1412.6550; PKD https://arxiv.org/abs/1908.09355; DistilBERT
https://arxiv.org/abs/1910.01108; TinyBERT https://arxiv.org/abs/1909.10351; TernaryBERT
https://arxiv.org/abs/2009.12812.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.distillation import common
from jaxcomp.errors import JaxcompError


class Projection(NamedTuple):
    """A learned map from the student's width to the teacher's: a pair of pure functions.

    Attributes:
      init: ``(key, student_width, teacher_width, bias=True, dtype=float32) -> params``.
      apply: ``(params, x) -> y``, on the last axis.
    """

    init: Callable[..., dict[str, jax.Array]]
    apply: Callable[[Mapping[str, jax.Array], jax.Array], jax.Array]


def _init(
    key: jax.Array,
    student_width: int,
    teacher_width: int,
    bias: bool = True,
    dtype: Any = jnp.float32,
) -> dict[str, jax.Array]:
    """Draws a kernel ``(student_width, teacher_width)``, and a bias of zeros."""
    if student_width < 1 or teacher_width < 1:
        raise JaxcompError(
            f"a projection from width {student_width} to {teacher_width}: both must be at least 1"
        )
    make = jax.nn.initializers.lecun_normal()
    params = {"kernel": make(key, (student_width, teacher_width), dtype)}
    return {**params, "bias": jnp.zeros(teacher_width, dtype)} if bias else params


def _apply(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """Maps the last axis: x @ kernel + bias."""
    kernel = params["kernel"]
    if x.shape[-1:] != kernel.shape[:1]:
        raise JaxcompError(
            f"features {x.shape}: the projection takes width {kernel.shape[0]}, made by "
            f"projection.init(key, {kernel.shape[0]}, {kernel.shape[1]}); make one for width "
            f"{x.shape[-1] if x.ndim else 1}"
        )
    y = x @ kernel
    return y + params["bias"] if "bias" in params else y


projection = Projection(_init, _apply)


def _prepare(student, teacher, projection, where, stop_gradient, what="features"):
    student, teacher = common.as_floats(student=student, teacher=teacher)
    if student.ndim < 1 or student.shape[:-1] != teacher.shape[:-1]:
        raise JaxcompError(
            f"{what}: student {student.shape} and teacher {teacher.shape} must have the same "
            "positions (all axes but the last)"
        )
    where = common.as_mask(where, student.shape[:-1], "a loss")
    student = common.zero_outside(student, where)
    if projection is not None:
        student = _apply(projection, student)
    if student.shape != teacher.shape:
        widths = student.shape[-1], teacher.shape[-1]
        fix = f"pass projection=projection.init(key, {widths[0]}, {widths[1]}) and train it too"
        if projection is not None:
            fix = f"the projection must end in width {widths[1]}"
        raise JaxcompError(
            f"{what}: student {student.shape} and teacher {teacher.shape} have different widths, "
            f"{widths[0]} and {widths[1]}; {fix}"
        )
    teacher = common.as_constant(common.zero_outside(teacher, where), stop_gradient)
    return student, teacher, where


def _masked(loss, where):
    return loss if where is None else jnp.where(where, loss, 0)


def hint_loss(
    student: jax.Array,
    teacher: jax.Array,
    projection: Mapping[str, jax.Array] | None = None,
    where: jax.Array | None = None,
    *,
    stop_gradient: bool = True,
) -> jax.Array:
    """FitNets: half the squared distance of the teacher's hint to the projected student.

    Args:
      student: ``(..., student_width)``, of the guided layer.
      teacher: ``(..., teacher_width)``, of the hint layer.
      projection: parameters from ``projection.init``, trained with the student; None if the widths
        are equal.
      where: bool ``(...)``, positions that count.
      stop_gradient: whether the teacher is a constant.

    Returns:
      ``(...)``.

    Raises:
      JaxcompError: positions differ, or widths differ without a projection.

    Example:
      >>> params = projection.init(jax.random.key(0), 2, 3)
      >>> hint_loss(jnp.ones((4, 2)), jnp.ones((4, 3)), params).shape
      (4,)

    Source: https://arxiv.org/abs/1412.6550.
    """
    v, u, where = _prepare(student, teacher, projection, where, stop_gradient)
    return _masked(0.5 * jnp.sum((u - v) ** 2, axis=-1), where)


def hidden_mse(
    student: jax.Array,
    teacher: jax.Array,
    projection: Mapping[str, jax.Array] | None = None,
    where: jax.Array | None = None,
    *,
    stop_gradient: bool = True,
) -> jax.Array:
    """Mean squared difference of hidden states.

    Args:
      student: ``(..., student_width)``.
      teacher: ``(..., teacher_width)``.
      projection: parameters from ``projection.init``; None if the widths are equal.
      where: bool ``(...)``, positions that count.
      stop_gradient: whether the teacher is a constant.

    Returns:
      ``(...)``.

    Raises:
      JaxcompError: positions differ, or widths differ without a projection.

    Example:
      >>> hidden_mse(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 4.0]])).tolist()
      [2.0]

    Source: https://arxiv.org/abs/1909.10351.
    """
    v, u, where = _prepare(student, teacher, projection, where, stop_gradient)
    return _masked(jnp.mean((u - v) ** 2, axis=-1), where)


def pkd_loss(
    student: jax.Array,
    teacher: jax.Array,
    projection: Mapping[str, jax.Array] | None = None,
    where: jax.Array | None = None,
    *,
    stop_gradient: bool = True,
) -> jax.Array:
    """Patient KD: mean squared difference of states of length 1.

    Pairs of layers come from ``skip_map`` or ``last_map``; a positive factor on a state changes
    nothing.

    Args:
      student: ``(..., width)``, in the paper the [CLS] state of a layer.
      teacher: ``(..., width)``.
      projection: parameters from ``projection.init``; None if the widths are equal.
      where: bool ``(...)``, positions that count.
      stop_gradient: whether the teacher is a constant.

    Returns:
      ``(...)``, at most 4 / width.

    Raises:
      JaxcompError: positions differ, or widths differ without a projection.

    Example:
      >>> pkd_loss(jnp.array([3.0, 0.0]), jnp.array([0.0, 2.0])).item()
      1.0

    Source: https://arxiv.org/abs/1908.09355.
    """
    v, u, where = _prepare(student, teacher, projection, where, stop_gradient)
    return _masked(jnp.mean((common.unit(u) - common.unit(v)) ** 2, axis=-1), where)


def cosine_loss(
    student: jax.Array,
    teacher: jax.Array,
    projection: Mapping[str, jax.Array] | None = None,
    where: jax.Array | None = None,
    *,
    stop_gradient: bool = True,
) -> jax.Array:
    """One minus the cosine of the angle between features.

    Args:
      student: ``(..., student_width)``.
      teacher: ``(..., teacher_width)``.
      projection: parameters from ``projection.init``; None if the widths are equal.
      where: bool ``(...)``, positions that count.
      stop_gradient: whether the teacher is a constant.

    Returns:
      ``(...)``, 0 to 2; 1 where a feature is zero.

    Raises:
      JaxcompError: positions differ, or widths differ without a projection.

    Example:
      >>> cosine_loss(jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([2.0, 0.0]) * jnp.ones((2, 1)))
      Array([0., 1.], dtype=float32)

    Source: https://arxiv.org/abs/1910.01108.
    """
    v, u, where = _prepare(student, teacher, projection, where, stop_gradient)
    return _masked(1 - jnp.sum(common.unit(u) * common.unit(v), axis=-1), where)


def attention_score_loss(
    student: jax.Array,
    teacher: jax.Array,
    where: jax.Array | None = None,
    *,
    threshold: float = -100.0,
    stop_gradient: bool = True,
) -> jax.Array:
    """Mean squared difference of attention scores before the softmax.

    Scores at or below the threshold are those that an additive mask excluded; they become 0 on each
    side.

    Args:
      student: ``(..., heads, queries, keys)``.
      teacher: like the student.
      where: bool ``(..., tokens)``, tokens that count, as queries and as keys.
      threshold: of excluded scores.
      stop_gradient: whether the teacher is a constant.

    Returns:
      ``(...)``, one loss for each example: the mean over heads and pairs of tokens that count.

    Raises:
      JaxcompError: shapes differ, or ``where`` is given and there are not as many queries as keys.

    Source: https://arxiv.org/abs/1909.10351, and its code; TernaryBERT,
    https://arxiv.org/abs/2009.12812.
    """
    common.check_same_shape(
        student,
        teacher,
        "attention scores",
        "with other numbers of heads use minilmv2_loss, or average over the heads first",
    )
    student, teacher = common.as_floats(student=student, teacher=teacher)
    if student.ndim < 3:
        raise JaxcompError(f"attention scores {student.shape} must be (..., heads, queries, keys)")
    pairs = _pairs(where, student.shape)
    u, v = (jnp.where(pairs & ~(a <= threshold), a, 0) for a in (teacher, student))
    error = (common.as_constant(u, stop_gradient) - v) ** 2
    return common.masked_mean(error, pairs, axis=(-3, -2, -1))


def _pairs(where, shape):
    if where is None:
        return jnp.ones((), bool)
    if shape[-1] != shape[-2]:
        raise JaxcompError(
            f"attention scores {shape}: where masks tokens, which needs as many queries as keys"
        )
    where = common.as_mask(where, (*shape[:-3], shape[-1]), "the tokens")
    return jnp.broadcast_to(where[..., None, :, None] & where[..., None, None, :], shape)
