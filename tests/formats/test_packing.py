"""Packing at true width against NumPy's bit streams and XLA's own int4."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.errors import JaxcompError
from jaxcomp.formats.packing import (
    WIDTHS,
    pack,
    packed_size,
    padding_of,
    unpack,
    unpack_signed,
    unpacked_size,
)
from tests.fuzz import fuzz


def bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Reference: the row as a little-endian stream of bits, cut into bytes."""
    rows = codes.reshape(-1, codes.shape[-1])
    stream = (rows[:, :, None] >> np.arange(bits)) & 1
    packed = np.packbits(stream.reshape(len(rows), -1).astype(np.uint8), axis=1, bitorder="little")
    return packed.reshape(*codes.shape[:-1], -1)


@pytest.mark.parametrize("bits", WIDTHS)
def test_bytes_are_the_little_endian_bit_stream(bits, rng):
    for size in (1, 7, 8, 13):
        codes = rng.integers(0, 2**bits, (2, 3, size))
        packed = pack(jnp.asarray(codes, jnp.int32), bits)
        assert packed.dtype == jnp.uint8
        np.testing.assert_array_equal(packed, bit_stream(codes, bits))
        on_host = pack(codes.astype(np.int32), bits)
        assert isinstance(on_host, np.ndarray) and on_host.dtype == np.uint8
        np.testing.assert_array_equal(on_host, packed)
        assert packed.shape[-1] == packed_size(size, bits) == -(-size * bits // 8)
        np.testing.assert_array_equal(unpack(packed, bits, size), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_signed_codes_round_trip(bits, rng):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = np.concatenate([rng.integers(low, high, 11), [low, high - 1]])
    out = unpack_signed(pack(jnp.asarray(codes, jnp.int32), bits), bits, codes.size)
    assert out.dtype == (jnp.int16 if bits == 16 else jnp.int8)
    np.testing.assert_array_equal(out, codes)


@fuzz(25)
@given(bits=st.sampled_from([2, 3, 4]), data=st.data())
def test_any_row_round_trips(bits, data):
    row = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=6))
    # A fixed length keeps the number of compilations down; the length itself is drawn too.
    codes = np.array(row)
    packed = np.asarray(pack(jnp.asarray(codes, jnp.int32), bits))
    np.testing.assert_array_equal(packed, bit_stream(codes, bits))
    np.testing.assert_array_equal(unpack(jnp.asarray(packed), bits, codes.size), codes)


def test_four_bits_are_the_bytes_of_int4(rng):
    """The packed bytes bitcast to ``jnp.int4``, low nibble first."""
    codes = rng.integers(-8, 8, (3, 10))
    packed = pack(jnp.asarray(codes, jnp.int8), 4)
    cast = jax.lax.bitcast_convert_type(packed, jnp.int4).reshape(3, 10)
    np.testing.assert_array_equal(cast.astype(jnp.int8), codes)


def test_three_bits_take_three_bytes_for_eight():
    assert [packed_size(n, 3) for n in (1, 2, 3, 8, 9, 16)] == [1, 1, 2, 3, 4, 6]
    # 0b...: 1 | 2<<3 | 3<<6 | 4<<9 | 5<<12 | 6<<15 | 7<<18 | 0<<21
    stream = sum(code << (3 * i) for i, code in enumerate([1, 2, 3, 4, 5, 6, 7, 0]))
    packed = pack(jnp.array([1, 2, 3, 4, 5, 6, 7, 0]), 3)
    assert packed.tolist() == [stream & 255, stream >> 8 & 255, stream >> 16]


@pytest.mark.parametrize("bits", WIDTHS)
def test_sizes_follow_from_bytes_and_padding(bits):
    for size in range(1, 40):
        assert unpacked_size(packed_size(size, bits), bits, padding_of(size, bits)) == size


def test_high_bits_of_a_code_are_dropped():
    np.testing.assert_array_equal(pack(jnp.array([0x1F, -1]), 4), [0xFF])


def test_jit_and_vmap(rng):
    codes = jnp.asarray(rng.integers(0, 8, (4, 5, 11)), jnp.int32)
    packed = pack(codes, 3)
    np.testing.assert_array_equal(jax.jit(pack, static_argnums=1)(codes, 3), packed)
    np.testing.assert_array_equal(jax.vmap(lambda c: pack(c, 3))(codes), packed)
    back = jax.vmap(jax.jit(lambda p: unpack(p, 3, 11)))(packed)
    np.testing.assert_array_equal(back, codes)


def test_other_widths_are_refused():
    with pytest.raises(JaxcompError, match="9 bits"):
        pack(jnp.zeros(4, jnp.int32), 9)
    with pytest.raises(JaxcompError, match="12 bits"):
        unpack(jnp.zeros(4, jnp.uint8), 12, 2)
