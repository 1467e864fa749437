"""Proximal operators against their argmin, and as transformations against the closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from jaxcomp.errors import JaxcompError
from jaxcomp.pruning import (
    Units,
    group_lasso_penalty,
    group_soft_threshold,
    l1_penalty,
    proximal_group_lasso,
    proximal_l1,
    soft_threshold,
    unit_norms,
)
from tests.helpers import x64


def test_soft_threshold_is_the_argmin(rng):
    w = np.concatenate([rng.normal(size=20), [0.3, -0.3, 0.0]])
    with x64():
        got = np.asarray(soft_threshold(jnp.asarray(w), 0.3))
    for x, value in zip(w, got, strict=True):
        best = scipy.optimize.minimize_scalar(
            lambda z, x=x: 0.5 * (z - x) ** 2 + 0.3 * abs(z),
            bounds=(-4, 4),
            options=dict(xatol=1e-9),
        )
        assert value == pytest.approx(best.x, abs=1e-6)
    assert (got[np.abs(w) <= 0.3] == 0).all() and (got[np.abs(w) > 0.3] != 0).all()


@pytest.mark.parametrize("size_weighted", [False, True])
def test_group_soft_threshold_is_the_argmin_over_coupled_arrays(rng, size_weighted):
    up, bias, down = rng.normal(size=(3, 4)), rng.normal(size=4), rng.normal(size=(4, 2))
    down[2], up[:, 2], bias[2] = 0.01, 0.01, 0.01
    axes, amount = [-1, -1, -2], 0.4
    with x64():
        arrays = [jnp.asarray(a) for a in (up, bias, down)]
        got = [np.asarray(a) for a in group_soft_threshold(arrays, amount, axes, size_weighted)]
        norms = np.asarray(unit_norms(arrays, axes))
        penalty = float(group_lasso_penalty(arrays, axes, size_weighted))
    factor = np.sqrt(6) if size_weighted else 1.0
    squares = (up**2).sum(0) + bias**2 + (down**2).sum(1)
    np.testing.assert_allclose(norms, np.sqrt(squares), rtol=1e-12)
    assert penalty == pytest.approx(factor * norms.sum(), rel=1e-12)
    for unit in range(4):
        w = np.concatenate([up[:, unit], [bias[unit]], down[unit]])
        best = scipy.optimize.minimize(
            lambda z, w=w: 0.5 * ((z - w) ** 2).sum() + amount * factor * np.sqrt((z**2).sum()),
            w,
            method="Nelder-Mead",
            options=dict(xatol=1e-9, fatol=1e-14, maxiter=8000, maxfev=8000, adaptive=True),
        )
        value = np.concatenate([got[0][:, unit], [got[1][unit]], got[2][unit]])
        np.testing.assert_allclose(value, best.x, atol=2e-5)
    assert (got[0][:, 2] == 0).all() and got[1][2] == 0 and (got[2][2] == 0).all()


def test_blocks_and_stacks_are_units(rng):
    w = rng.normal(size=(2, 5, 6))
    norms = unit_norms(jnp.asarray(w), Units((0, -1), block_size=3))
    expected = np.sqrt((w.reshape(2, 5, 2, 3) ** 2).sum((1, 3)))
    np.testing.assert_allclose(norms, expected, rtol=1e-5)
    got = np.asarray(group_soft_threshold(jnp.asarray(w), 0.5, Units((0, -1), 3), False))
    shrink = 1 - 0.5 / expected
    np.testing.assert_allclose(got, w * shrink.repeat(3, -1)[:, None], rtol=1e-4)


def test_dropped_neurons_can_be_removed(rng):
    """A coupled group of zeros adds nothing: the model without it has the same outputs."""
    up, bias, down = (rng.normal(size=s).astype(np.float32) for s in ((3, 8), (8,), (8, 2)))
    shrunk = group_soft_threshold([jnp.asarray(a) for a in (up, bias, down)], 1.0, [-1, -1, -2])
    up, bias, down = (np.asarray(a) for a in shrunk)
    kept = np.asarray(unit_norms(shrunk, [-1, -1, -2])) > 0
    assert 0 < kept.sum() < 8
    x = rng.normal(size=(5, 3)).astype(np.float32)
    masked = np.tanh(x @ up + bias) @ down
    removed = np.tanh(x @ up[:, kept] + bias[kept]) @ down[kept]
    np.testing.assert_allclose(masked, removed, rtol=1e-5)


def test_gradients_of_penalties():
    w = jnp.array([[3.0, 0.0, 1.0], [4.0, 0.0, 0.0]])
    np.testing.assert_array_equal(jax.grad(l1_penalty)(w), np.sign(w))
    gradient = jax.grad(lambda w: group_lasso_penalty(w, -1, size_weighted=False))(w)
    np.testing.assert_allclose(gradient, [[0.6, 0, 1], [0.8, 0, 0]], rtol=1e-6)


def test_proximal_l1_is_ista_and_solves_the_lasso(rng):
    """ISTA on a least squares problem converges to the optimality conditions of the lasso."""
    with x64():
        a, b = jnp.asarray(rng.normal(size=(30, 8))), jnp.asarray(rng.normal(size=(30, 2)))
        lr, strength = 0.01, 3.0
        tx = optax.chain(optax.sgd(lr), proximal_l1(strength, learning_rate=lr))
        w = {"w": jnp.zeros((8, 2))}

        def gradient(w):
            return {"w": a.T @ (a @ w["w"] - b)}

        def step(carry, _):
            w, state = carry
            updates, state = tx.update(gradient(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        (w, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, 3000))((w, tx.init(w)))
        g, w = np.asarray(gradient(w)["w"]), np.asarray(w["w"])
    assert 0 < (w == 0).sum() < w.size
    np.testing.assert_allclose(g[w != 0], -strength * np.sign(w[w != 0]), rtol=1e-6)
    assert (np.abs(g[w == 0]) <= strength).all()


def test_transforms_act_after_momentum_with_schedules(rng):
    w = rng.normal(size=(4, 3))
    g = rng.normal(size=(3, 4, 3))
    coupled = {"up": -1, "bias": -1}

    def rate(t):
        return 0.2 - 0.05 * t

    with x64():
        params = {"up": jnp.asarray(w), "bias": jnp.asarray(w[0]), "other": jnp.asarray(w)}
        tx = optax.chain(
            optax.sgd(rate, 0.9),
            proximal_l1(0.8, rate, include="other"),
            proximal_group_lasso(lambda t: 0.5 * (t + 1), rate, groups=[coupled]),
        )
        state, update = tx.init(params), jax.jit(tx.update)
        other, unit = w.copy(), np.concatenate([w, w[:1]])
        v, u = np.zeros_like(w), np.zeros((5, 3))
        for t in range(3):
            lr = 0.2 - 0.05 * t
            v = 0.9 * v + g[t]
            other = other - lr * v
            other = np.sign(other) * np.maximum(np.abs(other) - lr * 0.8, 0)
            u = 0.9 * u + np.concatenate([g[t], g[t][:1]])
            unit = unit - lr * u
            norm = np.sqrt((unit**2).sum(0))
            unit = unit * np.maximum(1 - lr * 0.5 * (t + 1) * np.sqrt(5) / norm, 0)
            gradients = {"up": g[t], "bias": g[t][0], "other": g[t]}
            updates, state = update(jax.tree.map(jnp.asarray, gradients), state, params)
            params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(params["other"], other, atol=1e-14)
            assert (np.asarray(params["other"]) == 0).tolist() == (other == 0).tolist()
            np.testing.assert_allclose(params["up"], unit[:4], atol=1e-14)
            np.testing.assert_allclose(params["bias"], unit[4], atol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zeros_are_exact_and_norms_left_alone(rng, dtype):
    params = {"kernel": jnp.asarray(rng.normal(size=(6, 4)), dtype), "bias": jnp.ones(4, dtype)}
    updates = jax.tree.map(lambda p: (0.01 * p).astype(jnp.bfloat16), params)
    for tx in (proximal_l1(0.7), proximal_group_lasso(0.9)):
        out, _ = tx.update(updates, tx.init(params), params)
        new = optax.apply_updates(params, out)
        assert new["kernel"].dtype == dtype
        assert 0 < int((new["kernel"] == 0).sum()) < 24
        np.testing.assert_array_equal(new["bias"], optax.apply_updates(params, updates)["bias"])


def test_hyperparameters_can_be_injected():
    tx = optax.inject_hyperparams(proximal_l1, static_args=("include", "exclude"))(strength=0.5)
    w = jnp.array([[2.0, 0.25]])
    state = tx.init(w)
    state.hyperparams["strength"] = jnp.float32(1.5)
    updates, _ = jax.jit(tx.update)(jnp.zeros_like(w), state, w)
    assert optax.apply_updates(w, updates).tolist() == [[0.5, 0.0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: proximal_l1(-1.0), "strength -1.0"),
        (lambda: proximal_l1(1.0, learning_rate=-0.1), "learning_rate -0.1"),
        (lambda: proximal_l1(1.0, include="upp"), "include rule 'upp' matches none.*up"),
        (lambda: proximal_group_lasso(1.0, groups=[{"dwn": -1}]), "'dwn'.*closest are down"),
        (lambda: proximal_group_lasso(1.0, groups=[{"up": -1}, {"up": 0}]), "more than one group"),
        (
            lambda: proximal_group_lasso(1.0, groups=[{"up": -1, "down": -1}]),
            r"same units: up \(3, 4\) has \(4,\), down \(4, 2\) has \(2,\)",
        ),
        (lambda: proximal_group_lasso(1.0, axis=2), "no unit axes 2"),
        (lambda: proximal_group_lasso(1.0, axis=Units(-1, 3)), "units of 3 do not divide"),
    ],
)
def test_wrong_use_is_refused(make, message):
    with pytest.raises(JaxcompError, match=message):
        make().init({"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))})


def test_a_proximal_step_needs_params():
    tx = proximal_l1(1.0)
    with pytest.raises(JaxcompError, match="needs params"):
        tx.update(jnp.ones((2, 2)), tx.init(jnp.ones((2, 2))))
