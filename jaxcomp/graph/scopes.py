"""Programs and the jaxprs inside them as one kind of scope, for passes that follow values."""

from typing import Any

from jaxcomp.graph import _compat
from jaxcomp.graph.labels import Label
from jaxcomp.graph.program import Program


class Node:
    """One operation, whether of a program or of a jaxpr inside it.

    Attributes:
      kind: as of ``Op``.
      eqn: the equation.
      inputs: its operands, any keys that the scope gives to values.
      outputs: its results.
      site: for kind "site".
      programs: bodies that hold weights.
      live: whether a result of its scope depends on it.
    """

    def __init__(self, kind, eqn, inputs, outputs, site=None, programs=()):
        self.kind, self.eqn, self.site, self.programs = kind, eqn, site, programs
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.live = False

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return self.eqn.primitive.name


class Scope:
    """A program or jaxpr body: nodes in order, with who makes and who reads each value.

    Attributes:
      inputs: keys of its arguments.
      outputs: keys of its results.
      nodes: operations in order.
      weights: path and view by key.
      parent: the scope and node that it is a body of, or None.
      makers: key -> the node that makes it, and as which of its results.
      readers: key -> live nodes that read it, and as which operand.
      position: key -> which argument it is.
    """

    def __init__(self, inputs, outputs, nodes, weights, parent=None):
        self.inputs, self.outputs, self.nodes = tuple(inputs), tuple(outputs), nodes
        self.weights, self.parent = weights, parent
        self.makers = {i: (n, k) for n in nodes for k, i in enumerate(n.outputs)}
        self.position = {i: k for k, i in enumerate(self.inputs)}
        self.children: dict[Node, list[Scope]] = {}
        wanted = set(self.outputs)
        self.readers: dict[Any, list] = {}
        for node in reversed(nodes):
            node.live = any(i in wanted for i in node.outputs)
            if node.live:
                wanted.update(node.inputs)
                for k, i in enumerate(node.inputs):
                    self.readers.setdefault(i, []).append((node, k))
        for node in nodes:
            if node.programs:
                self.children[node] = [Scope.of(p, (self, node)) for p in node.programs]

    @classmethod
    def of(cls, program: Program, parent=None) -> "Scope":
        """The scope of a program."""
        nodes = [Node(o.kind, o.eqn, o.inputs, o.outputs, o.site, o.bodies) for o in program.ops]
        return cls(program.inputs, program.outputs, nodes, program.weights, parent)

    @classmethod
    def inside(cls, jaxpr, parent) -> "Scope":
        """The scope of a jaxpr in which no weight has a name."""
        inner = _compat.body_of(jaxpr)

        def read(v):
            return object() if isinstance(v, _compat.Literal) else v

        nodes = [Node("bind", e, map(read, e.invars), e.outvars) for e in inner.eqns]
        return cls(inner.invars, map(read, inner.outvars), nodes, {}, parent)

    def bodies(self, node: Node) -> list["Scope"]:
        """The scopes of a node's sub-jaxprs."""
        if node not in self.children:
            inner, params = _compat.inner_jaxpr(node.eqn), node.eqn.params
            jaxprs = [] if inner is None else [inner]
            if node.name == "scan":
                jaxprs = [params["jaxpr"]]
            elif node.name == "cond":
                jaxprs = list(params["branches"])
            self.children[node] = [Scope.inside(j, (self, node)) for j in jaxprs]
        return self.children[node]

    def all(self):
        """This scope and those of the structured operations in it."""
        yield self
        for node in self.nodes:
            if node.programs:
                for scope in self.children[node]:
                    yield from scope.all()


def operand_of(node: Node, position: int) -> tuple[int, int]:
    """The operand that input ``position`` of a node's body is, and how many axes it has more."""
    if node.name == "cond":
        return position + 1, 0
    if node.name == "while":
        return position + node.eqn.params["cond_nconsts"], 0
    if node.name == "scan":
        loop = _compat.scan_of(node.eqn.params)
        return position, int(position >= loop.num_consts + loop.num_carry)
    return position, 0


def shifted(seen: Label, by: int) -> Label:
    """A label where there are more, or fewer, axes in front."""
    return Label(seen.base, {a + by: v for a, v in seen.axes.items()})


def reaching(scope: Scope, cut: str | None = None) -> set[str]:
    """Paths of the weights on which a scope's results depend, a cut weight's results aside."""
    wanted, paths = set(scope.outputs), set()
    for node in reversed(scope.nodes):
        if not any(i in wanted for i in node.outputs):
            continue
        if node.site is not None and node.site.path == cut:
            continue
        if node.programs:
            wanted.update(i for i in node.inputs if i not in scope.weights)
            for inner in scope.children[node]:
                paths |= reaching(inner, cut)
        else:
            wanted.update(node.inputs)
    return paths | {scope.weights[i][0] for i in wanted if i in scope.weights}
