"""Wrappers that say what happens to the input before a part sees it; they nest freely."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.formats import base
from jaxcomp.formats.base import Part, part, static


@part
class InputScale(Part):
    """The inner part applied to ``x * scale``, so W = inner * scale along the input axis.

    Attributes:
      part: the inner part.
      scale: ``(*stack, in)`` float.
    """

    part: Any
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*stack, out, in)``."""
        return self.part.shape

    def materialize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The dense matrix ``(*stack, out, in)`` in ``dtype``."""
        wide = jnp.float64 if dtype == jnp.float64 else base.compute_dtype(self.scale)
        inner = self.part.materialize(wide)
        return (inner * self.scale.astype(wide)[..., None, :]).astype(dtype)

    def scale_rows(self, c: jax.Array) -> "InputScale":
        """Rows times ``c (*stack, out)``, in the inner part."""
        return self.replace(part=self.part.scale_rows(c))


@part
class InputQuant(Part):
    """The inner part applied to the quantized input; as a matrix it is the inner part.

    Attributes:
      part: the inner part.
      scale: ``(*stack,)`` static scale of the input, or None when it is computed at each call.
      zero_point: ``(*stack,)`` static zero point, or None.
      spec: ``jaxcomp.step.Activation``: how the input is quantized.
    """

    part: Any
    scale: jax.Array | None = None
    zero_point: jax.Array | None = None
    spec: Any = static(default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*stack, out, in)``."""
        return self.part.shape

    def materialize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The dense matrix ``(*stack, out, in)`` in ``dtype``, of the inner part."""
        return self.part.materialize(dtype)

    def scale_rows(self, c: jax.Array) -> "InputQuant":
        """Rows times ``c (*stack, out)``, in the inner part."""
        return self.replace(part=self.part.scale_rows(c))
