"""Following the units of a weight's inputs through a function to all that they are made of.

From the consumer's input a label goes back through the operations until it ends at the rows of
other weights, at biases and gains, or where a value is the same for all units. Then everybody who
reads a labelled value, and every use of the weights that were reached, must have been met on the
way: if someone else sees the axis of the units, they cannot be taken out.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from jaxcomp.errors import JaxcompError
from jaxcomp.graph import _compat
from jaxcomp.graph.labels import (
    Label,
    Stuck,
    backward,
    covered,
    dot_axes,
    from_leaf,
    gather_axes,
    join,
    label,
    moved,
    reads,
    split,
    to_leaf,
)
from jaxcomp.graph.scopes import Node, operand_of, shifted
from jaxcomp.graph.sites import roles


@dataclasses.dataclass(frozen=True)
class Member:
    """The parts of one leaf that belong to the units of a group.

    The axes ``axes`` are flattened into one, of which positions ``offset`` to ``offset + repeats *
    count * block`` belong to units: position p to unit ``(p - offset) // block % count``.

    Attributes:
      path: name of the leaf.
      shape: its shape.
      role: "consumer" (a unit's gate multiplies it) or "producer" (it makes a unit's input).
      axes: axes of the leaf that tell units apart; none where the whole leaf is one unit's.
      stack_axes: axes of the leaf for the group's stack.
      offset: first position.
      block: neighbouring positions that belong to one unit.
      repeats: how often the sequence of units is repeated.
    """

    path: str
    shape: tuple[int, ...]
    role: str
    axes: tuple[int, ...]
    stack_axes: tuple[int, ...]
    offset: int = 0
    block: int = 1
    repeats: int = 1

    @property
    def length(self) -> int:
        """Positions along the flattened axes."""
        return math.prod(self.shape[a] for a in self.axes)

    @property
    def unit_size(self) -> int:
        """Parameters of one unit."""
        used = {*self.axes, *self.stack_axes}
        rest = math.prod(n for a, n in enumerate(self.shape) if a not in used)
        return rest * self.block * self.repeats


class Walk:
    """Follows the units of one consumer to all that they are made of."""

    def __init__(self, graph, root, path, size, kind, count, stack):
        self.graph, self.root = graph, root
        self.path, self.size, self.kind = path, size, kind
        self.count, self.stack = count, stack
        self.labels: dict[Any, list[Label]] = {}
        self.known: dict[tuple, list] = {}  # labels an operand got from its reader
        self.used: set = set()  # (node, operand) where a weight's part is accounted for
        self.hits: dict[str, list] = {}
        self.home: list[Node] = []
        self.loops = 0
        self.queue: list = []

    def members(self) -> tuple[Member, ...]:
        """All members, the consumer's first."""
        for scope in self.root.all():
            for node in scope.nodes:
                if node.kind == "site" and node.site.path == self.path and node.live:
                    self.start(scope, node)
        while self.queue:
            self.step(*self.queue.pop())
        for scope, value in list(self.labels):
            for seen in self.labels[scope, value]:
                self.check_readers(scope, value, seen)
        self.check_uses()
        found = [m for path, hits in self.hits.items() for m in self.merge(path, hits)]
        return tuple(sorted(found, key=lambda m: m.role))

    def fail(self, node, reason):
        """Raises the error that names the operation, the consumer and the unit."""
        where = ""
        if node is not None:
            shapes = ", ".join(str(tuple(v.aval.shape)) for v in node.eqn.outvars)
            stack = str(node.eqn.source_info.name_stack)
            what = f"`{node.name}`" + (f" with {node.site.path}" if node.site else "")
            where = f"{what} of shape {shapes}{f' in {stack}' if stack else ''} "
        raise JaxcompError(
            f"{self.path} {self.graph.layouts[self.path].leaf_shape}: its inputs cannot be cut "
            f"into {self.count} units of {self.size} ({self.kind}): {where}{reason}. A unit must "
            "lead to rows of weights, to biases and gains, or to values that all units share; "
            "choose another size or weight, or trace the function without what interferes"
        )

    # Where it starts.

    def start(self, scope, node):
        """Labels the consumer's input."""
        site, view = node.site, node.site.view
        if site.kind not in ("dot_general", "ragged_dot", "conv_general_dilated"):
            self.fail(node, "is no matmul")
        if node.eqn.params.get("feature_group_count", 1) != 1:
            self.fail(node, "is a grouped convolution")
        if site.transposed:
            self.fail(node, "uses the weight with inputs and outputs exchanged")
        if site.kind == "conv_general_dilated":
            in_axes = (view.axes[node.eqn.params["dimension_numbers"].rhs_spec[1]][0].axis,)
        else:
            in_axes = site.layout.in_axes
        loops = self.enclosing(scope)
        if site.view.loops and len(site.view.loops) != len(loops):
            self.fail(node, "lies in loops of which only some slice the weight")
        self.home, self.loops = (loops if site.view.loops else []), len(site.view.loops)
        shape = site.layout.leaf_shape
        sizes = [shape[a] for a in in_axes]
        found = split(np.arange(math.prod(sizes)) // self.size, sizes)
        if found is None:
            self.fail(node, f"has inputs on axes of sizes {sizes}, across which units would lie")
        axes = dict(zip(in_axes, found[1], strict=True))
        base, stack_axes = 0, site.layout.stack_axes
        for k, axis in enumerate(stack_axes):
            stride = math.prod(shape[a] for a in stack_axes[k + 1 :]) * self.count
            if axis in site.batch_axes and site.kind != "ragged_dot":
                axes[axis] = np.arange(shape[axis]) * stride
            base += sum(i * stride for f, i in view.fixed if f.axis == axis)
        try:
            more, seen = from_leaf(view, axes)
        except Stuck as reason:
            self.fail(node, str(reason))
        weight = label(base + more, seen, self.count)
        contracted, batch = self.met(node)
        x_axes = {w: x for x, w in (contracted | batch).items()}
        self.hit(scope, node, site.operand, weight, "consumer")
        operand = 1 - site.operand
        self.push(scope, node, operand, moved(weight, x_axes, self.count))

    def met(self, node) -> tuple[dict[int, int], dict[int, int]]:
        """Axes of a contraction's input that meet input axes of its weight, and batch axes."""
        k, eqn = node.site.operand, node.eqn
        if node.site.kind == "dot_general":
            pairs = (
                zip(axes[1 - k], axes[k], strict=True) for axes in eqn.params["dimension_numbers"]
            )
            return tuple(dict(p) for p in pairs)
        if node.site.kind == "ragged_dot":
            return {1: roles(eqn, k, node.site.view)[1].contracted[0]}, {}
        numbers = eqn.params["dimension_numbers"]
        if node.site.kind == "gather" or eqn.params["feature_group_count"] != 1:
            return {}, {}
        return {numbers.lhs_spec[1]: numbers.rhs_spec[1]}, {}

    def enclosing(self, scope) -> list[Node]:
        """The scans around a scope, outermost first."""
        found = []
        while scope.parent is not None:
            scope, node = scope.parent
            if node.name == "scan":
                found.insert(0, node)
        return found

    # How labels move.

    def push(self, scope, node, operand, seen):
        """Labels an operand of a node."""
        if seen is None:
            return
        self.known.setdefault((node, operand), []).append(seen)
        self.mark(scope, node, operand, node.inputs[operand], seen)

    def mark(self, scope, node, operand, value, seen):
        """Labels a value; weights are where a label ends."""
        if value in scope.weights:
            self.hit(scope, node, operand, seen, "producer")
            return
        mine = self.labels.setdefault((scope, value), [])
        if all(seen.key != other.key for other in mine):
            mine.append(seen)
            self.queue.append((scope, value, seen, node))

    def hit(self, scope, node, operand, seen, role):
        """Records the parts of a weight that a label reaches."""
        path, view = scope.weights[node.inputs[operand]]
        self.used.add((node, operand))
        if len(view.loops) < self.loops:
            self.fail(
                node, f"uses {path}, which is shared by all iterations of the loop over layers"
            )
        try:
            base, axes = to_leaf(view, seen)
        except Stuck as reason:
            self.fail(node, f"with {path} {reason}")
        loops = tuple(f.axis for f in view.loops[: self.loops])
        if node.site is not None and node.site.kind == "ragged_dot":
            (experts,) = roles(node.eqn, node.site.operand, view)[1].batch
            loops += tuple(f.axis for f in view.axes[experts])
        self.hits.setdefault(path, []).append((node, role, base, axes, loops))

    def step(self, scope, value, seen, reader):
        """Carries a label from a value to what the value is made of."""
        if value in scope.position:
            self.leave(scope, scope.position[value], seen, reader)
            return
        if value not in scope.makers:
            self.fail(reader, "reads a constant of the function that has the axis of the units")
        node, output = scope.makers[value]
        if node.kind == "site":
            self.through_site(scope, node, seen)
        elif scope.bodies(node):
            self.enter(scope, node, output, seen)
        else:
            try:
                found = backward(node.eqn, output, seen, self.count)
            except Stuck as reason:
                self.fail(node, str(reason))
            for operand, other in found:
                self.push(scope, node, operand, other)

    def through_site(self, scope, node, seen):
        """A weight's use on the way: its rows are the units', or all units use it alike."""
        k, kind, eqn = node.site.operand, node.site.kind, node.eqn
        x_axes: dict[int, int] = {}
        if kind == "dot_general":
            maps, _ = dot_axes(eqn)
            w_axes, x_axes = maps[k], maps[1 - k]
        elif kind == "gather":
            w_axes = gather_axes(eqn)
        elif kind == "ragged_dot":
            w_axes, x_axes = {1: roles(eqn, k, node.site.view)[1].rest[0]}, {0: 0}
        else:
            numbers = eqn.params["dimension_numbers"]
            if eqn.params["feature_group_count"] != 1 or eqn.params["batch_group_count"] != 1:
                self.fail(node, "is a grouped convolution")
            w_axes = {numbers.out_spec[1]: numbers.rhs_spec[0]}
            x_axes = {numbers.out_spec[0]: numbers.lhs_spec[0]}
        if any(a not in w_axes and a not in x_axes for a in seen.axes):
            self.fail(node, "does not keep the axis of the units")
        weight = moved(seen, w_axes, self.count)
        if weight is not None:
            self.hit(scope, node, k, weight, "producer")
        if kind != "gather":
            self.push(scope, node, 1 - k, moved(seen, x_axes, self.count))

    def enter(self, scope, node, output, seen):
        """Into the bodies of a call, conditional or scan."""
        if node.name not in ("scan", "cond") and _compat.inner_jaxpr(node.eqn) is None:
            self.fail(node, "is a loop or a shard_map, into which units are not followed")
        if node.name == "scan" and node in self.home:
            self.fail(node, "makes units of one layer from another layer's")
        for inner in scope.bodies(node):
            here = seen
            if node.name == "scan" and output >= _compat.scan_of(node.eqn.params).num_carry:
                if 0 in seen.axes:
                    self.fail(node, "makes units one by one")
                here = shifted(seen, -1)
            self.mark_output(inner, node, output, here)

    def mark_output(self, inner, node, output, seen):
        """Labels a result of a body."""
        value = inner.outputs[output]
        self.known.setdefault((inner, output), []).append(seen)
        if value in inner.weights:
            self.fail(node, f"passes {inner.weights[value][0]} on")
        self.mark(inner, node, None, value, seen)

    def leave(self, scope, position, seen, reader):
        """From an input of a body to the operand it is."""
        if scope.parent is None:
            self.fail(reader, "reads an input of the function that has the axis of the units")
        outer, node = scope.parent
        if node.name == "scan":
            loop = _compat.scan_of(node.eqn.params)
            carry = position - loop.num_consts
            is_carry = 0 <= carry < loop.num_carry
            if node in self.home:
                what = "of all layers is used by each"
                if is_carry:
                    what = "is carried from layer to layer, as a residual stream is"
                elif carry >= 0:
                    what = "comes in from outside, layer by layer, as a key-value cache does"
                self.fail(node, f"runs over layers, and a value with the axis of the units {what}")
            if is_carry:
                self.mark_output(scope, node, carry, seen)
        elif node.name in ("while", "shard_map"):
            self.fail(node, "is a loop or a shard_map, out of which units are not followed")
        operand, more = operand_of(node, position)
        self.push(outer, node, operand, shifted(seen, more))

    # Who else sees the units.

    def check_readers(self, scope, value, seen):
        """Everybody who reads a unit's value must be part of the unit."""
        for node, k in scope.readers.get(value, ()):
            shape = node.eqn.invars[k].aval.shape
            if covered(seen, self.known.get((node, k), ()), shape):
                continue
            if node.kind == "site":
                contracted, batch = self.met(node)
                summed = all(
                    a in contracted or (a in batch and not (v % self.count).any())
                    for a, v in seen.axes.items()
                )
                if k != node.site.operand and summed:
                    weight = moved(seen, contracted | batch, self.count)
                    self.hit(scope, node, node.site.operand, weight, "consumer")
                    continue
            elif bodies := scope.bodies(node):
                if self.check_bodies(bodies, node, k, seen):
                    continue
            elif not reads(node.eqn, seen, self.count):
                continue
            self.fail(node, "also reads the units' values and does not keep units apart")
        for k, output in enumerate(scope.outputs):
            if output != value:
                continue
            others = self.known.get((scope, k), ())
            if not others or not covered(seen, others, self.output_shape(scope, k)):
                self.check_output(scope, k)

    def output_shape(self, scope, k):
        """Shape of a result of a body, which has no loop axis."""
        node = scope.parent[1]
        shape = node.eqn.outvars[k].aval.shape
        stacked = node.name == "scan" and k >= _compat.scan_of(node.eqn.params).num_carry
        return shape[1:] if stacked else shape

    def check_bodies(self, bodies, node, operand, seen) -> bool:
        """Whether the bodies that see an operand keep its units apart."""
        for inner in bodies:
            for position, value in enumerate(inner.inputs):
                source, more = operand_of(node, position)
                if source != operand:
                    continue
                if not inner.readers.get(value) and value not in inner.outputs:
                    continue
                shape = node.eqn.invars[operand].aval.shape[more:]
                there = self.labels.get((inner, value), ())
                if not covered(shifted(seen, -more), there, shape):
                    return False
        return True

    def check_output(self, scope, k):
        """A labelled value that a scope returns, and that nobody asked of it, must be dropped."""
        if scope.parent is None:
            node = scope.makers.get(scope.outputs[k], (None,))[0]
            self.fail(node, "is returned by the function, axis of the units and all")
        outer, node = scope.parent
        is_carry = node.name == "scan" and k < _compat.scan_of(node.eqn.params).num_carry
        read = outer.readers.get(node.outputs[k]) or node.outputs[k] in outer.outputs
        if read or is_carry:
            self.fail(node, "passes on a value with the axis of the units")

    def check_uses(self):
        """All uses of a member must be those that were found."""
        for scope in self.root.all():
            for node in scope.nodes:
                if node.kind == "view" or not node.live:
                    continue
                for k, value in enumerate(node.inputs):
                    path = scope.weights.get(value, ("",))[0]
                    if path not in self.hits or (node, k) in self.used:
                        continue
                    inner = [
                        s.inputs[p]
                        for s in scope.children.get(node, ())
                        for p in range(len(s.inputs))
                        if operand_of(node, p)[0] == k
                    ]
                    if inner and all(v in scope.weights for v in inner):
                        continue
                    self.fail(node, f"also uses {path}")

    # What it all amounts to.

    def merge(self, path, hits) -> list[Member]:
        """The members that the parts of one leaf make."""
        shape = tuple(self.graph.shapes[path].shape)
        node, _, _, _, loops = hits[0]
        if any(h[4] != loops for h in hits):
            self.fail(node, f"uses {path} in loops over different axes")
        axes = sorted({a for h in hits for a in h[3]})
        sizes = [shape[a] for a in axes]
        roles = {h[1] for h in hits}
        if len(roles) > 1:
            self.fail(node, f"uses {path} both to make and to read units")
        whole = np.full(math.prod(sizes), -1, np.int64)
        for at, _, base, parts, _ in hits:
            part = join([parts.get(a, np.zeros(shape[a], np.int64)) for a in axes])
            part = np.where(part >= 0, part + base, -1)
            told = len(set(part[part >= 0] % self.count))
            if told < self.count:
                self.fail(
                    at,
                    f"tells only {told} of the units apart in {path}: several share its parts (a "
                    f"size of {self.size * self.count // told} would make one unit of them), or it "
                    "belongs to some units only",
                )
            if ((whole >= 0) & (part >= 0) & (whole != part)).any():
                self.fail(at, f"has one part of {path} in several units")
            whole = np.maximum(whole, part)
        stack_axes, flat, unit_axes = self.stacked(path, whole, axes, sizes, loops, node)
        found = _segments(flat, self.count)
        if found is None:
            self.fail(node, f"orders the units along {path} in no regular way")
        (role,) = roles
        return [
            _narrow(Member(path, shape, role, tuple(unit_axes), stack_axes, *segment))
            for segment in found
        ]

    def stacked(self, path, whole, axes, sizes, loops, node):
        """Tells the axes of the stack from those of the units."""
        found = split(whole, sizes)
        if found is None:
            self.fail(node, f"orders the units along {path} in no regular way")
        base, parts = found
        stack_axes, rest = list(loops), dict(zip(axes, parts, strict=True))
        for k in range(len(loops), len(self.stack)):
            stride = math.prod(self.stack[k + 1 :]) * self.count
            want = np.arange(self.stack[k]) * stride
            for axis, part in rest.items():
                if np.array_equal(part, want) and self.stack[k] > 1:
                    stack_axes.append(axis)
                    del rest[axis]
                    break
            else:
                self.fail(node, f"uses {path}, which is shared by the units of several layers")
        flat = join(list(rest.values()))
        flat = np.where(flat >= 0, flat + base, -1)
        return tuple(stack_axes), flat, list(rest)


def _segments(flat: np.ndarray, count: int) -> list[tuple[int, int, int]] | None:
    """Offset, block and repeats of the regular stretches of units; None where there are others."""
    found: list[list[int]] = []
    p = 0
    while p < len(flat):
        if flat[p] < 0:
            p += 1
            continue
        ahead = flat[p:]
        block = int(np.argmax(ahead != 0)) if (ahead != 0).any() else len(ahead)
        want = np.repeat(np.arange(count), block)
        if block == 0 or not np.array_equal(ahead[: len(want)], want):
            return None
        last = found[-1] if found else None
        if last and last[1] == block and last[0] + last[1] * last[2] * count == p:
            last[2] += 1
        else:
            found.append([p, block, 1])
        p += len(want)
    return [tuple(f) for f in found]


def _narrow(member: Member) -> Member:
    """The same member on fewer axes, where its blocks are whole slices of the first ones."""
    while len(member.axes) > 1:
        last = member.shape[member.axes[-1]]
        if member.offset % last or member.block % last:
            break
        member = dataclasses.replace(
            member,
            axes=member.axes[:-1],
            offset=member.offset // last,
            block=member.block // last,
        )
    return member
