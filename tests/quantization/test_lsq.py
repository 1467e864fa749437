"""Learned step sizes and clipping levels: values on the grid, gradients as the papers give them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.formats import Codebook, Float, Int
from jaxcomp.quantization import lsq, lsq_input, pact
from jaxcomp.quantization.lsq import initial_scales
from jaxcomp.step import Activation
from tests.helpers import x64

STATIC = {"granularity": "tensor", "dynamic": False}


def by_hand(w, scale, zero, low, high):
    """Values, inside, and the derivative of each value by the step size (LSQ, equation 3)."""
    u = w / scale + zero
    inside = (u >= low) & (u <= high)
    code = np.clip(np.round(w / scale) + zero, low, high)
    slope = code - zero - np.where(inside, w / scale, 0)
    return scale * (code - zero), inside, slope


@pytest.mark.parametrize(
    ("fmt", "low", "high"),
    [(Int(3, 8), -4, 3), (Int(3, 8, full_range=False), -3, 3), (Int(2, None), -2, 1)],
    ids=str,
)
def test_gradients_of_the_step_size_are_those_of_the_paper(fmt, low, high):
    with x64():
        w = jax.random.normal(jax.random.key(0), (2, 3, 16), jnp.float64)
        start = initial_scales(w, fmt, "lsq")
        size = 8 if fmt.group_size else 16
        groups = np.abs(np.asarray(w)).reshape(2, 3, -1, size).mean(-1)
        np.testing.assert_allclose(start["scale"], 2 * groups / np.sqrt(high), rtol=1e-12)
        weight = jax.random.normal(jax.random.key(1), w.shape, jnp.float64)
        loss = lambda w, p: (lsq(w, fmt, p) * weight).sum()  # noqa: E731
        dw, dp = jax.grad(loss, (0, 1))(w, start)
        scale = np.repeat(np.asarray(start["scale"]), size, -1)
        values, inside, slope = by_hand(np.asarray(w), scale, 0, low, high)
        np.testing.assert_allclose(lsq(w, fmt, start), values, rtol=1e-12)
        assert 0.01 < 1 - inside.mean() < 0.6
        np.testing.assert_allclose(dw, inside * np.asarray(weight), rtol=1e-12)
        expected = (slope * np.asarray(weight)).reshape(2, 3, -1, size).sum(-1)
        np.testing.assert_allclose(dp["scale"], expected / np.sqrt(size * high), rtol=1e-10)


def test_gradients_of_the_offset_are_those_of_lsq_plus():
    with x64():
        fmt = Int(3, None, symmetric=False)
        w = jax.random.normal(jax.random.key(0), (2, 16), jnp.float64) + 0.5
        start = initial_scales(w, fmt)
        learned = {"scale": start["scale"] * 0.6, "offset": start["offset"]}
        weight = jax.random.normal(jax.random.key(1), w.shape, jnp.float64)
        loss = lambda p: (lsq(w, fmt, p) * weight).sum()  # noqa: E731
        got = jax.grad(loss)(learned)
        scale, offset = (np.asarray(learned[k]) for k in ("scale", "offset"))
        zero = np.clip(np.round(-offset / scale), -4, 3)
        values, inside, slope = by_hand(np.asarray(w), scale, zero, -4, 3)
        np.testing.assert_allclose(lsq(w, fmt, learned), values, rtol=1e-12)
        assert 0.1 < 1 - inside.mean() < 0.9
        normal = np.sqrt(16 * 7)
        weight = np.asarray(weight)
        by_offset = (weight * ~inside).sum(-1, keepdims=True) / normal
        np.testing.assert_allclose(got["offset"], by_offset, rtol=1e-10)
        # Outside, S (code - Z) = S code + offset: the slope is the code, up to Z's rounding.
        slope = np.where(inside, slope, slope - offset / scale)
        by_scale = (slope * weight).sum(-1, keepdims=True) / normal
        np.testing.assert_allclose(got["scale"], by_scale, rtol=1e-10)


def test_the_gradient_in_the_clipped_region_is_the_finite_difference():
    with x64():
        w = jnp.array([[5.0, -9.0, 7.5, 30.0]])
        value = lambda s: lsq(w, Int(3), {"scale": s})  # noqa: E731
        scale = jnp.ones((1, 1))
        exact = jax.jvp(value, (scale,), (scale,))[1] * np.sqrt(4 * 3)
        difference = (value(scale + 1e-6) - value(scale - 1e-6)) / 2e-6
        np.testing.assert_allclose(exact, difference, rtol=1e-6)
        np.testing.assert_allclose(exact, [[3, -4, 3, 3]], rtol=1e-12)


@pytest.mark.parametrize("start", ["mse", "minmax"])
@pytest.mark.parametrize(
    "fmt",
    [
        Int(4, 16),
        Int(2, 32, symmetric=False),
        Int(4, 16, scale_dtype="bfloat16"),
        Int(8, None, out_group_size=None),
        Float("e4m3"),
        Float("e2m1", 16),
        Codebook("nf4", group_size=16),
        Codebook("levels", levels=(-1.0, 0.0, 1.0)),
    ],
    ids=str,
)
def test_every_format_starts_from_rounding_and_has_finite_gradients(fmt, start):
    w = jax.random.normal(jax.random.key(3), (4, 32))
    learned = initial_scales(w, fmt, start)
    value, back = jax.vjp(lambda p: lsq(w, fmt, p), learned)
    np.testing.assert_array_equal(value, jc.quantization.rtn(w, fmt, start).materialize())
    (gradient,) = back(jnp.ones_like(w))
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))
    assert float(jnp.abs(gradient["scale"]).max()) > 0


@pytest.mark.parametrize("fmt", [Int(2, 16), Int(3, None, symmetric=False)], ids=str)
def test_learning_the_step_size_lowers_the_error_of_a_range_that_covers_everything(fmt):
    w = jax.random.normal(jax.random.key(3), (4, 64))
    learned = initial_scales(w, fmt, "minmax")
    loss = jax.jit(jax.value_and_grad(lambda p: ((lsq(w, fmt, p) - w) ** 2).sum()))
    first, _ = loss(learned)
    for _ in range(60):
        last, gradient = loss(learned)
        learned = jax.tree.map(lambda p, g: p - 0.01 * g, learned, gradient)
    assert float(last) < 0.9 * float(first)


def test_a_step_size_that_crosses_zero_turns_nothing_around():
    w = jnp.array([[1.0, -2.0, 3.0]])
    plus, minus = (lsq(w, Int(4), {"scale": jnp.full((1, 1), s)}) for s in (0.5, -0.5))
    np.testing.assert_array_equal(plus, minus)


def test_formats_without_a_free_scale_are_errors():
    for fmt in (Float("mxfp4"), Float("nvfp4"), Codebook("kmeans", bits=2)):
        with pytest.raises(jc.JaxcompError, match="no free scale to learn"):
            initial_scales(jnp.ones((2, 32)), fmt)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_learned_input_range_has_the_gradient_of_lsq(symmetric):
    with x64():
        spec = Activation(format="int4", symmetric=symmetric, **STATIC)
        low, high = (-7, 7) if symmetric else (-8, 7)
        x = jax.random.normal(jax.random.key(0), (5, 8), jnp.float64) * 3 + 1
        learned = {"scale": jnp.asarray(0.4)} | ({} if symmetric else {"offset": jnp.asarray(-1.3)})
        weight = jax.random.normal(jax.random.key(1), x.shape, jnp.float64)
        loss = lambda x, p: (lsq_input(x, spec, p) * weight).sum()  # noqa: E731
        dx, dp = jax.grad(loss, (0, 1))(x, learned)
        zero = 0 if symmetric else round(1.3 / 0.4)
        offset = 0 if symmetric else -1.3
        # The zero point counts from the middle of the codes, as the offset does.
        values, inside, slope = by_hand(np.asarray(x), 0.4, zero, low, high)
        np.testing.assert_allclose(lsq_input(x, spec, learned), values, rtol=1e-12)
        np.testing.assert_allclose(dx, inside * np.asarray(weight), rtol=1e-12)
        slope = np.where(inside | symmetric, slope, slope - offset / 0.4)
        normal = np.sqrt(40 * (7 if symmetric else 15))
        np.testing.assert_allclose(dp["scale"], (slope * np.asarray(weight)).sum() / normal)


@pytest.mark.parametrize("symmetric", [True, False])
def test_pact_clips_and_its_level_gets_the_gradient_from_beyond(symmetric):
    with x64():
        spec = Activation(format="int4", symmetric=symmetric, **STATIC)
        x = jnp.array([-9.0, -2.0, 0.35, 2.9, 3.0, 8.0])
        alpha = jnp.asarray(3.0)
        levels = 7 if symmetric else 15
        low = -3.0 if symmetric else 0.0
        expected = np.round(np.clip(x, low, 3) * levels / 3) * 3 / levels
        np.testing.assert_allclose(pact(x, spec, alpha), expected, rtol=1e-12, atol=1e-12)
        by_level = jax.jacobian(lambda a: pact(x, spec, a))(alpha)
        assert by_level.tolist() == [-1 if symmetric else 0, 0, 0, 0, 1, 1]
        by_x = jax.grad(lambda x: pact(x, spec, alpha).sum())(x)
        assert by_x.tolist() == [0, 1 if symmetric else 0, 1, 1, 0, 0]
        # What finite differences see of the clipping itself.
        clip = lambda a: np.clip(np.asarray(x), -a if symmetric else 0, a)  # noqa: E731
        difference = (clip(3 + 1e-6) - clip(3 - 1e-6)) / 2e-6
        np.testing.assert_allclose(by_level, difference * (np.abs(x) != 3) + (np.asarray(x) == 3))
