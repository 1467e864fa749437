"""functional: NNX modules and linen pairs as functions of plain trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jaxcomp.errors import ModelError
from jaxcomp.functional import functional


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Param(jnp.ones((4, 2)))

    def features(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def __call__(self, x, *, scale=1.0):
        return scale * self.dropout(self.norm(self.features(x))) @ self.head[...]


def test_nnx_module():
    net = Net(nnx.Rngs(0))
    net.eval()
    apply, params = functional(net)
    assert sorted(params) == ["head", "layers", "norm"]
    assert sorted(params["layers"]) == ["0", "1"]
    assert sorted(params["layers"]["0"]) == ["bias", "kernel"]
    assert sorted(params["norm"]) == ["bias", "scale"]
    x = jax.random.normal(jax.random.key(0), (3, 4))
    np.testing.assert_allclose(
        jax.jit(apply, static_argnames="scale")(params, x, scale=2.0), net(x, scale=2.0), rtol=1e-5
    )
    # The weights are what is given, not what the module had.
    zero = jax.tree.map(jnp.zeros_like, params)
    assert not apply(zero, x).any() and net(x).any()
    features, _ = functional(net, method="features")
    np.testing.assert_allclose(features(params, x), net.features(x))


def test_state_that_is_no_weight_stays_as_it_was():
    net = Net(nnx.Rngs(0))
    net.train()
    apply, params = functional(net)
    x = jax.random.normal(jax.random.key(0), (8, 4)) + 3
    before = nnx.state(net, nnx.BatchStat)
    np.testing.assert_array_equal(apply(params, x), apply(params, x))
    jax.grad(lambda p: apply(p, x).sum())(params)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(net, nnx.BatchStat))


def test_integer_keys_and_shapes_alone_will_do():
    net = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    net.eval()
    apply, params = functional(net)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    params["layers"] = {int(k): v for k, v in params["layers"].items()}
    # Batch statistics are abstract here, so only the part without them can be evaluated.
    apply, _ = functional(net, method="features")
    out = jax.eval_shape(apply, params, jnp.ones((3, 4)))
    assert out.shape == (3, 4)


def test_wrong_trees_are_refused():
    apply, params = functional(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    x = jnp.ones((1, 2))
    with pytest.raises(ModelError, match="missing: bias"):
        apply({"kernel": params["kernel"]}, x)
    with pytest.raises(ModelError, match="unknown: scale/a"):
        apply({**params, "scale": {"a": 1.0}}, x)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, scale=1.0):
        kernel_init = linen.with_partitioning(linen.initializers.normal(), ("in", "out"))
        x = linen.Dense(4, kernel_init=kernel_init)(x)
        return linen.BatchNorm(use_running_average=True)(x) * scale


def test_linen_pair():
    x = jax.random.normal(jax.random.key(0), (3, 2))
    variables = Linen().init(jax.random.key(1), x)
    apply, params = functional((Linen(), variables))
    assert sorted(params) == ["BatchNorm_0", "Dense_0"]
    assert isinstance(params["Dense_0"]["kernel"], jax.Array)  # Taken out of its partitioning box.
    np.testing.assert_allclose(
        apply(params, x, scale=3.0), Linen().apply(variables, x, scale=3.0), rtol=1e-6
    )
    with pytest.raises(ModelError, match="no 'params' collection"):
        functional((Linen(), {"batch_stats": {}}))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda params, x: x, "needs no wrapping"),
        (Linen(), "pass the pair"),
        (3, "got int"),
        ((Linen(), 3), "got tuple"),
    ],
)
def test_everything_else_is_refused(model, message):
    with pytest.raises(ModelError, match=message):
        functional(model)
