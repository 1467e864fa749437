"""Integers of 1 to 8 (and 16) bits packed into bytes at their true width.

A row of n codes of b bits is a little-endian stream of bits: code k takes the bits k*b .. k*b+b-1,
lowest first, and byte j holds the bits 8*j .. 8*j+7. So a byte holds two 4-bit codes (low nibble =
even k), four 2-bit codes or eight 1-bit codes, and eight 3-bit codes take three bytes. A row ends
at a byte, which makes ceil(n*b/8) bytes of it, and rows never share one. Signed codes are two's
complement in b bits: the bytes of a 4-bit row are those of a row-major ``jnp.int4`` array.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.errors import JaxcompError

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


def packed_size(size: int, bits: int) -> int:
    """Bytes of a row of ``size`` codes of ``bits`` bits."""
    return -(-size * bits // 8)


def padding_of(size: int, bits: int) -> int:
    """How many more codes than ``size`` would fit into the bytes of the row."""
    return packed_size(size, bits) * 8 // bits - size


def unpacked_size(num_bytes: int, bits: int, padding: int = 0) -> int:
    """Codes in a row of ``num_bytes`` bytes of which the last ``padding`` codes are unused."""
    return num_bytes * 8 // bits - padding


def _check(bits: int) -> None:
    if bits not in WIDTHS:
        raise JaxcompError(f"codes of {bits} bits cannot be packed; use one of {WIDTHS} bits.")


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Packs the last axis into bytes; only the low ``bits`` bits of each code are kept.

    Args:
      codes: ``(..., n)`` integers, signed ones as two's complement, of JAX or NumPy.
      bits: width of a code, 1 to 8 or 16.

    Returns:
      uint8 ``(..., ceil(n * bits / 8))`` of the same library.

    Raises:
      JaxcompError: for another width.

    Example:
      >>> import jax.numpy as jnp
      >>> [hex(b) for b in pack(jnp.array([1, 2, -1]), 4).tolist()]
      ['0x21', '0xf']
    """
    _check(bits)
    xp = np if isinstance(codes, np.ndarray) else jnp
    size = codes.shape[-1]
    if bits == 8:
        return codes.astype(xp.uint8)
    if bits == 16:
        wide = codes.astype(xp.uint16)
        pair = xp.stack([wide & 255, wide >> 8], axis=-1).astype(xp.uint8)
        return pair.reshape(*codes.shape[:-1], 2 * size)
    codes = codes.astype(xp.uint8) & ((1 << bits) - 1)
    per = 8 // bits if 8 % bits == 0 else 8
    pad = -size % per
    if pad:
        codes = xp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, pad)])
    groups = codes.reshape(*codes.shape[:-1], (size + pad) // per, per)
    columns = [groups[..., i] for i in range(per)]
    out = []
    for byte in range(per * bits // 8):
        value = xp.zeros(groups.shape[:-1], xp.uint8)
        for i, column in enumerate(columns):
            shift = i * bits - 8 * byte
            if -bits < shift < 8:
                value |= (column << shift) if shift >= 0 else (column >> -shift)
        out.append(value)
    packed = xp.stack(out, axis=-1).reshape(*codes.shape[:-1], -1)
    return packed[..., : packed_size(size, bits)]


def unpack(packed: jax.Array, bits: int, size: int) -> jax.Array:
    """Inverse of ``pack`` for unsigned codes.

    Args:
      packed: uint8 ``(..., ceil(size * bits / 8))``.
      bits: width of a code.
      size: number of codes n.

    Returns:
      uint8 (uint16 for 16 bits) ``(..., n)``.

    Raises:
      JaxcompError: for a width that cannot be packed.

    Example:
      >>> import jax.numpy as jnp
      >>> unpack(pack(jnp.array([5, 0, 7]), 3), 3, 3).tolist()
      [5, 0, 7]
    """
    _check(bits)
    lead = packed.shape[:-1]
    if bits == 8:
        return packed.astype(jnp.uint8)
    if bits == 16:
        pair = packed.reshape(*lead, size, 2).astype(jnp.uint16)
        return pair[..., 0] | (pair[..., 1] << 8)
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)
        shifts = jnp.expand_dims(shifts, range(packed.ndim))
        codes = (packed[..., None] >> shifts) & jnp.uint8(mask)
    else:
        pad = -packed.shape[-1] % bits
        if pad:
            packed = jnp.pad(packed, [(0, 0)] * len(lead) + [(0, pad)])
        groups = packed.reshape(*lead, packed.shape[-1] // bits, bits)
        values = []
        for i in range(8):
            byte, shift = divmod(i * bits, 8)
            value = groups[..., byte] >> shift
            if shift + bits > 8:
                value |= groups[..., byte + 1] << (8 - shift)
            values.append(value & mask)
        codes = jnp.stack(values, axis=-1)
    codes = codes.reshape(*lead, codes.shape[-2] * codes.shape[-1])
    return codes[..., :size]


def unpack_signed(packed: jax.Array, bits: int, size: int) -> jax.Array:
    """Inverse of ``pack`` for two's complement codes.

    Args:
      packed: uint8 ``(..., ceil(size * bits / 8))``.
      bits: width of a code.
      size: number of codes n.

    Returns:
      int8 (int16 for 16 bits) ``(..., n)``.

    Raises:
      JaxcompError: for a width that cannot be packed.
    """
    wide = jnp.int16 if bits == 16 else jnp.int8
    width = 16 if bits == 16 else 8
    codes = jax.lax.bitcast_convert_type(unpack(packed, bits, size), wide)
    return (codes << (width - bits)) >> (width - bits)
