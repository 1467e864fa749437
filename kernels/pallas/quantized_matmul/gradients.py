"""What the gradients of products with one weight and with experts' weights share."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxcomp.kernels.quantized_matmul import reference
from jaxcomp.kernels.quantized_matmul.reference import ACTIVATIONS, Options
from jaxcomp.kernels.quantized_matmul.weights import Weight


def activated(
    run: Callable[[Options], jax.Array], options: Options
) -> tuple[jax.Array, jax.Array | None]:
    """A product, and what its activation was applied to, where it has one.

    Args:
      run: computes the product with the options that it is given.
      options: what is fused.

    Returns:
      y, and f32 z, which the activation's gradient needs; or None.
    """
    if options.activation is None:
        return run(options), None
    z = run(dataclasses.replace(options, activation=None, out_dtype="float32"))
    return reference.finish(z, None, options), z


def before_activation(options: Options, z: jax.Array | None, dy: jax.Array) -> jax.Array:
    """The f32 cotangent of what the activation was applied to, from that of y."""
    dz = dy.astype(jnp.float32)
    return dz if z is None else jax.vjp(ACTIVATIONS[options.activation], z)[1](dz)[0]


def of_weight(weight: Weight, dscales, dzeros, dtable) -> Weight:
    """The cotangent of a weight; of codes, which have none, it is zeros as JAX asks for."""
    codes = weight.codes
    layer = None if weight.layer is None else np.zeros((), jax.dtypes.float0)
    if jnp.issubdtype(codes.dtype, jnp.floating):
        none = jnp.zeros_like(codes)
    else:
        none = np.zeros(codes.shape, jax.dtypes.float0)
    return dataclasses.replace(
        weight, codes=none, scales=dscales, zeros=dzeros, table=dtable, layer=layer
    )
