"""A Hessian and the factor of its inverse in the memory of one matrix, or of half, on the host.

A symmetric matrix is its one triangle, and so is the factor U of the inverse, H⁻¹ = Uᵀ U: the
matrix keeps H right of its diagonal and takes U left of it. For a wide MLP a Hessian is as large
as all weights of a layer, so a second matrix is what decides the peak of a whole run.

Where the Hessian can be summed again, its triangle is all that there is, and U takes that
(``Overwritten``). What errors cost is found in U as well: with H + d I = (Uᵀ U)⁻¹,

    e H eᵀ = ||e U⁻¹||² - d ||e||².

U is R⁻¹ of the damped H = R Rᵀ (see ``obs``): with rows and columns reversed, R is a lower Cholesky
factor, which LAPACK makes and inverts in place, in the one triangle that it is shown.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy  # Its parts are imported when they are used: linalg takes long.

from jaxcomp.calibration import Unsummed
from jaxcomp.triangle import Triangle

# Rows and elements that are moved at a time, by way of a copy.
_ROWS = 256
_ELEMENTS = 2**18
# Times that the damping is raised.
_TRIES = 24


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
        _reverse(matrix.reshape(-1))
        self.damping = self._factorize(*_unit(diagonal, self.dead), damping)
        _reverse(matrix.reshape(-1))
        self._factor_diagonal = matrix.diagonal().copy()
        np.fill_diagonal(matrix, diagonal)

    def _factorize(self, mean: np.generic, unit: np.ndarray, damping: float) -> np.generic:
        """Puts the factor above the diagonal, in place of what is also below it."""
        matrix = self.matrix

        def damped(damping):
            for here, after, corner in _blocks(matrix):
                np.divide(matrix[after, here].T, mean, out=matrix[here, after])
                below = np.tril(corner, -1)
                corner[...] = below + below.T / mean
            np.fill_diagonal(matrix, unit[::-1] + damping)
            return matrix

        _, damping, found = _factorized(damped, matrix.dtype.type(damping))
        root = np.sqrt(mean) if found else np.nan
        for here, after, corner in _blocks(matrix):
            matrix[here, after] /= root
            corner[...] = np.where(np.tri(len(corner), k=-1), corner, corner / root)
        return damping

    @property
    def dtype(self) -> np.dtype:
        """In which is computed."""
        return self.matrix.dtype

    def moves(self, errors: np.ndarray, start: int, stop: int) -> np.ndarray:
        """What ``(start, n)`` errors of the columns before take from those up to ``stop``."""
        return self.matrix[start:stop, :start] @ errors

    def corner(self, start: int, stop: int) -> np.ndarray:
        """The factor's block on the diagonal from ``start`` to ``stop``."""
        block = np.tril(self.matrix[start:stop, start:stop], -1).T
        return block + np.diag(self._factor_diagonal[start:stop])

    def product(self, rows: np.ndarray) -> np.ndarray:
        """``rows @ H`` for ``(n, in)`` rows."""
        (multiply,) = scipy.linalg.get_blas_funcs(("symm",), (self.matrix, rows))
        return multiply(1.0, self.matrix.T, rows.T, lower=True).T

    def energies(self, rows: np.ndarray) -> np.ndarray:
        """``e H eᵀ`` of each of ``(n, in)`` rows."""
        return np.einsum("ni,ni->n", self.product(rows), rows)

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


class Overwritten:
    """The factor of the inverse of a Hessian in the memory of its one triangle.

    Attributes:
      matrix: ``(in, in)``, a triangle's: the factor's transpose, with rows and columns reversed.
      diagonal: as of ``Factored``, and what follows.
      dead: as there.
      damping: as there.
    """

    def __init__(self, read: Callable[[], Triangle], damping: float) -> None:
        """Factorizes.

        Args:
          read: sums the Hessian; called again for each more of damping that it takes.
          damping: fraction of the mean diagonal added to the diagonal.
        """
        matrix = read().matrix
        self.diagonal = diagonal = matrix.diagonal()[::-1].copy()
        self.dead = diagonal <= 0
        mean, unit = _unit(diagonal, self.dead)
        summed = [matrix]
        del matrix  # Two of them are never there.

        def damped(damping):
            matrix = summed.pop() if summed else read().matrix
            _divide(matrix, mean)
            np.fill_diagonal(matrix, unit[::-1] + damping)
            return matrix

        matrix, damping, found = _factorized(damped, mean.dtype.type(damping))
        root = np.sqrt(mean) if found else np.nan
        _divide(matrix, root)
        self.matrix, self.damping, self._added = matrix, damping, damping * mean

    @property
    def dtype(self) -> np.dtype:
        """In which is computed."""
        return self.matrix.dtype

    def corner(self, start: int, stop: int) -> np.ndarray:
        """The factor's block on the diagonal from ``start`` to ``stop``."""
        size = len(self.matrix)
        here = slice(size - stop, size - start)
        return np.triu(self.matrix[here, here])[::-1, ::-1].T

    def moves(self, errors: np.ndarray, start: int, stop: int) -> np.ndarray:
        """As of ``Factored``."""
        size = len(self.matrix)
        return (self.matrix[size - stop : size - start, size - start :] @ errors[::-1])[::-1]

    def energies(self, rows: np.ndarray) -> np.ndarray:
        """As of ``Factored``; the rows' dead inputs cost nothing."""
        rows = np.where(self.dead, 0, rows)
        (solve,) = scipy.linalg.get_blas_funcs(("trsm",), (self.matrix, rows))
        backwards = np.array(rows[:, ::-1], order="C")
        # From the left of LAPACK's columns, which are our rows.
        found = solve(1.0, self.matrix.T, backwards.T, lower=True, trans_a=True, overwrite_b=True)
        squares = [np.einsum("ni,ni->n", a, a, dtype=np.float64) for a in (found.T, rows)]
        return (squares[0] - self._added * squares[1]).astype(self.dtype)


# Factors that the column loop reads where LAPACK made them.
LAPACK = Factored | Overwritten


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


def factor_of(h: Any, dtype: Any, damping: float, owned: bool) -> LAPACK:
    """Factorizes the inverse of a damped Hessian in as little memory as can be.

    Args:
      h: ``(in, in)``, read-only maybe; or ``Unsummed``, which is summed where its factor will be.
      dtype: float32 or float64, in which to compute.
      damping: as of ``factored``.
      owned: whether ``h`` may be written to, until ``restore``; otherwise a copy is.

    Returns:
      The factor.
    """
    if isinstance(h, Unsummed):
        if dtype == np.float32:
            return Overwritten(h.read, damping)
        h, owned = h.whole(), True
    h = np.asarray(h)
    if not (owned and h.dtype == dtype and h.flags.writeable and h.flags.c_contiguous):
        h = np.array(h, dtype, order="C")
    return factored(h, damping)


def restore(both: Any, hessian: Any) -> None:
    """Puts a Hessian back in whose memory it was computed.

    Args:
      both: what ``factored`` gave for it or for a copy, or anything else.
      hessian: the Hessian.
    """
    if isinstance(both, Factored) and both.matrix is hessian:
        both.restore()


def _unit(diagonal: np.ndarray, dead: np.ndarray) -> tuple[np.generic, np.ndarray]:
    """The mean of a diagonal without the dead, and the diagonal as multiples of it."""
    mean = diagonal.dtype.type(diagonal.sum() / max(int((~dead).sum()), 1) or 1)
    return mean, np.where(dead, 1, diagonal / mean)


def _factorized(
    damped: Callable[[np.generic], np.ndarray], damping: np.generic
) -> tuple[np.ndarray, np.generic, bool]:
    """Factorizes with the least damping that it takes, and inverts the factor.

    Args:
      damped: gives the matrix with a damping on its diagonal: read on and above it, overwritten.
      damping: the least.

    Returns:
      The inverse's factor in the matrix, the damping, and whether any was enough.
    """
    following = damping
    for _ in range(_TRIES):
        damping, matrix = following, None  # Its memory is free while the next is made.
        matrix = damped(damping)
        factorize, invert = scipy.linalg.get_lapack_funcs(("potrf", "trtri"), (matrix,))
        # What is above a diagonal of rows is below that of LAPACK's columns.
        _, failed = factorize(matrix.T, lower=True, clean=False, overwrite_a=True)
        epsilon = np.finfo(matrix.dtype).eps
        if not failed and matrix.diagonal().min() ** 2 > epsilon:  # Not singular.
            invert(matrix.T, lower=True, overwrite_c=True)
            return matrix, damping, True
        following = np.maximum(damping, 10 * epsilon) * 10
    return matrix, damping, False


def _divide(matrix: np.ndarray, by: Any) -> None:
    """Divides what is on and above the diagonal."""
    for here, after, corner in _blocks(matrix):
        matrix[here, after] /= by
        corner[np.triu_indices(len(corner))] /= by


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
