# notebook: 05_qlora
# %% [markdown]
# # QLoRA
#
# A model whose weights are stored in four bits is adapted to new text without touching them: a
# trainable product of two thin matrices is added to each. The model that ships with jaxcomp knows
# Python's source; here its NF4 form learns to read Python's documentation.
#
# The sizes are in `configs/examples/qlora.yaml`; on the command line, or in the environment
# variable JAXCOMP_SETTINGS, they can be overridden: `python examples/qlora.py rank=8`.

# %%
import pathlib
import tempfile
import time
from pydoc_data import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import jaxcomp as jc
from jaxcomp import data, demo, distillation, evaluation
from jaxcomp.diagnostics import check_finite
from jaxcomp.formats import Codebook
from jaxcomp.quantization import RTN, lora
from jaxcomp.recipe import KEPT
from jaxcomp.settings import read_settings

s = read_settings("configs/examples/qlora.yaml")
model = jc.models.load(demo.tinylm())  # any supported model's folder works
# Training needs float32: updates are smaller than the spacing of the bfloat16 that is stored.
dense = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), model.params)

# %% [markdown]
# ## Text
#
# The topics of Python's `help()`, one in eight held out by the hash of its name.

# %%
pages = sorted(topics.topics, key=data.name_hash)
held_out_pages = [page for page in pages if data.name_hash(page) % 8 == 0]
training = "\n".join(topics.topics[page] for page in pages if page not in held_out_pages)
corpus = data.encode(training[: s.training_text], model.tokenizer)
others = data.encode("\n".join(topics.topics[page] for page in held_out_pages), model.tokenizer)
held_out = data.group(data.windows(others, s.length, rows=s.held_out), s.batch_size)
print(f"perplexity: dense {evaluation.perplexity(model.apply, dense, held_out):.2f}")

# %% [markdown]
# ## The base
#
# NF4's sixteen levels are quantiles of a normal distribution; a scale belongs to each group of
# weights. Under double quantization the scales themselves take eight bits, which for groups of 64
# is 0.127 bits a weight instead of 0.5.

# %%
nf4 = Codebook("nf4", group_size=s.group_size, double_quantization=True)
recipe = jc.Recipe(steps=(RTN(format=nf4, exclude=KEPT),))
result = jc.compress(model.apply, dense, recipe, held_out[:1], progress=False)
base = result.params
run = jc.dispatch(model.apply)
print(f"base: {result.report.bits_per_weight:.3f} bits a weight")
print(f"perplexity: NF4 {evaluation.perplexity(run, base, held_out):.2f}")

# %% [markdown]
# ## Adapters
#
# One pytree apart from the parameters. `attach` makes each adapted weight the sum of its frozen
# base and the product, and `dispatch` sends the input through the one and through the thin
# matrices of the other. B starts at zero, so the model starts as it was.

# %%
graph = jc.trace(model.apply, base, *held_out[0])
adapters = lora.init(jax.random.key(s.seed), graph, rank=s.rank, alpha=s.alpha)
count = sum(leaf.size for leaf in jax.tree.leaves(adapters))
print(f"adapters: rank {s.rank} on {len(adapters)} weights, {count} parameters")


def loss(adapters, tokens):
    logits = run(lora.attach(base, adapters), tokens)
    return distillation.hard_cross_entropy(logits[:, :-1], tokens[:, 1:]).mean()


schedule = optax.warmup_cosine_decay_schedule(
    0, s.learning_rate, max(1, s.steps // 10), s.steps, 0.05 * s.learning_rate
)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))


@jax.jit
def update(carry, tokens):
    adapters, opt = carry
    value, grads = jax.value_and_grad(loss)(adapters, tokens)
    updates, opt = tx.update(grads, opt, adapters)
    return (optax.apply_updates(adapters, updates), opt), value


# %% [markdown]
# ## Training
#
# An ordinary loop, yours to change. A checkpoint holds the adapters and the optimizer's state, not
# the base; with one, a killed run goes on and ends with the same bits.

# %%
carry, checkpoints, start = (adapters, tx.init(adapters)), None, 0
if s.checkpoint is not None:
    checkpoints = ocp.CheckpointManager(
        pathlib.Path(s.checkpoint).absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )
    if checkpoints.latest_step() is not None:
        start = checkpoints.latest_step()
        carry = checkpoints.restore(start, args=ocp.args.StandardRestore(carry))
        print(f"going on from step {start}")
began = time.time()
for step in range(start, s.steps):
    tokens = data.random_windows(corpus, s.length, s.batch_size, step, s.seed)
    after, value = update(carry, tokens)
    check_finite(value, step, run, lora.attach(base, carry[0]), tokens)
    carry = after
    if (step + 1) % 25 == 0 or step + 1 == s.steps:
        pace = (time.time() - began) / (step + 1 - start)
        print(f"step {step + 1}, loss {value:.3f}, {pace:.2f} s a step", flush=True)
    if checkpoints is not None and (step + 1) % s.checkpoint_every == 0:
        checkpoints.save(step + 1, args=ocp.args.StandardSave(carry))
if checkpoints is not None:
    checkpoints.close()
adapters, _ = carry

# %% [markdown]
# ## Merge, count, save
#
# `merge` adds the products to the dequantized weights: the result is dense and computes what base
# and adapters computed. To stay small, keep the sum as it is: attached parameters save and load
# like any compressed model.

# %%
attached = lora.attach(base, adapters)
merged = lora.merge(base, adapters)
tuned = evaluation.perplexity(run, attached, held_out)
whole = evaluation.perplexity(model.apply, merged, held_out)
apart = np.abs(model.apply(merged, held_out[0][0]) - run(attached, held_out[0][0])).max()
print(f"perplexity: NF4 + LoRA {tuned:.2f}, merged {whole:.2f} (logits apart {apart:.0e})")

with tempfile.TemporaryDirectory() as scratch:
    path = pathlib.Path(scratch) / "model"
    jc.save(path, jc.Result(attached, result.report, recipe))
    loaded = jc.load(path).params
same = bool((run(loaded, held_out[0][0]) == run(attached, held_out[0][0])).all())
print(f"saved and loaded: {'the same logits' if same else 'other logits'}")
for name, params in {"dense": dense, "NF4": base, "NF4 + LoRA": attached}.items():
    print(f"{name}: {jc.nbits(params) / 8e6:.2f} MB")
