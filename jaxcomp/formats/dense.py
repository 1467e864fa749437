"""Dense, outlier-column and low-rank parts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.formats import base
from jaxcomp.formats.base import Part, part, static


@part
class Dense(Part):
    """The matrix itself, in any dtype.

    Attributes:
      values: ``(*stack, out, in)``.
    """

    values: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*stack, out, in)``."""
        return tuple(self.values.shape)

    def materialize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The dense matrix ``(*stack, out, in)`` in ``dtype``."""
        return jnp.asarray(self.values).astype(dtype)

    def scale_rows(self, c: jax.Array) -> "Dense":
        """Rows times ``c (*stack, out)``, rounded to the dtype of the values."""
        wide = base.compute_dtype(self.values, c)
        scaled = self.values.astype(wide) * c[..., :, None].astype(wide)
        return Dense(scaled.astype(self.values.dtype))


@part
class DenseColumns(Part):
    """A few columns (outlier features) kept dense, zero elsewhere.

    Attributes:
      values: ``(*stack, out, k)`` float.
      indices: ``(*stack, k)`` int32, distinct positions of the columns in the input axis. One that
        equals ``in_size`` is unused: stacked layers with fewer outliers are padded with it.
      in_size: length of the input axis.
    """

    values: jax.Array
    indices: jax.Array
    in_size: int = static(default=0)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*stack, out, in)``."""
        return (*self.values.shape[:-1], self.in_size)

    @base.jitted
    def materialize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The dense matrix ``(*stack, out, in)`` in ``dtype``."""
        *stack, out, k = self.values.shape

        def place(values, indices):
            dense = jnp.zeros((out, self.in_size), dtype)
            return dense.at[:, indices].set(values.astype(dtype), mode="drop")

        flat = jax.vmap(place)(
            jnp.reshape(self.values, (-1, out, k)) if stack else self.values[None],
            jnp.reshape(self.indices, (-1, k)) if stack else self.indices[None],
        )
        return flat.reshape(self.shape)

    def scale_rows(self, c: jax.Array) -> "DenseColumns":
        """Rows times ``c (*stack, out)``, rounded to the dtype of the values."""
        return self.replace(values=Dense(self.values).scale_rows(c).values)


@part
class LowRankPart(Part):
    """A product of two thin matrices, W = a @ b.

    Attributes:
      a: ``(*stack, out, rank)``.
      b: ``(*stack, rank, in)``.
    """

    a: jax.Array
    b: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*stack, out, in)``."""
        return (*self.a.shape[:-1], self.b.shape[-1])

    @property
    def rank(self) -> int:
        """Inner size."""
        return self.a.shape[-1]

    @base.jitted
    def materialize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The dense matrix ``(*stack, out, in)`` in ``dtype``."""
        wide = base.compute_dtype(self.a, self.b)
        product = jnp.matmul(
            self.a.astype(wide), self.b.astype(wide), precision=jax.lax.Precision.HIGHEST
        )
        return product.astype(dtype)

    def scale_rows(self, c: jax.Array) -> "LowRankPart":
        """Rows times ``c (*stack, out)``: ``a`` is multiplied, rounded to its dtype."""
        return self.replace(a=Dense(self.a).scale_rows(c).values)


@functools.partial(jax.jit, static_argnums=1)
def _truncated_svd(w, rank):
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    return u[..., :, :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]


def low_rank(w: jax.Array, rank: int, dtype: Any = None) -> LowRankPart:
    """The best approximation of ``w`` of the given rank, by its singular value decomposition.

    Args:
      w: ``(*stack, out, in)``.
      rank: inner size, at most min(out, in).
      dtype: of the factors; None is that of ``w``.

    Returns:
      a = U sqrt(S), b = sqrt(S) Vᵀ, cut to ``rank``.
    """
    a, b = _truncated_svd(jnp.asarray(w).astype(base.compute_dtype(w)), rank)
    dtype = dtype or w.dtype
    return LowRankPart(a.astype(dtype), b.astype(dtype))
