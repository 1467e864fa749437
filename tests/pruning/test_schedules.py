"""Schedules at their ends, against the papers' formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.errors import JaxcompError
from jaxcomp.pruning import schedules
from tests.helpers import x64


def test_cubic_is_the_papers_formula():
    schedule = schedules.cubic(0.9, end=110, begin=10, initial=0.2)
    with x64():
        got = np.asarray(schedule(jnp.arange(0, 130)), np.float64)
    t = np.clip(np.arange(0, 130), 10, 110)
    np.testing.assert_allclose(got, 0.9 + (0.2 - 0.9) * (1 - (t - 10) / 100) ** 3, rtol=1e-12)
    assert got[10] == got[0] == 0.2 and got[110] == got[-1] == 0.9
    assert (np.diff(got) >= 0).all()


def test_cubic_is_exact_at_its_ends_in_float32():
    schedule = schedules.cubic(0.7, end=7, begin=3, initial=0.1)
    assert float(schedule(3)) == np.float32(0.1) and float(schedule(7)) == np.float32(0.7)


def test_cubic_is_flat_at_its_end():
    with x64():
        schedule = schedules.cubic(0.9, end=100)
        slope = jax.grad(lambda t: schedule(t))
        assert float(slope(100.0 - 1e-9)) == pytest.approx(0, abs=1e-15)
        assert float(slope(50.0)) == pytest.approx(3 * 0.9 / 100 * 0.25, rel=1e-12)


def test_the_others():
    linear = schedules.polynomial(0.8, end=10, power=1)
    np.testing.assert_allclose(linear(jnp.arange(11)), 0.08 * np.arange(11), rtol=1e-6)
    shot = schedules.one_shot(0.5, begin=3)
    assert shot(jnp.arange(5)).tolist() == [0, 0, 0, 0.5, 0.5]
    assert schedules.constant(0.25)(7) == 0.25
    star = schedules.gmp_star(0.9, end=20, begin=5, first=0.5)
    cubic = schedules.cubic(0.9, end=20, begin=5, initial=0.5)
    assert star(jnp.arange(5)).tolist() == [0] * 5
    np.testing.assert_array_equal(star(jnp.arange(5, 25)), cubic(jnp.arange(5, 25)))
    cosine = np.asarray(schedules.cosine_fraction(0.3, end=100)(jnp.arange(120)))
    expected = [0.15 * (1 + math.cos(math.pi * t / 100)) for t in range(100)] + [0] * 20
    np.testing.assert_allclose(cosine, expected, atol=1e-7)
    assert (cosine[100:] == 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.cubic(0.5, end=10, begin=10), "step 10, not after its warm-up of 10"),
        (lambda: schedules.gmp_star(0.5, end=5, begin=10), "step 5, not after its warm-up of 10"),
        (lambda: schedules.gmp_star(0.4, end=5), "above the final"),
        (lambda: schedules.cubic(80, end=10), "write 50 % as 0.5"),
        (lambda: schedules.polynomial(0.5, end=10, power=0), "power 0"),
        (lambda: schedules.one_shot(0.5, begin=-1), "begin -1"),
        (lambda: schedules.cosine_fraction(0.3, end=0), "ends at step 0"),
        (lambda: schedules.cosine_fraction(1.3, end=10), "fraction 1.3"),
    ],
)
def test_impossible_schedules_are_refused(make, message):
    with pytest.raises(JaxcompError, match=message):
        make()
