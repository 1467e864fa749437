"""The door: what it refuses, what it chooses, and Flax's attention layers through it."""

import functools
import re

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxcomp.kernels import chips
from jaxcomp.kernels.implementations import Unsupported
from jaxcomp.kernels.sparse_attention import (
    attention,
    attention_fn,
    blocks,
    causal,
    chunked,
    decode_attention,
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
    (ValueError, r"span \(2,\) must .* heads of q \(2, 8, 4, 16\)", (Q, K, K), {"span": ones(2)}),
    (ValueError, "per_head has 3 masks", (Q, K, K), {"mask": per_head([causal()] * 3)}),
    (TypeError, r"mask is an array \(8, 12\); it takes a rule", (Q, K, K),
     {"mask": np.ones((8, 12))}),
    (TypeError, "mask is the function causal; call it", (Q, K, K), {"mask": causal}),
    (TypeError, r"mask is a list; use per_head", (Q, K, K), {"mask": [causal()] * 4}),
    (TypeError, "segment_ids is a list; it must be an array", (Q, K, K),
     {"segment_ids": [[0] * 8] * 2, "kv_segment_ids": jnp.zeros((2, 12), int)}),
    (ValueError, r"scale \(3,\) must be one number", (Q, K, K), {"scale": np.ones(3)}),
    (TypeError, "soft_cap is '3'; it must be a number", (Q, K, K), {"soft_cap": "3"}),
    (ValueError, "block_q is 64; it must be a multiple of 128", (Q, K, K), {"block_q": 64}),
    (ValueError, "block_k is '128'; it must be", (Q, K, K), {"block_k": "128"}),
    (ValueError, r"shape \(1, 2\) .* do not cover 8 queries and 12 keys; .* \(2, 3\)", (Q, K, K),
     {"mask": blocks(np.ones((1, 2)), 4) | window(2)}),
    (TypeError, "segment_ids is float32", (Q, K, K),
     {"segment_ids": ones(2, 8), "kv_segment_ids": ones(2, 12)}),
    (TypeError, "span is int32", (Q, K, K), {"span": jnp.ones(4, jnp.int32)}),
    (TypeError, "k_scale is int32", (Q, K.astype("int8"), K.astype("int8")),
     {"k_scale": SCALE.astype(int), "v_scale": SCALE}),
    (ValueError, "soft_cap is 0.0; it must be more than 0", (Q, K, K), {"soft_cap": 0}),
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


@pytest.mark.parametrize("rule", [full(), window(4, causal=True), causal() & chunked(5)])
def test_flax_decodes(rule):
    """A step is the row of its position, whatever the rule."""
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 9, 16)), jnp.float32)

    def layer(mask):
        f = attention_fn(mask)
        return nnx.MultiHeadAttention(2, 16, attention_fn=f, decode=False, rngs=nnx.Rngs(0))

    want = layer(rule & causal())(x)
    own = layer(rule)
    own.init_cache(x.shape)
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    got = jnp.concatenate([step(own, x[:, i : i + 1]) for i in range(9)], axis=1)
    cases.assert_close(got, want, "float32")


def test_linen_decodes_with_padding_on_the_left():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 6, 16)), jnp.float32)
    real = (jnp.arange(6) >= jnp.array([[0], [2]]))[:, None, None].astype(jnp.float32)
    own, plain = (
        flax.linen.MultiHeadDotProductAttention(2, decode=True, **options)
        for options in ({"attention_fn": attention_fn(causal())}, {})
    )
    both = []
    for layer in (own, plain):
        variables = layer.init(jax.random.key(0), x)
        for i in range(6):
            y, new = layer.apply(variables, x[:, i : i + 1], mask=real, mutable=["cache"])
            variables = {**variables, **new}
        both.append(y)
    cases.assert_close(*both, "float32")


def test_what_flax_asks_and_cannot_have_is_an_error():
    x = ones(1, 4, 2, 8)
    run = attention_fn(full())
    for message, options in {
        "takes no bias": {"bias": ones(1, 2, 4, 4)},
        "has no dropout": {"dropout_rate": 0.1},
        r"only as padding .* float32\(1, 1, 4, 4\), of queries by keys. If it is causal": {
            "mask": flax.linen.make_causal_mask(ones(1, 4))
        },
        "negative entries": {"mask": jnp.full((1, 1, 1, 4), -1e9)},
        "no weights to record": {"module": object()},
    }.items():
        with pytest.raises(ValueError, match=message):
            run(x, x, x, **options)
    with pytest.raises(TypeError, match="no option softcap"):
        attention_fn(full(), softcap=3.0)
    assert run(x, x, x, dropout_rate=0.1, deterministic=True).shape == x.shape
    np.testing.assert_allclose(run(x, x, x, is_causal=True), attention(x, x, x), rtol=1e-6)


ON_TPU = {"implementation": "mosaic_tpu", "interpret": True, "block_q": 128, "block_k": 128}


def test_a_scale_may_be_traced():
    """The kernel's result to the bit, and a gradient of its own."""
    q, k, v = map(jnp.asarray, cases.operands(4, queries=100, keys=100, heads=2, kv_heads=1))

    def loss(scale, q, **run):
        out = attention(q, k, v, scale=scale, soft_cap=2.0, **run)
        return (out**2).sum(), out

    traced = jax.jit(jax.value_and_grad(functools.partial(loss, **ON_TPU), (0, 1), has_aux=True))
    (_, out), gradients = traced(0.3, q)
    np.testing.assert_array_equal(out, loss(0.3, q, **ON_TPU)[1])
    wanted = jax.grad(functools.partial(loss, implementation="xla"), (0, 1), has_aux=True)(0.3, q)
    for got, want in zip(gradients, wanted[0], strict=True):
        cases.assert_close(got, want, "float32", cases.GRADIENT_TOLERANCE)


def test_numbers_that_a_kernel_has_as_constants_are_told(monkeypatch):
    """Traced, XLA takes them; asked for by name, the kernel says why it cannot."""
    monkeypatch.setattr(chips, "chip_of", lambda *_: chips.V5E)
    q, cache = ones(1, 1, 2, 128), ones(1, 256, 2, 128)

    def attend(cap, **options):
        return attention(cache, cache, cache, soft_cap=cap, **options)

    def decode(scale, **options):
        return decode_attention(q, cache, cache, jnp.array([9]), scale=scale, **options)

    for run, name in ((attend, "soft_cap"), (decode, "scale")):
        assert "mosaic_tpu: " + name in str(jax.make_jaxpr(run)(2.0))
        with pytest.raises(Unsupported, match=f"{name} must be a constant of its code"):
            jax.eval_shape(functools.partial(run, implementation="mosaic_tpu"), 2.0)
    ramp = functools.partial(attention, cache, cache, cache, implementation="mosaic_tpu")
    with pytest.raises(Unsupported, match="span_ramp must be"):
        jax.eval_shape(lambda x: ramp(span=ones(2), span_ramp=x), 2.0)
    assert jax.eval_shape(lambda x: ramp(span_ramp=x), 2.0).shape == cache.shape


def test_layers_that_a_cache_lacks_are_refused():
    cache = ones(2, 1, 8, 2, 16)
    q, lengths = ones(1, 1, 2, 16), jnp.array([4])
    with pytest.raises(ValueError, match=r"layer is 7, and the cache k \(2, .* has 2 layers: .* 1"):
        decode_attention(q, cache, cache, lengths, layer=7)
    with pytest.raises(TypeError, match=r"layer is 0\.5; it must be an integer"):
        decode_attention(q, cache, cache, lengths, layer=0.5)


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
