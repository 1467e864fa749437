"""Models by name: the fields of their published ``config.json``, so that no file is needed."""

import json
import pathlib
from typing import Any

from jaxcomp.errors import ModelError
from jaxcomp.models import read_config
from jaxcomp.models.config import read_json
from jaxcomp.models.loading import parse_config

_LLAMA3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


_LONG = {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_act": "silu",
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
_QWEN3_MOE: dict[str, Any] = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
# Source: config.json of meta-llama/Meta-Llama-3-8B, -3-70B, Llama-3.1-405B, Qwen/Qwen3-8B, -32B,
# -30B-A3B, mistralai/Mixtral-8x7B-v0.1.
NAMED: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA3 | _sizes(4096, 14336, 32, 32),
    "llama-3-70b": _LLAMA3 | _sizes(8192, 28672, 80, 64),
    "llama-3.1-405b": _LLAMA3 | _LONG | _sizes(16384, 53248, 126, 128),
    "qwen3-8b": _QWEN3 | _sizes(4096, 12288, 36, 32),
    "qwen3-32b": _QWEN3 | _sizes(5120, 25600, 64, 64),
    "mixtral-8x7b": _MIXTRAL | _sizes(4096, 14336, 32, 32),
    "qwen3-30b-a3b": _QWEN3_MOE | _sizes(2048, 6144, 48, 32),
}


def fields_of(model: str) -> dict[str, Any]:
    """The fields of a model's ``config.json``.

    Args:
      model: a name of ``NAMED``, a ``config.json``, or a folder that has one.

    Returns:
      The fields.

    Raises:
      ModelError: it is none of these.

    Example:
      >>> fields_of("llama-3-8b")["num_hidden_layers"]
      32
    """
    if model.lower() in NAMED:
        return dict(NAMED[model.lower()])
    path = pathlib.Path(model)
    if path.is_dir():
        read_config(path)  # Errors that name the file.
        return read_json(path / "config.json")
    if path.is_file():
        return read_json(path)
    raise ModelError(
        f"model {model!r}: is neither a folder with a config.json, nor such a file, nor one of "
        f"{', '.join(NAMED)}."
    )


def config_from(fields: dict[str, Any], where: str) -> Any:
    """The configuration that fields of a ``config.json`` describe.

    Args:
      fields: as ``fields_of`` returned them.
      where: name of the model, for errors.

    Returns:
      A model's configuration.

    Raises:
      ModelError: a field is wrong, or the model is of a kind that generates no text.
    """
    config, _ = parse_config(json.loads(json.dumps(fields)), where)
    if not hasattr(config, "cache_shape"):
        raise ModelError(
            f"model {where}: a {type(config).__name__.removesuffix('Config')} has no key-value "
            "cache, so there is no decode step to plan; plan takes causal language models."
        )
    return config
