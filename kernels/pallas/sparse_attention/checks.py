"""What operands of attention must be, said before anything runs."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxcomp.kernels import arguments
from jaxcomp.kernels.sparse_attention.rules import Blocks, Mask, PerHead

QUANTIZED = ("int8", "float8_e4m3fn", "float8_e5m2")


def check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    blocks: dict[str, int | None],
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    span: jax.Array | None = None,
    positions: int | None = None,
) -> None:
    """Refuses operands that do not fit together; ``blocks`` are block sizes by their names.

    ``positions`` are those that queries of the mask may have, those of q if None.

    Raises:
      ValueError: shapes, or numbers out of range.
      TypeError: dtypes, or what is no array or mask.
    """
    _check_arrays(q, k, v, k_scale, v_scale)
    _check_mask(mask)
    _check_lengths_of_blocks(mask, positions or q.shape[1], k.shape[1])
    if isinstance(mask, PerHead) and len(mask.masks) != q.shape[2]:
        raise ValueError(
            f"per_head has {len(mask.masks)} masks, q {q.shape} has {q.shape[2]} heads"
        )
    if kv_segment_ids is not None and segment_ids is None:
        raise ValueError("kv_segment_ids are given without segment_ids")
    for name, ids, of in (("segment_ids", segment_ids, q), ("kv_segment_ids", kv_segment_ids, k)):
        if ids is not None:
            _check_integers(name, ids, of.shape[:2], "(batch, length)")
    if span is not None:
        arguments.array("span", span)
        if span.shape != (q.shape[2],):
            raise ValueError(
                f"span {span.shape} must be one number for each of the {q.shape[2]} heads of q "
                f"{q.shape}: ({q.shape[2]},)"
            )
        if not jnp.issubdtype(span.dtype, jnp.floating):
            raise TypeError(f"span is {span.dtype}; it is learned, and must be a float")
    for name, block in blocks.items():
        if block is not None and (not isinstance(block, int) or block < 128 or block % 128):
            raise ValueError(f"{name} is {block!r}; it must be a multiple of 128")


def numbers(
    q: jax.Array, scale: Any, soft_cap: Any, span_ramp: Any, span: jax.Array | None
) -> dict[str, float | jax.Array | None]:
    """The options that are numbers, by name: floats, and as they are where they are traced.

    Raises:
      ValueError: one is several, or out of range.
      TypeError: one is no number.
    """
    found = {"scale": q.shape[-1] ** -0.5 if scale is None else arguments.number("scale", scale)}
    for name, x in (("soft_cap", soft_cap), ("span_ramp", span_ramp)):
        found[name] = x = None if x is None else arguments.number(name, x)
        if isinstance(x, float) and not x > 0:
            raise ValueError(f"{name} is {x}; it must be more than 0")
    # Without a span nothing has a ramp, and none need be known.
    return found if span is not None else found | {"span_ramp": 32.0}


def constants(**numbers: float | jax.Array | None) -> str | None:
    """Why a kernel does not take numbers: they are traced, and its code is made for others."""
    traced = [name for name, x in numbers.items() if arguments.is_traced(x)]
    if not traced:
        return None
    return f"{' and '.join(traced)} must be a constant of its code, but is traced: give a float"


def check_lengths(lengths: jax.Array, q: jax.Array) -> None:
    """Refuses lengths of a cache that are not one integer a sequence."""
    _check_integers("lengths", lengths, q.shape[:1], "(batch,)")


def one_layer(
    arrays: dict[str, jax.Array | None], layer: jax.Array | int
) -> list[jax.Array | None]:
    """Of arrays by name that have an axis of layers in front, those of one layer.

    Raises:
      ValueError: one has no such axis.
    """
    found = []
    for name, x in arrays.items():
        wanted = 4 if name.endswith("_scale") else 5
        if x is not None and getattr(x, "ndim", wanted) != wanted:
            raise ValueError(
                f"{name} {x.shape} must have an axis of layers in front, {wanted} in all, where "
                "layer says which; leave layer out for a cache of one"
            )
        own = None if x is None else jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
        found.append(own)
    return found


def layer_index(layer: jax.Array | int, k: jax.Array) -> jax.Array:
    """Which layer of a cache (layers, batch, capacity, kv_heads, head_dim), as int32.

    Raises:
      ValueError: the cache has no such layer, as far as that is known before it runs.
      TypeError: layer is no integer.
    """
    arguments.array("k", k)
    if k.ndim != 5:
        return jnp.int32(0)  # That is said of all arrays together (``one_layer``).
    of = f"the cache k {k.shape} has {k.shape[0]} layers"
    return arguments.index("layer", layer, k.shape[0], of)


def _check_mask(mask: Any) -> None:
    if isinstance(mask, Mask):
        return
    what, hint = f"a {type(mask).__name__}", "use causal(), window() and the like"
    if hasattr(mask, "shape"):
        what = f"an array {mask.shape}"
        hint = (
            "it takes a rule on positions: causal(), window() and the like, or blocks(array, "
            "block_size) for an array of blocks; padding and packed sequences are segment_ids"
        )
    elif isinstance(mask, list | tuple):
        hint = "use per_head(masks) for a mask of each head"
    elif callable(mask):
        what = f"the function {getattr(mask, '__name__', mask)}"
        hint = "call it for a mask"
    raise TypeError(f"mask is {what}; {hint}")


def _check_lengths_of_blocks(mask: Mask, queries: int, keys: int) -> None:
    for one in mask.masks if isinstance(mask, PerHead) else (mask,):
        for leaf in one.leaves():
            if not isinstance(leaf, Blocks):
                continue
            wanted = tuple(-(-length // leaf.block_size) for length in (queries, keys))
            if leaf.shape != wanted:
                raise ValueError(
                    f"blocks of shape {leaf.shape} with block_size {leaf.block_size} do not cover "
                    f"{queries} queries and {keys} keys; these take shape {wanted}"
                )


def _check_integers(name: str, x: jax.Array, shape: tuple[int, ...], of: str) -> None:
    arguments.array(name, x)
    if x.shape != shape:
        raise ValueError(f"{name} {x.shape} must be {of} = {shape}")
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} is {x.dtype}; it must be an integer")


def _check_arrays(q, k, v, k_scale, v_scale) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        arguments.array(name, x)
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"{shapes}: each must be (batch, length, heads, head_dim)")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{shapes}: q and k must agree in batch and head_dim, k and v in batch, keys and heads"
        )
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(f"{shapes}: no axis may be empty")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{shapes}: query heads must be a multiple of key heads")
    if not jnp.issubdtype(q.dtype, jnp.floating) or jnp.dtype(q.dtype).name in QUANTIZED:
        raise TypeError(f"q is {q.dtype}; it must be float32, bfloat16 or float16")
    if (k_scale is None) != (v_scale is None):
        raise ValueError("k_scale and v_scale are given both, or neither")
    for name, x, scale in (("k", k, k_scale), ("v", v, v_scale)):
        if scale is not None:
            arguments.array(f"{name}_scale", scale)
        if scale is None and x.dtype != q.dtype:
            raise TypeError(
                f"{name} is {x.dtype} and q {q.dtype}: cast one of them, or give {name}_scale for "
                f"a quantized {name}"
            )
        if scale is not None and jnp.dtype(x.dtype).name not in QUANTIZED:
            raise TypeError(f"{name}_scale is for {name} of {', '.join(QUANTIZED)}, not {x.dtype}")
        if scale is not None and scale.shape != x.shape[:3]:
            raise ValueError(
                f"{name}_scale {scale.shape} must be (batch, keys, kv_heads) of {name} {x.shape}"
            )
        if scale is not None and not jnp.issubdtype(scale.dtype, jnp.floating):
            raise TypeError(f"{name}_scale is {scale.dtype}; it must be a float")
