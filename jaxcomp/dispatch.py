"""``dispatch(apply)``: a model function on compressed parameters, every matmul on its best kernel.

A site whose weight is compressed goes to an implementation:

- "int8": the input's integer codes times the weight's, summed in int32, then scaled;
- "fp8": the same with float8 values;
- "kernel": the weight stays packed in memory and is decoded next to the matrix unit (on TPUs; on
  Hopper GPUs where a table of measurements says so, see ``jaxcomp.kernels.tuning``); of experts
  on a CPU too, one after the other, each for its own rows;
- "parts": the input through each part in turn (a scale, a thin product, some dense columns);
- "rows": of an embedding only the rows that are looked up;
- "materialize": the weight made dense inside the computation, then the equation as it stands.

Which one runs is decided from shapes and formats alone and can be asked for:
``dispatch(apply).report``.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp import formats, look_up, matmul, packed, packed_experts, packed_sparse, sharding
from jaxcomp.choice import IMPLEMENTATIONS, Choice, chip_of, choose
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import is_compressed
from jaxcomp.graph import Plain, Site, interpret, trace
from jaxcomp.graph.interpret import as_array, picked
from jaxcomp.graph.program import Op, Program
from jaxcomp.graph.sites import features, from_tokens, to_tokens
from jaxcomp.graph.trace import flatten_inputs, leaf_paths
from jaxcomp.kernels import chips
from jaxcomp.kernels.implementations import note_of
from jaxcomp.quantization.ste import fake_quantize_input


class Dispatched:
    """``apply`` with compressed weights at its matmuls; call it like ``apply``."""

    def __init__(
        self,
        apply: Callable,
        implementation: str | None = None,
        rules: Any = None,
        mesh: sharding.Mesh | None = None,
    ):
        if implementation not in (None, *IMPLEMENTATIONS):
            raise JaxcompError(
                f"implementation {implementation!r} is unknown; use None for the best one, or one "
                f"of {', '.join(IMPLEMENTATIONS)}"
            )
        if not callable(apply):
            raise JaxcompError(
                f"apply is a {type(apply).__name__}; give a function apply(params, *inputs)"
            )
        self.apply = apply
        self.implementation = implementation
        self.rules = rules
        self.mesh = mesh
        functools.update_wrapper(self, apply, updated=())

    def __call__(self, params: Any, *inputs: Any, **kwargs: Any) -> Any:
        """Evaluates ``apply(params, *inputs, **kwargs)``; wrap it in ``jax.jit`` to trace once."""
        named, _ = leaf_paths(_checked(params))
        if not any(is_compressed(leaf) for _, leaf in named):
            return self.apply(params, *inputs, **kwargs)
        graph = trace(self.apply, params, *inputs, select=is_compressed, **kwargs)
        handler = Dispatcher(self.implementation, self._splits(named))
        arguments = arrays_of(named, inputs, kwargs)
        results, _ = interpret(graph.program, arguments, handler, {})
        return jax.tree.unflatten(graph.out_tree, results)

    def report(self, params: Any, *inputs: Any, **kwargs: Any) -> tuple[Choice, ...]:
        """Which implementation runs where; nothing is computed.

        Args:
          params: as for the call; shapes are enough.
          *inputs: as for the call; shapes are enough.
          **kwargs: as for the call.

        Returns:
          One choice for each use of a compressed weight and each call of ``jc.attention.attention``
          or ``decode_attention``, in order of evaluation. Those of attention have the operation's
          name as path and kind, and say which implementation this machine (or the mesh in use)
          runs, and of each that comes before it why it does not.
        """
        noted = {"named": lambda name: note_of(name) is not None}
        graph = trace(
            self.apply, _checked(params), *inputs, select=is_compressed, **noted, **kwargs
        )
        splits = self._splits(leaf_paths(params)[0])
        choices = []
        for op, weights in _uses(graph.program):
            if op.kind == "named":
                note = note_of(op.named.name)
                reason = note.reason or "it fits, and is the first choice"
                choices.append(Choice(note.operation, note.operation, note.implementation, reason))
            for path, is_site in weights:
                if is_site:
                    leaf = graph.shapes[path]
                    split = site_split(op.site, leaf, splits.get(path))
                    name, reason = choose(op, leaf, self.implementation, split)
                    choices.append(Choice(path, op.site.kind, name, reason))
                else:
                    reason = f"{op.eqn.primitive.name} has no rule for a compressed operand"
                    choices.append(Choice(path, op.eqn.primitive.name, "materialize", reason))
        return tuple(choices)

    def prepare(self, params: Any, *inputs: Any, **kwargs: Any) -> Any:
        """Rearranges packed weights once for the kernels of the chip at hand.

        Without it the kernels do so on every call, and values under a bit mask that lie in blocks
        are not found. On a mesh of Auto axes it also notes how each weight lies there, which a
        traced function cannot see: no rules need to be given. Weights that no kernel reads, or that
        are also read otherwise, stay as they are. The result is for running: save ``params``.

        Args:
          params: as for the call.
          *inputs: as for the call; shapes are enough.
          **kwargs: as for the call.

        Returns:
          Parameters to call this with in place of ``params``.
        """
        named, treedef = leaf_paths(_checked(params))
        splits = self._splits(named)
        blocks = []
        for path, leaf in named:
            if is_compressed(leaf):
                split = splits.get(path) or sharding.held(leaf)
                leaf = self._listed(leaf, split).replace(split=split)
            blocks.append(leaf)
        readers: dict[str, set[str]] = {}
        for choice in self.report(jax.tree.unflatten(treedef, blocks), *inputs, **kwargs):
            readers.setdefault(choice.path, set()).add(choice.implementation)
        leaves = [
            listed.replace(
                parts=tuple(packed.prepared(p, chip_of(leaf, self.mesh)) for p in listed.parts)
            )
            if readers.get(path) == {"kernel"}
            else leaf
            for (path, leaf), listed in zip(named, blocks, strict=True)
        ]
        return jax.tree.unflatten(treedef, leaves)

    def _listed(self, leaf: Any, split: NamedSharding | None) -> Any:
        """A leaf with its blocks listed, if a kernel may run that reads them so."""
        if self.implementation != "kernel" and chip_of(leaf, self.mesh).platform == "cpu":
            return leaf
        return leaf.replace(parts=tuple(packed_sparse.listed(p, split) for p in leaf.parts))

    def _splits(self, named: Sequence[tuple[str, Any]]) -> dict[str, NamedSharding]:
        """How the matrix of each compressed leaf is split, where arrays of Auto axes do not say."""
        if self.rules is None:
            return {path: leaf.split for path, leaf in named if _lies_as_noted(leaf)}
        mesh = self.mesh
        inside = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
        if mesh is None or inside:
            mesh = chips.mesh_of(*jax.tree.leaves([leaf for _, leaf in named]))
        if mesh is None or mesh.size == 1 or AxisType.Explicit in mesh.axis_types:
            return {}
        wanted = sharding.matched([path for path, _ in named], self.rules)
        splits = {}
        for path, leaf in named:
            if is_compressed(leaf):
                sharding.leaf_specs(leaf, wanted[path], mesh, path)  # Groups and bytes stay whole.
                split = sharding.leaf_split(leaf, wanted[path], mesh, path)
                spec = PartitionSpec(*split.stack, split.out, split.inputs)
                splits[path] = NamedSharding(mesh, spec)
        return splits


def dispatch(
    apply: Callable,
    implementation: str | None = None,
    *,
    sharding: Any = None,
    mesh: sharding.Mesh | None = None,
) -> Dispatched:
    """Makes a model function run on compressed parameters.

    Args:
      apply: a pure function ``apply(params, *inputs)``.
      implementation: None for the best implementation at each site, or one of ``IMPLEMENTATIONS``
        to force it; forcing one that does not fit raises an error that says why.
      sharding: the rules that ``shard`` took, for a mesh of Auto axes, where a traced function
        cannot see how a weight is split and a kernel must know: each device multiplies what it
        holds, and no weight is gathered. Not needed for what ``prepare`` returned, which notes how
        arrays lie; axes of Explicit type tell by themselves.
      mesh: the mesh of these rules; None for the one in use or the arrays' own.

    Returns:
      A callable with the signature of ``apply`` that takes compressed and dense leaves alike, and
      can be jitted, differentiated and mapped like ``apply``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcomp.formats import Int, quantize
      >>> from jaxcomp.formats import CompressedArray
      >>> part = quantize(Int(8), jnp.ones((4, 8)))
      >>> w = CompressedArray.from_matrix(part, (8, 4), jnp.float32, (), (1,), (0,))
      >>> fast = dispatch(lambda params, x: x @ params["w"])
      >>> fast({"w": w}, jnp.ones((2, 8))).shape
      (2, 4)
    """
    return Dispatched(apply, implementation, sharding, mesh)


def _checked(params: Any) -> Any:
    if hasattr(params, "params") and hasattr(params, "report"):
        raise JaxcompError(
            f"params is a {type(params).__name__}, what compress or load returned; give its .params"
        )
    return params


def arrays_of(named: Sequence[tuple[str, Any]], inputs: tuple, kwargs: dict) -> list:
    """The flat arguments of a traced program: array leaves of params, then of the inputs."""
    arrays, _, _ = flatten_inputs(inputs, kwargs)
    return [leaf for _, leaf in named if hasattr(leaf, "shape")] + arrays


def _uses(program: Program):
    for op in program.ops:
        if op.kind == "site":
            yield op, [(op.site.path, True)]
        elif op.kind == "named":
            yield op, []
        elif op.kind == "bind":
            read = [program.weights[i][0] for i in op.inputs if i in program.weights]
            if read:
                yield op, [(path, False) for path in read]
        for body in op.bodies:
            yield from _uses(body)


class Dispatcher(Plain):
    """The handler that sends sites on compressed weights to implementations."""

    def __init__(
        self, implementation: str | None = None, splits: Mapping[str, NamedSharding] | None = None
    ):
        self.implementation = implementation
        self.splits = splits or {}

    def site(self, op: Op, operands: Sequence[Any], leaf: Any, state: Any) -> tuple[list, Any]:
        """Evaluates a site."""
        if not is_compressed(leaf):
            return super().site(op, operands, leaf, state)
        split = site_split(op.site, leaf, self.splits.get(op.site.path))
        name, _ = choose(op, leaf, self.implementation, split)
        if name == "materialize":
            return super().site(op, with_quantized_input(op, operands, leaf), leaf, state)
        site = op.site
        weight = picked(packed.sliced(leaf) if site.view.fixed else leaf, site)
        if name == "rows":
            return [look_up.looked_up(op, operands[1], weight)], state
        x, out_dtype = operands[1 - site.operand], op.eqn.outvars[0].aval.dtype
        if site.kind == "ragged_dot":
            y = packed_experts.multiply(x, operands[2], weight, split, out_dtype)
            return [_as_traced(y.astype(out_dtype), op)], state
        y = matmul.matmul(to_tokens(op.eqn, site, x), weight, name, split, out_dtype)
        return [from_tokens(op.eqn, site, y)], state

    def dense(self, path, view, leaf):
        """Materializes the weight."""
        return view.replay(as_array(leaf))

    def looped(self, path, leaf):
        """On a TPU loops slice no codes that kernels read."""
        if not is_compressed(leaf):
            return leaf, None
        split = self.splits.get(path)
        if split is not None and split.spec[len(leaf.stack_axes) - len(leaf.stack)] is not None:
            return leaf, None  # Layers lie on several devices.
        if chip_of(leaf, split and split.mesh).platform != "tpu":
            return leaf, None
        return packed.looped(leaf)

    def of_layer(self, sliced, whole, index):
        """The weight with the codes of all layers, and which of them are its own."""
        return packed.of_layer(sliced, whole, index)


def _as_traced(y: jax.Array, op: Op) -> jax.Array:
    """A result split as the equation's was, where a mesh of Explicit axes has it in its type."""
    wanted = op.eqn.outvars[0].aval.sharding
    if AxisType.Explicit not in wanted.mesh.axis_types or jax.typeof(y).sharding == wanted:
        return y
    return jax.reshard(y, wanted)


def _lies_as_noted(leaf: Any) -> bool:
    """Whether a leaf is on the mesh that it was put on, outside of any shard_map."""
    if not is_compressed(leaf) or leaf.split is None:
        return False
    mesh = chips.mesh_of(*jax.tree.leaves(leaf))
    mesh = getattr(mesh, "abstract_mesh", mesh)
    return mesh == leaf.split.mesh and len(leaf.split.spec) == len(leaf.stack) + 2


def site_split(
    site: Site, leaf: formats.CompressedArray, split: NamedSharding | None
) -> NamedSharding | None:
    """How the matrix that a site reads is split: that of its leaf without loops and fixed indices.

    Args:
      site: the site.
      leaf: its weight, sliced by loops or not.
      split: mesh axes of the whole leaf's ``(*stack, out, in)``, or None.

    Returns:
      Mesh axes of the site's ``(*stack, out, in)``, or None.
    """
    if split is None:
        return None
    *stack, outputs, inputs = split.spec
    axes = leaf.stack_axes[len(leaf.stack_axes) - len(stack) :]
    kept = [e for axis, e in zip(axes, stack, strict=True) if axis not in site.loop_axes]
    return NamedSharding(split.mesh, PartitionSpec(*kept, outputs, inputs))


def with_quantized_input(op: Op, operands: Sequence[Any], leaf: formats.CompressedArray) -> list:
    """Operands of a site with the input quantized and dequantized, as its weight's parts ask for.

    For sites that need the whole weight dense (convolutions, ragged products);
    ``check_activation_site`` says which quantizations those can have.
    """
    quantizers = matmul.quantizers(leaf)
    operands = list(operands)
    if not quantizers or not op.site.is_contraction:
        return operands
    check_activation_site(op.site, leaf)
    at = 1 - op.site.operand
    x, quantizer = operands[at], quantizers[0]
    axes = features(op.eqn, op.site)
    operands[at] = fake_quantize_input(
        x, quantizer.spec, axes, quantizer.scale, quantizer.zero_point
    )
    return operands


def check_activation_site(site: Site, leaf: formats.CompressedArray) -> None:
    """Checks that a site can quantize its input as its compressed weight asks for.

    A convolution's or ragged product's input is quantized before the weight is made dense, so one
    quantization must serve all parts, channels and experts.

    Raises:
      JaxcompError: it cannot.
    """
    quantizers = matmul.quantizers(leaf)
    if not quantizers or (site.kind == "dot_general" and not site.transposed):
        return
    around = [w for part in leaf.parts for w in matmul.wrappers(part)[0]]
    spec, scale = quantizers[0].spec, quantizers[0].scale
    problem = None
    if len(around) > 1:
        problem = "a scale of its input channels, or several parts"
    elif spec.granularity == "token" and site.kind == "conv_general_dilated":
        problem = "one scale a token"
    elif scale is not None and scale.ndim:
        problem = "one scale an expert"
    if problem:
        raise JaxcompError(
            f"{site.path} {tuple(leaf.shape)}: the input of a {site.kind} cannot be quantized with "
            f'{problem}; use granularity="tensor" without smoothing, or exclude this path'
        )
