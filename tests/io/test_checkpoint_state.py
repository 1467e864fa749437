"""Training state in checkpoints: resumed bit for bit, and templates that do not fit."""

import re
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

import jaxcomp as jc
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import Int
from jaxcomp.quantization import FakeQuant
from jaxcomp.recipe import Recipe


class Carry(NamedTuple):
    params: object
    qat: object
    optimizer: object
    key: jax.Array
    step: int
    best: np.ndarray


def model(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


@pytest.fixture(scope="module")
def training():
    """A fresh carry and a step of QAT with adam and pruning; everything that has a state."""
    qat = jc.qat(model, Recipe(steps=(FakeQuant(format=Int(bits=4), scale="learned"),)))
    tx = jc.pruning.wrap(optax.adam(1e-2), jc.pruning.GradualMagnitude(), 0.5, every=2)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((16, 8)), jnp.float32)

    def start(seed=0):
        keys = jax.random.split(jax.random.key(seed), 3)
        params = {
            "up": jax.random.normal(keys[0], (8, 16)),
            "down": jax.random.normal(keys[1], (16, 4)),
        }
        state = qat.init(params, x)
        trained = {"params": params, "learned": state.learned}
        return Carry(params, state, tx.init(trained), keys[2], 0, np.float64([np.inf, 1 / 3]))

    @jax.jit
    def update(params, state, optimizer, key):
        key, noise = jax.random.split(key)
        inputs = x + 0.1 * jax.random.normal(noise, x.shape)

        def loss(trained):
            out, after = qat.apply(
                trained["params"], state.replace(learned=trained["learned"]), inputs
            )
            return jnp.mean((out - jnp.sin(x[:, :4])) ** 2), after

        trained = {"params": params, "learned": state.learned}
        gradients, after = jax.grad(loss, has_aux=True)(trained)
        updates, optimizer = tx.update(gradients, optimizer, trained)
        trained = optax.apply_updates(trained, updates)
        return trained["params"], after.replace(learned=trained["learned"]), optimizer, key

    def step(carry):
        return Carry(*update(*carry[:4]), carry.step + 1, carry.best)

    return start, step


def bits_of(tree):
    def one(leaf):
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return type(leaf), np.asarray(leaf).dtype, np.asarray(leaf).tobytes()

    return jax.tree.structure(tree), [one(leaf) for leaf in jax.tree.leaves(tree)]


def test_training_resumes_bit_for_bit(training, tmp_path):
    start, step = training
    carry = step(step(step(start())))
    jc.save(tmp_path / "out", state=carry)
    straight = step(step(carry))
    # As in a new process: the template is another seed's beginning.
    loaded = jc.load(tmp_path / "out", like=start(seed=1))
    assert loaded.params is None
    assert bits_of(loaded.state) == bits_of(carry)
    assert loaded.state.step == 3 and isinstance(loaded.state.best, np.ndarray)
    assert bits_of(step(step(loaded.state))) == bits_of(straight)
    # Shapes are template enough.
    shapes = jax.eval_shape(lambda: start()[:4])
    assert bits_of(jc.load(tmp_path / "out", like=Carry(*shapes, 0, carry.best)).state) == bits_of(
        carry
    )


def test_model_and_state_in_one_checkpoint(tmp_path):
    params = {"w": jnp.arange(4.0), "state:x": jnp.ones(1)}
    jc.save(tmp_path / "out", SimpleNamespace(params=params), state={"w": jnp.zeros(3)})
    loaded = jc.load(tmp_path / "out", include=["state:x"], like={"w": jnp.ones(3)})
    assert isinstance(loaded.params["w"], jax.ShapeDtypeStruct)
    np.testing.assert_array_equal(loaded.state["w"], np.zeros(3))
    assert jc.load(tmp_path / "out").state is None


def test_the_template_says_where_arrays_go(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("a",))
    split, whole = jax.NamedSharding(mesh, P("a")), jax.NamedSharding(mesh, P())
    w, key = np.arange(8, dtype=np.float32), jax.random.key(3)
    jc.save(tmp_path / "out", state={"w": jax.device_put(w, split), "key": key})
    like = {
        "w": jax.ShapeDtypeStruct((8,), np.float32, sharding=whole),
        "key": jax.device_put(jax.random.key(0), whole),
    }
    state = jc.load(tmp_path / "out", like=like).state
    assert state["w"].sharding == whole and state["key"].sharding == whole
    np.testing.assert_array_equal(state["w"], w)
    assert bits_of(state["key"]) == bits_of(key)
    like = {"w": jax.device_put(jnp.ones(8), split), "key": jax.random.key(0)}
    state = jc.load(tmp_path / "out", like=like).state
    assert state["w"].sharding == split and not state["key"].committed


@pytest.mark.parametrize(
    "like, said",
    [
        ({"w": np.zeros(3), "step": 0}, "holds 'adam/mu', which like= has not"),
        ({"w": np.zeros(3), "step": 0, "adam": {"mu": np.ones(2), "nu": 1}}, "lacks 'adam/nu'"),
        (
            {"w": np.zeros(4), "step": 0, "adam": {"mu": np.ones(2)}},
            "'w' was saved as float64 (3,), and like= has float64 (4,) there",
        ),
        (
            {"w": np.zeros(3, np.float32), "step": 0, "adam": {"mu": np.ones(2)}},
            "'w' was saved as float64 (3,), and like= has float32 (3,) there",
        ),
        (
            {"w": np.zeros(3), "step": np.int32(0), "adam": {"mu": np.ones(2)}},
            "'step' was saved as int, and like= has int32 () there",
        ),
    ],
)
def test_a_template_that_differs_is_told_where(tmp_path, like, said):
    jc.save(tmp_path / "out", state={"w": np.zeros(3), "step": 3, "adam": {"mu": np.ones(2)}})
    with pytest.raises(JaxcompError, match=re.escape(said)):
        jc.load(tmp_path / "out", like=like)


def test_what_is_given_in_the_wrong_place(tmp_path):
    train = TrainState.create(apply_fn=model, params={"w": jnp.ones(2)}, tx=optax.adam(0.1))
    with pytest.raises(JaxcompError, match=r"a TrainState holds the state.*give it as state="):
        jc.save(tmp_path / "out", train)
    with pytest.raises(JaxcompError, match=r"nothing to save"):
        jc.save(tmp_path / "out")
    with pytest.raises(JaxcompError, match=r"a dict has no params.*state="):
        jc.save(tmp_path / "out", {"w": jnp.ones(2)})
    with pytest.raises(JaxcompError, match=r"state fn: a function cannot be stored"):
        jc.save(tmp_path / "out", state={"fn": model})
    assert not list(tmp_path.iterdir())
    jc.save(tmp_path / "out", state=train)
    loaded = jc.load(tmp_path / "out", like=train.replace(params={"w": jnp.zeros(2)})).state
    assert bits_of(loaded) == bits_of(train)
    jc.save(tmp_path / "model", SimpleNamespace(params=train.params))
    with pytest.raises(JaxcompError, match=r"holds no training state"):
        jc.load(tmp_path / "model", like=train)
