"""Ternary and binary weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import jaxcomp as jc
from jaxcomp.errors import JaxcompError
from jaxcomp.pruning import magnitude
from jaxcomp.quantization.binary import Binary, binary, binary_codes, binary_values
from jaxcomp.quantization.ternary import Ternary, ternary, ternary_codes, ternary_values
from jaxcomp.step import Activation, Layer, run
from tests.conformance_algorithms import layers, make
from tests.helpers import x64

MILLION = (1, 1_000_000)


@pytest.fixture(scope="module")
def gaussian():
    return np.random.default_rng(0).standard_normal(MILLION)


def relative(w, values):
    return float(((np.asarray(values, np.float64) - w) ** 2).sum() / (w**2).sum())


def gaussian_error(threshold):
    """Relative error of the best scale above a threshold, on N(0, 1), by its moments."""
    kept, moment = 2 * norm.sf(threshold), 2 * norm.pdf(threshold)
    return 1 - moment**2 / kept


def test_errors_on_a_gaussian(gaussian):
    """TWN .1916, best threshold .1902, binary .3634: published, and by the normal's moments."""
    w = jnp.asarray(gaussian, jnp.float32)
    mean = np.sqrt(2 / np.pi)
    twn, optimal = (relative(gaussian, ternary_values(w, method=m)[0]) for m in ("twn", "optimal"))
    assert gaussian_error(0.7 * mean) == pytest.approx(0.1916, abs=1e-4)
    assert gaussian_error(0.7670 * mean) == pytest.approx(0.1902, abs=1e-4)
    assert twn == pytest.approx(gaussian_error(0.7 * mean), abs=1e-3)
    assert optimal == pytest.approx(gaussian_error(0.7670 * mean), abs=1e-3)
    assert optimal < twn <= 1.008 * optimal
    codes, _ = ternary_codes(w)
    assert len(np.unique(ternary_values(w)[0])) == 3
    assert float((codes == 0).mean()) == pytest.approx(0.424, abs=2e-3)
    assert relative(gaussian, binary_values(w)[0]) == pytest.approx(1 - 2 / np.pi, abs=1e-3)


def test_binary_error_number():
    assert 1 - 2 / np.pi == pytest.approx(0.3634, abs=1e-4)


def twn(g):
    """The paper on one group."""
    threshold = 0.7 * np.abs(g).mean()
    kept = np.abs(g) > threshold
    return np.abs(g[kept]).mean() * np.sign(g) * kept


def groups(w, group_size, out_group_size):
    rows, cols = out_group_size or w.shape[-2], group_size or w.shape[-1]
    for i, j in itertools.product(range(0, w.shape[-2], rows), range(0, w.shape[-1], cols)):
        for k in np.ndindex(w.shape[:-2]):
            yield (*k, slice(i, i + rows), slice(j, j + cols))


@pytest.mark.parametrize("group, rows", [(None, 1), (8, 1), (None, None), (4, 3)])
def test_equals_the_papers_on_every_group(group, rows, rng):
    w = rng.standard_normal((2, 6, 16)) * rng.uniform(0.1, 5, (2, 6, 1)) + 0.2
    with x64():
        values, scale = ternary_values(jnp.asarray(w), group, rows)
        stored = np.asarray(ternary(jnp.asarray(w), group, rows).materialize())
        signs, binary_scale = binary_codes(jnp.asarray(w), group, rows, center=True)
        plain = np.asarray(binary(jnp.asarray(w), group, rows).materialize())
    assert scale.shape == (2, 6 // (rows or 6), 16 // (group or 16))
    np.testing.assert_array_equal(stored, values)
    spread = np.repeat(np.repeat(binary_scale, rows or 6, 1), group or 16, 2)
    for at in groups(w, group, rows):
        np.testing.assert_allclose(values[at], twn(w[at]), rtol=1e-12)
        assert len(np.unique(values[at])) <= 3
        np.testing.assert_array_equal(signs[at], np.sign(w[at] - w[at].mean()))
        np.testing.assert_allclose(spread[at], np.abs(w[at]).mean(), rtol=1e-12)
        np.testing.assert_allclose(
            plain[at], np.where(w[at] < 0, -1, 1) * np.abs(w[at]).mean(), rtol=1e-12
        )


def objective(w, values, v=1.0):
    return float((v * (w - np.asarray(values)) ** 2).sum())


@pytest.mark.parametrize("weighted", [False, True])
def test_optimum_is_that_of_all_patterns(weighted, rng):
    """Against every assignment of {-1, 0, 1} with its least-squares scale, ties included."""
    for row in (rng.standard_normal(7), np.array([1.0, -1, 0.5, 0.5, -0.5, 0, 2])):
        v = rng.uniform(0.1, 3, 7) if weighted else np.ones(7)
        b = np.array(list(itertools.product((-1, 0, 1), repeat=7)))
        a = (v * b * row).sum(1) / np.maximum((v * b * b).sum(1), 1e-30)
        best = (v * (row - a[:, None] * b) ** 2).sum(1).min()
        with x64():
            values, _ = ternary_values(
                jnp.asarray(row[None]), method="optimal", importance=jnp.asarray(v)
            )
        assert objective(row, values[0], v) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("method", ["twn", "optimal", "lat"])
def test_scale_is_the_least_squares_optimum(method, rng):
    """d/da sum v (w - a b)² = 0, so sum v b (w - a b) = 0."""
    w, v = rng.standard_normal((5, 40)), rng.uniform(0.1, 2, (5, 40))
    with x64():
        codes, scale = ternary_codes(
            jnp.asarray(w),
            method=method,
            importance=None if method == "twn" else jnp.asarray(v),
        )
    b, a = np.asarray(codes, np.float64), np.asarray(scale)
    weight = np.ones_like(v) if method == "twn" else v
    np.testing.assert_allclose((weight * b * (w - a * b)).sum(1), 0, atol=1e-12)


def test_lat_never_increases_its_objective(rng):
    w, v = rng.standard_normal((20, 64)), rng.exponential(size=(20, 64)) ** 2
    with x64():
        given = {"importance": jnp.asarray(v)}
        start = ternary_values(jnp.asarray(w))[0]
        tries = [
            np.asarray(ternary_values(jnp.asarray(w), method="lat", iterations=n, **given)[0])
            for n in (0, 1, 2, 5, 30)
        ]
        best = ternary_values(jnp.asarray(w), method="optimal", **given)[0]
    errors = [(v * (w - t) ** 2).sum(1) for t in (np.asarray(start), *tries)]
    for before, after in itertools.pairwise(errors):
        assert (after <= before + 1e-12).all()
    assert errors[-1].sum() < 0.99 * errors[0].sum()
    assert ((v * (w - np.asarray(best)) ** 2).sum(1) <= errors[-1] + 1e-12).all()


def test_lat_without_importance_is_the_optimum(gaussian):
    with x64():
        w = jnp.asarray(gaussian)
        lat = ternary_values(w, method="lat", iterations=60)[0]
        optimal = ternary_values(w, method="optimal")[0]
    # The alternation stops at a stationary point; the objective is flat to 1e-9 there.
    assert relative(gaussian, lat) == pytest.approx(relative(gaussian, optimal), abs=1e-9)


def test_bits_and_difficult_rows():
    w, _ = make(stack=(2,))
    two, one = ternary(w, scale_dtype="bfloat16"), binary(w, 13)
    assert two.nbits == 2 * 6 * (4 * 8 + 16) + 2 * 3 * 32
    assert one.nbits == 2 * 6 * (2 * 8 + 32) + 2 * 2 * 32
    for dense in (np.asarray(two.materialize()), np.asarray(one.materialize())):
        assert not dense[:, 0].any()
        np.testing.assert_allclose(dense[:, 1], 0.7, rtol=4e-3)
    first = jax.tree.map(lambda a: a[0], one)
    np.testing.assert_array_equal(first.materialize(), binary(w[0]).materialize())
    with pytest.raises(JaxcompError, match=r"group_size 5 does not divide the input size 13"):
        ternary(w, 5)
    with pytest.raises(JaxcompError, match="'sharp' is none of 'twn'"):
        ternary(w, method="sharp")


@pytest.mark.parametrize("step", [Ternary(), Ternary(method="lat"), Binary(), Binary(center=True)])
def test_steps(step):
    w, x = make()
    (layer,) = run(step, layers(step, w, x))
    importance = (x * x).sum(0) if "sumsq" in step.needs() else None
    if isinstance(step, Ternary):
        expected = ternary(w, method=step.method, importance=importance)
    else:
        expected = binary(w, center=step.center)
    np.testing.assert_allclose(layer.parts[0].materialize(), expected.materialize(), rtol=1e-6)
    assert 0 < layer.metrics["error"] < 1
    with pytest.raises(JaxcompError, match=r"p: .*NaN"):
        run(step, layers(step, w.at[3, 3].set(jnp.nan), x))


def test_pruned_weights_stay_zero(rng):
    w = jnp.asarray(rng.standard_normal((6, 16)), jnp.float32)
    mask = magnitude(w, 0.5).materialize() != 0
    (layer,) = run(Ternary(), (Layer("p", w, mask=mask),))
    dense = np.asarray(layer.parts[0].materialize())
    assert not dense[~np.asarray(mask)].any()
    kept = np.abs(np.asarray(w))
    for row, m, size in zip(dense, np.asarray(mask), kept, strict=True):
        above = m & (size > 0.7 * size[m].mean())
        np.testing.assert_allclose(np.abs(row[above]), size[above].mean(), rtol=1e-6)
        assert not row[~above].any()
    with pytest.raises(JaxcompError, match=r"p .*use Ternary"):
        run(Binary(), (Layer("p", w, mask=mask),))


def test_values_are_safe_under_jit_grad_and_vmap(rng):
    w = jnp.asarray(rng.standard_normal((3, 4, 8)), jnp.float32)
    for function in (ternary_values, binary_values):
        whole, _ = jax.jit(function)(w)
        np.testing.assert_array_equal(jax.vmap(lambda a, f=function: f(a)[0])(w), whole)
        gradient = jax.grad(lambda a, f=function: f(a)[1].sum())(w)
        assert np.isfinite(np.asarray(gradient)).all()
        assert function(w.astype(jnp.bfloat16))[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_sees_what_is_stored(dtype, rng):
    w = jnp.asarray(rng.standard_normal((2, 4, 16)), dtype)
    for scale_dtype in ("float32", "bfloat16"):
        for values, store in ((ternary_values, ternary), (binary_values, binary)):
            stored = store(w, 8, scale_dtype=scale_dtype).materialize()
            np.testing.assert_array_equal(values(w, 8, scale_dtype=scale_dtype)[0], stored)


def test_through_dispatch_with_quantized_inputs(rng):
    w = jnp.asarray(rng.standard_normal((16, 8)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((4, 8)), jnp.float32)
    apply = lambda p, x: x @ p["w"].T  # noqa: E731
    for function in (ternary, binary):
        params = {"w": function(w, 4, activation=Activation())}
        got = jax.jit(jc.dispatch(apply))(params, x)
        dense = apply({"w": function(w, 4).materialize()}, x)
        np.testing.assert_allclose(got, dense, atol=0.02 * float(jnp.abs(dense).max()))
