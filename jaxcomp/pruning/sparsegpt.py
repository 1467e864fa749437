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

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import host
from jaxcomp.calibration import Unsummed
from jaxcomp.formats import grid
from jaxcomp.formats.compressed import CompressedArray
from jaxcomp.formats.spec import Element
from jaxcomp.pruning import masks
from jaxcomp.quantization import checks, common, obs
from jaxcomp.quantization.factored import LAPACK, factor_of, restore
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

    def by_matrix(self) -> bool:
        """Yes: the sparsity is each matrix's."""
        return True

    def overwrites_hessian(self) -> bool:
        """Yes."""
        return True


class _Rows(NamedTuple):
    """What the loop gives; every array has the rows (outputs) first."""

    values: jax.Array
    codes: jax.Array | None
    qparams: Any
    context: Any
    mask: jax.Array
    energy: Any


def _counts(sparsity, block_size, out, size):
    """Weights dropped of a whole block and of the last, shorter one; number of whole ones."""
    block = min(block_size, size)
    full = masks.dropped_count(sparsity, out * block)
    return full, masks.dropped_count(sparsity, out * (size % block)), size // block


def kept_count(sparsity: float, block_size: int, out: int, size: int) -> int:
    """Weights of a matrix that are left of ``(out, size)`` after pruning without a pattern."""
    full, last, blocks = _counts(sparsity, block_size, out, size)
    return out * size - blocks * full - last


@dataclasses.dataclass(frozen=True)
class _Pattern:
    """Chooses all but n of every m columns, of each row by itself."""

    n: int
    m: int

    def __call__(self, scores, start, permitted):
        scores = _of_permitted(scores, permitted)
        keep = masks.nm_mask(scores, self.n, self.m)
        return keep if permitted is None else keep & permitted


@dataclasses.dataclass(frozen=True)
class _Share:
    """Chooses a fraction of a block of columns, over all rows.

    Attributes:
      block: columns of a block.
      size: of the matrix.
      full: weights dropped of a whole block.
      last: and of a shorter one.
      drop: marks all but so many of the least scores.
    """

    block: int
    size: int
    full: int
    last: int
    drop: Callable[[Any, Any], Any]

    def __call__(self, scores, start, permitted):
        xp = np if isinstance(scores, np.ndarray) else jnp
        scores = _of_permitted(scores, permitted)
        scores = xp.where(start + xp.arange(self.block) < self.size, scores, xp.inf)
        count = xp.where(start + self.block <= self.size, self.full, self.last)
        keep = self.drop(scores, count.astype(xp.int32))
        return keep if permitted is None else keep & permitted


def _of_permitted(scores, permitted):
    xp = np if isinstance(scores, np.ndarray) else jnp
    return scores if permitted is None else xp.where(permitted, scores, xp.zeros_like(scores))


def _drop(scores, count):
    return masks.drop_smallest(scores, count, (-2, -1))


_drop_jit = jax.jit(_drop)


def _drop_over_processes(like: jax.Array) -> Callable[[Any, Any], Any]:
    """``_drop`` for the rows that a process has of a matrix that is split like another."""
    starts = host.own_rows(like)[1]

    def drop(scores, count):
        whole = host.from_own_rows(scores, starts, like)
        with jax.set_mesh(whole.sharding.mesh):
            keep = jax.jit(_drop, out_shardings=whole.sharding)(whole, count)
        return host.own_rows(keep)[0]

    return drop


_STATIC = ("sparsity", "nm", "fmt", "block_size", "clipping", "percentile", "report")


def _rows(w, allowed, h, upper, *, choose, fmt, block_size, clipping, percentile, report):
    """Prunes rows of a matrix; on the host, with LAPACK's factor for ``h`` and ``upper``."""
    on_host = isinstance(h, LAPACK)
    if on_host:  # The solver converts the weight.
        diagonal = h.diagonal
    else:
        w, h = w.astype(upper.dtype), h.astype(upper.dtype)
        diagonal = h.diagonal()
    original = w
    dead = (diagonal <= 0) & (diagonal > 0).any()
    if not on_host or dead.any():
        w = w * ~dead
    if allowed is not None:
        w = w * allowed
    context = None if fmt is None else grid.prepare(fmt, w)
    s = obs.solve(
        w,
        upper,
        fmt=fmt,
        context=context,
        mask=allowed,
        choose=choose,
        choose_size=choose.m if isinstance(choose, _Pattern) else choose.block,
        block_size=block_size,
        clipping=clipping,
        percentile=percentile,
    )
    energy = common.energies(original, s.values, h) if report else None
    return _Rows(s.values, s.codes, s.qparams, context, s.mask, energy)


def _choice(nm, sparsity, block_size, out, size, drop=_drop):
    """Which weights of a matrix of ``(out, size)`` go when the loop reaches a block."""
    if nm is not None:
        return _Pattern(*nm)
    full, last, _ = _counts(sparsity, block_size, out, size)
    return _Share(min(block_size, size), size, full, last, drop)


def _on_host(w, h, nm, fmt, block_size) -> bool:
    """Whether the loop over blocks of columns runs in NumPy, each process with its own rows."""
    if not common.splits_rows(w, h, fmt) and not common.spreads_rows(w, h, fmt):
        return False
    if nm is not None or fmt is None:
        return True
    # A block over whose rows the mask is chosen must not begin inside of a group.
    size = w.shape[-1]
    group = grid.group_size_of(fmt, size)
    return group == size or group <= min(block_size, size)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _sparsegpt(w, h, allowed, damping, *, sparsity, nm, **options):
    def one(w, h, allowed):
        factor = obs.inverse_factor(h.astype(common.working_dtype(w)), damping)
        choose = _choice(nm, sparsity, options["block_size"], *w.shape)
        return _rows(w, allowed, h, factor.upper, choose=choose, **options), factor

    return common.over_stack(one, w, (h, 2), (allowed, 2))


def _solve(w, h, allowed, path, options, report, known=None, owned=False):
    """Checks everything and runs the algorithm.

    Args:
      w: the weight.
      h: its Hessian.
      allowed: weights that were not dropped before, or None.
      path: its name.
      options: of ``sparsegpt``.
      report: also compute the error.
      known: the factor of this very ``h``, if there is one.
      owned: whether ``h``, of NumPy, may be written to: it has to be restored (``known``) after.

    Returns:
      Parts, the loop's result, the error (None without ``report``), and the factor (on the host
      LAPACK's).
    """
    options = dict(options)
    n, m, damping = options.pop("n"), options.pop("m"), options.pop("damping")
    nm = masks.check_target(options["sparsity"], n, m, w.shape[-1], path)
    fmt = options["fmt"]
    if fmt is not None:
        checks.check_format(fmt, w, np.broadcast_to(True, w.shape), nm, path)
    checks.check_choice("clipping", options["clipping"], checks.CLIPPINGS, path)
    checks.check_damping(damping, options["block_size"], path)
    checks.check_weight(w, path)
    if known is None:
        checks.check_hessian(h, w, path)
    options |= {"report": report}
    sparsity, block_size = options.pop("sparsity"), options["block_size"]
    if _on_host(w, h, nm, fmt, block_size):
        factor = known
        if factor is None:
            dtype = common.working_dtype(w)
            factor = common.by_itself(w, lambda: factor_of(h, dtype, damping, owned))
        drop = _drop_over_processes(w) if host.split_by_rows(w) else _drop_jit
        choose = _choice(nm, sparsity, block_size, *w.shape, drop)
        result = common.by_rows(
            lambda w, allowed: _rows(w, allowed, factor, factor, choose=choose, **options),
            w,
            allowed,
            rows=None if nm is None else common.slab_rows(w.shape[-1]),
        )
    else:
        h = h.whole() if isinstance(h, Unsummed) else h
        solve = functools.partial(_sparsegpt, damping=damping, sparsity=sparsity, nm=nm, **options)
        if common.spreads_stack(w, h):
            result, factor = common.by_stack(solve, w, (h, 2), (allowed, 2))
        else:
            result, factor = solve(w, h, allowed)
    kept = None
    if allowed is None and nm is None:
        # Known without looking, so that this also runs under jit.
        kept = kept_count(sparsity, block_size, *w.shape[-2:])
    if fmt is None:
        parts = common.sparse_parts(result.values, result.mask, nm, w.dtype, kept)
    else:
        rounded = common.Rounded(result.values, result.codes, result.qparams, result.context)
        parts = common.store(fmt, rounded, result.mask, nm, kept)
    error = common.error_of(result.energy) if report else None
    return parts, result, error, factor


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
    parts, *_ = _solve(w, h, mask, "", options, report=False)
    return common.compressed(parts, w)


@run.register
def _(step: SparseGPT, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    names = ("sparsity", "n", "m", "damping", "block_size", "clipping", "percentile")
    options = {"fmt": step.format, **{name: getattr(step, name) for name in names}}
    results = []
    hessian = factor = None
    try:
        for layer in layers:
            if layer.statistics is None or layer.statistics.hessian is not hessian:
                restore(factor, hessian)
                factor = None
                checks.check_statistics(layer, "hessian")
                hessian = layer.statistics.hessian
            parts, result, error, factor = _solve(
                layer.stored_weight, hessian, layer.mask, layer.path, options, True, factor, True
            )
            # One that is read from a file comes as float32, in which the loop computes.
            dtype = getattr(layer.held_weight, "dtype", result.values.dtype)
            weight = result.values.astype(dtype)
            layer = common.pruned(layer, result.mask, weight, parts, error)
            common.report_damping(layer, factor.damping, step.damping)
            results.append(layer)
            del result, weight  # Before the next one's are made.
    finally:
        restore(factor, hessian)
    return tuple(results)
