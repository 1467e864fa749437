"""Text generation with a key-value cache: one prefill, then one jitted scan over new tokens.

The prompt is read by ``jc.attention.attention``, each new token by ``decode_attention``: on a TPU
their kernels, elsewhere XLA (``jaxcomp.models.attention``).
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxcomp.errors import JaxcompError
from jaxcomp.formats.split import names_of
from jaxcomp.models.cache import init_cache


def generate(
    apply: Callable[..., Any],
    params: Any,
    config: Any,
    tokens: jax.Array,
    max_new_tokens: int,
    *,
    key: jax.Array | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end_token: int | None = None,
    cache_dtype: Any = jnp.float32,
    cache_spec: PartitionSpec | None = None,
) -> jax.Array:
    """Continues token sequences of one length.

    Args:
      apply: a causal model's ``apply(params, tokens, positions, cache)``.
      params: its weights.
      config: its configuration (``Model.config``).
      tokens: ``(batch, length)`` int32 prompts.
      max_new_tokens: how many tokens to add.
      key: random key; needed when ``temperature`` is not zero.
      temperature: zero takes the likeliest token; otherwise divides the logits before sampling.
      top_k: sample among the k likeliest tokens only.
      top_p: sample among the fewest likeliest tokens whose probabilities reach this sum.
      end_token: a sequence that has produced it is filled up with it.
      cache_dtype: dtype of the key-value cache: that of the model's activations is read as it
        lies; "int8", "float8_e4m3fn" and "float8_e5m2" keep a scale for each token and head, and
        halve a bfloat16 cache.
      cache_spec: mesh axes of the cache's (batch, positions, kv_heads), for weights on a mesh of
        Auto axes: without it XLA splits the cache as it sees fit, and no kernel reads or decodes.

    Returns:
      ``(batch, length + max_new_tokens)`` int32.

    Raises:
      JaxcompError: an option is out of range, the model is not causal, the result would be longer
        than the model's positions, no cache can have the dtype, or the mesh cannot split it so.
    """
    length = tokens.shape[1]
    if not hasattr(config, "cache_shape"):
        raise JaxcompError(f"generate: {type(config).__name__} is no causal language model")
    if max_new_tokens < 1 or length < 1:
        raise JaxcompError("generate: needs a prompt of one token or more, and max_new_tokens >= 1")
    if length + max_new_tokens > config.max_position_embeddings:
        raise JaxcompError(
            f"generate: {length} + {max_new_tokens} tokens exceed the model's "
            f"{config.max_position_embeddings} positions; ask for fewer"
        )
    if temperature < 0 or (temperature > 0 and key is None):
        raise JaxcompError("generate: sampling needs temperature > 0 and key=jax.random.key(..)")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise JaxcompError("generate: top_k must be at least 1, top_p in (0, 1]")
    key = jax.random.key(0) if key is None else key
    with _mesh_of(params) if cache_spec is not None else contextlib.nullcontext():
        return _generate(
            apply, config.cache_shape, max_new_tokens, float(temperature), top_k, top_p, end_token,
            cache_dtype, cache_spec, params, jnp.asarray(tokens, jnp.int32), key,
        )  # fmt: skip


def _mesh_of(params: Any) -> contextlib.AbstractContextManager:
    """Puts the mesh that the weights are on in use, if none is."""
    if jax.sharding.get_abstract_mesh().empty:
        for leaf in jax.tree.leaves(params):
            held = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
            if isinstance(held, NamedSharding):
                return jax.set_mesh(held.mesh)
    return contextlib.nullcontext()


@functools.partial(jax.jit, static_argnums=tuple(range(9)))
def _generate(
    apply, shape, new, temperature, top_k, top_p, end_token, dtype, spec, params, tokens, key
):  # fmt: skip
    batch, length = tokens.shape
    room = length + new
    if spec is not None and len(spec) > 1:
        sizes = jax.sharding.get_abstract_mesh().shape
        parts = math.prod(sizes.get(name, 1) for name in names_of(spec[1]))
        room = -(-room // parts) * parts
    cache = init_cache(shape, batch, room, dtype, spec, empty=True)
    keys = jax.random.split(key, new)
    logits, cache = apply(params, tokens, None, cache)
    first = sample(logits[:, -1], keys[0], temperature, top_k, top_p)
    done = jnp.zeros((batch,), bool) if end_token is None else first == end_token

    def step(carry, key):
        token, done, cache = carry
        logits, cache = apply(params, token[:, None], None, cache)
        token = sample(logits[:, -1], key, temperature, top_k, top_p)
        if end_token is not None:
            token = jnp.where(done, end_token, token)
            done = done | (token == end_token)
        return (token, done, cache), token

    _, rest = jax.lax.scan(step, (first, done, cache), keys[1:])
    return jnp.concatenate([tokens, first[:, None], rest.T], axis=1)


def sample(
    logits: jax.Array,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """Draws one token a row.

    Args:
      logits: ``(batch, vocab)``.
      key: random key.
      temperature: divides the logits; zero takes the likeliest token.
      top_k: only the k likeliest tokens.
      top_p: only the fewest likeliest tokens whose probabilities reach this sum.

    Returns:
      ``(batch,)`` int32.
    """
    if temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None and top_p < 1:
        order = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(order, axis=-1)
        # A token stays if those likelier than it do not reach the sum yet: at least one does.
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.min(jnp.where(before < top_p, order, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
