"""A model folder small enough for tests that go through the whole command line."""

import json
import pathlib
import shutil

import jax
import numpy as np

from jaxcomp import demo, functional, models
from jaxcomp.io import safetensors

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "vocab_size": 2048,
    "torch_dtype": "float32",
}


def make(folder: pathlib.Path, seed: int = 0, **config) -> pathlib.Path:
    """Writes a Llama with random weights and the tokenizer of the model that ships."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    shutil.copyfile(demo.tinylm() / "tokenizer.json", folder / "tokenizer.json")
    parsed, _ = models.read_config(folder)
    _, shapes = functional(models.build(parsed))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda a: (0.3 * rng.standard_normal(a.shape)).astype(np.float32), shapes)
    safetensors.write(folder / "model.safetensors", models.to_hf(params, parsed), {"format": "pt"})
    return folder


def text(path: pathlib.Path, words: int = 1000, seed: int = 0) -> pathlib.Path:
    """Writes a text of random words."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnop"))
    path.write_text(" ".join("".join(rng.choice(letters, 5)) for _ in range(words)))
    return path
