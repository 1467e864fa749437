# notebook: 02_qat
# %% [markdown]
# # Quantization-aware training
#
# Below 4 bits, rounding a trained model costs more than GPTQ can win back. Training the model while
# it computes with rounded weights recovers much of that. Here the model that ships with jaxcomp is
# trained at 3 and at 2 bits, taught by itself: the loss is the divergence from the dense model's
# predictions, so the text needs no labels.
#
# The sizes are in `configs/examples/qat.yaml`; on the command line, or in the environment variable
# JAXCOMP_SETTINGS, they can be overridden: `python examples/qat.py steps=300 bits=[2]`.

# %%
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import jaxcomp as jc
from jaxcomp import data, demo, distillation, evaluation
from jaxcomp.diagnostics import check_finite
from jaxcomp.formats import Int
from jaxcomp.quantization import FakeQuant
from jaxcomp.recipe import KEPT
from jaxcomp.settings import read_settings

s = read_settings("configs/examples/qat.yaml")
folder = demo.tinylm()  # any supported model's folder works
model = jc.models.load(folder)
# Training needs float32: updates are smaller than the spacing of the bfloat16 that is stored.
dense = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), model.params)

# %% [markdown]
# ## Text
#
# The model was trained on the source of Python's standard library, which is at hand everywhere.
# Training batches are windows at random places; a batch depends on its number and the seed alone,
# so a run that is resumed sees what it would have seen. The held-out text is of other files.

# %%
texts, _ = data.standard_library()
text = "\n".join(texts[name] for name in sorted(texts, key=data.name_hash))
corpus = data.encode(text[: s.training_text], model.tokenizer)


def windows(name, count):
    options = {"length": s.length, "batch_size": s.batch_size, "samples": count}
    return data.batches(folder / name, model.tokenizer, **options)


calibration = windows("calibration.txt", s.calibration)
held_out = windows("heldout.txt", s.held_out)
print(f"perplexity: dense {evaluation.perplexity(model.apply, dense, held_out):.2f}")

# %% [markdown]
# ## Post-training quantization, to compare with

# %%
run = jc.dispatch(model.apply)  # the same function for compressed parameters


def gptq(bits):
    preset = {2: jc.presets.w2a16_gptq, 3: jc.presets.w3a16_gptq, 4: jc.presets.w4a16_gptq}[bits]
    recipe = preset(group_size=s.group_size)
    params = jc.compress(model.apply, dense, recipe, calibration, progress=False).params
    return evaluation.perplexity(run, params, held_out)


# %% [markdown]
# ## Training
#
# `jc.qat` turns the model function into one that computes as if quantized. The parameters stay in
# full precision; what is learned about the grids beside them is in `state.learned` and is trained
# with the parameters. `qat.apply` is an ordinary differentiable function, so the step below is an
# ordinary training step, and the loop is yours to change.


# %%
def trainer(fmt):
    """The transform, what is trained at the start, and a jitted step."""
    step = FakeQuant(format=fmt, scale=s.scale, exclude=KEPT)
    qat = jc.qat(model.apply, jc.Recipe(steps=(step,)))
    schedule = optax.warmup_cosine_decay_schedule(
        0, s.learning_rate, max(1, s.steps // 10), s.steps, 0.05 * s.learning_rate
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))

    def loss(trained, state, tokens):
        params, learned = trained
        logits, state = qat.apply(params, state.replace(learned=learned), tokens)
        teacher = model.apply(dense, tokens)
        return distillation.kl_divergence(logits, teacher).mean(), state

    @jax.jit
    def update(carry, tokens):
        trained, state, opt = carry
        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(trained, state, tokens)
        updates, opt = tx.update(grads, opt, trained)
        return (optax.apply_updates(trained, updates), state, opt), value

    state = qat.init(dense, calibration[0][0])
    trained = (dense, state.learned)
    return qat, (trained, state, tx.init(trained)), update


def train(carry, update, name):
    """Runs the steps that are left, with a checkpoint now and then if the settings name a place."""
    checkpoints, start = None, 0
    if s.checkpoint is not None:
        checkpoints = ocp.CheckpointManager(
            pathlib.Path(s.checkpoint).absolute() / name,
            options=ocp.CheckpointManagerOptions(max_to_keep=2),
        )
        if checkpoints.latest_step() is not None:
            start = checkpoints.latest_step()
            carry = checkpoints.restore(start, args=ocp.args.StandardRestore(carry))
            print(f"{name}: going on from step {start}")
    began = time.time()
    for step in range(start, s.steps):
        tokens = data.random_windows(corpus, s.length, s.batch_size, step, s.seed)
        after, value = update(carry, tokens)
        check_finite(value, step, model.apply, carry[0][0], tokens)
        carry = after
        if (step + 1) % 20 == 0 or step + 1 == s.steps:
            pace = (time.time() - began) / (step + 1 - start)
            print(f"{name}: step {step + 1}, loss {value:.4f}, {pace:.2f} s a step", flush=True)
        if checkpoints is not None and (step + 1) % s.checkpoint_every == 0:
            checkpoints.save(step + 1, args=ocp.args.StandardSave(carry))
    if checkpoints is not None:
        checkpoints.close()
    return carry


# %% [markdown]
# ## Convert, save, load, run
#
# `qat.convert` packs the trained weights: the same arrays that post-training quantization makes.
# They are saved and loaded like any compressed model, and `jc.dispatch` runs them.

# %%
for bits in s.bits:
    fmt = Int(bits, s.group_size, scale_dtype="bfloat16")
    qat, carry, update = trainer(fmt)
    (params, learned), state, _ = train(carry, update, f"w{bits}")
    packed = qat.convert(params, state.replace(learned=learned))
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "model"
        jc.save(path, jc.Result(packed, jc.Report(), qat.recipe))
        loaded = jc.load(path).params
    trained = evaluation.perplexity(run, loaded, held_out)
    leaves = jax.tree.leaves(loaded, is_leaf=jc.formats.is_compressed)
    leaves = [leaf for leaf in leaves if jc.formats.is_compressed(leaf)]
    width = jc.nbits(leaves) / sum(leaf.size for leaf in leaves)
    print(
        f"perplexity: {width:.2f} bits a weight: GPTQ {gptq(bits):.2f}, QAT {trained:.2f}",
        flush=True,
    )
