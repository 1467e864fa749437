"""Block-sparse matmuls on Hopper GPUs: what fits, how they are divided, and the kernels' calls.

Nothing here was run on a GPU so far: the kernels were compared with float64 in interpret mode, and
compiled for H100 by CUDA's assembler. The choice of tiles is therefore a guess.
"""

import jax
import jax.numpy as jnp
from jaxcomp.kernels import chips
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.sparse_matmul import reference
from jaxcomp.kernels.sparse_matmul.blocks import BlockSparse
from jaxcomp.kernels.sparse_matmul.reference import Options

_WIDTH = 128  # of the kernels' tiles
_ALIGNED = 8  # 16 bytes, which the strides of copied arrays are multiples of
_CORES = 132
_LEAST_STEPS = 4  # of a part, where lists are split for cores that would be idle


def unfit(dtype: jax.typing.DTypeLike, weight: BlockSparse, chip: Chip | None) -> str | None:
    """Why the kernels do not take a weight on a chip.

    Args:
      dtype: of x.
      weight: any that is valid.
      chip: ``chips.H100`` for interpret mode; None for one that no kernel knows.

    Returns:
      A reason, or None.
    """
    if lacking := chips.lacks_mosaic_gpu(chip, _kernels):
        return lacking
    if dtype != jnp.bfloat16 or weight.values.dtype != jnp.bfloat16:
        return f"it multiplies bfloat16, not x of {dtype} and values of {weight.values.dtype}"
    if any(size % _WIDTH for size in weight.block):
        return f"blocks of {weight.block} are not multiples of {_WIDTH}"
    if not len(weight.values):
        return "there is no block"
    return None


def matmul(
    x: jax.Array, weight: BlockSparse, bias: jax.Array | None, options: Options, interpret=False
) -> jax.Array:
    """Y = activation(x Wᵀ + bias).

    Args:
      x: ``(M, K)``, bf16.
      weight: that fits.
      bias: ``(N,)`` or None.
      options: what is fused.
      interpret: False, or ``plgpu.InterpretGPUParams(..)``.

    Returns:
      ``(M, N)``.
    """
    return _product(x, weight, bias, options, 0, interpret)


def gradients(
    x: jax.Array, weight: BlockSparse, dz: jax.Array, interpret=False
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of z = x Wᵀ.

    Args:
      x: ``(M, K)``, bf16.
      weight: that fits.
      dz: ``(M, N)``, bf16.
      interpret: False, or ``plgpu.InterpretGPUParams(..)``.

    Returns:
      Cotangents of x, and of the blocks of W.
    """
    kernels = _kernels()
    dx = _product(dz, weight, None, Options(None, x.dtype.name), 1, interpret)
    dvalues = kernels.outer(
        _aligned(x),
        _aligned(dz),
        weight.rows,
        weight.columns,
        weight.block,
        weight.values.dtype.name,
        kernels.Tiles(rows=64, workers=2, stages=4),
        interpret,
    )
    return dx, dvalues


def lists(weight: BlockSparse, axis: int) -> dict[str, jax.Array]:
    """The blocks of a weight by outputs (axis 0) or inputs (1), as the kernel reads them.

    Args:
      weight: any, also one whose list is divided for several devices.
      axis: 0 or 1.

    Returns:
      "starts", "blocks" and "minors" of ``gpu_kernel.product``.
    """
    majors, minors = (weight.rows, weight.columns)[:: 1 if axis == 0 else -1]
    order = jnp.arange(len(majors), dtype=jnp.int32)
    if axis == 1 or weight.parts != (1, 1):  # else it is sorted
        order = jnp.argsort(majors, stable=True).astype(jnp.int32)
    before = majors[None] < jnp.arange(weight.grid[axis] + 1)[:, None]
    return {
        "starts": before.sum(1, dtype=jnp.int32),
        "blocks": order,
        "minors": minors[order],
    }


def _kernels():
    """The module of kernels, imported late since that takes a second; None without Mosaic GPU."""
    try:
        from jaxcomp.kernels.sparse_matmul import gpu_kernel
    except ImportError:
        return None
    return gpu_kernel


def _product(x, weight, bias, options, axis, interpret):
    """Sums over the lists: of x Wᵀ, to outputs (axis 0), or of x W, to inputs (axis 1)."""
    size, whole = weight.shape[axis], weight.grid[axis] * weight.block[axis]
    tiles = choose_tiles(len(x), weight, axis)
    finished = tiles.split == 1
    if bias is not None:
        bias = jnp.pad(bias.astype(jnp.float32), (0, whole - size))
    y = _kernels().product(
        _aligned(x),
        weight.values,
        lists(weight, axis),
        bias if finished else None,
        axis,
        size + -size % _ALIGNED,
        options.activation if finished else None,
        options.out_dtype if finished else "float32",
        tiles,
        interpret,
    )
    if finished:
        return y[0, : len(x), :size]
    y = jnp.sum(y, axis=0)[: len(x), :size]
    return reference.finish(y, None if bias is None else bias[:size], options)


def choose_tiles(rows: int, weight: BlockSparse, axis: int):
    """How a product is divided: its lists too, where few rows leave cores idle.

    Args:
      rows: of x.
      weight: that fits.
      axis: 0 for outputs, 1 for inputs.

    Returns:
      ``gpu_kernel.Tiles``.
    """
    kernels = _kernels()
    if rows > 64:
        return kernels.Tiles(rows=128 if rows > 128 else 64, workers=2, stages=4)
    blocks = weight.grid[axis] * weight.block[axis] // _WIDTH
    steps = len(weight.values) * weight.block[1 - axis] // kernels.DEPTH // weight.grid[axis]
    split = max(1, min(_CORES // blocks, steps // _LEAST_STEPS))
    return kernels.Tiles(rows=64, workers=1, stages=8, split=split)


def _aligned(x: jax.Array) -> jax.Array:
    """Columns up to a multiple of 16 bytes, and rows of 8, which tiles of shared memory have."""
    rows = -len(x) % 8 if len(x) > 8 else 0
    return jnp.pad(x, ((0, rows), (0, -x.shape[1] % _ALIGNED)))
