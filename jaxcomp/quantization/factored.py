"""A Hessian and the factor of its inverse in the memory of one matrix, on the host.

A symmetric matrix is its one triangle, and so is the factor U of the inverse, H⁻¹ = Uᵀ U: the
matrix keeps H right of its diagonal and takes U left of it. For a wide MLP a Hessian is as large
as all weights of a layer, so a second matrix is what decides the peak of a whole run.

U is R⁻¹ of the damped H = R Rᵀ (see ``obs``): with rows and columns reversed, R is a lower Cholesky
factor, which LAPACK makes and inverts in place, in the one triangle that it is shown.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.linalg

# Rows and elements that are moved at a time, by way of a copy.
_ROWS = 256
_ELEMENTS = 2**18


class Factored:
    """What ``factored`` makes of a Hessian.

    Invariants: above the diagonal of ``matrix`` is the Hessian, below it the transposed factor, on
    it the Hessian's; the factor's is kept by itself.

    Attributes:
      matrix: ``(in, in)``, not to be read by others until ``restore``.
      diagonal: ``(in,)`` of the Hessian.
      dead: bool ``(in,)``, inputs that were always zero; H has the mean diagonal there.
      damping: what was added to the diagonal, as a fraction of its mean. More than asked for where
        the Hessian was not positive definite otherwise.
    """

    def __init__(self, matrix: np.ndarray, damping: float) -> None:
        """Use ``factored``."""
        self.matrix = matrix
        self.diagonal = diagonal = matrix.diagonal().copy()
        self.dead = diagonal <= 0
        dtype = matrix.dtype
        mean = dtype.type(diagonal.sum() / max(int((~self.dead).sum()), 1) or 1)
        _reverse(matrix.reshape(-1))
        self.damping = self._factorize(mean, np.where(self.dead, 1, diagonal / mean), damping)
        _reverse(matrix.reshape(-1))
        self._factor_diagonal = matrix.diagonal().copy()
        np.fill_diagonal(matrix, diagonal)

    def _factorize(self, mean: np.generic, unit: np.ndarray, damping: float) -> np.generic:
        """Puts the factor above the diagonal, in place of what is also below it."""
        matrix = self.matrix
        epsilon = np.finfo(matrix.dtype).eps
        names = ("potrf", "trtri")
        factorize, invert = scipy.linalg.get_lapack_funcs(names, (matrix,))
        following = matrix.dtype.type(damping)
        for _ in range(24):
            damping = following
            for here, after, corner in _blocks(matrix):
                np.divide(matrix[after, here].T, mean, out=matrix[here, after])
                below = np.tril(corner, -1)
                corner[...] = below + below.T / mean
            np.fill_diagonal(matrix, unit[::-1] + damping)
            # What is above a diagonal of rows is below that of LAPACK's columns.
            _, failed = factorize(matrix.T, lower=True, clean=False, overwrite_a=True)
            if not failed and matrix.diagonal().min() ** 2 > epsilon:
                invert(matrix.T, lower=True, overwrite_c=True)
                root = np.sqrt(mean)
                break
            following = np.maximum(damping, 10 * epsilon) * 10
        else:
            root = np.nan
        for here, after, corner in _blocks(matrix):
            matrix[here, after] /= root
            corner[...] = np.where(np.tri(len(corner), k=-1), corner, corner / root)
        return damping

    def above(self, start: int, stop: int) -> np.ndarray:
        """Rows of the factor before ``start``, in its columns up to ``stop``."""
        return self.matrix[start:stop, :start].T

    def corner(self, start: int, stop: int) -> np.ndarray:
        """The factor's block on the diagonal from ``start`` to ``stop``."""
        block = np.tril(self.matrix[start:stop, start:stop], -1).T
        return block + np.diag(self._factor_diagonal[start:stop])

    def product(self, rows: np.ndarray) -> np.ndarray:
        """``rows @ H`` for ``(n, in)`` rows."""
        (multiply,) = scipy.linalg.get_blas_funcs(("symm",), (self.matrix, rows))
        return multiply(1.0, self.matrix.T, rows.T, lower=True).T

    def upper(self) -> np.ndarray:
        """The factor ``(in, in)`` by itself, which takes the place of the Hessian."""
        matrix = self.matrix
        for here, after, corner in _blocks(matrix):
            matrix[here, after] = 0
            corner[...] = np.tril(corner)
        np.fill_diagonal(matrix, self._factor_diagonal)
        return matrix.T

    def restore(self) -> None:
        """Puts the Hessian back, to the bit; the factor is lost."""
        for here, after, corner in _blocks(self.matrix):
            self.matrix[after, here] = self.matrix[here, after].T
            corner[...] = np.triu(corner) + np.triu(corner, 1).T


def factored(h: np.ndarray, damping: float) -> Factored:
    """Factorizes the inverse of a damped Hessian in the Hessian's own memory.

    The damping is raised tenfold, from at least the dtype's resolution, until the factorization
    exists.

    Args:
      h: ``(in, in)``, symmetric to the bit, contiguous and writeable, positive semidefinite up to
        rounding.
      damping: fraction of the mean diagonal (over inputs that are not dead) added to the diagonal.

    Returns:
      Both; see ``Factored``.

    Example:
      >>> h = np.array([[2.0, 1.0], [1.0, 2.0]])
      >>> both = factored(h, 0.0)
      >>> both.product(np.eye(2)).tolist()
      [[2.0, 1.0], [1.0, 2.0]]
      >>> u = both.upper()
      >>> (u.T @ u).round(6).tolist()
      [[0.666667, -0.333333], [-0.333333, 0.666667]]
    """
    return Factored(h, damping)


def in_memory_of(h: np.ndarray, dtype: Any, owned: bool) -> np.ndarray:
    """A matrix that ``factored`` may take: a Hessian's own memory if it can be, else a copy.

    Args:
      h: ``(in, in)``, read-only maybe.
      dtype: float32 or float64, in which to compute.
      owned: whether ``h`` may be written to, until ``restore``.

    Returns:
      ``(in, in)``, contiguous and writeable.
    """
    if owned and h.dtype == dtype and h.flags.writeable and h.flags.c_contiguous:
        return h
    return np.array(h, dtype, order="C")


def restore(both: Any, hessian: Any) -> None:
    """Puts a Hessian back in whose memory it was computed.

    Args:
      both: what ``factored`` gave for it or for a copy, or anything else.
      hessian: the Hessian.
    """
    if isinstance(both, Factored) and both.matrix is hessian:
        both.restore()


def _blocks(matrix: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Some rows, the columns right of their diagonal block, and that block."""
    for start in range(0, len(matrix), _ROWS):
        here = slice(start, start + _ROWS)
        yield here, slice(start + _ROWS, None), matrix[here, here]


def _reverse(flat: np.ndarray) -> None:
    """Reverses an array in place; of a matrix's elements this reverses rows and columns."""
    size = len(flat)
    for start in range(0, size // 2, _ELEMENTS):
        stop = min(start + _ELEMENTS, size // 2)
        front, back = flat[start:stop], flat[size - stop : size - start]
        saved = front.copy()
        front[...] = back[::-1]
        back[...] = saved[::-1]
