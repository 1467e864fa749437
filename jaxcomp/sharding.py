"""Sharding of parameter trees over a mesh: from the specs of dense weights to those of every array.

Rules speak of the dense weight's own axes, whatever it is stored as. They are one of

- an ordered sequence of ``(rule, PartitionSpec)``: rules name leaf paths as in a recipe, the first
  that matches counts, and leaves that none matches are replicated;
- a tree of PartitionSpecs (None replicates) with the paths of the parameters, such as
  ``nnx.get_partition_spec(state)`` or Linen's ``nn.logical_to_mesh(nn.get_partition_spec(..))``.
"""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp import out_of_memory, packed, packed_sparse
from jaxcomp import rules as names
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import (
    Affine,
    CodebookPart,
    CompressedArray,
    FloatPart,
    InputQuant,
    InputScale,
    NMPart,
    SparsePart,
    is_compressed,
)
from jaxcomp.formats.split import Axes, Split, describe, names_of, part_specs
from jaxcomp.graph.trace import leaf_paths

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


def leaf_specs(leaf: Any, spec: PartitionSpec | None, mesh: Mesh, path: str = "weight") -> Any:
    """The specs of every array of one leaf.

    Args:
      leaf: dense or compressed, arrays or shapes of them.
      spec: mesh axes of the dense leaf's axes; None replicates.
      mesh: has the axes that ``spec`` names.
      path: name of the leaf, for errors.

    Returns:
      A PartitionSpec; for a compressed leaf a compressed array that holds PartitionSpecs.

    Raises:
      JaxcompError: the spec has more entries than the leaf has axes or names an unknown mesh axis;
        the mesh does not divide an axis; or it splits a group or a packed byte.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcomp import formats
      >>> mesh = jax.sharding.AbstractMesh((2,), ("model",))
      >>> part = formats.quantize(formats.Int(4, group_size=32), jnp.ones((8, 64)))
      >>> w = CompressedArray.from_matrix(part, (8, 64), jnp.float32)
      >>> tuple(leaf_specs(w, PartitionSpec(None, "model"), mesh).parts[0].scale)
      ('model', None)
    """
    if not hasattr(leaf, "shape"):
        return PartitionSpec()
    if not is_compressed(leaf):
        return PartitionSpec(*check_spec(spec, tuple(leaf.shape), dict(mesh.shape), path))
    split = leaf_split(leaf, spec, mesh, path)
    return leaf.replace(parts=tuple(part_specs(part, split) for part in leaf.parts))


def leaf_split(
    leaf: CompressedArray, spec: PartitionSpec | None, mesh: Mesh, path: str = "weight"
) -> Split:
    """How the matrix ``(*stack, out, in)`` of a compressed leaf is split.

    Args:
      leaf: arrays or shapes of them.
      spec: mesh axes of the dense leaf's axes; None replicates.
      mesh: has the axes that ``spec`` names.
      path: name of the leaf, for errors.

    Returns:
      Mesh axes of each stack axis, of out and of in.

    Raises:
      JaxcompError: as ``leaf_specs``, but groups and bytes are not looked at.
    """
    sizes = dict(mesh.shape)
    entries = check_spec(spec, tuple(leaf.shape), sizes, path)
    stack: list[Axes] = [None] * len(leaf.stack)
    dims: list[Axes] = [None] * len(leaf.dims)
    for (kind, index), entry in zip(leaf._layout(), entries, strict=True):
        (stack if kind == "stack" else dims)[index] = entry
    out = _major(leaf, dims, leaf.out_axes, "out", path)
    inputs = _major(leaf, dims, leaf.in_axes, "in", path)
    return Split(tuple(stack), out, inputs, sizes, path)


def specs(params: Any, rules: Any, mesh: Mesh) -> Any:
    """The PartitionSpec of every array of a parameter tree; nothing is placed.

    Args:
      params: dense and compressed leaves, arrays or shapes of them.
      rules: see the head of this file.
      mesh: concrete or abstract.

    Returns:
      The tree with a PartitionSpec in place of each array.

    Raises:
      JaxcompError: a rule matches nothing or does not fit its leaf (see ``leaf_specs``).
    """
    check_mesh(mesh)
    named, treedef = leaf_paths(params)
    wanted = matched([path for path, _ in named], rules)
    leaves = [leaf_specs(leaf, wanted.get(path), mesh, path) for path, leaf in named]
    return jax.tree.unflatten(treedef, leaves)


def shardings(params: Any, rules: Any, mesh: Mesh) -> Any:
    """``specs`` as NamedShardings: for ``jit``, orbax, or compiling ahead of time.

    Args:
      params: dense and compressed leaves, arrays or shapes of them.
      rules: see the head of this file.
      mesh: concrete, or abstract where nothing is to be placed.

    Returns:
      The tree with a NamedSharding in place of each array.

    Raises:
      JaxcompError: as ``specs``.
    """
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs(params, rules, mesh), is_leaf=_is_spec
    )


def like(tree: Any, params: Any, rules: Any, mesh: Mesh, plan: Sequence[Any] = ()) -> Any:
    """Shardings of what training keeps beside its weights, each as its weight is split.

    A leaf belongs to a weight if its path ends with the weight's and it has the same shape, as in
    an optimizer's moments or gradients; or if a key of its path is the weight's whole path, as in
    what ``jc.qat`` learns about it. All else (counts, keys) is replicated.

    Args:
      tree: states, arrays or shapes of them: of optimizers, of ``jc.qat``, or a tuple of both.
      params: the dense weights, arrays or shapes of them.
      rules: how the mesh splits them; see the head of this file.
      mesh: concrete or abstract.
      plan: of the state of ``jc.qat`` (``state.plan``): it says which axes of a weight are outputs.
        Without it what is learned about a weight is replicated.

    Returns:
      The tree with a NamedSharding in place of each array.

    Raises:
      JaxcompError: as ``specs``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.ones((4, 2))}
      >>> mesh = jax.sharding.AbstractMesh((2,), ("model",))
      >>> moments = optax.sgd(0.1, momentum=0.9).init(params)
      >>> found = like(moments, params, [("w", PartitionSpec("model"))], mesh)
      >>> tuple(found[0].trace["w"].spec)
      ('model', None)
    """
    weights = dict(leaf_paths(params)[0])
    wanted = matched(list(weights), rules)
    known = {path: leaf_specs(leaf, wanted.get(path), mesh, path) for path, leaf in weights.items()}
    layouts = {weight.path: weight.layout for weight in plan}
    sizes = dict(mesh.shape)

    def of(keys: tuple, leaf: Any) -> NamedSharding:
        names_ = [jax.tree_util.keystr((k,), simple=True) for k in keys]
        whole, shape = "/" + "/".join(names_), np.shape(leaf)
        for path, spec in known.items():
            if whole.endswith("/" + path) and shape == tuple(weights[path].shape):
                return NamedSharding(mesh, spec)
        path = next((n for n in names_ if n in layouts and n in known), None)
        spec = (
            PartitionSpec() if path is None else _of_state(shape, layouts[path], known[path], sizes)
        )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(of, tree)


def _of_state(
    shape: tuple[int, ...], layout: Any, spec: PartitionSpec, sizes: dict[str, int]
) -> PartitionSpec:
    """How something ``(*stack, outputs, groups of inputs)`` about a weight is split."""
    entries = (*spec, *(None,) * (len(layout.leaf_shape) - len(spec)))
    axes = [entries[a] for a in layout.stack_axes]
    axes += [entries[of[0]] if of else None for of in (layout.out_axes, layout.in_axes)]
    fits = (
        axis if size % math.prod(sizes[n] for n in names_of(axis)) == 0 else None
        for axis, size in zip(axes, shape, strict=False)
    )
    return PartitionSpec(*fits)


def shard(value: Any, mesh: jax.sharding.Mesh, rules: Any) -> Any:
    """Places every array of a parameter tree on a mesh.

    Host arrays, memory-mapped ones too, are read shard by shard: a process reads only what its
    devices hold. Meshes with Auto and with Explicit axes are served alike.

    Args:
      value: parameters, or what ``compress`` or ``load`` returned.
      mesh: devices, of one or several processes.
      rules: see the head of ``jaxcomp.sharding``.

    Returns:
      The same type with placed arrays.

    Raises:
      JaxcompError: as ``specs``, before anything is placed.
      OutOfMemoryError: of a device; the message names the weight.

    Example:
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> placed = shard({"w": np.ones((4, 2))}, mesh, [("w", PartitionSpec("model"))])
      >>> tuple(placed["w"].sharding.spec)
      ('model', None)
    """
    from jaxcomp.compress import Result
    from jaxcomp.io.checkpoint import Saved

    check_mesh(mesh, concrete=True)
    if isinstance(value, Saved):
        return value._replace(params=shard(value.params, mesh, rules))
    if isinstance(value, Result):
        return dataclasses.replace(value, params=shard(value.params, mesh, rules))
    wanted = shardings(value, rules, mesh)
    named, treedef = leaf_paths(value)
    placed = []
    for (path, leaf), of in zip(named, treedef.flatten_up_to(wanted), strict=True):
        with out_of_memory.placing(path, np.shape(leaf)):
            placed.append(jax.tree.map(_place, leaf, of))
    return jax.tree.unflatten(treedef, placed)


def noted(params: Any, rules: Any, mesh: Mesh) -> Any:
    """Parameters whose compressed leaves know how they are split over a mesh of Auto axes.

    For shapes that are to be compiled ahead of time; of arrays ``dispatch(..).prepare`` notes it.

    Args:
      params: arrays, or shapes of them, split as ``rules`` say.
      rules: see the head of this file.
      mesh: concrete or abstract. Of one device, or of Explicit axes, nothing has to be known.

    Returns:
      The tree; its structure differs from that of one that is split otherwise.

    Raises:
      JaxcompError: as ``specs``.
    """
    told = mesh.size > 1 and AxisType.Explicit not in mesh.axis_types
    named, treedef = leaf_paths(params)
    wanted = matched([path for path, _ in named], rules) if told else {}
    mesh = getattr(mesh, "abstract_mesh", mesh)

    def note(path: str, leaf: Any) -> Any:
        if not is_compressed(leaf):
            return leaf
        if not told:
            return leaf.replace(split=None)
        split = leaf_split(leaf, wanted.get(path), mesh, path)
        spec = PartitionSpec(*split.stack, split.out, split.inputs)
        return leaf.replace(split=NamedSharding(mesh, spec))

    return jax.tree.unflatten(treedef, [note(path, leaf) for path, leaf in named])


def held(leaf: CompressedArray) -> NamedSharding | None:
    """How the matrix ``(*stack, out, in)`` of a leaf lies on a mesh of Auto axes.

    Args:
      leaf: arrays that were placed, or shapes with shardings.

    Returns:
      Its mesh axes; None on one device, on Explicit axes (which types tell), in a traced function,
      or where parts lie differently.
    """
    found = set()
    for part in leaf.parts:
        inner = part
        while isinstance(inner, InputScale | InputQuant):
            inner = inner.part
        name = _CODES.get(type(inner))
        array = None if name is None else operator.attrgetter(name)(inner)
        if array is None or isinstance(array, jax.core.Tracer):
            return None
        found.add(getattr(array, "sharding", None))
    lies = found.pop()
    if found or not isinstance(lies, NamedSharding) or lies.mesh.size == 1:
        return None
    if AxisType.Explicit in lies.mesh.axis_types:
        return None
    mesh = getattr(lies.mesh, "abstract_mesh", lies.mesh)
    entries = (*lies.spec, *(None,) * (len(leaf.stack) + 2 - len(lies.spec)))
    return NamedSharding(mesh, PartitionSpec(*(entry or None for entry in entries)))


# Of each part an array (*stack, out, inputs packed or not): it lies as the matrix does.
_CODES = {
    Affine: "values",
    FloatPart: "values",
    CodebookPart: "indices",
    NMPart: "indices",
    SparsePart: "mask",
    packed.Prepared: "weight.codes",
    packed_sparse.PreparedNM: "positions",
}


def check_mesh(mesh: Any, concrete: bool = False) -> None:
    """Refuses what is no mesh, or with ``concrete`` no mesh of devices.

    Raises:
      JaxcompError: it is not.
    """
    if isinstance(mesh, jax.sharding.Mesh if concrete else Mesh):
        return
    raise JaxcompError(
        f"mesh is a {type(mesh).__name__}; give a jax.sharding.Mesh of devices, as jax.make_mesh "
        "makes it."
    )


def _place(array: Any, sharding: NamedSharding) -> Any:
    if not hasattr(array, "shape"):
        return array
    if isinstance(array, jax.Array):
        if sharding.is_fully_addressable or not array.is_fully_addressable:
            return jax.device_put(array, sharding)
        # Of this process alone, onto devices of several: device_put makes arrays there whose
        # shards cannot be read.
        array = np.asarray(array)
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: np.asarray(array[index], order="C")
    )


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)


def matched(paths: Sequence[str], rules: Any) -> dict[str, PartitionSpec | None]:
    """The spec that rules give each leaf.

    Args:
      paths: names of all leaves.
      rules: see the head of this file.

    Returns:
      Path -> spec of the dense leaf, or None where it is replicated.

    Raises:
      JaxcompError: a rule matches nothing or has no spec, a tree lacks a leaf, or they are none.
    """
    if rules is None or _is_spec(rules) or isinstance(rules, str):
        raise JaxcompError(
            f"sharding rules are {rules!r}; give a list of (path, PartitionSpec), or a tree of "
            "PartitionSpecs with the paths of the parameters."
        )
    if _is_sequence(rules):
        return _matched(paths, rules)
    if isinstance(rules, nnx.State):
        rules = nnx.to_pure_dict(rules)
    flat, _ = jax.tree_util.tree_flatten_with_path(
        rules, is_leaf=lambda value: value is None or _is_spec(value)
    )
    wanted = {jax.tree_util.keystr(k, simple=True, separator="/"): spec for k, spec in flat}
    for path, spec in wanted.items():
        if not (spec is None or _is_spec(spec)):
            raise JaxcompError(
                f"{path}: the tree of rules holds a {type(spec).__name__}; use a PartitionSpec, or "
                "None to replicate."
            )
    known = set(paths)
    for path in wanted:
        if path not in known:
            raise JaxcompError(_nothing(path, paths))
    for path in paths:
        if path not in wanted:
            raise JaxcompError(
                f"{path}: the tree of PartitionSpecs has no entry for this leaf; give None to "
                "replicate it."
            )
    return wanted


def _is_sequence(rules: Any) -> bool:
    return isinstance(rules, (list, tuple)) and all(
        isinstance(r, (list, tuple)) and len(r) == 2 and isinstance(r[0], str) for r in rules
    )


def _matched(paths: Sequence[str], rules: Any) -> dict[str, PartitionSpec | None]:
    for rule, spec in rules:
        if not (spec is None or _is_spec(spec)):
            raise JaxcompError(
                f"sharding rule {rule!r} gives a {type(spec).__name__}; use a PartitionSpec, or "
                "None to replicate."
            )
        if not any(names.fits(rule, path) for path in paths):
            raise JaxcompError(_nothing(rule, paths))
    return {
        path: next((spec for rule, spec in rules if names.fits(rule, path)), None) for path in paths
    }


def _nothing(rule: str, paths: Sequence[str]) -> str:
    close = ", ".join(names.close_names(rule, paths))
    return f"sharding rule {rule!r} matches no leaf; the closest paths are {close}."


def check_spec(
    spec: PartitionSpec | None, shape: tuple[int, ...], sizes: dict[str, int], path: str
) -> tuple[Axes, ...]:
    """The entries of a spec, one for each axis of an array.

    Args:
      spec: of the array; None splits nothing.
      shape: of the array.
      sizes: devices along each axis of the mesh.
      path: what the array is, for errors.

    Raises:
      JaxcompError: the mesh has no such axes, or does not divide the array by them.
    """
    entries = tuple(spec or ())
    if len(entries) > len(shape):
        raise JaxcompError(
            f"{path} {shape}: {spec} has {len(entries)} entries for {len(shape)} axes; give at "
            "most one for each axis of the dense leaf."
        )
    used: set[str] = set()
    for axis, entry in enumerate(entries):
        if entry is PartitionSpec.UNCONSTRAINED:
            raise JaxcompError(
                f"{path} {shape}: {spec} leaves axis {axis} open; say how it is split, or None."
            )
        for name in names_of(entry):
            if name not in sizes:
                raise JaxcompError(
                    f"{path} {shape}: {spec} names the mesh axis {name!r}, but the mesh has "
                    f"{sizes}; use one of its axes."
                )
            if name in used:
                raise JaxcompError(
                    f"{path} {shape}: {spec} uses the mesh axis {name!r} twice; use it once."
                )
            used.add(name)
        count = math.prod(sizes[name] for name in names_of(entry))
        if shape[axis] % count:
            raise JaxcompError(
                f"{path} {shape}: the mesh axis {describe(entry)} of {count} devices does not "
                f"divide axis {axis} of {shape[axis]}; split another axis, or fewer ways."
            )
    return (*(entry or None for entry in entries), *(None,) * (len(shape) - len(entries)))


def _major(
    leaf: CompressedArray, dims: list[Axes], axes: tuple[int, ...], name: str, path: str
) -> Axes:
    """The mesh axes of ``out`` or ``in``, which may come from the major-most leaf axis only."""
    for axis in axes[1:]:
        if dims[axis] is not None:
            raise JaxcompError(
                f"{path} {tuple(leaf.shape)}: the axes {axes} of {leaf.dims} make the {name} axis "
                f"of the compressed matrix, and the mesh axis {describe(dims[axis])} splits axis "
                f"{axis}, which is not the first of them; split axis {axes[0]} instead."
            )
    return dims[axes[0]] if axes else None


@part_specs.register
def _(part: packed.Prepared, split: Split) -> packed.Prepared:
    weight, shape = part.weight, part.shape
    k = weight.shape[1]
    # Codes of two bits are dealt out among 512 inputs.
    unit = 512 if weight.format == "int2" else 2
    grouped = weight.scales.shape[-2] > 1
    groups = split.along("in", k, weight.group_size, shape, "groups") if grouped else None
    scales = split.spec(groups, split.out)
    return part.replace(
        weight=dataclasses.replace(
            weight,
            codes=split.spec(split.out, split.along("in", k, unit, shape, "packed codes")),
            scales=scales,
            zeros=None if weight.zeros is None else scales,
        ),
        table=None if part.table is None else split.spec(None),
    )


@part_specs.register
def _(part: packed_sparse.PreparedNM, split: Split) -> packed_sparse.PreparedNM:
    k, scales = part.shape[-1], part.scales
    inputs = split.along("in", k, 4, part.shape, "blocks")
    if scales is not None:
        count = scales.shape[-1]
        groups = split.along("in", k, k // count, part.shape, "groups") if count > 1 else None
        scales = split.spec(split.out, groups)
    return part.replace(
        values=split.spec(None, split.out, inputs),
        positions=split.spec(split.out, inputs),
        scales=scales,
    )


@part_specs.register
def _(part: packed_sparse.BlockPart, split: Split) -> packed_sparse.BlockPart:
    counts = split.count(split.out), split.count(split.inputs)
    if counts not in (part.parts, (1, 1)):
        raise JaxcompError(
            f"{split.path} {part.shape}: its list of blocks has {part.parts} parts of outputs and "
            f"inputs, and the mesh {counts}; replicate this weight, or shard it before "
            "dispatch(..).prepare lists its blocks"
        )
    one = packed_sparse.list_spec(PartitionSpec(*split.stack, split.out, split.inputs))
    return part.replace(values=one, rows=one, columns=one)
