"""``dispatch(apply)``: a model function on compressed parameters, every matmul on its best kernel.

A site whose weight is compressed goes to an implementation:

- "int8": the input's integer codes times the weight's, summed in int32, then scaled;
- "fp8": the same with float8 values;
- "kernel": the weight stays packed in memory and is decoded next to the matrix unit (on TPUs; on
  Hopper GPUs where a table of measurements says so, see ``jaxcomp.kernels.tuning``); of experts
  elsewhere too, one after the other, each for its own rows;
- "parts": the input through each part in turn (a scale, a thin product, some dense columns);
- "rows": of an embedding only the rows that are looked up;
- "materialize": the weight made dense inside the computation, then the equation as it stands.

Which one runs is decided from shapes and formats alone and can be asked for:
``dispatch(apply).report``.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp import formats, matmul, packed, packed_experts, packed_sparse, sharding
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import is_compressed
from jaxcomp.graph import Plain, Site, interpret, trace
from jaxcomp.graph.interpret import as_array, picked
from jaxcomp.graph.program import Op, Program
from jaxcomp.graph.sites import features, from_tokens, to_tokens
from jaxcomp.graph.trace import flatten_inputs, leaf_paths
from jaxcomp.kernels import chips, tuning
from jaxcomp.quantization.ste import fake_quantize_input

IMPLEMENTATIONS = ("int8", "fp8", "kernel", "parts", "rows", "materialize")


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which implementation runs at a use of a compressed weight.

    Attributes:
      path: name of the weight.
      kind: kind of the site, or the operation that reads the weight.
      implementation: one of ``IMPLEMENTATIONS``.
      reason: why that one.
    """

    path: str
    kind: str
    implementation: str
    reason: str


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
        self.apply = apply
        self.implementation = implementation
        self.rules = rules
        self.mesh = mesh
        functools.update_wrapper(self, apply, updated=())

    def __call__(self, params: Any, *inputs: Any, **kwargs: Any) -> Any:
        """Evaluates ``apply(params, *inputs, **kwargs)``; wrap it in ``jax.jit`` to trace once."""
        named, _ = leaf_paths(params)
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
          One choice for each use of a compressed weight, in order of evaluation.
        """
        graph = trace(self.apply, params, *inputs, select=is_compressed, **kwargs)
        splits = self._splits(leaf_paths(params)[0])
        choices = []
        for op, weights in _uses(graph.program):
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
        are not found. Weights that no kernel reads, or that are also read otherwise, stay as they
        are. The result is for running: save ``params``.

        Args:
          params: as for the call.
          *inputs: as for the call; shapes are enough.
          **kwargs: as for the call.

        Returns:
          Parameters to call this with in place of ``params``.
        """
        named, treedef = leaf_paths(params)
        blocks = [self._listed(leaf) for _, leaf in named]
        readers: dict[str, set[str]] = {}
        for choice in self.report(jax.tree.unflatten(treedef, blocks), *inputs, **kwargs):
            readers.setdefault(choice.path, set()).add(choice.implementation)
        leaves = [
            listed.replace(
                parts=tuple(packed.prepared(p, _chip_of(leaf, self.mesh)) for p in listed.parts)
            )
            if readers.get(path) == {"kernel"}
            else leaf
            for (path, leaf), listed in zip(named, blocks, strict=True)
        ]
        return jax.tree.unflatten(treedef, leaves)

    def _listed(self, leaf: Any) -> Any:
        """A leaf with its blocks listed, if a kernel may run that reads them so."""
        if not is_compressed(leaf):
            return leaf
        if self.implementation != "kernel" and _chip_of(leaf, self.mesh).platform != "tpu":
            return leaf
        return leaf.replace(parts=tuple(packed_sparse.listed(p) for p in leaf.parts))

    def _splits(self, named: Sequence[tuple[str, Any]]) -> dict[str, NamedSharding]:
        """How the matrix of each compressed leaf is split, where rules have to say it."""
        if self.rules is None:
            return {}
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
        holds, and no weight is gathered. Axes of Explicit type tell by themselves.
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


def arrays_of(named: Sequence[tuple[str, Any]], inputs: tuple, kwargs: dict) -> list:
    """The flat arguments of a traced program: array leaves of params, then of the inputs."""
    arrays, _, _ = flatten_inputs(inputs, kwargs)
    return [leaf for _, leaf in named if hasattr(leaf, "shape")] + arrays


def _uses(program: Program):
    for op in program.ops:
        if op.kind == "site":
            yield op, [(op.site.path, True)]
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
        weight = picked(leaf, site)
        if name == "rows":
            return [looked_up(op, operands[1], weight)], state
        x = operands[1 - site.operand]
        if site.kind == "ragged_dot":
            y = packed_experts.multiply(x, operands[2], weight, split)
            return [y.astype(op.eqn.outvars[0].aval.dtype)], state
        out_dtype = op.eqn.outvars[0].aval.dtype
        y = matmul.matmul(to_tokens(op.eqn, site, x), weight, name, split, out_dtype)
        return [from_tokens(op.eqn, site, y)], state

    def dense(self, path, view, leaf):
        """Materializes the weight."""
        return view.replay(as_array(leaf))


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


def choose(
    op: Op,
    leaf: formats.CompressedArray,
    forced: str | None = None,
    split: NamedSharding | None = None,
) -> tuple[str, str]:
    """Which implementation runs at a site.

    Args:
      op: the site's operation.
      leaf: its compressed weight, or shapes of one.
      forced: the only implementation that may run, or None.
      split: from ``site_split``, or None.

    Returns:
      Name and reason.

    Raises:
      JaxcompError: the forced one does not fit; the message says why.
    """
    site = op.site
    reasons = dict.fromkeys(IMPLEMENTATIONS, "")
    plain = site.kind == "dot_general" and not site.transposed
    if not plain:
        why = f"a {site.kind} takes a dense weight"
        if site.transposed:
            why = "the contraction runs over the outputs of the compressed matrix"
        for name in ("int8", "fp8", "kernel", "parts"):
            reasons[name] = why
    # Asked for, the operation runs on any chip, with what it has there.
    chip = None if forced == "kernel" else _chip_of(leaf, split and split.mesh)
    if site.kind == "ragged_dot":
        reasons["kernel"] = packed_experts.problem(op.eqn, site, leaf, chip, split) or ""
    if site.kind != "gather":
        reasons["rows"] = f"a {site.kind} reads the whole weight"
    elif not _row_wise(op, leaf):
        reasons["rows"] = "rows of this format or layout cannot be taken apart"
    quantizers = matmul.quantizers(leaf)
    kinds = {q.spec.format for q in quantizers}
    inner = [matmul.wrappers(p)[1] for p in leaf.parts]
    whole_rows = all(
        not matmul.integer(p) or (p.bits == 8 and p.scale.shape[-2] == 1) for p in inner
    )
    if not quantizers:
        reasons["int8"] = (
            reasons["int8"] or "the input is not quantized (no activation in the recipe)"
        )
        reasons["fp8"] = reasons["fp8"] or reasons["int8"]
    if kinds - {"int8", "int4"}:
        reasons["int8"] = reasons["int8"] or f"the input is quantized to {', '.join(sorted(kinds))}"
    if kinds - {"e4m3", "e5m2"}:
        reasons["fp8"] = reasons["fp8"] or f"the input is quantized to {', '.join(sorted(kinds))}"
    if quantizers and not any(matmul.integer(p) for p in inner):
        reasons["int8"] = reasons["int8"] or "no part of the weight holds integers of up to 8 bits"
    if quantizers and not any(matmul.float8(p) for p in inner):
        reasons["fp8"] = reasons["fp8"] or "no part of the weight holds float8 values"
    if plain:
        reasons["kernel"] = _no_kernel(op, leaf, chip, split)
    if forced is not None:
        if reasons[forced]:
            told = "; ".join(f"{n}: {r}" for n, r in reasons.items() if r)
            raise JaxcompError(
                f"{site.path} {tuple(leaf.shape)}: implementation {forced!r} does not fit "
                f"({told}); "
                "leave implementation out to let each site choose"
            )
        if forced == "kernel" and plain:
            return forced, "asked for" + _forced_on_gpu(op, leaf, split)
        return forced, "asked for"
    if plain and not reasons["kernel"] and chip.platform == "gpu":
        return "kernel", f"measured to be faster than XLA on {chip.name}"
    if not reasons["parts"] and reasons["kernel"]:
        floats = _floats_pay(op, leaf, chip, not reasons["int8"], not reasons["fp8"])
        if floats:
            return "parts", floats
    # XLA itself fuses the scales of whole rows of int8; others it multiplies out in memory.
    if not reasons["int8"] and (reasons["kernel"] or whole_rows):
        return "int8", "integer codes of input and weight, summed in int32"
    if not reasons["fp8"] and reasons["kernel"]:
        return "fp8", "float8 values of input and weight"
    if not reasons["kernel"] and chip.platform != "tpu":
        return "kernel", "experts one after the other, each with its own rows only"
    if not reasons["kernel"]:
        return "kernel", f"decoded next to the matrix unit of a {chip.name}"
    if not reasons["rows"]:
        return "rows", "only the rows that are looked up are dequantized"
    split = len(leaf.parts) > 1 or quantizers
    if not reasons["parts"] and split:
        return "parts", "the input goes through each part"
    if site.kind == "gather":
        return "materialize", reasons["rows"]
    if site.kind == "ragged_dot":
        return "materialize", reasons["kernel"]
    return "materialize", reasons["parts"] or f"weight-only, no kernel: {reasons['kernel']}"


def _rows(op: Op, leaf: formats.CompressedArray) -> int:
    """Rows of a site's input, those of all matrices of a stack together."""
    return op.eqn.invars[1 - op.site.operand].aval.size // leaf.parts[0].shape[-1]


def _floats_pay(
    op: Op, leaf: formats.CompressedArray, chip: chips.Chip, int8: bool, fp8: bool
) -> str:
    """Why the values of codes are multiplied and not the codes; empty where the codes are."""
    if chip.platform != "cpu":
        return ""
    if fp8 and not int8:
        return "a CPU multiplies float8 values in float32 anyway"
    if not int8:
        return ""
    part = next(p for p in map(lambda p: matmul.wrappers(p)[1], leaf.parts) if matmul.integer(p))
    shape = (_rows(op, leaf), *part.shape[-2:])
    found = tuning.fastest(
        chip.name, f"int{part.bits}", "int8", shape, part.group_size, ("codes", "floats")
    )
    return f"measured to be faster on this {chip.name} than codes" if found == "floats" else ""


def _chip_of(leaf: formats.CompressedArray, mesh: sharding.Mesh | None = None) -> chips.Chip:
    """The chip that a weight is on, or a CPU where no kernel knows it."""
    arrays = jax.tree.leaves(leaf)
    if mesh is not None:
        placed = NamedSharding(mesh, PartitionSpec())
        arrays.insert(0, jax.ShapeDtypeStruct((), jnp.float32, sharding=placed))
    return chips.chip_of(*arrays) or chips.CPU


def _no_kernel(
    op: Op,
    leaf: formats.CompressedArray,
    chip: chips.Chip | None,
    split: NamedSharding | None,
) -> str:
    """Why no kernel reads the weight packed; empty where one does."""
    dtype = op.eqn.invars[1 - op.site.operand].aval.dtype
    if dtype not in (jnp.bfloat16, jnp.float32):
        return "the input is neither bfloat16 nor float32"
    batched = bool(op.site.batch_axes)
    problems = [
        packed.problem(matmul.wrappers(p)[1], chip, dtype, split, matmul.activation(p), batched)
        for p in leaf.parts
    ]
    if None not in problems:
        return "; ".join(dict.fromkeys(problems))
    if chip is not None:
        parts = [p for p, problem in zip(leaf.parts, problems, strict=True) if problem is None]
        inner = [(matmul.wrappers(p)[1], matmul.activation(p)) for p in parts]
        slower = [packed.slower(p, chip, _rows(op, leaf), a) for p, a in inner]
        if None not in slower:
            return slower[0]
    if split is not None:
        return ""
    mesh = None if chip is None else chips.mesh_of(*jax.tree.leaves(leaf))
    if mesh is not None and AxisType.Explicit not in mesh.axis_types:
        return (
            "on a mesh of Auto axes a kernel cannot know how the weight is split; give dispatch "
            "the sharding rules"
        )
    return ""


def _forced_on_gpu(op: Op, leaf: formats.CompressedArray, split: NamedSharding | None) -> str:
    """What runs on a GPU when a kernel is asked for; empty on other chips."""
    chip = _chip_of(leaf, split and split.mesh)
    if chip.platform != "gpu":
        return ""
    dtype, batched = op.eqn.invars[1 - op.site.operand].aval.dtype, bool(op.site.batch_axes)
    problems = [
        packed.problem(matmul.wrappers(p)[1], chip, dtype, split, matmul.activation(p), batched)
        for p in leaf.parts
    ]
    if None in problems:
        return f": decoded next to the matrix unit of an {chip.name}"
    return f", and XLA runs it: {'; '.join(dict.fromkeys(problems))}"


def _row_wise(op: Op, leaf: formats.CompressedArray) -> bool:
    """Whether a look-up's rows can be taken from the parts: a plain table ``(rows, features)``."""
    site, numbers = op.site, op.eqn.params["dimension_numbers"]
    view = site.view
    plain = view.axes == tuple((f,) for f in _leaf_factors(view)) and len(view.axes) == 2
    last = len(op.eqn.outvars[0].aval.shape) - 1
    return (
        plain
        and numbers.start_index_map == (0,)
        and numbers.offset_dims == (last,)
        and not site.batch_axes
        and not site.transposed
        and all(matmul.rows(part, None) for part in leaf.parts)
    )


def _leaf_factors(view: Any) -> list:
    gone = {f.axis for f in view.loops} | {f.axis for f, _ in view.fixed}
    whole = type(view).of(view.leaf_shape, view.dtype)
    return [a[0] for i, a in enumerate(whole.axes) if i not in gone]


def looked_up(op: Op, indices: jax.Array, weight: formats.CompressedArray) -> jax.Array:
    """The rows that a look-up asks for, dequantized; out of range as the equation's mode says.

    Args:
      op: a gather that ``_row_wise`` accepts.
      indices: ``(.., 1)`` integers.
      weight: table ``(rows, features)``.

    Returns:
      ``(.., features)`` in the dtype of the equation's result.
    """
    params, aval = op.eqn.params, op.eqn.outvars[0].aval
    index = indices[..., 0]
    count = weight.parts[0].shape[-2]
    inside = (index >= 0) & (index < count)
    flat = jnp.clip(index, 0, count - 1).reshape(-1)
    rows = weight.replace(parts=tuple(matmul.rows(part, flat) for part in weight.parts))
    values = rows.matrix().reshape(*index.shape, -1).astype(aval.dtype)
    if params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        fill = params["fill_value"]
        values = jnp.where(inside[..., None], values, jnp.nan if fill is None else fill)
    return values.astype(aval.dtype)


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
