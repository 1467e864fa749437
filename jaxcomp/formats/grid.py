"""Element-wise quantizers: the grids behind RTN, GPTQ, AWQ and SparseGPT.

For the element formats ``Int``, ``Float`` and ``Codebook`` a weight becomes a code on a grid that
its group's parameters place:

    context = prepare(fmt, w)                      what the whole matrix shares
    qparams = fit(fmt, w, context, clipping)       a scale (and zero point) a group
    q       = expand(fmt, qparams, out, cols)      spread over the matrix
    codes   = encode(fmt, w, q, context)           element-wise, also on one column
    values  = decode(fmt, codes, q, context)
    part    = build(fmt, codes, qparams, context)

Integers, on xmin = min(x, 0), xmax = max(x, 0), a = max(-xmin, xmax), with signed codes (unsigned
ones less 2^(b-1)):

    symmetric, full range   S = 2a / (2^b - 1)         codes -2^(b-1) .. 2^(b-1)-1
    symmetric               S = a / (2^(b-1) - 1)      codes -(2^(b-1)-1) .. 2^(b-1)-1
    asymmetric              S = (xmax-xmin)/(2^b - 1)  Z = round(-xmin/S) - 2^(b-1)

An all-zero group takes a = 1. Clipping "mse" shrinks the range by 1.00, 0.99 .. 0.21 (power-of-two
scales try the next larger and smaller exponent instead) and keeps what makes sum |w - what|^2.4
least, the first tried among equals; "percentile" takes percentiles for the ends.

Source: Frantar et al., GPTQ, arXiv 2210.17323 and its code (range, search).
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp import host
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import base, codebook, double, floating
from jaxcomp.formats.affine import affine
from jaxcomp.formats.checks import check
from jaxcomp.formats.spec import Codebook, Element, Float, Int

__all__ = [
    "Context",
    "QParams",
    "build",
    "check",
    "decode",
    "encode",
    "expand",
    "fit",
    "fits_together",
    "group_size_of",
    "prepare",
    "quantize",
]

Clipping = Literal["minmax", "mse", "percentile"]
NORM = 2.4
# What "mse" tries besides the whole range. Power-of-two scales move by a whole exponent.
SHRINKS = tuple(1 - i / 100 for i in range(1, 80))
EXPONENT_STEPS = (2.0, 0.5)


class QParams(NamedTuple):
    """Parameters a group, ``(*stack, out_groups, col_groups)``, or a weight (expanded).

    Attributes:
      scale: float32 (or float64) multipliers, representable in the dtype they will be stored in;
        None for "kmeans".
      zero_point: int32, signed as the codes; None for symmetric grids.
    """

    scale: jax.Array | None
    zero_point: jax.Array | None = None


class Context(NamedTuple):
    """What a whole matrix shares.

    Attributes:
      levels: ``(*stack, 1 or out, L)`` of ``Codebook``, else None.
      tensor_scale: ``(*stack,)`` of nvfp4, else None.
      scale_mean: ``(*stack,)`` of double quantization, else None.
      scale_step: ``(*stack, blocks)`` of double quantization, else None.
    """

    levels: jax.Array | None = None
    tensor_scale: jax.Array | None = None
    scale_mean: jax.Array | None = None
    scale_step: jax.Array | None = None


EMPTY = Context()


def group_size_of(fmt: Element, size: int) -> int:
    """Inputs that share a scale, for an input axis of ``size``."""
    if isinstance(fmt, Float) and fmt.kind in floating.BLOCK:
        return floating.BLOCK[fmt.kind]
    return size if fmt.group_size is None else fmt.group_size


def fits_together(fmt: Element) -> bool:
    """Whether the scales of all groups depend on one another, so that ``fit`` needs them all."""
    return getattr(fmt, "double_quantization", False)


def _out_group_size(fmt: Element, out: int) -> int:
    group = getattr(fmt, "out_group_size", 1)
    return out if group is None else group


def _wide(w: jax.Array) -> jax.Array:
    w = jnp.asarray(w)
    return w.astype(base.compute_dtype(w))


def _storage_dtype(fmt: Element, scale: jax.Array) -> Any:
    """Dtype of stored scales; float64 weights keep float64 where float32 is asked for."""
    if fmt.scale_dtype == "float32":
        return scale.dtype
    return jnp.dtype(fmt.scale_dtype)


def _doubly_rounded(scale: jax.Array, empty: jax.Array, context: Context) -> jax.Array:
    """Scales ``(*stack, out_groups, in_groups)`` as double quantization gives them back."""
    mean, step = context.scale_mean, context.scale_step
    scale = jnp.swapaxes(jnp.where(empty, mean[..., None, None], scale), -1, -2)
    rounded = double.decode_scale(double.encode_scale(scale, mean, step), mean, step, scale.dtype)
    return jnp.swapaxes(rounded, -1, -2)


def representable(fmt: Element, scale: jax.Array) -> jax.Array:
    """The scale rounded to its storage dtype, positive and finite."""
    dtype = _storage_dtype(fmt, scale)
    stored = jnp.minimum(scale, float(jnp.finfo(dtype).max)).astype(dtype).astype(scale.dtype)
    return jnp.where(stored > 0, stored, 1)


def divided(x: jax.Array, by: Any) -> jax.Array:
    """``x / by`` for ``by > 0``, correctly rounded in every program.

    XLA divides by a constant, and in some programs by what a group shares, by multiplying with the
    reciprocal. The maximum, which changes nothing, hides both. One unit in the last place decides
    the ties of a full-range grid, whose largest weight lies half a step from two codes.
    """
    return x / jnp.maximum(by, -jnp.abs(x))


def prepare(fmt: Element, w: jax.Array, importance: jax.Array | None = None) -> Context:
    """What all groups of a matrix share.

    Args:
      fmt: ``Int``, ``Float`` or ``Codebook``.
      w: ``(*stack, out, in)``.
      importance: of each weight for "kmeans", >= 0, broadcast against ``w``; zero leaves it out.

    Returns:
      The context: levels of a codebook, the tensor scale of nvfp4, otherwise empty.
    """
    if isinstance(fmt, Int) or (isinstance(fmt, Float) and fmt.kind != "nvfp4"):
        return EMPTY
    return _prepare(fmt, w, importance)


@functools.partial(jax.jit, static_argnums=0)
def _prepare(fmt, w, importance):
    w = _wide(w)
    stack = w.shape[:-2]
    if isinstance(fmt, Float):
        absmax = jnp.abs(w).max((-1, -2)) if w.size else jnp.zeros(stack, w.dtype)
        tensor_scale = jnp.where(absmax > 0, divided(absmax, 448.0 * 6.0), 1)
        return Context(tensor_scale=tensor_scale.astype(w.dtype))
    if fmt.kind == "kmeans":
        return Context(levels=codebook.kmeans_levels(w, fmt.bits, importance))
    table = {"nf4": codebook.NF4, "fp4_bnb": codebook.FP4_BNB, "levels": fmt.levels}[fmt.kind]
    levels = jnp.broadcast_to(jnp.asarray(table, w.dtype), (*stack, 1, len(table)))
    if not fmt.double_quantization:
        return Context(levels=levels)
    group = group_size_of(fmt, w.shape[-1])
    absmax = jnp.abs(w).reshape(*w.shape[:-1], w.shape[-1] // group, group).max(-1)
    absmax = jnp.swapaxes(absmax, -1, -2)
    scale = divided(absmax, jnp.abs(levels).max(-1, keepdims=True))
    mean, step = double.second_level(scale, absmax > 0, _storage_dtype(fmt, scale))
    return Context(levels, scale_mean=mean, scale_step=step)


def _params(fmt: Element, low: jax.Array, high: jax.Array, context: Context) -> QParams:
    """Parameters of groups ``(*stack, OG, CG)`` that are to cover low <= 0 .. high >= 0."""
    absmax = jnp.maximum(-low, high)
    if isinstance(fmt, Int):
        levels = 2**fmt.bits - 1
        if fmt.symmetric:
            absmax = jnp.where(absmax > 0, absmax, 1)
            scale = divided(2 * absmax, levels)
            if not fmt.full_range:
                scale = divided(absmax, 2 ** (fmt.bits - 1) - 1)
            return QParams(representable(fmt, scale))
        empty = absmax == 0
        low, high = jnp.where(empty, -1, low), jnp.where(empty, 1, high)
        scale = representable(fmt, divided(high - low, levels))
        half = 2 ** (fmt.bits - 1)
        zero_point = jnp.clip(jnp.round(-low / scale), 0, levels).astype(jnp.int32) - half
        return QParams(scale, zero_point)
    if isinstance(fmt, Codebook):
        largest = jnp.abs(context.levels).max(-1, keepdims=True)
        return QParams(representable(fmt, divided(jnp.where(absmax > 0, absmax, 1), largest)))
    element = floating.ELEMENTS[floating.ELEMENT_OF[fmt.kind]]
    if fmt.kind.startswith("mx"):
        exponent = floating.exponent_of(absmax) - element.largest_exponent
        exponent = jnp.where(absmax > 0, jnp.clip(exponent, -126, 127), 0)
        return QParams(floating.power_of_two(exponent, absmax.dtype))
    if fmt.kind == "nvfp4":
        tensor_scale = context.tensor_scale[..., None, None]
        block = floating.round_to(divided(absmax, element.largest) / tensor_scale, "e4m3")
        return QParams(jnp.maximum(block, 2.0**-9) * tensor_scale)
    return QParams(representable(fmt, divided(jnp.where(absmax > 0, absmax, 1), element.largest)))


def fit(
    fmt: Element,
    w: jax.Array,
    context: Context = EMPTY,
    clipping: Clipping = "minmax",
    percentile: float = 99.9,
    mask: jax.Array | None = None,
) -> QParams:
    """Places a grid on every group.

    Args:
      fmt: ``Int``, ``Float`` or ``Codebook``.
      w: ``(*stack, out, cols)``, any number of whole groups of columns; all of them where
        ``fits_together``.
      context: of the whole matrix, from ``prepare``.
      clipping: "minmax" covers all weights; "mse" and "percentile" as at the head of this file.
      percentile: of |w| (of w and -w for asymmetric grids) that "percentile" covers, in percent.
      mask: bool, shape of ``w``: where False the weight does not count.

    Returns:
      ``(*stack, out_groups, col_groups)``.

    Raises:
      JaxcompError: for an unknown clipping.
    """
    if clipping not in ("minmax", "mse", "percentile"):
        raise JaxcompError(
            f'clipping {clipping!r} is not known; use "minmax", "mse" or "percentile".'
        )
    if isinstance(fmt, Codebook) and fmt.kind == "kmeans":
        return QParams(None)
    return _fit(fmt, clipping, percentile, w, context, mask)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fit(fmt, clipping, percentile, w, context, mask):
    w = _wide(w)
    *stack, out, cols = w.shape
    og, cg = _out_group_size(fmt, out), group_size_of(fmt, cols)
    grouped = (*stack, out // og, og, cols // cg, cg)
    axes = (-3, -1)
    x = w if mask is None else jnp.where(mask, w, 0)
    g = x.reshape(grouped)
    symmetric = not (isinstance(fmt, Int) and not fmt.symmetric)
    if clipping == "percentile":
        known = g if mask is None else jnp.where(mask.reshape(grouped), g, jnp.nan)
        known = jnp.moveaxis(known, -3, -2).reshape(*stack, out // og, cols // cg, og * cg)
        if symmetric:
            high = jnp.nanquantile(jnp.abs(known), percentile / 100, axis=-1)
            low = -high
        else:
            high = jnp.nanquantile(known, percentile / 100, axis=-1)
            low = jnp.nanquantile(known, 1 - percentile / 100, axis=-1)
        high = jnp.maximum(jnp.nan_to_num(high), 0)
        low = jnp.minimum(jnp.nan_to_num(low), 0)
    else:
        high = jnp.maximum(g.max(axes), 0)
        low = jnp.minimum(g.min(axes), 0)

    def finished(qparams):
        if not fits_together(fmt):
            return qparams
        return QParams(_doubly_rounded(qparams.scale, low == high, context))

    if clipping != "mse":
        return finished(_params(fmt, low, high, context))

    def error(qparams):
        q = expand(fmt, qparams, out, cols)
        delta = jnp.abs(decode(fmt, encode(fmt, x, q, context), q, context) - x)
        if mask is not None:
            delta = jnp.where(mask, delta, 0)
        return (delta**NORM).reshape(grouped).sum(axes)

    microscaling = isinstance(fmt, Float) and fmt.kind.startswith("mx")
    factors = jnp.asarray(EXPONENT_STEPS if microscaling else SHRINKS, w.dtype)

    def shrink(i, best):
        least, chosen = best
        factor = factors[i]
        tried = _params(fmt, low * factor, high * factor, context)
        err = error(tried)
        better = err < least
        return jnp.where(better, err, least), jax.tree.map(
            lambda new, old: jnp.where(better, new, old), tried, chosen
        )

    start = _params(fmt, low, high, context)
    return finished(jax.lax.fori_loop(0, factors.size, shrink, (error(start), start))[1])


def expand(fmt: Element, qparams: QParams, out: int, cols: int) -> QParams:
    """Parameters of groups spread over a matrix.

    Args:
      fmt: the format.
      qparams: ``(*stack, out_groups, col_groups)``.
      out: rows of the matrix.
      cols: columns of the matrix.

    Returns:
      ``(*stack, out, cols)``.
    """
    del fmt
    return jax.tree.map(lambda a: base.spread(a, out, cols), qparams)


def scaled(w: jax.Array, qparams: QParams) -> jax.Array:
    """Weights in units of the scale."""
    return w if qparams.scale is None else divided(w, qparams.scale)


def encode(fmt: Element, w: jax.Array, qparams: QParams, context: Context = EMPTY) -> jax.Array:
    """Codes of the nearest grid points.

    Args:
      fmt: ``Int``, ``Float`` or ``Codebook``.
      w: ``(*stack, out, cols)``, one column (``cols = 1``) or many.
      qparams: expanded, or such that they broadcast against ``w``.
      context: of the whole matrix.

    Returns:
      int32 ``(*stack, out, cols)``: signed integers, bit patterns, or indices of levels.
    """
    w = _wide(w)
    if isinstance(fmt, Int):
        high = 2 ** (fmt.bits - 1) - 1
        low = -high if fmt.symmetric and not fmt.full_range else -high - 1
        q = jnp.round(scaled(w, qparams))
        if qparams.zero_point is not None:
            q = q + qparams.zero_point.astype(q.dtype)
        return jnp.clip(q, low, high).astype(jnp.int32)
    w = scaled(w, qparams)
    if isinstance(fmt, Float):
        return floating.encode_float(w, floating.ELEMENT_OF[fmt.kind])
    return codebook.nearest(w, context.levels)


def decode(fmt: Element, codes: jax.Array, qparams: QParams, context: Context = EMPTY) -> jax.Array:
    """Values of codes, the inverse of ``encode`` on the grid.

    Args:
      fmt: ``Int``, ``Float`` or ``Codebook``.
      codes: int32 ``(*stack, out, cols)``.
      qparams: as in ``encode``.
      context: of the whole matrix.

    Returns:
      float32 (or float64) ``(*stack, out, cols)``, equal to what the built part materializes.
    """
    wide = base.compute_dtype(qparams.scale, context.levels)
    if isinstance(fmt, Int):
        value = codes.astype(wide)
        if qparams.zero_point is not None:
            value = value - qparams.zero_point.astype(wide)
    elif isinstance(fmt, Float):
        value = floating.decode_float(codes, floating.ELEMENT_OF[fmt.kind], wide)
    else:
        value = codebook.look_up(codes, context.levels)
    return value if qparams.scale is None else value * qparams.scale


def build(
    fmt: Element,
    codes: jax.Array,
    qparams: QParams,
    context: Context = EMPTY,
    group_index: jax.Array | None = None,
    in_size: int | None = None,
) -> base.Part:
    """Packs codes and parameters into a part.

    Args:
      fmt: ``Int``, ``Float`` or ``Codebook``.
      codes: ``(*stack, out, in)``, or of ``Int`` what ``affine.packed`` made of them.
      qparams: of groups, ``(*stack, out_groups, in_groups)``.
      context: of the whole matrix.
      group_index: ``(*stack, in)`` group of each input where groups are not consecutive (``Int``
        only).
      in_size: length of the input axis, where the codes are packed already.

    Returns:
      ``Affine``, ``FloatPart`` or ``CodebookPart``.

    Raises:
      JaxcompError: for a ``group_index`` with another format than ``Int``.
    """
    if group_index is not None and not isinstance(fmt, Int):
        raise JaxcompError(
            f"{fmt}: groups that are not consecutive can be stored for Int only; use static_groups."
        )
    if isinstance(fmt, Int) and host.is_on_host(codes, group_index, *qparams):
        made = functools.partial(_build_any, fmt, in_size)
        return host.call(made, codes, qparams, context, group_index)
    return _build(fmt, in_size, codes, qparams, context, group_index)


def _build_any(fmt, in_size, codes, qparams, context, group_index):
    scale = qparams.scale
    if scale is not None:
        scale = scale.swapaxes(-1, -2)
        if not (isinstance(fmt, Float) and fmt.kind in floating.BLOCK):
            scale = scale.astype(_storage_dtype(fmt, scale))
    if isinstance(fmt, Int):
        zero_point = qparams.zero_point
        if zero_point is not None:
            zero_point = zero_point.swapaxes(-1, -2)
        return affine(codes, scale, zero_point, group_index, bits=fmt.bits, in_size=in_size)
    if isinstance(fmt, Float):
        return floating.float_part(codes, scale, context.tensor_scale, kind=fmt.kind)
    mean, step = context.scale_mean, context.scale_step
    if mean is not None:
        scale = jnp.swapaxes(qparams.scale, -1, -2)
        mean, step = (a.astype(_storage_dtype(fmt, a)) for a in (mean, step))
    return codebook.codebook_part(codes, context.levels, scale, mean, step, kind=fmt.kind)


_build = jax.jit(_build_any, static_argnums=(0, 1))


def quantize(
    fmt: Element,
    w: jax.Array,
    clipping: Clipping = "minmax",
    percentile: float = 99.9,
    mask: jax.Array | None = None,
    importance: jax.Array | None = None,
    path: str = "weight",
) -> base.Part:
    """Rounds a matrix to the nearest points of a format's grid.

    Args:
      fmt: ``Int``, ``Float`` or ``Codebook``.
      w: ``(*stack, out, in)``.
      clipping: as in ``fit``.
      percentile: as in ``fit``.
      mask: bool, shape of ``w``: where False the weight counts for nothing in the fit; the value
        stored there is the grid's nearest to zero (zero itself, except for "kmeans").
      importance: for "kmeans", >= 0, broadcast against ``w``.
      path: name of the weight, for errors.

    Returns:
      The part.

    Raises:
      JaxcompError: when the format does not fit the shape.

    Example:
      >>> import jax.numpy as jnp
      >>> part = quantize(Int(4, full_range=False), jnp.array([[1.0, -7.0, 3.4]]))
      >>> part.materialize().tolist(), part.nbits
      ([[1.0, -7.0, 3.0]], 48)
    """
    check(fmt, w.shape, path)
    if mask is not None:
        w = jnp.where(mask, w, 0)
        if importance is None:
            importance = mask.astype(base.compute_dtype(w))
        else:
            importance = jnp.where(mask, importance, 0)
    context = prepare(fmt, w, importance)
    qparams = fit(fmt, w, context, clipping, percentile, mask)
    return _round_and_build(fmt, w, qparams, context)


@functools.partial(jax.jit, static_argnums=0)
def _round_and_build(fmt, w, qparams, context):
    codes = encode(fmt, w, expand(fmt, qparams, *w.shape[-2:]), context)
    return _build(fmt, None, codes, qparams, context, None)
