"""2:4 sparse matmuls on Hopper GPUs: what fits, how they are divided, and the kernel's call.

Nothing here was run on a GPU so far: the kernel was compared with float64 in interpret mode, and
compiled for H100 by CUDA's assembler. The choice of tiles is therefore a guess.
"""

import jax
import jax.numpy as jnp
from jaxcomp.kernels import chips
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.sparse_matmul import nm, reference
from jaxcomp.kernels.sparse_matmul.nm import NMSparse
from jaxcomp.kernels.sparse_matmul.reference import Options

_PARTS = 4
_CORES = 132
_LEAST_GROUP = 32  # eight columns of a plane, as registers have them


def unfit(dtype: jax.typing.DTypeLike, weight: NMSparse, chip: Chip | None) -> str | None:
    """Why the kernel does not take a weight on a chip.

    Args:
      dtype: of x.
      weight: stored or prepared.
      chip: ``chips.H100`` for interpret mode; None for one that no kernel knows.

    Returns:
      A reason, or None.
    """
    if lacking := chips.lacks_mosaic_gpu(chip, _kernel):
        return lacking
    kernel = _kernel()
    if (weight.n, weight.m) != (2, _PARTS):
        return f"it takes 2:4 sparsity, not {weight.n}:{weight.m}"
    coded = weight.scales is not None
    if dtype != jnp.bfloat16 or not (coded or weight.values.dtype == jnp.bfloat16):
        return f"it multiplies bfloat16, not x of {dtype} and values of {weight.values.dtype}"
    (n, k), rows = weight.shape, kernel.ROWS * kernel.WORKERS
    if n % rows or k % (_PARTS * kernel.DEPTH):
        return (
            f"outputs must be a multiple of {rows} and inputs of {_PARTS * kernel.DEPTH}, not {n} "
            f"and {k}"
        )
    if coded and weight.group_size % _LEAST_GROUP:
        return (
            f"int4 values in groups of {weight.group_size} inputs, which are no multiple of "
            f"{_LEAST_GROUP}"
        )
    step = _PARTS * kernel.DEPTH
    if coded and weight.group_size % step and step % weight.group_size:
        return (
            f"int4 values in groups of {weight.group_size} inputs, which neither divide {step} nor "
            "are a multiple of it"
        )
    return None


def _kernel():
    """The module of the kernel, imported late since that takes a second; None without it."""
    try:
        from jaxcomp.kernels.sparse_matmul import gpu_nm_kernel
    except ImportError:
        return None
    return gpu_nm_kernel


def matmul(
    x: jax.Array, weight: NMSparse, bias: jax.Array | None, options: Options, interpret=False
) -> jax.Array:
    """Y = activation(x Wᵀ + bias).

    Args:
      x: ``(M, K)``, bf16.
      weight: that fits; one that is not prepared is prepared here, on every call.
      bias: ``(N,)`` or None.
      options: what is fused.
      interpret: False, or ``plgpu.InterpretGPUParams(..)``.

    Returns:
      ``(M, N)``.
    """
    kernel = _kernel()
    weight = nm.prepare(weight) if weight.layout == "stored" else weight
    m, (n, k) = x.shape[0], weight.shape
    # Inputs sorted by their place in a group: what the planes of values become is then four parts.
    x = jnp.pad(x, ((0, -m % 8 if m > 8 else 0), (0, 0)))
    x = jnp.moveaxis(x.reshape(-1, k // _PARTS, _PARTS), -1, 0)
    tokens = next((size for size in (8, 16, 32, 64) if m <= size), 128)
    blocks = n // (kernel.ROWS * kernel.WORKERS) * -(-m // tokens)
    split = max(1, min(_CORES // blocks, k // (_PARTS * kernel.DEPTH) // 4))
    sums = kernel.product(
        x, weight.values, weight.positions, weight.scales, tokens, split, interpret
    )
    return reference.finish(sums.sum(axis=0)[:, :m].T, bias, options)
