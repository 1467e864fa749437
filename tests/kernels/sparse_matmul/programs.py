"""Programs that are compiled for TPUs ahead of time."""

import functools

import jax
import jax.numpy as jnp
from jaxcomp.kernels.sparse_matmul import BlockSparse, NMSparse, block_sparse_matmul, nm_matmul
from jaxcomp.kernels.sparse_matmul.nm import LAYOUT


def _shapes(mesh):
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def shape(*sizes, of):
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(of), sharding=place)

    return shape


def blocks(
    mesh,
    rows=16,
    outputs=4096,
    inputs=4096,
    block=128,
    density=0.1,
    dtype="bfloat16",
    values=None,
    gradient=False,
    chip=None,
    **options,
):
    """The product with a block-sparse weight, or its gradients, and the shapes of its arguments."""
    del chip  # The mesh's.
    shape = _shapes(mesh)
    count = round(-(-outputs // block) * -(-inputs // block) * density)
    weight = BlockSparse(
        shape(count, block, block, of=values or dtype),
        shape(count, of="int32"),
        shape(count, of="int32"),
        shape(count, block, of="float32") if values == "int8" else None,
        (outputs, inputs),
    )
    run = functools.partial(block_sparse_matmul, implementation="mosaic_tpu", **options)
    arguments = [shape(rows, inputs, of=dtype), weight, shape(outputs, of=dtype)]
    if not gradient:
        return run, arguments

    def both(x, weight, bias, dy):
        y, pullback = jax.vjp(run, x, weight, bias)
        dx, dweight, dbias = pullback(dy)
        return y, dx, dweight.values if values is None else dweight.scales, dbias

    return both, [*arguments, shape(rows, outputs, of=dtype)]


def values_gradient(mesh, rows=16, outputs=4096, inputs=4096, chip=None, **options):
    """The gradient to the values of a block-sparse weight, and the shapes of its arguments."""
    run, (x, weight, _) = blocks(mesh, rows, outputs, inputs, chip=chip, **options)

    def gradient(x, weight, dy):
        return jax.vjp(lambda weight: run(x, weight), weight)[1](dy)[0].values

    dy = _shapes(mesh)(rows, outputs, of=x.dtype)
    return gradient, [x, weight, dy]


def nm(
    mesh,
    rows=16,
    outputs=4096,
    inputs=4096,
    dtype="bfloat16",
    group_size=None,
    chip=None,
    **options,
):
    """The product with a prepared 2:4 weight, int4 where it has groups."""
    del chip  # The mesh's.
    shape = _shapes(mesh)
    weight = NMSparse(
        shape(2, outputs, inputs // 4, of="int4" if group_size else dtype),
        shape(outputs, inputs // 4, of="int4"),
        shape(outputs, inputs // group_size, of="float32") if group_size else None,
        2,
        4,
        group_size,
        (outputs, inputs),
        LAYOUT,
    )
    run = functools.partial(nm_matmul, implementation="mosaic_tpu", **options)
    return run, [shape(rows, inputs, of=dtype), weight, shape(outputs, of=dtype)]


def sharded(mesh, split, kind):
    """A product on eight devices: outputs or inputs of the weight over the axis "model"."""
    split = jax.sharding.PartitionSpec(*split)
    rows, outputs, inputs = 64, 4096, 14336

    def shape(sizes, of, *spec):
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(of), sharding=place)

    x = shape((rows, inputs), "bfloat16", "data", split[1])
    if kind == "nm":
        values = shape((2, outputs, inputs // 4), "bfloat16", None, *split)
        positions = shape((outputs, inputs // 4), "int4", *split)
        weight = NMSparse(values, positions, None, 2, 4, None, (outputs, inputs), LAYOUT)
        return functools.partial(nm_matmul, weight_spec=split), [x, weight]
    parts = tuple(mesh.shape["model"] if axis else 1 for axis in split)
    count = outputs // 128 * inputs // 128 // 8  # Blocks, an eighth of all.
    lists = (shape((count,), "int32", "model") for _ in range(2))
    values = shape((count, 128, 128), "bfloat16", "model")
    weight = BlockSparse(values, *lists, None, (outputs, inputs), parts)
    return functools.partial(block_sparse_matmul, weight_spec=split), [x, weight]
