"""Quantized inputs and the integer matmul."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxcomp.calibration import init, update
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import Int
from jaxcomp.quantization import (
    dequantize_input,
    quantize_input,
    quantized_matmul,
    rtn,
    static_scales,
)
from jaxcomp.quantization.activation import rounded_input
from jaxcomp.step import Activation

TENSOR = dict(granularity="tensor")


@pytest.fixture
def x(rng):
    return rng.normal(size=(5, 16)).astype(np.float32) + 0.3


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("w_symmetric", [True, False])
@pytest.mark.parametrize("x_symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_integer_product_equals_the_simulated_one(
    x, rng, kind, granularity, x_symmetric, w_symmetric, groups
):
    """Q-C8, with and without each zero point, per row and per group."""
    w = jnp.asarray(rng.normal(size=(7, 16)) + 0.2, jnp.float32)
    fmt = Int(8, 16 // groups, symmetric=w_symmetric, full_range=False)
    part = rtn(w, fmt).parts[0]
    activation = Activation(format=kind, granularity=granularity, symmetric=x_symmetric)
    codes, scale, zero = quantize_input(jnp.asarray(x), activation)
    assert codes.dtype == jnp.int8 and (zero is None) == x_symmetric
    got = quantized_matmul(codes, scale, zero, part.codes(), part.scale, part.zero_point)
    simulated = np.asarray(dequantize_input(codes, scale, zero), np.float64)
    expected = simulated @ np.asarray(part.materialize(), np.float64).T
    np.testing.assert_allclose(got, expected, atol=1e-6 * np.abs(expected).max())


def test_leading_axes_and_blocks_of_outputs(x, rng):
    w = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)
    part = rtn(w, Int(8, 4, out_group_size=4, full_range=False)).parts[0]
    codes, scale, zero = quantize_input(jnp.asarray(x).reshape(1, 5, 16), Activation())
    got = quantized_matmul(codes, scale, zero, part.codes(), part.scale)
    expected = np.asarray(dequantize_input(codes, scale, zero)) @ np.asarray(part.materialize()).T
    assert got.shape == (1, 5, 8)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_sums_need_32_bits():
    """4096 products of 127 * 127 overflow 16 bits, and float32's integers too."""
    codes = jnp.full((1, 4097), 127, jnp.int8)
    one = jnp.ones((1, 1))
    got = quantized_matmul(codes, one, None, codes, one)
    assert float(got[0, 0]) == float(np.float32(4097 * 127 * 127))


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_float8_codes_are_ml_dtypes(x, kind):
    codes, scale, zero = quantize_input(jnp.asarray(x), Activation(format=kind))
    dtype, largest = {
        "e4m3": (ml_dtypes.float8_e4m3fn, 448),
        "e5m2": (ml_dtypes.float8_e5m2, 57344),
    }[kind]
    np.testing.assert_allclose(scale[:, 0], np.abs(x).max(1) / largest, rtol=1e-6)
    expected = (x / np.asarray(scale)).astype(dtype)
    np.testing.assert_array_equal(np.asarray(codes).astype(np.float32), expected.astype(np.float32))
    assert zero is None
    w, w_scale, _ = quantize_input(jnp.asarray(x), Activation(format=kind))
    got = quantized_matmul(codes, scale, None, w, w_scale.T)
    simulated = np.asarray(dequantize_input(codes, scale, None), np.float64)
    np.testing.assert_allclose(got, simulated @ simulated.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "symmetric"),
    [
        ("int8", True),
        ("int8", False),
        ("int4", True),
        ("int4", False),
        ("e4m3", True),
        ("e5m2", True),
    ],
)
def test_static_scales_equal_dynamic_ones_on_the_calibration_batch(x, kind, symmetric):
    """Q-C7"""
    options = dict(format=kind, symmetric=symmetric, **TENSOR)
    stats = update(init(16, frozenset({"range"})), jnp.asarray(x))
    scale, zero = static_scales(stats, Activation(dynamic=False, **options))
    dynamic, dynamic_scale, dynamic_zero = quantize_input(jnp.asarray(x), Activation(**options))
    frozen, _, _ = quantize_input(jnp.asarray(x), Activation(dynamic=False, **options), scale, zero)
    assert float(scale) == float(dynamic_scale[0, 0])
    assert zero is None if symmetric else int(zero) == int(dynamic_zero[0, 0])
    np.testing.assert_array_equal(
        np.asarray(frozen).astype(np.float32), np.asarray(dynamic).astype(np.float32)
    )


def test_static_scales_clip_what_lies_outside(x):
    activation = Activation(dynamic=False, **TENSOR)
    stats = update(init(16, frozenset({"range"})), jnp.asarray(x))
    scale, _ = static_scales(stats, activation)
    codes, _, _ = quantize_input(10 * jnp.asarray(x), activation, scale)
    assert int(codes.max()) == 127 and int(codes.min()) == -127


def test_stacked_statistics_have_a_scale_each(x):
    stack = np.stack([x, 3 * x])
    stats = update(init(16, frozenset({"range"}), (2,)), jnp.asarray(stack))
    scale, _ = static_scales(stats, Activation(dynamic=False, **TENSOR))
    np.testing.assert_allclose(scale, np.abs(stack).max((1, 2)) / 127, rtol=1e-6)


def test_token_scales_do_not_see_other_tokens(x):
    """Dynamic codes are invariant to a positive factor of each token (powers of two are exact)."""
    factor = 2.0 ** np.arange(5, dtype=np.float32)[:, None]
    a, _, _ = quantize_input(jnp.asarray(x), Activation())
    b, _, _ = quantize_input(jnp.asarray(x * factor), Activation())
    np.testing.assert_array_equal(a, b)


def test_zero_and_range_are_representable():
    x = jnp.array([[0.0, 0.0, 0.0], [2.0, 3.0, 10.0], [-4.0, -1.0, -0.5]])
    for symmetric in (True, False):
        codes, scale, zero = quantize_input(x, Activation(symmetric=symmetric))
        back = np.asarray(dequantize_input(codes, scale, zero))
        assert not back[0].any()
        assert np.abs(back - x).max() <= 0.5001 * float(scale.max())
    # One-sided data uses all levels of the asymmetric grid.
    assert codes[1].tolist()[-1] == 127 and codes[2].tolist()[0] == -128


def test_options_that_do_not_go_together():
    with pytest.raises(JaxcompError, match="no zero point"):
        quantize_input(jnp.ones((1, 2)), Activation(format="e4m3", symmetric=False))
    with pytest.raises(JaxcompError, match="do not fit"):
        quantized_matmul(
            jnp.ones((1, 3), jnp.int8),
            jnp.ones((1, 1)),
            None,
            jnp.ones((2, 4), jnp.int8),
            jnp.ones((1, 2)),
        )


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("form", ["int8", "int4", "e4m3", "e5m2"])
def test_rounding_without_codes_is_that_of_codes(form, granularity):
    """To the last bit, small numbers (float8's without a leading one) and zero points included."""
    spread = jnp.exp(4 * jax.random.normal(jax.random.key(1), (16, 128)))
    x = jax.random.normal(jax.random.key(0), (16, 128)) * spread
    for symmetric in (True, False) if form.startswith("int") else (True,):
        activation = Activation(format=form, granularity=granularity, symmetric=symmetric)
        expected = jax.jit(lambda x, a=activation: dequantize_input(*quantize_input(x, a)))(x)
        np.testing.assert_array_equal(
            jax.jit(lambda x, a=activation: rounded_input(x, a))(x), expected
        )
