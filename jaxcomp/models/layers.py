"""Building blocks shared by the reference models: plain modules with plain parameter paths."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxcomp.errors import ModelError
from jaxcomp.models.cache import Dtype, LayerCache


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float, dtype: Dtype) -> nnx.Param:
    """A parameter drawn from a normal distribution.

    Args:
      rngs: source of the ``params`` key.
      shape: shape of the parameter.
      stddev: standard deviation.
      dtype: dtype of the parameter.

    Returns:
      The parameter.
    """
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, dtype))


class Linear(nnx.Module):
    """``y = x @ kernel + bias``, computed in the dtype of ``x``; kernel is ``(in, out)``."""

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        bias: bool = False,
        stddev: float = 0.02,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws the kernel; the bias, if there is one, starts at zero."""
        self.kernel = normal(rngs, (in_size, out_size), stddev, param_dtype)
        self.bias = nnx.Param(jnp.zeros((out_size,), param_dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(..., in)`` to ``(..., out)``."""
        y = x @ jnp.asarray(self.kernel[...], x.dtype)
        return y if self.bias is None else y + jnp.asarray(self.bias[...], x.dtype)


class Embedding(nnx.Module):
    """A table ``(rows, features)`` that is looked up, or used as a tied output head."""

    def __init__(
        self,
        rows: int,
        features: int,
        *,
        stddev: float = 0.02,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws the table."""
        self.embedding = normal(rngs, (rows, features), stddev, param_dtype)

    def __call__(self, ids: jax.Array, dtype: Dtype) -> jax.Array:
        """Rows ``ids (...)`` as ``(..., features)`` in ``dtype``."""
        return self.embedding[...][ids].astype(dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Scores of all rows: ``(..., features)`` to ``(..., rows)``."""
        return x @ jnp.asarray(self.embedding[...], x.dtype).T


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x**2) + eps) * scale``, computed in float32."""

    def __init__(self, size: int, eps: float, *, param_dtype: Dtype = jnp.float32):
        """Starts with a gain of one."""
        self.scale = nnx.Param(jnp.ones((size,), param_dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes the last axis; keeps shape and dtype."""
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(y.dtype)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """``(x - mean) / sqrt(var + eps) * scale + bias``, computed in float32."""

    def __init__(self, size: int, eps: float, *, param_dtype: Dtype = jnp.float32):
        """Starts with a gain of one and a bias of zero."""
        self.scale = nnx.Param(jnp.ones((size,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((size,), param_dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes the last axis; keeps shape and dtype."""
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        y = y * self.scale[...].astype(y.dtype) + self.bias[...].astype(y.dtype)
        return y.astype(x.dtype)


def named(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values under names by which transforms of the model find them."""
    return checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")


def rotary(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of rotary position embedding.

    Args:
      positions: ``(batch, tokens)`` int32.
      frequencies: ``(head_dim / 2,)`` radians per position.

    Returns:
      cos, sin: ``(batch, tokens, 1, head_dim / 2)`` float32.
    """
    angles = positions.astype(jnp.float32)[:, :, None, None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs ``(x[i], x[i + head_dim / 2])`` (the layout of Hugging Face checkpoints).

    Args:
      x: ``(batch, tokens, heads, head_dim)``.
      cos: ``(batch, tokens, 1, head_dim / 2)``.
      sin: as ``cos``.

    Returns:
      The rotated ``x``, same shape and dtype.
    """
    a, b = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def check_length(length: int, longest: int) -> None:
    """Refuses sequences that learned positions do not reach.

    Args:
      length: positions asked for.
      longest: rows of the position embedding.

    Raises:
      ModelError: there are not enough.
    """
    if length > longest:
        raise ModelError(f"sequences of {length} positions, the model has {longest}; shorten them")


def stack_layers(make, layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """One module whose parameters carry a leading layer axis, for ``scan_layers``.

    Args:
      make: function of an ``nnx.Rngs`` that makes one layer.
      layers: how many.
      rngs: keys; each layer gets its own.

    Returns:
      The stacked module.
    """
    keys = jax.random.split(rngs.params(), layers)
    return nnx.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)


def run_layers(layers, body, x: jax.Array, inputs, cache=None, *, remat: bool = False):
    """Runs ``x, cache = body(layer, x, input, cache)`` over layers that are a list or stacked.

    Args:
      layers: ``nnx.List`` of layers, or one module with stacked parameters.
      body: function of (layer, x, one layer's inputs, ``LayerCache`` or None) that returns x and
        the cache; the x that it returns is named "hidden".
      x: what flows through the layers.
      inputs: pytree whose leaves have a leading layer axis, or None.
      cache: key-value cache of all layers, as of ``init_cache``; or None.
      remat: recompute each layer in the backward pass.

    Returns:
      x after the last layer, and the cache with the keys and values that the layers wrote.
    """

    def run(layer, x, item, kv, index):
        if kv is not None:
            kv = LayerCache(kv, cache["length"], index, cache.get("split"), "empty" in cache)
        x, kv = body(layer, x, item, kv)
        return checkpoint_name(x, "hidden"), None if kv is None else kv.arrays

    # Carried from layer to layer: what is read from one array and written to another would be
    # there twice.
    kv = None
    if cache is not None:
        notes = ("length", "split", "empty")
        kv = {name: array for name, array in cache.items() if name not in notes}
    if isinstance(layers, nnx.List):
        for i, layer in enumerate(layers):
            item = jax.tree.map(lambda a, i=i: a[i], inputs)
            if remat:
                graph, state = nnx.split(layer)

                def step(state, x, item, kv, graph=graph, i=i):
                    return run(nnx.merge(graph, state), x, item, kv, i)

                x, kv = jax.checkpoint(step)(state, x, item, kv)
            else:
                x, kv = run(layer, x, item, kv, i)
    else:
        graph, state = nnx.split(layers)
        count = jax.tree.leaves(state)[0].shape[0]

        def scanned(carry, scanned_in):
            state, item, index = scanned_in
            return run(nnx.merge(graph, state), carry[0], item, carry[1], index), None

        if remat:
            scanned = jax.checkpoint(scanned, prevent_cse=False)
        index = None if cache is None else jnp.arange(count, dtype=jnp.int32)
        (x, kv), _ = jax.lax.scan(scanned, (x, kv), (state, inputs, index))
    if kv is None:
        return x, None
    return x, {name: value for name, value in cache.items() if name != "empty"} | kv
