"""Products to compile ahead of time, for tests and for the table of scheduled cycles."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec
from jaxcomp.kernels import chips
from jaxcomp.kernels.quantized_matmul import layout, reference, tpu, tpu_grouped, tpu_tiles, weights


def quantized(
    mesh,
    chip: str,
    m: int,
    n: int,
    k: int,
    format: str = "int4",
    group_size: int = 128,
    zeros: bool = False,
    scale_dtype: str = "bfloat16",
    x_dtype: str = "bfloat16",
    activation_dtype: str | None = None,
):
    """The TPU kernel on one device, with a prepared weight.

    ``activation_dtype`` "native" is the one of eight bits that the chip multiplies, and so is
    ``format``.
    """
    struct = functools.partial(whole, mesh)
    if format == "native":
        format = "int8" if eight_bits(chip, "native") == "int8" else "fp8"
    weight = prepared(mesh, (), n, k, format, group_size, zeros, scale_dtype)
    options = reference.Options(None, eight_bits(chip, activation_dtype), x_dtype)
    run = functools.partial(tpu.matmul, bias=None, options=options, chip=chips.BY_NAME[chip])
    return run, (struct((m, k), x_dtype), weight)


def grouped(
    mesh,
    chip: str,
    m: int,
    n: int,
    k: int,
    experts: int = 8,
    format: str = "int4",
    group_size: int = 128,
    zeros: bool = False,
    scale_dtype: str = "bfloat16",
    x_dtype: str = "bfloat16",
    activation_dtype: str | None = None,
    tile: tuple[int, int, int, int] | None = None,
):
    """The TPU kernel of experts on one device, with prepared weights; ``m`` rows of all experts.

    ``activation_dtype`` is as in ``quantized``.
    """
    struct = functools.partial(whole, mesh)
    weight = prepared(mesh, (experts,), n, k, format, group_size, zeros, scale_dtype)
    options = reference.Options(None, eight_bits(chip, activation_dtype), x_dtype)
    run = functools.partial(
        tpu_grouped.matmul,
        bias=None,
        options=options,
        chip=chips.BY_NAME[chip],
        tile=tile and tpu_tiles.Tile(*tile),
    )
    return run, (struct((m, k), x_dtype), struct((experts + 1,), "int32"), weight)


def eight_bits(chip: str, dtype: str | None) -> str | None:
    """A dtype of rows, or for "native" the one that a chip multiplies."""
    if dtype != "native":
        return dtype
    return "int8" if chips.BY_NAME[chip].multiplies("int8") else "float8_e4m3fn"


def whole(mesh, shape, dtype) -> jax.ShapeDtypeStruct:
    """The shape of an array that every device holds."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)


def prepared(mesh, stack, n, k, format, group_size, zeros, scale_dtype) -> weights.Weight:
    """Shapes of a weight in the layout of TPUs."""
    struct = functools.partial(whole, mesh)
    stored = (*stack, n, k * weights.FORMATS[format].bits // 8)
    scales = struct((*stack, k // group_size, n), scale_dtype)
    table = struct((16,), "float32") if format == "codebook" else None
    weight = weights.Weight(
        struct(stored, "uint8"),
        scales,
        scales if zeros else None,
        table,
        format,
        group_size,
        (n, k),
    )
    shapes = jax.eval_shape(layout.prepare, weight)
    return jax.tree.map(lambda a: struct(a.shape, a.dtype), shapes)


def bf16(mesh, chip: str, m: int, n: int, k: int, experts: int | None = None):
    """A bf16 product in the tiling of the kernel of many rows, to hold that one against.

    Of experts it has one's weight only: what a step does is the same.
    """
    columns = chips.BY_NAME[chip].mxu
    tile = tpu_tiles.dense(chip, m, n, k, columns)
    if experts is not None:
        tile = tpu_tiles.grouped_dense(chip, m, experts, n, k, columns)

    def kernel(x_ref, w_ref, y_ref):
        def one(i, _):
            block = pl.ds(pl.multiple_of(i * tile.columns, tile.columns), tile.columns)
            product = jax.lax.dot_general(
                x_ref[...],
                w_ref[block, :],
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            y_ref[:, block] = product.astype(jnp.bfloat16)

        jax.lax.fori_loop(0, tile.n // tile.columns, one, None)

    run = pl.pallas_call(
        kernel,
        grid=(-(-n // tile.n), -(-m // tile.m)),
        in_specs=[
            pl.BlockSpec((tile.m, k), lambda j, i: (i, 0)),
            pl.BlockSpec((tile.n, k), lambda j, i: (j, 0)),
        ],
        out_specs=pl.BlockSpec((tile.m, tile.n), lambda j, i: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=56 << 20),
        name="bf16_matmul",
    )
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = (m, k), (n, k)
    return run, tuple(jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding) for s in shapes)
