"""What all parts of a compressed weight share.

A part is a frozen dataclass of arrays, registered as a pytree. It stands for a matrix ``(*stack,
out, in)`` and every one of its arrays has the same leading stack axes, so ``lax.scan``, ``vmap``,
indexing and stacking of its leaves slice and stack parts. Sizes are read from the arrays; nothing
static depends on the stack. The methods that a part defines:

- ``shape``: ``(*stack, out, in)``, from the shapes of its arrays alone.
- ``materialize(dtype)``: the dense matrix.
- ``scale_rows(c)``: the part with row o multiplied by ``c[..., o]``.
"""

import dataclasses
import functools
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np


def dtype_bits(dtype: Any) -> int:
    """Bits of one value of a dtype; 4 for int4 and float4, whatever a host array pads them to.

    Example:
      >>> import jax.numpy as jnp
      >>> dtype_bits(jnp.int4), dtype_bits(jnp.bfloat16)
      (4, 16)
    """
    try:
        if jnp.issubdtype(dtype, jnp.bool_):
            return 8
        if jnp.issubdtype(dtype, jnp.integer):
            return int(jnp.iinfo(dtype).bits)
        if jnp.issubdtype(dtype, jnp.floating):
            return int(jnp.finfo(dtype).bits)
    except (ValueError, TypeError):
        pass
    return int(getattr(dtype, "itemsize", None) or np.dtype(dtype).itemsize) * 8


def leaf_bits(leaf: Any) -> int:
    """Exact bits that an array (or anything with a shape and a dtype) holds."""
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return math.prod(leaf.shape) * dtype_bits(leaf.dtype)


def compute_dtype(*arrays: Any) -> Any:
    """float64 when one of the arrays is, float32 otherwise."""
    wide = any(getattr(a, "dtype", None) == jnp.float64 for a in arrays)
    return jnp.float64 if wide else jnp.float32


def static(**kwargs: Any) -> Any:
    """A dataclass field that is not an array."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def part(cls: type) -> type:
    """Class decorator: a frozen dataclass, registered as a pytree by its ``static`` marks."""
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)
    meta = [f.name for f in fields if f.metadata.get("static")]
    data = [f.name for f in fields if not f.metadata.get("static")]
    jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)
    return cls


def jitted(method: Any) -> Any:
    """Decorator of ``materialize`` methods: one fused computation also outside of ``jit``."""
    return functools.partial(jax.jit, static_argnames="dtype", inline=True)(method)


class Part:
    """Base of the parts; see the head of this file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's shape, ``(*stack, out, in)``."""
        raise NotImplementedError

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the leading stack axes."""
        return self.shape[:-2]

    @property
    def nbits(self) -> int:
        """Exact bits of all arrays that the part stores."""
        return sum(leaf_bits(leaf) for leaf in jax.tree_util.tree_leaves(self))

    def materialize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The dense matrix ``(*stack, out, in)`` in ``dtype``."""
        raise NotImplementedError

    def scale_rows(self, c: jax.Array) -> Self:
        """The part with row o multiplied by ``c[..., o]``, for ``c (*stack, out)``."""
        raise NotImplementedError

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)


def expand_groups(scale: jax.Array, out: int, size: int) -> jax.Array:
    """Scales ``(*stack, in_groups, out_groups)`` spread over ``(*stack, out, size)``."""
    rows = jnp.swapaxes(scale, -1, -2)
    return spread(rows, out, size)


def spread(groups: jax.Array, out: int, size: int) -> jax.Array:
    """Values ``(*stack, out_groups, in_groups)`` repeated to ``(*stack, out, size)``."""
    *stack, og, ig = groups.shape
    wide = jnp.broadcast_to(groups[..., :, None, :, None], (*stack, og, out // og, ig, size // ig))
    # One axis at a time: on a mesh of Explicit axes a reshape may merge only one split axis.
    return wide.reshape(*stack, out, ig, size // ig).reshape(*stack, out, size)


def gather_groups(scale: jax.Array, group_index: jax.Array, out: int) -> jax.Array:
    """Scales ``(*stack, in_groups, out_groups)`` of each input's group, ``(*stack, out, in)``."""
    index = group_index.astype(jnp.int32)[..., :, None]
    by_input = jnp.take_along_axis(scale, index, axis=-2)
    return spread(jnp.swapaxes(by_input, -1, -2), out, group_index.shape[-1])


def scale_group_rows(scale: jax.Array, c: jax.Array, dtype: Any = None) -> jax.Array:
    """Scales ``(*stack, in_groups, out_groups)`` times ``c (*stack, out)``, one a row."""
    out, out_groups = c.shape[-1], scale.shape[-1]
    wide = compute_dtype(scale, c)
    if out_groups != out:
        scale = jnp.repeat(scale, out // out_groups, axis=-1)
    return (scale.astype(wide) * c[..., None, :].astype(wide)).astype(dtype or scale.dtype)
