"""Column-by-column solver of min tr(E H Eᵀ), E = W - What; GPTQ and SparseGPT run on it.

With H = X Xᵀ of the layer's inputs and U the upper Cholesky factor of its inverse, H⁻¹ = Uᵀ U,
columns are fixed from left to right and each error is pushed onto the columns that are still free
(optimal brain surgeon, with one order for all rows):

    q_k = Q(w_k),   e_k = (w_k - q_k) / U_kk,   w_j <- w_j - e_k U_kj   for j > k,

which leaves the free columns at their conditional optimum and gives sum_k ||e_k||² = tr(E H Eᵀ).

Numerics. U is found as R⁻¹ from H = R Rᵀ with R upper triangular (a Cholesky factorization of H
read backwards), which saves inverting H and factorizing the inverse. The loop looks left instead
of right: a column is brought up to date when its turn comes, w_k - Uᵀ_{<k,k} E, blockwise at every
level of a nest (matrix, lazy block, group, column), so that all but the innermost work is matrix
products and each weight is written once. This is the same sum in another order.

NumPy arrays are factorized by LAPACK, and their outermost loop is run by NumPy: then one small
compiled program, for a block of columns, serves matrices of every size.

Source: GPTQ, https://arxiv.org/abs/2210.17323; SparseGPT, https://arxiv.org/abs/2301.00774;
OBC, https://arxiv.org/abs/2208.11580.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.errors import JaxcompError
from jaxcomp.formats import grid
from jaxcomp.formats.spec import Int
from jaxcomp.quantization.factored import LAPACK, Factored, Overwritten, factored

_EXACT = jax.lax.Precision.HIGHEST


class Factor(NamedTuple):
    """Factor of an inverse Hessian.

    Attributes:
      upper: ``(in, in)`` upper triangular U with Uᵀ U = (H + damping I)⁻¹.
      dead: bool ``(in,)``, inputs that were always zero; H has the mean diagonal there.
      damping: what was added to the diagonal, as a fraction of its mean. More than asked for where
        the Hessian was not positive definite otherwise.
    """

    upper: jax.Array
    dead: jax.Array
    damping: jax.Array


class Solution(NamedTuple):
    """What ``solve`` found for one matrix.

    Attributes:
      values: ``(out, in)``, the quantized and pruned weight.
      codes: integers ``(out, in)``, or None without a format.
      qparams: scales and zero points of the groups, or None without a format.
      mask: bool ``(out, in)``, or None where nothing is pruned.
      errors: ``(out, in)``, the e_k.
    """

    values: jax.Array
    codes: jax.Array | None
    qparams: Any
    mask: jax.Array | None
    errors: jax.Array

    @property
    def loss(self) -> jax.Array:
        """``(out,)`` sum over columns of e_k², which is the row's (E (H + damping) Eᵀ)."""
        return (self.errors * self.errors).sum(-1)


def inverse_factor(h: jax.Array, damping) -> Factor:
    """Upper Cholesky factor of the inverse of a damped Hessian.

    The damping is raised tenfold, from at least the dtype's resolution, until the factorization
    exists. NumPy arrays are factorized by LAPACK, see ``factored``.

    Args:
      h: ``(in, in)`` symmetric, positive semidefinite up to rounding.
      damping: fraction of the mean diagonal (over inputs that are not dead) added to the diagonal.

    Returns:
      The factor; see ``Factor``.
    """
    if isinstance(h, np.ndarray):
        both = factored(np.array(h, order="C"), damping)
        return Factor(both.upper(), both.dead, both.damping)
    # Written with few operations: compiling them takes longer than running them.
    index = jnp.arange(h.shape[-1])
    on_diagonal = index[:, None] == index
    diagonal = jnp.sum(jnp.where(on_diagonal, h, 0), axis=-1)
    dead = diagonal <= 0
    mean = diagonal.sum() / jnp.maximum((~dead).sum(), 1)
    mean = jnp.where(mean > 0, mean, 1).astype(h.dtype)
    backwards = jnp.where(on_diagonal & dead, 1, h / mean)[::-1, ::-1]
    epsilon = jnp.finfo(h.dtype).eps

    def attempt(state):
        _, _, damping, tries, _ = state
        damped = jnp.where(on_diagonal, backwards + damping, backwards)
        lower = jax.lax.linalg.cholesky(damped, symmetrize_input=False)
        # A failed factorization is NaN throughout.
        pivot = jnp.min(jnp.where(on_diagonal, lower, 1))
        following = jnp.maximum(damping, 10 * epsilon) * 10
        return lower, damping, following, tries + 1, ~(pivot * pivot > epsilon)

    start = (backwards, jnp.zeros((), h.dtype), jnp.asarray(damping, h.dtype), 0, True)
    lower, used, _, _, _ = jax.lax.while_loop(lambda s: s[4] & (s[3] < 24), attempt, start)
    unit = jnp.where(on_diagonal, 1 / jnp.sqrt(mean), 0)
    inverse = jax.lax.linalg.triangular_solve(lower, unit, left_side=True, lower=True)
    return Factor(inverse[::-1, ::-1], dead, used)


def nest(in_size: int, block_size: int, marks: set[int], out: int = 0) -> tuple[int, ...]:
    """Sizes of the nested blocks in which the loop runs, each dividing the one before, down to 1.

    Args:
      in_size: columns.
      block_size: columns of a lazy block; adapted so that it nests with the marks.
      marks: sizes at whose starts something is decided: a group's scale, a block's mask.
      out: rows; with many of them blocks are split further, so that one stays in the cache.

    Returns:
      The sizes, the first of them all columns, filled up to whole blocks.

    Raises:
      JaxcompError: two marks do not divide one another.

    Example:
      >>> nest(512, 128, {32})
      (512, 128, 32, 1)
    """
    ordered = sorted(marks, reverse=True)
    for large, small in itertools.pairwise(ordered):
        if large % small:
            raise JaxcompError(
                f"columns are decided on {large} and {small} at a time (group_size, block_size or "
                f"the M of N:M), and {small} does not divide {large}; change one so that it does"
            )
    block = max(1, min(block_size, in_size))
    inner = [mark for mark in ordered if mark <= block]
    outer = [mark for mark in ordered if mark > block]
    unit = inner[0] if inner else 1
    if outer:
        whole = outer[-1] // unit
        block = unit * max(d for d in range(1, whole + 1) if whole % d == 0 and unit * d <= block)
    else:
        block = block // unit * unit
    sizes = sorted({*marks, block}, reverse=True)
    if sizes[-1] > 32 and sizes[-1] % 16 == 0 and sizes[-1] * out >= 2**18:
        sizes.append(16)
    if sizes[-1] != 1:
        sizes.append(1)
    if sizes[0] == in_size and in_size not in marks:
        return tuple(sizes)
    return (math.ceil(in_size / sizes[0]) * sizes[0], *sizes)


def solve(
    w: jax.Array,
    upper: jax.Array | Factored | Overwritten,
    *,
    fmt=None,
    context=None,
    qparams=None,
    column_group: jax.Array | None = None,
    mask: jax.Array | None = None,
    choose: Callable[..., jax.Array] | None = None,
    choose_size: int | None = None,
    block_size: int = 128,
    clipping: str = "minmax",
    percentile: float = 99.9,
) -> Solution:
    """Quantizes and prunes one matrix column by column, spreading each error over later columns.

    Args:
      w: ``(out, in)``; of NumPy the columns' outermost loop runs there, and it is converted to the
        dtype of a factor that LAPACK made.
      upper: ``(in, in)`` factor of the inverse Hessian, see ``inverse_factor``; for ``w`` of NumPy
        it may still be in a Hessian's memory.
      fmt: element format, or None to prune only.
      context: what ``grid.prepare`` gave for this matrix.
      qparams: scales of all groups, fixed before the loop. None fits each group to the weights as
        they stand when the loop gets to it.
      column_group: int ``(in,)``, the group of each column where ``qparams`` is given and columns
        are not in their natural order.
      mask: bool ``(out, in)``, weights that may be other than zero.
      choose: picks the weights to keep when the loop gets to the start of a block:
        ``choose(scores, start, allowed) -> bool (out, choose_size)``, where ``scores`` is the loss
        w²/U_kk² that each weight's removal would cost as the weights stand, ``start`` the first
        column, and ``allowed`` the part of ``mask`` or None. The last block may reach beyond the
        last column. For ``w`` of NumPy it gets NumPy arrays if its blocks are those of the
        outermost loop; within them it is compiled, for which it must be hashable.
      choose_size: columns of such a block.
      block_size: columns of a lazy block. The result does not depend on it.
      clipping: how groups are fitted inside the loop.
      percentile: for ``clipping="percentile"``.

    Returns:
      The solution; see ``Solution``.
    """
    out, in_size = w.shape
    group = grid.group_size_of(fmt, in_size) if fmt is not None else None
    if fmt is not None and qparams is None and (group == in_size or grid.fits_together(fmt)):
        qparams = grid.fit(fmt, w, context, clipping=clipping, percentile=percentile, mask=mask)
        column_group = None
    fits = fmt is not None and qparams is None
    marks = {group} if fits else set()
    if choose is not None:
        marks.add(choose_size)
    sizes = nest(in_size, block_size, marks, out)
    padded = sizes[0]
    if column_group is None and fmt is not None:
        column_group = np.arange(in_size) // group
    if isinstance(w, np.ndarray):
        options = dict(fmt=fmt, context=context, clipping=clipping, percentile=percentile)
        block = in_size if sizes[1:] in ((), (1,)) else sizes[1]
        chooses = None if choose is None else (choose, choose_size)
        return _solve_on_host(w, upper, qparams, column_group, mask, block, chooses, options)
    if column_group is not None:
        column_group = jnp.pad(column_group, (0, padded - in_size), mode="edge")

    spare = padded - in_size
    weights, fixed = w.T, None if mask is None else mask.T
    upper = upper.astype(w.dtype)
    if spare:
        weights = jnp.pad(weights, ((0, spare), (0, 0)))
        fixed = None if fixed is None else jnp.pad(fixed, ((0, spare), (0, 0)))
        upper = jnp.pad(upper, ((0, spare), (0, spare)))
        added = jnp.arange(padded) >= in_size
        upper = jnp.where(added & jnp.eye(padded, dtype=bool), 1.0, upper)

    found = _columns(
        weights,
        upper,
        fixed,
        qparams,
        column_group,
        sizes=sizes,
        group=group if fits else None,
        fmt=fmt,
        context=context,
        choose=choose,
        choose_size=choose_size,
        clipping=clipping,
        percentile=percentile,
    )
    fitted = qparams
    if fits:
        fitted = jax.tree.map(
            lambda a: jnp.moveaxis(a[: in_size // group, :, 0], 0, -1), found.qparams
        )
    chosen = fixed if found.mask is None else found.mask
    return Solution(
        values=found.values[:in_size].T,
        codes=None if found.codes is None else found.codes[:in_size].T,
        qparams=fitted,
        mask=None if chosen is None else chosen[:in_size].T,
        errors=found.errors[:in_size].T,
    )


def _columns(
    w,
    upper,
    mask,
    qparams,
    column_group,
    *,
    sizes,
    group,
    fmt,
    context,
    choose,
    choose_size,
    clipping,
    percentile,
) -> Solution:
    """The loop over the columns of a matrix, all arrays transposed: ``(in, out)``.

    Args:
      w: the weights, filled up to whole blocks.
      upper: the factor, likewise.
      mask: like ``w``, or None.
      qparams: scales ``(out, groups)`` that are fixed, or None.
      column_group: the group of each column; None where each column has its own scale.
      sizes: from ``nest``.
      group: columns whose scales are fitted together in the loop, or None.
      fmt: as in ``solve``, like all that follow.
      context: of the whole matrix.
      choose: picks weights to keep.
      choose_size: at a time.
      clipping: how groups are fitted.
      percentile: for "percentile".

    Returns:
      A solution of transposed arrays; its scales are those fitted here, ``(groups, out, 1)``.
    """
    out, fits = w.shape[1], group is not None

    def column(start, current, u, params, keep):
        value, codes = current[0], None
        if fmt is not None:
            if qparams is not None:
                index = start if column_group is None else column_group[start]
                params = jax.tree.map(
                    lambda a: jax.lax.dynamic_slice_in_dim(a, index, 1, axis=-1), qparams
                )
            expanded = grid.expand(fmt, params, out, 1)
            codes = grid.encode(fmt, value[:, None], expanded, context)
            value = grid.decode(fmt, codes, expanded, context)[:, 0].astype(current.dtype)
            codes = codes[:, 0].astype(jnp.int32)[None]
        if keep is not None:
            value = jnp.where(keep[0], value, 0.0)
        error = (current - value) / u[0, 0]
        return error, (value[None], codes, None, None)

    def descend(depth, start, base, u, params, keep):
        size, child = sizes[depth], sizes[depth + 1]
        decides = choose is not None and child == choose_size

        def step(errors, j):
            offset = j * child
            across = jax.lax.dynamic_slice_in_dim(u, offset, child, axis=1)
            current = jax.lax.dynamic_slice_in_dim(base, offset, child, axis=0)
            current = current - jnp.matmul(across.T, errors, precision=_EXACT)
            corner = jax.lax.dynamic_slice_in_dim(across, offset, child, axis=0)
            kept = keep
            if keep is not None:
                kept = jax.lax.dynamic_slice_in_dim(keep, offset, child, axis=0)
            if decides:
                scores = jnp.square(current / jnp.diagonal(corner)[:, None]).T
                kept = choose(scores, start + offset, None if kept is None else kept.T).T
            fitted = params
            if fits and child == group:
                known = None if kept is None else kept.T
                shown = current.T if known is None else jnp.where(known, current.T, 0.0)
                fitted = grid.fit(
                    fmt, shown, context, clipping=clipping, percentile=percentile, mask=known
                )
            go = column if child == 1 else lambda *a: descend(depth + 1, *a)
            error, (value, codes, group_params, chosen) = go(
                start + offset, current, corner, fitted, kept
            )
            errors = jax.lax.dynamic_update_slice_in_dim(errors, error, offset, axis=0)
            if fits and child == group:
                group_params = jax.tree.map(lambda a: a[None], fitted)
            if decides:
                chosen = kept
            return errors, (value, codes, group_params, chosen)

        start_errors = jnp.zeros((size, out), w.dtype)
        errors, results = jax.lax.scan(step, start_errors, jnp.arange(size // child))
        join = lambda a: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:])  # noqa: E731
        return errors, jax.tree.map(join, results)

    errors, (values, codes, fitted, chosen) = descend(0, 0, w, upper, None, mask)
    return Solution(values, codes, fitted, chosen, errors)


def _solve_on_host(w, upper, qparams, column_group, mask, size, chooses, options) -> Solution:
    """``solve`` with the outermost loop in NumPy, over blocks of ``size`` columns."""
    choose, choose_size = chooses or (None, None)
    here_chosen = choose_size == size
    if chooses is not None and not here_chosen:
        options |= {"choose": choose, "choose_size": choose_size}
    in_size = w.shape[1]
    spare = -in_size % size
    if spare:
        # Columns of zeros, on which no other depends, are found exactly and change nothing.
        added = ((0, 0), (0, spare))
        w, mask = np.pad(w, added), None if mask is None else np.pad(mask, added)
        column_group = None if qparams is None else np.pad(column_group, (0, spare), mode="edge")
    given = jax.tree.map(lambda a: np.asarray(a)[:, column_group], qparams)
    dtype = upper.dtype if isinstance(upper, LAPACK) else w.dtype
    w, mask = np.array(w.T, dtype, order="C"), None if mask is None else mask.T
    chosen = mask if chooses is None else np.empty(w.shape, bool)
    errors, codes, fitted = np.zeros_like(w), None, []
    for start in range(0, in_size, size):
        here = slice(start, start + size)
        moved, corner = _of_factor(upper, start, min(start + size, in_size), errors[:start])
        current = w[here]
        current[: len(moved)] -= moved
        corner = np.pad(corner, (0, size - len(corner))) + np.diag(np.arange(size) >= len(corner))
        keep = None if mask is None else mask[here]
        if here_chosen:
            scores = np.square(current / corner.diagonal()[:, None]).T
            keep = np.asarray(choose(scores, start, None if keep is None else keep.T)).T
        found = _solve_block(
            current,
            corner,
            jax.tree.map(lambda a, here=here: a[:, here], given),
            keep,
            **options,
        )
        if chooses is not None:
            chosen[here] = keep if here_chosen else found.mask
        errors[here] = found.errors
        w[here] = found.values  # Nobody reads these columns any more.
        if found.codes is not None:
            codes = np.empty(w.shape, _code_dtype(options["fmt"])) if codes is None else codes
            codes[here] = found.codes
        fitted.append(found.qparams)
    if qparams is None:
        # Without what was filled up; of scales there is one a group.
        join = lambda *a: np.concatenate(a)[: in_size * sum(map(len, a)) // len(w), :, 0].T  # noqa: E731
        qparams = jax.tree.map(join, *fitted)
    return Solution(
        values=w[:in_size].T,
        codes=None if codes is None else codes[:in_size].T,
        qparams=qparams,
        mask=None if chosen is None else chosen[:in_size].T,
        errors=errors[:in_size].T,
    )


def _code_dtype(fmt: Any) -> Any:
    """A dtype that holds a format's codes: those of all rows wait until they are packed."""
    if isinstance(fmt, Int):
        return np.int8 if fmt.bits <= 8 else np.int16
    return np.uint8


def _of_factor(
    upper: Any, start: int, stop: int, errors: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What errors before ``start`` move in the columns up to ``stop``, and the factor's corner."""
    if isinstance(upper, LAPACK):
        return upper.moves(errors, start, stop), upper.corner(start, stop)
    above, corner = upper[:start, start:stop], upper[start:stop, start:stop]
    return above.T.astype(errors.dtype) @ errors, corner.astype(errors.dtype)


_BLOCK_STATIC = ("fmt", "clipping", "percentile", "choose", "choose_size")


@functools.partial(jax.jit, static_argnames=_BLOCK_STATIC)
def _solve_block(w, upper, qparams, mask, fmt, choose=None, choose_size=None, **options):
    size = len(w)
    group = None if fmt is None or qparams is not None else grid.group_size_of(fmt, size)
    sizes = nest(size, size, {group, choose_size} - {None}, w.shape[1])
    return _columns(
        w,
        upper,
        mask,
        qparams,
        None,
        sizes=sizes,
        group=group,
        fmt=fmt,
        choose=choose,
        choose_size=choose_size,
        **options,
    )
