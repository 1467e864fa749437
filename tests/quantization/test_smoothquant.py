"""SmoothQuant against the paper's identities."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.calibration import init, update
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import Int
from jaxcomp.quantization import (
    GPTQ,
    SmoothQuant,
    dequantize_input,
    quantize_input,
    rtn,
    smoothquant_scales,
)
from jaxcomp.step import Activation, Layer, run
from tests import references as ref
from tests.helpers import x64


def scales(x, w, alpha):
    with x64():
        return np.asarray(
            smoothquant_scales(jnp.asarray(np.abs(x).max(0)), jnp.asarray(np.abs(w).max(0)), alpha)
        )


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_function_is_unchanged(alpha):
    w, x, _ = ref.layer(0, kind="outliers")
    s = scales(x, w, alpha)
    np.testing.assert_allclose((x / s) @ (w * s).T, x @ w.T, rtol=1e-12, atol=1e-10)


def test_half_balances_the_maxima():
    w, x, _ = ref.layer(1, kind="outliers")
    s = scales(x, w, 0.5)
    a, b = np.abs(x / s).max(0), np.abs(w * s).max(0)
    np.testing.assert_allclose(a, b, rtol=1e-12)
    np.testing.assert_allclose(a, np.sqrt(np.abs(x).max(0) * np.abs(w).max(0)), rtol=1e-12)


def test_ends_of_alpha():
    w, x, _ = ref.layer(2)
    np.testing.assert_allclose(np.abs(x / scales(x, w, 1.0)).max(0), 1, rtol=1e-12)
    np.testing.assert_allclose(np.abs(w * scales(x, w, 0.0)).max(0), 1, rtol=1e-12)


def test_dead_channels_keep_their_scale():
    s = smoothquant_scales(jnp.array([0.0, 2.0, 1e-30]), jnp.array([3.0, 0.0, 1.0]), 0.5)
    assert s.tolist() == [1.0, 1.0, pytest.approx(1e-5)]


def test_w8a8_error_falls_at_alpha_half():
    """Statistical, 3 channels times 60, everything per tensor: measured .054 of the plain error."""
    rng = np.random.default_rng(0)
    for _ in range(3):
        x = rng.normal(size=(256, 64))
        x[:, :3] *= 60
        w = rng.normal(size=(48, 64))
        exact = x @ w.T

        def error(s, x=x, w=w, exact=exact):
            fmt = Int(8, full_range=False, out_group_size=None)
            what = np.asarray(rtn(jnp.float32(w * s), fmt).materialize(), np.float64)
            codes = quantize_input(jnp.float32(x / s), Activation(granularity="tensor"))
            y = np.asarray(dequantize_input(*codes), np.float64) @ what.T
            return ((y - exact) ** 2).sum()

        plain = error(np.ones(64))
        assert error(scales(x, w, 0.5)) < 0.2 * plain
        assert error(scales(x, w, 0.5)) < min(error(scales(x, w, a)) for a in (0.0, 1.0))


def group(seed=3):
    w, x, _ = ref.layer(seed, kind="outliers")
    stats = update(init(32, frozenset({"absmax", "hessian", "range"})), jnp.float32(x))
    layers = [Layer(p, jnp.float32(w * f), stats) for p, f in (("q", 1), ("k", 3), ("v", 0.5))]
    return tuple(layers), x


def test_group_shares_the_maximum_over_its_weights():
    layers, x = group()
    results = run(SmoothQuant(alpha=0.5), layers)
    w_absmax = np.max([np.abs(np.asarray(a.weight)).max(0) for a in layers], axis=0)
    expected = np.sqrt(np.abs(np.float32(x)).max(0) / w_absmax)
    for before, after in zip(layers, results, strict=True):
        np.testing.assert_allclose(1 / after.input_scale, expected, rtol=1e-5)
        np.testing.assert_allclose(
            after.weight * after.input_scale, before.weight, rtol=1e-5, atol=1e-7
        )
        np.testing.assert_allclose(
            after.statistics.absmax, before.statistics.absmax * after.input_scale, rtol=1e-6
        )


def test_then_gptq_with_quantized_inputs():
    layers, x = group()
    smooth = run(SmoothQuant(), layers)
    activation = Activation(granularity="tensor", dynamic=False)
    step = GPTQ(format=Int(8, full_range=False), activation=activation)
    assert step.needs() == {"hessian", "range"}
    results = run(step, smooth)
    plain = run(step, layers)[0]

    def output(layer, scale):
        part = layer.parts[0]
        codes = quantize_input(jnp.float32(x) * scale, activation, part.scale, part.zero_point)
        return np.asarray(dequantize_input(*codes)) @ np.asarray(part.materialize()).T

    for before, after in zip(smooth, results, strict=True):
        np.testing.assert_array_equal(before.input_scale, after.input_scale)
        part = after.parts[0]
        assert part.spec == activation and after.activation == activation
        largest = np.abs(np.float32(x) * np.asarray(after.input_scale)).max()
        assert float(part.scale) == pytest.approx(largest / 127, rel=1e-5)
    exact = x @ np.asarray(layers[0].weight, np.float64).T
    errors = [
        np.linalg.norm(output(layer, scale) - exact)
        for layer, scale in ((results[0], results[0].input_scale), (plain, 1.0))
    ]
    assert errors[0] < 0.5 * errors[1]


def test_twice_multiplies_the_scales():
    layers, _ = group()
    twice = run(SmoothQuant(alpha=0.8), run(SmoothQuant(alpha=0.3), layers))
    for before, after in zip(layers, twice, strict=True):
        np.testing.assert_allclose(
            after.weight * after.input_scale, before.weight, rtol=1e-5, atol=1e-7
        )


def test_groups_of_different_stacks_share_one_scale():
    """A router and the experts that read its input."""
    w, x, _ = ref.layer(4)
    stats = update(init(32, frozenset({"absmax"})), jnp.float32(x))
    router = Layer("router", jnp.float32(w[:4]), stats)
    experts = Layer("experts", jnp.float32(w).reshape(3, 8, 32), stats)
    a, b = run(SmoothQuant(), (router, experts))
    assert a.input_scale.shape == (32,) and b.input_scale.shape == (3, 32)
    np.testing.assert_array_equal(b.input_scale, np.broadcast_to(a.input_scale, (3, 32)))


def test_bad_input_is_refused():
    with pytest.raises(JaxcompError, match=r"alpha 1\.5"):
        smoothquant_scales(jnp.ones(3), jnp.ones(3), 1.5)
    with pytest.raises(JaxcompError, match="one maximum"):
        smoothquant_scales(jnp.ones(3), jnp.ones(4))
    with pytest.raises(JaxcompError, match=r"a/b: .*absmax"):
        run(SmoothQuant(), (Layer("a/b", jnp.ones((2, 3))),))
