"""Sparse weights as operands of the kernels that read them so: 2:4 values, and listed blocks.

On TPUs the kernels run where they fit; on Hopper GPUs, where none was run so far, by name or where
a table of measurements says that they are faster.

An ``NMPart`` has the kernel's layout already. Kept values under a bit mask (``SparsePart``) have to
be listed block by block, which needs the mask itself: ``dispatch(..).prepare`` does it once.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp import formats
from jaxcomp.formats import base
from jaxcomp.kernels import chips, tuning
from jaxcomp.kernels.chips import Chip

# Sides of the blocks that are looked for, and the share of blocks from which on a dense product
# costs no more.
_SIDES = (512, 256, 128)
_DENSEST = 0.75


@base.part
class PreparedNM(base.Part):
    """A 2:4 part as the kernel of a chip reads it, for running and not for storing.

    Attributes:
      values: ``(*stack, 2, out, in / 4)``, the first and the second of each four inputs.
      positions: int4 ``(*stack, out, in / 4)``.
      scales: float32 ``(*stack, out, groups)`` of int4 values, or None.
      layers: ``Layers`` of the kernels: within a loop, values and positions of all layers.
    """

    values: jax.Array
    positions: jax.Array
    scales: jax.Array | None = None
    layers: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*stack, out, in)``."""
        *lead, quarter = self.positions.shape
        return (*lead, 4 * quarter)

    def materialize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The dense matrix ``(*stack, out, in)`` in ``dtype``."""
        from jaxcomp.kernels.sparse_matmul import nm

        return _stacked(nm.dense, len(self.stack))(operand(self)).astype(dtype)


@base.part
class BlockPart(base.Part):
    """A part that is zero outside of some blocks, for running and not for storing.

    Matrices of a stack, and parts of a matrix for devices of a mesh, list as many blocks each:
    those with fewer list blocks of zeros as well. Parts follow one another in the list, those of
    the same outputs together, so that devices hold their own blocks and no others.

    Attributes:
      values: bfloat16 or float32 ``(*stack, blocks, side, side)``.
      rows: int32 ``(*stack, blocks)``, which block of outputs each is, ascending in a part.
      columns: int32 ``(*stack, blocks)``, which block of inputs.
      out: outputs of a matrix.
      size: inputs of a matrix.
      layers: ``Layers`` of the kernels: within a loop, values of all layers.
      parts: of the outputs and of the inputs, for as many devices.
    """

    values: jax.Array
    rows: jax.Array
    columns: jax.Array
    layers: Any = None
    out: int = base.static(default=0)
    size: int = base.static(default=0)
    parts: tuple[int, int] = base.static(default=(1, 1))

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*stack, out, in)``."""
        return (*self.rows.shape[:-1], self.out, self.size)

    def materialize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The dense matrix ``(*stack, out, in)`` in ``dtype``."""
        side = self.values.shape[-1]
        grid = -(-self.out // side), -(-self.size // side)

        def one(values, rows, columns):
            tiles = jnp.zeros((*grid, side, side), dtype).at[rows, columns].set(values)
            return jnp.swapaxes(tiles, 1, 2).reshape(grid[0] * side, grid[1] * side)

        whole = _stacked(one, len(self.stack))(self.values.astype(dtype), self.rows, self.columns)
        return whole[..., : self.out, : self.size]


PARTS = (formats.NMPart, formats.SparsePart, PreparedNM, BlockPart)


def operand(part: Any) -> Any:
    """A sparse part as the kernels take it, but for its stack axes.

    Args:
      part: one of ``PARTS``, without input transforms.

    Returns:
      ``NMSparse`` or ``BlockSparse`` made of the part's own arrays, which keep their stack axes; or
      a string: why there is no kernel for it.
    """
    if isinstance(part, formats.SparsePart):
        return (
            "its values are kept by a bit mask; dispatch(..).prepare lists them by blocks where "
            f"blocks of {_SIDES[-1]} are empty and none lies on two devices"
        )
    from jaxcomp.kernels.sparse_matmul import BlockSparse, nm

    shape = part.shape[-2:]
    if isinstance(part, BlockPart):
        lists = part.values, part.rows, part.columns
        return BlockSparse(*lists, None, shape, part.parts, part.layers)
    if isinstance(part, PreparedNM):
        group = None if part.scales is None else shape[1] // part.scales.shape[-1]
        arrays = part.values, part.positions, part.scales
        return nm.NMSparse(*arrays, 2, 4, group, shape, nm.LAYOUT, part.layers)
    values, kept = part.values, f"no kernel reads {part.n}:{part.m} values"
    if isinstance(values, formats.Dense):
        if values.values.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{kept} in {values.values.dtype}"
        return nm.NMSparse(values.values, part.indices, None, part.n, part.m, None, shape)
    if not isinstance(values, formats.Affine) or values.bits != 4:
        return f"{kept} that are neither plain nor int4"
    if values.zero_point is not None:
        return f"{kept} with zero points"
    if values.scale.shape[-1] != shape[0] or values.padding:
        return f"{kept} in groups of several outputs or of a broken byte"
    scale = values.scale
    if scale.dtype not in (jnp.bfloat16, jnp.float32):
        scale = scale.astype(jnp.float32)
    group = shape[1] // scale.shape[-2]
    return nm.NMSparse(values.values, part.indices, scale, part.n, part.m, group, shape)


def problem(
    part: Any,
    chip: Chip | None,
    dtype: Any = jnp.bfloat16,
    split: NamedSharding | None = None,
    batched: bool = False,
) -> str | None:
    """Why no kernel reads a sparse part, from shapes alone.

    Args:
      part: one of ``PARTS``, arrays or shapes of them.
      chip: whose kernel; None asks only whether there is an operation for the format.
      dtype: of the input.
      split: mesh axes of stack, out and in: each device's share has to suit the kernel.
      batched: whether one product takes several matrices of the part.

    Returns:
      The reason, or None.
    """
    found: list[Any] = []
    jax.eval_shape(lambda part: found.append(operand(part)), part)
    (weight,) = found
    if isinstance(weight, str):
        return weight
    mesh = split.mesh if split is not None else chips.mesh_of(*jax.tree.leaves(part))
    alone = mesh is None or mesh.size == 1
    if batched and not alone and split is None:
        return "on a mesh it has to be known how a stack of weights is split; give the rules"
    if isinstance(part, BlockPart) and not alone and not _divided(part, split):
        return (
            f"its list of blocks has {part.parts} parts of outputs and inputs, and the mesh "
            "others; shard the weight before dispatch(..).prepare lists its blocks"
        )
    if chip is None:
        return None
    if chip.platform == "cpu":
        return f"the chip is {chip.name}, not a TPU or GPU"
    if chip.platform == "gpu" and batched:
        return "the kernels for GPUs take one matrix at a time"
    if chip.platform == "gpu" and not alone and split is None:
        return "on a mesh of GPUs it has to be known how the weight is split; give the rules"
    # Pallas takes a while to import.
    from jaxcomp.kernels.sparse_matmul import gpu, gpu_nm, tpu, tpu_nm

    if isinstance(part, BlockPart):
        first = jax.ShapeDtypeStruct(part.values.shape[len(part.stack) :], part.values.dtype)
        kernel = tpu if chip.platform == "tpu" else gpu
        return kernel.unfit(dtype, dataclasses.replace(weight, values=first), chip)
    if split is not None:
        outputs, inputs = (_count(e, split) for e in split.spec[-2:])
        n, k = weight.shape
        one = weight.group_size == k
        weight = dataclasses.replace(
            weight,
            shape=(n // outputs, k // inputs),
            group_size=k // inputs if one else weight.group_size,
        )
    if chip.platform == "gpu":
        return gpu_nm.unfit(dtype, weight, chip)
    return tpu_nm.unfit(weight, chip, dtype)


def slower(part: Any, chip: Chip, rows: int) -> str | None:
    """Why XLA is to multiply a sparse part that a kernel for GPUs reads.

    Args:
      part: one of ``PARTS``, arrays or shapes of them, that has a kernel on the chip.
      chip: whose kernel; only on a GPU a measurement has to speak for it.
      rows: of the input.

    Returns:
      The reason, or None.
    """
    if chip.platform != "gpu":
        return None
    found: list[Any] = []
    jax.eval_shape(lambda part: found.append(operand(part)), part)
    (weight,) = found
    if isinstance(weight, str):
        return None
    shape, density, group_size = (rows, *weight.shape), 1.0, weight.shape[1]
    if isinstance(part, BlockPart):
        format = "blocks"
        density = part.rows.shape[-1] * part.values.shape[-1] ** 2 / (part.out * part.size)
    else:
        coded = weight.scales is not None
        format = "2:4 int4" if coded else "2:4"
        group_size = weight.group_size if coded else group_size
    return tuning.unproven(
        chip.name, format, None, shape, group_size, ("kernel", "xla"), "sparse", density
    )


def prepared(part: Any, chip: Chip) -> Any:
    """A 2:4 part in the layout of a chip's kernel, or a part as it is where there is none."""
    if not isinstance(part, formats.NMPart) or problem(part, chip) is not None:
        return part
    from jaxcomp.kernels.sparse_matmul import nm

    ready = _stacked(nm.prepare, len(part.stack))(operand(part))
    return PreparedNM(ready.values, ready.positions, ready.scales)


def read_by_kernels(part: Any) -> tuple[jax.Array, ...]:
    """The arrays of a part that a kernel reads where they lie, of a loop over nothing but layers.

    Args:
      part: with an axis of layers in front.

    Returns:
      The arrays; none of a part that no kernel reads so.
    """
    if not isinstance(part, (PreparedNM, BlockPart)) or len(part.stack) != 1:
        return ()
    return operand(part).read


def of_layer(part: Any, arrays: tuple[jax.Array, ...], index: jax.Array) -> Any:
    """A part of one layer with what ``read_by_kernels`` gave of all."""
    from jaxcomp.kernels.sparse_matmul.layers import Layers

    return part.replace(layers=Layers(arrays, index))


def sliced(part: Any) -> Any:
    """A part without the arrays of other layers."""
    return part.replace(layers=None) if isinstance(part, (PreparedNM, BlockPart)) else part


def listed(part: Any, split: NamedSharding | None = None) -> Any:
    """Lists the blocks of a part under a bit mask, where enough of them are empty.

    Runs on the host. Blocks are as large as they can be without storing more. Of a weight that is
    split over a mesh each device gets the list of its own blocks.

    Args:
      part: ``SparsePart`` of arrays, also inside of input scales; others are left alone.
      split: mesh axes of ``(*stack, out, in)``, or None.

    Returns:
      A ``BlockPart`` of the same matrix, or the part as it is.
    """
    if isinstance(part, formats.InputScale):
        return part.replace(part=listed(part.part, split))
    if not isinstance(part, formats.SparsePart) or part.element is not None:
        return part
    if part.values.dtype not in (jnp.bfloat16, jnp.float32):
        return part
    if not all(map(_at_hand, (part.mask, part.values))):
        return part
    mask = np.asarray(part.kept_mask())
    *stack, out, size = mask.shape
    mask = mask.reshape(-1, out, size)
    parts = (1, 1) if split is None else tuple(_count(e, split) for e in split.spec[-2:])
    best = None
    for side in reversed(_SIDES):
        if parts != (1, 1) and (out % (parts[0] * side) or size % (parts[1] * side)):
            continue  # A block would lie on two devices.
        used = _tiles(mask, side).any((-1, -2))
        each = _by_parts(used, parts)
        blocks = max(int(each.sum(-1).max()), 1)
        stored = blocks * parts[0] * parts[1] * side**2
        if best is None or stored <= best[0]:
            best = stored, side, used.shape[1:], each, blocks
    if best is None or best[0] > _DENSEST * out * size:
        return part
    _, side, grid, each, blocks = best
    # The blocks with values first, then as many empty ones as the fullest part has more.
    order = np.argsort(~each, axis=-1, kind="stable")[..., :blocks]
    row, column = np.divmod(np.sort(order, axis=-1), grid[1] // parts[1])
    first = np.divmod(np.arange(each.shape[1])[:, None], parts[1])
    rows = (first[0] * (grid[0] // parts[0]) + row).reshape(len(mask), -1)
    columns = (first[1] * (grid[1] // parts[1]) + column).reshape(len(mask), -1)
    dense = np.asarray(part.materialize(part.values.dtype)).reshape(mask.shape)
    values = np.stack([_tiles(w, side)[r, c] for w, r, c in zip(dense, rows, columns, strict=True)])
    return BlockPart(
        *(
            _placed(array.reshape(*stack, *array.shape[1:]), part.mask, split)
            for array in (values, rows.astype(np.int32), columns.astype(np.int32))
        ),
        out=out,
        size=size,
        parts=parts,
    )


def _at_hand(array: Any) -> bool:
    """Whether numbers can be looked at: no shapes, and nothing that other processes hold."""
    if isinstance(array, jax.Array):
        return not isinstance(array, jax.core.Tracer) and array.is_fully_addressable
    return isinstance(array, np.ndarray)


def _by_parts(used: np.ndarray, parts: tuple[int, int]) -> np.ndarray:
    """A grid ``(matrices, rows, columns)`` by parts, ``(matrices, parts, cells of a part)``."""
    count, rows, columns = used.shape
    split = used.reshape(count, parts[0], rows // parts[0], parts[1], columns // parts[1])
    return split.swapaxes(2, 3).reshape(count, parts[0] * parts[1], -1)


def _placed(array: np.ndarray, beside: jax.Array, split: NamedSharding | None) -> jax.Array:
    """A list ``(*stack, blocks, ..)`` on the devices whose part of the matrix it lists."""
    lies = getattr(beside, "sharding", None)
    if split is None or not isinstance(lies, NamedSharding):
        return jnp.asarray(array)
    return jax.device_put(array, NamedSharding(lies.mesh, list_spec(split.spec)))


def list_spec(spec: PartitionSpec) -> PartitionSpec:
    """How lists of blocks are split, from mesh axes of ``(*stack, out, in)``."""
    *stack, outputs, inputs = spec
    return PartitionSpec(*stack, (*_names(outputs), *_names(inputs)) or None)


def matmul(
    x: jax.Array,
    part: Any,
    split: NamedSharding | None = None,
    implementation: str | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Product of an input with a sparse part that ``operand`` accepts, by its kernel.

    Args:
      x: ``(*stack, tokens, in)``, bfloat16 or float32.
      part: of a weight ``(*stack, out, in)``, without input transforms.
      split: mesh axes of stack, out and in, on a mesh of Auto axes.
      implementation: of the kernels' operations; None for the best one.
      out_dtype: of the result.

    Returns:
      ``(*stack, tokens, out)``.
    """
    from jaxcomp.kernels import sparse_matmul as kernels

    call = kernels.block_sparse_matmul if isinstance(part, BlockPart) else kernels.nm_matmul
    options = {"out_dtype": out_dtype, "implementation": implementation}
    stack: tuple = (None,) * len(part.stack)
    if split is not None:
        *stack, outputs, inputs = split.spec
        options["weight_spec"] = NamedSharding(split.mesh, PartitionSpec(outputs, inputs))
        taken = {name for entry in split.spec for name in _names(entry)}
        free = tuple(name for name in split.mesh.axis_names if name not in taken)
        rows = free if free and x.shape[-2] % _count(free, split) == 0 else None
        options["x_spec"] = PartitionSpec(rows, inputs)

    # Several matrices, each device with those that it holds.
    run = functools.partial(call, **options)
    for axes in reversed(stack):
        run = jax.vmap(run, spmd_axis_name=axes) if axes else jax.vmap(run)
    return run(x, operand(part))


def _tiles(array: np.ndarray, side: int) -> np.ndarray:
    """``(.., out, in)`` as blocks ``(.., rows, columns, side, side)``, with zeros at the edges."""
    pad = [(0, 0)] * (array.ndim - 2) + [(0, -n % side) for n in array.shape[-2:]]
    whole = np.pad(array, pad)
    *lead, out, size = whole.shape
    return whole.reshape(*lead, out // side, side, size // side, side).swapaxes(-2, -3)


def _stacked(function: Any, depth: int) -> Any:
    """A function of one matrix for matrices with leading stack axes."""
    for _ in range(depth):
        function = jax.vmap(function)
    return function


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _count(entry: Any, split: NamedSharding) -> int:
    return int(np.prod([split.mesh.shape[name] for name in _names(entry)]))


def _divided(part: BlockPart, split: NamedSharding | None) -> bool:
    """Whether the mesh has as many parts as the list, or every device all of it."""
    if split is not None:
        return tuple(_count(entry, split) for entry in split.spec[-2:]) in (part.parts, (1, 1))
    sharding = jax.typeof(part.values).sharding if hasattr(part.values, "aval") else None
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return True  # On Auto axes there is nothing to see, and dispatch asks for the rules.
    *stack, blocks = (*sharding.spec, *(None,) * part.values.ndim)[: part.rows.ndim]
    number = int(np.prod([sharding.mesh.shape[name] for name in _names(blocks)]))
    return not any(stack) and number in (part.parts[0] * part.parts[1], 1)
