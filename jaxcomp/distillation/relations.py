"""Losses between relations: of channels, of examples in a batch, of tokens.

FSP, of the features of two layers of one network, over positions i:

    G = 1/n sum_i F1_i F2_iᵀ,     loss = ||G_teacher - G_student||²

RKD, of embeddings of a batch, h the Huber loss with threshold 1:

    distance   h(psi_t - psi_s),  psi = ||x_i - x_j|| / (mean of that over pairs)
    angle      h(psi_t - psi_s),  psi = cos of the angle at x_j between x_i and x_k

MiniLM, of one layer of each, a KL divergence between rows, averaged over heads and queries:

    attention of the teacher against the student's;   softmax(V Vᵀ / sqrt(d))
    v2:   softmax(Q Qᵀ / sqrt(d)), K Kᵀ, V Vᵀ, with the width split anew into relation heads

Relations do not depend on the width, so that the student's may be another (FSP: the same channels,
or a projection). ``where`` marks the tokens, positions or examples that count.

Differs from the papers in: RKD averages over distinct pairs or triples, where the authors' code
counts the zeros of i = j too; a padded token is neither query nor key.

Source: FSP, Yim et al., CVPR 2017; RKD https://arxiv.org/abs/1904.05068; MiniLM
https://arxiv.org/abs/2002.10957; MiniLMv2 https://arxiv.org/abs/2012.15828.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.distillation import common, features
from jaxcomp.errors import JaxcompError

RELATIONS = ("query", "key", "value")


def fsp_matrix(
    first: jax.Array,
    second: jax.Array,
    where: jax.Array | None = None,
    spatial_axes: int = 1,
) -> jax.Array:
    """Flow between two layers: the mean over positions of the product of their channels.

    Args:
      first: ``(..., *grid, channels1)``; the grid is tokens, or height and width.
      second: ``(..., *grid, channels2)``. The larger grid is max-pooled to the smaller one.
      where: bool ``(..., *grid)`` of the larger grid, positions that count.
      spatial_axes: number of axes of the grid.

    Returns:
      ``(..., channels1, channels2)``; 0 where no position counts.

    Raises:
      JaxcompError: shapes do not fit, or one grid does not divide the other.

    Example:
      >>> fsp_matrix(jnp.ones((2, 5, 3)), jnp.ones((2, 5, 4))).shape
      (2, 3, 4)

    Source: Yim et al., A Gift from Knowledge Distillation, CVPR 2017.
    """
    first, second = common.as_floats(first=first, second=second)
    if first.ndim != second.ndim or first.ndim < spatial_axes + 1 or spatial_axes < 1:
        raise JaxcompError(
            f"layers {first.shape} and {second.shape} must both be (..., grid, channels) with "
            f"{spatial_axes} axes of the grid"
        )
    lead = first.ndim - 1 - spatial_axes
    grids = first.shape[lead:-1], second.shape[lead:-1]
    if first.shape[:lead] != second.shape[:lead]:
        raise JaxcompError(f"layers {first.shape} and {second.shape} must be of the same examples")
    larger = max(grids, key=math.prod)
    smaller = grids[0] if larger is grids[1] else grids[1]
    if any(a % b for a, b in zip(larger, smaller, strict=True)):
        raise JaxcompError(
            f"layers {first.shape} and {second.shape}: the grid {smaller} does not divide "
            f"{larger}; take layers whose grids do, or resize one of them first"
        )
    mask = common.as_mask(where, (*first.shape[:lead], *larger), "the larger grid")
    if mask is None:
        mask = jnp.ones((*first.shape[:lead], *larger), bool)
    shared = _pool(mask, smaller, lead, 0)
    mask = mask[..., None]
    pooled = []
    for layer in (first, second):
        if layer.shape[lead:-1] == smaller:
            pooled.append(jnp.where(shared[..., None], layer, 0))
        else:
            top = _pool(jnp.where(mask, layer, -jnp.inf), smaller, lead, 1)
            pooled.append(jnp.where(shared[..., None], top, 0))
    axes = tuple(range(lead, lead + spatial_axes))
    count = jnp.maximum(jnp.sum(shared, axis=axes), 1).astype(first.dtype)
    flat = [a.reshape(*a.shape[:lead], -1, a.shape[-1]) for a in pooled]
    return jnp.einsum("...pa,...pb->...ab", *flat) / count[..., None, None]


def _pool(x, grid, lead, trailing):
    """The maximum over windows that leave the given grid."""
    shape, windows = list(x.shape[:lead]), []
    for i, size in enumerate(grid):
        windows.append(len(shape) + 1)
        shape += [size, x.shape[lead + i] // size]
    shape += x.shape[x.ndim - trailing :]
    return jnp.max(x.reshape(shape), axis=tuple(windows))


def fsp_loss(
    student: tuple[jax.Array, jax.Array],
    teacher: tuple[jax.Array, jax.Array],
    where: jax.Array | None = None,
    spatial_axes: int = 1,
    *,
    teacher_where: jax.Array | None = None,
    projections: tuple[Mapping | None, Mapping | None] = (None, None),
    stop_gradient: bool = True,
) -> jax.Array:
    """Squared distance between the flows of student and teacher through a pair of layers.

    Args:
      student: two layers of the student, ``(..., *grid, channels)``.
      teacher: two layers of the teacher, of the same examples; grids may differ.
      where: bool ``(..., *grid)`` of the student's larger grid, positions that count.
      spatial_axes: number of axes of a grid, 1 for tokens, 2 for height and width.
      teacher_where: the same for the teacher; by default that of the student.
      projections: parameters from ``projection.init`` for each of the student's layers.
      stop_gradient: whether the teacher is a constant.

    Returns:
      ``(...)``, one loss for each example.

    Raises:
      JaxcompError: channels differ without a projection, or shapes do not fit.

    Source: Yim et al., CVPR 2017, without the weights of the pairs.
    """
    student = tuple(
        layer if params is None else features.projection.apply(params, layer)
        for layer, params in zip(student, projections, strict=True)
    )
    ours = fsp_matrix(*student, where, spatial_axes)
    theirs = fsp_matrix(*teacher, where if teacher_where is None else teacher_where, spatial_axes)
    common.check_same_shape(
        ours,
        theirs,
        "flow matrices (examples, channels of the first layer, of the second)",
        "where channels differ, pass projections made by projection.init(key, student_channels, "
        "teacher_channels)",
    )
    return jnp.sum((common.as_constant(theirs, stop_gradient) - ours) ** 2, axis=(-2, -1))


def _embeddings(student, teacher, where, stop_gradient):
    student, teacher = common.as_floats(student=student, teacher=teacher)
    if student.ndim < 2 or student.shape[:-1] != teacher.shape[:-1]:
        raise JaxcompError(
            f"embeddings: student {student.shape} and teacher {teacher.shape} must be "
            "(..., examples, width) of the same examples"
        )
    where = common.as_mask(where, student.shape[:-1], "the examples")
    if where is None:
        where = jnp.ones(student.shape[:-1], bool)
    student, teacher = (common.zero_outside(a, where) for a in (student, teacher))
    return student, common.as_constant(teacher, stop_gradient), where


def _huber(difference):
    size = jnp.abs(difference)
    return jnp.where(size < 1, 0.5 * size**2, size - 0.5)


def rkd_distance_loss(
    student: jax.Array,
    teacher: jax.Array,
    where: jax.Array | None = None,
    *,
    stop_gradient: bool = True,
) -> jax.Array:
    """Relational KD of distances between examples, each net's divided by its own mean.

    Args:
      student: ``(..., examples, student_width)``.
      teacher: ``(..., examples, teacher_width)``, of the same examples.
      where: bool ``(..., examples)``, examples that count.
      stop_gradient: whether the teacher is a constant.

    Returns:
      ``(...)``, the mean over pairs of distinct examples; 0 if there is no pair. It does not change
      when either side is moved, rotated or scaled.

    Raises:
      JaxcompError: examples differ.

    Example:
      >>> x = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
      >>> float(rkd_distance_loss(x, 2 * x))
      0.0

    Source: https://arxiv.org/abs/1904.05068.
    """
    student, teacher, where = _embeddings(student, teacher, where, stop_gradient)
    n = where.shape[-1]
    pairs = where[..., :, None] & where[..., None, :] & ~jnp.eye(n, dtype=bool)

    def relations(x):
        square = jnp.sum((x[..., :, None, :] - x[..., None, :, :]) ** 2, axis=-1)
        apart = square > 0
        distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1)), 0)
        mean = common.masked_mean(distance, pairs, axis=(-2, -1))[..., None, None]
        return distance / jnp.where(mean > 0, mean, 1)

    loss = _huber(relations(teacher) - relations(student))
    return common.masked_mean(loss, pairs, axis=(-2, -1))


def rkd_angle_loss(
    student: jax.Array,
    teacher: jax.Array,
    where: jax.Array | None = None,
    *,
    stop_gradient: bool = True,
) -> jax.Array:
    """Relational KD of the angles in triples of examples. Memory grows as examples³.

    Args:
      student: ``(..., examples, student_width)``.
      teacher: ``(..., examples, teacher_width)``, of the same examples.
      where: bool ``(..., examples)``, examples that count.
      stop_gradient: whether the teacher is a constant.

    Returns:
      ``(...)``, the mean over triples of distinct examples; 0 if there is none. It does not change
      when either side is moved, rotated or scaled.

    Raises:
      JaxcompError: examples differ.

    Source: https://arxiv.org/abs/1904.05068.
    """
    student, teacher, where = _embeddings(student, teacher, where, stop_gradient)
    distinct = ~jnp.eye(where.shape[-1], dtype=bool)
    distinct = distinct[:, :, None] & distinct[:, None, :] & distinct[None, :, :]
    triples = where[..., :, None, None] & where[..., None, :, None] & where[..., None, None, :]

    def relations(x):  # the corner first
        edges = common.unit(x[..., None, :, :] - x[..., :, None, :])
        return jnp.einsum("...jiw,...jkw->...jik", edges, edges)

    loss = _huber(relations(teacher) - relations(student))
    return common.masked_mean(loss, triples & distinct, axis=(-3, -2, -1))


def relation(
    x: jax.Array,
    heads: int,
    where: jax.Array | None = None,
    causal: bool = False,
) -> jax.Array:
    """Log of softmax(X Xᵀ / sqrt(d)) over tokens, for each relation head of width d.

    Args:
      x: ``(..., tokens, width)``: queries, keys or values with their heads side by side.
      heads: number of parts of equal width into which the width is split.
      where: bool ``(..., tokens)``, tokens that count.
      causal: whether a token relates only to itself and to those before it.

    Returns:
      ``(..., heads, tokens, tokens)``, of any width the same shape; -inf where a key or a query
      does not count.

    Raises:
      JaxcompError: the width is not a multiple of the number of heads.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 5, 8))
      >>> jnp.exp(relation(x, heads=4)).sum(-1).round(5).min().item()
      1.0

    Source: https://arxiv.org/abs/2012.15828.
    """
    (x,) = common.as_floats(x=x)
    if x.ndim < 2:
        raise JaxcompError(f"a relation needs (..., tokens, width), got {x.shape}")
    width = x.shape[-1]
    if heads < 1 or width % heads:
        fits = [h for h in range(1, width + 1) if width % h == 0]
        close = sorted(sorted(fits, key=lambda h: abs(h - heads))[:4])
        raise JaxcompError(
            f"features {x.shape}: {heads} relation heads do not divide the width {width}; use "
            f"{', '.join(map(str, close))}"
        )
    mask = common.as_mask(where, x.shape[:-1], "the tokens")
    x = common.zero_outside(x, mask)
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], heads, width // heads), -2, -3)
    scores = jnp.einsum("...qd,...kd->...qk", x, x) / math.sqrt(width // heads)
    return _attention(scores, mask, causal)


def _attention(scores, mask, causal):
    counts = jnp.ones(scores.shape[-2:], bool)
    if causal:
        counts = jnp.tril(counts)
    if mask is not None:
        counts = counts & mask[..., None, :, None] & mask[..., None, None, :]
    return common.log_softmax(scores, jnp.broadcast_to(counts, scores.shape))


def _divergence(student, teacher, where, stop_gradient):
    rows = common.relative_entropy(common.as_constant(teacher, stop_gradient), student)
    mask = None if where is None else jnp.broadcast_to(where[..., None, :], rows.shape)
    return common.masked_mean(rows, mask, axis=(-2, -1))


def attention_kl(
    student_scores: jax.Array,
    teacher_scores: jax.Array,
    where: jax.Array | None = None,
    causal: bool = False,
    *,
    stop_gradient: bool = True,
) -> jax.Array:
    """KL of the teacher's attention distributions to the student's.

    Args:
      student_scores: ``(..., heads, tokens, tokens)`` before the softmax; logarithms of attention
        probabilities do as well.
      teacher_scores: like the student's.
      where: bool ``(..., tokens)``, tokens that count, as queries and as keys.
      causal: whether the scores do not hold the causal mask yet.
      stop_gradient: whether the teacher is a constant.

    Returns:
      ``(...)``, one loss for each example: the mean over heads and queries that count.

    Raises:
      JaxcompError: shapes differ, for instance the number of heads.

    Source: https://arxiv.org/abs/2002.10957.
    """
    common.check_same_shape(
        student_scores,
        teacher_scores,
        "attention scores",
        "with other numbers of heads use minilmv2_loss, whose relation heads are free",
    )
    ours, theirs = common.as_floats(student_scores=student_scores, teacher_scores=teacher_scores)
    if ours.ndim < 3 or ours.shape[-1] != ours.shape[-2]:
        raise JaxcompError(f"attention scores {ours.shape} must be (..., heads, tokens, tokens)")
    mask = common.as_mask(where, (*ours.shape[:-3], ours.shape[-1]), "the tokens")
    ours, theirs = (_attention(a, mask, causal) for a in (ours, theirs))
    return _divergence(ours, theirs, mask, stop_gradient)


def _relation_kl(name, student, teacher, heads, where, causal, stop_gradient):
    if np.shape(student)[:-1] != np.shape(teacher)[:-1]:
        raise JaxcompError(
            f"{name}: student {np.shape(student)} and teacher {np.shape(teacher)} must be "
            "(..., tokens, width) of the same tokens"
        )
    mask = common.as_mask(where, np.shape(student)[:-1], "the tokens")
    ours, theirs = (relation(a, heads, mask, causal) for a in (student, teacher))
    return _divergence(ours, theirs, mask, stop_gradient)


def minilm_loss(
    student_scores: jax.Array,
    teacher_scores: jax.Array,
    student_values: jax.Array,
    teacher_values: jax.Array,
    where: jax.Array | None = None,
    causal: bool = False,
    *,
    value_heads: int | None = None,
    stop_gradient: bool = True,
) -> jax.Array:
    """MiniLM: KL of attention distributions plus KL of value relations, of the last layers.

    Args:
      student_scores: ``(..., heads, tokens, tokens)`` before the softmax.
      teacher_scores: like the student's.
      student_values: ``(..., tokens, width)``, heads side by side; the width may be another.
      teacher_values: ``(..., tokens, width)``.
      where: bool ``(..., tokens)``, tokens that count.
      causal: whether a token attends only to itself and to those before it.
      value_heads: number of heads of the values; by default that of the scores.
      stop_gradient: whether the teacher is a constant.

    Returns:
      ``(...)``, one loss for each example.

    Raises:
      JaxcompError: numbers of heads or of tokens differ, or heads do not divide a width.

    Source: https://arxiv.org/abs/2002.10957.
    """
    attention = attention_kl(
        student_scores, teacher_scores, where, causal, stop_gradient=stop_gradient
    )
    heads = np.shape(student_scores)[-3] if value_heads is None else value_heads
    return attention + _relation_kl(
        "values", student_values, teacher_values, heads, where, causal, stop_gradient
    )


def minilmv2_loss(
    student: Mapping[str, jax.Array],
    teacher: Mapping[str, jax.Array],
    relation_heads: int,
    where: jax.Array | None = None,
    causal: bool = False,
    *,
    weights: Sequence[float] = (1.0, 1.0, 1.0),
    stop_gradient: bool = True,
) -> jax.Array:
    """MiniLMv2: KL of query-query, key-key and value-value relations of one layer of each.

    Args:
      student: "query", "key" and "value", each ``(..., tokens, width)`` with heads side by side.
      teacher: the same of the teacher; widths and numbers of attention heads may differ.
      relation_heads: heads into which each width is split.
      where: bool ``(..., tokens)``, tokens that count.
      causal: whether a token relates only to itself and to those before it.
      weights: of the query, key and value relations.
      stop_gradient: whether the teacher is a constant.

    Returns:
      ``(...)``, one loss for each example.

    Raises:
      JaxcompError: a part is missing, tokens differ, or heads do not divide a width.

    Source: https://arxiv.org/abs/2012.15828.
    """
    for owner, parts in (("student", student), ("teacher", teacher)):
        missing = [name for name in RELATIONS if name not in parts]
        if missing:
            raise JaxcompError(
                f"the {owner}'s features hold {sorted(parts)}, not {', '.join(missing)}; give "
                "query, key and value"
            )
    if len(weights) != len(RELATIONS):
        raise JaxcompError(f"weights {tuple(weights)} must be those of query, key and value")
    return sum(
        weight
        * _relation_kl(
            name, student[name], teacher[name], relation_heads, where, causal, stop_gradient
        )
        for name, weight in zip(RELATIONS, weights, strict=True)
    )
