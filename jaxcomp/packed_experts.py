"""Compressed weights of experts as operands of the grouped product, where a ragged_dot reads them.

Each expert's rows meet its own packed weight: in a kernel on TPUs, and by name or where a table of
measurements says so on Hopper GPUs; elsewhere one expert after the other is made dense for its
rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp import formats, matmul, packed, packed_sparse
from jaxcomp.graph import Site
from jaxcomp.graph.sites import roles
from jaxcomp.kernels import chips
from jaxcomp.kernels import quantized_matmul as kernels
from jaxcomp.kernels.meshes import names, padded


def problem(
    eqn: Any,
    site: Site,
    leaf: formats.CompressedArray,
    chip: chips.Chip | None,
    split: NamedSharding | None,
) -> str | None:
    """Why a ragged_dot cannot read the packed weights of its experts, from shapes alone.

    Args:
      eqn: the site's equation.
      site: of kind "ragged_dot".
      leaf: its compressed weight.
      chip: where it runs; None asks only whether there is an operation for the format.
      split: mesh axes of the weight's stack, out and in, where rules say them.

    Returns:
      The reason, or None.
    """
    dtype = eqn.invars[0].aval.dtype
    if dtype not in (jnp.bfloat16, jnp.float32):
        return "the input is neither bfloat16 nor float32"
    if site.transposed or not _in_order(eqn, site):
        return "the axes of the experts' matrices are merged or in another order than the leaf's"
    mesh = None if split is not None or chip is None else chips.mesh_of(*jax.tree.leaves(leaf))
    if mesh is not None and AxisType.Explicit not in mesh.axis_types:
        return (
            "on a mesh of Auto axes it cannot be known how the experts are split; run it on what "
            "dispatch(..).prepare returns, or give dispatch the sharding rules"
        )
    there = None if chip is None or chip.platform == "cpu" else chip
    for part in leaf.parts:
        around, inner = matmul.wrappers(part)
        if isinstance(inner, packed_sparse.PARTS):
            return f"no kernel reads a {type(inner).__name__} of experts"
        held = split
        if mesh is not None:
            held = _typed(inner)
            if held is None:
                return "its arrays do not say how the experts are split over the Explicit axes"
            if any(isinstance(transform, formats.InputScale) for transform in around):
                return "experts on a mesh of Explicit axes have no scales of input channels"
        told = _cannot_quantize(part, held) or packed.problem(
            inner, there, dtype, held, matmul.activation(part)
        )
        if told is not None:
            return told
    return None


def _cannot_quantize(part: Any, split: NamedSharding | None) -> str | None:
    """Why the rows of experts cannot be quantized on their way into the product."""
    found = [w for w in matmul.wrappers(part)[0] if isinstance(w, formats.InputQuant)]
    if not found:
        return None
    if len(found) > 1 or found[0].scale is not None or found[0].spec.granularity != "token":
        return "the experts' input is quantized by other scales than its own of each row"
    if split is not None and split.spec[-1] is not None:
        return "each device has a part of a row, and its largest entry is that of the whole one"
    return None


def _typed(part: Any) -> NamedSharding | None:
    """Mesh axes of a packed part's stack, out and in on a mesh of Explicit axes."""
    found: list[Any] = []

    def read(part):
        weight = packed.operand(part)
        codes = None if isinstance(weight, str) else weight.sliced().codes
        found.append(None if codes is None else jax.typeof(codes).sharding)
        return 0

    jax.eval_shape(read, part)
    sharding = found[0]
    return None if sharding is None or sharding.mesh.empty else sharding


def slower(eqn: Any, leaf: formats.CompressedArray, chip: chips.Chip | None) -> str | None:
    """Why XLA is to multiply experts that a kernel for GPUs reads: no measurement speaks for it.

    Args:
      eqn: the site's equation.
      leaf: its compressed weight, for which ``problem`` is None.
      chip: where it runs.

    Returns:
      The reason, or None.
    """
    if chip is None or chip.platform != "gpu":
        return None
    rows, inner = eqn.invars[0].aval.shape[0], [matmul.wrappers(p)[1] for p in leaf.parts]
    found = [packed.slower(part, chip, rows, kind="experts") for part in inner]
    return next((told for told in found if told is not None), None)


def multiply(
    x: jax.Array,
    group_sizes: jax.Array,
    leaf: formats.CompressedArray,
    split: NamedSharding | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Rows of each expert times its own matrix, for a leaf for which ``problem`` is None.

    Args:
      x: ``(rows, in)``, bfloat16 or float32, sorted by expert.
      group_sizes: integers ``(experts,)``.
      leaf: with matrices ``(experts, out, in)``.
      split: mesh axes of the experts, out and in, on a mesh of Auto axes.
      out_dtype: what the caller rounds to: the kernel for GPUs does so for a weight of one part.

    Returns:
      ``(rows, out)`` in float32 or ``out_dtype``; zeros in the rows of no expert.
    """
    total, leaves = None, jax.tree.leaves(leaf)
    chip, mesh = chips.chip_of(x, *leaves), chips.mesh_of(x, *leaves)
    explicit = split is None and mesh is not None and AxisType.Explicit in mesh.axis_types
    known = split is not None or mesh is None or explicit
    on_gpu = chip is not None and chip.platform == "gpu" and known
    out_dtype = out_dtype if len(leaf.parts) == 1 else jnp.float32
    for part in leaf.parts:
        rows = x
        around, inner = matmul.wrappers(part)
        for transform in around:
            if isinstance(transform, formats.InputQuant):
                continue
            scale = jnp.repeat(transform.scale, group_sizes, axis=0, total_repeat_length=x.shape[0])
            rows = rows * scale.astype(rows.dtype)
        quantized = matmul.activation(part)
        rows = _fitting(rows, _typed(inner)) if explicit else rows
        # It was measured, or asked for: where it fits, nothing else is to run.
        kernel = on_gpu and packed.problem(inner, chip, rows.dtype, split, quantized) is None
        y = kernels.grouped_quantized_matmul(
            rows,
            group_sizes,
            packed.operand(inner),
            activation_dtype=packed.activation_dtype(quantized),
            out_dtype=out_dtype if kernel else jnp.float32,
            implementation="mosaic_gpu" if kernel else None,
            weight_spec=split,
        )
        total = y if total is None else total + y
    return total


def _fitting(x: jax.Array, held: NamedSharding) -> jax.Array:
    """Rows split as the product of weights that lie so takes them: the weights stay."""
    taken = {name for axes in held.spec for name in names(axes)}
    rows, _ = padded(jax.typeof(x).sharding.spec, 2, "x", dict(held.mesh.shape))
    spec = PartitionSpec(None if taken & {*names(rows)} else rows, held.spec[-1])
    return jax.reshard(x, NamedSharding(held.mesh, spec))


def _in_order(eqn: Any, site: Site) -> bool:
    """Whether the equation's operand is the leaf's canonical matrix but for a transposition."""
    _, r = roles(eqn, site.operand, site.view)
    if len(site.batch_axes) != 1 or len(eqn.invars) != 3:
        return False
    for axes in (r.batch, r.rest, r.contracted):
        factors = [f for a in axes for f in site.view.axes[a]]
        if factors != sorted(factors, key=lambda f: (f.axis, -f.stride)):
            return False
    return eqn.params.get("group_offset") is None
