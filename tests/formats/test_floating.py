"""fp8, fp4 and the microscaling formats against ml_dtypes and the definitions."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxcomp.formats import Float, grid, quantize
from jaxcomp.formats.floating import (
    ELEMENTS,
    decode_float,
    encode_float,
    exponent_of,
    power_of_two,
    round_to,
)
from tests.helpers import x64

REFERENCE = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
KINDS = tuple(REFERENCE)


def all_codes(kind):
    codes = np.arange(16 if kind == "e2m1" else 256, dtype=np.uint8)
    return codes, codes.view(REFERENCE[kind]).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_decodes_as_ml_dtypes_bitwise(kind):
    codes, values = all_codes(kind)
    decoded = np.asarray(decode_float(jnp.asarray(codes, jnp.int32), kind))
    assert np.array_equal(np.isnan(decoded), np.isnan(values))
    known = ~np.isnan(values)
    np.testing.assert_array_equal(decoded[known].view(np.uint32), values[known].view(np.uint32))


@pytest.mark.parametrize("kind", KINDS)
def test_every_finite_code_round_trips_bitwise(kind):
    codes, values = all_codes(kind)
    finite = np.isfinite(values)
    back = np.asarray(encode_float(jnp.asarray(values[finite]), kind))
    np.testing.assert_array_equal(back, codes[finite])


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_ml_dtypes_below_the_largest(kind, rng):
    """Nearest, ties to even, subnormals and signed zeros included, in float32 and float64."""
    _, values = all_codes(kind)
    levels = np.unique(values[np.isfinite(values)])
    middles = (levels[1:] + levels[:-1]) / 2
    largest = ELEMENTS[kind].largest
    random = rng.standard_normal(2000) * np.exp2(rng.uniform(-20, 17, 2000))
    x = np.concatenate([levels, middles, middles * (1 + 1e-6), middles * (1 - 1e-6), random])
    x = x[np.abs(x) <= largest].astype(np.float32)
    expected = x.astype(REFERENCE[kind]).view(np.uint8)
    np.testing.assert_array_equal(encode_float(jnp.asarray(x), kind), expected)
    np.testing.assert_array_equal(
        round_to(jnp.asarray(x), kind), x.astype(REFERENCE[kind]).astype(np.float32)
    )
    with x64():
        wide = x.astype(np.float64)
        np.testing.assert_array_equal(encode_float(jnp.asarray(wide), kind), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_saturates_is_monotone_and_keeps_nan(kind):
    largest = ELEMENTS[kind].largest
    assert largest == float(ml_dtypes.finfo(REFERENCE[kind]).max)
    x = jnp.array([largest * 1.01, 1e30, jnp.inf, -largest * 1.2, -jnp.inf])
    np.testing.assert_array_equal(round_to(x, kind), [largest] * 3 + [-largest] * 2)
    ramp = jnp.linspace(-1.1 * largest, 1.1 * largest, 4001)
    assert (np.diff(np.asarray(round_to(ramp, kind))) >= 0).all()
    assert np.isnan(round_to(jnp.array([jnp.nan]), kind)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_relative_error_of_normals(kind, rng):
    """At most half a unit in the last place: 2^-(mantissa bits + 1)."""
    e = ELEMENTS[kind]
    x = np.exp2(rng.uniform(e.smallest_exponent, np.log2(e.largest), 2000)).astype(np.float32)
    y = np.asarray(round_to(jnp.asarray(x), kind))
    assert (np.abs(y - x) <= x * 2.0 ** -(e.mantissa + 1)).all()


def test_exponents_are_exact():
    x = np.exp2(np.arange(-126, 128)).astype(np.float32)
    np.testing.assert_array_equal(exponent_of(jnp.asarray(x)), np.arange(-126, 128))
    below = np.nextafter(x[1:], np.float32(0))
    np.testing.assert_array_equal(exponent_of(jnp.asarray(below)), np.arange(-126, 127))
    np.testing.assert_array_equal(power_of_two(jnp.arange(-126, 128)), x)


@pytest.mark.parametrize("kind", KINDS)
def test_part_equals_scale_cast_and_back(kind, rng):
    """scale = absmax / largest, cast with ml_dtypes, times scale."""
    w = rng.standard_normal((2, 5, 32)).astype(np.float32)
    part = quantize(Float(kind, group_size=16), jnp.asarray(w))
    grouped = w.reshape(2, 5, 2, 16)
    scale = np.abs(grouped).max(-1, keepdims=True) / np.float32(ELEMENTS[kind].largest)
    stored = np.swapaxes(np.asarray(part.scale), -1, -2)[..., None]
    np.testing.assert_array_equal(stored, scale)
    ratio = np.clip(grouped / stored, -ELEMENTS[kind].largest, ELEMENTS[kind].largest)
    expected = ratio.astype(REFERENCE[kind]).astype(np.float32) * stored
    np.testing.assert_array_equal(part.materialize(), expected.reshape(w.shape))
    if kind != "e2m1":
        assert part.values.dtype == jnp.dtype(REFERENCE[kind])
    assert part.nbits == 2 * 5 * 32 * (4 if kind == "e2m1" else 8) + 2 * 5 * 2 * 32


@pytest.mark.parametrize("kind", ["mxfp8", "mxfp4"])
def test_microscaling_exponents(kind, rng):
    """Shared scale 2^(floor(log2 absmax) - largest element exponent), 8 bits of exponent."""
    w = (rng.standard_normal((3, 64)) * np.exp2(rng.integers(-9, 9, (3, 1)))).astype(np.float32)
    part = quantize(Float(kind), jnp.asarray(w))
    assert part.scale.dtype == jnp.uint8
    absmax = np.abs(w.reshape(3, 2, 32)).max(-1)
    largest_exponent = {"mxfp8": 8, "mxfp4": 2}[kind]
    exponent = np.floor(np.log2(absmax.astype(np.float64))).astype(int) - largest_exponent
    np.testing.assert_array_equal(part.scale, exponent.T + 127)
    e8m0 = np.asarray(part.scale).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(part.effective_scale(), e8m0)
    element = {"mxfp8": "e4m3", "mxfp4": "e2m1"}[kind]
    scaled = w.reshape(3, 2, 32) / np.exp2(exponent)[..., None]
    top = ELEMENTS[element].largest
    clipped = np.clip(scaled, -top, top).astype(np.float32)
    cast = clipped.astype(REFERENCE[element]).astype(np.float32)
    expected = cast * np.exp2(exponent)[..., None]
    np.testing.assert_array_equal(part.materialize(), expected.reshape(w.shape))
    bits = {"mxfp8": 8, "mxfp4": 4}[kind]
    assert part.nbits == 3 * 64 * bits + 3 * 2 * 8


def test_nvfp4_two_level_scales(rng):
    w = rng.standard_normal((2, 4, 32)).astype(np.float32)
    w[0, 1] *= 1e-3
    part = quantize(Float("nvfp4"), jnp.asarray(w))
    assert part.scale.dtype == jnp.float8_e4m3fn
    assert part.tensor_scale.shape == (2,)
    tensor = np.abs(w).max((1, 2)) / (448 * 6)
    np.testing.assert_allclose(part.tensor_scale, tensor, rtol=2e-7)
    block = (
        np.abs(w.reshape(2, 4, 2, 16)).max(-1) / 6 / np.asarray(part.tensor_scale)[:, None, None]
    )
    stored = np.maximum(block, 2.0**-9).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(
        np.swapaxes(np.asarray(part.scale), -1, -2).view(np.uint8), stored.view(np.uint8)
    )
    scale = stored.astype(np.float32) * np.asarray(part.tensor_scale)[:, None, None]
    ratio = np.clip(w.reshape(2, 4, 2, 16) / scale[..., None], -6, 6)
    expected = ratio.astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale[..., None]
    np.testing.assert_array_equal(part.materialize(), expected.reshape(w.shape))
    assert part.nbits == 2 * 4 * 32 * 4 + 2 * 4 * 2 * 8 + 2 * 32
    # The largest scale is the largest e4m3 value, so the tensor's maximum is representable.
    assert float(part.scale.astype(jnp.float32).max()) == 448


def test_mse_exponent_choice_never_hurts(rng):
    w = jnp.asarray(rng.standard_normal((16, 64)), jnp.float32)
    for kind in ("mxfp4", "mxfp8", "nvfp4", "e2m1"):
        fmt = Float(kind)
        cost = {}
        for clipping in ("minmax", "mse"):
            dense = quantize(fmt, w, clipping=clipping).materialize()
            cost[clipping] = float((np.abs(np.asarray(dense - w, np.float64)) ** 2.4).sum())
        assert cost["mse"] <= cost["minmax"] * (1 + 1e-6)
        if kind == "mxfp4":
            assert cost["mse"] < cost["minmax"]


def test_float_formats_on_one_column(rng):
    """A column is encoded as the matrix is."""
    w = jnp.asarray(rng.standard_normal((2, 6, 32)), jnp.float32)
    fmt = Float("nvfp4")
    context = grid.prepare(fmt, w)
    q = grid.expand(fmt, grid.fit(fmt, w, context), 6, 32)
    codes = grid.encode(fmt, w, q, context)
    column = jax.tree.map(lambda a: a[..., 7:8], q)
    np.testing.assert_array_equal(grid.encode(fmt, w[..., 7:8], column, context), codes[..., 7:8])
