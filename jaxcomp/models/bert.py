"""BERT in Flax NNX: an encoder that returns hidden states, or with its head masked-token logits.

Post-norm layers, ``norm(x + attention(x))`` then ``norm(x + mlp(x))``, over the normalized sum of
token, position and segment embeddings. The pooler, on which no hidden state depends, is left out.

Source: https://arxiv.org/abs/1810.04805.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from jaxcomp.models import layers as blocks
from jaxcomp.models.attention import DEFAULT, Attending, attention
from jaxcomp.models.config import Fields
from jaxcomp.models.gpt2 import ACTIVATIONS
from jaxcomp.models.sizes import LayerSize, common_sizes, layer_sizes

MODEL_TYPES = {"bert": "BertModel", "bert_masked_lm": "BertForMaskedLM"}
PREFIX = "bert."
LAYERS = "layers"
COPIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
# What no output depends on: buffers, the pooler, the head for next sentences.
BUFFERS = (
    "embeddings.position_ids",
    "pooler.dense.weight",
    "pooler.dense.bias",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
)
# Spellings of old checkpoints.
RENAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

# Which part each weight has in ``partition_rules``. Few numbers of devices divide the vocabulary.
PARTITION = (
    ("word_embeddings/embedding", "features"),
    *((f"layers/*/{p}/kernel", "column") for p in ("query", "key", "value", "intermediate")),
    *((f"layers/*/{p}/bias", "bias") for p in ("query", "key", "value", "intermediate")),
    ("layers/*/attention_output/kernel", "row"),
    ("layers/*/output/kernel", "row"),
)


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes and variants of a BERT, named as in Hugging Face configs.

    Attributes:
      vocab_size: rows of the token embedding.
      hidden_size: width.
      intermediate_size: width of the MLP.
      num_hidden_layers: layers.
      num_attention_heads: heads; ``hidden_size`` divided by it is the size of a head.
      max_position_embeddings: rows of the position embedding, the longest sequence.
      type_vocab_size: rows of the segment embedding.
      layer_norm_eps: epsilon of the norms.
      hidden_act: activation of the MLP.
      masked_lm_head: the model ends with the masked-token head (tied to the embedding).
      heads_per_layer: heads of each layer, where some were removed; empty means all.
      intermediate_sizes: width of each layer's MLP, where they differ; empty means all alike.
    """

    LAYERS: ClassVar[str] = LAYERS
    DEPTH: ClassVar[str] = "num_hidden_layers"
    LAYER_SIZES: ClassVar[tuple[LayerSize, ...]] = (
        LayerSize(
            "heads_per_layer", "num_attention_heads", "attention_output/kernel", -2, True, False
        ),
        LayerSize("intermediate_sizes", "intermediate_size", "output/kernel", -2),
    )

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    masked_lm_head: bool = False
    heads_per_layer: tuple[int, ...] = ()
    intermediate_sizes: tuple[int, ...] = ()

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden_size // self.num_attention_heads


class Layer(nnx.Module):
    """Attention and MLP, each followed by a residual sum and a norm."""

    def __init__(self, config: BertConfig, sizes: tuple[int, ...], *, param_dtype, rngs: nnx.Rngs):
        """Makes the layer; ``sizes`` are its heads and MLP width."""
        c, (heads, width) = config, sizes
        kw = {"bias": True, "param_dtype": param_dtype, "rngs": rngs}
        for name in ("query", "key", "value"):
            setattr(self, name, blocks.Linear(c.hidden_size, heads * c.head_dim, **kw))
        self.attention_output = blocks.Linear(heads * c.head_dim, c.hidden_size, **kw)
        self.attention_norm = blocks.LayerNorm(
            c.hidden_size, c.layer_norm_eps, param_dtype=param_dtype
        )
        self.intermediate = blocks.Linear(c.hidden_size, width, **kw)
        self.output = blocks.Linear(width, c.hidden_size, **kw)
        self.output_norm = blocks.LayerNorm(
            c.hidden_size, c.layer_norm_eps, param_dtype=param_dtype
        )
        self.head_dim, self.activation = c.head_dim, c.hidden_act

    def __call__(self, x, attending):
        """Maps ``(batch, tokens, hidden)`` to the same shape."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = blocks.named(*(p(x).reshape(shape) for p in (self.query, self.key, self.value)))
        attended = attending(q, {"k": k, "v": v})
        x = self.attention_norm(x + self.attention_output(attended))
        return self.output_norm(x + self.output(ACTIVATIONS[self.activation](self.intermediate(x))))


class Bert(nnx.Module):
    """A BERT encoder."""

    def __init__(
        self,
        config: BertConfig,
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
        norm = {"param_dtype": param_dtype}
        self.word_embeddings = blocks.Embedding(c.vocab_size, c.hidden_size, **kw)
        self.position_embeddings = blocks.Embedding(c.max_position_embeddings, c.hidden_size, **kw)
        self.token_type_embeddings = blocks.Embedding(c.type_vocab_size, c.hidden_size, **kw)
        self.embeddings_norm = blocks.LayerNorm(c.hidden_size, c.layer_norm_eps, **norm)

        def make(rngs, sizes):
            return Layer(c, sizes, param_dtype=param_dtype, rngs=rngs)

        if scan:
            make = functools.partial(make, sizes=common_sizes(c))
            self.layers = blocks.stack_layers(make, c.num_hidden_layers, rngs)
        else:
            self.layers = nnx.List([make(rngs, sizes) for sizes in layer_sizes(c)])
        if c.masked_lm_head:
            self.head_dense = blocks.Linear(c.hidden_size, c.hidden_size, bias=True, **kw)
            self.head_norm = blocks.LayerNorm(c.hidden_size, c.layer_norm_eps, **norm)
            self.head_bias = nnx.Param(jnp.zeros((c.vocab_size,), param_dtype))
        self.config, self.dtype, self.remat = c, jnp.dtype(dtype), remat
        self.attention = attention

    def __call__(self, tokens, attention_mask=None, token_types=None):
        """Hidden states, or with the head the logits, at every position.

        Args:
          tokens: ``(batch, tokens)`` int32.
          attention_mask: ``(batch, tokens)``, nonzero for tokens that may be looked at; all.
          token_types: ``(batch, tokens)`` int32 segment of each token; default zero.

        Returns:
          ``(batch, tokens, hidden)`` float32; with the head, ``(batch, tokens, vocab)``.
        """
        blocks.check_length(tokens.shape[1], self.config.max_position_embeddings)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        types = jnp.zeros_like(tokens) if token_types is None else token_types
        x = self.word_embeddings(tokens, self.dtype)
        x = x + self.position_embeddings(positions, self.dtype)
        x = self.embeddings_norm(x + self.token_type_embeddings(types, self.dtype))
        real = None if attention_mask is None else attention_mask != 0
        mask = None if real is None else real[:, None, :]
        attending = functools.partial(
            attention, mask=mask, how=self.attention, causal=False, real=real
        )

        def body(layer, x, item, cache):
            del item, cache
            return layer(x, attending), None

        x, _ = blocks.run_layers(self.layers, body, x, None, remat=self.remat)
        if self.config.masked_lm_head:
            x = self.head_norm(ACTIVATIONS[self.config.hidden_act](self.head_dense(x)))
            x = self.word_embeddings.attend(x) + jnp.asarray(self.head_bias[...], x.dtype)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def read_config(fields: Fields, model_type: str) -> BertConfig:
    """Reads a Hugging Face configuration of BERT.

    Args:
      fields: the fields of config.json.
      model_type: "bert", or "bert_masked_lm" for the model with the head.

    Returns:
      The configuration.

    Raises:
      ModelError: a field is missing, wrong, unknown or not supported.
    """
    f = fields
    hidden, heads = f.size("hidden_size"), f.size("num_attention_heads")
    if hidden % heads:
        raise f.error("num_attention_heads", f"{heads} must divide the hidden size {hidden}")
    f.only("position_embedding_type", "absolute")
    f.only("tie_word_embeddings", True)
    layers = f.size("num_hidden_layers")
    config = BertConfig(
        vocab_size=f.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=f.size("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=f.size("max_position_embeddings"),
        type_vocab_size=f.size("type_vocab_size", 2),
        layer_norm_eps=f.number("layer_norm_eps", 1e-12),
        hidden_act=f.only("hidden_act", "gelu", *sorted(ACTIVATIONS)),
        masked_lm_head=model_type == "bert_masked_lm",
        heads_per_layer=f.sizes("heads_per_layer", layers),
        intermediate_sizes=f.sizes("intermediate_sizes", layers),
    )
    f.done()
    return config


def tensor_names(config: BertConfig) -> dict[str, tuple[str, bool]]:
    """Where each parameter of the unrolled model is in a Hugging Face checkpoint.

    Args:
      config: the model's configuration.

    Returns:
      Parameter path to (tensor name, whether the tensor is stored transposed).
    """
    names = {
        f"{name}/embedding": (f"bert.embeddings.{name}.weight", False)
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
    }
    norms = {"embeddings_norm": "bert.embeddings.LayerNorm"}
    linears = {}
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers/{i}", f"bert.encoder.layer.{i}"
        for name in ("query", "key", "value"):
            linears[f"{ours}/{name}"] = f"{theirs}.attention.self.{name}"
        linears[f"{ours}/attention_output"] = f"{theirs}.attention.output.dense"
        linears[f"{ours}/intermediate"] = f"{theirs}.intermediate.dense"
        linears[f"{ours}/output"] = f"{theirs}.output.dense"
        norms[f"{ours}/attention_norm"] = f"{theirs}.attention.output.LayerNorm"
        norms[f"{ours}/output_norm"] = f"{theirs}.output.LayerNorm"
    if config.masked_lm_head:
        linears["head_dense"] = "cls.predictions.transform.dense"
        norms["head_norm"] = "cls.predictions.transform.LayerNorm"
        names["head_bias"] = ("cls.predictions.bias", False)
    for ours, theirs in linears.items():
        names[f"{ours}/kernel"] = (f"{theirs}.weight", True)
        names[f"{ours}/bias"] = (f"{theirs}.bias", False)
    for ours, theirs in norms.items():
        names[f"{ours}/scale"] = (f"{theirs}.weight", False)
        names[f"{ours}/bias"] = (f"{theirs}.bias", False)
    return names
