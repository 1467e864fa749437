"""The interpreter: evaluates a graph with a handler for each site, state in and out.

A handler decides what happens at a site and may keep state there: a pytree a site, stacked along
the scans that enclose it. Loops and conditionals are emitted again through JAX's public functions,
so the result can be jitted, differentiated, mapped and sharded like any function.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxcomp.errors import JaxcompError
from jaxcomp.formats import CompressedArray, InputQuant, is_compressed
from jaxcomp.graph import _compat
from jaxcomp.graph.latent import Latent
from jaxcomp.graph.program import Op, Program
from jaxcomp.graph.sites import Site
from jaxcomp.graph.views import View

State = dict[str, Any]


class Handler(Protocol):
    """What to do with weights."""

    def site(self, op: Op, operands: Sequence[Any], leaf: Any, state: Any) -> tuple[list[Any], Any]:
        """Evaluates a site.

        Args:
          op: the operation; ``op.site`` says which.
          operands: its operands, with None in the weight's place.
          leaf: the weight's leaf, sliced by the loops that enclose the site.
          state: the site's state, or None.

        Returns:
          The equation's results, and the new state.
        """

    def named(self, op: Op, value: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Passes a named value on; ``op.named`` says which. Returns it and the new state."""

    def dense(self, path: str, view: View, leaf: Any) -> jax.Array:
        """The weight as an array of ``view.shape``, where something other than a site wants it."""

    def looped(self, path: str, leaf: Any) -> tuple[Any, Any]:
        """What a loop slices of a weight whose first stack axis it runs over, and what it does not.

        Args:
          path: of the weight.
          leaf: the weight, the axis of the loop in front.

        Returns:
          A pytree to be sliced, and one that stays whole; None for nothing.
        """

    def of_layer(self, sliced: Any, whole: Any, index: jax.Array) -> Any:
        """The weight of one pass of a loop, of both that ``looped`` returned, if it held any."""


class Plain:
    """A handler that computes what the function computes."""

    def site(self, op, operands, leaf, state):
        """Binds the equation on the dense weight."""
        operands = list(operands)
        operands[op.site.operand] = self.dense(op.site.path, op.site.view, leaf)
        return _compat.bind(op.eqn, *operands), state

    def named(self, op, value, state):
        """The value as it is."""
        return value, state

    def dense(self, path, view, leaf):
        """Replays the view."""
        return view.replay(as_array(leaf))

    def looped(self, path, leaf):
        """All is sliced."""
        return leaf, None

    def of_layer(self, sliced, whole, index):
        """Nothing was held."""
        raise NotImplementedError


def quantizes_input(leaf: Any) -> bool:
    """Whether a compressed leaf's input is quantized when the model runs."""
    parts = jax.tree.leaves(leaf.parts, is_leaf=lambda p: isinstance(p, InputQuant))
    return any(isinstance(p, InputQuant) for p in parts)


def picked(leaf: CompressedArray, site: Site) -> CompressedArray:
    """The slice of a stacked compressed weight that a site uses by a fixed index."""
    loops = {f.axis for f in site.view.loops}
    order = [a for a in leaf.stack_axes if a not in loops]
    for factor, index in site.view.fixed:
        at = order.index(factor.axis)
        order.pop(at)
        leaf = jax.tree.map(lambda a, at=at, index=index: a[(slice(None),) * at + (index,)], leaf)
    return leaf


def as_array(leaf: Any) -> jax.Array:
    """A dense leaf as a JAX array; compressed ones are materialized."""
    return leaf.materialize() if is_compressed(leaf) else jnp.asarray(leaf)


def interpret(
    program: Program, arguments: Sequence[Any], handler: Handler, state: State
) -> tuple[list[Any], State]:
    """Evaluates a program.

    Args:
      program: from ``build``.
      arguments: one value an input; the leaf itself for weights.
      handler: what to do at sites.
      state: id of a site or named value -> its state, stacked along enclosing scans. Those without
        an entry get None and keep none.

    Returns:
      The results, and the new state with the same keys.
    """
    env: dict[int, Any] = dict(program.constants)
    env.update(zip(program.inputs, arguments, strict=True))
    last = last_uses(program)
    new_state = dict(state)

    def read(i, var=None):
        if i in program.weights:
            path, view = program.weights[i]
            leaf = env[i] if var is None else _compat.varying_like(env[i], var.aval)
            return handler.dense(path, view, leaf)
        return env[i]

    for k, op in enumerate(program.ops):
        if op.kind == "bind":
            operands = [read(i, v) for i, v in zip(op.inputs, op.eqn.invars, strict=True)]
            results = _compat.bind(op.eqn, *operands)
        elif op.kind == "view":
            results = [env[op.inputs[0]]]
        elif op.kind == "site":
            operands = [None if j == op.site.operand else read(i) for j, i in enumerate(op.inputs)]
            at = op.site.operand
            leaf = _compat.varying_like(env[op.inputs[at]], op.eqn.invars[at].aval)
            results, after = handler.site(op, operands, leaf, new_state.get(op.site.id))
            if op.site.id in new_state:
                new_state[op.site.id] = after
        elif op.kind == "named":
            (value,) = _compat.bind(op.eqn, read(op.inputs[0]))
            value, after = handler.named(op, value, new_state.get(op.named.id))
            results = [value]
            if op.named.id in new_state:
                new_state[op.named.id] = after
        else:
            ids = {h.id for body in op.bodies for h in (*body.sites, *body.named)}
            inner = {i: s for i, s in new_state.items() if i in ids}
            results, inner = _STRUCTURED[op.kind](op, env, read, program, handler, inner)
            new_state.update(inner)
        env.update(zip(op.outputs, results, strict=True))
        for i in last.get(k, ()):
            env.pop(i, None)
    return [read(i) for i in program.outputs], new_state


def last_uses(program: Program) -> dict[int, list[int]]:
    """Which values no later operation needs, by the index of the operation that needs them last."""
    last: dict[int, int] = {}
    for k, op in enumerate(program.ops):
        for i in (*op.inputs, *op.outputs):
            last[i] = k
    for i in (*program.outputs, *program.inputs):
        last.pop(i, None)
    table: dict[int, list[int]] = {}
    for i, k in last.items():
        table.setdefault(k, []).append(i)
    return table


def _remat(op, env, read, program, handler, state):
    (body,) = op.bodies
    values = [env[i] for i in op.inputs]

    params = op.eqn.params
    fn = jax.checkpoint(
        lambda values, state: interpret(body, values, handler, state),
        prevent_cse=params["prevent_cse"],
        policy=params["policy"],
    )
    return fn(values, state)


def _scan(op, env, read, program, handler, state):
    (body,) = op.bodies
    loop = _compat.scan_of(op.eqn.params)
    split = loop.num_consts + loop.num_carry
    values = [env[i] if keep else read(i) for i, keep in zip(op.inputs, op.kept, strict=True)]
    moving = [k for k in range(loop.num_consts, split) if not op.kept[k]]
    sliced, held = [], {}
    for k in range(split, len(values)):
        value = values[k]
        if op.kept[k]:
            path, view = body.weights[body.inputs[k]]
            value, whole = handler.looped(path, _leading(value, view))
            if whole is not None:
                held[k] = whole
        sliced.append(value)
    layers = jnp.arange(loop.length, dtype=jnp.int32) if held else None

    def step(carry, xs):
        xs, state, layer = xs
        arguments = [*values[:split], *xs]
        for k, whole in held.items():
            arguments[k] = handler.of_layer(arguments[k], whole, layer)
        for k, c in zip(moving, carry, strict=True):
            arguments[k] = c
        results, state = interpret(body, arguments, handler, state)
        carry = [results[k - loop.num_consts] for k in moving]
        return carry, (results[loop.num_carry :], state)

    carry, (ys, state) = jax.lax.scan(
        step,
        [values[k] for k in moving],
        (sliced, state, layers),
        length=loop.length,
        reverse=loop.reverse,
        unroll=loop.unroll,
    )
    results = _carry_results(op, values[loop.num_consts : split], moving, carry, loop.num_consts)
    results = [
        handler.dense(*program.weights[op.inputs[loop.num_consts + k]], r)
        if op.kept[loop.num_consts + k]
        else r
        for k, r in enumerate(results)
    ]
    return [*results, *ys], state


def _carry_results(op, initial, moving, carry, offset):
    results = list(initial)
    for k, c in zip(moving, carry, strict=True):
        results[k - offset] = c
    return results


def _leading(leaf: Any, view: View) -> Any:
    """A leaf with the axis that a scan runs over in front."""
    axis = view.loop_axis()
    if isinstance(leaf, Latent):
        return leaf.leading(view)
    if is_compressed(leaf):
        # The data of a compressed leaf have the stack axes in front, wherever the leaf has them.
        if leaf.first_axis == view.loops[-1].axis:
            return leaf
        leaf = leaf.materialize()
    return jnp.moveaxis(jnp.asarray(leaf), axis, 0)


def _while(op, env, read, program, handler, state):
    (body,) = op.bodies
    params = op.eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts = [read(i) for i in op.inputs[:n_cond]]
    inputs, kept = op.inputs[n_cond:], op.kept[n_cond:]
    values = [env[i] if keep else read(i) for i, keep in zip(inputs, kept, strict=True)]
    moving = [k for k in range(n_body, len(values)) if not kept[k]]
    fixed = {
        k: handler.dense(*program.weights[inputs[k]], values[k])
        for k in range(n_body, len(values))
        if kept[k]
    }
    cond_fn = _compat.as_function(params["cond_jaxpr"])

    def full(carry):
        carry = dict(zip(moving, carry, strict=True))
        return [carry.get(k, fixed.get(k)) for k in range(n_body, len(values))]

    def condition(loop):
        return cond_fn(*cond_consts, *full(loop[0]))[0]

    def step(loop):
        carry, state = loop
        arguments = list(values)
        for k, c in zip(moving, carry, strict=True):
            arguments[k] = c
        results, state = interpret(body, arguments, handler, state)
        return [results[k - n_body] for k in moving], state

    carry, state = jax.lax.while_loop(condition, step, ([values[k] for k in moving], state))
    return full(carry), state


def _cond(op, env, read, program, handler, state):
    index = read(op.inputs[0])
    values = [env[i] for i in op.inputs[1:]]
    branches = [
        lambda values, state, body=body: interpret(body, values, handler, state)
        for body in op.bodies
    ]
    # lax.switch clamps the index as the cond primitive does; a boolean has become an integer.
    return jax.lax.switch(index, branches, values, state)


def _shard_map(op, env, read, program, handler, state):
    if state:
        raise JaxcompError(
            f"{sorted(state)} lie inside a shard_map, where a site's state has no sharding; "
            "apply the transform inside the shard_map, or exclude these weights"
        )
    values = [env[i] if keep else read(i) for i, keep in zip(op.inputs, op.kept, strict=True)]
    return shard_mapped(op, values, handler), state


def shard_mapped(op: Op, values: Sequence[Any], handler: Handler) -> list[Any]:
    """Evaluates a shard_map operation on leaves that may be compressed.

    Args:
      op: an operation of kind "shard_map".
      values: one for each input; compressed leaves are made dense unless they are replicated.
      handler: what to do at sites.

    Returns:
      The equation's results.

    Raises:
      JaxcompError: a leaf that is made dense would lose the quantization of its input.
    """
    (body,) = op.bodies
    ready = []
    for i, value, spec in zip(body.inputs, values, op.eqn.params["in_specs"], strict=True):
        if isinstance(value, Latent):
            value = handler.dense(*body.weights[i], value)
        if is_compressed(value) and any(axis is not None for axis in spec):
            if quantizes_input(value):
                raise JaxcompError(
                    f"{body.weights[i][0]} {value.shape}: enters a shard_map with the spec {spec}, "
                    "where it must be made dense, and its quantized input would be lost; shard "
                    "with jax.jit instead, or leave the activation out for this path"
                )
            value = value.materialize()
        ready.append(value)
    run = lambda *values: tuple(interpret(body, list(values), handler, {})[0])  # noqa: E731
    return list(_compat.shard_map(op.eqn, run)(*ready))


_STRUCTURED = {
    "remat": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
