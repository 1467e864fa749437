"""GPT-2 in Flax NNX.

Pre-norm decoder layers with layer norms, learned positions, one projection to q, k and v, and a
GELU MLP.

Source: https://openai.com/index/better-language-models/ (Radford et al. 2019).
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxcomp.models import layers as blocks
from jaxcomp.models.attention import DEFAULT, Attending, attend
from jaxcomp.models.cache import init_cache
from jaxcomp.models.config import Fields
from jaxcomp.models.sizes import LayerSize, common_sizes, layer_sizes

MODEL_TYPES = {"gpt2": "GPT2LMHeadModel"}
PREFIX = "transformer."
LAYERS = "h"
COPIES = {"lm_head.weight": "transformer.wte.weight"}
BUFFERS = (".attn.bias", ".attn.masked_bias")
RENAMES: dict[str, str] = {}
ACTIVATIONS = {
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}

# Which part each weight has in ``partition_rules``. Few numbers of devices divide the vocabulary.
# q, k and v are one kernel, so that its outputs move between devices before the attention.
PARTITION = (
    ("wte/embedding", "features"),
    ("lm_head/kernel", "row"),
    ("h/*/attn/c_attn/kernel", "column"),
    ("h/*/attn/c_attn/bias", "bias"),
    ("h/*/attn/c_proj/kernel", "row"),
    ("h/*/mlp/c_fc/kernel", "column"),
    ("h/*/mlp/c_fc/bias", "bias"),
    ("h/*/mlp/c_proj/kernel", "row"),
)


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Sizes and variants of a GPT-2, named as in Hugging Face configs.

    Attributes:
      vocab_size: rows of the token embedding.
      n_positions: rows of the position embedding, the longest sequence.
      n_embd: width of the residual stream.
      n_layer: decoder layers.
      n_head: attention heads; ``n_embd`` divided by it is the size of a head.
      n_inner: width of the MLP.
      layer_norm_epsilon: epsilon of the norms.
      activation_function: one of ``ACTIVATIONS``.
      tie_word_embeddings: the head is the token embedding.
      heads_per_layer: heads of each layer, where some were removed; empty means all.
      intermediate_sizes: width of each layer's MLP, where they differ; empty means all alike.
    """

    LAYERS: ClassVar[str] = LAYERS
    DEPTH: ClassVar[str] = "n_layer"
    LAYER_SIZES: ClassVar[tuple[LayerSize, ...]] = (
        LayerSize("heads_per_layer", "n_head", "attn/c_proj/kernel", -2, True, False),
        LayerSize("intermediate_sizes", "n_inner", "mlp/c_proj/kernel", -2),
    )

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    layer_norm_epsilon: float = 1e-5
    activation_function: str = "gelu_new"
    tie_word_embeddings: bool = True
    heads_per_layer: tuple[int, ...] = ()
    intermediate_sizes: tuple[int, ...] = ()

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers."""
        return self.n_layer

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.n_embd // self.n_head

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence."""
        return self.n_positions

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, heads (those of the layer with most) and head size of a key-value cache."""
        return self.n_layer, max(heads for heads, _ in layer_sizes(self)), self.head_dim


class Attention(nnx.Module):
    """Multi-head attention with one projection to q, k and v."""

    def __init__(self, config: GPT2Config, heads: int, *, param_dtype, rngs: nnx.Rngs):
        """Makes the projections."""
        c, width = config, heads * config.head_dim
        kw = {"bias": True, "param_dtype": param_dtype, "rngs": rngs}
        out = 0.02 / math.sqrt(2 * c.n_layer)
        self.c_attn = blocks.Linear(c.n_embd, 3 * width, **kw)
        self.c_proj = blocks.Linear(width, c.n_embd, stddev=out, **kw)
        self.head_dim = c.head_dim

    def __call__(self, x, attend, cache=None):
        """Attends; returns the output and the updated cache, None without one."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = blocks.named(*(a.reshape(shape) for a in jnp.split(self.c_attn(x), 3, axis=-1)))
        out, cache = attend(q, k, v, cache)
        return self.c_proj(out), cache


class MLP(nnx.Module):
    """``c_proj(activation(c_fc(x)))``."""

    def __init__(self, config: GPT2Config, size: int, *, param_dtype, rngs: nnx.Rngs):
        """Makes the projections."""
        c = config
        kw = {"bias": True, "param_dtype": param_dtype, "rngs": rngs}
        self.c_fc = blocks.Linear(c.n_embd, size, **kw)
        self.c_proj = blocks.Linear(size, c.n_embd, stddev=0.02 / math.sqrt(2 * c.n_layer), **kw)
        self.activation = c.activation_function

    def __call__(self, x):
        """Maps ``(..., n_embd)`` to ``(..., n_embd)``."""
        return self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x)))


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and around a residual connection."""

    def __init__(self, config: GPT2Config, sizes: tuple[int, ...], *, param_dtype, rngs: nnx.Rngs):
        """Makes the layer; ``sizes`` are its heads and MLP width."""
        c, (heads, width) = config, sizes
        self.ln_1 = blocks.LayerNorm(c.n_embd, c.layer_norm_epsilon, param_dtype=param_dtype)
        self.attn = Attention(c, heads, param_dtype=param_dtype, rngs=rngs)
        self.ln_2 = blocks.LayerNorm(c.n_embd, c.layer_norm_epsilon, param_dtype=param_dtype)
        self.mlp = MLP(c, width, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x, attend, cache=None):
        """Returns the new residual stream and the updated cache."""
        y, cache = self.attn(self.ln_1(x), attend, cache)
        x = x + y
        return x + self.mlp(self.ln_2(x)), cache


class GPT2(nnx.Module):
    """A GPT-2 language model."""

    def __init__(
        self,
        config: GPT2Config,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        scan: bool = False,
        remat: bool = False,
        attention: Attending = DEFAULT,
        rngs: nnx.Rngs,
    ):
        """Makes a model with random weights; arguments as of ``Llama``."""
        c = config
        kw = {"param_dtype": param_dtype, "rngs": rngs}
        self.wte = blocks.Embedding(c.vocab_size, c.n_embd, **kw)
        self.wpe = blocks.Embedding(c.n_positions, c.n_embd, **kw)

        def make(rngs, sizes):
            return Block(c, sizes, param_dtype=param_dtype, rngs=rngs)

        if scan:
            make = functools.partial(make, sizes=common_sizes(c))
            self.h = blocks.stack_layers(make, c.n_layer, rngs)
        else:
            self.h = nnx.List([make(rngs, sizes) for sizes in layer_sizes(c)])
        self.ln_f = blocks.LayerNorm(c.n_embd, c.layer_norm_epsilon, param_dtype=param_dtype)
        if not c.tie_word_embeddings:
            self.lm_head = blocks.Linear(c.n_embd, c.vocab_size, **kw)
        self.config, self.dtype, self.remat = c, jnp.dtype(dtype), remat
        self.attention = attention

    def init_cache(
        self,
        batch: int,
        length: int,
        dtype: Any = None,
        spec: PartitionSpec | None = None,
        *,
        empty: bool = False,
    ) -> dict[str, Any]:
        """An empty key-value cache; arguments as of ``Llama.init_cache``."""
        dtype = dtype or self.dtype
        return init_cache(self.config.cache_shape, batch, length, dtype, spec, empty=empty)

    def __call__(self, tokens, positions=None, cache=None):
        """Logits of the next token at every position; arguments and results as of ``Llama``."""
        order = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        order = order if cache is None else order + cache["length"]
        positions = order if positions is None else positions
        keys = tokens.shape[1] if cache is None else cache["k"].shape[2]
        blocks.check_length(keys, self.config.n_positions)
        attending = functools.partial(attend, order=order, how=self.attention)

        def body(layer, x, item, cache):
            del item
            return layer(x, attending, cache)

        x = self.wte(tokens, self.dtype) + self.wpe(positions, self.dtype)
        x, cache = blocks.run_layers(self.h, body, x, None, cache, remat=self.remat)
        x = self.ln_f(x)
        logits = self.wte.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        if cache is None:
            return logits
        return logits, cache | {"length": cache["length"] + tokens.shape[1]}


def read_config(fields: Fields, model_type: str) -> GPT2Config:
    """Reads a Hugging Face configuration of GPT-2.

    Args:
      fields: the fields of config.json.
      model_type: "gpt2".

    Returns:
      The configuration.

    Raises:
      ModelError: a field is missing, wrong, unknown or not supported.
    """
    del model_type
    f = fields
    width, heads = f.size("n_embd"), f.size("n_head")
    if width % heads:
        raise f.error("n_head", f"{heads} must divide the width {width}")
    f.only("scale_attn_weights", True)
    f.only("scale_attn_by_inverse_layer_idx", False)
    f.take("reorder_and_upcast_attn", False)  # An order of operations, not another result.
    positions = f.size("n_positions")
    f.only("n_ctx", positions)  # An old name of n_positions.
    layers = f.size("n_layer")
    config = GPT2Config(
        vocab_size=f.size("vocab_size"),
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_inner=f.size("n_inner", 4 * width),
        layer_norm_epsilon=f.number("layer_norm_epsilon", 1e-5),
        activation_function=f.only("activation_function", *ACTIVATIONS),
        tie_word_embeddings=f.flag("tie_word_embeddings", True),
        heads_per_layer=f.sizes("heads_per_layer", layers),
        intermediate_sizes=f.sizes("intermediate_sizes", layers),
    )
    f.done()
    return config


def tensor_names(config: GPT2Config) -> dict[str, tuple[str, bool]]:
    """Where each parameter of the unrolled model is in a Hugging Face checkpoint.

    Args:
      config: the model's configuration.

    Returns:
      Parameter path to (tensor name, whether the tensor is stored transposed).
    """
    names = {
        "wte/embedding": ("transformer.wte.weight", False),
        "wpe/embedding": ("transformer.wpe.weight", False),
        "ln_f/scale": ("transformer.ln_f.weight", False),
        "ln_f/bias": ("transformer.ln_f.bias", False),
    }
    if not config.tie_word_embeddings:
        names["lm_head/kernel"] = ("lm_head.weight", True)
    for i in range(config.n_layer):
        for norm in ("ln_1", "ln_2"):
            for ours, theirs in (("scale", "weight"), ("bias", "bias")):
                names[f"h/{i}/{norm}/{ours}"] = (f"transformer.h.{i}.{norm}.{theirs}", False)
        for linear in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"):
            for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
                name = f"transformer.h.{i}.{linear.replace('/', '.')}.{theirs}"
                names[f"h/{i}/{linear}/{ours}"] = (name, False)  # Stored (in, out) already.
    return names
