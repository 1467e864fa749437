"""Ternary weights: every weight becomes -a, 0 or +a, with one a for each group.

For a group w with weights of importance v (one everywhere, if not given) the best a for given signs
b in {-1, 0, 1} is closed, and so are the best signs for a given a:

    min over a, b of sum v (w - a b)²:    a = sum v b w / sum v |b|,    b = sign(w) [|w| > a / 2].

- "twn": b = sign(w) [|w| > 0.7 mean|w|] and a the mean of the |w| that are kept. On N(0, 1) the
  threshold is 0.559 and the relative error 0.1916.
- "optimal": the best pair of all. As b keeps the largest |w|, sorting them leaves one number to
  choose, k = argmax (sum of v |w| over the k largest)² / sum of v over them. Error 0.1902.
- "lat": the two closed forms in turn, from the result of "twn" on. No step increases the error.

The least-squares a of "twn" is the plain mean, whatever the importance.

Differs from the papers in:
1. TWN's threshold and LAT are per layer; here per group of inputs and outputs, TernaryBERT's row
   of an embedding and matrix of a linear layer among them (``out_group_size`` 1 and None).
2. LAT takes v from Adam's second moment while training; here v is an argument, and the recipe step
   takes the inputs' mean squares (the diagonal of the Hessian of the layer's output).
3. "optimal" is not in them.

Source: Li et al., TWN, arXiv 1605.04711; Hou & Kwok, loss-aware quantization, arXiv 1802.08635;
Zhang et al., TernaryBERT, arXiv 2009.12812.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcomp.formats import base, codebook
from jaxcomp.formats.checks import check
from jaxcomp.formats.compressed import CompressedArray
from jaxcomp.formats.spec import Int
from jaxcomp.quantization import checks, common
from jaxcomp.step import Activation, Layer, Step, run

METHODS = ("twn", "optimal", "lat")


class Ternary(Step, frozen=True, tag="ternary"):
    """Weights in {-a, 0, a}.

    Attributes:
      group_size: consecutive inputs that share an a; None is one group a row.
      out_group_size: consecutive outputs that share an a; None, with ``group_size`` None, is one a
        for the whole matrix.
      method: how signs are chosen, "twn", "optimal" or "lat"; "lat" weighs by the inputs' mean
        squares, which needs calibration data.
      iterations: of "lat".
      scale_dtype: dtype in which a is stored.
      activation: how the input is quantized at run time; None leaves it alone.
    """

    group_size: int | None = None
    out_group_size: int | None = 1
    method: Literal["twn", "optimal", "lat"] = "twn"
    iterations: int = 10
    scale_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    activation: Activation | None = None

    def needs(self) -> frozenset[str]:
        """The inputs' squares for "lat", their range for static activation scales."""
        needs = frozenset({"sumsq"}) if self.method == "lat" else frozenset()
        return needs | common.activation_needs(self.activation)


def to_groups(
    w: jax.Array, group_size: int | None, out_group_size: int | None
) -> tuple[jax.Array, tuple[int, ...]]:
    """A matrix with one axis for the members of a group.

    Args:
      w: ``(*stack, out, in)``.
      group_size: inputs in a group, None for all.
      out_group_size: outputs in a group, None for all.

    Returns:
      ``(*stack, out_groups, in_groups, members)``, and the shape of ``w``.
    """
    *stack, out, size = w.shape
    rows, cols = out_group_size or out, group_size or size
    w4 = w.reshape(*stack, out // rows, rows, size // cols, cols)
    return jnp.moveaxis(w4, -3, -2).reshape(*stack, out // rows, size // cols, rows * cols), w.shape


def from_groups(g: jax.Array, shape: tuple[int, ...], group_size: int | None) -> jax.Array:
    """The inverse of ``to_groups``: ``(*stack, out_groups, in_groups, members)`` to ``shape``."""
    cols = group_size or shape[-1]
    rows = g.shape[-1] // cols
    g = g.reshape(*g.shape[:-1], rows, cols)
    return jnp.moveaxis(g, -2, -3).reshape(shape)


def check_groups(
    w: Any, group_size: int | None, out_group_size: int | None, path: str = "weight"
) -> None:
    """Checks that groups divide a matrix.

    Args:
      w: ``(*stack, out, in)``.
      group_size: inputs in a group, None for all.
      out_group_size: outputs in a group, None for all.
      path: name of the weight, for the message.

    Raises:
      JaxcompError: they do not.
    """
    check(Int(8, group_size, out_group_size=out_group_size), w.shape, path or "weight")


def _mean(total, count):
    return total / jnp.where(count > 0, count, 1)


def _lat(size, v, scale, iterations):
    def better(_, scale):
        kept = jnp.where(size > scale / 2, v, 0)
        total = kept.sum(-1, keepdims=True)
        # Where nothing is kept every a is as good.
        return jnp.where(total > 0, _mean((kept * size).sum(-1, keepdims=True), total), scale)

    scale = jax.lax.fori_loop(0, iterations, better, scale)
    return size > scale / 2


def _optimal(size, v):
    order = jnp.argsort(-size, axis=-1)
    sorted_size = jnp.take_along_axis(size, order, -1)
    sorted_v = jnp.take_along_axis(v, order, -1)
    moment = jnp.cumsum(sorted_v * sorted_size, -1)
    gain = moment**2 / jnp.maximum(jnp.cumsum(sorted_v, -1), jnp.finfo(size.dtype).tiny)
    last = jnp.argmax(gain, -1, keepdims=True)
    return size >= jnp.take_along_axis(sorted_size, last, -1)


@functools.partial(
    jax.jit, static_argnames=("group_size", "out_group_size", "method", "iterations")
)
def _fit(w, importance, mask, *, group_size, out_group_size, method, iterations):
    w = w.astype(common.working_dtype(w))
    group = lambda a: to_groups(a, group_size, out_group_size)[0]  # noqa: E731
    g = group(w)
    size = jnp.abs(g)
    known = jnp.ones_like(size) if mask is None else group(mask).astype(size.dtype)
    size = size * known
    v = known
    if importance is not None:
        v = known * group(jnp.broadcast_to(importance, w.shape).astype(size.dtype))
        v = jnp.where(v.sum(-1, keepdims=True) > 0, v, known)
    if method == "optimal":
        kept = _optimal(size, v)
    else:
        mean = _mean(size.sum(-1, keepdims=True), known.sum(-1, keepdims=True))
        kept = size > 0.7 * mean
        if method == "lat":
            start = _mean((size * kept).sum(-1, keepdims=True), kept.sum(-1, keepdims=True))
            kept = _lat(size, v, start, iterations)
    kept = kept & (size > 0)
    weight = known if method == "twn" else v
    weight = jnp.where(kept, weight, 0)
    scale = _mean((weight * size).sum(-1), weight.sum(-1))
    codes = jnp.where(kept, jnp.sign(g), 0).astype(jnp.int8)
    return from_groups(codes, w.shape, group_size), scale


def ternary_codes(
    w: jax.Array,
    group_size: int | None = None,
    out_group_size: int | None = 1,
    method: str = "twn",
    importance: jax.Array | None = None,
    iterations: int = 10,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Signs and scales of ternary weights, element-wise and safe under jit.

    Args:
      w: ``(*stack, out, in)``.
      group_size: as in ``Ternary``.
      out_group_size: as in ``Ternary``.
      method: as in ``Ternary``.
      importance: v >= 0 of "optimal" and "lat", broadcast against ``w``.
      iterations: of "lat".
      mask: bool like ``w``, False where the weight is zero and stays so.

    Returns:
      int8 codes -1, 0, 1 like ``w``, and scales ``(*stack, out_groups, in_groups)``, 0 for a group
      of zeros.

    Raises:
      JaxcompError: groups that do not divide the matrix, or an unknown method.
    """
    check_groups(w, group_size, out_group_size)
    checks.check_choice("method", method, METHODS)
    return _fit(
        w,
        importance,
        mask,
        group_size=group_size,
        out_group_size=out_group_size,
        method=method,
        iterations=iterations,
    )


def ternary_values(
    w: jax.Array,
    group_size: int | None = None,
    out_group_size: int | None = 1,
    scale_dtype: str = "float32",
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Ternary weights as a dense matrix, for training: what ``ternary`` materializes.

    Args:
      w: ``(*stack, out, in)``.
      group_size: as in ``Ternary``.
      out_group_size: as in ``Ternary``.
      scale_dtype: as in ``Ternary``.
      **options: further ones of ``ternary_codes``.

    Returns:
      Values like ``w`` (in its dtype) and scales ``(*stack, out_groups, in_groups)``.

    Example:
      >>> values, scale = ternary_values(jnp.array([[3.0, -1.0, 0.1, 0.1]]))
      >>> values.tolist(), scale.tolist()
      ([[2.0, -2.0, 0.0, 0.0]], [[2.0]])
    """
    codes, scale = ternary_codes(w, group_size, out_group_size, **options)
    return to_values(codes, scale, w.dtype, scale_dtype)


def to_values(
    codes: jax.Array, scale: jax.Array, dtype: Any, scale_dtype: str
) -> tuple[jax.Array, jax.Array]:
    """Codes -1, 0, 1 times the scales of their groups, rounded to the dtype they are stored in."""
    if scale_dtype != "float32":
        scale = scale.astype(scale_dtype).astype(scale.dtype)
    return (codes * base.spread(scale, *codes.shape[-2:])).astype(dtype), scale


@functools.partial(jax.jit, static_argnames=("levels", "scale_dtype"))
def store(codes, scale, *, levels, scale_dtype):
    """A codebook part of codes that count from the middle of ``levels``, and what it stands for."""
    wide = scale.dtype
    dtype = wide if scale_dtype == "float32" else jnp.dtype(scale_dtype)
    index = codes.astype(jnp.int32) + 1
    if len(levels) == 2:
        index = index // 2
    table = jnp.broadcast_to(jnp.asarray(levels, wide), (*codes.shape[:-2], 1, len(levels)))
    stored = jnp.swapaxes(scale.astype(dtype), -1, -2)
    part = codebook.codebook_part(index, table, stored, kind="levels")
    return part, to_values(codes, scale, wide, scale_dtype)[0]


def ternary(
    w: jax.Array,
    group_size: int | None = None,
    out_group_size: int | None = 1,
    method: str = "twn",
    importance: jax.Array | None = None,
    iterations: int = 10,
    scale_dtype: str = "float32",
    activation: Activation | None = None,
    mask: jax.Array | None = None,
) -> CompressedArray:
    """Stores a weight as -a, 0 and +a, 2 bits each and one a for every group.

    Args:
      w: ``(*stack, out, in)`` float.
      group_size: consecutive inputs that share an a; None is one group a row.
      out_group_size: consecutive outputs that share an a; None is all.
      method: "twn", "optimal" or "lat"; see the head of this file.
      importance: v >= 0 of "optimal" and "lat", broadcast against ``w``.
      iterations: of "lat".
      scale_dtype: dtype in which a is stored.
      activation: how the input is quantized when the weight is used (dynamic scales).
      mask: bool like ``w``, False where the weight is zero and stays so.

    Returns:
      A compressed array of the shape and dtype of ``w``.

    Raises:
      JaxcompError: groups that do not divide the matrix, an unknown method, or weights that are not
        finite.

    Example:
      >>> w = ternary(jnp.array([[3.0, -1.0, 0.1, 0.1]]))
      >>> w.materialize().tolist(), w.nbits
      ([[2.0, -2.0, 0.0, 0.0]], 136)

    Source: https://arxiv.org/abs/1605.04711.
    """
    options = dict(
        group_size=group_size, out_group_size=out_group_size, method=method, iterations=iterations
    )
    parts, _ = _parts(w, importance, mask, scale_dtype, options, "")
    return common.compressed(common.with_activation(parts, activation), w)


def _parts(w, importance, mask, scale_dtype, options, path):
    checks.check_weight(w, path)
    check_groups(w, options["group_size"], options["out_group_size"], path)
    checks.check_choice("method", options["method"], METHODS, path)
    codes, scale = _fit(w, importance, mask, **options)
    part, values = store(codes, scale, levels=(-1.0, 0.0, 1.0), scale_dtype=scale_dtype)
    return (part,), values


@run.register
def _(step: Ternary, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    names = ("group_size", "out_group_size", "method", "iterations")
    options = {name: getattr(step, name) for name in names}
    results = []
    for layer in layers:
        importance = None
        if step.method == "lat":
            checks.check_statistics(layer, "sumsq")
            importance = layer.statistics.sumsq[..., None, :]
        parts, values = _parts(
            layer.weight, importance, layer.mask, step.scale_dtype, options, layer.path
        )
        results.append(common.quantized(layer, parts, values, step.activation))
    return tuple(results)
