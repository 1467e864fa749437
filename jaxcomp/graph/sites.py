"""Where weights are used: contractions and look-ups, each seen as a canonical matrix.

A dense layer of any shape is y[.., out] = sum over in of x[.., in] W[out, in], once the axes of the
weight are sorted into ``stack`` (axes that loops run over and batch axes of the contraction),
``out`` and ``in``. The functions here find that form and carry inputs and outputs to it and back.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.graph.views import Factor, View

CONTRACTIONS = ("dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a leaf make up the canonical matrix ``(*stack, out, in)``.

    Attributes:
      leaf_shape: shape of the leaf.
      stack_axes: axes of the leaf, loops outermost first, then batch axes.
      out_axes: axes that are flattened, in this order, into out.
      in_axes: axes that are flattened, in this order, into in.
    """

    leaf_shape: tuple[int, ...]
    stack_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    in_axes: tuple[int, ...]

    def sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of some axes."""
        return tuple(self.leaf_shape[a] for a in axes)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of the canonical matrix."""
        return (
            *self.sizes(self.stack_axes),
            math.prod(self.sizes(self.out_axes)),
            math.prod(self.sizes(self.in_axes)),
        )


@dataclasses.dataclass(frozen=True)
class Site:
    """One use of one weight by one contraction or look-up.

    Attributes:
      id: where it stands in the function: indices of the equations that enclose it.
      path: name of the weight in the parameter tree.
      kind: "dot_general", "conv_general_dilated", "ragged_dot" or "gather".
      layout: the canonical matrix.
      input_group: sites with the same number read the same value.
      transposed: the contraction runs over what is ``out`` at the weight's first use.
      uses: how many sites the weight has.
      view: how the operand comes from the leaf.
      operand: which operand of the equation the weight is.
    """

    id: str
    path: str
    kind: str
    layout: Layout
    input_group: int
    view: View
    operand: int
    transposed: bool = False
    uses: int = 1

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the stack axes."""
        return self.layout.sizes(self.layout.stack_axes)

    @property
    def out_size(self) -> int:
        """Rows of the canonical matrix."""
        return self.layout.matrix_shape[-2]

    @property
    def in_size(self) -> int:
        """Columns of the canonical matrix."""
        return self.layout.matrix_shape[-1]

    @property
    def is_contraction(self) -> bool:
        """Whether it is a matmul or a convolution, not a look-up."""
        return self.kind != "gather"

    @property
    def loop_axes(self) -> tuple[int, ...]:
        """Axes of the leaf that loops run over or that are fixed at an index."""
        return tuple(f.axis for f in self.view.loops) + tuple(f.axis for f, _ in self.view.fixed)

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """Stack axes that the contraction itself batches over (experts), not loops."""
        return tuple(a for a in self.layout.stack_axes if a not in self.loop_axes)


@dataclasses.dataclass(frozen=True)
class Roles:
    """Axes of the weight operand by what the equation does with them."""

    batch: tuple[int, ...]
    rest: tuple[int, ...]
    contracted: tuple[int, ...]


def roles(eqn: Any, operand: int, view: View) -> tuple[str, Roles] | None:
    """What an equation does with each axis of its weight operand.

    Args:
      eqn: any equation.
      operand: which of its operands is the weight.
      view: the weight.

    Returns:
      The kind of site and the roles of the axes, or None where no rule applies.
    """
    name, params = eqn.primitive.name, eqn.params
    everything = tuple(range(len(view.axes)))

    def without(*used):
        gone = {a for axes in used for a in axes}
        return tuple(a for a in everything if a not in gone)

    if name == "dot_general":
        contract, batch = params["dimension_numbers"]
        c, b = tuple(contract[operand]), tuple(batch[operand])
        return (name, Roles(b, without(c, b), c)) if c else None
    if name == "conv_general_dilated" and operand == 1:
        if params["batch_group_count"] != 1:
            return None
        out_axis, *inner = params["dimension_numbers"].rhs_spec
        return name, Roles((), (out_axis,), tuple(sorted(inner)))
    if name in ("ragged_dot_general", "ragged_dot") and operand == 1:
        if name == "ragged_dot":
            return "ragged_dot", Roles((0,), (2,), (1,))
        numbers = params["ragged_dot_dimension_numbers"]
        (lhs_c, rhs_c), (lhs_b, _) = numbers.dot_dimension_numbers
        groups = tuple(numbers.rhs_group_dimensions)
        simple = not lhs_b and len(groups) == 1 and len(eqn.invars[0].aval.shape) == 2
        if not simple or len(numbers.lhs_ragged_dimensions) != 1 or lhs_c != (1,):
            return None
        return "ragged_dot", Roles(groups, without(groups, rhs_c), tuple(rhs_c))
    if name == "gather" and operand == 0:
        numbers = params["dimension_numbers"]
        if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
            return None
        row = numbers.start_index_map[0]
        full = all(
            size == n
            for i, (size, n) in enumerate(zip(params["slice_sizes"], view.shape, strict=True))
            if i != row
        )
        if not full or params["slice_sizes"][row] != 1 or numbers.collapsed_slice_dims != (row,):
            return None
        return "gather", Roles((), (row,), without((row,)))
    return None


def layout_of(view: View, r: Roles) -> Layout | None:
    """The canonical matrix of a weight whose axes have the given roles.

    Returns:
      The layout, or None where one axis of the leaf plays two roles.
    """
    role: dict[int, str] = {}
    for name, axes in (("stack", r.batch), ("out", r.rest), ("in", r.contracted)):
        for axis in axes:
            for factor in view.axes[axis]:
                if role.setdefault(factor.axis, name) != name:
                    return None
    outer = [f.axis for f in view.loops] + [f.axis for f, _ in view.fixed]
    if any(a in role for a in outer) or len(set(outer)) != len(outer):
        return None
    rest = [a for a in range(len(view.leaf_shape)) if a not in outer]
    pick = lambda name: tuple(a for a in rest if role.get(a, "out") == name)  # noqa: E731
    if not pick("in"):
        return None
    return Layout(view.leaf_shape, (*outer, *pick("stack")), pick("out"), pick("in"))


def _factors(view: View, axes: tuple[int, ...]) -> list[Factor]:
    return [f for a in axes for f in view.axes[a]]


def _sorted(factors: list[Factor]) -> list[Factor]:
    return sorted(factors, key=lambda f: (f.axis, -f.stride))


def _dot_axes(eqn: Any, site: Site):
    contract, batch = eqn.params["dimension_numbers"]
    other = 1 - site.operand
    c, b = tuple(contract[other]), tuple(batch[other])
    rank = len(eqn.invars[other].aval.shape)
    return b, tuple(a for a in range(rank) if a not in c and a not in b), c


def features(eqn: Any, site: Site) -> tuple[int, ...]:
    """The axes of a contraction's input that make up a token."""
    return _dot_axes(eqn, site)[2] if site.kind == "dot_general" else (-1,)


def splits_tokens(eqn: Any, site: Site) -> bool:
    """Whether parts of a contraction's input along its leading axis hold other tokens each."""
    return site.kind == "dot_general" and 0 in _dot_axes(eqn, site)[1]


def to_tokens(eqn: Any, site: Site, x: jax.Array) -> jax.Array:
    """The input of a contraction as ``(*batch, tokens, in)``, in the order of the canonical matrix.

    Args:
      eqn: the site's equation.
      site: a contraction; grouped convolutions have no such input.
      x: the operand that is not the weight.

    Returns:
      Its values rearranged; a convolution's are the patches that its kernel sees.
    """
    if site.kind == "ragged_dot":
        return x
    if site.kind == "conv_general_dilated":
        return _patches(eqn, site, x)
    _, r = roles(eqn, site.operand, site.view)
    b, rest, c = _dot_axes(eqn, site)
    batch, inner = _factors(site.view, r.batch), _factors(site.view, r.contracted)
    tokens = math.prod(x.shape[a] for a in rest)
    x = x.transpose((*b, *rest, *c))
    x = x.reshape((*(f.size for f in batch), tokens, *(f.size for f in inner)))
    order = [batch.index(f) for f in _sorted(batch)]
    order += [len(batch)]
    order += [len(batch) + 1 + inner.index(f) for f in _sorted(inner)]
    # Sizes come from the view: inside a shard_map the leaf is a shard of what the layout describes.
    sizes = [math.prod(f.size for f in batch if f.axis == a) for a in site.batch_axes]
    return x.transpose(order).reshape((*sizes, tokens, math.prod(f.size for f in inner)))


def from_tokens(eqn: Any, site: Site, y: jax.Array) -> jax.Array:
    """The result of a dot_general from ``(*batch, tokens, out)``; inverse to ``to_tokens``.

    Args:
      eqn: the site's equation.
      site: a site of kind "dot_general".
      y: rows of results.

    Returns:
      An array of the shape and dtype of the equation's result.
    """
    _, r = roles(eqn, site.operand, site.view)
    _, rest, _ = _dot_axes(eqn, site)
    x_aval = eqn.invars[1 - site.operand].aval
    batch, outer = _factors(site.view, r.batch), _factors(site.view, r.rest)
    sorted_batch, sorted_outer = _sorted(batch), _sorted(outer)
    x_rest = [x_aval.shape[a] for a in rest]
    sizes = [f.size for f in sorted_batch] + x_rest + [f.size for f in sorted_outer]
    y = y.reshape(sizes)
    first = [sorted_batch.index(f) for f in batch]
    middle = [len(batch) + i for i in range(len(rest))]
    last = [len(batch) + len(rest) + sorted_outer.index(f) for f in outer]
    order = first + (middle + last if site.operand == 1 else last + middle)
    aval = eqn.outvars[0].aval
    return y.transpose(order).reshape(aval.shape).astype(aval.dtype)


def _patches(eqn: Any, site: Site, x: jax.Array) -> jax.Array:
    p = eqn.params
    numbers = p["dimension_numbers"]
    kernel = eqn.invars[1].aval.shape
    _, in_axis, *spatial = numbers.rhs_spec
    lhs = x.transpose(numbers.lhs_spec)
    rank = len(spatial)
    plain = jax.lax.ConvDimensionNumbers(*(tuple(range(rank + 2)),) * 3)
    patches = jax.lax.conv_general_dilated_patches(
        lhs,
        tuple(kernel[a] for a in spatial),
        p["window_strides"],
        p["padding"],
        lhs_dilation=p["lhs_dilation"],
        rhs_dilation=p["rhs_dilation"],
        dimension_numbers=plain,
        precision=jax.lax.Precision.HIGHEST,
    )
    features = jnp.moveaxis(patches, 1, -1)
    tokens = math.prod(features.shape[:-1])
    named = [in_axis, *spatial]
    features = features.reshape((tokens, *(kernel[a] for a in named)))
    # Axes of the operand to axes of the leaf, whose order the canonical matrix has.
    by_leaf = sorted(range(len(named)), key=lambda i: site.view.axes[named[i]][0].axis)
    return features.transpose((0, *(i + 1 for i in by_leaf))).reshape(tokens, site.in_size)


def is_grouped(eqn: Any) -> bool:
    """Whether the equation is a grouped convolution, whose outputs see different inputs."""
    return eqn.params.get("feature_group_count", 1) != 1
