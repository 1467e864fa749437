"""AWQ: scales up the weight columns that see large activations before rounding, then clips.

    s(r)_j = (mean|X_j|)^r, normalised by sqrt(max s * min s),   r in {0, 0.05, .., 0.95}
    r* = argmin_r sum over the weights that read X of || Q(W s) (X / s) - W X ||²

and then, for every row and group, the largest magnitude among 1, 0.95, .., 0.55 of the group's own
that minimises the error of the group's share of the output. Both errors come from the Hessian H =
X Xᵀ: ||E X||² = tr(E H Eᵀ) exactly, and H's diagonal block for one group. r = 0 is plain rounding,
so the result is never worse than that on the calibration inputs.

Differs from the paper's code in:
1. The objective is the output of the linear layers that read X, not of the block they are in.
2. The scale is shared by all layers of an input group at once, their errors being added.
3. Inputs that are always zero keep s = 1 where the code clamps at 1e-4.
4. Clipping is kept only in rows whose whole error it lowers, as groups' errors add up in the output
   (the code clips unconditionally, and skips queries and keys by name).

Source: AWQ, https://arxiv.org/abs/2306.00978.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import host
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import grid
from jaxcomp.formats.compressed import CompressedArray
from jaxcomp.formats.spec import Codebook, Element
from jaxcomp.formats.transforms import InputScale
from jaxcomp.quantization import checks, common
from jaxcomp.step import Activation, Layer, Step, run

_EXACT = jax.lax.Precision.HIGHEST


class AWQ(Step, frozen=True, tag="awq"):
    """Rounds weights after scaling up the columns that matter most.

    Attributes:
      format: what weights become.
      clipping: how a group's range is chosen while scales are searched.
      percentile: of the magnitudes, for ``clipping="percentile"``.
      grid_size: exponents tried, from 0 in equal steps below 1.
      search_clip: also search for a smaller range in each group.
      activation: how the input is quantized at run time; None leaves it alone.
    """

    format: Element
    clipping: str = "minmax"
    percentile: float = 99.9
    grid_size: int = 20
    search_clip: bool = True
    activation: Activation | None = None

    def needs(self) -> frozenset[str]:
        """The Hessian, mean magnitudes, and the inputs' range for static activation scales."""
        return frozenset({"hessian", "absmean"}) | common.activation_needs(self.activation)


def _energy(e, h):
    """Rows' shares of tr(E H Eᵀ): ``(*stack, out)``."""
    return jnp.sum(jnp.matmul(e, h, precision=_EXACT) * e, axis=-1)


def _scales(absmean, ratios):
    """Scales ``(ratios, *stack, in)`` of each exponent."""
    xp = np if isinstance(absmean, np.ndarray) else jnp
    ratio = ratios.reshape(-1, *(1,) * absmean.ndim)
    live = absmean > 0
    scale = xp.where(live, absmean, 1) ** ratio
    limits = xp.finfo(scale.dtype)
    largest = scale.max(-1, keepdims=True, where=live, initial=limits.tiny)
    least = scale.min(-1, keepdims=True, where=live, initial=limits.max)
    return xp.where(live, scale / (xp.sqrt(largest) * xp.sqrt(least)), 1)


def _chosen(scales, best):
    """The scale ``(*stack, in)`` that each matrix of a stack has found best."""
    xp = np if isinstance(scales, np.ndarray) else jnp
    return xp.take_along_axis(scales, best[None, ..., None], axis=0)[0]


ATTEMPTS = 10


def _clipped(fmt, w, h, mask, clipping, percentile):
    """The weight rounded with each group clipped to the factor of its absmax that serves best.

    First each group takes the factor under which its own error is least. As groups of a row also
    act together, a row whose error all in all is larger for it goes back to no clipping. One loop
    does all of it, so that rounding is compiled once.
    """
    *stack, out, size = w.shape
    group = grid.group_size_of(fmt, size)
    rows = jax.eval_shape(lambda w: grid.fit(fmt, w, grid.prepare(fmt, w)).scale, w).shape[-2]
    columns = size // group
    blocks = h.reshape(*h.shape[:-2], columns, group, columns, group)
    blocks = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)
    grouped = (*stack, rows, out // rows, columns, group)
    absmax = jnp.abs(w).reshape(grouped).max((-3, -1), keepdims=True)

    def rounded(factor):
        limit = jnp.broadcast_to(absmax * factor[..., :, None, :, None], grouped).reshape(w.shape)
        clipped = jnp.clip(w, -limit, limit)
        return common.round_to_grid(fmt, clipped, clipping, percentile, mask, False)

    def group_losses(e):
        e = e.reshape(*stack, out, columns, group)
        moved = jnp.einsum("...ogk,...gkl->...ogl", e, blocks, precision=_EXACT)
        return jnp.sum(moved * e, -1).reshape(*stack, rows, out // rows, columns).sum(-2)

    def row_losses(e):
        return _energy(e, h).reshape(*stack, rows, out // rows).sum(-1)

    whole = jnp.ones((*stack, rows, columns), w.dtype)

    def attempt(i, best):
        least, factor, unclipped, _ = best
        candidate = jnp.where(i < ATTEMPTS, whole * (1 - i / 20).astype(w.dtype), factor)
        result = rounded(candidate)
        e = result.values - w
        tried = group_losses(e)
        better = (i < ATTEMPTS) & (tried < least)
        least, factor = jnp.where(better, tried, least), jnp.where(better, candidate, factor)
        compared = (i == 0) | (i == ATTEMPTS)
        loss = jax.lax.cond(compared, row_losses, lambda e: unclipped, e)
        worse = (i == ATTEMPTS) & (loss >= unclipped)
        factor = jnp.where(worse[..., None], 1.0, factor)
        return least, factor, jnp.where(i == 0, loss, unclipped), result

    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(rounded, whole))
    start = (jnp.full_like(whole, jnp.inf), whole, jnp.zeros(whole.shape[:-1], w.dtype), nothing)
    return jax.lax.fori_loop(0, ATTEMPTS + 2, attempt, start)[-1]


_STATIC = ("fmt", "clipping", "percentile")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _losses(w, h, mask, scales, **options):
    """Rows' losses under each of the scales, ``(*stack, out, len(scales))``."""
    w, h = w.astype(scales.dtype), h.astype(scales.dtype)
    w = w if mask is None else jnp.where(mask, w, 0.0)

    def loss(scale):
        scale = scale[..., None, :]
        values = common.round_to_grid(w=w * scale, mask=mask, build=False, **options).values
        return _energy(values / scale - w, h)

    return jnp.moveaxis(jax.lax.map(loss, scales), 0, -1)


@functools.partial(jax.jit, static_argnames=(*_STATIC, "search_clip", "report"))
def _rounded(w, h, mask, scale, *, search_clip, report, **options):
    """The weight rounded under a scale, and the energies of its error."""
    w, h = w.astype(scale.dtype), h.astype(scale.dtype)
    w = w if mask is None else jnp.where(mask, w, 0.0)
    column = scale[..., None, :]
    if search_clip:
        seen = h / (column * jnp.swapaxes(column, -1, -2))
        result = _clipped(w=w * column, h=seen, mask=mask, **options)
    else:
        result = common.round_to_grid(w=w * column, mask=mask, build=False, **options)
    return result, common.energies(w, result.values / column, h) if report else None


def _by_rows(function, w, h, mask, shared, **options):
    """Calls one of the above on all rows, or on the CPU on slabs of them.

    On a mesh, of several processes too, XLA splits the work like the weight's rows.
    """
    if not common.splits_rows(w, h, options["fmt"]):
        return function(w, h, mask, shared, **options)
    return common.by_rows(
        lambda w, mask: function(w, h, mask, shared, **options),
        w,
        mask,
        rows=common.slab_rows(w.shape[-1]),
    )


def _solve(weights, hessians, absmeans, masks, patterns, paths, step, stack, report):
    fmt = step.format
    for w, h, mask, nm, path in zip(weights, hessians, masks, patterns, paths, strict=True):
        checks.check_format(fmt, w, mask, nm, path)
        checks.check_choice("clipping", step.clipping, checks.CLIPPINGS, path)
        checks.check_weight(w, path)
        checks.check_hessian(h, w, path)
    if step.grid_size < 1:
        raise JaxcompError(f"grid_size {step.grid_size} must be at least 1")
    options = dict(fmt=fmt, clipping=step.clipping, percentile=step.percentile)
    hessians = host.to_device(hessians)  # Not again at each call.
    kmeans = isinstance(fmt, Codebook) and fmt.kind == "kmeans"
    dtype = common.working_dtype(*weights)
    absmean = common.shared(absmeans, stack).astype(dtype)
    ratios = (np.arange(step.grid_size) / step.grid_size).astype(dtype)
    scales = host.call(_scales, absmean, ratios)
    layers = list(zip(weights, hessians, masks, strict=True))
    losses = 0
    for layer in layers:
        rows = host.numpy(_by_rows(_losses, *layer, scales, **options))
        lead = tuple(range(rows.ndim - 2)) if rows.shape[:-2] != stack else ()
        losses = losses + rows.sum((*lead, -2))
    best = losses.argmin(-1)
    ratio = (best / step.grid_size).astype(dtype)
    scale = host.call(_chosen, scales, best)
    search = step.search_clip and not kmeans
    found = [
        _by_rows(_rounded, *layer, scale, search_clip=search, report=report, **options)
        for layer in layers
    ]
    parts = [
        common.store(fmt, rounded, mask, nm)
        for (rounded, _), mask, nm in zip(found, masks, patterns, strict=True)
    ]
    return scale, ratio, found, parts


def awq(
    w: jax.Array,
    x: jax.Array,
    fmt: Element,
    clipping: str = "minmax",
    percentile: float = 99.9,
    grid_size: int = 20,
    search_clip: bool = True,
    activation: Activation | None = None,
    mask: jax.Array | None = None,
    nm: tuple[int, int] | None = None,
) -> CompressedArray:
    """Quantizes a weight under the per-channel scale that leaves its output most alike.

    Args:
      w: ``(*stack, out, in)`` float.
      x: ``(tokens, in)`` or ``(*stack, tokens, in)`` calibration inputs.
      fmt: element format, ``Int``, ``Float`` or ``Codebook``.
      clipping: "minmax", "mse" or "percentile", how ranges are chosen while scales are searched.
      percentile: of the magnitudes in a group, in percent, for ``clipping="percentile"``.
      grid_size: exponents tried, from 0 in equal steps below 1.
      search_clip: also search for a smaller range in each group.
      activation: how the (scaled) input is quantized when the weight is used (dynamic scales).
      mask: bool like ``w``, False where the weight is zero and stays so.
      nm: (n, m) if ``mask`` has that pattern, to store it as such.

    Returns:
      A compressed array of the shape and dtype of ``w``: rounded weights behind an ``InputScale``.

    Raises:
      JaxcompError: the format does not fit the shape, or values are not finite.

    Example:
      >>> from jaxcomp.formats.spec import Int
      >>> x = jnp.array([[10.0, 1.0], [-12.0, 0.5]])
      >>> awq(jnp.array([[0.3, -0.7]]), x, Int(4)).shape
      (1, 2)

    Source: https://arxiv.org/abs/2306.00978, section 3.2.
    """
    checks.check_inputs(x, w)
    stack = w.shape[:-2]
    hessian, absmean = _moments(x)
    step = AWQ(
        format=fmt,
        clipping=clipping,
        percentile=percentile,
        grid_size=grid_size,
        search_clip=search_clip,
    )
    scale, _, _, (parts,) = _solve(
        [w], [hessian], [absmean], [mask], [nm], [""], step, stack, report=False
    )
    parts = common.with_activation(parts, activation)
    inverse = jnp.broadcast_to(1 / scale, (*stack, w.shape[-1]))
    return common.compressed([InputScale(part, inverse) for part in parts], w)


@jax.jit
def _moments(x):
    x = x.astype(common.working_dtype(x))
    return jnp.einsum("...ti,...tj->...ij", x, x, precision=_EXACT), jnp.abs(x).mean(-2)


def _mean(total, count):
    return total / count.clip(1)[..., None]


@run.register
def _(step: AWQ, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    absmeans = []
    for layer in layers:
        checks.check_statistics(layer, "hessian")
        checks.check_statistics(layer, "abssum")
        absmeans.append(host.call(_mean, layer.statistics.abssum, layer.statistics.count))
    scale, ratio, found, parts = _solve(
        [layer.weight for layer in layers],
        [layer.statistics.hessian for layer in layers],
        absmeans,
        [layer.mask for layer in layers],
        [common.pattern(layer) for layer in layers],
        [layer.path for layer in layers],
        step,
        common.shared_stack(layers),
        report=True,
    )
    results = []
    for layer, part, (rounded, energy) in zip(layers, parts, found, strict=True):
        error = common.error_of(energy)
        layer = common.rescaled(layer, scale)
        layer = common.quantized(layer, part, rounded.values, step.activation, error)
        layer.metrics["ratio"] = float(ratio.mean())
        results.append(layer)
    return tuple(results)
