"""Products with experts' weights over several devices: each multiplies what it holds.

Experts may be split over devices (expert-parallel), and each expert's outputs and inputs as those
of one weight. Rows may be split too: they are sorted by expert, so a device's are consecutive and
of few experts. A device computes the rows of its own experts, zeros in the others, and these are
summed over the devices with other experts; no codes are sent. Where a caller has sent each row to
the device of its expert (an all-to-all inside of its own shard_map), the product is called there.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxcomp.kernels.meshes import count, names, split_as
from jaxcomp.kernels.quantized_matmul import sharding
from jaxcomp.kernels.quantized_matmul.weights import Weight


def matmul(
    call: Callable[[jax.Array, jax.Array, Weight, jax.Array | None], jax.Array],
    finish: Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array],
    x: jax.Array,
    bounds: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    place: sharding.Placement,
) -> jax.Array:
    """The product, each device on its own part.

    Args:
      call: gives one device's result from its rows, their bounds, its experts and their bias.
      finish: gives the result from the sum of unfinished float32 products, the bounds and the bias,
        where K is split; ``call`` is then given no bias and must leave its result unfinished.
      x: ``(M, K)``, sorted by expert.
      bounds: int32 ``(E + 1,)``: rows ``bounds[e]:bounds[e + 1]`` are those of expert e.
      weight: stored or prepared, with one stack axis of E experts.
      bias: ``(E, N)`` or None.
      place: from ``sharding.placement``.

    Returns:
      ``(M, N)``, split as the rows of x and the outputs of the weight are.
    """
    (experts,), (rows,) = place.stack, place.rows
    outputs, inputs = place.outputs, place.inputs
    specs, part = sharding.parts(weight, place)
    each = weight.stack[0] // count(experts, dict(place.mesh.shape))

    def index(axes):
        return jax.lax.axis_index(tuple(names(axes))) if axes else 0

    def body(x, bounds, weight, bias):
        weight = dataclasses.replace(weight, **part)
        own = jax.lax.dynamic_slice_in_dim(bounds, index(experts) * each, each + 1)
        own = jnp.clip(own - index(rows) * x.shape[0], 0, x.shape[0])
        if inputs:
            y = finish(jax.lax.psum(call(x, own, weight, None), inputs), own, bias)
        else:
            y = call(x, own, weight, bias)
        # Each row is one device's, and zeros elsewhere: their sum is exact.
        return jax.lax.psum(y, experts) if experts else y

    in_specs = (
        PartitionSpec(rows, inputs),
        PartitionSpec(None),
        specs,
        PartitionSpec(experts, outputs),
    )
    return jax.shard_map(
        body,
        mesh=place.mesh,
        in_specs=in_specs,
        out_specs=PartitionSpec(rows, outputs),
        check_vma=False,
    )(*split_as((x, bounds, weight, bias), in_specs, place.mesh))
