"""Uniform affine integers: w = scale * (code - zero_point)."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.formats import base, packing
from jaxcomp.formats.base import Part, part, static


@part
class Affine(Part):
    """Integers of 2 to 8 (or 16) bits with a scale a group, W = scale * (code - zero_point).

    Codes are signed, -2^(b-1) .. 2^(b-1)-1, with or without a zero point; a code is the unsigned q
    of the literature less 2^(b-1), and so is the zero point.

    Attributes:
      values: codes as two's complement packed along the input axis (see ``packing``), uint8
        ``(*stack, out, ceil(in*bits/8))``; int8 ``(*stack, out, in)`` for 8 bits.
      scale: ``(*stack, in_groups, out_groups)`` float, N minor.
      zero_point: int8 (int16 for 16 bits), shaped as ``scale``; None for a symmetric grid.
      group_index: ``(*stack, in)`` unsigned, the group of each input where groups are not
        consecutive (activation order without static groups); None otherwise.
      bits: width of a code.
      padding: codes by which the packed row is longer than the input axis.
    """

    values: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    group_index: jax.Array | None = None
    bits: int = static(default=8)
    padding: int = static(default=0)

    @property
    def in_size(self) -> int:
        """Length of the input axis."""
        return packing.unpacked_size(self.values.shape[-1], self.bits, self.padding)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*stack, out, in)``."""
        return (*self.values.shape[:-1], self.in_size)

    @property
    def symmetric(self) -> bool:
        """Whether there is no zero point."""
        return self.zero_point is None

    @property
    def group_size(self) -> int | None:
        """Consecutive inputs that share a scale; None where ``group_index`` says which do."""
        return None if self.group_index is not None else self.in_size // self.scale.shape[-2]

    @property
    def out_group_size(self) -> int:
        """Consecutive outputs that share a scale."""
        return self.values.shape[-2] // self.scale.shape[-1]

    def codes(self) -> jax.Array:
        """Signed codes, int8 (int16 for 16 bits) ``(*stack, out, in)``, zero point not subtracted.

        For a symmetric grid W = scale * codes, so that int8 x int8 -> int32 matmuls can take them.
        """
        if self.bits == 8:
            return self.values
        return packing.unpack_signed(self.values, self.bits, self.in_size)

    def expanded(self, groups: jax.Array) -> jax.Array:
        """``scale`` or ``zero_point`` spread over the matrix, ``(*stack, out, in)``."""
        out = self.values.shape[-2]
        if self.group_index is not None:
            return base.gather_groups(groups, self.group_index, out)
        return base.expand_groups(groups, out, self.in_size)

    @base.jitted
    def materialize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The dense matrix ``(*stack, out, in)`` in ``dtype``."""
        wide = base.compute_dtype(self.scale)
        codes = self.codes().astype(wide)
        if self.zero_point is not None:
            codes = codes - self.expanded(self.zero_point).astype(wide)
        return (codes * self.expanded(self.scale).astype(wide)).astype(dtype)

    def scale_rows(self, c: jax.Array) -> "Affine":
        """Rows times ``c (*stack, out)``; exact up to the rounding of the scales in their dtype.

        Groups over several outputs become one a row.
        """
        scale = base.scale_group_rows(self.scale, c)
        zero_point = self.zero_point
        if zero_point is not None and zero_point.shape != scale.shape:
            zero_point = jnp.repeat(zero_point, self.out_group_size, axis=-1)
        return self.replace(scale=scale, zero_point=zero_point)


def affine(
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    group_index: jax.Array | None = None,
    *,
    bits: int,
    in_size: int | None = None,
) -> Affine:
    """Packs signed codes into an ``Affine`` part.

    Args:
      codes: ``(*stack, out, in)`` integers in -2^(bits-1) .. 2^(bits-1)-1, or what ``packed`` made
        of them.
      scale: ``(*stack, in_groups, out_groups)``.
      zero_point: signed as the codes, shaped as ``scale``, or None.
      group_index: ``(*stack, in)`` group of each input, or None for consecutive groups.
      bits: width of a code.
      in_size: length of the input axis, where the codes are packed already.

    Returns:
      The part.
    """
    values = packed(codes, bits) if in_size is None else codes
    if zero_point is not None:
        zero_point = zero_point.astype(jnp.int16 if bits == 16 else jnp.int8)
    if group_index is not None:
        group_index = group_index.astype(jnp.uint8 if scale.shape[-2] <= 256 else jnp.uint16)
    padding = packing.padding_of(codes.shape[-1] if in_size is None else in_size, bits)
    return Affine(values, scale, zero_point, group_index, bits=bits, padding=padding)


def packed(codes: jax.Array, bits: int) -> jax.Array:
    """Signed codes ``(.., in)`` as an ``Affine`` part stores them, each row by itself."""
    return codes.astype(jnp.int8) if bits == 8 else packing.pack(codes, bits)
