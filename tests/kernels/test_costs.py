"""What kernels tell XLA that they cost, by hand: it would count all operands, and once."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jaxcomp.kernels import sparse_matmul
from jaxcomp.kernels.sparse_attention import attention, causal
from jaxcomp.kernels.sparse_matmul import layer_of, prepare_nm

from tests.kernels.sparse_matmul import cases


def costs(function, *arguments):
    """The estimates of all kernels in a function, by name."""
    found = {}

    def look(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "pallas_call":
                found[str(eqn.params["name"])] = eqn.params["cost_estimate"]
            for inner in jaxprs_in_params(eqn.params):
                look(inner)

    look(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


def test_attention_reads_keys_for_each_block_of_queries():
    """Four blocks of 512 by 512, of which three are computed, of four heads that share two keys."""
    q, k = (jax.ShapeDtypeStruct((2, 1024, heads, 128), jnp.bfloat16) for heads in (4, 2))

    def loss(q, k):
        options = {"implementation": "mosaic_tpu", "interpret": cases.INTERPRET}
        return attention(q, k, k, causal(), block_q=512, block_k=512, **options).sum()

    found = costs(jax.grad(loss, (0, 1)), q, k)
    pairs, head, numbers = 2 * 4 * 3 * 512**2, 1024 * 128 * 2, 1024 * 4
    products = {"forward": 2, "dq": 3, "dkv": 4}
    assert found.keys() == {f"sparse_attention_{name}" for name in products}
    for name, cost in found.items():
        assert cost.flops == 2 * pairs * 128 * products[name.removeprefix("sparse_attention_")]
        assert cost.transcendentals == pairs
    # q, outputs, log-sum-exps; keys and values of each block that two heads compute together.
    step = 2 * 512 * 128 * 2
    assert found["sparse_attention_forward"].bytes_accessed == (
        2 * (4 * (2 * head + numbers) + 2 * 3 * step)
    )


def test_sparse_weights_cost_those_of_one_layer():
    rng = np.random.default_rng(0)
    options = {"implementation": "mosaic_tpu", "interpret": cases.INTERPRET}
    two, _ = cases.nm(rng, (128, 512), dtype="int4", group_size=128)
    some, _ = cases.blocks(rng, (256, 384), (128, 128), [[1, 1, 0], [0, 1, 0]])
    for weight, call, flops, stored in (
        (prepare_nm(two, "v5e"), sparse_matmul.nm_matmul, 128 * 512, 128 * (256 // 2 + 64 + 16)),
        (some, sparse_matmul.block_sparse_matmul, 3 * 128**2, 3 * 128**2 * 4),
    ):
        many = jax.tree.map(lambda a: jnp.stack([a] * 4), weight)
        for rows in (16, 200):
            x = jnp.ones((rows, weight.shape[1]))
            for one in (weight, layer_of(many, 2)):
                (cost,) = costs(lambda x, w, call=call: call(x, w, **options), x, one).values()
                assert cost.flops == 2 * rows * flops
                assert cost.bytes_accessed == stored + rows * 4 * sum(weight.shape)
