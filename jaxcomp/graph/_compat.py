"""The only place that knows how jaxprs differ between JAX versions.

JAX 0.10 wraps sub-jaxprs in ``ClosedJaxpr`` and describes a scan by ``num_consts`` and
``num_carry``; 0.12 has one ``Jaxpr`` class that carries its constants, and describes a scan by
trees.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

Literal = core.Literal


class Body(NamedTuple):
    """A sub-jaxpr with its constants.

    Attributes:
      constvars: variables bound to ``consts``.
      consts: their values.
      invars: variables bound to the operands.
      eqns: equations in order.
      outvars: results, variables or literals.
    """

    constvars: list
    consts: list
    invars: list
    eqns: list
    outvars: list


def body_of(jaxpr: Any) -> Body:
    """Reads an open or closed jaxpr of any supported version."""
    consts = list(getattr(jaxpr, "consts", ()))
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    constvars = list(inner.constvars)
    return Body(constvars, consts, list(inner.invars), list(inner.eqns), list(inner.outvars))


class Loop(NamedTuple):
    """The parts of a scan equation."""

    jaxpr: Any
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: Any


def scan_of(params: dict) -> Loop:
    """Reads the parameters of a scan equation."""
    if "num_carry" in params:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    else:
        consts, carry, _ = params["ft_in"].unpack()
        num_consts, num_carry = len(list(consts)), len(list(carry))
    return Loop(
        params["jaxpr"],
        num_consts,
        num_carry,
        params["length"],
        params["reverse"],
        params["unroll"],
    )


def bind(eqn: Any, *operands: Any) -> list:
    """Evaluates one equation as it stands, sub-jaxprs included."""
    params = eqn.primitive.get_bind_params(eqn.params)
    scope = str(eqn.source_info.name_stack)
    with contextlib.ExitStack() as stack:
        stack.enter_context(eqn.ctx.manager)
        if scope:
            stack.enter_context(jax.named_scope(scope))
        # Old versions return the wrapped functions of call primitives apart.
        results = (
            eqn.primitive.bind(*params[0], *operands, **params[1])
            if isinstance(params, tuple)
            else eqn.primitive.bind(*operands, **params)
        )
    return list(results) if eqn.primitive.multiple_results else [results]


def inner_jaxpr(eqn: Any) -> Any | None:
    """The function that a call-like equation applies to its operands one to one, if it is one."""
    name = eqn.primitive.name
    if name in ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat"):
        return eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if name in ("custom_jvp_call", "custom_vjp_call", "custom_lin"):
        return eqn.params.get("call_jaxpr")
    if name in ("custom_vjp_call_jaxpr", "custom_vmap_call"):
        return eqn.params.get("fun_jaxpr", eqn.params.get("call"))
    return None


def names_in(eqn: Any, wanted: Callable[[str], bool]) -> bool:
    """Whether a call or loop holds a wanted named value that can be reached.

    Values inside a custom derivative cannot: reaching them would give the derivative up.
    """
    if is_custom(eqn):
        return False
    for value in eqn.params.values():
        for jaxpr in _jaxprs(value):
            for inner in body_of(jaxpr).eqns:
                if inner.primitive.name == "name" and wanted(inner.params["name"]):
                    return True
                if names_in(inner, wanted):
                    return True
    return False


def is_custom(eqn: Any) -> bool:
    """Whether the equation is a call with a derivative, or a rule for ``vmap``, of its own."""
    return eqn.primitive.name.startswith("custom_")


def is_remat(eqn: Any) -> bool:
    """Whether the equation is a rematerialized call."""
    return eqn.primitive.name in ("remat2", "checkpoint", "remat")


def printable_params(eqn: Any) -> str | None:
    """A string that determines what the equation computes; None where it cannot be told."""
    parts = [eqn.primitive.name]
    for key in sorted(eqn.params):
        value = eqn.params[key]
        # The derivative rules of custom calls do not change what the call computes.
        if key in ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees", "debug_info", "name"):
            continue
        for sub in _jaxprs(value):
            if any(_has_consts(j) for j in _nested(sub)):
                return None
        if isinstance(value, np.ndarray):  # printed in full, str() abbreviates
            value = (value.shape, value.dtype, value.tobytes())
        text = str(value)
        if " at 0x" in text:
            return None
        parts.append(f"{key}={text}")
    return ";".join(parts)


def _jaxprs(value: Any) -> list:
    if hasattr(value, "eqns") and hasattr(value, "invars"):
        return [value]
    if hasattr(value, "jaxpr") and hasattr(value.jaxpr, "eqns"):
        return [value]
    if isinstance(value, (tuple, list)):
        return [j for v in value for j in _jaxprs(v)]
    return []


def _nested(jaxpr: Any):
    yield jaxpr
    for eqn in body_of(jaxpr).eqns:
        for value in eqn.params.values():
            for sub in _jaxprs(value):
                yield from _nested(sub)


def _has_consts(jaxpr: Any) -> bool:
    return bool(list(getattr(jaxpr, "consts", ())))


def as_function(jaxpr: Any):
    """A function of flat arguments that evaluates a jaxpr with constants."""
    body = body_of(jaxpr)

    def run(*arguments):
        env = dict(zip(body.constvars, body.consts, strict=True))
        env.update(zip(body.invars, arguments, strict=True))

        def read(atom):
            return atom.val if isinstance(atom, Literal) else env[atom]

        for eqn in body.eqns:
            env.update(zip(eqn.outvars, bind(eqn, *map(read, eqn.invars)), strict=True))
        return [read(v) for v in body.outvars]

    return run


def varying_like(leaf: Any, aval: Any) -> Any:
    """A weight inside a shard_map marked as varying over the mesh axes over which its use varies.

    Views of weights are not computed one by one, so the casts among them are made up for here.
    """
    axes = _varying(aval)
    if not axes:
        return leaf

    return jax.tree.map(lambda value: vary_over(value, axes), leaf)


def _varying(aval: Any) -> frozenset:
    """Mesh axes over which a value inside a shard_map varies."""
    if hasattr(aval, "vma"):
        return frozenset(aval.vma)
    manual = getattr(aval, "manual_axis_type", None) or getattr(aval, "mat", None)
    return frozenset(getattr(manual, "varying", ()))


def shard_map(eqn: Any, function: Any, out_specs: Any = None) -> Any:
    """A function in place of the body of a shard_map equation, with its mesh and specs."""
    params = eqn.params
    return jax.shard_map(
        function,
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=tuple(params["out_specs"]) if out_specs is None else out_specs,
        check_vma=params.get("check_vma", True),
        axis_names=params.get("newly_manual_axes", params.get("manual_axes", frozenset())),
    )


def vary_over(value: Any, axes: frozenset) -> Any:
    """A value inside a shard_map marked as varying over mesh axes."""
    missing = tuple(sorted(axes - _varying(jax.typeof(value))))
    return jax.lax.pcast(value, missing, to="varying") if missing else value
