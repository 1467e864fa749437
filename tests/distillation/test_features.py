"""Losses between features against float64 NumPy and their invariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.distillation import (
    attention_score_loss,
    cosine_loss,
    hidden_mse,
    hint_loss,
    masked_mean,
    pkd_loss,
    projection,
)
from jaxcomp.errors import JaxcompError
from tests.helpers import x64

LOSSES = [hint_loss, hidden_mse, pkd_loss, cosine_loss]
by_name = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)


def reference(name, v, u):
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (u, v))
    return {
        "hint_loss": 0.5 * ((u - v) ** 2).sum(-1),
        "hidden_mse": ((u - v) ** 2).mean(-1),
        "pkd_loss": ((a - b) ** 2).mean(-1),
        "cosine_loss": 1 - (a * b).sum(-1),
    }[name]


@by_name
def test_values_and_gradients(rng, loss):
    v, u = rng.normal(size=(2, 2, 3, 4))
    want = reference(loss.__name__, v, u)
    with x64():
        v, u = jnp.asarray(v), jnp.asarray(u)
        total = jax.jit(lambda v, u: loss(v, u).sum())
        np.testing.assert_allclose(jax.jit(loss)(v, u), want, rtol=1e-12)
        student, teacher = jax.jit(jax.grad(total, argnums=(0, 1)))(v, u)
        free = jax.jit(jax.grad(lambda u: loss(v, u, stop_gradient=False).sum()))(u)
        directions = 1e-5 * jnp.eye(24).reshape(24, 2, 3, 4)
        slopes = jax.jit(jax.vmap(lambda h: (total(v + h, u) - total(v - h, u)) / 2e-5))
        np.testing.assert_allclose(student.ravel(), slopes(directions), atol=1e-9)
    np.testing.assert_array_equal(teacher, 0)
    assert np.any(np.asarray(free) != 0)


@by_name
def test_zero_at_equality_and_masks(rng, loss):
    v, u = jnp.float32(rng.normal(size=(2, 2, 3, 4)))
    where = jnp.array([[True, True, False], [False] * 3])
    broken = v.at[1].set(jnp.nan), u.at[1].set(jnp.nan)
    run = jax.jit(jax.value_and_grad(lambda v, u, w: masked_mean(loss(v, u, where=w), w)))
    value, gradient = run(*broken, where)
    want = reference(loss.__name__, np.float64(v), np.float64(u))[0, :2].mean()
    assert float(value) == pytest.approx(want, rel=1e-5)
    assert np.isfinite(gradient).all() and np.all(gradient[1] == 0) and np.all(gradient[0, 2] == 0)
    value, gradient = run(*broken, jnp.zeros((2, 3), bool))
    assert value == 0 and np.all(gradient == 0)
    np.testing.assert_allclose(run(v, v, jnp.ones((2, 3), bool))[0], 0, atol=1e-6)


@pytest.mark.parametrize("loss", [pkd_loss, cosine_loss], ids=lambda f: f.__name__)
def test_a_positive_factor_changes_nothing(rng, loss):
    v, u = jnp.float32(rng.normal(size=(2, 5, 8)))
    run = jax.jit(jax.value_and_grad(lambda v, u: loss(v, u).sum()))
    want, gradient = run(v, u)
    got, scaled = run(16 * v, u / 4)
    assert got == want  # powers of two: bit by bit
    np.testing.assert_allclose(16 * scaled, gradient, rtol=1e-6)
    assert float(run(1e30 * v, 1e-30 * u)[0]) == pytest.approx(float(want), rel=1e-5)
    assert float(run(-v, u)[0]) != pytest.approx(float(want), rel=1e-2)
    zero, gradient = run(0 * v, u)
    assert np.isfinite(zero) and np.isfinite(gradient).all()


@by_name
def test_low_precision_is_computed_in_float32(rng, loss):
    v, u = jnp.bfloat16(rng.normal(size=(2, 5, 8)))
    got = jax.jit(loss)(v, u)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(
        got, reference(loss.__name__, np.float64(v), np.float64(u)), rtol=1e-5, atol=1e-6
    )


def test_projection_recovers_an_exact_linear_map(rng):
    """With the student a linear image of the teacher the hint loss goes to 0."""
    with x64():
        teacher = jnp.asarray(rng.normal(size=(64, 5)))
        mix = jnp.asarray(np.linalg.qr(rng.normal(size=(5, 5)))[0])
        student = jnp.concatenate([teacher @ mix, teacher[:, :2]], axis=1) + 0.5
        params = projection.init(jax.random.key(0), 7, 5, dtype=jnp.float64)
        mean = jax.jit(lambda params: hint_loss(student, teacher, params).mean())
        start = float(mean(params))

        def step(params, _):
            return jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(mean)(params)), None

        params, _ = jax.jit(lambda p: jax.lax.scan(step, p, None, length=1500))(params)
        assert float(mean(params)) < 1e-12 < 1e-3 < start
        fresh = jnp.asarray(rng.normal(size=(3, 5)))
        image = jnp.concatenate([fresh @ mix, fresh[:, :2]], axis=1) + 0.5
        np.testing.assert_allclose(projection.apply(params, image), fresh, atol=1e-5)


def test_gradients_reach_the_projection_and_the_student_only(rng):
    params = projection.init(jax.random.key(0), 4, 6)
    v, u = jnp.float32(rng.normal(size=(3, 4))), jnp.float32(rng.normal(size=(3, 6)))
    gradient = jax.grad(lambda *args: hidden_mse(*args).sum(), argnums=(0, 1, 2))
    student, teacher, projected = jax.jit(gradient)(v, u, params)
    assert np.any(student != 0) and np.all(teacher == 0)
    assert all(np.any(g != 0) for g in jax.tree.leaves(projected))


def test_projection_shapes():
    key = jax.random.key(0)
    assert set(projection.init(key, 4, 6, bias=False)) == {"kernel"}
    params = projection.init(key, 4, 6)
    assert params["kernel"].shape == (4, 6) and params["bias"].shape == (6,)
    assert projection.apply(params, jnp.ones((2, 3, 4))).shape == (2, 3, 6)
    spread = np.std(projection.init(key, 400, 300)["kernel"])
    assert spread == pytest.approx(1 / 20, rel=0.05)


@by_name
def test_widths_that_differ_need_a_projection(loss):
    student, teacher = jnp.ones((2, 4)), jnp.ones((2, 6))
    with pytest.raises(JaxcompError, match=r"widths, 4 and 6; pass .*projection.init\(key, 4, 6\)"):
        loss(student, teacher)
    with pytest.raises(JaxcompError, match="takes width 6"):
        loss(student, teacher, projection.init(jax.random.key(0), 6, 4))
    with pytest.raises(JaxcompError, match="must end in width 6"):
        loss(student, teacher, projection.init(jax.random.key(0), 4, 5))
    with pytest.raises(JaxcompError, match="same positions"):
        loss(student, jnp.ones((3, 4)))
    with pytest.raises(JaxcompError, match="floating"):
        loss(student, jnp.ones((2, 4), int))


def test_attention_scores_zero_what_the_mask_excluded(rng):
    v, u = rng.normal(size=(2, 2, 3, 4, 4))
    v[..., 2:], u[..., 3:] = v[..., 2:] - 1e4, -np.inf
    want = (np.where(v > -100, v, 0) - np.where(u > -100, u, 0)) ** 2
    run = jax.jit(functools.partial(attention_score_loss))
    v, u = jnp.float32(v), jnp.float32(u)
    np.testing.assert_allclose(run(v, u), want.mean((1, 2, 3)), rtol=1e-5)
    where = np.array([[1, 1, 0, 1], [0, 0, 0, 0]], bool)
    pairs = where[0][:, None] & where[0]
    got = run(v, u.at[1].set(jnp.nan), jnp.asarray(where))
    assert float(got[0]) == pytest.approx(want[0][:, pairs].mean(), rel=1e-5) and got[1] == 0
    gradient = jax.jit(jax.grad(lambda v: run(v, u).sum()))(v)
    assert np.isfinite(gradient).all() and np.all(gradient[..., 2:] == 0)
    edge = jnp.full((1, 1, 1), -100.0)
    assert attention_score_loss(edge, 0 * edge) == 0
    assert attention_score_loss(edge + 1, 0 * edge) == 99.0**2


def test_attention_scores_refuse_other_heads():
    with pytest.raises(JaxcompError, match=r"\(2, 3, 4, 4\) and teacher .*minilmv2_loss"):
        attention_score_loss(jnp.ones((2, 3, 4, 4)), jnp.ones((2, 6, 4, 4)))
    with pytest.raises(JaxcompError, match="as many queries as keys"):
        attention_score_loss(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4)), jnp.ones(4, bool))
