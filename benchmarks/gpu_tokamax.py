"""The same computations by tokamax's kernels, where it is installed (``pip install tokamax``).

Its product of one expert is a plain product. Where a kernel of it does not take a shape, the table
says so with tokamax's own words; no other of its implementations stands in.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxcomp.kernels.quantized_matmul.weights import Weight

try:
    import qwix
    import tokamax
except ImportError:
    tokamax = None


def installed() -> bool:
    return tokamax is not None


def product(x: jax.Array, weight: Weight) -> jax.Array:
    """``x Wᵀ`` of symmetric int4 or int8 codes as they are stored, in x's dtype."""
    n, k = weight.shape
    if weight.zeros is not None or weight.format not in ("int4", "int8"):
        raise NotImplementedError(f"{weight.format} with or without zeros")
    codes = jax.lax.bitcast_convert_type(weight.codes, jnp.dtype(weight.format)).reshape(1, n, k)
    # Inputs first; its kernel reads rows of outputs, so that nothing is moved.
    array = qwix.QArray(qvalue=codes.mT, scale=weight.scales[None], zero_point=None)
    rows = jnp.array([x.shape[0]], jnp.int32)
    return tokamax.ragged_dot(
        x, array, rows, preferred_element_type=x.dtype, implementation="mosaic_gpu"
    )


def attention(causal: bool = False) -> Callable[[jax.Array, Any], jax.Array]:
    """Attention of ``(batch, length, heads, dim)`` and a pair of keys and values like it."""

    def run(q, kv):
        return tokamax.dot_product_attention(q, *kv, is_causal=causal, implementation="mosaic")

    return run
