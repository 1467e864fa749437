"""``tap``: values from inside a model, beside its result, without touching its code.

Distillation compares what two models compute on the way. A value is named by the weight whose
matmul makes it, or by the model itself with ``jax.ad_checkpoint.checkpoint_name``.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.dispatch import Dispatcher, arrays_of
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import is_compressed
from jaxcomp.graph import Graph, interpret, trace
from jaxcomp.graph.program import Op, hooks
from jaxcomp.graph.trace import leaf_paths
from jaxcomp.kernels.implementations import note_of
from jaxcomp.rules import close_names, fits

_INPUT = ":input"


def tap(apply: Callable, names: Sequence[str]) -> Callable:
    """Makes a model function return values from inside it too.

    Args:
      apply: a pure function ``apply(params, *inputs)``; params may be dense or compressed.
      names: what to return, as globs (``re:`` for a regular expression). The path of a weight
        stands for the result of its matmul or look-up, before any bias; the path with ``:input``
        for what the matmul reads; any other name for values so named with
        ``jax.ad_checkpoint.checkpoint_name``.

    Returns:
      ``tapped(params, *inputs, **kwargs) -> (out, taps)`` with ``taps`` a dict from full name to
      array. A value inside ``lax.scan`` has the loop's axis in front. Where a name occurs several
      times in sequence, the values are stacked on a new leading axis in order of evaluation, so an
      unrolled and a scanned model give the same; values of unlike shapes come as a tuple. Inside a
      ``while_loop`` the last iteration counts; a branch of a ``cond`` that is not taken gives
      zeros. The function can be jitted, differentiated and mapped like ``apply``.

    Raises:
      JaxcompError: at the call, where a name matches nothing; the message lists what is close.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"up": jnp.ones((2, 3)), "down": jnp.ones((3, 2))}
      >>> apply = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> out, taps = tap(apply, ["up", "down:input"])(params, jnp.ones((4, 2)))
      >>> {name: value.shape for name, value in taps.items()}
      {'up': (4, 3), 'down:input': (4, 3)}
    """
    names = (names,) if isinstance(names, str) else tuple(names)

    @functools.wraps(apply, updated=())
    def tapped(params: Any, *inputs: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        everything = trace(apply, params, *inputs, named=_given, **kwargs)
        chosen = _chosen(everything, names)
        # Once more, following no more than that: what is left alone keeps its own derivatives.
        named, _ = leaf_paths(params)
        paths = {p for p, leaf in named if is_compressed(leaf)}
        paths |= {name.removesuffix(_INPUT) for name in chosen}
        options = {"named": chosen.__contains__, "paths": paths}
        graph = trace(apply, params, *inputs, **options, **kwargs)
        wanted = _wanted(graph, chosen)
        state = {i: {k: v for _, k, v in items} for i, items in wanted.items()}
        arguments = arrays_of(named, inputs, kwargs)
        results, state = interpret(graph.program, arguments, _Tapper(), state)
        found: dict[str, list] = {}
        for i, items in wanted.items():
            for name, which, _ in items:
                found.setdefault(name, []).append(state[i][which])
        taps = {name: _joined(values) for name, values in found.items()}
        return jax.tree.unflatten(graph.out_tree, results), taps

    return tapped


def _given(name: str) -> bool:
    """Whether the model gave a name, and not an operation that says what ran."""
    return note_of(name) is None


class _Tapper(Dispatcher):
    """Keeps inputs and results where the state has a place for them."""

    def site(self, op, operands, leaf, state):
        """Evaluates a site."""
        results, _ = super().site(op, operands, leaf, None)
        if state is None:
            return results, None
        seen = {"output": results[0], "input": operands[1 - op.site.operand]}
        return results, {which: seen[which] for which in state}

    def named(self, op, value, state):
        """Keeps a named value."""
        return value, None if state is None else {"output": value}


def _chosen(graph: Graph, names: Sequence[str]) -> set[str]:
    """Full names of the values that patterns match."""
    available = [name for op, _ in hooks(graph.program) for name, _, _ in _values(op)]
    for name in names:
        if not any(_matches(name, a) for a in available):
            raise no_such_value(name, available)
    return {a for a in available if any(_matches(name, a) for name in names)}


def _wanted(graph: Graph, chosen: set[str]) -> dict[str, list[tuple[str, str, jax.Array]]]:
    """For each hook its chosen values: full name, "input" or "output", and zeros to start from."""
    wanted: dict[str, list] = {}
    for op, loops in hooks(graph.program):
        for name, which, aval in _values(op):
            if name in chosen:
                start = jnp.zeros((*loops, *aval.shape), aval.dtype)
                wanted.setdefault(_id(op), []).append((name, which, start))
    return wanted


def no_such_value(name: str, available: Sequence[str]) -> JaxcompError:
    """The error for a name that matches nothing.

    Args:
      name: what was asked for.
      available: names of all values.

    Returns:
      The error, with the closest names.
    """
    close = close_names(name, dict.fromkeys(available))
    hint = f"the closest are {', '.join(close)}" if close else "there are none"
    return JaxcompError(
        f"{name!r} matches no value of the model; {hint}. Name the path of a weight for the result "
        f'of its matmul, put "{_INPUT}" behind it for the input, or name a value in the model with '
        "jax.ad_checkpoint.checkpoint_name"
    )


def _id(op: Op) -> str:
    return op.site.id if op.kind == "site" else op.named.id


def _values(op: Op):
    if op.kind == "named":
        yield op.named.name, "output", op.eqn.outvars[0].aval
        return
    yield op.site.path, "output", op.eqn.outvars[0].aval
    if op.site.is_contraction:
        yield op.site.path + _INPUT, "input", op.eqn.invars[1 - op.site.operand].aval


def _matches(pattern: str, name: str) -> bool:
    """Whether a pattern means a value; inputs are meant only where the pattern says so."""
    if name.endswith(_INPUT) != pattern.endswith(_INPUT):
        return False
    return fits(pattern.removesuffix(_INPUT), name.removesuffix(_INPUT))


def _joined(values: list) -> Any:
    if len(values) == 1:
        return values[0]
    alike = len({(v.shape, v.dtype) for v in values}) == 1
    return jnp.stack(values) if alike else tuple(values)
