"""Physical removal of closed units: a smaller model of the same function.

    y = W[:, kept] f(V[kept] x + b[kept])  =  W m f(V x + b),   m the mask of the kept units

Source: https://arxiv.org/abs/1905.10650 (heads), https://arxiv.org/abs/2305.11627.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.errors import JaxcompError
from jaxcomp.graph.units import UnitGroup
from jaxcomp.pruning import structured


def remove(
    params: Any, groups: Sequence[UnitGroup], masks: Mapping[str, Any], *, pad: bool = False
) -> Any:
    """Cuts closed units out of all parameters that they are made of.

    The smaller model computes what the masked one does. A layer keeps one unit at least, closed
    by zeros if need be. Layers, rows, columns and single weights are closed but keep their places:
    without them the shapes that others see would change.

    Args:
      params: parameter tree of arrays.
      groups: from ``units``.
      masks: ``{group.name: (*stack, count)}`` bool, True for units to keep; concrete.
      pad: where stacked layers keep different numbers of units, keep as many in all as in the
        largest, the surplus closed by zeros.

    Returns:
      A tree of the same structure with smaller arrays. The function must take its sizes from the
      parameters, as all reference models do.

    Raises:
      JaxcompError: names or shapes do not fit, stacked layers would differ in size, or a unit's
        slice cannot be cut out of an array.

    Example:
      >>> params = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 4))}
      >>> groups = structured.units(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((2, 4)),
      ...                include="down")
      >>> masks = {"down:neuron": jnp.array([True, False, True, True, False, True])}
      >>> jax.tree.map(jnp.shape, remove(params, groups, masks))
      {'down': (4, 4), 'up': (4, 4)}
    """
    masks = {k: np.asarray(v, bool) for k, v in structured.checked(groups, masks, "masks").items()}
    # (leaf, axis) -> stack axes and (*stack, positions) of what stays; groups may share an axis.
    stays: dict[tuple[str, int], tuple[tuple[int, ...], np.ndarray]] = {}
    for group in groups:
        if group.name not in masks or group.kind not in ("head", "neuron"):
            continue
        if group.count == 1:
            continue
        keep = _same_counts(group, masks[group.name], pad)
        for member in group.members:
            if len(member.axes) != 1:
                raise JaxcompError(
                    f"{group.name}: units lie across axes {member.axes} of {member.path} "
                    f"{member.shape} and cannot be cut out; mask them, or choose a size of whole "
                    "slices"
                )
            spread = np.tile(np.repeat(keep, member.block, -1), member.repeats)
            after = member.length - member.offset - spread.shape[-1]
            edge = [(0, 0)] * len(group.stack) + [(member.offset, after)]
            spread = np.pad(spread, edge, constant_values=True)
            key = member.path, member.axes[0]
            stack_axes, old = stays.get(key, (member.stack_axes, True))
            if stack_axes != member.stack_axes:
                raise JaxcompError(
                    f"{group.name}: {member.path} is stacked along {member.stack_axes} here and "
                    f"{stack_axes} in another group; remove the groups one after the other"
                )
            stays[key] = stack_axes, old & spread
    params = structured.apply_masks(params, groups, masks)
    leaves, tree = structured.leaves_of(params, groups)
    for (path, axis), (stack_axes, keep) in stays.items():
        leaves[path] = _take(path, leaves[path], axis, stack_axes, keep)
    return jax.tree.unflatten(tree, list(leaves.values()))


def _same_counts(group: UnitGroup, keep: np.ndarray, pad: bool) -> np.ndarray:
    """A mask that keeps the same number of units, and one at least, at each stack index."""
    kept = keep.sum(-1)
    target = np.maximum(kept, 1)
    if len(np.unique(target)) > 1:
        if not pad:
            raise JaxcompError(
                f"{group.name}: the stacked layers keep {kept.tolist()} units, and one array "
                "cannot hold layers of different sizes; prune with scope='layer', pass pad=True to "
                "keep closed units, or unroll the layers (unstack) and find their units again"
            )
        target = np.full_like(target, target.max())
    # Closed units that stay, the first ones of each layer.
    surplus = np.cumsum(~keep, -1) <= (target - kept)[..., None]
    return keep | (surplus & ~keep)


def _take(path, leaf, axis, stack_axes, keep):
    counts = np.unique(keep.sum(-1))
    if len(counts) != 1:  # groups of different layers on one leaf
        raise JaxcompError(
            f"{path}: its stacked layers would differ in size; unroll them (unstack)"
        )
    index = np.argsort(~keep, -1, kind="stable")[..., : counts[0]]
    xp = np if isinstance(leaf, np.ndarray) else jnp
    leaf = structured.unsharded(leaf, (*stack_axes, axis))
    if not stack_axes:
        return xp.take(leaf, index, axis)
    order = (*stack_axes, axis)
    index = index.transpose([order.index(a) for a in sorted(order)])
    index = np.expand_dims(index, [a for a in range(leaf.ndim) if a not in order])
    return xp.take_along_axis(leaf, index, axis)


def unstack(tree: Any, prefix: str) -> Any:
    """Splits layers that are stacked for a scan into one subtree each, as unrolled models have.

    Args:
      tree: nested dicts of arrays with the layers' axis in front; or a flat dict by names that
        start with the prefix, as masks are.
      prefix: path of the stacked layers, "layers".

    Returns:
      The tree with "layers/0/..", "layers/1/.." in place of "layers/..".

    Raises:
      JaxcompError: there is nothing at the prefix, or sizes differ.

    Example:
      >>> jax.tree.map(jnp.shape, unstack({"layers": {"w": jnp.ones((2, 3))}}, "layers"))
      {'layers': {'0': {'w': (3,)}, '1': {'w': (3,)}}}
      >>> unstack({"layers/w:row": jnp.ones((1, 3))}, "layers")["layers/0/w:row"].shape
      (3,)
    """
    flat = {k: v for k, v in tree.items() if k.startswith(f"{prefix}/")}
    node: Any = flat
    if not flat:
        node = tree
        for part in prefix.split("/"):
            if not isinstance(node, Mapping) or part not in node:
                known = sorted(node) if isinstance(node, Mapping) else []
                raise JaxcompError(
                    f"there is nothing at {prefix!r}; at {part!r} there are {', '.join(known)}"
                )
            node = node[part]
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(node)}
    if len(sizes) != 1 or sizes == {()}:
        raise JaxcompError(f"the arrays at {prefix!r} have no leading axis of the same size")
    ((layers,),) = sizes
    if flat:
        rest = {k: v for k, v in tree.items() if k not in flat}
        return rest | {
            f"{prefix}/{i}/{k.removeprefix(f'{prefix}/')}": v[i]
            for i in range(layers)
            for k, v in flat.items()
        }
    split = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], node) for i in range(layers)}

    def replace(tree, parts):
        if not parts:
            return split
        return {**tree, parts[0]: replace(tree[parts[0]], parts[1:])}

    return replace(tree, prefix.split("/"))
