"""Which parameters make a layer's input linearly, so that a scale of its channels can move there.

A smoothing scale multiplies the input of some layers, channel by channel. Where that input is made
by a norm's gain, or by the rows of a preceding linear layer, and nobody else reads it, those
parameters can be multiplied instead and the input needs no transform when the model runs.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from jaxcomp.graph.program import Op, Program
from jaxcomp.graph.views import View

_PASS = frozenset(
    {"convert_element_type", "copy", "copy_p", "sharding_constraint", "neg", "name", "pvary"}
)


@dataclasses.dataclass(frozen=True)
class Target:
    """A parameter that a channel scale can be multiplied into.

    Attributes:
      value: id of the weight in the program.
      path: its name.
      kind: "vector" (a gain or bias, an axis of the leaf holds the channels) or "rows" (the outputs
        of a linear layer).
      axis: for vectors, the axis of the leaf that holds the channels.
      loops: axes of the leaf over which enclosing scans run, outermost first.
    """

    value: int
    path: str
    kind: str
    axis: int = 0
    loops: tuple[int, ...] = ()


def producers(program: Program, group: Sequence[Op], single_use: set[str]) -> list[Target] | None:
    """Finds the parameters to multiply instead of the common input of some sites.

    Args:
      program: the program that holds the sites.
      group: the sites that take the scaled input.
      single_use: names of weights that are used once in the whole function.

    Returns:
      Parameters, all of which are to be multiplied; None where there is no such set.
    """
    makers = {i: op for op in program.ops for i in op.outputs}
    readers: dict[int, list[Op]] = {}
    for op in program.ops:
        for i in op.inputs:
            readers.setdefault(i, []).append(op)
    first = group[0]
    site = first.site
    if site.kind != "dot_general" or site.transposed:
        return None
    other = 1 - site.operand
    contract, batch = first.eqn.params["dimension_numbers"]
    x = first.inputs[other]
    if len(contract[other]) != 1 or batch[other]:
        return None
    if any(op.inputs[1 - op.site.operand] != x for op in group):
        return None
    size = first.eqn.invars[other].aval.shape[contract[other][0]]
    if size != site.in_size or not all(_takes_scale(op, single_use) for op in group):
        return None
    walk = _Walk(program, makers, readers, single_use, size)
    found = walk.value(x, contract[other][0], list(group))
    if found is None or len({t.path for t in found}) != len(found):
        return None
    # Consumers and producers must meet at each other's positions: all are sliced by every loop
    # around them, or none by any.
    depths = {len(t.loops) for t in found} | {len(op.site.view.loops) for op in group}
    return found if depths in ({0}, {program.depth}) else None


def _takes_scale(op: Op, single_use: set[str]) -> bool:
    """Whether a consumer's weight is used here alone and has its inputs in the input's order."""
    site = op.site
    if site.path not in single_use or site.view.fixed:
        return False
    contract, _ = op.eqn.params["dimension_numbers"]
    factors = site.view.axes[contract[site.operand][0]]
    return list(factors) == sorted(factors, key=lambda f: (f.axis, -f.stride))


class _Walk:
    """Follows a value back through operations that are linear in each channel."""

    def __init__(self, program, makers, readers, single_use, size):
        self.program, self.makers, self.readers = program, makers, readers
        self.single_use, self.size = single_use, size

    def value(self, i: int, axis: int, allowed: list[Op]) -> list[Target] | None:
        """Targets that scale axis ``axis`` of a value whose only readers are ``allowed``."""
        if i in self.program.outputs or (
            i in self.program.inputs and i not in self.program.weights
        ):
            return None
        if any(all(op is not a for a in allowed) for op in self.readers.get(i, ())):
            return None
        if i in self.program.weights:
            return self.vector(i, axis)
        op = self.makers.get(i)
        if op is None:
            return None
        if op.kind == "site":
            return self.rows(op, axis)
        if op.kind != "bind":
            return None
        return self.bind(op, axis)

    def bind(self, op: Op, axis: int) -> list[Target] | None:
        """Through one equation."""
        name, params, shapes = (
            op.eqn.primitive.name,
            op.eqn.params,
            [v.aval.shape for v in op.eqn.invars],
        )
        out = op.eqn.outvars[0].aval.shape

        def operand(k):
            # Binary operations of lax have operands of equal rank; an axis of one is a broadcast.
            if len(shapes[k]) != len(out) or shapes[k][axis] != self.size:
                return None
            return self.value(op.inputs[k], axis, [op])

        if name in _PASS:
            kinds = (op.eqn.invars[0].aval.dtype, op.eqn.outvars[0].aval.dtype)
            return operand(0) if all(jnp.issubdtype(k, jnp.floating) for k in kinds) else None
        if len(op.inputs) == 2 and op.inputs[0] == op.inputs[1]:
            return None
        if name == "mul":
            by_gain = [k for k in (0, 1) if op.inputs[k] in self.program.weights]
            order = by_gain + [k for k in (1, 0) if k not in by_gain]
            for k in order:
                found = operand(k)
                if found is not None:
                    return found
            return None
        if name == "div":
            return operand(0)
        if name in ("add", "sub", "add_any"):
            both = [operand(0), operand(1)]
            return None if None in both else both[0] + both[1]
        if name == "broadcast_in_dim":
            where = params["broadcast_dimensions"]
            if axis not in where or shapes[0][where.index(axis)] != self.size:
                return None
            return self.value(op.inputs[0], where.index(axis), [op])
        if name == "transpose":
            return self.value(op.inputs[0], params["permutation"][axis], [op])
        if name in ("reshape", "squeeze", "expand_dims"):
            return self.reshaped(op, shapes[0], out, axis)
        return None

    def reshaped(self, op, before, after, axis):
        """Through a reshape that leaves the channels on an axis of their own, fastest or not."""
        tail = 1
        for n in after[axis + 1 :]:
            tail *= n
        behind = 1
        for k in range(len(before) - 1, -1, -1):
            if behind == tail and before[k] == self.size:
                return self.value(op.inputs[0], k, [op])
            behind *= before[k]
        return None

    def vector(self, i: int, axis: int) -> list[Target] | None:
        """A gain or bias: the channels are one whole axis of the leaf, and it has no other axis."""
        path, view = self.program.weights[i]
        factors = view.axes[axis]
        if path not in self.single_use or not _whole(view, factors):
            return None
        if view.fixed or view.shape != tuple(
            self.size if a == axis else 1 for a in range(len(view.axes))
        ):
            return None
        return [Target(i, path, "vector", factors[0].axis, tuple(f.axis for f in view.loops))]

    def rows(self, op: Op, axis: int) -> list[Target] | None:
        """A linear layer: the channels are all of its outputs, in the order of its matrix."""
        site = op.site
        if site.kind != "dot_general" or site.transposed or site.path not in self.single_use:
            return None
        if site.view.fixed or site.batch_axes or site.out_size != self.size:
            return None
        contract, _ = op.eqn.params["dimension_numbers"]
        k = site.operand
        rest = [a for a in range(len(site.view.axes)) if a not in contract[k]]
        x_rest = len(op.eqn.invars[1 - k].aval.shape) - len(contract[1 - k])
        first = x_rest if k == 1 else 0
        if len(rest) != 1 or axis != first:
            return None
        factors = site.view.axes[rest[0]]
        if list(factors) != sorted(factors, key=lambda f: (f.axis, -f.stride)):
            return None
        loops = tuple(f.axis for f in site.view.loops)
        return [Target(op.inputs[k], site.path, "rows", loops=loops)]


def _whole(view: View, factors) -> bool:
    return (
        len(factors) == 1
        and factors[0].stride == 1
        and factors[0].size == view.leaf_shape[factors[0].axis]
    )
