"""Schedules, the averaged teacher, and the loss with the teacher in it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomp.distillation import (
    annealed_weight,
    compress_logits,
    distill,
    ema_teacher,
    hard_cross_entropy,
    kl_divergence,
    topk_kl_divergence,
)
from jaxcomp.errors import JaxcompError
from tests.helpers import counted, x64


def test_annealing_is_piecewise_linear():
    weight = jax.jit(annealed_weight(0.8, 0.2, steps=100, warmup_steps=20, initial=0.1))
    knots = [0, 20, 100, 150], [0.1, 0.8, 0.2, 0.2]
    for step in (0, 7, 20, 21, 60, 100, 150):
        assert float(weight(step)) == pytest.approx(np.interp(step, *knots), rel=1e-5)
    plain = annealed_weight(1.0, 0.0, steps=10)
    assert [float(plain(s)) for s in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])
    only = annealed_weight(1.0, 0.3, steps=10, warmup_steps=10)
    assert [float(only(s)) for s in (5, 10, 11)] == pytest.approx([0.5, 0.3, 0.3])


def test_a_schedule_shorter_than_its_warm_up_is_refused():
    with pytest.raises(JaxcompError, match="10 steps is shorter than its warm-up of 11"):
        annealed_weight(1.0, 0.0, steps=10, warmup_steps=11)
    with pytest.raises(JaxcompError, match="at least 1"):
        annealed_weight(1.0, 0.0, steps=0)
    with pytest.raises(JaxcompError, match="negative"):
        annealed_weight(1.0, -0.1, steps=5)


@pytest.mark.parametrize("debias", [False, True])
def test_ema_is_the_weighted_mean_of_all_students(rng, debias):
    students = rng.normal(size=(6, 3))
    ema = ema_teacher(0.9, debias)
    weights = 0.1 * 0.9 ** np.arange(5, -1, -1)
    if debias:
        weights /= weights.sum()
    else:
        weights[0] = 0.9**5
    with x64():
        state = ema.init({"w": jnp.asarray(students[0])})
        np.testing.assert_allclose(ema.params(state)["w"], students[0], rtol=1e-14)
        update = jax.jit(ema.update)
        for w in students[1:]:
            state = update({"w": jnp.asarray(w)}, state)
        np.testing.assert_allclose(ema.params(state)["w"], weights @ students, rtol=1e-12)


def test_debiased_ema_is_optaxs(rng):
    tx = optax.ema(0.9, debias=True)
    reference = tx.init(jnp.zeros(3))
    ema, state = ema_teacher(0.9, debias=True), None
    for w in jnp.float32(rng.normal(size=(4, 3))):
        want, reference = tx.update(w, reference)
        state = ema.init(w) if state is None else ema.update(w, state)
        np.testing.assert_allclose(ema.params(state), want, rtol=1e-5)


def test_ema_keeps_small_steps_of_low_precision_and_other_leaves():
    params = {"w": jnp.ones(2, jnp.bfloat16), "steps": jnp.array(3)}
    ema = ema_teacher(0.999)
    state = ema.init({"w": jnp.zeros(2, jnp.bfloat16), "steps": jnp.array(0)})

    def step(state, _):
        return ema.update(params, state), None

    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, None, length=700))(state)
    teacher = ema.params(state, like=params)
    assert teacher["w"].dtype == jnp.bfloat16 and teacher["steps"] == 3
    np.testing.assert_allclose(ema.params(state)["w"], 1 - 0.999**700, rtol=1e-4)
    with pytest.raises(JaxcompError, match="decay 1"):
        ema_teacher(1.0)


def apply(params, x):
    return jnp.tanh(x @ params["w"])


def build(rng, **options):
    params = [{"w": jnp.float32(rng.normal(size=(4, 6)))} for _ in range(2)]
    batch = jnp.float32(rng.normal(size=(3, 4))), jnp.array([0, 5, 2])
    losses = {
        "kd": lambda s, t, batch: kl_divergence(s, t, 2.0).mean(),
        "ce": lambda s, t, batch: hard_cross_entropy(s, batch[1]).mean(),
    }
    return distill(apply, apply, losses, inputs=lambda batch: batch[:1], **options), *params, batch


def test_loss_is_the_weighted_sum_and_stops_at_the_teacher(rng):
    loss, student, teacher, batch = build(rng, weights={"kd": 0.7, "ce": lambda step: 0.1 * step})
    run = counted(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, metrics), (ours, theirs) = run(student, teacher, batch, 3)
    s, t = apply(student, batch[0]), apply(teacher, batch[0])
    kd, ce = kl_divergence(s, t, 2.0).mean(), hard_cross_entropy(s, batch[1]).mean()
    assert float(value) == pytest.approx(float(0.7 * kd + 0.3 * ce), rel=1e-5)
    assert metrics["loss"] == value and float(metrics["kd"]) == pytest.approx(float(kd), rel=1e-5)
    assert np.any(ours["w"] != 0) and np.all(theirs["w"] == 0)
    run(student, teacher, batch, 4)
    assert run.traces == 1


def test_born_again_students_learn(rng):
    loss, student, teacher, batch = build(rng, weights={"ce": 0.0})
    tx = optax.adam(0.05)

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(lambda p: loss(p, teacher, batch)[0])(params)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    _, values = jax.jit(lambda c: jax.lax.scan(step, c, None, length=200))(
        (student, tx.init(student))
    )
    assert values[-1] < 0.01 * values[0]


def test_streamed_teacher_outputs_equal_those_in_the_step(rng):
    loss, student, teacher, batch = build(rng)
    streamed = distill(
        apply,
        None,
        {"kd": lambda s, t, batch: topk_kl_divergence(s, batch[2]).mean()},
        inputs=lambda batch: batch[:1],
    )
    top = compress_logits(apply(teacher, batch[0]), 6, 2.0)
    got = jax.jit(streamed)(student, None, (*batch, top))[0]
    assert float(got) == pytest.approx(float(loss(student, teacher, batch)[1]["kd"]), rel=1e-4)


def test_wrong_use_is_refused(rng):
    loss, student, teacher, batch = build(rng, weights={"kd": lambda step: 1.0})
    with pytest.raises(JaxcompError, match="'kd' is a schedule; pass step"):
        loss(student, teacher, batch)
    with pytest.raises(JaxcompError, match=r"weights of \['kl'\]"):
        build(rng, weights={"kl": 1.0})
    with pytest.raises(JaxcompError, match="at least one"):
        distill(apply, apply, {})
    rows = distill(apply, apply, {"kd": lambda s, t, b: kl_divergence(s, t)})
    with pytest.raises(JaxcompError, match=r"'kd' has shape \(3,\).*masked_mean"):
        rows(student, teacher, batch[0])
