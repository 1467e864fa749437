"""Products with quantized weights: what is public, checked, chosen and differentiated.

The kernels are imported where one may run: Pallas alone takes longer than the rest of the package.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxcomp.kernels import arguments, chips, implementations, meshes
from jaxcomp.kernels.quantized_matmul import gradients, layout, reference, sharding, weights
from jaxcomp.kernels.quantized_matmul.reference import ACTIVATIONS, Options
from jaxcomp.kernels.quantized_matmul.weights import Weight


def quantized_matmul(
    x: jax.Array,
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
    x_scales: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
    interpret=False,
    weight_spec: PartitionSpec | NamedSharding | None = None,
    x_spec: PartitionSpec | None = None,
) -> jax.Array:
    """Y = activation(x Wᵀ + bias) with W[n, k] = scale * (value(code) - zero).

    With ``activation_dtype`` rows of x are first quantized, by ``x_scales`` or their largest entry,
    and the product is exact in that arithmetic: y = (xq · wq) * row scale * weight scale. (Of many
    bf16 rows a TPU that scales sums of groups no faster than it multiplies bf16 rounds weights to
    bf16, as it does without quantization; rows of f32 are exact everywhere.) Gradients
    go to x (straight through that quantization, but not where ``x_scales`` clip), scales, zeros,
    bias and table.

    On a mesh of several devices each multiplies its own part of the weight (and quantizes its own
    part of a row, where K is split and no ``x_scales`` are given by that part's largest entry):
    sums are exchanged where K is split, weights never. Axes of Explicit type say how arrays are
    split; on Auto axes ``weight_spec`` has to. Without it XLA does the product as it sees fit: of
    quantized rows it brings a weight whose K is split to every device.

    Args:
      x: ``(*stack, .., K)``, bf16 or f32.
      codes: uint8 ``(*stack, N, K * bits / 8)``, or what ``prepare`` returned, which brings scales,
        zeros, format, group_size and table with it.
      scales: bf16 or f32 ``(*stack, K / group_size, N)``.
      zeros: zero points like scales, or None for zeros.
      format: "int8", "int4", "int2" (two's complement), "fp8" (e4m3) or "codebook" (16 values);
        None for int4, or for what a prepared weight has.
      group_size: inputs that share a scale; None for one group a row.
      table: the ``(16,)`` values of a codebook; None for NF4's.
      bias: ``(*stack, N)`` or None.
      activation: None, "relu", "silu" or "gelu" (by tanh).
      activation_dtype: None, "int8" (integer codes) or "float8_e4m3fn" (int4, int2 and fp8 codes).
      x_scales: f32, a number or a list of them, broadcasts against ``(*stack, .., 1)``: what rows
        are divided by before they are rounded, static scales for instance; None for each row's
        largest entry.
      out_dtype: dtype of y; None for x's.
      implementation: "xla", "mosaic_tpu", "mosaic_gpu", or None for the best one. The kernel for
        Hopper GPUs was never run on one: None takes it where a table of measurements says so.
      interpret: of a Pallas kernel: False, or ``pltpu.InterpretParams(..)`` to run it on a CPU.
      weight_spec: mesh axes of the weight's stack axes, N and K, on a mesh of Auto axes; a
        NamedSharding where neither an array nor the mesh in use tells the mesh.
      x_spec: how x is; None splits rows over the mesh axes that the weight leaves.

    Returns:
      ``(*stack, .., N)``.

    Raises:
      TypeError: a dtype is wrong.
      ValueError: shapes, format, group size, the arrays or layout of a prepared weight, or how
        arrays are split, are wrong.
      Unsupported: no implementation takes these operands; all reasons are told.

    Example:
      >>> import jax.numpy as jnp
      >>> codes = jnp.array([[0x21, 0x43]], jnp.uint8)  # 1, 2, 3, 4
      >>> quantized_matmul(jnp.ones((1, 4)), codes, jnp.full((1, 1), 0.5)).tolist()
      [[5.0]]

    Source:
      Frantar et al., Marlin, arXiv 2408.11743 (the product that this one is for TPUs); Dettmers et
      al., QLoRA, arXiv 2305.14314 (NF4).
    """
    weight = weight_of(codes, scales, zeros, table, format, group_size)
    options = options_of(x, weight, bias, activation, activation_dtype, out_dtype)
    _check_rows(x, weight)
    run = functools.partial(_run, implementation=implementation, interpret=interpret)
    x_scales = _row_scales(x, x_scales, options)
    x, weight, bias, x_scales = meshes.vary_alike(x, weight, bias, x_scales)
    whole = options

    def finish(y, bias):
        if bias is not None:
            ones = (1,) * (y.ndim - bias.ndim)
            bias = bias.reshape(*bias.shape[:-1], *ones, bias.shape[-1])
        return reference.finish(y, bias, whole)

    if not x.size or 0 in weight.shape:  # Nothing is multiplied: sums of nothing.
        sums = jnp.zeros((*x.shape[:-1], weight.shape[0]), jnp.float32)
        return finish(meshes.varied(sums, x), bias)
    place = sharding.placement(x, weight, weight_spec, x_spec)
    if place is None:
        return _stacked(run, options, x, weight, bias, x_scales)
    if place.inputs:  # What is fused needs the sum over devices.
        options = dataclasses.replace(options, activation=None, out_dtype="float32")
    call = functools.partial(_stacked, run, options)
    return sharding.matmul(call, finish, x, weight, bias, x_scales, place)


def _stacked(run, options, x, weight, bias, x_scales) -> jax.Array:
    """The product of ``(*stack, .., K)`` with a weight that may have stack axes."""
    call = functools.partial(_differentiable, run, options)
    shared = dataclasses.replace(weight.map(lambda _: 0), table=None)
    weight = weight.sliced() if weight.stack else weight
    for _ in weight.stack:
        fused = (None if a is None else 0 for a in (bias, x_scales))
        call = jax.vmap(call, in_axes=(0, shared, *fused))
    if x_scales is not None:
        x_scales = x_scales.reshape(*weight.stack, -1, 1)
    y = call(x.reshape(*weight.stack, -1, x.shape[-1]), weight, bias, x_scales)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def prepare(
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    format: str = "int4",
    group_size: int | None = None,
    table: jax.Array | None = None,
    chip: str | None = None,
) -> Weight:
    """Rearranges a stored weight once for the kernels of a chip.

    Args:
      codes: uint8 ``(*stack, N, K * bits / 8)``.
      scales: ``(*stack, K / group_size, N)``.
      zeros: like scales, or None.
      format: as in ``quantized_matmul``, like group_size and table.
      group_size: inputs that share a scale; None for one group a row.
      table: the ``(16,)`` values of a codebook.
      chip: a key of ``chips.BY_NAME``; None for the chip at hand.

    Returns:
      A pytree to give to ``quantized_matmul`` in place of the codes, of the same size in memory;
      the stored weight itself where the chip has no kernel for it.

    Raises:
      TypeError: a dtype is wrong.
      ValueError: shapes do not belong together.

    Example:
      >>> import jax.numpy as jnp
      >>> codes, scales = jnp.zeros((256, 64), jnp.uint8), jnp.ones((1, 256))
      >>> prepare(codes, scales, chip="v5e").layout
      'mosaic_tpu/1'
    """
    weight = weights.stored(codes, scales, zeros, table, format, group_size)
    if chip is not None and chip not in chips.BY_NAME:
        raise ValueError(f"chip {chip!r} is unknown; use one of {', '.join(chips.BY_NAME)}")
    known = chips.chip_of(codes) if chip is None else chips.BY_NAME[chip]
    if known is None or known.platform == "cpu" or not codes.size:
        return weight
    if known.platform == "gpu":
        from jaxcomp.kernels.quantized_matmul import gpu

        return gpu.prepare(weight)
    from jaxcomp.kernels.quantized_matmul import tpu

    return weight if tpu.unfit(weight, known) else layout.prepare(weight)


def weight_of(codes, scales, zeros, table, format, group_size) -> Weight:
    """The weight of the arguments of a public function."""
    if not isinstance(codes, Weight):
        if scales is None:
            arguments.array("codes", codes)
            raise ValueError(f"codes {codes.shape} come without scales (*stack, K / group_size, N)")
        return weights.stored(codes, scales, zeros, table, format or "int4", group_size)
    if scales is not None or zeros is not None or table is not None:
        raise ValueError("a prepared weight brings its own scales, zeros and table: give none")
    for name, given in (("format", format), ("group_size", group_size)):
        own = getattr(codes, name)
        if given is not None and given != own:
            raise ValueError(
                f"{name} {given!r} is given with a weight (N, K) = {codes.shape} of {name} "
                f"{own!r}: leave it out"
            )
    layout.check(codes)
    return codes if codes.layout == layout.LAYOUT else codes.sliced()


def options_of(x, weight, bias, activation, activation_dtype, out_dtype) -> Options:
    """Checks of what does not depend on the shape of x."""
    arguments.array("x", x)
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise TypeError(f"x {x.shape} is {x.dtype}; use bfloat16 or float32")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; use one of {list(ACTIVATIONS)}")
    allowed = reference.activation_dtypes(weight.format)
    name = activation_dtype
    if name is not None:
        name = arguments.dtype("activation_dtype", name)
    if name is not None and name not in allowed:
        raise ValueError(
            f"activation_dtype {name} does not multiply codes of {weight.format} exactly; use "
            f"{' or '.join(('None', *allowed))}"
        )
    expected = (*weight.stack, weight.shape[0])
    if bias is not None:
        arguments.array("bias", bias)
    if bias is not None and bias.shape != expected:
        raise ValueError(
            f"bias {bias.shape} must be (*stack, N) = {expected}, as the weight's scales "
            f"{weight.scales.shape} say"
        )
    out = arguments.out_dtype(x.dtype if out_dtype is None else out_dtype)
    return Options(activation, name, out)


def _row_scales(x, x_scales, options) -> jax.Array | None:
    """Scales of rows, one for each."""
    if x_scales is None:
        return None
    if options.activation_dtype is None:
        raise ValueError(
            f"x_scales {np.shape(x_scales)} are to quantize x {x.shape}: give activation_dtype as "
            "well"
        )
    shape = (*x.shape[:-1], 1)
    if isinstance(x_scales, float) or not arguments.is_array(x_scales):
        x_scales = jnp.asarray(x_scales, jnp.float32)  # Numbers have no dtype of their own.
    if x_scales.dtype != jnp.float32:
        raise TypeError(f"x_scales {x_scales.shape} are {x_scales.dtype}; use float32")
    try:
        return jnp.broadcast_to(x_scales, shape)
    except ValueError:
        raise ValueError(
            f"x_scales {x_scales.shape} do not broadcast to {shape}, one for each row of x "
            f"{x.shape}"
        ) from None


def _check_rows(x: jax.Array, weight: Weight) -> None:
    stack = weight.stack
    if x.ndim <= len(stack) or x.shape[: len(stack)] != stack:
        raise ValueError(
            f"x {x.shape} must begin with the stack axes {stack} of the weight's scales "
            f"{weight.scales.shape}"
        )
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x {x.shape} has {x.shape[-1]} inputs, and the weight (N, K) = {weight.shape} takes "
            f"{weight.shape[1]}"
        )


def _run(options, x, weight, bias, x_scales=None, *, implementation, interpret) -> jax.Array:
    """The product of rows ``(M, K)`` by the implementation that fits best."""
    chip = chips.chip_of(x)
    if implementation is None and not interpret and (chip is None or chip.platform == "cpu"):
        return reference.matmul(x, restored(weight), bias, options, x_scales)
    from jaxcomp.kernels.quantized_matmul import gpu, tpu

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
        on_gpu = on_gpu or gpu.slower(x.shape[0], weight, options, chip)
    chosen = implementations.choose(
        f"quantized_matmul of x {x.shape} {x.dtype} and {weight.format} {weight.shape} in "
        f"groups of {weight.group_size}",
        {"mosaic_tpu": several or on_tpu, "mosaic_gpu": several or on_gpu, "xla": None},
        implementation,
    )
    if chosen == "xla":
        return reference.matmul(x, restored(weight), bias, options, x_scales)

    def kernel(x, weight, bias, x_scales):
        if chosen == "mosaic_gpu":
            weight = weight.sliced()
            return gpu.run(x, weight, bias, options, interpret=interpret, x_scales=x_scales)
        return tpu.matmul(x, weight, bias, options, chip, interpret, x_scales=x_scales)

    once = implementations.first_order("quantized_matmul", chosen, kernel)
    return once(x, weight, bias, x_scales)


def restored(weight: Weight) -> Weight:
    """A weight of any layout in the stored one, with the codes of its own layer only."""
    weight = weight.sliced()
    if weight.layout != layout.GPU_LAYOUT:
        return layout.restore(weight)
    from jaxcomp.kernels.quantized_matmul import gpu

    return gpu.restore(weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(run, options, x, weight, bias, x_scales=None):
    return run(options, x, weight, bias, x_scales)


def _forward(run, options, x, weight, bias, x_scales):
    y, z = gradients.activated(lambda o: run(o, x, weight, bias, x_scales), options)
    return y, (x, weight, bias, x_scales, z)


def _backward(run, options, saved, dy):
    x, weight, bias, x_scales, z = saved
    dz = gradients.before_activation(options, z, dy)
    dx, *dparts = reference.gradients(x, restored(weight), dz, options, x_scales)
    dweight = gradients.of_weight(weight, *dparts)
    dbias = None if bias is None else jnp.sum(dz, axis=0).astype(bias.dtype)
    return dx, dweight, dbias, None if x_scales is None else jnp.zeros_like(x_scales)


_differentiable.defvjp(_forward, _backward)
