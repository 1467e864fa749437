"""The augmented Lagrangian reaches its target, and refuses those that cannot be reached."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxcomp.errors import JaxcompError
from jaxcomp.pruning import Multipliers, ascend, hard_concrete, lagrangian


def test_penalty_is_the_formula_and_the_target_warms_up():
    lagrange = lagrangian(0.6, warmup_steps=100, start=0.1)
    assert [round(float(lagrange.target(t)), 6) for t in (0, 50, 100, 500)] == [0.1, 0.35, 0.6, 0.6]
    multipliers = Multipliers(jnp.float32(2.0), jnp.float32(-3.0))
    gap = 0.5 - 0.35
    got = float(lagrange.penalty(multipliers, 0.5, 50))
    assert got == pytest.approx(2 * gap - 3 * gap**2, rel=1e-5)
    gradient = jax.grad(lambda m: lagrange.penalty(m, 0.5, 50))(multipliers)
    assert float(gradient.linear) == pytest.approx(gap, rel=1e-5)
    assert float(gradient.quadratic) == pytest.approx(gap**2, rel=1e-5)
    assert jax.tree.map(float, lagrange.init()) == Multipliers(0.0, 0.0)
    assert float(lagrangian(0.6).target(0)) == pytest.approx(0.6)


@pytest.mark.parametrize("target", [0.3, 0.8])
def test_expected_sparsity_reaches_the_target(key, target):
    """Units of different sizes and uses: without the constraint all gates would open."""
    sizes = jnp.array([1.0, 2.0, 3.0, 4.0] * 5)
    use = jnp.linspace(0.01, 1.0, 20)
    lagrange = lagrangian(target, 200, 1500, 50.0, 50.0)
    params = {"gates": hard_concrete.init(key, (20,)), "multipliers": lagrange.init()}
    tx = optax.partition(
        {"down": optax.adam(0.05), "up": ascend(optax.sgd(1.0))},
        {"gates": "down", "multipliers": "up"},
    )

    def sparsity(gates):
        return 1 - hard_concrete.expected_l0(gates, sizes) / sizes.sum()

    def loss(params, step):
        task = (use * (1 - hard_concrete.prob_nonzero(params["gates"])) ** 2).sum()
        return task + lagrange.penalty(params["multipliers"], sparsity(params["gates"]), step)

    def step(carry, t):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, t), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(1500)))(
        (params, tx.init(params))
    )
    assert float(sparsity(params["gates"])) == pytest.approx(target, abs=0.01)
    # What is kept is what is used most for its size.
    gates, worth = params["gates"], use / sizes
    assert float(gates[worth.argmax()]) > float(gates[worth.argmin()])


def test_ascend_climbs():
    tx = ascend(optax.adam(0.1))
    x = jnp.float32(0.0)
    state = tx.init(x)
    for _ in range(3):
        updates, state = tx.update(jnp.float32(1.0), state, x)
        x = optax.apply_updates(x, updates)
    assert float(x) == pytest.approx(0.3, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(target=0.9, prunable_size=50, total_size=100), "0.9 cannot be reached.* 50 of 100"),
        (dict(target=0.5, warmup_steps=200, total_steps=100), "100 steps.*warm-up of 200"),
        (dict(target=0.5, warmup_steps=100, total_steps=100), "not longer than its warm-up"),
        (dict(target=50), "write 50 % as 0.5"),
        (dict(target=0.5, warmup_steps=-1), "warmup_steps -1"),
        (dict(target=0.5, prunable_size=10), "both prunable_size and total_size"),
    ],
)
def test_targets_out_of_reach_are_refused(options, message):
    with pytest.raises(JaxcompError, match=message):
        lagrangian(**options)
