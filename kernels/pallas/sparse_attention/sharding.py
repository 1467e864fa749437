"""Attention over several devices: split over sequences, over heads, and over positions.

Split over the batch or over heads, each device computes alone. Split over positions, keys and
values go round (``ring``), and no device holds all of them. On meshes with Explicit axes the types
of q and k say how they are split; on Auto axes a traced function cannot know it, and has to be
told.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxcomp.kernels import chips
from jaxcomp.kernels.meshes import Axes, count, names, padded
from jaxcomp.kernels.sparse_attention import ring
from jaxcomp.kernels.sparse_attention.rules import Mask, PerHead, full

# Which axes of the operands are (batch, positions, heads), of queries or of keys.
OF_QUERIES = {"segment_ids": "bs", "span": "h"}
OF_KEYS = {"k": "bsh", "v": "bsh", "kv_segment_ids": "bs", "k_scale": "bsh", "v_scale": "bsh"}


@dataclasses.dataclass(frozen=True)
class Placement:
    """How attention is split over a mesh.

    Attributes:
      mesh: the mesh.
      batch: mesh axes that split the batch.
      sequence: the mesh axis that splits queries and keys, or None.
      heads: mesh axes that split the query heads.
      kv_heads: mesh axes that split the key heads: the same, or None where each device has all.
    """

    mesh: jax.sharding.AbstractMesh
    batch: Axes
    sequence: str | None
    heads: Axes
    kv_heads: Axes

    def spec(self, axes: str, of_keys: bool) -> PartitionSpec:
        """The spec of an operand, from the letters of its axes."""
        heads = self.kv_heads if of_keys else self.heads
        known = {"b": self.batch, "s": self.sequence, "h": heads}
        return PartitionSpec(*(known[letter] for letter in axes))


def placement(
    q: jax.Array,
    k: jax.Array,
    mask: Mask,
    span: jax.Array | None,
    q_spec: PartitionSpec | None = None,
    kv_spec: PartitionSpec | None = None,
) -> Placement | None:
    """How attention is to be split.

    Args:
      q: (batch, queries, heads, head_dim).
      k: (batch, keys, kv_heads, head_dim).
      mask: which query looks at which key.
      span: the adaptive span, or None.
      q_spec: mesh axes of q, on a mesh of Auto axes.
      kv_spec: mesh axes of k and v; those of q if None.

    Returns:
      The placement; None where one device computes alone, or where the sharding is not known.

    Raises:
      ValueError: q and k are split in ways that do not belong together, or that the mesh, the
        heads or the mask do not allow.
    """
    mesh = chips.mesh_of(q, k)
    if mesh is None:
        return None
    if q_spec is None and AxisType.Explicit in mesh.axis_types:
        q_spec, kv_spec = (jax.typeof(x).sharding.spec for x in (q, k))
    if q_spec is None:
        return None
    kv_spec = q_spec if kv_spec is None else kv_spec
    sizes = dict(mesh.shape)
    batch, sequence, heads, dim = padded(q_spec, 4, "q_spec", sizes)
    *shared, kv_heads, kv_dim = padded(kv_spec, 4, "kv_spec", sizes)
    told = f"q {q.shape} is split as {q_spec} and k {k.shape} as {kv_spec}"
    if shared != [batch, sequence] or dim or kv_dim or kv_heads not in (None, heads):
        raise ValueError(
            f"{told}: batch and positions must be split alike, heads alike or those of k not at "
            "all, and head_dim not at all; jax.reshard them"
        )
    if len(names(sequence)) > 1:
        raise ValueError(f"{told}: positions can be split over one mesh axis; use one of them")
    check_parts(
        told,
        sizes,
        {
            "the batch": (q.shape[0], batch),
            "the queries": (q.shape[1], sequence),
            "the keys": (k.shape[1], sequence),
            "the heads of q": (q.shape[2], heads),
            "the heads of k": (k.shape[2], kv_heads),
        },
    )
    parts = count(heads, sizes)
    if not kv_heads:
        check_key_heads(told, parts, k.shape[2])
    check_masks(told, mask, parts)
    if sequence and span is not None:
        raise ValueError(
            f"{told}: an adaptive span needs whole sequences; split the batch or the heads"
        )
    return Placement(mesh, batch, names(sequence)[0] if sequence else None, heads, kv_heads)


def check_parts(told: str, sizes: dict[str, int], axes_of: dict[str, tuple[int, Axes]]) -> None:
    """Raises unless mesh axes divide what they split.

    Args:
      told: what is split how, for the error.
      sizes: of the mesh's axes.
      axes_of: size and mesh axes of each thing that is split, by its name.

    Raises:
      ValueError: they do not.
    """
    for name, (size, axes) in axes_of.items():
        if size % count(axes, sizes):
            raise ValueError(
                f"{told}: {axes} are {count(axes, sizes)} devices, which do not divide {name}, "
                f"{size}; split it fewer ways" + (", or not" if "heads of k" in name else "")
            )


def check_key_heads(told: str, parts: int, kv_heads: int) -> None:
    """Raises unless each part of the query heads looks at a whole number of key heads, or at one.

    Args:
      told: what is split and how, the beginning of the message.
      parts: of the query heads.
      kv_heads: key heads, all of them on each device.

    Raises:
      ValueError: neither of the two is a multiple of the other.
    """
    if parts % kv_heads and kv_heads % parts:
        raise ValueError(
            f"{told}: {parts} parts of the query heads are neither a multiple nor a divisor of the "
            f"{kv_heads} key heads; split the heads another way"
        )


def check_masks(told: str, mask: Mask, parts: int) -> None:
    """Raises unless each part of the heads has the same masks.

    Args:
      told: what is split and how, the beginning of the message.
      mask: which query looks at which key.
      parts: of the query heads.

    Raises:
      ValueError: they have not.
    """
    if own_masks(mask, parts) != mask and mask.masks != own_masks(mask, parts).masks * parts:
        raise ValueError(
            f"{told}: devices would have heads with different masks, and all run one program; "
            "order heads so that each part has the same masks, or split the batch or positions"
        )


def own_masks(mask: Mask, parts: int) -> Mask:
    """The masks of one part of the heads."""
    return PerHead(mask.masks[: len(mask.masks) // parts]) if isinstance(mask, PerHead) else mask


def one_device(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, place: Placement
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, Mask]:
    """Shapes of what one device has at a time, and the densest mask that it may have of them.

    Args:
      q: of all devices, like all others.
      k: likewise.
      v: likewise.
      mask: which query looks at which key.
      place: from ``placement``.
    """
    sizes = dict(place.mesh.shape)
    parts = count(place.heads, sizes)

    def shape(x, heads):
        cut = count(place.batch, sizes), count(place.sequence, sizes), heads
        one = (max(n // p, 1) for n, p in zip(x.shape[:3], cut, strict=True))
        return jax.ShapeDtypeStruct((*one, x.shape[3]), x.dtype)

    # Of two parts of the positions, the later may look at all of the earlier one.
    mask = full() if place.sequence else own_masks(mask, parts)
    return shape(q, parts), shape(k, parts), shape(v, parts), mask


def attention(
    local: Callable[..., tuple[jax.Array, jax.Array]],
    operands: dict[str, jax.Array],
    mask: Mask,
    place: Placement,
) -> tuple[jax.Array, jax.Array]:
    """Attention, each device for its own queries.

    Args:
      local: gives one device's outputs and log-sum-exps from its operands, by name, and a mask.
      operands: "q", "k", "v", and those of the others that there are.
      mask: which query looks at which key.
      place: from ``placement``.

    Returns:
      Outputs (batch, queries, heads, value_dim) and log-sum-exps (batch, heads, queries), split as
      the queries are.
    """
    specs = {"q": place.spec("bsh", False)}
    for known, of_keys in ((OF_QUERIES, False), (OF_KEYS, True)):
        specs |= {n: place.spec(axes, of_keys) for n, axes in known.items() if n in operands}
    parts = count(place.heads, dict(place.mesh.shape))
    mask = own_masks(mask, parts)
    plan = None
    if place.sequence:
        lengths = operands["q"].shape[1], operands["k"].shape[1]
        plan = ring.plan(mask, place.sequence, place.mesh.shape[place.sequence], *lengths)

    def one(q, moving, fixed, mask):
        return local({"q": q, **moving, **fixed}, mask)

    def body(operands):
        if parts > 1 and not place.kv_heads:
            operands = own_key_heads(operands, place.heads, parts)
        moving = {name: x for name, x in operands.items() if name in OF_KEYS}
        fixed = {name: x for name, x in operands.items() if name in OF_QUERIES}
        if plan is None:
            return one(operands["q"], moving, fixed, mask)
        return ring.attention(one, plan, operands["q"], moving, fixed)

    out = place.spec("bsh", False), place.spec("bhs", False)
    return jax.shard_map(body, mesh=place.mesh, in_specs=(specs,), out_specs=out, check_vma=False)(
        operands
    )


def own_key_heads(operands: dict[str, jax.Array], axes: Axes, parts: int) -> dict[str, jax.Array]:
    """Of key heads that each device has, those which its query heads look at."""
    heads = operands["k"].shape[2]
    size = max(heads // parts, 1)
    start = jax.lax.axis_index(axes) * heads // parts
    cut = functools.partial(
        jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=2
    )
    return {n: cut(x) if OF_KEYS.get(n) == "bsh" else x for n, x in operands.items()}
