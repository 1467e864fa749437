"""SparseGPT: drops weights column by column and moves the free columns to make up for it.

The solver of GPTQ (``quantization.obs``) with q_k = 0 where a weight is dropped. When the loop
reaches a block of columns it chooses the weights of the block whose removal costs least as they
stand by then,

    score_ij = w_ij² / U_jj²,   U the upper Cholesky factor of the inverse Hessian,

over all rows of a block of ``block_size`` columns (exactly round(sparsity * block) of them), or
all but n of every m consecutive columns of a row. Kept weights may be quantized in the same pass.

Differs from the paper's code in:
1. Exactly that many weights go in a block, ties included (its threshold, compared with <=, drops
   one more).
2. Joint quantization fits a group's scale when the loop reaches the group, or before the loop where
   a row is one group, as GPTQ does here; the code fits a row before the loop.
3. Dead inputs and Hessians that are not positive definite are dealt with as in GPTQ here.

Source: SparseGPT, https://arxiv.org/abs/2301.00774.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.formats import grid
from jaxcomp.formats.compressed import CompressedArray
from jaxcomp.formats.spec import Element
from jaxcomp.pruning import masks
from jaxcomp.quantization import common, obs
from jaxcomp.step import Layer, Step, run


class SparseGPT(Step, frozen=True, tag="sparsegpt"):
    """Drops weights so that the layer's output changes least.

    Attributes:
      sparsity: fraction to drop; or ``n`` and ``m`` instead.
      n: weights kept of each block.
      m: consecutive inputs in a block.
      format: what kept weights become in the same pass; None leaves them in their dtype.
      damping: fraction of the mean diagonal added to the Hessian.
      block_size: columns over which a mask is chosen at a time.
      clipping: how a group's range is chosen.
      percentile: of the magnitudes, for ``clipping="percentile"``.
    """

    sparsity: float | None = None
    n: int | None = None
    m: int | None = None
    format: Element | None = None
    damping: float = 0.01
    block_size: int = 128
    clipping: str = "minmax"
    percentile: float = 99.9

    def needs(self) -> frozenset[str]:
        """The Hessian."""
        return frozenset({"hessian"})


class _Result(NamedTuple):
    rounded: Any
    mask: jax.Array
    damping: jax.Array
    error: jax.Array | None


def _counts(sparsity, block_size, out, size):
    """Weights dropped of a whole block and of the shorter last one, and the number of whole ones."""
    block = min(block_size, size)
    full = masks.dropped_count(sparsity, out * block)
    return full, masks.dropped_count(sparsity, out * (size % block)), size // block


@functools.partial(
    jax.jit,
    static_argnames=("sparsity", "nm", "fmt", "block_size", "clipping", "percentile", "report"),
)
def _sparsegpt(
    w, h, allowed, damping, *, sparsity, nm, fmt, block_size, clipping, percentile, report
):
    dtype = common.working_dtype(w)
    out, size = w.shape[-2:]
    block = min(block_size, size)
    full, last, _ = _counts(sparsity or 0.0, block_size, out, size)

    def choose(scores, start, permitted):
        if permitted is not None:
            scores = jnp.where(permitted, scores, 0.0)
        if nm is not None:
            keep = masks.nm_mask(scores, *nm)
        else:
            inside = start + jnp.arange(block) < size
            count = jnp.where(start + block <= size, full, last)
            scores = jnp.where(inside, scores, jnp.inf)
            keep = masks.drop_smallest(scores, count, (-2, -1))
        return keep if permitted is None else keep & permitted

    def one(w, h, allowed):
        w, h = w.astype(dtype), h.astype(dtype)
        diagonal = jnp.diagonal(h)
        factor = obs.inverse_factor(h, damping)
        w = jnp.where((diagonal <= 0) & jnp.any(diagonal > 0), 0.0, w)
        if allowed is not None:
            w = jnp.where(allowed, w, 0.0)
        context = None if fmt is None else grid.prepare(fmt, w)
        solution = obs.solve(
            w,
            factor.upper,
            fmt=fmt,
            context=context,
            mask=allowed,
            choose=choose,
            choose_size=block if nm is None else nm[1],
            block_size=block_size,
            clipping=clipping,
            percentile=percentile,
        )
        rounded = common.Rounded(solution.values, solution.codes, solution.qparams, context)
        return _Result(rounded, solution.mask, factor.damping, None)

    result = common.over_stack(one, w, (h, 2), (allowed, 2))
    if report:
        result = result._replace(error=common.relative_error(w, result.rounded.values, h))
    return result


def _solve(w, h, allowed, path, options, report):
    """Checks everything, runs the algorithm, and returns parts and the result."""
    options = dict(options)
    n, m = options.pop("n"), options.pop("m")
    nm = masks.check_target(options["sparsity"], n, m, w.shape[-1], path)
    fmt = options["fmt"]
    if fmt is not None:
        common.check_format(fmt, w, np.broadcast_to(True, w.shape), nm, path)
    common.check_choice("clipping", options["clipping"], common.CLIPPINGS, path)
    common.check_damping(options["damping"], options["block_size"], path)
    common.check_weight(w, path)
    common.check_hessian(h, w, path)
    result = _sparsegpt(w, h, allowed, **options, nm=nm, report=report)
    kept = None
    if allowed is None and nm is None:
        # Known without looking, so that this also runs under jit.
        full, last, blocks = _counts(options["sparsity"], options["block_size"], *w.shape[-2:])
        kept = w.shape[-2] * w.shape[-1] - blocks * full - last
    if fmt is None:
        values = result.rounded.values
        return common.sparse_parts(values, result.mask, nm, w.dtype, kept), result
    return common.store(fmt, result.rounded, result.mask, nm, kept), result


def sparsegpt(
    w: jax.Array,
    h: jax.Array,
    sparsity: float | None = None,
    n: int | None = None,
    m: int | None = None,
    fmt: Element | None = None,
    damping: float = 0.01,
    block_size: int = 128,
    clipping: str = "minmax",
    percentile: float = 99.9,
    mask: jax.Array | None = None,
) -> CompressedArray:
    """Prunes a weight, and moves what stays, so that its output changes least.

    Args:
      w: ``(*stack, out, in)`` float.
      h: ``(in, in)`` or ``(*stack, in, in)``, sum or mean of x xᵀ over the inputs; any positive
        multiple gives the same result.
      sparsity: fraction to drop, 0 to 1; or ``n`` and ``m`` instead.
      n: weights kept of each m consecutive inputs.
      m: size of such a block.
      fmt: element format of the kept weights, ``Int`` or ``Float``; None keeps their dtype.
      damping: fraction of the mean diagonal of ``h`` added to its diagonal.
      block_size: columns over which a mask is chosen at a time (for ``sparsity``).
      clipping: "minmax", "mse" or "percentile", for ``fmt``.
      percentile: of the magnitudes in a group, in percent, for ``clipping="percentile"``.
      mask: bool like ``w``, False where a weight was dropped before.

    Returns:
      A compressed array of the shape and dtype of ``w``.

    Raises:
      JaxcompError: an option is out of its range, shapes do not fit, or values are not finite.

    Example:
      >>> w = jnp.array([[0.25, -0.75, 0.5, 0.125]])
      >>> sparsegpt(w, jnp.eye(4), n=2, m=4).materialize().tolist()
      [[0.0, -0.75, 0.5, 0.0]]

    Source: https://arxiv.org/abs/2301.00774, algorithm 1.
    """
    options = dict(
        sparsity=sparsity,
        n=n,
        m=m,
        fmt=fmt,
        damping=damping,
        block_size=block_size,
        clipping=clipping,
        percentile=percentile,
    )
    parts, _ = _solve(w, h, mask, "", options, report=False)
    return common.compressed(parts, w)


@run.register
def _(step: SparseGPT, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    names = ("sparsity", "n", "m", "damping", "block_size", "clipping", "percentile")
    options = {"fmt": step.format, **{name: getattr(step, name) for name in names}}
    results = []
    for layer in layers:
        common.check_statistics(layer, "hessian")
        h = layer.statistics.hessian
        parts, result = _solve(layer.weight, h, layer.mask, layer.path, options, report=True)
        weight = result.rounded.values.astype(layer.weight.dtype)
        layer = common.pruned(layer, result.mask, weight, parts, result.error)
        common.report_damping(layer, result.damping, step.damping)
        results.append(layer)
    return tuple(results)
