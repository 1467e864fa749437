# notebook: 04_distill
# %% [markdown]
# # Distillation into half the depth
#
# A student with every other layer of the model that ships with jaxcomp learns from the whole model:
# from its predictions, from its hidden states, and from the text. The same student trained on the
# text alone, as long and on the same batches, is the yardstick.
#
# The sizes are in `configs/examples/distill.yaml`; on the command line, or in the environment
# variable JAXCOMP_SETTINGS, they can be overridden: `python examples/distill.py steps=300`.

# %%
import dataclasses
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
from jaxcomp.settings import read_settings

s = read_settings("configs/examples/distill.yaml")
folder = demo.tinylm()  # any supported model's folder works
teacher = jc.models.load(folder)
# Training needs float32: updates are smaller than the spacing of the bfloat16 that is stored.
dense = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), teacher.params)

texts, _ = data.standard_library()
text = "\n".join(texts[name] for name in sorted(texts, key=data.name_hash))
corpus = data.encode(text[: s.training_text], teacher.tokenizer)
held_out = data.batches(
    folder / "heldout.txt",
    teacher.tokenizer,
    length=s.length,
    batch_size=s.batch_size,
    samples=s.held_out,
)
print(f"perplexity: dense {evaluation.perplexity(teacher.apply, dense, held_out):.2f}")


def batch(step):
    return data.random_windows(corpus, s.length, s.batch_size, step, s.seed)


# %% [markdown]
# ## The student
#
# It starts from every second layer of the teacher. `layer_map` says which layer of the teacher each
# of its layers is to end up with: its first with the second, its last with the last.

# %%
depth = teacher.config.num_hidden_layers
layer_map = distillation.uniform_map(depth // 2, depth)
config = dataclasses.replace(teacher.config, num_hidden_layers=depth // 2)
student, _ = jc.functional(jc.models.build(config))
layers = {str(m): dense["layers"][str(2 * m)] for m in range(depth // 2)}
small = {**dense, "layers": layers}
print(f"layer map: {layer_map}")
print(f"perplexity: student before training {evaluation.perplexity(student, small, held_out):.2f}")

# %% [markdown]
# ## The loss
#
# Losses are plain functions of arrays. `jc.tap` makes either model return what its code names
# "hidden", the residual stream after each layer, or any matmul's result by the path of its weight,
# so models of different code can be paired. `distill` joins the terms under weights that may be
# schedules of the step; the teacher runs inside the same jitted step and gets no gradients.

# %%
mix = distillation.annealed_weight(s.soft_start, s.soft_end, s.steps)


def hard(ours, theirs, batch):
    return distillation.hard_cross_entropy(ours[0][:, :-1], batch[0][:, 1:]).mean()


def soft(ours, theirs, batch):
    return distillation.kl_divergence(ours[0], theirs[0], s.temperature).mean()


def hidden(ours, theirs, batch):
    pairs = distillation.pair_taps(ours[1], theirs[1], "hidden", layer_map)
    return sum(distillation.cosine_loss(u, v).mean() for u, v in pairs.values()) / len(pairs)


def tokens_of(batch):
    return batch[:1]


with_teacher = distillation.distill(
    jc.tap(student, ["hidden"]),
    jc.tap(teacher.apply, ["hidden"]),
    {"hard": hard, "soft": soft, "hidden": hidden},
    {"hard": lambda step: 1 - mix(step), "soft": mix, "hidden": s.hidden_weight},
    inputs=tokens_of,
)
alone = distillation.distill(
    lambda params, tokens: (student(params, tokens),), None, {"hard": hard}, inputs=tokens_of
)

# %% [markdown]
# ## A teacher on disk
#
# A teacher that does not fit beside the student, or that serves many runs, is evaluated once: the k
# most likely tokens of each position and the mass of the rest are written to a folder. The writer
# goes on where a killed run stopped, and the reader refuses logits of another teacher or other
# data.


# %%
def write_logits(path):
    fingerprint = distillation.fingerprint(dense)
    batches = f"{distillation.fingerprint(corpus)} {s.seed}"
    shape = (s.batch_size, s.length)

    @jax.jit
    def logits(tokens):
        return distillation.compress_logits(teacher.apply(dense, tokens), s.top_k, s.temperature)

    with distillation.TopKWriter(
        path,
        record_shape=shape,
        vocab_size=teacher.config.vocab_size,
        k=s.top_k,
        teacher=fingerprint,
        data=batches,
        temperature=s.temperature,
        dtype="float16",
    ) as writer:
        for step in range(len(writer), s.steps):
            writer.append(logits(batch(step)))
    size = sum(file.stat().st_size for file in pathlib.Path(path).iterdir())
    print(f"top-{s.top_k} logits of {s.steps} batches: {size / 1e6:.1f} MB")
    return distillation.TopKReader(path, teacher=fingerprint, data=batches, k=s.top_k)


def streamed_soft(ours, theirs, batch):
    return distillation.topk_kl_divergence(ours[0], batch[1]).mean()


with_stream = distillation.distill(
    lambda params, tokens: (student(params, tokens),),
    None,
    {"hard": hard, "soft": streamed_soft},
    {"hard": lambda step: 1 - mix(step), "soft": mix},
    inputs=tokens_of,
)

# %% [markdown]
# ## Training
#
# An ordinary loop, yours to change. With a folder for checkpoints it goes on where a killed run
# stopped, and ends with the same bits.


# %%
def train(loss, batch_of, name):
    """Trains the student; returns its parameters."""
    schedule = optax.warmup_cosine_decay_schedule(
        0, s.learning_rate, max(1, s.steps // 10), s.steps, 0.05 * s.learning_rate
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))

    @jax.jit
    def update(carry, batch, step):
        params, opt = carry
        (_, terms), grads = jax.value_and_grad(loss, has_aux=True)(params, dense, batch, step)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), terms

    carry, checkpoints, start = (small, tx.init(small)), None, 0
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
        inputs = batch_of(step)
        after, terms = update(carry, inputs, step)
        check_finite(terms["loss"], step, student, carry[0], inputs[0])
        carry = after
        if (step + 1) % 20 == 0 or step + 1 == s.steps:
            pace = (time.time() - began) / (step + 1 - start)
            shown = ", ".join(f"{key} {float(value):.3f}" for key, value in terms.items())
            print(f"{name}: step {step + 1}, {shown}, {pace:.2f} s a step", flush=True)
        if checkpoints is not None and (step + 1) % s.checkpoint_every == 0:
            checkpoints.save(step + 1, args=ocp.args.StandardSave(carry))
    if checkpoints is not None:
        checkpoints.close()
    return carry[0]


def report(name, params):
    print(f"perplexity: {name} {evaluation.perplexity(student, params, held_out):.2f}")


report("student, text alone", train(alone, lambda step: (batch(step),), "alone"))
if s.stream:
    with tempfile.TemporaryDirectory() as scratch:
        logits = write_logits(pathlib.Path(s.checkpoint or scratch) / "logits")
        trained = train(with_stream, lambda step: (batch(step), logits[step]), "streamed")
else:
    trained = train(with_teacher, lambda step: (batch(step),), "distilled")
report("student, distilled", trained)
