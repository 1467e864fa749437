"""Training state in a checkpoint: any pytree, its structure taken from a template when it is read.

Stored are the leaves by path. What a NamedTuple, an optimizer's state or a registered dataclass is
made of need not be known to read it: the caller has one of the same structure, fresh from ``init``.
"""

import collections.abc
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import rules
from jaxcomp.io.arrays import CheckpointError
from jaxcomp.io.reading import Reader
from jaxcomp.io.structure import Arrays

_SCALARS = (bool, int, float)


def describe_state(state: Any, arrays: Arrays) -> list[dict[str, Any]]:
    """The leaves of a state as JSON-able data; its arrays are added to ``arrays``.

    Args:
      state: any pytree of arrays, PRNG keys and numbers.
      arrays: takes the arrays, under names that no parameter has.

    Raises:
      CheckpointError: another kind of leaf, or two of one path.
    """
    leaves, seen = [], set()
    for path, leaf in _named(state):
        if path in seen:
            raise CheckpointError(
                f"state {path}: two leaves have this path, because a key holds a '/'; rename one "
                "of the keys."
            )
        seen.add(path)
        entry: dict[str, Any] = {"path": path}
        if isinstance(leaf, _SCALARS):
            entry |= {"kind": type(leaf).__name__, "value": leaf}
        elif _is_key(leaf):
            name = arrays.add(f"state:{path}", jax.random.key_data(leaf))
            entry |= {"kind": str(leaf.dtype), "shape": list(leaf.shape), "array": name}
            entry["implementation"] = str(jax.random.key_impl(leaf))
        elif isinstance(leaf, np.ndarray | np.generic | jax.Array):
            name = arrays.add(f"state:{path}", leaf)
            entry |= {"kind": leaf.dtype.name, "shape": list(leaf.shape), "array": name}
        else:
            raise CheckpointError(
                f"state {path}: a {type(leaf).__name__} cannot be stored; a state holds arrays, "
                "PRNG keys and numbers; keep anything else out of it, or in its tree's structure."
            )
        leaves.append(entry)
    return leaves


def rebuild_state(
    checkpoint: pathlib.Path, leaves: list[dict[str, Any]] | None, like: Any, reader: Reader
) -> Any:
    """A state of the structure, the kinds of leaves and the shardings of a template.

    Args:
      checkpoint: its folder, for errors.
      leaves: what ``describe_state`` returned, also after JSON; None where no state was saved.
      like: the template: arrays or ShapeDtypeStructs.
      reader: of the checkpoint.

    Raises:
      CheckpointError: the template differs in a path, a shape, a dtype or a kind, or there is no
        state.
    """
    if leaves is None:
        raise CheckpointError(
            f"checkpoint {checkpoint}: holds no training state, and like= asks for one; save it "
            "with state=, or leave like= out."
        )
    saved = {entry["path"]: entry for entry in leaves}
    named = _named(like)
    _same_paths(checkpoint, list(saved), [path for path, _ in named])
    for path, leaf in named:
        _same_leaf(checkpoint, saved[path], leaf)
    values = [_read(saved[path], leaf, reader) for path, leaf in named]
    return jax.tree.unflatten(jax.tree.structure(like), values)


def _named(tree: Any) -> list[tuple[str, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(k, simple=True, separator="/"), leaf) for k, leaf in flat]


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _same_paths(checkpoint: pathlib.Path, saved: list[str], wanted: list[str]) -> None:
    for have, lack, text in (
        (saved, wanted, "holds {path!r}, which like= has not"),
        (wanted, saved, "lacks {path!r}, which like= has"),
    ):
        others = set(lack)
        missing = [path for path in have if path not in others]
        if missing:
            close = ", ".join(rules.close_names(missing[0], lack)) or "none"
            more = f" and {len(missing) - 1} more such leaves" if len(missing) > 1 else ""
            raise CheckpointError(
                f"checkpoint {checkpoint}: its training state "
                f"{text.format(path=missing[0])}{more}; the closest there are: {close}. "
                "Give a state of the same model, optimizer and recipe as template."
            )


def _same_leaf(checkpoint: pathlib.Path, entry: dict[str, Any], leaf: Any) -> None:
    def text(kind: str, shape: collections.abc.Iterable[int] | None) -> str:
        return kind if shape is None else f"{kind} {tuple(shape)}"

    saved = text(entry["kind"], entry.get("shape"))
    if isinstance(leaf, _SCALARS):
        wanted = text(type(leaf).__name__, None)
    elif hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        wanted = text(str(leaf.dtype), leaf.shape)
    else:
        wanted = type(leaf).__name__
    if saved != wanted:
        raise CheckpointError(
            f"checkpoint {checkpoint}: training state {entry['path']!r} was saved as {saved}, and "
            f"like= has {wanted} there; give a state of the same model, optimizer and recipe as "
            "template."
        )


def _read(entry: dict[str, Any], leaf: Any, reader: Reader) -> Any:
    if "value" in entry:
        return entry["value"]
    if isinstance(leaf, np.ndarray | np.generic):
        return reader.whole(entry["array"])
    sharding = _sharding(leaf)
    if "implementation" in entry:
        data = reader.array(entry["array"])
        keys = jax.random.wrap_key_data(data, impl=entry["implementation"])
        return keys if sharding is None else jax.device_put(keys, sharding)
    return reader.array(entry["array"], sharding)


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Where a leaf is to be placed; None leaves it to JAX, as it was with the template."""
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return leaf.sharding
