"""Values out of a table of levels: NF4, bitsandbytes' FP4, given levels, and k-means a row.

A value is the nearest level: index = number of midpoints of neighbouring levels that lie below it
(a tie takes the lower level). Under a scale, levels are divided by their largest magnitude: scale =
absmax / max|level|.

k-means (``kmeans_levels``) is Lloyd's algorithm on each row: assign to the nearest level, move each
level to the weighted mean of its members; in one dimension clusters are intervals, so with the row
sorted once and prefix sums of weights an iteration costs a binary search a level.

Source: Dettmers et al., QLoRA, arXiv 2305.14314 (NF4); bitsandbytes (FP4); Lloyd 1982.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.formats import base, double, packing
from jaxcomp.formats.base import Part, part, static

# Quantiles of N(0, 1) at equal steps of probability, eight above zero, seven below and zero itself,
# divided by the largest. The float32 values of bitsandbytes.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_BNB = (0.0625 / 12, 2 / 12, 3 / 12, 4 / 12, 6 / 12, 8 / 12, 1.0)
FP4_BNB = (*(-v for v in reversed(_FP4_BNB)), 0.0, *_FP4_BNB)


def nearest(x: jax.Array, levels: jax.Array) -> jax.Array:
    """Indices (int32) of the nearest levels.

    Args:
      x: ``(*stack, out, cols)``.
      levels: ``(*stack, 1 or out, L)`` ascending.

    Returns:
      ``(*stack, out, cols)``.
    """
    middle = 0.5 * (levels[..., 1:] + levels[..., :-1])
    return (x[..., None] > middle[..., None, :]).sum(-1, dtype=jnp.int32)


def look_up(codes: jax.Array, levels: jax.Array) -> jax.Array:
    """Levels at indices: ``codes (*stack, out, cols)``, ``levels (*stack, 1 or out, L)``."""
    codes = codes.astype(jnp.int32)
    if levels.shape[-2] == 1:
        flat = codes.reshape(*codes.shape[:-2], 1, codes.shape[-2] * codes.shape[-1])
        return jnp.take_along_axis(levels, flat, axis=-1).reshape(codes.shape)
    return jnp.take_along_axis(levels, codes, axis=-1)


def _starts(x, weight, size):
    """First levels of a sorted row, ``(3, size)``: by population, equal steps, and spacing."""
    steps = (jnp.arange(size, dtype=x.dtype) + 0.5) / size

    def at_shares(mass):
        index = jnp.searchsorted(mass, steps * mass[-1])
        return x[jnp.minimum(index, x.shape[0] - 1)]

    quantile = at_shares(jnp.cumsum(weight))
    uniform = x[0] + (x[-1] - x[0]) * jnp.linspace(0, 1, size, dtype=x.dtype)
    # The best levels have a density that goes as (density of the weights)^(1/3); between neighbours
    # at distance d that is an expected d^(2/3).
    gap = jnp.diff(x, prepend=x[:1])
    spacing = at_shares(jnp.cumsum(gap ** (2 / 3) * weight ** (1 / 3)))
    return jnp.stack([quantile, uniform, spacing])


def _lloyd_row(x, weight, start, size, iterations):
    """Best levels ``(L,)`` of Lloyd's runs on one row ``x (n,)`` with ``weight (n,)``.

    ``start`` is the index of a start of ``_starts``, None for all of them, or levels.
    """
    order = jnp.argsort(x)
    x, weight = x[order], weight[order]
    zero = jnp.zeros(1, x.dtype)
    mass = jnp.concatenate([zero, jnp.cumsum(weight)])
    moment = jnp.concatenate([zero, jnp.cumsum(weight * x)])
    count = x.shape[0]

    def edges(levels):
        middle = 0.5 * (levels[1:] + levels[:-1])
        inner = jnp.searchsorted(x, middle, side="right")
        return jnp.concatenate([jnp.zeros(1, inner.dtype), inner, jnp.full(1, count, inner.dtype)])

    def moved(at, total, moment, levels):
        mean = moment / jnp.where(total > 0, total, 1)
        # Rounding must not move a mean past its members: a constant row stays what it is.
        low, high = x[jnp.minimum(at[:-1], count - 1)], x[jnp.maximum(at[1:] - 1, 0)]
        return jnp.where(total > 0, jnp.clip(mean, low, high), levels)

    def step(_, levels):
        at = edges(levels)
        return moved(at, mass[at[1:]] - mass[at[:-1]], moment[at[1:]] - moment[at[:-1]], levels)

    def members(levels):
        return jnp.searchsorted(edges(levels)[1:-1], jnp.arange(count), side="right")

    def run(levels):
        if iterations:
            levels = jax.lax.fori_loop(0, iterations, step, levels)
            # Last means as sums over members: differences of prefix sums are inexact where a
            # cluster is light.
            index = members(levels)
            total = jax.ops.segment_sum(weight, index, size)
            moments = jax.ops.segment_sum(weight * x, index, size)
            levels = moved(edges(levels), total, moments, levels)
        return levels, (weight * (x - levels[members(levels)]) ** 2).sum()

    if start is not None and not isinstance(start, int):
        return run(start)[0]
    starts = _starts(x, weight, size)
    if start is not None:
        return run(starts[start])[0]
    levels, errors = jax.vmap(run)(starts)
    return levels[jnp.argmin(errors)]


_INITS = {"quantile": 0, "uniform": 1, "spacing": 2, "best": None}


def kmeans_levels(
    w: jax.Array,
    bits: int,
    importance: jax.Array | None = None,
    init: str | jax.Array = "best",
    iterations: int = 50,
) -> jax.Array:
    """Levels that (locally) minimise sum importance * (w - level)^2 on each row.

    Args:
      w: ``(*stack, out, in)``.
      bits: 2**bits levels.
      importance: weights >= 0 that broadcast against ``w``; None is one everywhere.
      init: where the levels start: "quantile" (equal weighted population), "uniform" (equal steps
        from the least to the largest value), "spacing" (density^(1/3), the optimum of many levels),
        "best" of these three for each row, or levels ``(*stack, out, 2**bits)``.
      iterations: of Lloyd's algorithm; none of them increases the error.

    Returns:
      Ascending levels ``(*stack, out, 2**bits)``.
    """
    wide = base.compute_dtype(w)
    w = w.astype(wide)
    weight = jnp.ones_like(w) if importance is None else importance.astype(wide)
    weight = jnp.broadcast_to(weight, w.shape)
    weight = jnp.where(weight.sum(-1, keepdims=True) > 0, weight, 1)
    size = 2**bits
    rows = (w.reshape(-1, w.shape[-1]), weight.reshape(-1, w.shape[-1]))
    if isinstance(init, str):
        start = _INITS[init]
        levels = jax.vmap(lambda x, v: _lloyd_row(x, v, start, size, iterations))(*rows)
    else:
        given = jnp.sort(jnp.asarray(init, wide), axis=-1).reshape(-1, size)
        levels = jax.vmap(lambda x, v, c: _lloyd_row(x, v, c, size, iterations))(*rows, given)
    return levels.reshape(*w.shape[:-1], size)


def bits_for(levels: int) -> int:
    """Bits of an index into a table of so many levels."""
    return max(1, int(np.ceil(np.log2(levels))))


@part
class CodebookPart(Part):
    """Indices into a table of levels, W = scale * levels[index].

    Attributes:
      indices: packed along the input axis, uint8 ``(*stack, out, ceil(in*bits/8))``.
      levels: ``(*stack, out, L)`` a table a row, or ``(*stack, 1, L)`` one for all rows; ascending.
      scale: ``(*stack, in_groups, out)``, or None. The out axis is shorter where several rows
        share a scale. Under double quantization the 8-bit values of ``double``.
      scale_mean: ``(*stack,)`` of double quantization, else None.
      scale_step: ``(*stack, blocks)`` of double quantization, else None.
      bits: width of an index.
      padding: indices by which the packed row is longer than the input axis.
      kind: as in the ``Codebook`` format.
    """

    indices: jax.Array
    levels: jax.Array
    scale: jax.Array | None = None
    scale_mean: jax.Array | None = None
    scale_step: jax.Array | None = None
    bits: int = static(default=4)
    padding: int = static(default=0)
    kind: str = static(default="levels")

    @property
    def in_size(self) -> int:
        """Length of the input axis."""
        return packing.unpacked_size(self.indices.shape[-1], self.bits, self.padding)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*stack, out, in)``."""
        return (*self.indices.shape[:-1], self.in_size)

    @property
    def group_size(self) -> int | None:
        """Consecutive inputs that share a scale; None without scales."""
        return None if self.scale is None else self.in_size // self.scale.shape[-2]

    def codes(self) -> jax.Array:
        """Indices as uint8 ``(*stack, out, in)``."""
        return packing.unpack(self.indices, self.bits, self.in_size)

    def effective_scale(self) -> jax.Array | None:
        """The multipliers ``(*stack, in_groups, out)``, or None."""
        if self.scale_mean is None:
            return self.scale
        wide = base.compute_dtype(self.levels, self.scale_mean)
        return double.decode_scale(self.scale, self.scale_mean, self.scale_step, wide)

    @base.jitted
    def materialize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The dense matrix ``(*stack, out, in)`` in ``dtype``."""
        scale = self.effective_scale()
        wide = base.compute_dtype(self.levels, scale)
        value = look_up(self.codes(), self.levels.astype(wide))
        if scale is not None:
            scale = base.expand_groups(scale, self.indices.shape[-2], self.in_size)
            value = value * scale.astype(wide)
        return value.astype(dtype)

    def scale_rows(self, c: jax.Array) -> "CodebookPart":
        """Rows times ``c (*stack, out)``: the scales, or the tables of levels, are multiplied.

        Scales of double quantization become plain ones.
        """
        scale = self.effective_scale()
        if scale is not None:
            scale = base.scale_group_rows(scale, c)
            return self.replace(scale=scale, scale_mean=None, scale_step=None)
        return self.replace(levels=self.levels * c[..., :, None].astype(self.levels.dtype))


def codebook_part(
    codes: jax.Array,
    levels: jax.Array,
    scale: jax.Array | None = None,
    scale_mean: jax.Array | None = None,
    scale_step: jax.Array | None = None,
    *,
    kind: str,
) -> CodebookPart:
    """Packs indices into a ``CodebookPart``.

    Args:
      codes: ``(*stack, out, in)`` indices.
      levels: ``(*stack, 1 or out, L)``.
      scale: ``(*stack, in_groups, out)`` or None.
      scale_mean: of double quantization, ``(*stack,)``; ``scale`` is what it is to be in effect.
      scale_step: of double quantization, ``(*stack, blocks)``.
      kind: as in the ``Codebook`` format.

    Returns:
      The part.
    """
    bits = bits_for(levels.shape[-1])
    padding = packing.padding_of(codes.shape[-1], bits)
    if scale_mean is not None:
        scale = double.encode_scale(scale, scale_mean, scale_step)
    indices = packing.pack(codes, bits)
    return CodebookPart(
        indices, levels, scale, scale_mean, scale_step, bits=bits, padding=padding, kind=kind
    )
