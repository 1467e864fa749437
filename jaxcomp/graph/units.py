"""Prunable units, found through the graph: which slices of which parameters live and die together.

The inputs of a consumer (an attention output projection, an MLP's second matmul) are cut into equal
blocks, the units. Its producers are the rows of other weights, biases and gains that make one
block: with a unit gone, nothing else sees that they are gone. Where that does not hold, because the
axis of the units is also that of a residual stream or is summed over by someone else, there are no
such units and an error says who else sees the axis.
"""

import dataclasses

from jaxcomp.errors import JaxcompError
from jaxcomp.graph.scopes import Scope, reaching
from jaxcomp.graph.trace import Graph
from jaxcomp.graph.unit_walk import Member, Walk

__all__ = ["Member", "UnitGroup", "coupled_units", "layer_unit", "leaf_units"]


@dataclasses.dataclass(frozen=True)
class UnitGroup:
    """Units that are alternatives to one another: the heads of a layer, or its neurons.

    Attributes:
      name: the consumer's path and the kind, "layers/0/mlp/down_proj/kernel:neuron".
      kind: "head", "neuron", "row", "column", "layer" or "weight".
      count: units at each index of the stack.
      stack: sizes of the axes over which layers (or experts) are stacked, each with its own units.
      members: the parts of parameters that they are made of.
    """

    name: str
    kind: str
    count: int
    stack: tuple[int, ...]
    members: tuple[Member, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one value a unit, ``(*stack, count)``."""
        return (*self.stack, self.count)

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Members that a gate multiplies."""
        return tuple(m for m in self.members if m.role == "consumer")

    @property
    def producers(self) -> tuple[Member, ...]:
        """Members that make a unit's input."""
        return tuple(m for m in self.members if m.role == "producer")

    @property
    def unit_size(self) -> int:
        """Parameters of one unit."""
        return sum(m.unit_size for m in self.members)


def coupled_units(
    graph: Graph, path: str, size: int, kind: str = "neuron", scope: Scope | None = None
) -> UnitGroup:
    """The units that are blocks of a weight's inputs, with all parameters that make them.

    Args:
      graph: the traced function.
      path: name of the consumer's weight, which a contraction uses.
      size: input channels of one unit; divides the weight's input size.
      kind: name of such units.
      scope: of the graph's program, if the caller has it.

    Returns:
      The group. A lone unit (``size`` is the input size) owns all parameters on which nothing but
      the consumer depends.

    Raises:
      JaxcompError: the size does not divide, or units cannot be told apart somewhere.
    """
    sites = [s for s in graph.sites_of(path) if s.is_contraction]
    if not sites:
        raise JaxcompError(f"{path}: no contraction uses this weight, so it has no inputs to group")
    scope = Scope.of(graph.program) if scope is None else scope
    site, layout = sites[0], graph.layouts[path]
    channels = site.in_size
    if site.kind == "conv_general_dilated":  # blocks of channels, at all positions of the kernel
        channels = _conv_channels(scope, path)
    if size < 1 or channels % size:
        divisors = [d for d in range(1, channels + 1) if channels % d == 0]
        near = sorted(divisors, key=lambda d: (abs(d - size), d))[:2]
        raise JaxcompError(
            f"{path} {layout.leaf_shape}: a unit of {size} input channels does not divide the "
            f"{channels} inputs; use size {' or '.join(map(str, sorted(near)))}"
        )
    count, stack, name = channels // size, site.stack, f"{path}:{kind}"
    if count == 1:
        consumer = Member(path, layout.leaf_shape, "consumer", (), layout.stack_axes)
        owned = _owned(graph, scope, path, len(site.view.loops))
        return UnitGroup(name, kind, 1, stack, (consumer, *owned))
    walk = Walk(graph, scope, path, size, kind, count, stack)
    return UnitGroup(name, kind, count, stack, walk.members())


def leaf_units(graph: Graph, path: str, kind: str) -> UnitGroup:
    """Units of one weight alone: its rows (outputs), columns (inputs) or single weights.

    Args:
      graph: the traced function.
      path: name of a weight.
      kind: "row", "column" or "weight".

    Returns:
      The group; a gate multiplies its slice of the weight.
    """
    layout = graph.layouts[path]
    matrix = {"row": layout.out_axes, "column": layout.in_axes}
    rest = [a for a in range(len(layout.leaf_shape)) if a not in layout.stack_axes]
    axes = tuple(matrix.get(kind, rest))
    member = Member(path, layout.leaf_shape, "consumer", axes, layout.stack_axes)
    stack = layout.sizes(layout.stack_axes)
    return UnitGroup(f"{path}:{kind}", kind, member.length, stack, (member,))


def layer_unit(graph: Graph, path: str, scope: Scope | None = None) -> UnitGroup:
    """One unit that is a whole layer: a residual branch that ends in a weight.

    Its gate multiplies the weight and the bias that is added to its result, which closes the
    branch. It owns, as producers, all parameters on which nothing but that weight depends.

    Args:
      graph: the traced function.
      path: name of the branch's last weight.
      scope: of the graph's program, if the caller has it.

    Returns:
      A group of one unit for each index of the stack.
    """
    sites = [s for s in graph.sites_of(path) if s.is_contraction]
    layout, loops = graph.layouts[path], len(sites[0].view.loops)
    scope = Scope.of(graph.program) if scope is None else scope
    members = [Member(path, layout.leaf_shape, "consumer", (), layout.stack_axes)]
    members += _bias(graph, scope, path, loops)
    taken = {m.path for m in members}
    members += [m for m in _owned(graph, scope, path, loops) if m.path not in taken]
    return UnitGroup(f"{path}:layer", "layer", 1, sites[0].stack, tuple(members))


def _conv_channels(scope: Scope, path: str) -> int:
    """Input channels of a convolution's kernel."""
    (shape, spec), *_ = (
        (node.site.view.shape, node.eqn.params["dimension_numbers"].rhs_spec)
        for inner in scope.all()
        for node in inner.nodes
        if node.site is not None and node.site.path == path
    )
    return shape[spec[1]]


def _owned(graph: Graph, root: Scope, path: str, loops: int) -> list[Member]:
    """The leaves on which nothing but one weight's result depends, whole."""
    alone = reaching(root) - reaching(root, path) - {path}
    found = []
    for other in graph.paths:
        if other not in alone:
            continue
        views = [v for p, v in graph.program.weights.values() if p == other]
        deepest = max(views, key=lambda v: len(v.loops))
        if len(deepest.loops) < loops:
            continue
        stack = tuple(f.axis for f in deepest.loops[:loops])
        if len(stack) != len(graph.layouts[path].stack_axes):
            continue
        shape = tuple(graph.shapes[other].shape)
        found.append(Member(other, shape, "producer", (), stack))
    return found


_FOLLOW = frozenset(
    "convert_element_type reshape transpose squeeze expand_dims copy name reduce_precision "
    "sharding_constraint".split()
)


def _bias(graph: Graph, root: Scope, path: str, loops: int) -> list[Member]:
    """The vectors that are added to a weight's results."""
    found = {}
    for scope in root.all():
        for node in scope.nodes:
            if node.site is None or node.site.path != path or not node.live:
                continue
            value = node.outputs[0]
            while len(readers := scope.readers.get(value, ())) == 1:
                (reader, k) = readers[0]
                if reader.name in ("add", "add_any"):
                    other = _source(scope, reader.inputs[1 - k])
                    if other in scope.weights:
                        name, view = scope.weights[other]
                        stack = tuple(f.axis for f in view.loops[:loops])
                        shape = tuple(graph.shapes[name].shape)
                        if len(stack) == len(graph.layouts[path].stack_axes):
                            found[name] = Member(name, shape, "consumer", (), stack)
                    break
                if reader.name not in _FOLLOW:
                    break
                value = reader.outputs[0]
    return list(found.values())


def _source(scope: Scope, value):
    """What a value is, before casts and broadcasts."""
    while value in scope.makers and value not in scope.weights:
        node, _ = scope.makers[value]
        if node.name not in _FOLLOW and node.name != "broadcast_in_dim":
            break
        value = node.inputs[0]
    return value
