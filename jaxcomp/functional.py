"""A Flax model as a pair of a function and its weights."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jaxcomp.errors import ModelError


def functional(
    model: Any, *, method: str | None = None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Splits a model into a pure function and a plain nested dict of weights.

    State that is not a weight (batch statistics, dropout keys, linen's other collections) keeps the
    value it has now: it is closed over, and what a call does to it is dropped.

    Args:
      model: an ``nnx.Module``, or a pair of a linen module and its variables.
      method: name of the method to call; ``__call__`` by default.

    Returns:
      ``apply`` and ``params`` such that ``apply(params, *inputs, **options)`` is
      ``model(*inputs, **options)``. ``params`` holds only dicts with string keys and leaves; a list
      of layers becomes ``{"0": .., "1": ..}``.

    Raises:
      ModelError: ``model`` is neither; or, when applied, ``params`` has other paths than the model.

    Example:
      >>> import jax.numpy as jnp
      >>> apply, params = functional(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> sorted(params), apply(params, jnp.ones((1, 2))).shape
      (['bias', 'kernel'], (1, 3))
    """
    if isinstance(model, nnx.Module):
        return _functional_nnx(model, method)
    if isinstance(model, tuple | list) and len(model) == 2 and isinstance(model[1], Mapping):
        from flax import linen

        if isinstance(model[0], linen.Module):
            return _functional_linen(model[0], model[1], method)
    hint = ""
    if callable(model):
        hint = "; a function apply(params, *inputs) needs no wrapping, pass it and its params as is"
        if type(model).__module__.startswith("flax.linen") or hasattr(model, "init_with_output"):
            hint = "; for a linen module pass the pair (module, variables)"
    raise ModelError(
        "functional: expected an nnx.Module or a pair of a linen module and its variables, got "
        f"{type(model).__name__}{hint}"
    )


def _functional_nnx(model, method):
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    variables = nnx.to_flat_state(weights)
    names = [tuple(str(part) for part in path) for path, _ in variables]

    def apply(params, *inputs, **options):
        """Calls the model with these weights."""
        values = _flatten(params, names)
        flat = [
            (path, variable.replace(value))
            for (path, variable), value in zip(variables, values, strict=True)
        ]
        # Copied, for a call may change its variables: dropout keys count, batch statistics move.
        others = jax.tree.map(lambda leaf: leaf, rest)
        module = nnx.merge(graph, nnx.from_flat_state(flat), others)
        return (module if method is None else getattr(module, method))(*inputs, **options)

    params: dict[str, Any] = {}
    for name, (_, variable) in zip(names, variables, strict=True):
        node = params
        for part in name[:-1]:
            node = node.setdefault(part, {})
        node[name[-1]] = variable.get_value()
    return apply, params


def _functional_linen(module, variables, method):
    from flax.core import meta, unfreeze

    variables = meta.unbox(unfreeze(variables))
    if "params" not in variables:
        raise ModelError(
            f"functional: the variables of {type(module).__name__} have no 'params' collection, "
            f"only {sorted(variables)}; pass what module.init(key, *inputs) returned"
        )
    rest = {name: value for name, value in variables.items() if name != "params"}

    def apply(params, *inputs, **options):
        """Calls the module with these weights."""
        return module.apply({**rest, "params": params}, *inputs, method=method, **options)

    return apply, variables["params"]


def _flatten(params, names):
    """Values of ``params`` at ``names``, all of them and no others; integer keys will do."""
    found = {}

    def walk(node, path):
        if isinstance(node, Mapping):
            for key, value in node.items():
                walk(value, (*path, str(key)))
        else:
            found[path] = node

    walk(params, ())
    wanted = set(names)
    missing = ["/".join(n) for n in names if n not in found]
    extra = ["/".join(n) for n in found if n not in wanted]
    if missing or extra:
        told = [
            f"{what}: {', '.join(paths[:5])}{', ..' if len(paths) > 5 else ''}"
            for what, paths in (("missing", missing), ("unknown", extra))
            if paths
        ]
        raise ModelError(
            f"params do not fit the model: {'; '.join(told)}; keep the tree that functional "
            "returned"
        )
    return [found[name] for name in names]


def path_names(tree: Any) -> dict[str, Any]:
    """The leaves of a nested dict by path.

    Args:
      tree: nested dicts of leaves.

    Returns:
      ``{"a/b": leaf}`` in the tree's order.

    Example:
      >>> path_names({"a": {"b": 1}, "c": 2})
      {'a/b': 1, 'c': 2}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: not isinstance(x, Mapping))
    return {"/".join(str(getattr(k, "key", k)) for k in path): leaf for path, leaf in leaves}
