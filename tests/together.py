"""One training step with every method in it, for tests/test_together.py and its subprocess."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcomp as jc
from jaxcomp import distillation, models, pruning
from jaxcomp.formats import Int
from jaxcomp.quantization import FakeQuant, FakeQuantValues
from jaxcomp.step import Activation
from tests.helpers import counted

VARIANTS = {
    "learned scales, static activations": FakeQuant(
        format=Int(4, 8, full_range=False),
        scale="learned",
        activation=Activation(granularity="tensor", dynamic=False),
        exclude=("*lm_head*",),
    ),
    "dynamic": FakeQuant(
        format=Int(4, 8, full_range=False), activation=Activation(), exclude=("*lm_head*",)
    ),
}
STEPS = 12


def llama(scan=True, remat=True, dtype=jnp.float32):
    config = models.llama.LlamaConfig(32, 16, 32, 2, 4, 2, head_dim=4)
    options = {"dtype": dtype, "param_dtype": dtype, "rngs": nnx.Rngs(0)}
    return jc.functional(models.llama.Llama(config, scan=scan, remat=remat, **options))


def tokens(step, rows=8):
    return jax.random.randint(jax.random.key(step), (rows, 8), 0, 32, jnp.int32)


class Everything:
    """QAT of weights, inputs and the KV cache, gates, distillation through taps, and masks."""

    def __init__(self, item, scan=True, remat=True, dtype=jnp.float32):
        self.item = item
        self.apply, self.dense = llama(scan, remat, dtype)
        tapped = jc.tap(self.apply, ["hidden"])
        cache = FakeQuantValues(include=("key", "value"), activation=item.activation)
        self.qat = jc.qat(tapped, jc.Recipe(steps=(item, cache)))
        find = lambda **options: pruning.units(self.apply, self.dense, tokens(0), **options)  # noqa: E731
        neurons = find(include="*down_proj*")
        heads = find(include="*o_proj*", kind="head", size=8)
        self.l0 = pruning.gates(neurons + heads)
        self.lagrange = pruning.lagrangian(0.4, warmup_steps=4, total_steps=STEPS)
        self.teacher = jc.tap(llama(scan, remat, dtype)[0], ["hidden"])
        labels = {
            "params": "descend",
            "learned": "descend",
            "log_alpha": "gates",
            "multipliers": "ascend",
        }
        parts = {
            "descend": optax.adamw(3e-3, weight_decay=0.1),
            "gates": optax.adam(0.1),
            "ascend": pruning.ascend(optax.sgd(0.1)),
        }
        chain = optax.chain(optax.clip_by_global_norm(1.0), optax.partition(parts, labels))
        masked = pruning.wrap(
            chain,
            pruning.GradualMagnitude(),
            pruning.schedules.cubic(0.5, end=4),
            include="params/layers/*kernel",
            stack=int(scan),
            every=2,
        )
        self.tx = optax.MultiSteps(masked, every_k_schedule=2)
        self.update = counted(self._update)

    def start(self):
        state = self.qat.init(self.dense, tokens(0))
        trained = {
            "params": self.dense,
            "learned": state.learned,
            "log_alpha": self.l0.init(jax.random.key(1)),
            "multipliers": self.lagrange.init(),
        }
        return trained, state, self.tx.init(trained)

    def loss(self, trained, state, batch, sampled=True):
        step = state.step
        key = jax.random.fold_in(jax.random.key(2), step) if sampled else None
        gated = self.l0.apply(trained["params"], trained["log_alpha"], key)
        (logits, ours), state = self.qat.apply(
            gated, state.replace(learned=trained["learned"]), batch
        )
        target, theirs = jax.lax.stop_gradient(self.teacher(self.dense, batch))
        soft = distillation.kl_divergence(logits, target, 2.0).mean()
        hard = distillation.hard_cross_entropy(logits[:, :-1], batch[:, 1:]).mean()
        features = distillation.hidden_mse(ours["hidden"], theirs["hidden"]).mean()
        sparsity = self.l0.expected_sparsity(trained["log_alpha"])
        penalty = self.lagrange.penalty(trained["multipliers"], sparsity, step)
        return 0.5 * soft + 0.5 * hard + features + penalty, state

    def _update(self, carry, batch):
        trained, state, opt = carry
        grads = jax.value_and_grad(self.loss, has_aux=True)
        (value, state), g = grads(trained, state, batch)
        updates, opt = self.tx.update(g, opt, trained)
        return (optax.apply_updates(trained, updates), state, opt), value


def _shardings(mesh, carry):
    """Weights and all that is shaped like them on their outputs, and so is what QAT learns."""

    def spec(path, leaf):
        shape, axes = jnp.shape(leaf), [None] * jnp.ndim(leaf)
        if len(shape) > 1:
            # A kernel is (*stack, in, out), a step size (*stack, out, groups).
            axis = -2 if "'learned'" in jax.tree_util.keystr(path) else -1
            if shape[axis] % 8 == 0:
                axes[axis] = "fsdp"
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(spec, carry)


def sharded():
    """Trains on one device and on eight, and compares; run in a process with eight devices."""
    assert len(jax.devices()) == 8
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    everything = Everything(VARIANTS["learned scales, static activations"], dtype=jnp.float64)
    carry = everything.start()
    places = _shardings(mesh, carry)
    spread = jax.device_put(carry, places)
    update = jax.jit(everything._update, out_shardings=(places, NamedSharding(mesh, P())))
    losses = []
    for step in range(6):
        batch = tokens(step)
        carry, value = everything.update(carry, batch)
        spread, other = update(spread, jax.device_put(batch, NamedSharding(mesh, P("fsdp"))))
        losses.append((float(value), float(other)))
    assert update._cache_size() == 1
    np.testing.assert_allclose(*np.transpose(losses), rtol=1e-7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), carry, spread)
    trained, state, _ = spread
    for path, leaves in trained["learned"]["weights"].items():
        kernel = trained["params"]
        for name in path.split("/"):
            kernel = kernel[name]
        held = leaves["scale"].addressable_shards[0].data.shape
        assert held[-2] == kernel.addressable_shards[0].data.shape[-1] == kernel.shape[-1] // 8
    # Made from sharded parameters and of sharded state, the same arrays.
    again = everything.qat.init(trained["params"], tokens(0))
    alone = everything.qat.init(carry[0]["params"], tokens(0))
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # noqa: E731
    jax.tree.map(compare, again, alone)
    packed = everything.qat.convert(trained["params"], state.replace(learned=trained["learned"]))
    expected = everything.qat.convert(
        carry[0]["params"], carry[1].replace(learned=carry[0]["learned"])
    )
    jax.tree.map(compare, jc.materialize(packed), jc.materialize(expected))
    print("sharded: ok")
