"""Hard-concrete gates against Monte Carlo, published constants and the paper's closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.errors import JaxcompError
from jaxcomp.pruning import hard_concrete as hc
from tests.helpers import x64

SAMPLES = 400_000


def within_four_sigma(count, probability):
    sigma = math.sqrt(probability * (1 - probability) / SAMPLES)
    assert abs(count / SAMPLES - probability) < 4 * sigma


@pytest.mark.parametrize(
    ("beta", "log_alpha", "zero", "one"),
    [
        (2 / 3, -2.0, 0.59902, 0.02663),
        (2 / 3, 0.0, 0.16818, 0.16818),
        (2 / 3, 1.0, 0.06923, 0.35466),
        (0.5, 0.0, 0.23166, 0.23166),
    ],
)
def test_probabilities_are_the_published_ones_and_monte_carlos(key, beta, log_alpha, zero, one):
    p0, p1 = (float(f(jnp.float32(log_alpha), beta)) for f in (hc.prob_zero, hc.prob_one))
    assert p0 == pytest.approx(zero, abs=6e-6) and p1 == pytest.approx(one, abs=6e-6)
    assert float(hc.prob_nonzero(jnp.float32(log_alpha), beta)) == pytest.approx(1 - p0, abs=1e-6)
    z = np.asarray(hc.sample(key, jnp.full(SAMPLES, log_alpha), beta))
    within_four_sigma((z == 0).sum(), zero)
    within_four_sigma((z == 1).sum(), one)
    assert z.min() >= 0 and z.max() <= 1


def test_mean_is_symmetric_and_the_interior_is_not_uniform(key):
    log_alpha = jnp.array([-1.5, 0.0, 1.5])[:, None] * jnp.ones(SAMPLES)
    z = np.asarray(hc.sample(key, log_alpha), np.float64)
    mean, error = z.mean(1), z.std(1) / math.sqrt(SAMPLES)
    assert abs(mean[1] - 0.5) < 4 * error[1]
    assert abs(mean[0] + mean[2] - 1) < 4 * math.hypot(error[0], error[2])
    half = np.asarray(hc.sample(key, jnp.zeros(SAMPLES), 0.5))
    inside = half[(half > 0) & (half < 1)]
    density = np.histogram(inside, 10, (0, 1))[0] / len(inside) * 10
    published = [1.44, 1.06, 0.90, 0.82, 0.78, 0.78, 0.82, 0.90, 1.06, 1.45]
    # 4 sigma of a decile of 2e5 samples, and the published rounding.
    np.testing.assert_allclose(density, published, atol=4 * math.sqrt(10 / len(inside)) * 1.2)


def test_gates_close_and_open_at_ln_11():
    with x64():
        edge = math.log(11)
        x = jnp.array([-edge - 1e-6, -edge + 1e-6, 0.0, edge - 1e-6, edge + 1e-6])
        z = np.asarray(hc.gate(x))
    assert z[0] == 0 and 0 < z[1] < 1e-6 and z[2] == pytest.approx(0.5, abs=1e-15)
    assert 1 - 1e-6 < z[3] < 1 and z[4] == 1


def test_gradient_of_the_penalty_is_p_times_one_minus_p():
    with x64():
        x = jnp.linspace(-6, 6, 25)
        p = np.asarray(hc.prob_nonzero(x))
        got = jax.grad(lambda x: hc.expected_l0(x))(x)
        np.testing.assert_allclose(got, p * (1 - p), rtol=1e-12)
        step = 1e-5
        slope = (hc.prob_one(x + step) - hc.prob_one(x - step)) / (2 * step)
        np.testing.assert_allclose(jax.vmap(jax.grad(hc.prob_one))(x), slope, rtol=1e-6, atol=1e-9)


def test_gradient_of_a_sample_is_finite_differences_inside_and_zero_at_the_ends(key):
    with x64():
        x = jnp.linspace(-4, 4, 200)
        z = np.asarray(hc.sample(key, x))
        got = np.asarray(jax.grad(lambda x: hc.sample(key, x).sum())(x))
        step = 1e-6
        slope = np.asarray(hc.sample(key, x + step) - hc.sample(key, x - step)) / (2 * step)
    inside = (z > 0) & (z < 1)
    assert inside.sum() > 50 and (~inside).sum() > 50
    np.testing.assert_allclose(got[inside], slope[inside], rtol=1e-5)
    assert (got[inside] > 0).all() and (got[~inside] == 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extremes_are_finite_in_value_and_gradient(key, dtype):
    x = jnp.array([-1e4, -200.0, 200.0, 1e4], dtype)
    for f in (hc.prob_zero, hc.prob_nonzero, hc.prob_one, hc.gate, lambda x: hc.sample(key, x)):
        value, gradient = f(x), jax.grad(lambda x, f=f: f(x).astype(jnp.float32).sum())(x)
        assert np.isfinite(np.asarray(value, np.float32)).all()
        assert np.isfinite(np.asarray(gradient, np.float32)).all()
    assert hc.sample(key, x).dtype == dtype and hc.prob_zero(x).dtype == jnp.float32
    assert hc.sample(key, x).tolist() == [0, 0, 1, 1]
    # Without cancellation the small tail keeps its relative accuracy.
    assert float(hc.prob_zero(jnp.float32(30.0))) == pytest.approx(
        1 / (1 + math.exp(30 - 2 / 3 * math.log(0.1 / 1.1))), rel=1e-5
    )


def test_expected_l0_weighs_units_and_adds_l2(rng):
    x = rng.normal(size=(2, 5))
    sizes, squares = rng.integers(1, 9, size=5), rng.uniform(size=5)
    with x64():
        p = np.asarray(hc.prob_nonzero(jnp.asarray(x)))
        got = float(hc.expected_l0(jnp.asarray(x), jnp.asarray(sizes)))
        both = float(hc.penalty(jnp.asarray(x), 0.3, sizes, 0.02, squares))
    assert got == pytest.approx((p * sizes).sum(), rel=1e-12)
    assert both == pytest.approx((p * (0.3 * sizes + 0.01 * squares)).sum(), rel=1e-12)


def test_rank_gate_has_the_expected_zeros_even_when_sigmoids_tie():
    x = jnp.array([[-3.0, 0.1, 2.0, -1.0, 5.0, 0.2], [90.0, 91.0, -90.0, -91.0, -92.0, 93.0]])
    z = np.asarray(hc.rank_gate(x))
    expected = np.asarray(hc.prob_zero(x), np.float64).sum(1)
    for row, count, logits in zip(z, expected, np.asarray(x), strict=True):
        zeros = round(count)
        assert set(np.flatnonzero(row == 0)) == set(np.argsort(logits)[:zeros])
        open_ = row != 0
        soft = 1 / (1 + np.exp(-logits[open_] / (2 / 3) * 0.8))
        np.testing.assert_allclose(row[open_], soft, rtol=1e-5)
    assert set(np.unique(hc.rank_gate(x, soft=False))) == {0.0, 1.0}


def test_init_and_clamp(key):
    x = np.asarray(hc.init(key, (10_000,), drop_rate=0.2))
    assert x.mean() == pytest.approx(math.log(4), abs=4 * 0.01 / 100)
    assert x.std() == pytest.approx(0.01, rel=0.05)
    assert hc.clamp(jnp.array([-9.0, 0.5, 9.0])).tolist() == pytest.approx(
        [math.log(0.01), 0.5, math.log(100)]
    )


def test_bad_constants_are_refused(key):
    with pytest.raises(JaxcompError, match="drop_rate 1"):
        hc.init(key, (2,), 1)
    for options in (dict(beta=0.0), dict(gamma=0.1), dict(zeta=0.9)):
        with pytest.raises(JaxcompError, match="beta > 0"):
            hc.sample(key, jnp.zeros(2), **options)
