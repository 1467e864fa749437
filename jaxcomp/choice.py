"""Which implementation runs at a use of a compressed weight, and why: from shapes alone."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp import formats, look_up, matmul, packed, packed_experts, sharding
from jaxcomp.errors import JaxcompError
from jaxcomp.graph.program import Op
from jaxcomp.kernels import chips, tuning

IMPLEMENTATIONS = ("int8", "fp8", "kernel", "parts", "rows", "materialize")
_ONE_BY_ONE = "experts one after the other, each with its own rows only"


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which implementation runs at a use of a compressed weight, or at a call of attention.

    Attributes:
      path: name of the weight; of attention that of the operation.
      kind: kind of the site, or the operation that reads the weight.
      implementation: one of ``IMPLEMENTATIONS``; of attention "mosaic_tpu", "mosaic_gpu" or "xla".
      reason: why that one.
    """

    path: str
    kind: str
    implementation: str
    reason: str


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
    chip = None if forced == "kernel" else chip_of(leaf, split and split.mesh)
    if site.kind == "ragged_dot":
        told = packed_experts.problem(op.eqn, site, leaf, chip, split)
        reasons["kernel"] = told or packed_experts.slower(op.eqn, leaf, chip) or ""
    if site.kind != "gather":
        reasons["rows"] = f"a {site.kind} reads the whole weight"
    elif not look_up.row_wise(op, leaf):
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
        if forced == "kernel":
            return forced, "asked for" + _forced(op, leaf, split)
        return forced, "asked for"
    if not reasons["kernel"] and chip.platform == "gpu":
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
        return "kernel", _ONE_BY_ONE
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


def chip_of(leaf: formats.CompressedArray, mesh: sharding.Mesh | None = None) -> chips.Chip:
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
            "on a mesh of Auto axes a kernel cannot know how the weight is split; run it on what "
            "dispatch(..).prepare returns, or give dispatch the sharding rules"
        )
    return ""


def _forced(op: Op, leaf: formats.CompressedArray, split: NamedSharding | None) -> str:
    """What runs on the chip at hand when a kernel is asked for."""
    chip = chip_of(leaf, split and split.mesh)
    dtype, batched = op.eqn.invars[1 - op.site.operand].aval.dtype, bool(op.site.batch_axes)
    if op.site.kind == "ragged_dot":
        problems = [packed_experts.problem(op.eqn, op.site, leaf, chip, split)]
    else:
        problems = [
            packed.problem(matmul.wrappers(p)[1], chip, dtype, split, matmul.activation(p), batched)
            for p in leaf.parts
        ]
    if None in problems and chip.platform == "cpu":
        return f": {_ONE_BY_ONE}"
    if None in problems:
        return f": decoded next to the matrix unit of the {chip.name}"
    return f", and XLA runs it: {'; '.join(dict.fromkeys(problems))}"
