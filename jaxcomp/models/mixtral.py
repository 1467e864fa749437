"""The Llama family with mixtures of experts, in Flax NNX: Mixtral, Qwen3-MoE.

The attention of Llama's layers, and in place of the MLP ``y = sum over chosen e of p[e] mlp_e(x)``:
a router, in float32, chooses the ``num_experts_per_tok`` likeliest of ``num_experts`` MLPs for each
token. No token is dropped: tokens are sorted by expert, and ``jax.lax.ragged_dot`` multiplies each
run of them by its own expert's matrix, of weights stacked ``(experts, in, out)``.

Routers are small and decide much: the presets keep them dense (``*router*`` in ``exclude``).

Source: https://arxiv.org/abs/2401.04088, https://arxiv.org/abs/2505.09388.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcomp.models import layers as blocks
from jaxcomp.models import llama
from jaxcomp.models.config import Fields
from jaxcomp.models.sizes import LayerSize

PREFIX, LAYERS = llama.PREFIX, llama.LAYERS
BUFFERS, RENAMES, COPIES = llama.BUFFERS, llama.RENAMES, llama.COPIES
MODEL_TYPES = {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
# What a checkpoint calls the block, and an expert's gate, up and down projections.
SPELLINGS = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
# Which member of the Llama family has the same attention.
RELATIVES = {"mixtral": "mistral", "qwen3_moe": "qwen3"}

# Which part each weight has in ``partition_rules``. Routers are replicated.
PARTITION = (
    *(entry for entry in llama.PARTITION if "/mlp/" not in entry[0]),
    *((f"layers/*/mlp/experts/{p}_proj/kernel", "experts") for p in ("gate", "up", "down")),
)


@dataclasses.dataclass(frozen=True)
class MixtralConfig(llama.LlamaConfig):
    """Sizes and variants of a mixture of experts; ``intermediate_size`` is the width of an expert.

    Attributes:
      model_type: "mixtral" or "qwen3_moe": how a checkpoint spells the names.
      num_experts: experts of each layer.
      num_experts_per_tok: experts that each token goes through.
      norm_topk_prob: the probabilities of the chosen experts are divided by their sum.
    """

    LAYER_SIZES: ClassVar[tuple[LayerSize, ...]] = (
        *llama.LlamaConfig.LAYER_SIZES[:2],
        LayerSize("intermediate_sizes", "intermediate_size", "mlp/experts/down_proj/kernel", -2),
    )

    model_type: str = "mixtral"
    num_experts: int = 8
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True

    @property
    def json_names(self) -> dict[str, str]:
        """Sizes that config.json calls something else."""
        return (
            {} if self.model_type == "mixtral" else {"intermediate_size": "moe_intermediate_size"}
        )


def route(logits: jax.Array, count: int, normalize: bool) -> tuple[jax.Array, jax.Array]:
    """The experts of each token and how much each counts.

    Args:
      logits: ``(tokens, experts)`` floats.
      count: experts a token.
      normalize: divide the chosen experts' probabilities by their sum.

    Returns:
      Probabilities and int32 numbers of the experts, ``(tokens, count)``, the likeliest first.

    Example:
      >>> p, chosen = route(jnp.array([[1.0, -5.0, 1.0]]), 2, normalize=True)
      >>> chosen.tolist(), p.tolist()
      ([[0, 2]], [[0.5, 0.5]])
    """
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), count)
    return (weights / weights.sum(-1, keepdims=True) if normalize else weights), chosen


class Experts(nnx.Module):
    """The MLPs of all experts; their kernels are ``(experts, in, out)``."""

    def __init__(self, config: MixtralConfig, size: int, *, param_dtype, rngs: nnx.Rngs):
        """Makes the projections of ``size`` neurons an expert."""
        c = config
        out = 0.02 / math.sqrt(2 * c.num_hidden_layers)
        kw = {"param_dtype": param_dtype, "rngs": rngs}
        self.gate_proj = ExpertLinear(c.num_experts, c.hidden_size, size, **kw)
        self.up_proj = ExpertLinear(c.num_experts, c.hidden_size, size, **kw)
        self.down_proj = ExpertLinear(c.num_experts, size, c.hidden_size, stddev=out, **kw)

    def __call__(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """Maps rows ``(rows, hidden)``, sorted by expert, through their experts."""
        gate, up = self.gate_proj(x, group_sizes), self.up_proj(x, group_sizes)
        return self.down_proj(jax.nn.silu(gate) * up, group_sizes)


class ExpertLinear(nnx.Module):
    """``y[i] = x[i] @ kernel[expert of row i]``, computed in the dtype of ``x``."""

    def __init__(
        self,
        experts: int,
        in_size: int,
        out_size: int,
        *,
        stddev: float = 0.02,
        param_dtype: blocks.Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws the kernels."""
        self.kernel = blocks.normal(rngs, (experts, in_size, out_size), stddev, param_dtype)

    def __call__(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """Maps rows ``(rows, in)``, sorted by expert, to ``(rows, out)``."""
        return jax.lax.ragged_dot(x, jnp.asarray(self.kernel[...], x.dtype), group_sizes)


class SparseMLP(nnx.Module):
    """A router and its experts, in the place of an MLP."""

    def __init__(self, config: MixtralConfig, size: int, *, param_dtype, rngs: nnx.Rngs):
        """Makes the router, and experts of ``size`` neurons."""
        c, kw = config, {"param_dtype": param_dtype, "rngs": rngs}
        self.router = blocks.Linear(c.hidden_size, c.num_experts, **kw)
        self.experts = Experts(c, size, **kw)
        self.config = c

    def __call__(self, x):
        """Maps ``(..., hidden)`` to ``(..., hidden)``."""
        c = self.config
        tokens = x.reshape(-1, c.hidden_size)
        wide = tokens.astype(jnp.promote_types(x.dtype, jnp.float32))
        weights, chosen = route(self.router(wide), c.num_experts_per_tok, c.norm_topk_prob)
        # A row for each choice of each token, in the order of the experts, and the way back.
        expert = chosen.reshape(-1)
        order = jnp.argsort(expert, stable=True)
        group_sizes = jnp.bincount(expert, length=c.num_experts).astype(jnp.int32)
        rows = self.experts(tokens[order // c.num_experts_per_tok], group_sizes)
        rows = rows[jnp.argsort(order)].reshape(*chosen.shape, c.hidden_size)
        y = (rows.astype(weights.dtype) * weights[..., None]).sum(1)
        return y.astype(x.dtype).reshape(x.shape)


class SparseLayer(llama.DecoderLayer):
    """A decoder layer whose MLP is a mixture of experts."""

    mlp_type = SparseMLP


class Mixtral(llama.Llama):
    """A causal language model with mixtures of experts; made and called like ``Llama``."""

    layer_type = SparseLayer


def read_config(fields: Fields, model_type: str) -> MixtralConfig:
    """Reads a Hugging Face configuration of one of ``MODEL_TYPES``.

    Args:
      fields: the fields of config.json.
      model_type: which member of the family.

    Returns:
      The configuration.

    Raises:
      ModelError: a field is missing, wrong, unknown or not supported; among them layers without
        experts (``mlp_only_layers``, ``decoder_sparse_step``).
    """
    f = fields
    if "num_experts" in f.values and "num_local_experts" in f.values:
        raise f.error("num_experts", "is also given as num_local_experts; leave one of them")
    experts = f.size("num_experts" if "num_experts" in f.values else "num_local_experts")
    chosen = f.size("num_experts_per_tok", 2 if model_type == "mixtral" else 8)
    if chosen > experts:
        raise f.error("num_experts_per_tok", f"must be at most the {experts} experts, got {chosen}")
    # These matter to training only.
    for name in ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"):
        f.take(name, None)
    normalize = True
    if model_type == "mixtral":
        f.values.setdefault("rope_theta", 1e6)
    else:
        normalize = f.flag("norm_topk_prob", False)
        for name, everywhere in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
            value = f.take(name, everywhere)
            if value not in (everywhere, None):
                raise f.error(
                    name,
                    f"{value!r} makes some layers dense, which is not supported; supported are "
                    f"models with experts in every layer ({everywhere!r})",
                )
        # Where it differs from Qwen3: windows are in all layers or none, the MLP's width is an
        # expert's.
        f.values["max_window_layers"] = 0
        f.values["intermediate_size"] = f.size("moe_intermediate_size")
    return MixtralConfig(
        **llama.read_fields(f, RELATIVES[model_type]),
        model_type=model_type,
        num_experts=experts,
        num_experts_per_tok=chosen,
        norm_topk_prob=normalize,
    )


def tensor_names(config: MixtralConfig) -> dict[str, tuple[str | tuple[str, ...], bool]]:
    """Where each parameter of the unrolled model is in a Hugging Face checkpoint.

    Args:
      config: the model's configuration.

    Returns:
      Parameter path to (tensor name, or one for each expert; whether tensors are transposed).
    """
    c = config
    names: dict[str, tuple[str | tuple[str, ...], bool]] = {
        path: name for path, name in llama.tensor_names(c).items() if "/mlp/" not in path
    }
    block, *theirs = SPELLINGS[c.model_type]
    for i in range(c.num_hidden_layers):
        prefix = f"model.layers.{i}.{block}"
        names[f"layers/{i}/mlp/router/kernel"] = (f"{prefix}.gate.weight", True)
        for ours, name in zip(("gate_proj", "up_proj", "down_proj"), theirs, strict=True):
            experts = (f"{prefix}.experts.{e}.{name}.weight" for e in range(c.num_experts))
            names[f"layers/{i}/mlp/experts/{ours}/kernel"] = (tuple(experts), True)
    return names
