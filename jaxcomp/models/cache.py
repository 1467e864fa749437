"""Key-value caches: plain floats, or int8 and fp8 codes with a scale for each token and head.

Codes are those that the decoding kernel reads (``jc.attention.decode_attention``): of a token's key
or value in one head

    scale = max |x| / largest code,   code = round(x / scale)

A token is written once and never again: its scale depends on it alone.

On a mesh of Auto axes a traced function cannot see how a cache is split, and the kernel must know:
so ``init_cache(.., spec=)`` notes it in the cache.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, PartitionSpec

from jaxcomp import sharding
from jaxcomp.errors import ModelError
from jaxcomp.formats.split import names_of

Dtype = jnp.dtype | type | str | None

FLOATS = ("float32", "bfloat16", "float16", "float64")
CODES = ("int8", "float8_e4m3fn", "float8_e5m2")
# A window that reaches every position.
NO_LIMIT = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Split:
    """How a cache lies on a mesh, among its arrays; it has no leaves itself.

    Attributes:
      spec: mesh axes of (batch, positions, kv_heads).
    """

    spec: PartitionSpec


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Empty:
    """Says of a cache, among its arrays, that it holds nothing: its length is not known to a trace.

    What reads a prompt into such a cache reads the prompt alone. No cache with tokens says so.
    """


def init_cache(
    shape: tuple[int, int, int],
    batch: int,
    length: int,
    dtype: Dtype = jnp.float32,
    spec: PartitionSpec | None = None,
    *,
    empty: bool = False,
) -> dict[str, jax.Array | Split | Empty]:
    """An empty key-value cache.

    Args:
      shape: layers, key-value heads and head size.
      batch: sequences.
      length: positions the cache can hold.
      dtype: of keys and values: a float, which the model's own reads fastest; or int8,
        float8_e4m3fn or float8_e5m2, which are scaled for each token and head.
      spec: mesh axes of (batch, positions, kv_heads) on the mesh in use (``jax.set_mesh``). On one
        of Auto axes, attention runs on kernels only where this is given.
      empty: note that it is empty, so that the first call reads a prompt as without a cache, on the
        kernel where there is one. What that call returns lacks the note: a loop cannot carry both.

    Returns:
      ``{"k", "v": (layers, batch, length, kv_heads, head_dim), "length": int32 scalar}``; of int8
      and fp8 also ``"k_scale", "v_scale": (layers, batch, length, kv_heads)`` float32; of a spec
      and ``empty`` also ``"split"`` and ``"empty"``, which are no arrays.

    Raises:
      JaxcompError: the dtype is none of these, or the mesh in use cannot split the cache so.

    Example:
      >>> sorted(init_cache((2, 4, 8), batch=1, length=16, dtype="int8"))
      ['k', 'k_scale', 'length', 'v', 'v_scale']
    """
    name = check_dtype(dtype)
    layers, kv_heads, head_dim = shape
    full = (layers, batch, length, kv_heads, head_dim)

    def zeros():
        cache = {name_: jnp.zeros(full, dtype) for name_ in ("k", "v")}
        if name in CODES:
            cache |= {name_: jnp.ones(full[:-1], jnp.float32) for name_ in ("k_scale", "v_scale")}
        return cache

    if spec is None:
        cache = zeros()
    else:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            raise ModelError(f"a key-value cache split as {spec}: make it under jax.set_mesh(mesh)")
        held = PartitionSpec(None, *spec)
        sharding.check_spec(held, full[:-1], dict(mesh.shape), "a key-value cache")
        # No device ever has all of it.
        cache = jax.jit(zeros, out_shardings=held)() | {"split": Split(spec)}
    noted = {"empty": Empty()} if empty else {}
    return cache | {"length": jnp.zeros((), jnp.int32)} | noted


def check_dtype(dtype: Dtype) -> str:
    """The name of a cache's dtype.

    Raises:
      ModelError: no cache can have it.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in FLOATS + CODES:
        raise ModelError(
            f"a key-value cache of {name} cannot be; use one of {', '.join(FLOATS)}, or for a "
            f"smaller one {', '.join(CODES)}"
        )
    return name


def encoded(x: jax.Array, dtype: Dtype) -> tuple[jax.Array, jax.Array]:
    """Codes of keys or values, and their scales.

    Args:
      x: float ``(.., head_dim)``.
      dtype: one of ``CODES``.

    Returns:
      Codes like x, and float32 scales ``(..)``: x is about ``codes * scale``, off by at most half
      a scale for int8, and 1 for zeros.
    """
    integer = jnp.issubdtype(dtype, jnp.integer)
    largest = float((jnp.iinfo if integer else jnp.finfo)(dtype).max)
    top = jnp.max(jnp.abs(x), axis=-1).astype(jnp.float32)
    scale = jnp.where(top > 0, top / largest, 1.0)
    codes = x.astype(jnp.promote_types(x.dtype, jnp.float32)) / scale[..., None]
    # The scale is rounded, so that the largest may come out beyond its code.
    codes = jnp.clip(codes, -largest, largest)
    return (jnp.round(codes) if integer else codes).astype(dtype), scale


def multiplied(entries: dict[str, jax.Array], dtype: Dtype) -> tuple[jax.Array, jax.Array]:
    """Keys and values in a dtype, of what a cache holds.

    Args:
      entries: as of ``LayerCache.entries``.
      dtype: a float.

    Returns:
      k, v: ``(batch, length, heads, head_dim)``.
    """
    wide = jnp.promote_types(dtype, jnp.float32)

    def one(name):
        scale = entries.get(f"{name}_scale")
        if scale is None:
            return entries[name].astype(dtype)
        return (entries[name].astype(wide) * scale[..., None].astype(wide)).astype(dtype)

    return one("k"), one("v")


def by_window(
    run: Callable[[int | None], jax.Array],
    window: jax.Array | int | None,
    windows: tuple[int, ...],
) -> jax.Array:
    """Runs a kernel for a window.

    Args:
      run: takes the window, None for no limit.
      window: a query looks at its own and the ``window - 1`` positions before it; None is no
        limit. It may be traced.
      windows: all values that a traced window can have, ascending.

    Returns:
      What ``run`` returns.
    """

    def limited(window: int | None) -> jax.Array:
        return run(None if window is None or window >= NO_LIMIT else window)

    if isinstance(window, jax.core.Tracer):
        # A kernel is made for one mask: where layers that a loop runs differ, for each of them.
        which = jnp.searchsorted(jnp.asarray(windows, jnp.int32), window)
        return jax.lax.switch(which, [functools.partial(limited, w) for w in windows])
    return limited(None if window is None else int(window))


def causal_rule(window: int | None) -> Any:
    """The causal mask of a window for kernels."""
    from jaxcomp.kernels.sparse_attention import masks  # Pallas takes a while to import.

    return masks.causal() if window is None else masks.window(window, causal=True)


class LayerCache(NamedTuple):
    """A key-value cache as one layer gets it: whole, so that it can be written in place.

    Attributes:
      arrays: all of ``init_cache`` but the length, with their leading axis of layers.
      length: positions that are filled.
      layer: which layer's it is.
      split: how it lies on a mesh, where that is noted.
      empty: whether it is known to hold nothing.
    """

    arrays: dict[str, jax.Array]
    length: jax.Array
    layer: jax.Array | int
    split: Split | None = None
    empty: bool = False

    def entries(self, k: jax.Array, v: jax.Array) -> dict[str, jax.Array]:
        """New keys and values ``(batch, tokens, heads, head_dim)`` as the cache holds them."""
        new = {"k": k, "v": v}
        for name, x in (("k", k), ("v", v)):
            dtype = self.arrays[name].dtype
            if "k_scale" in self.arrays:
                new[name], new[f"{name}_scale"] = encoded(x, dtype)
            else:
                new[name] = x.astype(dtype)
        return new

    def append(self, new: dict[str, jax.Array]) -> "LayerCache":
        """The cache with ``entries`` at its end."""
        written = {name: self._write(self.arrays[name], x) for name, x in new.items()}
        return self._replace(arrays=written)

    def read(self, heads: int) -> dict[str, jax.Array]:
        """Everything that the layer holds, ``(batch, length, heads, ..)``, as ``entries``."""
        return self._own(heads)

    def attend(
        self,
        q: jax.Array,
        heads: int,
        window: jax.Array | int | None = None,
        windows: tuple[int, ...] = (),
        implementation: str | None = None,
    ) -> jax.Array:
        """Attention of the newest tokens to what the cache holds, their own keys among it.

        On a TPU the kernel reads the cache as it lies, for heads of a multiple of 128.

        Args:
          q: ``(batch, queries, heads, head_dim)``.
          heads: key heads of this layer.
          window: a query looks at its own and the ``window - 1`` positions before it; None is no
            limit. It may be traced.
          windows: all values that a traced window can have, ascending.
          implementation: of ``decode_attention``; None for the best that fits.

        Returns:
          ``(batch, queries, heads, head_dim)`` in q's dtype.
        """
        # Pallas takes a while to import.
        from jaxcomp.kernels import sparse_attention as kernels

        held, layer = self.arrays, self.layer
        if heads != held["k"].shape[3]:
            held, layer = self._own(heads), None
        if "k_scale" not in held:
            held = {name: x.astype(q.dtype) for name, x in held.items()}
        lengths = jnp.full(q.shape[:1], self.length + q.shape[1], jnp.int32)
        kv_spec = self._spec(heads)

        def run(window: int | None) -> jax.Array:
            # The cache began as zeros.
            return kernels.decode_attention(
                q,
                lengths=lengths,
                mask=causal_rule(window),
                layer=layer,
                finite=True,
                kv_spec=kv_spec,
                implementation=implementation,
                **held,
            )

        return by_window(run, window, windows)

    def _spec(self, heads: int) -> PartitionSpec | None:
        """How the keys of this layer are split, if that must be said and each device has some."""
        mesh = jax.sharding.get_abstract_mesh()
        if self.split is None or AxisType.Auto not in mesh.axis_types:
            return None
        spec = PartitionSpec(*self.split.spec, *(None,) * (3 - len(self.split.spec)))
        parts = math.prod(mesh.shape[name] for name in names_of(spec[2]))
        return spec if heads % parts == 0 else None

    def _own(self, heads: int) -> dict[str, jax.Array]:
        """The layer's arrays: a cache has room for the layer with the most heads."""

        def one(x):
            return jax.lax.dynamic_index_in_dim(x, self.layer, 0, keepdims=False)[:, :, :heads]

        return {name: one(x) for name, x in self.arrays.items()}

    def _write(self, cached: jax.Array, new: jax.Array) -> jax.Array:
        new = new.astype(cached.dtype)
        layer, zero = jnp.int32(self.layer), jnp.int32(0)
        rest = (zero,) * (cached.ndim - 3)
        mesh = jax.sharding.get_abstract_mesh()
        if new.shape[1] == 1:
            spec = self._spec(new.shape[2])
            if spec is not None:
                return _written(cached, new, layer, self.length, spec)
        if new.shape[1] == 1 or mesh.empty or AxisType.Auto not in mesh.axis_types:
            start = (layer, zero, self.length, *rest)
            return jax.lax.dynamic_update_slice(cached, new[None], start)
        # Several positions may lie on several devices. Each takes those that are its own, where an
        # update of a slice would bring the whole cache together.
        heads, (tokens, room) = new.shape[2], (new.shape[1], cached.shape[2])
        row = jnp.arange(room, dtype=jnp.int32) - self.length
        inside = jnp.expand_dims((row >= 0) & (row < tokens), (0, *range(2, new.ndim)))
        old = jax.lax.dynamic_index_in_dim(cached, self.layer, 0, keepdims=False)[:, :, :heads]
        own = jnp.where(inside, jnp.take(new, row, axis=1, mode="clip"), old)
        return jax.lax.dynamic_update_slice(cached, own[None], (layer, zero, zero, *rest))


def _written(
    cached: jax.Array,
    new: jax.Array,
    layer: jax.Array,
    position: jax.Array,
    spec: PartitionSpec,
) -> jax.Array:
    """A cache with one position written on the device that has it, laid out as the kernel reads it.

    Left to the partitioner, XLA lays the cache out as suits the update, and copies all of it for
    the kernel of each layer.
    """

    def write(cached, new, layer, position):
        room, axes = cached.shape[2], names_of(spec[1])
        position -= jax.lax.axis_index(axes) * room if axes else 0
        inside = (position >= 0) & (position < room)
        start = (layer, 0, jnp.clip(position, 0, room - 1), *(0,) * (cached.ndim - 3))
        old = jax.lax.dynamic_slice(cached, start, (1, *new.shape))
        cached = jax.lax.dynamic_update_slice(cached, jnp.where(inside, new[None], old), start)
        # Positions and heads side by side. An axis of one head would be padded beside the last.
        order = (0, 1, 3, 2, 4) if cached.shape[3] == 1 else (0, 1, 2, 3, 4)
        return with_layout_constraint(cached, Layout(order[: cached.ndim]))

    held = PartitionSpec(None, *spec)
    specs = (held, PartitionSpec(spec[0], None, spec[2]), PartitionSpec(), PartitionSpec())
    return jax.shard_map(write, in_specs=specs, out_specs=held, check_vma=False)(
        cached, new, layer, position
    )
