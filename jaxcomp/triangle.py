"""One triangle of a sum of x xᵀ, in half of the memory of the matrix, on the host.

For a wide MLP the Hessian of its input is as large as all weights of a layer, so that what it takes
decides the peak of a whole run. LAPACK and BLAS read one triangle of a matrix, and of memory that
was only reserved the system gives the pages that are written to: so a matrix whose one triangle is
never written takes half, and everything works on it that works on a matrix.
"""

import numpy as np

from jaxcomp import host

# Rows that are computed at a time.
_ROWS = 256


class Triangle:
    """A symmetric matrix, without a second copy of what is off its diagonal.

    Invariants: ``matrix`` holds it with rows and columns reversed, on and above the diagonal; what
    is below is not to be read, nor written. So a Cholesky factorization in place reads the matrix
    backwards, see ``factored``.

    Attributes:
      matrix: ``(in, in)`` float32.

    Example:
      >>> h = Triangle(2)
      >>> h.add_gram(np.float32([[1, 2], [0, 1]]))
      >>> h.whole().tolist()
      [[1.0, 2.0], [2.0, 5.0]]
    """

    def __init__(self, size: int) -> None:
        """Zeros.

        Args:
          size: rows and columns.
        """
        self.matrix = host.reserved((size, size), np.float32)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the whole matrix."""
        return self.matrix.shape

    @property
    def dtype(self) -> np.dtype:
        """float32."""
        return self.matrix.dtype

    def add_gram(self, x: np.ndarray) -> None:
        """Adds Xᵀ X.

        Args:
          x: ``(tokens, in)``.
        """
        x, size = x.astype(self.dtype, copy=False), len(self.matrix)
        for start in range(0, size, _ROWS):
            stop = size - start
            product = x[:, max(0, stop - _ROWS) : stop].T @ x[:, :stop]
            self.matrix[start : start + _ROWS, start:] += product[::-1, ::-1]

    def diagonal(self) -> np.ndarray:
        """``(in,)``. It is finite only if all else is: no product is larger than both squares."""
        return self.matrix.diagonal()[::-1]

    def whole(self) -> np.ndarray:
        """``(in, in)``, both triangles, in memory of its own."""
        upper = np.triu(self.matrix)
        upper += np.triu(upper, 1).T
        return np.ascontiguousarray(upper[::-1, ::-1])
