"""Products with sparse weights: what is public, checked, chosen and differentiated."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxcomp.kernels import arguments, chips, implementations, meshes
from jaxcomp.kernels.quantized_matmul.reference import ACTIVATIONS
from jaxcomp.kernels.sparse_matmul import (
    blocks,
    gpu,
    gpu_nm,
    nm,
    reference,
    sharding,
    tpu,
    tpu_nm,
)
from jaxcomp.kernels.sparse_matmul.blocks import BlockSparse
from jaxcomp.kernels.sparse_matmul.nm import NMSparse
from jaxcomp.kernels.sparse_matmul.reference import Options

_BY_NAME = "it was never run on a GPU; ask for it by name"


def block_sparse_matmul(
    x: jax.Array,
    w: BlockSparse,
    bias: jax.Array | None = None,
    activation: str | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
    interpret=False,
    weight_spec: PartitionSpec | NamedSharding | None = None,
    x_spec: PartitionSpec | None = None,
) -> jax.Array:
    """Y = activation(x Wᵀ + bias), computed for the blocks of W that are listed.

    Outputs that no block reaches are activation(bias). Gradients go to x, the values (the scales of
    int8 ones) and the bias, each over the same list of blocks.

    Args:
      x: ``(.., K)``, bf16 or f32.
      w: of shape (N, K), from ``block_sparse`` or ``block_list``, and for several devices from
        ``split_blocks``; the kernel takes blocks of at least 128.
      bias: ``(N,)`` or None.
      activation: None, "relu", "silu" or "gelu" (by tanh).
      out_dtype: dtype of y; None for x's.
      implementation: "xla", "mosaic_tpu", "mosaic_gpu", or None for the best one. The kernels for
        GPUs were never run on one: they are chosen by their name only.
      interpret: of a Pallas kernel: False, or to run it on a CPU ``pltpu.InterpretParams(..)``, or
        ``plgpu.InterpretGPUParams(..)`` for "mosaic_gpu".
      weight_spec: mesh axes of N and K, on a mesh of Auto axes; a NamedSharding where neither an
        array nor the mesh in use tells the mesh.
      x_spec: how x is; None splits rows over the mesh axes that the weight leaves.

    Returns:
      ``(.., N)``.

    Raises:
      TypeError: a dtype is wrong.
      ValueError: shapes do not belong together, or are split in ways that do not.
      Unsupported: no implementation takes these operands; all reasons are told.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcomp.kernels.sparse_matmul import block_sparse
      >>> w = block_sparse(jnp.ones((4, 6)), jnp.array([[1, 0, 1], [0, 0, 0]]))
      >>> block_sparse_matmul(jnp.ones((1, 6)), w).tolist()
      [[4.0, 4.0, 0.0, 0.0]]

    Source:
      Gray et al., GPU Kernels for Block-Sparse Weights, 2017 (the operation and its gradients).
    """
    _expect(w, BlockSparse, "block_sparse(w, mask) or block_list(..)")
    blocks.check(w)
    options = _options(x, w.shape, bias, activation, out_dtype)
    run = functools.partial(_run_blocks, implementation, interpret)
    place = sharding.placement(x, w, weight_spec, x_spec)
    return _placed(functools.partial(_block_matmul, run), options, x, w, bias, place)


def nm_matmul(
    x: jax.Array,
    w: NMSparse,
    bias: jax.Array | None = None,
    activation: str | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
    interpret=False,
    weight_spec: PartitionSpec | NamedSharding | None = None,
    x_spec: PartitionSpec | None = None,
) -> jax.Array:
    """Y = activation(x Wᵀ + bias) with N of every M inputs of W stored.

    The kernels save storage and bandwidth, not arithmetic: the matrix unit multiplies W written out
    in VMEM or, on GPUs, in registers. 2:4 in bf16 is 1.78x fewer bytes than dense bf16; with int4
    codes in groups of 128 about 5x, but decoding those takes longer than reading them. Gradients go
    to x, to values (or the scales of codes) and the bias, through XLA.

    Args:
      x: ``(.., K)``, bf16 or f32.
      w: of shape (N, K), from ``nm_sparse`` or ``nm_stored``, or one that ``prepare_nm`` made for
        the kernel, which otherwise does so on each call.
      bias: ``(N,)`` or None.
      activation: None, "relu", "silu" or "gelu" (by tanh).
      out_dtype: dtype of y; None for x's.
      implementation: "xla", "mosaic_tpu", "mosaic_gpu", or None for the best one. The kernel for
        GPUs was never run on one: it is chosen by its name only.
      interpret: of a Pallas kernel: False, or ``pltpu.InterpretParams(..)`` to run it on a CPU;
        ``plgpu.InterpretGPUParams(..)`` for "mosaic_gpu".
      weight_spec: mesh axes of N and K, on a mesh of Auto axes; a NamedSharding where neither an
        array nor the mesh in use tells the mesh.
      x_spec: how x is; None splits rows over the mesh axes that the weight leaves.

    Returns:
      ``(.., N)``.

    Raises:
      TypeError: a dtype is wrong.
      ValueError: shapes, the layout of a prepared weight, or how arrays are split, are wrong.
      Unsupported: no implementation takes these operands; all reasons are told.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcomp.kernels.sparse_matmul import nm_sparse
      >>> w = nm_sparse(jnp.array([[1.0, 0.0, 0.0, 4.0]]))
      >>> nm_matmul(jnp.array([[1.0, 2.0, 3.0, 4.0]]), w).tolist()
      [[17.0]]

    Source:
      Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv 2104.08378 (2:4).
    """
    _expect(w, NMSparse, "nm_sparse(w), once pruned, or nm_stored(..)")
    nm.check(w)
    options = _options(x, w.shape, bias, activation, out_dtype)
    run = functools.partial(_run_nm, implementation, interpret)
    place = sharding.placement(x, w, weight_spec, x_spec)
    return _placed(functools.partial(_nm_matmul, run), options, x, w, bias, place)


def prepare_nm(w: NMSparse, chip: str | None = None) -> NMSparse:
    """Rearranges a stored weight once for the kernel of a chip.

    Args:
      w: in the stored layout.
      chip: a key of ``chips.BY_NAME``; None for the chip at hand.

    Returns:
      A pytree to give to ``nm_matmul``, of the same size in memory; the stored weight itself where
      the chip has no kernel for it.

    Raises:
      TypeError: it is no such weight.
      ValueError: another version prepared it, its arrays do not belong together, or the chip is
        unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcomp.kernels.sparse_matmul import nm_sparse
      >>> w = nm_sparse(jnp.zeros((128, 512)))
      >>> prepare_nm(w, chip="v5e").layout, prepare_nm(w, chip="cpu").layout
      ('mosaic_tpu/1', 'stored')
    """
    _expect(w, NMSparse, "nm_sparse(w), once pruned, or nm_stored(..)")
    nm.check(w)
    if chip is not None and chip not in chips.BY_NAME:
        raise ValueError(f"chip {chip!r} is unknown; use one of {', '.join(chips.BY_NAME)}")
    known = chips.chip_of(w.values) if chip is None else chips.BY_NAME[chip]
    fits = tpu_nm.unfit(w, known) is None or gpu_nm.unfit(jnp.bfloat16, w, known) is None
    return nm.prepare(w) if fits and w.layout == "stored" else w


def _expect(w, kind: type, made_by: str) -> None:
    if isinstance(w, kind):
        return
    what = f"an array {w.shape}" if arguments.is_array(w) else f"a {type(w).__name__}"
    raise TypeError(f"w is {what}, no {kind.__name__}: make one by {made_by}")


def _options(x, shape, bias, activation, out_dtype) -> Options:
    """Checks of what all sparse weights share."""
    for name, array in (("x", x), ("bias", bias)):
        if array is not None:
            arguments.array(name, array)
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise TypeError(f"x {x.shape} is {x.dtype}; use bfloat16 or float32")
    if x.ndim < 1 or x.shape[-1] != shape[1]:
        raise ValueError(
            f"x {x.shape} must be (.., K) for the weight (N, K) = {shape}, which takes {shape[1]} "
            "inputs"
        )
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(f"bias {bias.shape} must be (N,) = {shape[:1]} for the weight {shape}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; use one of {list(ACTIVATIONS)}")
    return Options(activation, arguments.out_dtype(x.dtype if out_dtype is None else out_dtype))


def _placed(product, options, x, w, bias, place) -> jax.Array:
    """The product on one device, or each device's part of it."""
    x, w, bias = meshes.vary_alike(x, w, bias)
    if not x.size or 0 in w.shape:  # Nothing is multiplied: sums of nothing.
        sums = jnp.zeros((*x.shape[:-1], w.shape[0]), jnp.float32)
        return reference.finish(meshes.varied(sums, x), bias, options)
    if place is None:
        return _rows(functools.partial(product, options), x, w, bias)
    # What is fused needs the sum over devices.
    own = Options(None, "float32") if place.inputs else options
    call = functools.partial(_rows, functools.partial(product, own))
    finish = functools.partial(reference.finish, options=options)
    return sharding.matmul(call, finish, x, w, bias, place)


def _rows(call, x, w, bias) -> jax.Array:
    """Calls with the leading axes of x as one."""
    y = call(x.reshape(-1, x.shape[-1]), w, bias)
    return y.reshape(*x.shape[:-1], w.shape[0])


def _chip(x, interpret) -> chips.Chip | None:
    chip = chips.chip_of(x)
    if interpret and (chip is None or chip.platform != "tpu"):
        return chips.V5E
    return chip


def _chosen(implementation, interpret, x, weight) -> str:
    """The implementation that runs a product with a block-sparse weight, and its gradients."""
    problem = chips.shared_by_many(x, weight.values)
    on_tpu = problem or tpu.unfit(x.dtype, weight, _chip(x, interpret))
    chip = chips.H100 if interpret else chips.chip_of(x)
    on_gpu = problem or gpu.unfit(x.dtype, weight, chip)
    if implementation is None:
        on_gpu = on_gpu or _BY_NAME
    return implementations.choose(
        f"block_sparse_matmul of x {x.shape} {x.dtype} and {len(weight.values)} "
        f"{weight.values.dtype} blocks of {weight.block} of {weight.shape}",
        {"mosaic_tpu": on_tpu, "mosaic_gpu": on_gpu, "xla": None},
        implementation,
    )


def _run_blocks(implementation, interpret, x, weight, bias, options):
    chosen = _chosen(implementation, interpret, x, weight)
    if chosen == "xla":
        return reference.block_matmul(x, weight, bias, options)

    def kernel(x, weight, bias):
        if chosen == "mosaic_gpu":
            return gpu.matmul(x, weight, bias, options, interpret)
        return tpu.matmul(x, weight, bias, options, _chip(x, interpret), interpret)

    return implementations.first_order("block_sparse_matmul", chosen, kernel)(x, weight, bias)


def _run_nm(implementation, interpret, x, weight, bias, options):
    chip = _chip(x, interpret)
    problem = chips.shared_by_many(x, weight.values)
    on_tpu = problem or tpu_nm.unfit(weight, chip, x.dtype)
    hopper = chips.H100 if interpret else chips.chip_of(x)
    on_gpu = problem or gpu_nm.unfit(x.dtype, weight, hopper)
    if implementation is None:
        on_gpu = on_gpu or _BY_NAME
    chosen = implementations.choose(
        f"nm_matmul of x {x.shape} {x.dtype} and {weight.n}:{weight.m} {weight.values.dtype} "
        f"{weight.shape}",
        {"mosaic_tpu": on_tpu, "mosaic_gpu": on_gpu, "xla": None},
        implementation,
    )
    if chosen == "xla":
        return reference.nm_matmul(x, weight, bias, options)

    def kernel(x, weight, bias):
        if chosen == "mosaic_gpu":
            return gpu_nm.matmul(x, weight, bias, options, interpret)
        return tpu_nm.matmul(x, weight, bias, options, chip, interpret)

    return implementations.first_order("nm_matmul", chosen, kernel)(x, weight, bias)


def _linear(run, options, x, weight, bias):
    """y, and what its activation was applied to, where there is one."""
    if options.activation is None:
        return run(x, weight, bias, options), None
    # The activation's gradient needs its argument.
    z = run(x, weight, bias, Options(None, "float32"))
    return reference.finish(z, None, options), z


def _before_activation(options, z, dy) -> jax.Array:
    """The f32 cotangent of what the activation was applied to."""
    dz = dy.astype(jnp.float32)
    return dz if z is None else jax.vjp(ACTIVATIONS[options.activation], z)[1](dz)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _block_matmul(run, options, x, weight, bias):
    return run(x, weight, bias, options)


def _block_forward(run, options, x, weight, bias):
    y, z = _linear(run, options, x, weight, bias)
    return y, (x, dataclasses.replace(weight, layers=None), bias, z)


def _block_backward(run, options, saved, dy):
    x, weight, bias, z = saved
    dz = _before_activation(options, z, dy)
    implementation, interpret = run.args
    chosen = _chosen(implementation, interpret, x, weight)
    dz_of = dz.astype(x.dtype)
    if chosen == "xla":
        dx, dvalues = reference.block_gradients(x, weight, dz_of)
    elif chosen == "mosaic_gpu":
        dx, dvalues = gpu.gradients(x, weight, dz_of, interpret)
    else:
        dx, dvalues = tpu.gradients(x, weight, dz_of, _chip(x, interpret), interpret)
    dscales = None
    if weight.scales is not None:
        dscales = jnp.sum(dvalues * weight.values.astype(jnp.float32), axis=-1)
        dvalues = _nothing(weight.values)
    dweight = dataclasses.replace(
        weight,
        values=dvalues,
        scales=dscales,
        rows=_nothing(weight.rows),
        columns=_nothing(weight.columns),
    )
    return dx, dweight, _bias_gradient(bias, dz)


_block_matmul.defvjp(_block_forward, _block_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _nm_matmul(run, options, x, weight, bias):
    return run(x, weight, bias, options)


def _nm_forward(run, options, x, weight, bias):
    y, z = _linear(run, options, x, weight, bias)
    return y, (x, dataclasses.replace(weight, layers=None), bias, z)


def _nm_backward(run, options, saved, dy):
    x, weight, bias, z = saved
    dz = _before_activation(options, z, dy)
    dx, dleaf = reference.nm_gradients(x, weight, dz.astype(x.dtype))
    # Codes and positions are integers; what remains of a weight is its values or its scales.
    name = "values" if weight.scales is None else "scales"
    leaves = {n: _nothing(getattr(weight, n)) for n in ("values", "positions")} | {name: dleaf}
    return dx, dataclasses.replace(weight, **leaves), _bias_gradient(bias, dz)


_nm_matmul.defvjp(_nm_forward, _nm_backward)


def _nothing(array) -> np.ndarray:
    """The cotangent of integers."""
    return np.zeros(array.shape, jax.dtypes.float0)


def _bias_gradient(bias, dz):
    return None if bias is None else jnp.sum(dz, axis=0).astype(bias.dtype)
