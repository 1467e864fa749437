"""L0 gates on units: statistics, sizes, transforms, and removal; Michel's importance."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.errors import JaxcompError
from jaxcomp.pruning import hard_concrete
from jaxcomp.pruning.gates import gates, unit_importance
from jaxcomp.pruning.removal import remove
from jaxcomp.pruning.structured import apply_gates, units
from tests.helpers import x64


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def mlp(p, x):
    return jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"] + p["out"]


MLP = {
    "up": normal(4, 6),
    "bias": normal(6, seed=1),
    "down": normal(6, 4, seed=2),
    "out": jnp.ones(4),
}
X = normal(3, 4, seed=3)
NEURONS = units(mlp, MLP, X, include="down")
LAYER = units(mlp, MLP, X, include="down", kind="layer")
WEIGHTS = units(mlp, MLP, X, include="up", kind="weight")


def stack(p, x):
    def layer(x, w):
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    return jax.lax.scan(layer, x, p)[0]


STACK = {"up": normal(2, 4, 6), "down": normal(2, 6, 4, seed=1)}
STACKED = units(stack, STACK, X, include="down")


def test_init_and_test_time_gates():
    l0 = gates(NEURONS + LAYER)
    log_alpha = l0.init(jax.random.key(0), drop_rate=0.2)
    assert {k: v.shape for k, v in log_alpha.items()} == {"down:neuron": (6,), "down:layer": (1,)}
    np.testing.assert_allclose(log_alpha["down:neuron"], math.log(4), atol=0.06)
    assert len(np.unique(log_alpha["down:neuron"])) == 6
    # Closed up to -ln 11, open from ln 11.
    edge = math.log(11)
    values = jnp.array([-9.0, -edge - 1e-3, -edge + 1e-2, 0.0, edge + 1e-3, 9.0])
    log_alpha = {"down:neuron": values, "down:layer": jnp.array([9.0])}
    z = l0.gates(log_alpha)["down:neuron"]
    assert z[:2].tolist() == [0, 0] and z[4:].tolist() == [1, 1] and 0 < z[2] < z[3] < 1
    assert l0.masks(log_alpha)["down:neuron"].tolist() == [False] * 2 + [True] * 4
    gated = l0.apply(MLP, log_alpha)
    np.testing.assert_allclose(gated["down"], MLP["down"] * z[:, None], rtol=1e-6)
    np.testing.assert_array_equal(gated["up"], MLP["up"])


def test_a_layer_gate_closes_weight_and_bias():
    l0 = gates(NEURONS + LAYER)
    log_alpha = {"down:neuron": jnp.zeros(6), "down:layer": jnp.array([-9.0])}
    np.testing.assert_array_equal(mlp(l0.apply(MLP, log_alpha), X), np.zeros((3, 4)))


def test_sampled_gates_have_the_distribution():
    l0 = gates(NEURONS)
    log_alpha = {"down:neuron": jnp.array([-2.0, 0.0, 1.0, -2.0, 0.0, 1.0])}
    keys = jax.random.split(jax.random.key(0), 20000)
    z = jax.jit(jax.vmap(lambda k: l0.gates(log_alpha, k)["down:neuron"]))(keys)
    for values, exact in (
        (z == 0, [0.59902, 0.16818, 0.06923]),
        (z == 1, [0.02663, 0.16818, 0.35466]),
    ):
        got = np.asarray(values).mean(0).reshape(2, 3)
        sigma = np.sqrt(np.array(exact) * (1 - np.array(exact)) / len(keys))
        assert (np.abs(got - exact) < 4.5 * sigma).all()
    # Units of one group, and groups, are independent.
    assert abs(np.corrcoef(np.asarray(z[:, 1]), np.asarray(z[:, 4]))[0, 1]) < 0.03


@pytest.mark.parametrize("kinds", ["neuron", "layer x neuron", "weight x neuron"])
def test_expected_sparsity_is_that_of_samples(kinds):
    groups = {
        "neuron": NEURONS,
        "layer x neuron": NEURONS + LAYER,
        "weight x neuron": NEURONS + WEIGHTS,
    }[kinds]
    l0 = gates(groups)
    log_alpha = {
        g.name: jnp.linspace(-2.0, 1.5, g.count) if g.count > 1 else jnp.zeros(1) for g in groups
    }
    n = 20000
    z = jax.jit(jax.vmap(lambda k: l0.gates(log_alpha, k)))(jax.random.split(jax.random.key(3), n))
    alive = {name: np.asarray(v != 0, np.float64) for name, v in z.items()}
    neuron = alive["down:neuron"]
    # A neuron has a column of 4 and a bias in front, and a row of 4 behind.
    if kinds == "neuron":
        size, stays = 54, neuron.sum(1) * 9
    elif kinds == "layer x neuron":  # the layer alone also has its output bias of 4
        size, stays = 58, alive["down:layer"][:, 0] * (neuron.sum(1) * 9 + 4)
    else:
        size = 54
        each = alive["up:weight"].reshape(n, 4, 6)
        stays = neuron.sum(1) * 5 + (each * neuron[:, None]).sum((1, 2))
    assert l0.size == size
    sparsity = 1 - stays / size
    sigma = sparsity.std() / math.sqrt(n)
    assert abs(float(l0.expected_sparsity(log_alpha)) - sparsity.mean()) < 4.5 * sigma
    np.testing.assert_allclose(
        l0.penalty(log_alpha), size * (1 - l0.expected_sparsity(log_alpha)), rtol=1e-5
    )


def test_penalty_gradient():
    l0 = gates(NEURONS)
    log_alpha = {"down:neuron": jnp.linspace(-2.0, 2.0, 6)}
    p = 1 / (1 + np.exp(-(np.linspace(-2, 2, 6) - 2 / 3 * math.log(0.1 / 1.1))))
    got = jax.grad(l0.penalty)(log_alpha)["down:neuron"]
    np.testing.assert_allclose(got, 9 * p * (1 - p), rtol=1e-5)


def test_stacked_layers_under_transforms():
    l0 = gates(STACKED)
    log_alpha = l0.init(jax.random.key(0))
    assert log_alpha["down:neuron"].shape == (2, 6)

    def loss(log_alpha, key, x):
        return (stack(l0.apply(STACK, log_alpha, key), x) ** 2).sum()

    keys = jax.random.split(jax.random.key(1), 3)
    grad = jax.grad(loss)
    each = jax.jit(jax.vmap(grad, (None, 0, 0)))(log_alpha, keys, X)["down:neuron"]
    _, looped = jax.lax.scan(lambda c, k: (c, grad(log_alpha, *k)), 0, (keys, X))
    np.testing.assert_allclose(each, looped["down:neuron"], rtol=2e-4, atol=1e-5)
    # Gradients reach exactly the gates that are between 0 and 1.
    z = jax.vmap(lambda k: l0.gates(log_alpha, k)["down:neuron"])(keys)
    np.testing.assert_array_equal(each != 0, (z > 0) & (z < 1))


def test_removal_is_the_deterministic_model():
    l0 = gates(NEURONS + LAYER)
    log_alpha = {
        "down:neuron": jnp.array([-9.0, 0.3, -3.0, 9.0, 1.0, -1.0]),
        "down:layer": jnp.array([0.5]),
    }
    small = l0.remove(MLP, log_alpha)
    assert jax.tree.map(jnp.shape, small) == {
        "up": (4, 4),
        "bias": (4,),
        "down": (4, 4),
        "out": (4,),
    }
    np.testing.assert_allclose(
        mlp(small, X), mlp(l0.apply(MLP, log_alpha), X), rtol=1e-5, atol=1e-5
    )
    l0 = gates(STACKED)
    uneven = {"down:neuron": jnp.array([[-9.0, 0.3, -3.0, 9.0, 1.0, -1.0], [1.0] * 5 + [-9.0]])}
    with pytest.raises(JaxcompError, match=r"keep \[4, 5\] units"):
        l0.remove(STACK, uneven)
    small = l0.remove(STACK, uneven, pad=True)
    assert small["up"].shape == (2, 4, 5)
    np.testing.assert_allclose(
        stack(small, X), stack(l0.apply(STACK, uneven), X), rtol=1e-5, atol=1e-5
    )


def test_weight_gates():
    l0 = gates(WEIGHTS)
    log_alpha = {"up:weight": jnp.where(jnp.arange(24) % 3 == 0, -9.0, 9.0)}
    expected = np.where(np.arange(24).reshape(4, 6) % 3 == 0, 0, MLP["up"])
    np.testing.assert_array_equal(l0.apply(MLP, log_alpha)["up"], expected)
    np.testing.assert_array_equal(l0.remove(MLP, log_alpha)["up"], expected)


def test_low_precision_and_float64():
    l0 = gates(NEURONS)
    log_alpha = l0.init(jax.random.key(0))
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), MLP)
    assert l0.apply(low, log_alpha, jax.random.key(1))["down"].dtype == jnp.bfloat16
    with x64():
        log_alpha = {"down:neuron": jnp.linspace(-1, 1, 6, dtype=jnp.float64)}
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), MLP)
        assert l0.apply(wide, log_alpha)["down"].dtype == jnp.float64
        p = 1 / (1 + np.exp(-(np.linspace(-1, 1, 6) + 2 / 3 * math.log(11))))
        assert abs(float(l0.expected_sparsity(log_alpha)) - (1 - p.mean())) < 1e-12


def test_targets():
    l0 = gates(NEURONS)
    assert l0.target(0.4) == 0.4
    # 54 of 58 parameters are behind gates.
    assert math.isclose(l0.target(0.5, MLP), 0.5 * 58 / 54)
    with pytest.raises(JaxcompError, match=r"0.95 of 58 parameters.*only 54.*0.931"):
        l0.target(0.95, MLP)
    with pytest.raises(JaxcompError, match="not a fraction"):
        l0.target(40)


def test_errors():
    with pytest.raises(JaxcompError, match="no units to gate"):
        gates(())
    with pytest.raises(JaxcompError, match="same name"):
        gates(NEURONS + NEURONS)
    with pytest.raises(JaxcompError, match="gamma"):
        gates(NEURONS, gamma=0.1)
    l0 = gates(NEURONS + LAYER)
    with pytest.raises(JaxcompError, match=r"'down:neurons', which is no group.*down:neuron"):
        l0.apply(MLP, {"down:neurons": jnp.zeros(6)})
    with pytest.raises(JaxcompError, match="log_alpha has no down:layer"):
        l0.apply(MLP, {"down:neuron": jnp.zeros(6)})


def test_trained_gates_close_what_is_of_no_use():
    # Neurons 3.. reach the output by weights of zero in the target, so only the penalty acts there.
    target = {**MLP, "down": MLP["down"].at[3:].set(0)}
    l0 = gates(NEURONS)
    x = normal(64, 4, seed=9)
    y = mlp(target, x)

    @jax.jit
    def train(log_alpha, key):
        def loss(log_alpha, key):
            error = ((mlp(l0.apply(MLP, log_alpha, key), x) - y) ** 2).mean()
            return error + 0.002 * l0.penalty(log_alpha)

        def step(log_alpha, key):
            g = jax.grad(loss)(log_alpha, key)
            return jax.tree.map(lambda a, g: a - 2.0 * jnp.clip(g, -0.2, 0.2), log_alpha, g), None

        return jax.lax.scan(step, log_alpha, jax.random.split(key, 400))[0]

    log_alpha = train(l0.init(jax.random.key(0)), jax.random.key(1))
    assert l0.masks(log_alpha)["down:neuron"].tolist() == [True] * 3 + [False] * 3


def attention(p, x):
    batch, tokens, _ = x.shape
    q, k, v = ((x @ p[n]).reshape(batch, tokens, -1, 2) for n in "qkv")
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(batch, tokens, -1) @ p["o"]


def test_importance_of_heads():
    p = {n: normal(4, 8, seed=i) for i, n in enumerate("qkv")} | {"o": normal(8, 4, seed=9)}
    # Head 1 gives nothing; head 3 is head 2 again.
    for n in "qkv":
        p[n] = p[n].at[:, 6:].set(p[n][:, 4:6])
    p["o"] = p["o"].at[6:].set(p["o"][4:6])
    p["v"] = p["v"].at[:, 2:4].set(0)
    x = normal(5, 3, 4, seed=11)
    groups = units(attention, p, x, include="o", kind="head", size=2)

    def loss(p, x):
        return (attention(p, x) ** 3).mean()

    run = jax.jit(lambda p, x: unit_importance(loss, p, groups, x, normalize=False)["o:head"])
    got = run(p, x)
    # By finite differences of each example's loss, in float64.
    with x64():
        wide = {k: jnp.asarray(np.asarray(v, np.float64)) for k, v in p.items()}
        step = 1e-5

        @jax.jit
        def gated(z, x):
            return loss(apply_gates(wide, groups, {"o:head": z}), x[None])

        each = jax.jit(jax.vmap(jax.vmap(gated, (0, None)), (None, 0)))
        up, down = (
            each(np.ones((4, 4)) + s * np.eye(4), np.asarray(x, np.float64)) for s in (step, -step)
        )
        expected = np.abs(np.asarray(up - down)).mean(0) / (2 * step)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert got[1] == 0
    np.testing.assert_allclose(got[2], got[3], rtol=1e-5)
    unit = unit_importance(loss, p, groups, x)["o:head"]
    np.testing.assert_allclose(unit, expected / np.linalg.norm(expected), rtol=1e-4, atol=1e-6)
    # The mean of signed gradients is another number.
    mean = jax.grad(lambda z: loss(apply_gates(p, groups, {"o:head": z}), x))(jnp.ones(4))
    assert not np.allclose(np.abs(mean), expected, rtol=1e-2)
    small = remove(p, groups, {"o:head": np.array([True, False, True, True])})
    np.testing.assert_allclose(attention(small, x), attention(p, x), rtol=1e-5, atol=1e-5)


def test_constants_reach_the_gates():
    l0 = gates(NEURONS, beta=0.5)
    log_alpha = {"down:neuron": jnp.zeros(6)}
    p = float(hard_concrete.prob_nonzero(jnp.zeros(()), 0.5))
    assert math.isclose(float(l0.expected_sparsity(log_alpha)), 1 - p, rel_tol=1e-5)
    assert math.isclose(1 - p, 0.23166, abs_tol=1e-5)
