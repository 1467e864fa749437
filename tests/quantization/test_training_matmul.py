"""Matmuls on codes in training against their float64 arithmetic, and inside a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.formats import Float, Int
from jaxcomp.quantization import FakeQuant
from jaxcomp.quantization.training_matmul import training_matmul
from jaxcomp.step import Activation

X = jax.random.normal(jax.random.key(0), (12, 32))
W = jax.random.normal(jax.random.key(1), (8, 32))
G = jax.random.normal(jax.random.key(2), (12, 8))
INT8 = Int(8, full_range=False), Activation()
FP8 = Float("e4m3"), Activation(format="e4m3")


def rounded(a):
    """Rows on the int8 grid, in float64."""
    a = np.asarray(a, np.float64)
    scale = np.abs(a).max(-1, keepdims=True) / 127
    return np.round(a / scale) * scale


def test_forward_and_backward_are_products_of_the_rounded_matrices():
    y, back = jax.vjp(lambda x, w: training_matmul(x, w, *INT8), X, W)
    dx, dw = back(G)
    np.testing.assert_allclose(y, rounded(X) @ rounded(W).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, np.asarray(G, np.float64) @ rounded(W), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, np.asarray(G, np.float64).T @ rounded(X), rtol=1e-5, atol=1e-5)


def test_quantized_gradients_round_what_the_other_scale_multiplied():
    _, back = jax.vjp(lambda x, w: training_matmul(x, w, *INT8, True), X, W)
    dx, dw = back(G)
    g, x, w = (np.asarray(a, np.float64) for a in (G, X, W))
    s, t = (np.abs(a).max(-1) / 127 for a in (x, w))
    np.testing.assert_allclose(dx, rounded(g * t) @ np.round(w / t[:, None]), rtol=1e-4, atol=1e-4)
    by_output = rounded((g * s[:, None]).T)
    np.testing.assert_allclose(dw, by_output @ np.round(x / s[:, None]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("formats", [INT8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("quantize_gradients", [False, True])
def test_gradients_are_close_to_those_of_the_dense_product(formats, quantize_gradients):
    _, back = jax.vjp(lambda x, w: training_matmul(x, w, *formats, quantize_gradients), X, W)
    _, exact = jax.vjp(lambda x, w: x @ w.T, X, W)
    bound = 0.02 if formats is INT8 else (0.08 if quantize_gradients else 0.04)
    for got, want in zip(back(G), exact(G), strict=True):
        error = jnp.linalg.norm(got - want) / jnp.linalg.norm(want)
        assert 0 < float(error) < bound


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_in_a_model_it_computes_what_dispatch_does_on_the_converted_weights(kind):
    fmt, activation = INT8 if kind == "int8" else FP8
    params = {"up": 0.3 * jax.random.normal(jax.random.key(3), (2, 32, 4, 8))}

    def apply(params, x):
        def body(h, w):
            y = jnp.einsum("td,dhk->thk", h, w)  # two axes out, inside a scan
            return jnp.tanh(y.reshape(x.shape)), None

        return jax.lax.scan(body, x, params["up"])[0]

    recipe = jc.Recipe(steps=(FakeQuant(format=fmt, activation=activation, matmul=kind),))
    qat = jc.qat(apply, recipe)
    state = qat.init(params, X)
    out, _ = jax.jit(qat.apply)(params, state, X)
    np.testing.assert_allclose(
        out, jc.dispatch(apply)(qat.convert(params, state), X), rtol=1e-5, atol=1e-5
    )
    plain = jc.Recipe(steps=(FakeQuant(format=fmt, activation=activation),))
    simulated = jc.qat(apply, plain)
    loss = lambda qat, p: (qat.apply(p, state, X)[0] ** 2).sum()  # noqa: E731
    got, want = (jax.grad(lambda p, q=q: loss(q, p))(params)["up"] for q in (qat, simulated))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_formats_whose_codes_cannot_be_multiplied_are_errors():
    apply, params = (lambda p, x: x @ p["w"]), {"w": W.T}
    for step, message in [
        (FakeQuant(format=Int(4, 16), activation=Activation(), matmul="int8"), "one scale a row"),
        (FakeQuant(format=Int(8, full_range=False), matmul="int8"), "got .* and None"),
        (FakeQuant(format=FP8[0], activation=INT8[1], matmul="fp8"), "e4m3 or e5m2"),
    ]:
        with pytest.raises(jc.RecipeError, match=message):
            jc.qat(apply, jc.Recipe(steps=(step,))).init(params, X)
    fast = FakeQuant(format=INT8[0], activation=INT8[1], matmul="int8")
    with pytest.raises(jc.RecipeError, match="'enabled' needs"):
        jc.qat(apply, jc.Recipe(steps=(fast,)), enabled=lambda step: 1).init(params, X)
