"""Arrays of several layers, of which a sparse weight is one: kernels read their own where it lies.

A loop over layers would slice the arrays of its layer, which is a copy, before a kernel that reads
them could start. So a weight may hold those of all layers beside its own: a kernel for TPUs reads
these, and a loop slices the others only where something else reads them: gradients, or XLA's form.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxcomp.kernels import arguments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layers:
    """The arrays of all layers that a kernel reads, and which of them are a weight's own.

    Attributes:
      arrays: each with an axis of layers in front. They have no gradient: the weight's own have.
      index: int32, the layer.
    """

    arrays: tuple[jax.Array, ...]
    index: jax.Array

    @property
    def scalar(self) -> jax.Array:
        """The layer as a kernel gets it before it reads anything, int32 ``(1,)``."""
        return jnp.clip(self.index, 0, self.arrays[0].shape[0] - 1).reshape(1)


def layer_of(weight: Any, index: jax.Array | int) -> Any:
    """One of the weights whose arrays have an axis of layers in front.

    Args:
      weight: ``BlockSparse`` or ``NMSparse``; its shape is that of one layer.
      index: which layer, from 0; one that is known before it runs must exist.

    Returns:
      The weight of that layer. Its large arrays a kernel for TPUs reads from those of all layers,
      unless it is stored and first has to be prepared.
    """
    count = weight.read[0].shape[0]
    index = arguments.index("index", index, count, f"the weight's arrays are of {count} layers")
    own = jax.tree.map(
        lambda array: jax.lax.dynamic_index_in_dim(array, index, 0, keepdims=False), weight
    )
    if getattr(weight, "layout", "") == "stored":
        return own
    whole = jax.lax.stop_gradient(weight.read)
    return dataclasses.replace(own, layers=Layers(whole, index))


def of_kernel(weight: Any) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """What a kernel reads of a weight: scalars, and large arrays, with or without an axis in front.

    Args:
      weight: of one layer.

    Returns:
      No scalar and the weight's own ``read``; or its layer, and those of all layers.
    """
    if weight.layers is None:
        return (), weight.read
    return (weight.layers.scalar,), weight.layers.arrays


def check_layers(weight: Any) -> None:
    """Refuses arrays of all layers that are not those of a weight's own layer.

    Raises:
      ValueError: naming both shapes.
    """
    if weight.layers is None:
        return
    if getattr(weight, "layout", "") == "stored":
        raise ValueError(f"a stored weight {weight.shape} has no arrays of all layers; prepare it")
    for whole, own in zip(weight.layers.arrays, weight.read, strict=True):
        if whole.shape[1:] != own.shape or whole.dtype != own.dtype:
            raise ValueError(
                f"{own.dtype}{own.shape} is not one of the layers of {whole.dtype}{whole.shape}; "
                "use layer_of"
            )


def specs(layers: Layers | None, own: tuple[PartitionSpec, ...]) -> Layers | None:
    """How arrays of all layers are split, from specs of one layer's."""
    if layers is None:
        return None
    return Layers(tuple(PartitionSpec(None, *spec) for spec in own), PartitionSpec())
