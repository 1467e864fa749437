"""What all operations have in common: reasons of every kernel together, and gradients they lack."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxcomp.kernels import arguments, chips
from jaxcomp.kernels.implementations import Unsupported
from jaxcomp.kernels.quantized_matmul import grouped_quantized_matmul, quantized_matmul
from jaxcomp.kernels.sparse_attention import attention, decode_attention
from jaxcomp.kernels.sparse_matmul import block_sparse, block_sparse_matmul, nm_matmul, nm_sparse

X = jnp.ones((2, 512), jnp.bfloat16)
CODES, SCALES = jnp.zeros((256, 256), jnp.uint8), jnp.ones((4, 256))
CACHE = jnp.ones((1, 256, 2, 128), jnp.bfloat16)
LENGTHS = jnp.array([9])
BLOCKS = block_sparse(np.ones((256, 512), np.float32), np.eye(2))
SPARSE = nm_sparse(np.tile(np.array([1, 0, 0, 2], np.float32), (128, 128)))


def experts(x, **options):
    sizes = jnp.array([2])
    return grouped_quantized_matmul(x, sizes, CODES[None], SCALES[None], group_size=128, **options)


OPERATIONS = {
    "quantized_matmul": lambda x, **o: quantized_matmul(x, CODES, SCALES, group_size=128, **o),
    "grouped_quantized_matmul": experts,
    "block_sparse_matmul": lambda x, **o: block_sparse_matmul(x, BLOCKS, **o),
    "nm_matmul": lambda x, **o: nm_matmul(x, SPARSE, **o),
    "attention": lambda x, **o: attention(x, CACHE, CACHE, **o),
    "decode_attention": lambda x, **o: decode_attention(
        x[:, :1], CACHE, CACHE, jnp.array([9]), **o
    ),
}


def operand(name):
    return CACHE if "attention" in name else X


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("forced", ["mosaic_tpu", "mosaic_gpu"])
def test_reasons_of_all_kernels_are_told(name, forced):
    told = rf"{name} of .* '{forced}' does not fit \(mosaic_tpu: .*TPU.*; mosaic_gpu: .*\)"
    with pytest.raises(Unsupported, match=told):
        OPERATIONS[name](operand(name), implementation=forced)


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_that_kernels_lack_say_so(monkeypatch, name):
    monkeypatch.setattr(chips, "chip_of", lambda *_: chips.V5E)

    def loss(x):
        return jnp.sum(OPERATIONS[name](x, implementation="mosaic_tpu").astype(jnp.float32) ** 2)

    gradient = jax.grad(loss)
    if name != "decode_attention":  # It has none at all.
        assert jax.eval_shape(gradient, operand(name)).shape == operand(name).shape
        gradient = jax.grad(lambda x: jnp.sum(jax.grad(loss)(x).astype(jnp.float32)))
    with pytest.raises(Unsupported, match=f"{name} by mosaic_tpu has .*(xla|each expert)"):
        jax.eval_shape(gradient, operand(name))


@pytest.mark.parametrize("name", [n for n in OPERATIONS if not n.startswith("grouped")])
def test_xla_has_gradients_of_any_order(name):
    run = functools.partial(OPERATIONS[name], implementation="xla")
    twice = jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(run(x) ** 2))(x)))
    shape = operand(name).shape
    assert jax.eval_shape(twice, jax.ShapeDtypeStruct(shape, jnp.bfloat16)).shape == shape


def test_examples():
    assert not doctest.testmod(arguments).failed
