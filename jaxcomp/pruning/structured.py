"""Structured pruning: scores, masks and physical removal of the units of any model.

``units`` finds, through the graph, the units that are heads, neurons, rows, columns, whole layers
or single weights, and which slices of which parameters each is made of. A unit is closed by a zero
on the slice of its consumer (the weight that reads it), and removed by cutting out all its slices:

    score     sqrt(sum of w² over the unit), or |sum of w g|
    masked    W_consumer[:, unit] = 0
    removed   the unit's rows, biases and columns are gone; the function is that of the masked model

Source: structured magnitude and Taylor scores as in https://arxiv.org/abs/2305.11627 (LLM-Pruner),
https://arxiv.org/abs/1906.10771.

Differs from the paper in: units are found in the jaxpr, with exact bookkeeping of their axes, not
from degrees in a graph of modules; heads that share keys and values are one unit.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.errors import JaxcompError
from jaxcomp.formats import is_compressed
from jaxcomp.graph.scopes import Scope
from jaxcomp.graph.trace import Graph, leaf_paths, trace
from jaxcomp.graph.units import Member, UnitGroup, coupled_units, layer_unit, leaf_units
from jaxcomp.kernels.implementations import only_xla
from jaxcomp.pruning import masks as selection
from jaxcomp.pruning import paths

Kind = Literal["head", "neuron", "row", "column", "layer", "weight"]
_KINDS = ("head", "neuron", "row", "column", "layer", "weight")


def units(
    apply: Callable,
    params: Any,
    *inputs: Any,
    include: str | Sequence[str],
    kind: Kind = "neuron",
    size: int | None = None,
) -> tuple[UnitGroup, ...]:
    """Finds the prunable units whose consumers are some weights.

    Args:
      apply: a pure function of a parameter tree and inputs.
      params: parameter tree; only shapes are read.
      *inputs: example inputs or their shapes.
      include: globs over paths of consumers: attention output projections for heads, the second
        matmul of an MLP for neurons, the last weight of a residual branch for layers. A rule that
        starts with ``re:`` is a regular expression.
      kind: "head" and "neuron" are blocks of the consumer's inputs with all that makes them;
        "layer" is the branch that the consumer ends; "row" (output), "column" (input) and "weight"
        are parts of the consumer alone.
      size: input channels of one unit: head_dim for heads (times query heads per key-value head in
        grouped-query attention), by default 1 for neurons.

    Returns:
      One group a consumer, in the order of the parameters.

    Raises:
      JaxcompError: a rule matches nothing, the size does not divide, or the units cannot be told
        apart somewhere in the function.

    Example:
      >>> params = {"up": jnp.ones((4, 6)), "bias": jnp.ones(6), "down": jnp.ones((6, 4))}
      >>> mlp = lambda p, x: jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]
      >>> (group,) = units(mlp, params, jnp.ones((2, 4)), include="down")
      >>> group.name, group.count, [(m.path, m.role, m.axes) for m in group.members]
      ... # doctest: +NORMALIZE_WHITESPACE
      ('down:neuron', 6,
       [('down', 'consumer', (0,)), ('bias', 'producer', (0,)), ('up', 'producer', (1,))])
    """
    if kind not in _KINDS:
        raise JaxcompError(f"kind {kind!r} must be one of {', '.join(_KINDS)}")
    if kind == "head" and size is None:
        raise JaxcompError(
            "kind 'head' needs size: the inputs of the output projection that one head makes, "
            "head_dim, times the query heads of one key-value head in grouped-query attention"
        )
    if kind not in ("head", "neuron") and size is not None:
        raise JaxcompError(f"kind {kind!r} takes no size; leave it out")
    with only_xla():  # Units are followed through equations, not through a kernel.
        graph = trace(apply, params, *inputs)
    return find_units(graph, include, kind, size)


def find_units(
    graph: Graph, include: str | Sequence[str], kind: Kind = "neuron", size: int | None = None
) -> tuple[UnitGroup, ...]:
    """``units`` of a function that is traced already; arguments as there."""
    consumers = [p for p in graph.paths if any(s.is_contraction for s in graph.sites_of(p))]
    chosen = paths.choose(consumers, (), include)
    scope = Scope.of(graph.program)
    found: list[UnitGroup] = []
    for path in chosen:
        if kind in ("head", "neuron"):
            group = coupled_units(graph, path, 1 if size is None else size, kind, scope)
        elif kind == "layer":
            group = layer_unit(graph, path, scope)
        else:
            group = leaf_units(graph, path, kind)
        if all(set(group.members) != set(other.members) for other in found):
            found.append(group)
    return tuple(found)


# One member.


def spread(group: UnitGroup, member: Member, values: jax.Array, fill: Any = 1) -> jax.Array:
    """Values of units as an array that broadcasts against the member's leaf."""
    n = len(group.stack)
    values = jnp.tile(jnp.repeat(values, member.block, -1), (1,) * n + (member.repeats,))
    after = member.length - member.offset - values.shape[-1]
    values = jnp.pad(values, [(0, 0)] * n + [(member.offset, after)], constant_values=fill)
    axes = (*member.stack_axes, *member.axes)
    values = values.reshape(*group.stack, *(member.shape[a] for a in member.axes))
    values = values.transpose([axes.index(a) for a in sorted(axes)])
    return jnp.expand_dims(values, [a for a in range(len(member.shape)) if a not in axes])


def _sum(group: UnitGroup, member: Member, leaf: jax.Array) -> jax.Array:
    """Sums a leaf over each unit's part of it."""
    used = (*member.stack_axes, *member.axes)
    leaf = leaf.sum([a for a in range(leaf.ndim) if a not in used])
    order = sorted(used)
    leaf = leaf.transpose([order.index(a) for a in used]).reshape(*group.stack, member.length)
    length = member.repeats * group.count * member.block
    leaf = leaf[..., member.offset : member.offset + length]
    leaf = leaf.reshape(*group.stack, member.repeats, group.count, member.block)
    return leaf.sum((-3, -1))


def _wide(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def leaves_of(params: Any, groups: Sequence[UnitGroup]) -> tuple[dict[str, Any], Any]:
    """Leaves by path, checked against the groups, and the tree's structure."""
    flat, tree = leaf_paths(params)
    leaves = dict(flat)
    for group in groups:
        for member in group.members:
            if member.path not in leaves:
                close = ", ".join(paths.close_names(member.path, leaves))
                raise JaxcompError(
                    f"{group.name}: the parameters have no {member.path!r}; the closest are {close}"
                )
            leaf = leaves[member.path]
            if is_compressed(leaf):
                raise JaxcompError(
                    f"{group.name}: {member.path} {tuple(leaf.shape)} is compressed; prune units "
                    "before compressing, or materialize it"
                )
            if tuple(leaf.shape) != member.shape:
                raise JaxcompError(
                    f"{group.name}: {member.path} {tuple(leaf.shape)} was {member.shape} when its "
                    "units were found; find the units of these parameters"
                )
    return leaves, tree


def checked(groups: Sequence[UnitGroup], values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Values by group, checked; groups without one are left out."""
    known = {g.name: g for g in groups}
    if len(known) != len(groups):
        raise JaxcompError("two groups have the same name; pass each group once")
    for name, value in values.items():
        if name not in known:
            close = ", ".join(paths.close_names(name, known))
            raise JaxcompError(f"{what} for {name!r}, which is no group; the closest are {close}")
        if tuple(jnp.shape(value)) != known[name].shape:
            raise JaxcompError(
                f"{what} of {name} have shape {tuple(jnp.shape(value))}; one value a unit is "
                f"{known[name].shape}"
            )
    return {g.name: values[g.name] for g in groups if g.name in values}


# Scores and selection.


def unit_scores(
    params: Any,
    groups: Sequence[UnitGroup],
    method: Literal["magnitude", "taylor"] = "magnitude",
    grads: Any = None,
) -> dict[str, jax.Array]:
    """How important each unit is.

    Args:
      params: parameter tree.
      groups: from ``units``.
      method: "magnitude", the l2 norm of all parameters of the unit; "taylor", |sum of w g| over
        them, the change of the loss to first order when the unit goes.
      grads: for "taylor", gradients of the loss like ``params``.

    Returns:
      ``{group.name: (*stack, count)}``, at least float32.

    Raises:
      JaxcompError: gradients are missing, or the parameters are not those of the groups.

    Example:
      >>> params = {"up": jnp.array([[3.0, 0.0]]), "down": jnp.array([[4.0], [1.0]])}
      >>> groups = units(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((1, 1)),
      ...                include="down")
      >>> unit_scores(params, groups)["down:neuron"].tolist()
      [5.0, 1.0]
    """
    if method not in ("magnitude", "taylor"):
        raise JaxcompError(f"method {method!r} must be 'magnitude' or 'taylor'")
    if (method == "taylor") != (grads is not None):
        raise JaxcompError("gradients go with method='taylor', and it needs them")
    leaves, _ = leaves_of(params, groups)
    others = leaves if grads is None else leaves_of(grads, groups)[0]
    found = {}
    for group in groups:
        total = sum(
            _sum(group, m, _wide(leaves[m.path]) * _wide(others[m.path])) for m in group.members
        )
        found[group.name] = jnp.sqrt(total) if method == "magnitude" else jnp.abs(total)
    return found


def parameter_counts(groups: Sequence[UnitGroup]) -> dict[str, np.ndarray]:
    """Parameters of each unit.

    Args:
      groups: from ``units``.

    Returns:
      ``{group.name: (*stack, count)}`` int64.
    """
    return {g.name: np.full(g.shape, g.unit_size, np.int64) for g in groups}


def select_units(
    groups: Sequence[UnitGroup],
    scores: Mapping[str, jax.Array],
    fraction: float,
    scope: Literal["global", "layer"] = "global",
    min_units: int = 1,
) -> dict[str, jax.Array]:
    """Selects the units to keep: those with the highest scores.

    Args:
      groups: from ``units``.
      scores: ``{group.name: (*stack, count)}``, larger for more important.
      fraction: of the units to drop, 0 to 1.
      scope: "layer" drops ``round(fraction * count)`` of each layer; "global" drops
        ``round(fraction * units)`` of all units of a kind together, heads and neurons each for
        themselves.
      min_units: how many each layer keeps at least.

    Returns:
      ``{group.name: (*stack, count)}`` bool, True for units to keep; exact counts, of equal scores
      the first is dropped first.

    Raises:
      JaxcompError: scores are missing, or so many units cannot be dropped.

    Example:
      >>> group = UnitGroup("mlp", "neuron", 4, (), ())
      >>> select_units([group], {"mlp": jnp.array([3.0, 1.0, 1.0, 2.0])}, 0.25)["mlp"].tolist()
      [True, False, True, True]
    """
    selection.check_sparsity(fraction)
    if scope not in ("global", "layer"):
        raise JaxcompError(f"scope {scope!r} must be 'global' or 'layer'")
    scores = checked(groups, scores, "scores")
    missing = [g.name for g in groups if g.name not in scores]
    if missing:
        raise JaxcompError(f"no scores for {', '.join(missing)}; score all groups that are pruned")
    pools: dict[Any, list[UnitGroup]] = {}
    for group in groups:
        pools.setdefault(group.kind if scope == "global" else group.name, []).append(group)
    keep: dict[str, jax.Array] = {}
    for key, pool in pools.items():
        layers = {g.name: int(np.prod(g.stack, dtype=int)) for g in pool}
        if scope == "global":
            total = sum(layers[g.name] * g.count for g in pool)
            free = sum(layers[g.name] * max(0, g.count - min_units) for g in pool)
        else:
            (total,) = (g.count for g in pool)
            free = max(0, total - min_units)
        drop = selection.dropped_count(fraction, total)
        if drop > free:
            raise JaxcompError(
                f"{key}: dropping {drop} of {total} units would leave a layer with fewer than "
                f"min_units={min_units}; drop at most {free} (a fraction of {free / total:.4g}), "
                "or lower min_units"
            )
        safe = [_protect(scores[g.name], min_units) for g in pool]
        if scope == "global":
            kept = selection.drop_smallest_of_all(safe, drop, signed=True)
        else:
            kept = [selection.drop_smallest(s, drop, signed=True) for s in safe]
        keep |= {g.name: k for g, k in zip(pool, kept, strict=True)}
    return {g.name: keep[g.name] for g in groups}


def unsharded(x: Any, axes: Sequence[int]) -> Any:
    """An array of an Explicit mesh with some axes whole on every device; others as they are."""
    if not isinstance(x, jax.Array):
        return x
    sharding = jax.typeof(x).sharding
    spec = tuple(sharding.spec)
    if all(a >= len(spec) or spec[a] is None for a in axes):
        return x
    whole = [None if a in axes else s for a, s in enumerate(spec)]
    return jax.sharding.reshard(x, jax.NamedSharding(sharding.mesh, jax.P(*whole)))


def _protect(score: jax.Array, least: int) -> jax.Array:
    """Infinite scores for the ``least`` best units of each layer."""
    score = unsharded(_wide(score), tuple(range(len(jnp.shape(score)))))
    if least <= 0:
        return score
    best = selection.drop_smallest(score, max(0, score.shape[-1] - least), signed=True)
    return jnp.where(best, jnp.inf, score)


# What is done with the selection.


def apply_gates(params: Any, groups: Sequence[UnitGroup], gates: Mapping[str, Any]) -> Any:
    """Multiplies each unit by a gate, on the slice of its consumer.

    For a linear consumer this is a gate on the unit's activations. Gates of several groups on one
    weight multiply.

    Args:
      params: parameter tree.
      groups: from ``units``.
      gates: ``{group.name: (*stack, count)}``; groups without gates are left as they are.

    Returns:
      The parameter tree with gated consumers, dtypes kept.

    Raises:
      JaxcompError: names or shapes do not fit.
    """
    gates = checked(groups, gates, "gates")
    leaves, tree = leaves_of(params, groups)
    for group in groups:
        if group.name not in gates:
            continue
        for member in group.consumers:
            leaf = jnp.asarray(leaves[member.path])
            factor = spread(group, member, jnp.asarray(gates[group.name]))
            wide = jnp.promote_types(leaf.dtype, factor.dtype)
            leaves[member.path] = (leaf.astype(wide) * factor.astype(wide)).astype(leaf.dtype)
    return jax.tree.unflatten(tree, list(leaves.values()))


def apply_masks(params: Any, groups: Sequence[UnitGroup], masks: Mapping[str, Any]) -> Any:
    """Closes units: zeros on the slices of their consumers.

    Args:
      params: parameter tree.
      groups: from ``units``.
      masks: ``{group.name: (*stack, count)}`` bool, True for units to keep.

    Returns:
      The parameter tree, exactly zero where units are closed.

    Raises:
      JaxcompError: names or shapes do not fit.
    """
    masks = checked(groups, masks, "masks")
    leaves, tree = leaves_of(params, groups)
    for group in groups:
        if group.name not in masks:
            continue
        for member in group.consumers:
            keep = spread(group, member, jnp.asarray(masks[group.name], bool), fill=True)
            leaf = jnp.asarray(leaves[member.path])
            leaves[member.path] = jnp.where(keep, leaf, jnp.zeros((), leaf.dtype))
    return jax.tree.unflatten(tree, list(leaves.values()))
