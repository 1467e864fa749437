"""The tree of a checkpoint: its structure as JSON-able data, and the tree again from that."""

import collections.abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.formats import is_compressed, serialize
from jaxcomp.io.arrays import CheckpointError
from jaxcomp.io.later import Later


class Arrays(dict[str, Any]):
    """Arrays to be written, by name, in the order in which they were added."""

    def add(self, name: str, value: Any) -> str:
        """Adds one; a name that is taken is an error, for one array would replace the other."""
        if name in self:
            raise CheckpointError(
                f"{name}: two arrays of the tree have this path, because a key holds a '/'; rename "
                "one of the keys."
            )
        self[name] = value
        return name


def describe(node: Any, arrays: Arrays, path: str = "") -> dict[str, Any]:
    """The structure of a tree as JSON-able data; its arrays are added to ``arrays``.

    Args:
      node: dicts, lists and tuples of arrays, compressed arrays, numbers and None.
      arrays: takes the arrays, by path.
      path: of the node.

    Raises:
      CheckpointError: something else is in the tree; the message names its path.
    """
    if is_compressed(node):
        held, structure = serialize.to_arrays(node)
        names = {key: arrays.add(child(path, key), value) for key, value in held.items()}
        return {"kind": "compressed", "structure": structure, "arrays": names}
    if node is None:
        return {"kind": "none"}
    if isinstance(node, collections.abc.Mapping):
        if not all(isinstance(key, str | int) for key in node):
            raise CheckpointError(f"{path or 'params'}: keys of a dict must be text or integers.")
        keys = sorted(node, key=lambda key: (isinstance(key, str), key))  # As JAX orders them.
        items = [[key, describe(node[key], arrays, child(path, key))] for key in keys]
        return {"kind": "dict", "items": items}
    if type(node) in (list, tuple):
        items = [describe(value, arrays, child(path, i)) for i, value in enumerate(node)]
        return {"kind": type(node).__name__, "items": items}
    if isinstance(node, np.ndarray | np.generic | jax.Array | Later):
        if jnp.issubdtype(node.dtype, jax.dtypes.extended):
            raise CheckpointError(
                f"{path or 'params'}: a {node.dtype} cannot be stored; keep it out of the "
                "parameters, or store jax.random.key_data of it."
            )
        return {"kind": "array", "name": arrays.add(path or "params", node)}
    if isinstance(node, bool | int | float):
        return {"kind": "scalar", "value": node}
    raise CheckpointError(
        f"{path or 'params'}: a {type(node).__name__} cannot be stored; checkpoints hold dicts, "
        "lists and tuples of arrays and compressed arrays; turn it into those first."
    )


def rebuild(
    node: dict[str, Any],
    leaf: collections.abc.Callable[[str, dict[str, Any]], Any],
    path: str = "",
) -> Any:
    """The tree that ``describe`` described.

    Args:
      node: what ``describe`` returned, also after JSON.
      leaf: gives the leaf at a path from its node, such as ``assemble`` does.
      path: of the node.

    Returns:
      The tree.
    """
    match node["kind"]:
        case "compressed" | "array":
            return leaf(path, node)
        case "none":
            return None
        case "dict":
            return {key: rebuild(value, leaf, child(path, key)) for key, value in node["items"]}
        case "list":
            return [rebuild(v, leaf, child(path, i)) for i, v in enumerate(node["items"])]
        case "tuple":
            return tuple(rebuild(v, leaf, child(path, i)) for i, v in enumerate(node["items"]))
        case "scalar":
            return node["value"]
    raise KeyError(node["kind"])


def assemble(node: dict[str, Any], get: collections.abc.Callable[[str], Any]) -> Any:
    """A leaf from its arrays, or from what stands for them.

    Args:
      node: of an array or a compressed array.
      get: gives an array by name.
    """
    if node["kind"] == "array":
        return get(node["name"])
    arrays = {key: get(name) for key, name in node["arrays"].items()}
    return serialize.from_arrays(arrays, node["structure"])


def child(path: str, key: Any) -> str:
    """The path of what is under ``key`` of the node at ``path``."""
    return f"{path}/{key}" if path else str(key)
