"""A Hessian and the factor of its inverse in one matrix or a triangle, against NumPy."""

import resource
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import calibration, host, triangle
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import Int
from jaxcomp.pruning import SparseGPT
from jaxcomp.quantization import GPTQ, RTN, SmoothQuant, factored
from jaxcomp.quantization.factored import Factored, Overwritten, factor_of
from jaxcomp.step import Deferred, Layer, run
from jaxcomp.triangle import Triangle


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
    moved = both.moves(np.eye(half), half, size)
    np.testing.assert_allclose(moved, upper[:half, half:].T, rtol=1e-9, atol=1e-12)
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


def unsummed(x):
    def read():
        total = Triangle(x.shape[-1])
        total.add_gram(x)
        return total

    return calibration.Unsummed(read, (x.shape[-1],) * 2)


@pytest.mark.parametrize(("size", "rows"), [(1, 4), (5, 2), (29, 8), (40, 256)])
def test_a_triangle_is_a_matrix_and_then_its_factor(monkeypatch, size, rows):
    monkeypatch.setattr(factored, "_ROWS", rows)
    monkeypatch.setattr(triangle, "_ROWS", rows)
    x = np.random.default_rng(size).standard_normal((2 * size + 3, size)).astype(np.float32)
    x[:, 1:2] = 0  # A dead input.
    wide, later, epsilon = np.float64(x), unsummed(x), np.finfo(np.float32).eps
    h, whole = wide.T @ wide, later.whole()
    np.testing.assert_array_equal(whole, whole.T)
    assert (abs(whole - h) <= len(x) * epsilon * (abs(wide).T @ abs(wide))).all()
    np.testing.assert_array_equal(later.read().diagonal(), whole.diagonal())

    found = factor_of(later, np.float32, 0.01, owned=True)
    expected = factor_of(np.float64(whole), np.float64, 0.01, owned=True)
    assert isinstance(found, Overwritten)
    np.testing.assert_array_equal(found.dead, expected.dead)
    u = expected.corner(0, size)
    rounding = (size + 8) * epsilon * np.linalg.cond(u)
    np.testing.assert_allclose(found.corner(0, size), u, rtol=0, atol=rounding * abs(u).max())
    errors, half = np.eye(size, dtype=np.float32), size // 2
    moved = found.moves(errors[:half, :half], half, size)
    np.testing.assert_allclose(moved, u[:half, half:].T, rtol=0, atol=rounding * abs(u).max())
    # Of the rows of I the diagonal, in which a dead input costs nothing.
    energies = found.energies(errors)
    damped = h.diagonal() + 0.01 * h.diagonal().sum() / (size - found.dead.sum() or 1)
    assert (abs(energies - h.diagonal()) <= 2 * rounding * damped).all()
    assert (energies[found.dead] == 0).all()
    wider = factor_of(later, np.float64, 0.01, owned=True)  # Not in half of the memory.
    np.testing.assert_array_equal(wider.corner(0, size), u)


def test_a_hessian_is_summed_again_for_more_damping():
    x = np.float32(np.random.default_rng(0).standard_normal((3, 24)))
    later, summed = unsummed(x), []
    read = lambda: summed.append(1) or later.read()  # noqa: E731
    found = Overwritten(read, 0.0)
    expected = factor_of(later.whole(), np.float32, 0.0, owned=True)
    assert len(summed) >= 2 and found.damping == expected.damping > 0
    np.testing.assert_allclose(found.corner(0, 24), expected.corner(0, 24), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_reserved_takes_memory_only_where_it_is_written():
    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * resource.getpagesize()

    before = resident()
    array = host.reserved((64, 2**20), np.uint8)
    assert not array[::8, ::4096].any()
    assert resident() - before < 2**23
    array[:32] = 1
    assert 2**25 <= resident() - before < 2**25 + 2**23
    assert host.reserved((2, 3), np.float32).tolist() == [[0, 0, 0], [0, 0, 0]]


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
    # And where it is yet to be summed, which rounds otherwise.
    later = given._replace(hessian=unsummed(x))
    overwritten = run(step, tuple(a.replace(statistics=later) for a in layers))
    h = np.float64(before)
    for a, b, c, w in zip(found, expected, overwritten, np.float64(weights), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a.parts, b.parts)
        for layer in (a, c):
            e = w - np.float64(layer.parts[0].materialize())
            error = np.sqrt(np.trace(e @ h @ e.T) / np.trace(w @ h @ w.T))
            assert layer.metrics["error"] == pytest.approx(error, rel=1e-4)
        assert c.metrics["error"] == pytest.approx(a.metrics["error"], rel=1e-2)
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
