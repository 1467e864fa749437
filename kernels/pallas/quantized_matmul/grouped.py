"""Products with experts' quantized weights: what is public, checked, chosen, differentiated."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxcomp.kernels import arguments, chips, implementations, meshes
from jaxcomp.kernels.quantized_matmul import (
    api,
    gradients,
    grouped_reference,
    reference,
    sharding,
    sharding_grouped,
)
from jaxcomp.kernels.quantized_matmul.weights import Weight


def grouped_quantized_matmul(
    x: jax.Array,
    group_sizes: jax.Array,
    codes: jax.Array | Weight,
    scales: jax.Array | None = None,
    zeros: jax.Array | None = None,
    *,
    format: str | None = None,
    group_size: int | None = None,
    table: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: str | None = None,
    activation_dtype: str | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
    interpret=False,
    weight_spec: PartitionSpec | NamedSharding | None = None,
    x_spec: PartitionSpec | None = None,
) -> jax.Array:
    """``quantized_matmul`` of experts: consecutive runs of rows, each with its expert's weight.

    The kernel visits a tile of rows once for each expert that has rows in it; experts without rows
    are not read. Gradients go to x, scales, zeros, bias and table, through XLA.

    On a mesh each device multiplies the rows of its own experts with its own part of their
    weights; rows are summed over devices, weights never sent. Axes of Explicit type say how arrays
    are split; on Auto axes ``weight_spec`` has to. Without it XLA brings experts to every device.

    Args:
      x: ``(tokens, K)``, bf16 or f32, sorted by expert.
      group_sizes: integers ``(E,)``, rows of each expert; rows after their sum give zeros.
      codes: uint8 ``(E, N, K * bits / 8)``, or what ``prepare`` returned for them.
      scales: ``(E, K / group_size, N)``.
      zeros: like scales, or None.
      format: as in ``quantized_matmul``, like all that follow.
      group_size: inputs that share a scale; None for one group a row.
      table: the ``(16,)`` values of a codebook.
      bias: ``(E, N)`` or None.
      activation: None, "relu", "silu" or "gelu".
      activation_dtype: None, "int8" or "float8_e4m3fn".
      out_dtype: dtype of y; None for x's.
      implementation: "xla", "mosaic_tpu", "mosaic_gpu", or None for the best one. The kernel for
        Hopper GPUs was never run on one: None takes it where a table of measurements says so.
      interpret: of a Pallas kernel: False, or to run it on a CPU ``pltpu.InterpretParams(..)``, or
        ``plgpu.InterpretGPUParams(..)`` for "mosaic_gpu".
      weight_spec: mesh axes of the experts, N and K, on a mesh of Auto axes; a NamedSharding where
        neither an array nor the mesh in use tells the mesh.
      x_spec: how x is; None splits rows over the mesh axes that the weight leaves.

    Returns:
      ``(tokens, N)``.

    Raises:
      TypeError: a dtype is wrong.
      ValueError: shapes do not belong together.
      Unsupported: no implementation takes these operands; all reasons are told.

    Example:
      >>> import jax.numpy as jnp
      >>> codes = jnp.array([[[0x01]], [[0x02]]], jnp.uint8)  # two experts, (1, 0) and (2, 0)
      >>> sizes = jnp.array([1, 2])
      >>> grouped_quantized_matmul(jnp.ones((3, 2)), sizes, codes, jnp.ones((2, 1, 1))).tolist()
      [[1.0], [2.0], [2.0]]

    Source:
      Gale et al., MegaBlocks, arXiv 2211.15841 (dropless experts as one grouped product).
    """
    weight = api.weight_of(codes, scales, zeros, table, format, group_size)
    options = api.options_of(x, weight, bias, activation, activation_dtype, out_dtype)
    _check(x, group_sizes, weight)
    run = functools.partial(_run, implementation=implementation, interpret=interpret)
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    bounds = jnp.minimum(jnp.pad(ends, (1, 0)), x.shape[0])
    x, bounds, weight, bias = meshes.vary_alike(x, bounds, weight, bias)
    whole = options

    def finish(y, bounds, bias):
        owner = grouped_reference.owner(bounds, y.shape[0])
        if bias is not None:
            y = y + jnp.pad(bias.astype(jnp.float32), ((0, 1), (0, 0)))[owner]
        y = reference.finish(y, None, whole)
        return jnp.where((owner < bounds.shape[0] - 1)[:, None], y, jnp.zeros((), y.dtype))

    if not (x.size and math.prod((*weight.stack, *weight.shape))):  # Nothing is multiplied.
        sums = jnp.zeros((x.shape[0], weight.shape[0]), jnp.float32)
        return finish(meshes.varied(sums, x), bounds, bias)
    place = sharding.placement(x, weight, weight_spec, x_spec, by_expert=True)
    if place is None:
        return _differentiable(run, options, x, bounds, weight, bias)
    if place.inputs:  # What is fused needs the sum over devices.
        options = dataclasses.replace(options, activation=None, out_dtype="float32")
    call = functools.partial(_differentiable, run, options)
    return sharding_grouped.matmul(call, finish, x, bounds, weight, bias, place)


def _check(x: jax.Array, group_sizes: jax.Array, weight: Weight) -> None:
    arguments.array("group_sizes", group_sizes)
    if len(weight.stack) != 1 or group_sizes.shape != weight.stack:
        raise ValueError(
            f"group_sizes {group_sizes.shape} must be (E,) for the experts of the weight, whose "
            f"scales {weight.scales.shape} must be (E, K / group_size, N)"
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"group_sizes {group_sizes.shape} are {group_sizes.dtype}; use integers")
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x {x.shape} must be (tokens, K) for weights (N, K) = {weight.shape}; flatten its "
            "leading axes and sort the rows by expert"
        )


def _run(options, x, bounds, weight, bias, *, implementation, interpret) -> jax.Array:
    """The product by the implementation that fits best."""
    chip = chips.chip_of(x)
    if implementation is None and not interpret and (chip is None or chip.platform == "cpu"):
        return grouped_reference.matmul(x, bounds, api.restored(weight), bias, options)
    from jaxcomp.kernels.quantized_matmul import gpu, gpu_grouped, tpu, tpu_grouped

    if interpret and implementation != "mosaic_gpu" and (chip is None or chip.platform != "tpu"):
        chip = chips.V5E
    several = None
    if chips.mesh_of(x, weight.codes) is not None:
        several = "the mesh has several devices and Auto axes, and no weight_spec is given"
    on_tpu = tpu.unfit(weight, chip, options, x.dtype)
    if weight.layout == gpu.LAYOUT:
        on_tpu = "the weight was prepared for GPUs"
    on_gpu = gpu.reason(x, weight, options, None if interpret else chip)
    if implementation is None:
        on_gpu = on_gpu or gpu.slower(x.shape[0], weight, options, chip, "experts")
    chosen = implementations.choose(
        f"grouped_quantized_matmul of x {x.shape} {x.dtype} and {weight.stack[0]} experts' "
        f"{weight.format} {weight.shape} in groups of {weight.group_size}",
        {"mosaic_tpu": several or on_tpu, "mosaic_gpu": several or on_gpu, "xla": None},
        implementation,
    )

    def product(x, bounds, weight, bias):
        if chosen == "xla":
            return grouped_reference.matmul(x, bounds, api.restored(weight), bias, options)
        if chosen == "mosaic_gpu":
            return gpu_grouped.matmul(x, bounds, weight.sliced(), bias, options, interpret)
        return tpu_grouped.matmul(x, bounds, weight, bias, options, chip, interpret)

    instead = "multiply each expert's rows by quantized_matmul"
    once = implementations.first_order("grouped_quantized_matmul", chosen, product, instead)
    return once(x, bounds, weight, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(run, options, x, bounds, weight, bias):
    return run(options, x, bounds, weight, bias)


def _forward(run, options, x, bounds, weight, bias):
    y, z = gradients.activated(lambda o: run(o, x, bounds, weight, bias), options)
    return y, (x, bounds, weight, bias, z)


def _backward(run, options, saved, dy):
    x, bounds, weight, bias, z = saved
    dz = gradients.before_activation(options, z, dy)
    stored = api.restored(weight)
    dx = grouped_reference.input_gradient(x, bounds, stored, dz)
    rows, _ = reference.multiplied(x, options)
    dparts = grouped_reference.weight_gradients(rows, bounds, stored, dz)
    dweight = gradients.of_weight(weight, *dparts)
    dbias = None
    if bias is not None:
        dbias = grouped_reference.bias_gradient(bounds, dz).astype(bias.dtype)
    return dx, np.zeros(bounds.shape, jax.dtypes.float0), dweight, dbias


_differentiable.defvjp(_forward, _backward)
