"""A Hessian and the factor of its inverse in one matrix, against NumPy."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import calibration
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import Int
from jaxcomp.pruning import SparseGPT
from jaxcomp.quantization import GPTQ, RTN, SmoothQuant, factored
from jaxcomp.quantization.factored import Factored
from jaxcomp.step import Deferred, Layer, run


def hessian(size, tokens=None):
    x = np.random.default_rng(size).standard_normal((tokens or 2 * size + 3, size))
    return np.triu(x.T @ x) + np.triu(x.T @ x, 1).T


@pytest.mark.parametrize(("size", "rows"), [(1, 4), (5, 2), (24, 8), (29, 8), (40, 256)])
def test_both_are_in_the_matrix_and_the_hessian_comes_back(monkeypatch, size, rows):
    monkeypatch.setattr(factored, "_ROWS", rows)
    monkeypatch.setattr(factored, "_ELEMENTS", 7)
    h = hessian(size)
    damped = h + 0.01 * h.diagonal().mean() * np.eye(size)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    matrix, half = h.copy(), size // 2
    both = factored.factored(matrix, 0.01)
    assert both.matrix is matrix and float(both.damping) == 0.01
    np.testing.assert_allclose(both.corner(0, size), upper, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(both.above(half, size), upper[:half, half:], rtol=1e-9, atol=1e-12)
    e = np.random.default_rng(1).standard_normal((3, size))
    np.testing.assert_allclose(both.product(e), e @ h, rtol=1e-12, atol=1e-12 * abs(h).sum())
    both.restore()
    np.testing.assert_array_equal(matrix, h)
    np.testing.assert_allclose(
        factored.factored(matrix, 0.01).upper(), upper, rtol=1e-9, atol=1e-12
    )


def test_a_matrix_that_no_damping_helps_gives_nan_and_comes_back():
    h = -np.eye(4) + 2 * np.diag([1.0, 0, 0, 0]) - 1e30 * (1 - np.eye(4))
    matrix = h.copy()
    both = factored.factored(matrix, 0.01)
    assert np.isnan(both.corner(0, 4)[np.triu_indices(4)]).all()
    both.restore()
    np.testing.assert_array_equal(matrix, h)


def statistics(x, needs):
    start = calibration.init(x.shape[-1], frozenset(needs))
    return calibration.update(start, x, in_place=True)


def test_statistics_are_summed_in_place_symmetric_to_the_bit(monkeypatch):
    monkeypatch.setattr(calibration, "_ROWS", 8)
    x = np.random.default_rng(0).standard_normal((2, 9, 21)).astype(np.float32)
    keep = np.arange(9) < np.array([[9], [4]])
    start = calibration.init(21, frozenset({"hessian"}), (2,))
    kept = start.hessian.copy()
    other = calibration.update(start, x, keep)
    np.testing.assert_array_equal(start.hessian, kept)
    state = calibration.update(start, x, keep, in_place=True)
    assert state.hessian is start.hessian
    np.testing.assert_array_equal(state.hessian, other.hessian)
    np.testing.assert_array_equal(state.hessian, state.hessian.swapaxes(-1, -2))
    wide = np.where(keep[..., None], x, 0).astype(np.float64)
    exact = wide.swapaxes(-1, -2) @ wide
    bound = 9 * np.finfo(np.float32).eps * (abs(wide).swapaxes(-1, -2) @ abs(wide))
    assert (abs(state.hessian - exact) <= bound).all()
    scale = np.linspace(0.5, 2, 21).astype(np.float32)
    scaled = state.scaled(jnp.asarray(scale)).hessian
    np.testing.assert_array_equal(scaled, state.hessian * (scale[:, None] * scale))


@pytest.mark.parametrize("step", [GPTQ(format=Int(4, 8)), SparseGPT(n=2, m=4)])
def test_steps_compute_in_the_hessians_memory_and_give_it_back(step):
    x = np.random.default_rng(0).standard_normal((90, 32)).astype(np.float32)
    given = statistics(x, {"hessian"})
    before = given.hessian.copy()
    weights = [np.random.default_rng(k).standard_normal((24, 32), np.float32) for k in (1, 2)]
    layers = tuple(Layer(str(k), jnp.asarray(w), given) for k, w in enumerate(weights))
    with mock.patch.object(Factored, "restore", autospec=True, side_effect=Factored.restore) as put:
        found = run(step, layers)
    assert put.call_count == 1
    np.testing.assert_array_equal(given.hessian, before)
    read_only = given._replace(hessian=jnp.asarray(before))
    expected = run(step, tuple(a.replace(statistics=read_only) for a in layers))
    for a, b, w in zip(found, expected, np.float64(weights), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a.parts, b.parts)
        e, h = w - np.float64(a.parts[0].materialize()), np.float64(before)
        error = np.sqrt(np.trace(e @ h @ e.T) / np.trace(w @ h @ w.T))
        assert a.metrics["error"] == pytest.approx(error, rel=1e-4)
    broken = layers[1].replace(weight=jnp.full((24, 32), jnp.nan))
    with pytest.raises(JaxcompError, match="NaN"):
        run(step, (layers[0], broken))
    np.testing.assert_array_equal(given.hessian, before)


@pytest.mark.parametrize("steps", [(SmoothQuant(), RTN(format=Int(8))), (GPTQ(format=Int(4, 8)),)])
def test_weights_of_a_group_are_read_one_at_a_time(steps):
    x = np.random.default_rng(0).standard_normal((90, 32)).astype(np.float32)
    given = statistics(x, {"hessian", "absmax"})
    weights = [np.random.default_rng(k).standard_normal((24, 32), np.float32) for k in range(5)]
    alive = most = 0

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= self.base is None

    def read(w):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        copy = Counted(w.shape, w.dtype)
        copy[...] = w
        return copy

    whole = tuple(Layer(str(k), jnp.asarray(w), given) for k, w in enumerate(weights))
    layers = tuple(a.replace(weight=Deferred(lambda w=w: read(w), w.shape)) for a, w in
                   zip(whole, weights, strict=True))  # fmt: skip
    for step in steps:
        layers, whole = run(step, layers), run(step, whole)
    assert 1 <= most <= 2
    for a, b in zip(layers, whole, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a.parts, b.parts)


def test_a_stored_weight_is_not_converted_as_a_whole():
    x = np.random.default_rng(0).standard_normal((90, 32)).astype(np.float32)
    given = statistics(x, {"hessian", "absmax"})
    stored = np.random.default_rng(1).standard_normal((300, 32)).astype(jnp.bfloat16)

    def read():
        raise AssertionError("read whole")

    lazy = Layer("w", Deferred(read, stored.shape, stored), given, original_dtype=stored.dtype)
    whole = lazy.replace(weight=jnp.asarray(stored, jnp.float32))
    chains = [(GPTQ(format=Int(4, 8), order=order),) for order in ("natural", "activation")]
    for steps in (*chains, (SparseGPT(n=2, m=4),), (SmoothQuant(), RTN(format=Int(8)))):
        found, expected = lazy, whole
        for step in steps:
            (found,), (expected,) = run(step, (found,)), run(step, (expected,))
        jax.tree.map(np.testing.assert_array_equal, found.parts, expected.parts)
        assert found.metrics == expected.metrics
