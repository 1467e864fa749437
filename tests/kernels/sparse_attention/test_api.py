"""The door: what it refuses, what it chooses, and Flax's attention layers through it."""

import re

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxcomp.kernels.implementations import Unsupported
from jaxcomp.kernels.sparse_attention import (
    attention,
    attention_fn,
    blocks,
    causal,
    full,
    per_head,
    window,
)

from tests.kernels.sparse_attention import cases


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


Q, K = ones(2, 8, 4, 16), ones(2, 12, 2, 16)
SCALE = ones(2, 12, 2)
REFUSED = [
    (ValueError, r"q \(2, 8, 4, 16\), k \(12, 2, 16\)", (Q, K[0], K), {}),
    (ValueError, "agree in batch and head_dim", (Q, ones(2, 12, 2, 8), K), {}),
    (ValueError, "multiple of key heads", (Q, ones(2, 12, 3, 16), ones(2, 12, 3, 16)), {}),
    (ValueError, "no axis may be empty", (Q[:, :0], K, K), {}),
    (TypeError, "k is bfloat16 and q float32", (Q, K.astype("bfloat16"), K), {}),
    (TypeError, "k_scale is for k of int8", (Q, K, K), {"k_scale": SCALE, "v_scale": SCALE}),
    (ValueError, "both, or neither", (Q, K.astype("int8"), K), {"k_scale": SCALE}),
    (TypeError, "q is int8", (Q.astype("int8"), K, K), {}),
    (ValueError, r"k_scale \(2, 12\) must be", (Q, K.astype("int8"), K.astype("int8")),
     {"k_scale": SCALE[..., 0], "v_scale": SCALE}),
    (ValueError, r"kv_segment_ids \(2, 8\) must be \(batch, length\) = \(2, 12\)", (Q, K, K),
     {"segment_ids": jnp.zeros((2, 8), int)}),
    (ValueError, "without segment_ids", (Q, K, K), {"kv_segment_ids": jnp.zeros((2, 12), int)}),
    (ValueError, r"span \(2,\) must be one number", (Q, K, K), {"span": ones(2)}),
    (ValueError, "per_head has 3 masks", (Q, K, K), {"mask": per_head([causal()] * 3)}),
    (TypeError, "mask is a ndarray", (Q, K, K), {"mask": np.ones((8, 12))}),
    (ValueError, "block_q is 64; it must be a multiple of 128", (Q, K, K), {"block_q": 64}),
    (ValueError, "block_k is '128'; it must be", (Q, K, K), {"block_k": "128"}),
    (ValueError, r"shape \(1, 2\) .* do not cover 8 queries and 12 keys; .* \(2, 3\)", (Q, K, K),
     {"mask": blocks(np.ones((1, 2)), 4) | window(2)}),
    (TypeError, "segment_ids is float32", (Q, K, K),
     {"segment_ids": ones(2, 8), "kv_segment_ids": ones(2, 12)}),
    (TypeError, "span is int32", (Q, K, K), {"span": jnp.ones(4, jnp.int32)}),
    (TypeError, "k_scale is int32", (Q, K.astype("int8"), K.astype("int8")),
     {"k_scale": SCALE.astype(int), "v_scale": SCALE}),
    (ValueError, "soft_cap is 0; it must be more than 0", (Q, K, K), {"soft_cap": 0}),
    (ValueError, "span_ramp is -1.0", (Q, K, K), {"span": ones(4), "span_ramp": -1.0}),
    (ValueError, "implementation 'cuda' is unknown", (Q, K, K), {"implementation": "cuda"}),
    (Unsupported, "it runs on TPU, not on cpu", (Q, K, K), {"implementation": "mosaic_tpu"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "operands", "options"), REFUSED)
def test_wrong_operands_are_refused(error, message, operands, options):
    with pytest.raises(error, match=message):
        attention(*operands, **options)
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda *x: attention(*x, **options), *operands)


def test_causal_is_the_default_and_masks_are_static():
    q, k, v = (jnp.asarray(x) for x in cases.operands(0, queries=40, keys=40))
    jitted = jax.jit(attention, static_argnums=3)
    np.testing.assert_array_equal(attention(q, k, v), attention(q, k, v, causal()))
    cases.assert_close(jitted(q, k, v, window(9)), attention(q, k, v, window(9)), "float32")


def test_vmap_and_a_batch_are_one():
    q, k, v = (jnp.asarray(x) for x in cases.operands(1, batch=3, queries=260, keys=260))
    each = jax.vmap(lambda *x: attention(*(a[None] for a in x), window(64))[0])(q, k, v)
    cases.assert_close(each, attention(q, k, v, window(64)), "float32")


@pytest.mark.parametrize("length", [20, 300])
def test_nnx_layer(length):
    layers = [
        nnx.MultiHeadAttention(2, 16, attention_fn=f, decode=False, rngs=nnx.Rngs(0))
        for f in (attention_fn(window(12)), nnx.dot_product_attention)
    ]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, length, 16)), jnp.float32)
    allowed = jnp.asarray(window(12).block(0, length, 0, length))
    want = layers[1](x, mask=allowed[None, None])
    cases.assert_close(layers[0](x), want, "float32")


def test_linen_layer_with_padding():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 10, 16)), jnp.float32)
    real = (jnp.arange(10) < jnp.array([[10], [6]]))[:, None, None]
    own = flax.linen.MultiHeadDotProductAttention(2, attention_fn=attention_fn())
    plain = flax.linen.MultiHeadDotProductAttention(2)
    variables = plain.init(jax.random.key(0), x)
    got, want = (layer.apply(variables, x, mask=real) for layer in (own, plain))
    cases.assert_close(got, want, "float32")


def test_what_flax_asks_and_cannot_have_is_an_error():
    x = ones(1, 4, 2, 8)
    run = attention_fn(full())
    for message, options in {
        "takes no bias": {"bias": ones(1, 2, 4, 4)},
        "has no dropout": {"dropout_rate": 0.1},
        "only as padding": {"mask": jnp.ones((1, 1, 4, 4), bool)},
        "no weights to record": {"module": object()},
    }.items():
        with pytest.raises(ValueError, match=message):
            run(x, x, x, **options)
    with pytest.raises(TypeError, match="no option softcap"):
        attention_fn(full(), softcap=3.0)
    assert run(x, x, x, dropout_rate=0.1, deterministic=True).shape == x.shape
    np.testing.assert_allclose(run(x, x, x, is_causal=True), attention(x, x, x), rtol=1e-6)


def test_on_a_mesh_of_several_devices_the_kernel_says_why_it_cannot_run():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.device_put(jnp.ones((1, 128, 2, 64)), place)
    with pytest.raises(Unsupported, match=r"several devices; .* jax.shard_map"):
        attention(x, x, x, implementation="mosaic_tpu", interpret=True)


def test_on_a_mesh_of_auto_axes_xla_splits_sequences_and_heads():
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None, "y"))
    q, k, v = (jnp.asarray(x) for x in cases.operands(0, 2, 500, 500, 4, 2))
    mask = window(64) | blocks(np.eye(4), 128)
    want = attention(q, k, v, mask)
    split = [jax.device_put(x, place) for x in (q, k, v)]
    run = jax.jit(lambda *x: attention(*x, mask)).lower(*split).compile()
    cases.assert_close(run(*split), want, "float32")
    gradient = jax.jit(jax.grad(lambda *x: attention(*x, mask).sum(), (0, 1, 2)))
    for program in (run, gradient.lower(*split).compile()):
        assert not re.search(r"all-gather|all-reduce|all-to-all|permute", program.as_text())
