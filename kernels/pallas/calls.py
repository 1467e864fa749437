"""Calls of kernels that hold in any program.

A kernel knows numbers of 32 bits only, so Python's must not become 64-bit ones in it where a
program enables those. And inside a shard_map it has to be said over which mesh axes results vary:
those over which any operand does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jaxcomp.kernels.meshes import vary_over, varying


def on_tpu(body: Callable[..., None], *, out_shape: Any, **options: Any) -> Callable[..., Any]:
    """``pl.pallas_call``, for any program.

    Args:
      body: the kernel.
      out_shape: pytree of shapes of the results.
      **options: further ones of ``pl.pallas_call``.

    Returns:
      A function of the operands, which have at most 32 bits.
    """

    def call(*operands):
        varies = jax.sharding.ManualAxisType(varying=varying(operands))
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, manual_axis_type=varies), out_shape
        )
        with jax.enable_x64(False):
            return pl.pallas_call(body, out_shape=shapes, **options)(*operands)

    return call


def by_name(body: Callable[..., None], names: Sequence[str], scalars: int) -> Callable[..., None]:
    """A kernel that finds its operands by name.

    Args:
      body: takes them as a dict of references, then results and scratch memory.
      names: of the operands.
      scalars: how many come before them that only index maps read.

    Returns:
      The kernel.
    """

    def kernel(*refs):
        refs = refs[scalars:]
        body(dict(zip(names, refs, strict=False)), *refs[len(names) :])

    return kernel


def apart(bodies: Sequence[Callable[[], None]], number: jax.Array) -> None:
    """Runs bodies of a kernel for TPUs one after the other, each in code of its own.

    In one piece of code the compiler begins early what it can, and spills it until it is wanted.
    Here each is in a branch that is always taken, which must not be known: nor that two have one
    condition, which would be joined.

    Args:
      bodies: what to run.
      number: int32, more than -2**30, best read from memory: the id of a program is known where its
        axis has a single step.
    """
    for place, body in enumerate(bodies):
        pl.when(number >= -(1 << 30) - place)(body)


def on_gpu(body: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """``plgpu.kernel``, for any program.

    Args:
      body: the kernel.
      **options: of ``plgpu.kernel``.

    Returns:
      A function of the operands, which have at most 32 bits.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def call(*operands):
        with jax.enable_x64(False):
            results = plgpu.kernel(body, **options)(*operands)
        # It does not say how they vary.
        return vary_over(results, varying(operands))

    return call
