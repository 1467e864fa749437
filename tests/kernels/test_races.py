"""That races are looked for in every kernel of a test."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def test_every_kernel_is_watched(watched):
    def kernel(x, y):
        y[...] = x[...] + 1

    x = jnp.zeros((8, 128))
    interpret = pltpu.InterpretParams(detect_races=True)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    step = pl.pallas_call(kernel, out_shape=out, interpret=interpret)
    y = jax.jit(lambda x: step(step(x)))(x)
    assert (y == 2).all()
    assert len(watched) == 2
