"""Compressed weights of experts as operands of the grouped product, where a ragged_dot reads them.

Each expert's rows meet its own packed weight: in a kernel on TPUs, and by name or where a table of
measurements says so on Hopper GPUs; elsewhere one expert after the other is made dense for its
rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

from jaxcomp import formats, matmul, packed, packed_sparse
from jaxcomp.graph import Site
from jaxcomp.graph.sites import roles
from jaxcomp.kernels import chips
from jaxcomp.kernels import quantized_matmul as kernels


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
    if matmul.quantizers(leaf):
        return "the experts' input is quantized"
    mesh = None if split is not None or chip is None else chips.mesh_of(*jax.tree.leaves(leaf))
    if mesh is not None and AxisType.Explicit in mesh.axis_types:
        return "experts on a mesh of Explicit axes are XLA's"
    if mesh is not None:
        return (
            "on a mesh of Auto axes it cannot be known how the experts are split; give dispatch "
            "the sharding rules"
        )
    there = None if chip is None or chip.platform == "cpu" else chip
    for part in leaf.parts:
        inner = matmul.wrappers(part)[1]
        if isinstance(inner, packed_sparse.PARTS):
            return f"no kernel reads a {type(inner).__name__} of experts"
        told = packed.problem(inner, there, dtype, split)
        if told is not None:
            return told
    return None


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
    chip = chips.chip_of(x, *leaves)
    known = split is not None or chips.mesh_of(x, *leaves) is None
    on_gpu = chip is not None and chip.platform == "gpu" and known
    out_dtype = out_dtype if len(leaf.parts) == 1 else jnp.float32
    for part in leaf.parts:
        rows = x
        around, inner = matmul.wrappers(part)
        for transform in around:
            scale = jnp.repeat(transform.scale, group_sizes, axis=0, total_repeat_length=x.shape[0])
            rows = rows * scale.astype(rows.dtype)
        # It was measured, or asked for: where it fits, nothing else is to run.
        kernel = on_gpu and packed.problem(inner, chip, rows.dtype, split) is None
        y = kernels.grouped_quantized_matmul(
            rows,
            group_sizes,
            packed.operand(inner),
            out_dtype=out_dtype if kernel else jnp.float32,
            implementation="mosaic_gpu" if kernel else None,
            weight_spec=split,
        )
        total = y if total is None else total + y
    return total


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
