"""The Llama family without a reference implementation: caches, scanned layers, rope, sampling."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcomp import formats
from jaxcomp.errors import JaxcompError, ModelError
from jaxcomp.functional import functional
from jaxcomp.models import GPT2, Bert, BertConfig, GPT2Config, Llama, build, generate, layers
from jaxcomp.models.generate import sample
from jaxcomp.models.llama import rope_frequencies
from jaxcomp.quantization import rtn
from tests.helpers import x64
from tests.models.helpers import TINY, tokens

GPT = GPT2Config(64, 16, 32, 2, 4, 64)


@pytest.fixture(scope="module")
def llama():
    return jitted(Llama(TINY, rngs=nnx.Rngs(0)))


def jitted(model):
    apply, params = functional(model)
    return jax.jit(apply), params


def stack(params):
    """Parameters of the scanned model from those of the unrolled one."""
    layers = [params["layers"][str(i)] for i in range(TINY.num_hidden_layers)]
    return {**params, "layers": jax.tree.map(lambda *a: jnp.stack(a), *layers)}


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_equal_unrolled_ones(llama, remat):
    apply, params = llama
    scanned, template = jitted(Llama(TINY, scan=True, remat=remat, rngs=nnx.Rngs(1)))
    stacked = stack(params)
    assert jax.tree.map(jnp.shape, template) == jax.tree.map(jnp.shape, stacked)
    x = tokens(2, 9)
    np.testing.assert_allclose(scanned(stacked, x), apply(params, x), atol=1e-5)
    loss = lambda f: lambda p: (f(p, x) ** 2).mean()  # noqa: E731
    want = stack(jax.jit(jax.grad(loss(apply)))(params))
    got = jax.jit(jax.grad(loss(scanned)))(stacked)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def rounded(x):
    """The int8 code of each token and head, multiplied out."""
    scale = jnp.abs(x).max(-1, keepdims=True).astype(jnp.float32) / 127
    return jnp.round(x / scale) * scale


@pytest.mark.parametrize(("scan", "dtype"), [(False, None), (True, "int8")])
def test_cached_logits_equal_uncached_ones(scan, dtype, monkeypatch):
    """Those of int8 equal the uncached ones of a model whose keys and values are rounded."""
    x = tokens(2, 10)
    with x64():
        model = Llama(TINY, scan=scan, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(2))
        apply, params = jitted(model)
        cache, got = model.init_cache(2, 12, dtype), []
        for part in (x[:, :5], x[:, 5:6], x[:, 6:7], x[:, 7:]):
            logits, cache = apply(params, part, cache=cache)
            got.append(logits)
        if dtype:
            monkeypatch.setattr(layers, "named", lambda q, k, v: (q, rounded(k), rounded(v)))
        want = functional(model)[0](params, x)
    assert int(cache["length"]) == 10
    np.testing.assert_allclose(jnp.concatenate(got, 1), want, atol=1e-12)


@pytest.mark.parametrize("scan", [False, True])
def test_a_donated_cache_is_written_in_place(scan):
    config = dataclasses.replace(TINY, num_hidden_layers=8, sliding_windows=())
    model = Llama(config, scan=scan, rngs=nnx.Rngs(0))
    apply, params = functional(model)
    cache = jax.eval_shape(lambda: model.init_cache(1, 8192))
    step = jax.jit(lambda p, x, cache: apply(p, x, None, cache), donate_argnums=2)
    x = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    memory = step.lower(params, x, cache).compile().memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= size
    # What one layer reads, and scores of every query: not a copy of the cache.
    assert memory.temp_size_in_bytes < size / 2


def test_positions_on_several_devices_are_written_where_they_are():
    """A cache that is split along its length, under a mesh; a piece crosses a device's border."""
    model = Llama(TINY, scan=True, rngs=nnx.Rngs(2))
    x = tokens(2, 10)
    apply, params = functional(model)
    want = jax.jit(apply)(params, x)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding
    spec = jax.sharding.PartitionSpec
    cache = model.init_cache(2, 16)
    cache = {
        name: jax.device_put(a, place(mesh, spec(None, None, "model") if a.ndim else spec()))
        for name, a in cache.items()
    }
    params, x = jax.device_put((params, x), place(mesh, spec()))
    step, got = jax.jit(lambda p, x, cache: apply(p, x, None, cache)), []
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        for part in (x[:, :6], x[:, 6:7], x[:, 7:]):
            logits, cache = step(params, part, cache)
            got.append(logits)
        text = step.lower(params, x[:, :6], cache).compile().as_text()
    np.testing.assert_allclose(jnp.concatenate(got, 1), want, atol=1e-5)
    layers, heads, size = TINY.cache_shape
    assert f"f32[{layers},2,16,{heads},{size}]" not in text  # the cache of all devices


def test_a_token_sees_neither_later_ones_nor_those_beyond_the_window():
    config = dataclasses.replace(TINY, sliding_windows=(3,), num_hidden_layers=1)
    apply, params = jitted(Llama(config, rngs=nnx.Rngs(3)))
    x = tokens(1, 8)
    changed = x.at[0, 4].set((x[0, 4] + 1) % 64)
    differs = np.abs(np.asarray(apply(params, x) - apply(params, changed)))[0].max(-1) > 1e-6
    assert differs.tolist() == [False] * 4 + [True] * 3 + [False]


def test_llama3_rope_keeps_short_waves_and_stretches_long_ones():
    base = dataclasses.replace(TINY, head_dim=64, rope_theta=5e5)
    plain = rope_frequencies(base)
    scaled = rope_frequencies(
        dataclasses.replace(base, rope_scaling=("llama3", 8.0, 1.0, 4.0, 8192))
    )
    wavelength = 2 * math.pi / plain
    np.testing.assert_array_equal(scaled[wavelength < 2048], plain[wavelength < 2048])
    long = wavelength > 8192
    np.testing.assert_allclose(scaled[long], plain[long] / 8)
    between = ~long & (wavelength >= 2048)
    assert between.any() and np.all(scaled[between] < plain[between])
    assert np.all(scaled[between] > plain[between] / 8)


def test_positions_shift_does_not_change_logits(llama):
    # Rotary embedding depends on differences of positions only.
    apply, params = llama
    x = tokens(1, 6)
    positions = jnp.arange(6)[None]
    np.testing.assert_allclose(
        apply(params, x, positions), apply(params, x, positions + 11), atol=2e-5
    )


def test_bfloat16_weights_in_float32_activations(llama):
    apply, params = llama
    x = tokens(2, 5)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    again = jax.tree.map(lambda a: a.astype(jnp.float32), half)
    np.testing.assert_allclose(apply(half, x), apply(again, x), atol=1e-6)
    slim, _ = jitted(Llama(TINY, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    logits = slim(half, x)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, apply(params, x), atol=0.05)


def test_float64(llama):
    _, params = llama
    with x64():
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        apply, _ = functional(build(TINY, dtype=jnp.float64))
        logits = jax.jit(apply)(wide, np.asarray(tokens(1, 4)))
        assert logits.dtype == jnp.float64


def test_traces_at_the_size_of_llama_3_70b():
    config = dataclasses.replace(
        TINY,
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        sliding_windows=(),
        qkv_bias=False,
        qk_norm=False,
    )
    apply, params = functional(build(config, scan=True))
    assert sum(math.prod(p.shape) for p in jax.tree.leaves(params)) == 70_553_706_496
    out = jax.eval_shape(apply, params, jax.ShapeDtypeStruct((1, 16), jnp.int32))
    assert out.shape == (1, 16, 128256)


def test_generate_greedy_equals_repeated_full_forward(llama):
    apply, params = llama
    x = tokens(2, 4)
    got = generate(apply, params, TINY, x, 6)
    want = x
    for _ in range(6):
        padded = jnp.pad(want, ((0, 0), (0, 10 - want.shape[1])))  # One compilation for all.
        logits = apply(params, padded)[:, want.shape[1] - 1]
        want = jnp.concatenate([want, logits.argmax(-1)[:, None]], axis=1)
    np.testing.assert_array_equal(got, want)


def test_generate_stops_at_the_end_token(llama):
    apply, params = llama
    x = tokens(1, 4)
    free = np.asarray(generate(apply, params, TINY, x, 6))[0, 4:]
    end = int(free[2])
    first = int(np.argmax(free == end))
    stopped = np.asarray(generate(apply, params, TINY, x, 6, end_token=end))[0, 4:]
    np.testing.assert_array_equal(stopped[: first + 1], free[: first + 1])
    assert (stopped[first:] == end).all()


def test_generate_samples_reproducibly_from_a_key(llama):
    apply, params = llama
    x = tokens(2, 3)
    options = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "cache_dtype": "int8"}
    draw = lambda seed: generate(  # noqa: E731
        apply, params, TINY, x, 8, key=jax.random.key(seed), **options
    )
    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()


def test_generate_with_gpt2():
    apply, params = jitted(GPT2(GPT, rngs=nnx.Rngs(0)))
    x = tokens(1, 4)
    got = generate(apply, params, GPT, x, 3)
    logits = apply(params, got)
    np.testing.assert_array_equal(logits[0, 3:6].argmax(-1), got[0, 4:7])


def test_sample_frequencies_follow_the_truncated_distribution():
    probabilities = np.asarray([0.4, 0.3, 0.2, 0.1])
    logits = jnp.broadcast_to(jnp.log(probabilities), (20000, 4))

    def frequencies(**options):
        drawn = sample(logits, jax.random.key(0), **options)
        return np.bincount(drawn, minlength=4) / 20000

    five_sigma = 5 * 0.5 / math.sqrt(20000)
    np.testing.assert_allclose(frequencies(), probabilities, atol=five_sigma)
    np.testing.assert_allclose(frequencies(top_k=2), [4 / 7, 3 / 7, 0, 0], atol=five_sigma)
    # 0.4 + 0.3 is short of 0.75, so the third token is needed as well.
    np.testing.assert_allclose(frequencies(top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0], atol=five_sigma)
    squared = probabilities**2 / (probabilities**2).sum()
    np.testing.assert_allclose(frequencies(temperature=0.5), squared, atol=five_sigma)
    assert frequencies(temperature=0.0).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 29}, "exceed the model's 32 positions"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1, "temperature": 1.0}, "key="),
        ({"max_new_tokens": 1, "top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 1, "cache_dtype": "int4"}, "cache of int4 cannot be; use one of"),
    ],
)
def test_generate_refuses_what_it_cannot_do(llama, options, message):
    apply, params = llama
    with pytest.raises(JaxcompError, match=message):
        generate(apply, params, TINY, tokens(1, 4), **options)


def test_generate_refuses_an_encoder():
    config = BertConfig(64, 32, 48, 1, 4, max_position_embeddings=16)
    apply, params = functional(Bert(config, rngs=nnx.Rngs(0)))
    with pytest.raises(JaxcompError, match="no causal language model"):
        generate(apply, params, config, tokens(1, 4), 1)


@pytest.mark.parametrize(
    "model",
    [
        GPT2(GPT, rngs=nnx.Rngs(0)),
        Bert(BertConfig(64, 32, 48, 1, 4, max_position_embeddings=16), rngs=nnx.Rngs(0)),
    ],
    ids=["gpt2", "bert"],
)
def test_sequences_beyond_learned_positions_are_refused(model):
    with pytest.raises(ModelError, match="the model has 16"):
        model(tokens(1, 17))


@pytest.mark.parametrize("scan", [False, True])
def test_compressed_weights_stand_in_for_dense_ones(scan):
    apply, params = jitted(Llama(TINY, scan=scan, rngs=nnx.Rngs(0)))

    def compress(path, leaf):
        name = "/".join(str(key.key) for key in path)
        if not name.endswith("kernel"):
            return leaf
        axes = ((0,) if scan and name.startswith("layers") else (), (leaf.ndim - 1,))
        axes += ((leaf.ndim - 2,),)
        part = rtn(formats.to_matrix(leaf, *axes), formats.Int(8))
        return formats.CompressedArray.from_matrix(part.parts, leaf.shape, leaf.dtype, *axes)

    compressed = jax.tree_util.tree_map_with_path(compress, params)
    x = tokens(2, 6)
    got = apply(compressed, x)
    np.testing.assert_allclose(got, apply(formats.materialize(compressed), x), atol=1e-6)
    error = np.abs(np.asarray(got - apply(params, x))).max()
    assert 0 < error < 0.02
