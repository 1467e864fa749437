"""Small floating-point values: fp8 and fp4 under float, power-of-two or two-level scales.

Element types: e4m3 ("fn": largest 448, no infinity), e5m2 (largest 57344), e2m1 (0, 0.5, 1, 1.5, 2,
3, 4, 6 and their negatives). Rounding is to nearest, ties to even, and saturates. Microscaling
formats fix the group: mxfp8 (e4m3) and mxfp4 (e2m1) share 2^e over 32 inputs, e = floor(log2
absmax) less the largest exponent of the element; nvfp4 (e2m1) has an e4m3 scale over 16 inputs
under one float32 a tensor.

Source: OCP Microscaling Formats (MX) v1.0; Micikevicius et al., FP8 formats for deep learning,
2022; NVIDIA, nvfp4 as in the Blackwell documentation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.formats import base, packing
from jaxcomp.formats.base import Part, part, static


class Element(NamedTuple):
    """One element type: its widths, the exponents of its normal values, its largest value."""

    bits: int
    mantissa: int
    smallest_exponent: int
    largest_exponent: int
    largest: float
    dtype: Any


ELEMENTS = {
    "e4m3": Element(8, 3, -6, 8, 448.0, jnp.float8_e4m3fn),
    "e5m2": Element(8, 2, -14, 15, 57344.0, jnp.float8_e5m2),
    "e2m1": Element(4, 1, 0, 2, 6.0, None),
}
ELEMENT_OF = {
    "e4m3": "e4m3",
    "e5m2": "e5m2",
    "e2m1": "e2m1",
    "mxfp8": "e4m3",
    "mxfp4": "e2m1",
    "nvfp4": "e2m1",
}
BLOCK = {"mxfp8": 32, "mxfp4": 32, "nvfp4": 16}


def exponent_of(x: jax.Array) -> jax.Array:
    """floor(log2 |x|) as int32, exactly; -127 (-1023 in float64) for zero and subnormals."""
    if x.dtype == jnp.float64:
        raw = jax.lax.bitcast_convert_type(x, jnp.int64)
        return (((raw >> 52) & 0x7FF) - 1023).astype(jnp.int32)
    raw = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return ((raw >> 23) & 0xFF) - 127


def power_of_two(exponent: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """2**exponent exactly, for int32 exponents -126 to 127."""
    if dtype == jnp.float64:
        return jax.lax.bitcast_convert_type((exponent.astype(jnp.int64) + 1023) << 52, jnp.float64)
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32).astype(dtype)


def round_to(x: jax.Array, element: str) -> jax.Array:
    """Nearest representable value, ties to even, saturating; NaN stays NaN.

    Args:
      x: any shape, float32 or float64.
      element: "e4m3", "e5m2" or "e2m1".

    Returns:
      The rounded values in the dtype of ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> round_to(jnp.array([0.2, 2.5, 5.0, -100.0]), "e2m1").tolist()
      [0.0, 2.0, 4.0, -6.0]
    """
    e = ELEMENTS[element]
    x = jnp.clip(x, -e.largest, e.largest)
    exponent = jnp.maximum(exponent_of(x), e.smallest_exponent) - e.mantissa
    # Dividing and multiplying by a power of two is exact, so this rounds once, where a cast of the
    # backend may go through float16 and round twice.
    step = power_of_two(exponent, x.dtype)
    return jnp.round(x / step) * step


def encode_float(x: jax.Array, element: str) -> jax.Array:
    """Bit patterns (int32) of the nearest representable values.

    Args:
      x: any shape, float32 or float64.
      element: "e4m3", "e5m2" or "e2m1".

    Returns:
      int32 of the shape of ``x``, 0..255 or 0..15, the sign in the highest bit.
    """
    y = round_to(x, element)
    if element == "e2m1":
        size = jnp.abs(y)
        code = jnp.where(size <= 2, 2 * size, jnp.where(size <= 4, size + 2, 7.0))
        return code.astype(jnp.int32) + 8 * jnp.signbit(x).astype(jnp.int32)
    raw = jax.lax.bitcast_convert_type(y.astype(ELEMENTS[element].dtype), jnp.uint8)
    return raw.astype(jnp.int32)


def decode_float(codes: jax.Array, element: str, dtype: Any = jnp.float32) -> jax.Array:
    """Values of bit patterns, the inverse of ``encode_float``."""
    if element == "e2m1":
        code = codes.astype(jnp.int32)
        size = (code & 7).astype(dtype)
        large = jnp.where(size < 7, size - 2, jnp.asarray(6, dtype))
        value = jnp.where(size <= 4, 0.5 * size, large)
        return jnp.where(code >= 8, -value, value)
    raw = jax.lax.bitcast_convert_type(codes.astype(jnp.uint8), ELEMENTS[element].dtype)
    return raw.astype(dtype)


def effective_scale(
    kind: str, scale: jax.Array, tensor_scale: jax.Array | None, dtype: Any = jnp.float32
) -> jax.Array:
    """What codes are multiplied by, ``(*stack, in_groups, out_groups)``, from what is stored."""
    if kind.startswith("mx"):
        return power_of_two(scale.astype(jnp.int32) - 127, dtype)
    if tensor_scale is not None:
        return scale.astype(dtype) * tensor_scale.astype(dtype)[..., None, None]
    return scale.astype(dtype)


@part
class FloatPart(Part):
    """fp8 or fp4 values with a scale a group, W = scale * value.

    Attributes:
      values: ``(*stack, out, in)`` float8_e4m3fn or float8_e5m2; for fp4 bit patterns packed two a
        byte, uint8 ``(*stack, out, ceil(in/2))``.
      scale: ``(*stack, in_groups, out_groups)``: float; for mxfp4 and mxfp8 the exponent plus 127
        as uint8 (e8m0); for nvfp4 float8_e4m3fn, multiplied by ``tensor_scale``.
      tensor_scale: ``(*stack,)`` float32 of nvfp4, else None.
      kind: as in the ``Float`` format.
      padding: codes by which the packed row is longer than the input axis.
    """

    values: jax.Array
    scale: jax.Array
    tensor_scale: jax.Array | None = None
    kind: str = static(default="e4m3")
    padding: int = static(default=0)

    @property
    def element(self) -> str:
        """Type of the values: "e4m3", "e5m2" or "e2m1"."""
        return ELEMENT_OF[self.kind]

    @property
    def in_size(self) -> int:
        """Length of the input axis."""
        return packing.unpacked_size(
            self.values.shape[-1], ELEMENTS[self.element].bits, self.padding
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*stack, out, in)``."""
        return (*self.values.shape[:-1], self.in_size)

    @property
    def group_size(self) -> int:
        """Consecutive inputs that share a scale."""
        return self.in_size // self.scale.shape[-2]

    @property
    def out_group_size(self) -> int:
        """Consecutive outputs that share a scale."""
        return self.values.shape[-2] // self.scale.shape[-1]

    def elements(self, dtype: Any = jnp.float32) -> jax.Array:
        """The values before scaling, ``(*stack, out, in)``, in ``dtype`` (bfloat16 or wider)."""
        if self.element == "e2m1":
            return decode_float(packing.unpack(self.values, 4, self.in_size), "e2m1", dtype)
        return self.values.astype(dtype)

    def effective_scale(self) -> jax.Array:
        """The multipliers ``(*stack, in_groups, out_groups)`` in float32 (float64 if stored so)."""
        wide = base.compute_dtype(self.scale, self.tensor_scale)
        return effective_scale(self.kind, self.scale, self.tensor_scale, wide)

    @base.jitted
    def materialize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The dense matrix ``(*stack, out, in)`` in ``dtype``."""
        scale = self.effective_scale()
        wide = base.expand_groups(scale, self.values.shape[-2], self.in_size)
        return (self.elements(scale.dtype) * wide).astype(dtype)

    def scale_rows(self, c: jax.Array) -> "FloatPart":
        """Rows times ``c (*stack, out)``, with float scales.

        The power-of-two and two-level scales of the microscaling kinds cannot hold an arbitrary
        factor: those become the plain element kind with float32 scales of the same groups.
        """
        if self.kind in BLOCK:
            scale = base.scale_group_rows(self.effective_scale(), c)
            return self.replace(scale=scale, tensor_scale=None, kind=self.element)
        return self.replace(scale=base.scale_group_rows(self.scale, c))


def float_part(
    codes: jax.Array, scale: jax.Array, tensor_scale: jax.Array | None = None, *, kind: str
) -> FloatPart:
    """Makes a ``FloatPart`` of bit patterns and stored scales.

    Args:
      codes: ``(*stack, out, in)`` bit patterns as ``encode_float`` gives them.
      scale: ``(*stack, in_groups, out_groups)`` effective multipliers, as a float type; those of
        the microscaling kinds must be representable in their scale type.
      tensor_scale: ``(*stack,)`` of nvfp4.
      kind: as in the ``Float`` format.

    Returns:
      The part.
    """
    element = ELEMENT_OF[kind]
    if kind.startswith("mx"):
        scale = (exponent_of(scale) + 127).astype(jnp.uint8)
    elif kind == "nvfp4":
        block = scale / tensor_scale.astype(scale.dtype)[..., None, None]
        scale = round_to(block, "e4m3").astype(jnp.float8_e4m3fn)
    padding = 0
    if element == "e2m1":
        padding = packing.padding_of(codes.shape[-1], 4)
        values = packing.pack(codes, 4)
    else:
        values = jax.lax.bitcast_convert_type(codes.astype(jnp.uint8), ELEMENTS[element].dtype)
    return FloatPart(values, scale, tensor_scale, kind=kind, padding=padding)
