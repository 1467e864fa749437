"""A jaxpr rewritten so that weights keep their names: what the interpreter and the passes walk.

``build`` follows every weight from its leaf through views, calls and loops to the equations that
use it. Calls and loops that hold a site become operations with bodies; whatever holds none stays
one opaque equation, so that its custom derivative and remat policy survive.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxcomp.graph import _compat
from jaxcomp.graph.sites import CONTRACTIONS, Site, layout_of, roles
from jaxcomp.graph.views import View, through


@dataclasses.dataclass(eq=False)
class Op:
    """One step of a program.

    Attributes:
      kind: "bind" (an equation as it stands), "view" (of a weight: nothing is computed), "site",
        "named" (a value with a name), or a structure with bodies: "scan", "while", "cond", "remat",
        "shard_map".
      eqn: the equation.
      inputs: ids of its operands.
      outputs: ids of its results.
      site: for kind "site".
      named: for kind "named".
      bodies: programs of the equation's sub-jaxprs that hold sites or named values.
      kept: for "scan", "while" and "shard_map": which inputs enter the body as weights.
    """

    kind: str
    eqn: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    site: Site | None = None
    named: "Named | None" = None
    bodies: tuple["Program", ...] = ()
    kept: tuple[bool, ...] = ()


@dataclasses.dataclass(frozen=True)
class Named:
    """A value that the model names with ``jax.ad_checkpoint.checkpoint_name``.

    Attributes:
      id: where it stands in the function, as in ``Site.id``.
      name: its name.
    """

    id: str
    name: str


@dataclasses.dataclass(eq=False)
class Program:
    """A function as a list of operations on numbered values.

    Attributes:
      inputs: ids of its arguments.
      outputs: ids of its results.
      ops: operations in order.
      constants: values known beforehand, by id.
      weights: for ids that stand for a weight, its path and view.
      sites: all sites in it, its bodies' included.
      named: all named values in it, likewise.
      depth: how many loops enclose it.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ops: list[Op]
    constants: dict[int, Any]
    weights: dict[int, tuple[str, View]]
    sites: tuple[Site, ...]
    named: tuple[Named, ...] = ()
    depth: int = 0


@dataclasses.dataclass(frozen=True)
class OtherUse:
    """A weight used where no site is.

    Attributes:
      path: name of the weight.
      primitive: the operation that uses it.
      where: location, as in ``Site.id``.
      contracted: the result of arithmetic on the weight alone is contracted with an activation, so
        that compressing the weight would have been meant to reach it.
    """

    path: str
    primitive: str
    where: str
    contracted: bool


class _Mark(NamedTuple):
    sites: int
    other: int
    named: int


class Builder:
    """Collects what ``build`` finds; one for a whole function."""

    def __init__(self, avals: dict[str, Any], wanted: Callable[[str], bool] | None):
        self.avals = avals
        self.wanted = wanted
        self.ids = itertools.count()
        self.weights: dict[int, tuple[str, View]] = {}
        self.derived: dict[int, frozenset[tuple[str, str, str]]] = {}
        self.constant: set[int] = set()
        self.number: dict[int, Any] = {}
        self.shapes: dict[int, Any] = {}
        self.sites: list[Site] = []
        self.named: list[Named] = []
        self.other: list[OtherUse] = []
        self.layouts: dict[str, Any] = {}
        self.groups: dict[Any, int] = {}
        self.depth = 0

    def new(self, aval: Any, number: Any = None) -> int:
        """A fresh id."""
        i = next(self.ids)
        self.shapes[i] = aval
        self.number[i] = i if number is None else number
        return i

    def program(self, body: _compat.Body, inputs: list[int], where: str) -> Program:
        """Builds a body on given argument ids."""
        ops: list[Op] = []
        constants: dict[int, Any] = {}
        first = self.mark()
        outputs = self.inline(body, inputs, where, ops, constants)
        found = tuple(self.sites[first.sites :]), tuple(self.named[first.named :])
        ids = tuple(inputs), tuple(outputs)
        return Program(*ids, ops, constants, self.weights, *found, self.depth)

    def loop_body(self, body: _compat.Body, inputs: list[int], where: str) -> Program:
        """Builds the body of a loop."""
        self.depth += 1
        program = self.program(body, inputs, where)
        self.depth -= 1
        return program

    def inline(self, body, inputs, where, ops, constants) -> list[int]:
        """Appends a body's operations to ``ops``; returns the ids of its results."""
        env: dict[Any, int] = {}

        def const(aval, value):
            i = self.new(aval)
            constants[i] = value
            self.constant.add(i)
            return i

        for var, value in zip(body.constvars, body.consts, strict=True):
            env[var] = const(var.aval, value)
        env.update(zip(body.invars, inputs, strict=True))

        def read(atom):
            return const(atom.aval, atom.val) if isinstance(atom, _compat.Literal) else env[atom]

        for k, eqn in enumerate(body.eqns):
            operands = [read(v) for v in eqn.invars]
            outputs = self.equation(eqn, operands, f"{where}{k}", ops, constants)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(v) for v in body.outvars]

    def involved(self, i: int) -> bool:
        """Whether a value is a weight or made of weights alone."""
        return i in self.weights or i in self.derived

    def equation(self, eqn, operands, where, ops, constants) -> list[int]:
        """Adds one equation."""
        name = eqn.primitive.name
        involved = any(self.involved(i) for i in operands)
        wanted = self.wanted
        if name == "name" and not involved and wanted is not None and wanted(eqn.params["name"]):
            return self.name(eqn, operands, where, ops)
        if involved or (wanted is not None and _compat.names_in(eqn, wanted)):
            if _compat.inner_jaxpr(eqn) is not None:
                done = self.call(eqn, operands, where, ops, constants)
            elif name in _STRUCTURES:
                done = _STRUCTURES[name](self, eqn, operands, where)
                if done is not None:
                    ops.append(done)
                    done = done.outputs
            else:
                done = self.leaf(eqn, operands, where, ops)
            if done is not None:
                return list(done)
        return self.opaque(eqn, operands, where, ops)

    def name(self, eqn, operands, where, ops) -> list[int]:
        """Adds a named value."""
        named = Named(where, eqn.params["name"])
        self.named.append(named)
        out = self.new(eqn.outvars[0].aval)
        ops.append(Op("named", eqn, tuple(operands), (out,), named=named))
        return [out]

    def opaque(self, eqn, operands, where, ops) -> list[int]:
        """Adds an equation as it stands."""
        name = eqn.primitive.name
        outputs = [self.new(v.aval) for v in eqn.outvars]
        if len(operands) == 1 and name in _SAME_VALUE and outputs:
            text = _compat.printable_params(eqn)
            if text is not None:
                self.number[outputs[0]] = (name, text, self.number[operands[0]])
        sources = frozenset().union(
            *(self.derived.get(i, frozenset()) for i in operands),
            {(self.weights[i][0], name, where) for i in operands if i in self.weights},
        )
        # A slice at an index of the model's own making is still made of the weight alone.
        own = operands[:1] if name in ("dynamic_slice", "gather") else operands
        if sources and all(self.involved(i) or i in self.constant for i in own):
            for i in outputs:
                self.derived[i] = sources
        elif sources:
            for path, primitive, place in sorted(sources):
                self.note(path, primitive, place, name in CONTRACTIONS)
        elif all(i in self.constant for i in operands):
            self.constant.update(outputs)
        ops.append(Op("bind", eqn, tuple(operands), tuple(outputs)))
        return outputs

    def note(self, path, primitive, where, contracted) -> None:
        """Records a use that is no site."""
        self.other.append(OtherUse(path, primitive, where, contracted))

    def leaf(self, eqn, operands, where, ops):
        """A primitive without sub-jaxprs on at least one weight: a view, a site, or None."""
        if len(operands) == 1 and operands[0] in self.weights:
            path, view = self.weights[operands[0]]
            seen = through(eqn, view)
            if seen is not None:
                out = self.new(eqn.outvars[0].aval)
                self.weights[out] = (path, seen)
                ops.append(Op("view", eqn, tuple(operands), (out,)))
                return [out]
        used = [k for k, i in enumerate(operands) if self.involved(i)]
        if len(used) != 1 or operands[used[0]] not in self.weights:
            return None
        site = self.site(eqn, operands, used[0], where)
        if site is None:
            return None
        outputs = [self.new(v.aval) for v in eqn.outvars]
        ops.append(Op("site", eqn, tuple(operands), tuple(outputs), site=site))
        return outputs

    def site(self, eqn, operands, position, where) -> Site | None:
        """The site that an equation is, if it is one."""
        path, view = self.weights[operands[position]]
        found = roles(eqn, position, view)
        if found is None:
            return None
        kind, r = found
        layout = layout_of(view, r)
        if layout is None:
            return None
        # A contraction decides what the matrix is; a look-up follows it.
        known = self.layouts.get(path)
        if known is None or (known[0] == "gather" and kind != "gather"):
            self.layouts[path] = (kind, layout)
        others = tuple(self.number[i] for k, i in enumerate(operands) if k != position)
        # Weights of one group must also flatten the input in the same order.
        inner = [f for a in r.contracted for f in view.axes[a]]
        order = tuple(sorted(range(len(inner)), key=lambda k: (inner[k].axis, -inner[k].stride)))
        params = eqn.params.get("dimension_numbers", "")
        if kind == "conv_general_dilated":  # strides, padding and dilation decide what it sees
            params = sorted((k, str(v)) for k, v in eqn.params.items())
        axes = (str(params), order, tuple(f.size for f in inner))
        key = (kind, others, axes if kind != "gather" else where)
        group = self.groups.setdefault(key, len(self.groups))
        site = Site(where, path, kind, layout, group, view, position)
        self.sites.append(site)
        return site

    def call(self, eqn, operands, where, ops, constants):
        """A call: inlined, or a remat body, if it holds a site or hands a weight on; else None."""
        body = _compat.body_of(_compat.inner_jaxpr(eqn))
        first = self.mark()
        if _compat.is_remat(eqn):
            inner = [self.alias(i) for i in operands]
            program = self.program(body, inner, f"{where}/")
            if not self.found(first):
                return self.discard(first)
            outputs = tuple(self.new(v.aval) for v in eqn.outvars)
            ops.append(Op("remat", eqn, tuple(operands), outputs, bodies=(program,)))
            return outputs
        mine: list[Op] = []
        extra: dict[int, Any] = {}
        wanted = self.wanted
        if _compat.is_custom(eqn):  # Named values inside are left to it, whatever else is in it.
            self.wanted = None
        outputs = self.inline(body, operands, f"{where}/", mine, extra)
        self.wanted = wanted
        if not self.found(first) and not any(self.involved(i) for i in outputs):
            return self.discard(first)
        ops += mine
        constants.update(extra)
        return outputs

    def mark(self) -> "_Mark":
        """How much has been found so far."""
        return _Mark(len(self.sites), len(self.other), len(self.named))

    def found(self, first: "_Mark") -> bool:
        """Whether a site or named value has been found since."""
        return len(self.sites) > first.sites or len(self.named) > first.named

    def discard(self, first: "_Mark") -> None:
        """Forgets a tentative build, but for weights that arithmetic led to a contraction."""
        del self.sites[first.sites :], self.named[first.named :]
        kept = [o for o in self.other[first.other :] if o.contracted]
        self.other[first.other :] = kept

    def alias(self, i: int) -> int:
        """A value under a new id inside a body."""
        j = self.new(self.shapes[i], self.number[i])
        for table in (self.weights, self.derived):
            if i in table:
                table[j] = table[i]
        if i in self.constant:
            self.constant.add(j)
        return j

    def dense(self, i: int, name: str, where: str, aval=None) -> int:
        """The id inside a body of an operand that enters it as a plain array."""
        j = self.new(self.shapes[i] if aval is None else aval)
        if i in self.weights:
            self.derived[j] = frozenset({(self.weights[i][0], name, where)})
        elif i in self.derived:
            self.derived[j] = self.derived[i]
        return j

    def finish(self, kind, eqn, operands, programs, kept, first):
        """The structured operation, or None where its bodies hold nothing."""
        if not self.found(first):
            return self.discard(first)
        outputs = tuple(self.new(v.aval) for v in eqn.outvars)
        return Op(kind, eqn, tuple(operands), outputs, bodies=tuple(programs), kept=tuple(kept))

    def scan(self, eqn, operands, where):
        """A scan: weights enter as constants, as unchanged carries, or sliced along the loop."""
        first = self.mark()
        loop = _compat.scan_of(eqn.params)
        body = _compat.body_of(loop.jaxpr)
        inner, kept = [], []
        for k, (i, var) in enumerate(zip(operands, body.invars, strict=True)):
            weight = i in self.weights
            j = None
            if k < loop.num_consts:
                j = self.alias(i)
            elif k < loop.num_consts + loop.num_carry:
                if weight and body.outvars[k - loop.num_consts] is var:
                    j = self.alias(i)
            elif weight:
                path, view = self.weights[i]
                inside = view.enter_loop()
                if inside is not None:
                    j = self.new(var.aval)
                    self.weights[j] = (path, inside)
            kept.append(weight and j is not None)
            inner.append(self.dense(i, "scan", where, var.aval) if j is None else j)
        return self.finish(
            "scan", eqn, operands, [self.loop_body(body, inner, f"{where}/")], kept, first
        )

    def while_loop(self, eqn, operands, where):
        """A while loop: weights enter as constants or unchanged carries."""
        first = self.mark()
        body = _compat.body_of(eqn.params["body_jaxpr"])
        skip, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        inner, kept = [], [False] * skip
        for k, (i, var) in enumerate(zip(operands[skip:], body.invars, strict=True)):
            same = k < consts or body.outvars[k - consts] is var
            keep = same and i in self.weights
            kept.append(keep)
            whole = keep or k < consts
            inner.append(self.alias(i) if whole else self.dense(i, "while", where, var.aval))
        return self.finish(
            "while", eqn, operands, [self.loop_body(body, inner, f"{where}/")], kept, first
        )

    def cond(self, eqn, operands, where):
        """A conditional: every branch sees the weights."""
        first = self.mark()
        programs = [
            self.program(
                _compat.body_of(branch), [self.alias(i) for i in operands[1:]], f"{where}/{b}/"
            )
            for b, branch in enumerate(eqn.params["branches"])
        ]
        return self.finish("cond", eqn, operands, programs, [], first)

    def shard_map(self, eqn, operands, where):
        """A shard_map: inside, a weight is the shard of its leaf."""
        first = self.mark()
        body = _compat.body_of(eqn.params["jaxpr"])
        inner, kept = [], []
        for i, var in zip(operands, body.invars, strict=True):
            keep = i in self.weights and self.weights[i][1].is_leaf
            kept.append(keep)
            if keep:
                j = self.new(var.aval)
                self.weights[j] = (self.weights[i][0], View.of(var.aval.shape, var.aval.dtype))
            else:
                j = self.dense(i, "shard_map", where, var.aval)
            inner.append(j)
        return self.finish(
            "shard_map", eqn, operands, [self.program(body, inner, f"{where}/")], kept, first
        )


_STRUCTURES = {
    "scan": Builder.scan,
    "while": Builder.while_loop,
    "cond": Builder.cond,
    "shard_map": Builder.shard_map,
}

# Operations whose result is the same input to a layer, for input groups.
_SAME_VALUE = frozenset(
    {
        "convert_element_type",
        "reshape",
        "transpose",
        "squeeze",
        "expand_dims",
        "broadcast_in_dim",
        "copy",
        "copy_p",
        "name",
        "sharding_constraint",
        "pvary",
        "pcast",
        "reduce_precision",
    }
)


def hooks(program: Program, loops: tuple[int, ...] = ()) -> Iterator[tuple[Op, tuple[int, ...]]]:
    """The sites and named values of a program, its bodies included, in order of evaluation.

    Args:
      program: from ``build``.
      loops: lengths of the scans that enclose it, outermost first.

    Yields:
      Operations, and the lengths of the scans that enclose each: the leading axes of its state.
    """
    for op in program.ops:
        if op.kind in ("site", "named"):
            yield op, loops
        inner = loops
        if op.kind == "scan":
            inner = (*loops, _compat.scan_of(op.eqn.params).length)
        for body in op.bodies:
            yield from hooks(body, inner)


def build(
    jaxpr: Any,
    weights: dict[int, tuple[str, Any]],
    named: Callable[[str], bool] | None = None,
) -> tuple[Program, Builder]:
    """Rewrites a jaxpr with some of its arguments as named weights.

    Args:
      jaxpr: a closed jaxpr.
      weights: argument position -> (path, aval of the leaf).
      named: which named values become operations of their own; None is none of them.

    Returns:
      The program, and the builder with the sites and other uses that it found.
    """
    body = _compat.body_of(jaxpr)
    builder = Builder({path: aval for path, aval in weights.values()}, named)
    inputs = []
    for k, var in enumerate(body.invars):
        i = builder.new(var.aval)
        if k in weights:
            builder.weights[i] = (weights[k][0], View.of(var.aval.shape, var.aval.dtype))
        inputs.append(i)
    program = builder.program(body, inputs, "")
    for i in program.outputs:
        if i in builder.weights:
            builder.note(builder.weights[i][0], "output", "", False)
    return program, builder
