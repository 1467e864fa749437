"""Decoding over several devices: split over sequences, over key heads, and along the cache.

Split along its length, each device attends to its part of the cache, and the results are merged by
their log-sum-exps:

    lse = log sum_d exp(lse_d),   out = sum_d exp(lse_d - lse) out_d

That is exact, and all that is sent is a maximum and a sum of what is as large as the outputs: the
cache stays where it is.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxcomp.kernels import chips
from jaxcomp.kernels.meshes import Axes, count, names, padded
from jaxcomp.kernels.sparse_attention.ring import by_query, share
from jaxcomp.kernels.sparse_attention.rules import Mask
from jaxcomp.kernels.sparse_attention.sharding import (
    check_key_heads,
    check_masks,
    check_parts,
    own_key_heads,
    own_masks,
)


@dataclasses.dataclass(frozen=True)
class Placement:
    """How decoding is split over a mesh.

    Attributes:
      mesh: the mesh.
      batch: mesh axes that split the batch.
      cache: mesh axes that split the cache along its length.
      heads: mesh axes that split the query heads.
      kv_heads: mesh axes that split the key heads: the same, or None where each device has all.
    """

    mesh: jax.sharding.AbstractMesh
    batch: Axes
    cache: Axes
    heads: Axes
    kv_heads: Axes


def placement(
    q: jax.Array,
    k: jax.Array,
    mask: Mask,
    q_spec: PartitionSpec | None = None,
    kv_spec: PartitionSpec | None = None,
) -> Placement | None:
    """How decoding is to be split.

    Args:
      q: (batch, queries, heads, head_dim).
      k: (batch, capacity, kv_heads, head_dim).
      mask: which query looks at which key.
      q_spec: mesh axes of q, on a mesh of Auto axes; those of the cache's batch and heads if None.
      kv_spec: mesh axes of k and v; those of q if None.

    Returns:
      The placement; None where one device computes alone, or where the sharding is not known.

    Raises:
      ValueError: q and k are split in ways that do not belong together, or that the mesh or the
        shapes do not allow.
    """
    mesh = chips.mesh_of(q, k)
    if mesh is None:
        return None
    if q_spec is None and kv_spec is None and AxisType.Explicit in mesh.axis_types:
        q_spec, kv_spec = (jax.typeof(x).sharding.spec for x in (q, k))
    if q_spec is None and kv_spec is None:
        return None
    sizes = dict(mesh.shape)
    if q_spec is None:
        batch, _, heads, _ = padded(kv_spec, 4, "kv_spec", sizes)
        q_spec = PartitionSpec(batch, None, heads)
    kv_spec = q_spec if kv_spec is None else kv_spec
    batch, queries, heads, dim = padded(q_spec, 4, "q_spec", sizes)
    kv_batch, cache, kv_heads, kv_dim = padded(kv_spec, 4, "kv_spec", sizes)
    told = f"q {q.shape} is split as {q_spec} and the cache {k.shape} as {kv_spec}"
    if kv_batch != batch or queries or dim or kv_dim or kv_heads not in (None, heads):
        raise ValueError(
            f"{told}: the batch must be split alike, heads alike or those of the cache not at all, "
            "queries and head_dim not at all; jax.reshard q, which is small"
        )
    both = sorted({*names(cache)} & {*names(heads)})
    if both:
        raise ValueError(
            f"{told}: {', '.join(both)} would split both the heads of q and the cache's length, so "
            "no device has all heads for its part; leave the heads of q whole on that axis"
        )
    check_parts(
        told,
        sizes,
        {
            "the batch": (q.shape[0], batch),
            "the cache's length": (k.shape[1], cache),
            "the heads of q": (q.shape[2], heads),
            "the heads of k": (k.shape[2], kv_heads),
        },
    )
    if not kv_heads:
        check_key_heads(told, count(heads, sizes), k.shape[2])
    check_masks(told, mask, count(heads, sizes))
    return Placement(mesh, batch, cache, heads, kv_heads)


def reads_layers(q: jax.Array, place: Placement | None) -> bool:
    """Whether each device reads one layer of a cache of several where it is.

    Where it takes some of the key heads that it holds, or types of arrays say how they are split,
    the layer is cut out first.
    """
    mesh = chips.mesh_of(q) if place is None else place.mesh
    if mesh is None:
        return True
    if place is None or AxisType.Explicit in mesh.axis_types:
        return False
    return bool(place.kv_heads) or count(place.heads, dict(mesh.shape)) == 1


def attention(
    local: Callable[..., tuple[jax.Array, jax.Array]],
    operands: dict[str, jax.Array],
    mask: Mask,
    place: Placement,
) -> tuple[jax.Array, jax.Array]:
    """Decoding, each device with its part of the cache.

    Args:
      local: gives one device's outputs and log-sum-exps from its operands, by name, its mask, the
        position where its part of the cache starts, and the dtype that the outputs are to have.
      operands: "q", "lengths", "k", "v", and those of the others that there are; with "layer",
        k and v of all layers.
      mask: which query looks at which key.
      place: from ``placement``.

    Returns:
      Outputs (batch, queries, heads, value_dim) and log-sum-exps (batch, heads, queries), split as
      the queries are, the same on all devices along the cache.
    """
    sizes = dict(place.mesh.shape)
    parts, splits = count(place.heads, sizes), count(place.cache, sizes)
    held = PartitionSpec(place.batch, place.cache, place.kv_heads)
    specs = dict.fromkeys(operands, held) | {
        "q": PartitionSpec(place.batch, None, place.heads),
        "lengths": PartitionSpec(place.batch),
        "segment_ids": PartitionSpec(place.batch),
        "kv_segment_ids": PartitionSpec(place.batch, place.cache),
        "span": PartitionSpec(place.heads),
        "layer": PartitionSpec(),
    }
    if "layer" in operands:
        specs |= dict.fromkeys("kv", PartitionSpec(None, *held))
    specs = {name: specs[name] for name in operands}
    if AxisType.Explicit in place.mesh.axis_types:
        # Small, and often the same everywhere: their own sharding need not be asked for.
        operands = operands | {
            name: jax.reshard(operands[name], NamedSharding(place.mesh, specs[name]))
            for name in ("lengths", "segment_ids", "kv_segment_ids", "span")
            if name in operands
        }
    mask = own_masks(mask, parts)

    def body(operands):
        if parts > 1 and not place.kv_heads:
            operands = own_key_heads(operands, place.heads, parts)
        q, capacity = operands["q"], operands["k"].shape[-3]
        if splits == 1:
            return local(operands, mask, 0, q.dtype)
        # Rounded once, after the sum.
        exact = jnp.promote_types(q.dtype, jnp.float32)
        start = jax.lax.axis_index(place.cache) * capacity
        out, lse = local(operands, mask, start, exact)
        return _merged(out, lse, place.cache, q.dtype)

    out = specs["q"], PartitionSpec(place.batch, place.heads)
    return jax.shard_map(body, mesh=place.mesh, in_specs=(specs,), out_specs=out, check_vma=False)(
        operands
    )


def _merged(out, lse, axes, dtype):
    """Results of all parts of the cache from each device's own."""
    top = jax.lax.pmax(lse, axes)
    weight = share(lse, top)
    total, summed = jax.lax.psum((weight, out * by_query(weight)), axes)
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    lse = jnp.where(some, top + jnp.log(safe), -jnp.inf)
    return (summed / by_query(safe)).astype(dtype), lse
