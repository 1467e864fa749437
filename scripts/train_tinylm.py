"""Trains the small language model that ships in jaxcomp/assets/tinylm.

A Llama with 3.7 million parameters and a byte-level BPE tokenizer of 2048 tokens, on the source of
the Python standard library of the interpreter that runs this script (without its tests and its
generated tables). One file in fourteen, chosen by the hash of its name, is held out.

    python scripts/train_tinylm.py --work build/tinylm [--output FOLDER] [--steps 4000]

It resumes from its last checkpoint in --work, and rewrites the output folder every few minutes.
"""

import argparse
import json
import os
import pathlib
import pickle
import platform
import sys
import sysconfig
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import tokenizers
from flax import nnx

from jaxcomp.data import name_hash, standard_library
from jaxcomp.io import safetensors
from jaxcomp.models.llama import Llama, LlamaConfig, tensor_names

SEPARATOR = "<|endoftext|>"
CARD = """\
# tinylm

A Llama of 3.7 million parameters (4 layers, 256 wide, 4 query and 2 key-value heads, byte-level BPE
of 2048 tokens, context 256) trained on the source of the Python standard library, small enough to
ship and good enough for compression to hurt. `scripts/train_tinylm.py` makes this folder anew.

`calibration.txt` is from files it was trained on, `heldout.txt` from files it has never seen. Both
are excerpts of the Python standard library, under the licence in LICENSE.txt.
"""
CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)


def train_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def excerpt(sources: dict[str, str], limit: int, each: int) -> str:
    """Beginnings of files in the order of their hashes, cut at line ends, up to ``limit`` bytes."""
    pieces, size = [], 0
    for name in sorted(sources, key=lambda n: name_hash("excerpt/" + n)):
        text = sources[name]
        if len(text) > each:  # From the middle of a file: beginnings are licences and imports.
            start = text.index("\n", (len(text) - each) // 2) + 1
            text = text[start : start + each]
            text = text[: text.rindex("\n") + 1]
        length = len((text + SEPARATOR).encode())
        if size + length > limit:
            continue
        pieces.append(text)
        size += length
    return SEPARATOR.join(pieces)


def write_text(path: pathlib.Path, text: str | bytes) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_bytes(text.encode() if isinstance(text, str) else text)
    os.replace(temporary, path)


def write_folder(output: pathlib.Path, tokenizer, train, heldout) -> None:
    """Everything of the shipped folder but the weights."""
    c = CONFIG
    output.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_position_embeddings,
        "mlp_bias": False,
        "num_attention_heads": c.num_attention_heads,
        "num_hidden_layers": c.num_hidden_layers,
        "num_key_value_heads": c.num_key_value_heads,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": c.vocab_size,
    }
    write_text(output / "config.json", json.dumps(config, indent=2) + "\n")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SEPARATOR,
        "eos_token": SEPARATOR,
        "model_max_length": c.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    write_text(output / "tokenizer_config.json", json.dumps(tokenizer_config, indent=2) + "\n")
    write_text(output / "tokenizer.json", tokenizer.to_str())
    generation = {"bos_token_id": 0, "eos_token_id": 0}
    write_text(output / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    write_text(output / "calibration.txt", excerpt(train, 130_000, 6_000))
    write_text(output / "heldout.txt", excerpt(heldout, 280_000, 12_000))
    licence = pathlib.Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    notice = (
        f"calibration.txt and heldout.txt are excerpts of the Python {platform.python_version()} "
        "standard library; the model and the tokenizer\nwere trained on its text. "
        "Copyright (c) Python Software Foundation; all rights reserved. Licence follows.\n\n"
    )
    body = licence.read_text() if licence.exists() else "https://docs.python.org/3/license.html\n"
    write_text(output / "LICENSE.txt", notice + body)
    write_text(output / "README.md", CARD)


def write_weights(output: pathlib.Path, params: dict) -> None:
    flat = {
        "/".join(str(getattr(k, "key", k)) for k in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    tensors = {}
    for path, (name, transposed) in tensor_names(CONFIG).items():
        value = np.asarray(flat.pop(path)).astype(ml_dtypes.bfloat16)
        tensors[name] = value.T if transposed else value
    assert not flat, sorted(flat)
    safetensors.write(output / "model.safetensors", tensors, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=pathlib.Path, required=True, help="for checkpoints")
    default = pathlib.Path(__file__).parents[1] / "jaxcomp" / "assets" / "tinylm"
    parser.add_argument("--output", type=pathlib.Path, default=default)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--every", type=int, default=100, help="steps between snapshots")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    train, heldout = standard_library()
    tokenizer_path = args.work / "tokenizer.json"
    if tokenizer_path.exists():
        tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_path))
    else:
        tokenizer = train_tokenizer(list(train.values()))
        tokenizer.save(str(tokenizer_path))
    write_folder(args.output, tokenizer, train, heldout)

    def encode(text):
        return np.asarray(tokenizer.encode(text).ids, np.int32)

    order = sorted(train, key=name_hash)
    tokens = np.concatenate([encode(SEPARATOR + train[name]) for name in order])
    heldout_tokens = encode((args.output / "heldout.txt").read_text())
    length = CONFIG.max_position_embeddings
    rows = len(heldout_tokens) // length
    heldout_rows = heldout_tokens[: rows * length].reshape(rows, length)
    print(
        f"{len(train)} files, {len(tokens)} training tokens; {len(heldout)} files held out, "
        f"{len(heldout_tokens)} tokens of them in heldout.txt; {sys.version}",
        flush=True,
    )

    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model, nnx.Param)
    params = state.to_pure_dict()
    print(sum(x.size for x in jax.tree.leaves(params)), "parameters", flush=True)
    # Warm-up, constant, then a linear decay over the last 40%: --steps can still be changed on a
    # resumed run that has not reached the decay.
    rate, decay = args.learning_rate, max(1, 2 * args.steps // 5)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, rate, 100),
            optax.constant_schedule(rate),
            optax.linear_schedule(rate, 0.03 * rate, decay),
        ],
        [100, args.steps - decay],
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule, b2=0.95, weight_decay=0.1,
            mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
        ),
    )  # fmt: skip

    def loss_fn(params, batch):
        state = nnx.split(model, nnx.Param)[1]
        state.replace_by_pure_dict(params)
        logits = nnx.merge(graph, state)(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    def train_step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    train_step = jax.jit(train_step, donate_argnums=(0, 1))
    evaluate = jax.jit(loss_fn)

    def heldout_loss(params):
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
        whole = len(heldout_rows) // 16 * 16
        batches = heldout_rows[:whole].reshape(-1, 16, length)
        return float(np.mean([evaluate(params, b) for b in batches]))

    opt_state, start = optimizer.init(params), 0
    checkpoint = args.work / "checkpoint.pkl"
    if checkpoint.exists():
        start, params, opt_state = pickle.loads(checkpoint.read_bytes())
        params, opt_state = jax.tree.map(jnp.asarray, (params, opt_state))
        print("resumed at step", start, flush=True)

    began, losses = time.time(), []
    for step in range(start, args.steps):
        # Windows drawn anew at each step from a key of its own: a resumed run sees the same data.
        rng = np.random.default_rng((0, step))
        starts = rng.integers(0, len(tokens) - length - 1, args.batch)
        batch = np.stack([tokens[s : s + length + 1] for s in starts])
        params, opt_state, loss = train_step(params, opt_state, batch)
        losses.append(float(loss))
        if (step + 1) % 10 == 0:
            seconds = (time.time() - began) / (step + 1 - start)
            print(
                f"step {step + 1} loss {np.mean(losses[-10:]):.4f} {seconds:.2f} s/step "
                f"{seconds * (args.steps - step - 1) / 60:.0f} min left",
                flush=True,
            )
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            write_text(checkpoint, pickle.dumps(jax.device_get((step + 1, params, opt_state))))
            write_weights(args.output, params)
            if (step + 1) % (2 * args.every) == 0 or step + 1 == args.steps:
                loss = heldout_loss(params)
                print(f"held out: {loss:.4f} nats, perplexity {np.exp(loss):.3f}", flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main()
