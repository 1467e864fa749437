"""The Llama family in Flax NNX: Llama 2 and 3, Mistral, Qwen2, Qwen3.

Pre-norm decoder layers, ``x + attention(norm(x))`` then ``x + mlp(norm(x))``, with RMS norms,
rotary positions, grouped-query attention and ``mlp(x) = down(silu(gate(x)) * up(x))``. What the
members add: Mistral a sliding window, Qwen2 biases on q, k and v, Qwen3 an RMS norm on each head of
q and k.

Source: https://arxiv.org/abs/2307.09288, https://arxiv.org/abs/2310.06825,
https://arxiv.org/abs/2407.10671, https://arxiv.org/abs/2505.09388.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxcomp.models import layers as blocks
from jaxcomp.models.attention import DEFAULT, Attending, attend
from jaxcomp.models.cache import NO_LIMIT, init_cache
from jaxcomp.models.config import Fields
from jaxcomp.models.sizes import LayerSize, common_sizes, layer_sizes

MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
PREFIX = "model."
LAYERS = "layers"
# Buffers of old checkpoints, which hold nothing learned.
BUFFERS = (".rotary_emb.inv_freq",)
RENAMES: dict[str, str] = {}
# Names under which a checkpoint may store a tensor a second time.
COPIES = {"lm_head.weight": "model.embed_tokens.weight"}

# Which part each weight has in ``partition_rules``.
PARTITION = (
    ("embed_tokens/embedding", "vocabulary"),
    ("lm_head/kernel", "column"),
    *((f"layers/*/self_attn/{p}_proj/kernel", "column") for p in "qkv"),
    *((f"layers/*/self_attn/{p}_proj/bias", "bias") for p in "qkv"),
    ("layers/*/self_attn/o_proj/kernel", "row"),
    *((f"layers/*/mlp/{p}_proj/kernel", "column") for p in ("gate", "up")),
    *((f"layers/*/mlp/{p}_proj/bias", "bias") for p in ("gate", "up")),
    ("layers/*/mlp/down_proj/kernel", "row"),
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and variants of a Llama-family model, named as in Hugging Face configs.

    Attributes:
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      intermediate_size: width of the MLP.
      num_hidden_layers: decoder layers.
      num_attention_heads: query heads.
      num_key_value_heads: key and value heads; divides ``num_attention_heads``.
      head_dim: size of a head.
      rms_norm_eps: epsilon of the norms.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None, ``("linear", factor)`` or ``("llama3", factor, low_freq_factor,
        high_freq_factor, original_max_position_embeddings)``.
      max_position_embeddings: longest sequence the model was made for.
      sliding_windows: one window a layer, None for full attention; empty means full everywhere.
      tie_word_embeddings: the head is the embedding.
      qkv_bias: biases on q, k and v.
      output_bias: bias on the attention's output projection.
      mlp_bias: biases in the MLP.
      qk_norm: RMS norm on the heads of q and k.
      heads_per_layer: query heads of each layer, where they differ; empty means all alike.
      key_value_heads_per_layer: key and value heads of each layer, likewise.
      intermediate_sizes: width of each layer's MLP, likewise.
    """

    LAYERS: ClassVar[str] = LAYERS
    DEPTH: ClassVar[str] = "num_hidden_layers"
    LAYER_SIZES: ClassVar[tuple[LayerSize, ...]] = (
        LayerSize("heads_per_layer", "num_attention_heads", "self_attn/o_proj/kernel", -2, True),
        LayerSize(
            "key_value_heads_per_layer", "num_key_value_heads", "self_attn/v_proj/kernel", -1, True
        ),
        LayerSize("intermediate_sizes", "intermediate_size", "mlp/down_proj/kernel", -2),
    )

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple[Any, ...] | None = None
    max_position_embeddings: int = 2048
    sliding_windows: tuple[int | None, ...] = ()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    heads_per_layer: tuple[int, ...] = ()
    key_value_heads_per_layer: tuple[int, ...] = ()
    intermediate_sizes: tuple[int, ...] = ()

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, key-value heads (those of the layer with most) and head size of a cache."""
        most = max(kv for _, kv, _ in layer_sizes(self))
        return self.num_hidden_layers, most, self.head_dim


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Rotary frequencies ``(head_dim / 2,)`` in radians per position, after ``rope_scaling``.

    Args:
      config: the model's configuration.

    Returns:
      Float32 frequencies.

    Example:
      >>> config = LlamaConfig(8, 4, 4, 1, 1, 1, head_dim=4, rope_scaling=("linear", 2.0))
      >>> rope_frequencies(config).tolist()
      [0.5, 0.004999999888241291]
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponent).astype(np.float32)
    if config.rope_scaling is None:
        return frequencies
    kind, factor, *rest = config.rope_scaling
    if kind == "linear":
        return frequencies / np.float32(factor)
    low, high, original = rest
    # Long wavelengths are stretched by the factor, short ones kept, those between interpolated.
    wavelength = 2 * math.pi / frequencies
    smooth = (original / wavelength - low) / (high - low)
    scaled = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = np.where(wavelength > original / low, frequencies / factor, scaled)
    return np.where(wavelength < original / high, frequencies, scaled).astype(np.float32)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(
        self, config: LlamaConfig, heads: int, kv_heads: int, *, param_dtype, rngs: nnx.Rngs
    ):
        """Makes the projections."""
        c = config
        q, kv = heads * c.head_dim, kv_heads * c.head_dim
        out = 0.02 / math.sqrt(2 * c.num_hidden_layers)
        kw = {"param_dtype": param_dtype, "rngs": rngs}
        self.q_proj = blocks.Linear(c.hidden_size, q, bias=c.qkv_bias, **kw)
        self.k_proj = blocks.Linear(c.hidden_size, kv, bias=c.qkv_bias, **kw)
        self.v_proj = blocks.Linear(c.hidden_size, kv, bias=c.qkv_bias, **kw)
        self.o_proj = blocks.Linear(q, c.hidden_size, bias=c.output_bias, stddev=out, **kw)
        if c.qk_norm:
            self.q_norm = blocks.RMSNorm(c.head_dim, c.rms_norm_eps, param_dtype=param_dtype)
            self.k_norm = blocks.RMSNorm(c.head_dim, c.rms_norm_eps, param_dtype=param_dtype)
        self.config = c

    def __call__(self, x, rope, attend, cache=None):
        """Attends; returns the output and the updated cache, None without one."""
        c = self.config
        heads = (*x.shape[:-1], -1, c.head_dim)
        q, k, v = (p(x).reshape(heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = blocks.named(blocks.rotate(q, *rope), blocks.rotate(k, *rope), v)
        out, cache = attend(q, k, v, cache)
        return self.o_proj(out), cache


class MLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: LlamaConfig, size: int, *, param_dtype, rngs: nnx.Rngs):
        """Makes the projections."""
        c = config
        out = 0.02 / math.sqrt(2 * c.num_hidden_layers)
        kw = {"bias": c.mlp_bias, "param_dtype": param_dtype, "rngs": rngs}
        self.gate_proj = blocks.Linear(c.hidden_size, size, **kw)
        self.up_proj = blocks.Linear(c.hidden_size, size, **kw)
        self.down_proj = blocks.Linear(size, c.hidden_size, stddev=out, **kw)

    def __call__(self, x):
        """Maps ``(..., hidden)`` to ``(..., hidden)``."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Attention and MLP, each behind a norm and around a residual connection."""

    mlp_type: ClassVar[type[nnx.Module]] = MLP

    def __init__(self, config: LlamaConfig, sizes: tuple[int, ...], *, param_dtype, rngs: nnx.Rngs):
        """Makes the layer; ``sizes`` are its query heads, key-value heads and MLP width."""
        c, (heads, kv_heads, width) = config, sizes
        self.input_layernorm = blocks.RMSNorm(
            c.hidden_size, c.rms_norm_eps, param_dtype=param_dtype
        )
        self.self_attn = Attention(c, heads, kv_heads, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = blocks.RMSNorm(
            c.hidden_size, c.rms_norm_eps, param_dtype=param_dtype
        )
        self.mlp = self.mlp_type(c, width, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x, rope, attend, cache=None):
        """Returns the new residual stream and the updated cache."""
        y, cache = self.self_attn(self.input_layernorm(x), rope, attend, cache)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Llama(nnx.Module):
    """A causal language model of the Llama family."""

    layer_type: ClassVar[type[DecoderLayer]] = DecoderLayer

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        scan: bool = False,
        remat: bool = False,
        attention: Attending = DEFAULT,
        rngs: nnx.Rngs,
    ):
        """Makes a model with random weights.

        Args:
          config: sizes and variants.
          dtype: dtype of the activations; weights are cast to it where they are used.
          param_dtype: dtype of the parameters.
          scan: stack the layers' parameters on a leading axis and run them under ``lax.scan``.
          remat: recompute each layer in the backward pass.
          attention: how attention is computed, and split on a mesh of Auto axes.
          rngs: key of the initial weights.
        """
        c = config
        kw = {"param_dtype": param_dtype, "rngs": rngs}
        self.embed_tokens = blocks.Embedding(c.vocab_size, c.hidden_size, **kw)

        def make(rngs, sizes):
            return self.layer_type(c, sizes, param_dtype=param_dtype, rngs=rngs)

        if scan:
            make = functools.partial(make, sizes=common_sizes(c))
            self.layers = blocks.stack_layers(make, c.num_hidden_layers, rngs)
        else:
            self.layers = nnx.List([make(rngs, sizes) for sizes in layer_sizes(c)])
        self.norm = blocks.RMSNorm(c.hidden_size, c.rms_norm_eps, param_dtype=param_dtype)
        if not c.tie_word_embeddings:
            self.lm_head = blocks.Linear(c.hidden_size, c.vocab_size, **kw)
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
        """An empty key-value cache for ``batch`` sequences of up to ``length`` positions.

        Args:
          batch: sequences.
          length: positions.
          dtype: of keys and values, also "int8" and fp8; that of the activations if None.
          spec: mesh axes of (batch, positions, kv_heads) on the mesh in use.
          empty: note that it is, for the call that reads a prompt.

        Returns:
          What ``jaxcomp.models.cache.init_cache`` says.
        """
        dtype = dtype or self.dtype
        return init_cache(self.config.cache_shape, batch, length, dtype, spec, empty=empty)

    def __call__(self, tokens, positions=None, cache=None):
        """Logits of the next token at every position.

        Args:
          tokens: ``(batch, tokens)`` int32.
          positions: ``(batch, tokens)`` int32; by default counted from the cache's length, or zero.
          cache: what ``init_cache`` or an earlier call returned.

        Returns:
          Logits ``(batch, tokens, vocab)`` float32; with a cache, also the updated cache.
        """
        c = self.config
        if positions is None:
            start = 0 if cache is None else cache["length"]
            positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
            positions = jnp.broadcast_to(positions, tokens.shape)
        rope = blocks.rotary(positions, rope_frequencies(c))
        limits = [NO_LIMIT if w is None else w for w in c.sliding_windows]
        windows = tuple(sorted(set(limits)))
        # Numbers where layers are unrolled, which a loop makes into traced ones.
        inputs = {"window": np.asarray(limits, np.int32)} if len(windows) > 1 else {}
        one = windows[0] if len(windows) == 1 else None
        # The mask is about the order of tokens, whatever positions are given.
        order = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        order = order if cache is None else order + cache["length"]

        def body(layer, x, item, cache):
            window = item.get("window", one)
            attending = functools.partial(
                attend, order=order, window=window, windows=windows, how=self.attention
            )
            return layer(x, rope, attending, cache)

        x = self.embed_tokens(tokens, self.dtype)
        x, cache = blocks.run_layers(self.layers, body, x, inputs, cache, remat=self.remat)
        x = self.norm(x)
        logits = self.embed_tokens.attend(x) if c.tie_word_embeddings else self.lm_head(x)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        if cache is None:
            return logits
        return logits, cache | {"length": cache["length"] + tokens.shape[1]}


def read_config(fields: Fields, model_type: str) -> LlamaConfig:
    """Reads a Hugging Face configuration of one of ``MODEL_TYPES``.

    Args:
      fields: the fields of config.json.
      model_type: which member of the family.

    Returns:
      The configuration.

    Raises:
      ModelError: a field is missing, wrong, unknown or not supported.
    """
    head_dim = 128 if model_type == "qwen3" else None
    return LlamaConfig(**read_fields(fields, model_type, head_dim))


def read_fields(
    fields: Fields, model_type: str, default_head_dim: int | None = None
) -> dict[str, Any]:
    """The arguments of ``LlamaConfig``; nothing may be left in ``fields`` then.

    Args:
      fields: the fields of config.json.
      model_type: which member of the family.
      default_head_dim: head size where the file gives none; None divides the hidden size by heads.

    Returns:
      Values by name.

    Raises:
      ModelError: a field is missing, wrong, unknown or not supported.
    """
    f = fields
    hidden, heads = f.size("hidden_size"), f.size("num_attention_heads")
    layers = f.size("num_hidden_layers")
    kv_heads = f.size("num_key_value_heads", heads)
    varied = f.values.get("heads_per_layer") or f.values.get("key_value_heads_per_layer")
    if heads % kv_heads and not varied:
        raise f.error("num_key_value_heads", f"{kv_heads} must divide the {heads} attention heads")
    divided = default_head_dim is None
    if divided and "head_dim" not in f.values and hidden % heads:
        raise f.error("num_attention_heads", f"{heads} must divide the hidden size {hidden}")
    head_dim = f.size("head_dim", hidden // heads if divided else default_head_dim)
    if head_dim % 2:
        raise f.error("head_dim", f"must be even for rotary positions, got {head_dim}")
    f.only("hidden_act", "silu")
    f.take("pretraining_tp", 1)  # How a sum is split, not what it is.
    f.only("use_mrope", False)
    longest = f.size("max_position_embeddings", 2048)
    theta, scaling = read_rope(f, longest)
    bias = f.flag("attention_bias", False) if model_type in ("llama", "qwen3") else False
    values = dict(
        vocab_size=f.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=f.size("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=f.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=longest,
        sliding_windows=read_windows(f, model_type, layers),
        tie_word_embeddings=f.flag("tie_word_embeddings", False),
        qkv_bias=bias or model_type == "qwen2",
        output_bias=bias,
        mlp_bias=f.flag("mlp_bias", False) if model_type == "llama" else False,
        qk_norm=model_type == "qwen3",
        heads_per_layer=f.sizes("heads_per_layer", layers),
        key_value_heads_per_layer=f.sizes("key_value_heads_per_layer", layers),
        intermediate_sizes=f.sizes("intermediate_sizes", layers),
    )
    for i, (q, kv, _) in enumerate(layer_sizes(LlamaConfig(**values))):
        if q % kv:
            raise f.error(
                "key_value_heads_per_layer",
                f"the {kv} of layer {i} must divide its {q} attention heads (heads_per_layer)",
            )
    f.done()
    return values


def read_rope(fields: Fields, longest: int) -> tuple[float, tuple[Any, ...] | None]:
    """The rotary base and scaling, from ``rope_parameters`` or the older two fields.

    Args:
      fields: the fields of config.json.
      longest: the model's ``max_position_embeddings``.

    Returns:
      ``rope_theta`` and ``rope_scaling`` of ``LlamaConfig``.

    Raises:
      ModelError: a scaling that is not supported, or one with wrong fields.
    """
    theta = fields.number("rope_theta", 10000.0)
    given = {name: fields.take(name, None) for name in ("rope_parameters", "rope_scaling")}
    name, value = next(((n, v) for n, v in given.items() if v is not None), ("rope_scaling", {}))
    if not isinstance(value, dict):
        raise fields.error(name, f"must be an object or null, got {value!r}")
    rope = Fields(value, f"{fields.where}: {name}")
    theta = rope.number("rope_theta", theta)
    legacy = rope.take("type", None)
    kind = rope.take("rope_type", legacy or "default")
    if kind not in ("default", "linear", "llama3"):
        raise rope.error(
            "rope_type", f"{kind!r} is not supported; supported: 'default', 'linear', 'llama3'"
        )
    scaling: tuple[Any, ...] | None = None
    if kind == "linear":
        scaling = ("linear", rope.number("factor"))
    elif kind == "llama3":
        numbers = ("factor", "low_freq_factor", "high_freq_factor")
        scaling = ("llama3", *(rope.number(n) for n in numbers))
        scaling += (rope.number("original_max_position_embeddings", longest),)
    rope.only("partial_rotary_factor", 1.0)
    rope.done()
    return theta, scaling


def read_windows(fields: Fields, model_type: str, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, empty when no layer has one.

    Args:
      fields: the fields of config.json.
      model_type: which member of the family.
      layers: number of layers.

    Returns:
      ``sliding_windows`` of ``LlamaConfig``.

    Raises:
      ModelError: the fields contradict each other.
    """
    if model_type == "llama":
        return ()
    window = fields.take("sliding_window", None)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int)):
        raise fields.error("sliding_window", f"must be a positive integer or null, got {window!r}")
    if window is not None and window < 1:
        raise fields.error("sliding_window", f"must be a positive integer or null, got {window!r}")
    first = 0
    if model_type != "mistral":
        first = fields.take("max_window_layers", 28)
        if not fields.flag("use_sliding_window", False):
            window = None
    types = fields.take("layer_types", None)
    if types is None:
        windows = tuple(window if i >= first else None for i in range(layers))
    else:
        known = {"full_attention": None, "sliding_attention": window}
        if not isinstance(types, list) or len(types) != layers or not set(types) <= set(known):
            raise fields.error(
                "layer_types", f"must be a list of {layers} of {sorted(known)}, got {types!r}"
            )
        if "sliding_attention" in types and window is None:
            raise fields.error("layer_types", "names sliding_attention but there is no window")
        windows = tuple(known[kind] for kind in types)
    return windows if any(w is not None for w in windows) else ()


def tensor_names(config: LlamaConfig) -> dict[str, tuple[str, bool]]:
    """Where each parameter of the unrolled model is in a Hugging Face checkpoint.

    Args:
      config: the model's configuration.

    Returns:
      Parameter path to (tensor name, whether the tensor is stored transposed).
    """
    c = config
    names = {
        "embed_tokens/embedding": ("model.embed_tokens.weight", False),
        "norm/scale": ("model.norm.weight", False),
    }
    if not c.tie_word_embeddings:
        names["lm_head/kernel"] = ("lm_head.weight", True)
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["self_attn/q_norm", "self_attn/k_norm"] if c.qk_norm else []
    linears = {f"self_attn/{p}_proj": c.qkv_bias for p in "qkv"}
    linears |= {"self_attn/o_proj": c.output_bias}
    linears |= {f"mlp/{p}_proj": c.mlp_bias for p in ("gate", "up", "down")}
    for i in range(c.num_hidden_layers):
        for name in norms:
            names[f"layers/{i}/{name}/scale"] = (f"model.layers.{i}.{dotted(name)}.weight", False)
        for name, bias in linears.items():
            theirs = f"model.layers.{i}.{dotted(name)}"
            names[f"layers/{i}/{name}/kernel"] = (f"{theirs}.weight", True)
            if bias:
                names[f"layers/{i}/{name}/bias"] = (f"{theirs}.bias", False)
    return names


def dotted(path: str) -> str:
    """A path in a checkpoint's spelling."""
    return path.replace("/", ".")
