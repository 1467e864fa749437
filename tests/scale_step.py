"""One step of QAT and distillation on eight devices, for tests/test_training_at_scale.py.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.scale_step

Prints one line of JSON: losses on one device and on eight, results of collectives in the compiled
program, and what became of the shardings and the donated buffers.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcomp as jc
from jaxcomp import distillation
from jaxcomp.formats import Int
from jaxcomp.models import Llama, LlamaConfig, partition_rules
from jaxcomp.quantization import FakeQuant
from jaxcomp.step import Activation

CONFIG = LlamaConfig(64, 32, 64, 3, 4, 2, head_dim=8)
STEPS = 3


def main() -> None:
    """Trains on one device and on eight."""
    make = lambda seed: jc.functional(Llama(CONFIG, scan=True, remat=True, rngs=nnx.Rngs(seed)))  # noqa: E731
    (apply, params), (_, teacher) = make(0), make(1)
    tokens = jax.random.randint(jax.random.key(0), (8, 16), 0, 64, jnp.int32)
    step = FakeQuant(
        format=Int(4, 8, full_range=False),
        scale="learned",
        activation=Activation(),
        exclude=("*lm_head*",),
    )
    qat = jc.qat(apply, jc.Recipe(steps=(step,)))
    state = qat.init(params, tokens)
    tx = optax.adam(1e-3)

    def loss(trained, state, teacher, batch):
        weights, learned = trained
        logits, state = qat.apply(weights, state.replace(learned=learned), batch)
        target = jax.lax.stop_gradient(apply(teacher, batch))
        return distillation.kl_divergence(logits, target).mean(), state

    def update(carry, teacher, batch):
        trained, state, opt = carry
        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(
            trained, state, teacher, batch
        )
        updates, opt = tx.update(grads, opt, trained)
        return (optax.apply_updates(trained, updates), state, opt), value

    def train(function, carry, *rest):
        losses = []
        for _ in range(STEPS):
            carry, value = function(carry, *rest)
            losses.append(float(value))
        return carry, losses

    trained = (params, state.learned)
    carry = (trained, state, tx.init(trained))
    _, alone = train(jax.jit(update), carry, teacher, tokens)

    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)
    rules = partition_rules(CONFIG, tensor="model", fsdp="fsdp", scan=True)
    wanted = jc.sharding.like(carry, params, rules, mesh, state.plan)
    placed = jax.device_put(jax.tree.map(jnp.copy, carry), wanted)
    rest = (
        jc.shard(teacher, mesh, rules),
        jax.device_put(tokens, NamedSharding(mesh, PartitionSpec(("data", "fsdp")))),
    )
    whole = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(update, donate_argnums=0, out_shardings=(wanted, whole))
    compiled = jitted.lower(placed, *rest).compile()
    # Not state.learned: what is trained takes its place before it is read.
    given = jax.tree.leaves((placed[0], placed[2]))
    after, together = train(compiled, placed, *rest)
    text = compiled.as_text()
    gathers = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-to-all)", text)
    kept = jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), after, wanted)
    moments = after[2][0].mu[0]["layers"]["mlp"]["down_proj"]["kernel"]
    scales = after[0][1]["weights"]["layers/mlp/down_proj/kernel"]["scale"]
    print(
        json.dumps(
            {
                "alone": alone,
                "together": together,
                "gathers": [[int(n) for n in g.split(",") if n] for g in gathers],
                "weights": [list(np.shape(a)) for a in jax.tree.leaves(params)],
                "kept": all(jax.tree.leaves(kept)),
                "donated": all(a.is_deleted() for a in given),
                "pieces": [
                    a.size // a.addressable_shards[0].data.size
                    for a in (moments, scales, after[0][0]["embed_tokens"]["embedding"])
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
