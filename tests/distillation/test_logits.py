"""Losses on logits against torch, float64 NumPy and the limits of temperature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from jaxcomp.distillation import (
    check_labels,
    hard_cross_entropy,
    hinton_loss,
    jensen_shannon,
    kl_divergence,
    logits_mse,
    masked_mean,
    reverse_kl_divergence,
    soft_cross_entropy,
)
from jaxcomp.errors import JaxcompError
from tests.helpers import x64

DIVERGENCES = [kl_divergence, reverse_kl_divergence, jensen_shannon]
LOSSES = [*DIVERGENCES, soft_cross_entropy, logits_mse]
by_name = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)


@functools.partial(jax.jit, static_argnames=("loss", "options"))
def _run(loss, z, v, where, options):
    out, pull = jax.vjp(lambda z, v: loss(z, v, where=where, **dict(options)), z, v)
    return out, *pull(jnp.ones_like(out))


def run(loss, z, v, where=None, **options):
    """The losses of positions and the gradients of their sum, in one compilation."""
    return _run(loss, z, v, where, tuple(options.items()))


def pair(rng, *shape, scale=2.0):
    return scale * rng.normal(size=shape), scale * rng.normal(size=shape)


def reference(name, z, v, t=1.0, beta=0.5):
    """Float64, from the definitions."""
    lq, lp = log_softmax(z / t, -1), log_softmax(v / t, -1)
    q, p = np.exp(lq), np.exp(lp)
    m = beta * p + (1 - beta) * q
    return {
        "kl_divergence": (p * (lp - lq)).sum(-1),
        "reverse_kl_divergence": (q * (lq - lp)).sum(-1),
        "jensen_shannon": beta * (p * (lp - np.log(m))).sum(-1)
        + (1 - beta) * (q * (lq - np.log(m))).sum(-1),
        "soft_cross_entropy": -(p * lq).sum(-1),
    }[name] * t**2


@pytest.mark.parametrize("loss", [*DIVERGENCES, soft_cross_entropy], ids=lambda f: f.__name__)
def test_values_are_those_of_numpy(rng, loss):
    z, v = pair(rng, 6, 8)
    want = reference(loss.__name__, z, v, 3.0)
    with x64():
        got = run(loss, z, v, temperature=3.0)[0]
        bare = run(loss, z, v, temperature=3.0, t_squared=False)[0]
        moved = run(
            loss,
            z.reshape(2, 3, 8).swapaxes(1, 2),
            v.reshape(2, 3, 8).swapaxes(1, 2),
            temperature=3.0,
            axis=1,
        )[0]
    np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_allclose(bare, want / 9, rtol=1e-12)
    np.testing.assert_allclose(moved.ravel(), want, rtol=1e-12)
    single = run(loss, jnp.float32(z), jnp.float32(v))[0]
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, reference(loss.__name__, z, v), rtol=2e-5, atol=2e-6)


def test_forward_kl_is_torchs_batchmean(rng):
    torch = pytest.importorskip("torch")
    z, v = pair(rng, 6, 8)
    log_q, p = torch.log_softmax(torch.tensor(z), -1), torch.softmax(torch.tensor(v), -1)
    want = torch.nn.functional.kl_div(log_q, p, reduction="batchmean").item()
    with x64():
        got = float(np.mean(run(kl_divergence, z, v)[0]))
    assert got == pytest.approx(want, rel=1e-12)


def test_gradient_is_that_of_torch(rng):
    torch = pytest.importorskip("torch")
    z, v = pair(rng, 6, 8)
    labels, t = rng.integers(0, 8, 6), 4.0
    zt = torch.tensor(z, requires_grad=True)
    soft = torch.nn.functional.kl_div(
        torch.log_softmax(zt / t, -1), torch.softmax(torch.tensor(v) / t, -1), reduction="batchmean"
    )
    hard = torch.nn.functional.cross_entropy(zt, torch.tensor(labels))
    (0.3 * t**2 * soft + 0.7 * hard).backward()
    with x64():
        gradient = jax.grad(lambda z: masked_mean(hinton_loss(z, v, labels, 0.3, t)))
        got = jax.jit(gradient)(z)
        np.testing.assert_allclose(got, zt.grad.numpy(), rtol=1e-9, atol=1e-14)


def test_hinton_mix_has_t_squared_on_the_soft_and_t_one_on_the_hard_term(rng):
    z, v = pair(rng, 5, 8)
    labels = rng.integers(0, 8, 5)
    hard = -log_softmax(z, -1)[np.arange(5), labels]
    soft = -(softmax(v / 3, -1) * log_softmax(z / 3, -1)).sum(-1)
    with x64():
        mix = jax.jit(hinton_loss, static_argnames="t_squared")
        got = mix(z, v, labels, 0.25, 3.0)
        np.testing.assert_allclose(got, 0.25 * 9 * soft + 0.75 * hard, rtol=1e-12)
        got = mix(z, v, labels, 0.25, 3.0, t_squared=False)
        np.testing.assert_allclose(got, 0.25 * soft + 0.75 * hard, rtol=1e-12)
        np.testing.assert_allclose(mix(z, v, labels, 0.0, 3.0), hard, rtol=1e-12)


@pytest.mark.parametrize("loss", DIVERGENCES, ids=lambda f: f.__name__)
def test_zero_at_equality_and_shift_invariant(rng, loss):
    z, v = pair(rng, 6, 8)
    with x64():
        at = functools.partial(run, loss, temperature=3.0)
        np.testing.assert_allclose(at(z, z)[0], 0, atol=1e-14)
        np.testing.assert_allclose(at(z + 5.0, v - 3.0)[0], at(z, v)[0], rtol=1e-10)
        assert np.all(at(z, v)[0] > 0)


def test_centred_logits_are_shift_invariant(rng):
    z, v = pair(rng, 6, 8)
    with x64():
        mse = functools.partial(run, logits_mse, center=True)
        np.testing.assert_allclose(mse(z + 5.0, v - 3.0)[0], mse(z, v)[0], rtol=1e-10)
        np.testing.assert_allclose(mse(z, v)[0], (z - v).var(-1), rtol=1e-12)
        np.testing.assert_allclose(run(logits_mse, z, v)[0], ((z - v) ** 2).mean(-1), rtol=1e-12)


def test_cross_entropy_at_equality_is_the_entropy(rng):
    z, _ = pair(rng, 6, 8)
    p = softmax(z, -1)
    got = run(soft_cross_entropy, jnp.float32(z), jnp.float32(z))[0]
    np.testing.assert_allclose(got, -(p * np.log(p)).sum(-1), rtol=1e-5)


def test_high_temperature_is_logit_matching(rng):
    z, v = pair(rng, 1, 10)
    z, v = z - z.mean(), v - v.mean()
    want = (z - v) / 10
    deviations = []
    with x64():
        both = jax.jit(jax.value_and_grad(lambda z, t: kl_divergence(z, v, t).sum()))
        for t in (1.0, 10.0, 100.0, 1000.0):
            value, got = both(z, t)
            deviations.append(np.linalg.norm(got - want) / np.linalg.norm(want))
    assert deviations[2] < 0.02 and deviations[3] < 0.002
    assert deviations == sorted(deviations, reverse=True)
    assert float(value) == pytest.approx(0.5 * ((z - v) ** 2).mean(), rel=0.01)


def test_jensen_shannon_is_symmetric_and_bounded(rng):
    z, v = map(jnp.float32, pair(rng, 6, 8, scale=20.0))
    a, b = run(jensen_shannon, z, v)[0], run(jensen_shannon, v, z)[0]
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert np.all(a <= np.log(2) * (1 + 1e-6)) and np.max(a) > 0.6
    apart = jnp.float32(np.where(np.arange(8) < 4, z, -np.inf))
    far = run(jensen_shannon, apart, apart[:, ::-1])[0]
    np.testing.assert_allclose(far, np.log(2), rtol=1e-6)


def test_jensen_shannon_has_both_divergences_as_limits(rng):
    z, v = pair(rng, 6, 8)
    with x64():
        at = jax.jit(lambda beta: jensen_shannon(z, v, beta=beta))
        np.testing.assert_allclose(at(1e-6) / 1e-6, reference("kl_divergence", z, v), rtol=1e-3)
        reverse = reference("reverse_kl_divergence", z, v)
        np.testing.assert_allclose(at(1 - 1e-6) / 1e-6, reverse, rtol=1e-3)
        np.testing.assert_allclose(at(0.3), reference("jensen_shannon", z, v, beta=0.3), rtol=1e-12)


@by_name
def test_gradients_against_finite_differences_and_stop_at_the_teacher(rng, loss):
    z, v = pair(rng, 6, 8)
    options = {} if loss is logits_mse else {"temperature": 3.0}
    with x64():
        _, ours, theirs = run(loss, z, v, **options)
        np.testing.assert_array_equal(theirs, 0)
        _, same, theirs = run(loss, z, v, stop_gradient=False, **options)
        np.testing.assert_allclose(same, ours, rtol=1e-12)
        h = 1e-5 * np.eye(48).reshape(48, 6, 8)
        z, v = np.broadcast_to(z, h.shape), np.broadcast_to(v, h.shape)
        total = jax.jit(lambda z, v: loss(z, v, **options).sum(-1))
        for gradient, slope in (
            (ours, (total(z + h, v) - total(z - h, v)) / 2e-5),
            (theirs, (total(z, v + h) - total(z, v - h)) / 2e-5),
        ):
            np.testing.assert_allclose(gradient.ravel(), slope, atol=1e-8)


@by_name
def test_large_logits_and_bfloat16_stay_finite(rng, loss):
    z, v = (jnp.asarray(a, jnp.bfloat16) for a in pair(rng, 6, 8, scale=1e4))
    value, gradient, _ = run(loss, z, v)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    assert np.isfinite(value).all() and np.isfinite(np.float32(gradient)).all()
    exact = run(loss, jnp.float32(z), jnp.float32(v))[0]
    np.testing.assert_allclose(value, exact, rtol=1e-6)


@by_name
def test_padded_vocabulary_by_minus_infinity_or_mask_equals_slicing(rng, loss):
    z, v = (np.float32(a) for a in pair(rng, 6, 8))
    mask = (np.arange(8) < 6)[None]
    want = run(loss, z[:, :6], v[:, :6])
    everywhere = np.ones((1, 8), bool)
    for got in (
        run(loss, np.where(mask, z, -np.inf), np.where(mask, v, -np.inf), everywhere),
        run(loss, np.where(mask, z, np.nan), v, mask),
    ):
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[1][:, :6], want[1], rtol=1e-4, atol=1e-5)
        assert np.all(got[1][:, 6:] == 0)


@by_name
def test_padded_positions_cost_nothing_even_when_nan(rng, loss):
    z, v = (np.float32(a) for a in pair(rng, 6, 8))
    where = np.array([1, 1, 0, 0, 0, 0])
    z[3:], v[4] = np.nan, np.nan
    value, gradient, _ = run(loss, z, v, where)
    np.testing.assert_allclose(value[:2], run(loss, z, v)[0][:2], rtol=1e-5)
    assert np.all(value[2:] == 0) and np.all(gradient[2:] == 0) and np.any(gradient[:2] != 0)
    value, gradient, _ = run(loss, z, v, 0 * where)
    assert np.all(value == 0) and np.all(gradient == 0)


def test_masked_mean():
    mean = jax.jit(jax.value_and_grad(lambda x, w: masked_mean(x, w)))
    x = jnp.array([[1.0, 2.0, np.nan], [4.0, np.nan, np.nan]])
    value, gradient = mean(x, jnp.array([[1, 1, 0], [1, 0, 0]]))
    assert float(value) == pytest.approx(7 / 3)
    np.testing.assert_allclose(gradient, np.array([[1, 1, 0], [1, 0, 0]]) / 3, rtol=1e-6)
    value, gradient = mean(x, jnp.zeros((2, 3), int))
    assert value == 0 and np.all(gradient == 0)
    got = masked_mean(x, jnp.array([True, True, False]), axis=0)
    np.testing.assert_array_equal(got[0], 2.5)
    assert masked_mean(jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32


@by_name
def test_nan_is_not_hidden(rng, loss):
    z, v = (np.float32(a) for a in pair(rng, 6, 8))
    z[0, 1], v[1, 1] = np.nan, np.nan
    np.testing.assert_array_equal(np.isnan(run(loss, z, v)[0]), np.arange(6) < 2)


def test_a_student_that_excludes_what_the_teacher_allows_loses_without_bound(rng):
    z, v = (np.float32(a) for a in pair(rng, 6, 8))
    z[0, 1] = -np.inf
    for loss in (kl_divergence, soft_cross_entropy, logits_mse):
        value, gradient, _ = run(loss, z, v)
        np.testing.assert_array_equal(np.isposinf(value), np.arange(6) < 1)
        assert np.isfinite(gradient).all()
    assert np.isfinite(run(reverse_kl_divergence, z, v)[0]).all()
    assert np.isposinf(run(reverse_kl_divergence, v, z)[0][0])
    assert np.isfinite(run(jensen_shannon, z, v)[0]).all()
    assert np.isposinf(hard_cross_entropy(z, np.ones(6, int))[0])


@by_name
def test_vmap_and_scan_agree_with_the_batch(rng, loss):
    z, v = (np.float32(a) for a in pair(rng, 6, 8))
    want = run(loss, z, v)[0]
    rows = jax.jit(lambda z, v: jax.lax.scan(lambda c, zv: (c, jax.vmap(loss)(*zv)), 0, (z, v)))
    got = rows(z.reshape(2, 3, 8), v.reshape(2, 3, 8))[1]
    np.testing.assert_allclose(got.ravel(), want, rtol=1e-5)


def test_labels_outside_the_vocabulary_are_refused():
    z = jnp.zeros((2, 3, 10))
    labels = jnp.array([[0, 9, -100], [3, 11, 2]])
    with pytest.raises(JaxcompError, match=r"labels\[0, 2\] = -100 .*vocabulary of 10 \(2 such"):
        hard_cross_entropy(z, labels)
    with pytest.raises(JaxcompError, match=r"labels\[1, 1\] = 11"):
        hinton_loss(z, z, labels, where=labels != -100)
    with pytest.raises(JaxcompError, match="must be integers"):
        check_labels(np.zeros(3), 10)
    where = (labels >= 0) & (labels < 10)
    got = hard_cross_entropy(z, labels, where=where)
    np.testing.assert_allclose(got, np.where(where, np.log(10), 0), rtol=1e-6)
    traced = jax.jit(hard_cross_entropy)(z, labels)
    np.testing.assert_array_equal(np.isnan(traced), ~where)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: kl_divergence(z, z[:, :4]), r"\(2, 5\) and teacher \(2, 4\).*slice both"),
        (lambda z: kl_divergence(z, z, 0.0), "temperature 0.0"),
        (lambda z: kl_divergence(z, z, jnp.inf), "temperature inf"),
        (lambda z: jensen_shannon(z, z, beta=1.0), "beta 1.0.*reverse_kl_divergence"),
        (lambda z: kl_divergence(z, z, axis=2), "axis 2 is not one of its 2 axes"),
        (lambda z: kl_divergence(z.astype(int), z), "needs floating values"),
        (lambda z: kl_divergence(z, z, where=jnp.ones(3, bool)), r"does not broadcast to \(2,\)"),
        (lambda z: logits_mse(z, z, where=jnp.ones((2, 2, 5), bool)), "axes of a loss"),
        (lambda z: hinton_loss(z, z, jnp.zeros(2, int), alpha=1.5), "alpha 1.5"),
        (lambda z: hard_cross_entropy(z, jnp.zeros((2, 5), int)), r"the shape \(2,\)"),
        (lambda z: masked_mean(z, jnp.ones(3, bool)), r"where \(3,\) does not broadcast"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(JaxcompError, match=message):
        call(jnp.zeros((2, 5)))
