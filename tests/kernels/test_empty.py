"""Products of nothing: right shapes, dtypes and gradients, as ``jnp.dot`` has them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxcomp.kernels import chips
from jaxcomp.kernels.quantized_matmul import grouped_quantized_matmul, prepare, quantized_matmul
from jaxcomp.kernels.sparse_matmul import (
    block_list,
    block_sparse_matmul,
    nm_matmul,
    nm_sparse,
    prepare_nm,
)

import jaxcomp as jc
from jaxcomp.formats import Codebook, Int
from jaxcomp.quantization import RTN
from jaxcomp.recipe import Recipe
from jaxcomp.step import Activation

# Rows, outputs and inputs.
SHAPES = [(0, 256, 512), (3, 0, 512), (3, 256, 0), (0, 0, 0)]


@pytest.fixture(params=["v5e"])
def chip(request, monkeypatch):
    """The chip that operations believe to run on."""
    monkeypatch.setattr(chips, "chip_of", lambda *arrays: chips.BY_NAME[request.param])
    return request.param


def check(function, x, leaf, bias, shape) -> None:
    """Of a function of rows, a leaf of the weight and a bias, with silu after the sum."""
    y, pullback = jax.vjp(function, x, leaf, bias)
    expected = jnp.broadcast_to(jax.nn.silu(bias.astype(jnp.float32)), shape)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    dx, dleaf, dbias = pullback(jnp.ones_like(y))
    for cotangent, primal in ((dx, x), (dleaf, leaf), (dbias, bias)):
        assert (cotangent.shape, cotangent.dtype) == (primal.shape, primal.dtype)
    assert not jnp.any(dx) and not jnp.any(dleaf)
    slope = jax.vmap(jax.vmap(jax.grad(jax.nn.silu)))(jnp.broadcast_to(bias, shape))
    np.testing.assert_allclose(dbias, slope.sum(0), rtol=1e-5)


@pytest.mark.parametrize("group_size, activation_dtype", [(128, None), (None, "float8_e4m3fn")])
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_quantized_matmul(m, n, k, group_size, activation_dtype, chip):
    codes, groups = jnp.zeros((n, k // 2), jnp.uint8), k // 128 if group_size else 1
    options = {"group_size": group_size, "activation_dtype": activation_dtype}

    def call(x, scales, bias):
        return quantized_matmul(x, codes, scales, bias=bias, activation="silu", **options)

    bias = jnp.linspace(-1, 1, n)
    check(call, jnp.ones((m, k)), jnp.ones((groups, n)), bias, (m, n))
    for prepared_for in ("v5e", "h100"):
        weight = prepare(codes, jnp.ones((groups, n)), group_size=group_size, chip=prepared_for)
        assert quantized_matmul(jnp.ones((2, m, k)), weight).shape == (2, m, n)


def test_a_stack_of_no_weights(chip):
    codes, scales = jnp.zeros((0, 256, 256), jnp.uint8), jnp.ones((0, 4, 256))
    y = quantized_matmul(jnp.ones((0, 3, 512)), codes, scales, group_size=128)
    assert y.shape == (0, 3, 256)


@pytest.mark.parametrize("m, n, k", SHAPES)
def test_grouped_quantized_matmul(m, n, k, chip):
    codes, sizes = jnp.zeros((2, n, k // 2), jnp.uint8), jnp.array([0, m])

    def call(x, scales, bias):
        bias = jnp.stack([bias + 1, bias])
        options = {"group_size": 128, "activation": "silu"}
        return grouped_quantized_matmul(x, sizes, codes, scales, bias=bias, **options)

    scales = jnp.ones((2, k // 128, n))
    check(call, jnp.ones((m, k)), scales, jnp.linspace(-1, 1, n), (m, n))


def test_no_experts(chip):
    def call(x, scales):
        codes, sizes = jnp.zeros((0, 256, 256), jnp.uint8), jnp.zeros(0, jnp.int32)
        return grouped_quantized_matmul(x, sizes, codes, scales, group_size=128)

    y, pullback = jax.vjp(call, jnp.ones((3, 512)), jnp.ones((0, 4, 256)))
    np.testing.assert_array_equal(y, np.zeros((3, 256)))
    dx, dscales = pullback(y)
    assert not jnp.any(dx) and dscales.shape == (0, 4, 256)


@pytest.mark.parametrize("m, n, k", SHAPES)
def test_sparse_matmuls(m, n, k, chip):
    two_of_four = nm_sparse(jnp.ones((n, k)), np.arange(k)[None].repeat(n, 0) % 2 == 0)
    none = jnp.zeros(0, jnp.int32)
    blocks = block_list(jnp.zeros((0, 128, 128)), none, none, (n, k))
    weights = (nm_matmul, two_of_four), (nm_matmul, prepare_nm(two_of_four, "v5e"))
    for product, weight in (*weights, (block_sparse_matmul, blocks)):

        def call(x, values, bias, product=product, weight=weight):
            return product(x, dataclasses.replace(weight, values=values), bias, "silu")

        check(call, jnp.ones((m, k)), weight.values, jnp.linspace(-1, 1, n), (m, n))


@pytest.mark.parametrize("chip", ["cpu", "v5e"], indirect=True)
@pytest.mark.parametrize("activation", [None, Activation()])
@pytest.mark.parametrize("fmt", [Int(4, 128), Int(8), Codebook("nf4", group_size=64)])
def test_dispatch_without_rows(fmt, activation, chip):
    """A weight of no outputs or inputs cannot be compressed, which is an error of its own."""

    def model(params, x):
        return jnp.tanh(x @ params["w"])

    recipe = Recipe(steps=(RTN(format=fmt, activation=activation),))
    batches = [(jnp.ones((2, 512)),)]
    params = jc.compress(model, {"w": jnp.ones((512, 256))}, recipe, batches, progress=False).params
    apply, x = jc.dispatch(model), jnp.ones((0, 512))
    for ready in (params, apply.prepare(params, x)):
        y, pullback = jax.vjp(functools.partial(apply, ready), x)
        assert y.shape == (0, 256) and pullback(y)[0].shape == (0, 512)
    assert len(apply.report(params, x)) == 1
