"""Small models and folders for tests, without PyTorch."""

import json
import pathlib

import jax
import numpy as np
from flax import nnx

from jaxcomp.functional import functional
from jaxcomp.io import safetensors
from jaxcomp.models import Llama, LlamaConfig, to_hf

TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    sliding_windows=(None, 4, None),
    qkv_bias=True,
    qk_norm=True,
)
PLAIN = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def write_folder(folder: pathlib.Path, dtype=np.float32, **changes) -> pathlib.Path:
    """A Hugging Face folder with a random Llama of ``PLAIN``; ``changes`` go to config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(64, 32, 48, 2, 4, 2, 8, tie_word_embeddings=True)
    _, params = functional(Llama(config, rngs=nnx.Rngs(0)))
    tensors = {k: np.asarray(v).astype(dtype) for k, v in to_hf(params, config).items()}
    safetensors.write(folder / "model.safetensors", tensors, {"format": "pt"})
    values = {k: v for k, v in {**PLAIN, **changes}.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def tokens(rows: int, length: int, vocab: int = 64) -> jax.Array:
    """Random token ids."""
    return jax.random.randint(jax.random.key(7), (rows, length), 0, vocab)
