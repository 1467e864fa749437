"""Key-value caches of int8 and fp8 codes, and decoding on the kernel that reads them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from jaxcomp.kernels import chips

from jaxcomp.errors import JaxcompError, ModelError
from jaxcomp.functional import functional
from jaxcomp.models import Llama, generate, partition_rules
from jaxcomp.models.cache import CODES, LayerCache, encoded, init_cache
from jaxcomp.sharding import shard
from tests.helpers import x64
from tests.models.helpers import TINY, tokens

# Half a step of a code: of the scale for integers; for fp8 of the value itself, by its mantissa,
# and of the scale where values are subnormal.
HALF = {"int8": (0, 0.5), "float8_e4m3fn": (2**-4, 2**-10), "float8_e5m2": (2**-3, 2**-17)}


def errors(x, scale, dtype):
    """Bounds of what is lost, with the rounding of the scale and of the quotient to float32."""
    of_value, of_scale = HALF[dtype]
    lost = of_value * np.abs(x) + of_scale * np.asarray(scale)[..., None]
    return lost + 4 * np.finfo(np.float32).eps * np.abs(x)


@pytest.mark.parametrize("dtype", CODES)
def test_codes_are_off_by_half_a_step(dtype):
    x = np.random.default_rng(0).normal(size=(5, 3, 16)).astype(np.float32)
    x[0], x[1], x[2, 0, 0], x[3] = 0, 2.0, 1e4, x[3] * 1e-30
    codes, scale = encoded(jnp.asarray(x), dtype)
    assert codes.dtype == dtype and codes.shape == x.shape
    assert scale.dtype == jnp.float32 and (scale[0] == 1).all()
    back = np.asarray(codes, np.float64) * np.asarray(scale, np.float64)[..., None]
    assert (np.abs(back - x) <= errors(x, scale, dtype)).all()


@pytest.mark.parametrize("dtype", CODES)
def test_attention_is_off_by_what_the_codes_lose(dtype):
    """Scores off by e make weights off by a factor of exp(2 e) at most."""
    rng = np.random.default_rng(1)
    k, v = rng.normal(size=(2, 1, 6, 2, 8))
    q = rng.normal(size=(1, 1, 4, 8))
    with x64():
        cache = init_cache((2, 2, 8), 1, 9, dtype)
        length = cache.pop("length")
        filled = LayerCache(cache, length, 1)
        filled = filled.append(filled.entries(jnp.asarray(k), jnp.asarray(v)))
        scales = {name: filled.arrays[f"{name}_scale"][1, :, :6] for name in "kv"}
        got = np.asarray(filled._replace(length=jnp.int32(5)).attend(jnp.asarray(q), 2))
    lost_k, lost_v = (errors(x, scales[name], dtype) for name, x in (("k", k), ("v", v)))
    for head in range(4):
        one, of = q[0, 0, head], head // 2
        scores = k[0, :, of] @ one / 8**0.5
        off = (lost_k[0, :, of] @ np.abs(one) / 8**0.5).max()
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        expected, magnitude = weights @ v[0, :, of], weights @ np.abs(v[0, :, of])
        bound = np.expm1(2 * off) * magnitude + lost_v[0, :, of].max(0)
        assert (np.abs(got[0, 0, head] - expected) <= bound).all()


def test_dtypes_that_no_cache_has_are_refused():
    for dtype in ("int4", jnp.int32, "fp8", bool):
        with pytest.raises(ModelError, match=r"use one of float32, .* smaller one int8"):
            init_cache((1, 1, 8), 1, 1, dtype)


def mesh_of_four():
    return jax.make_mesh((1, 2, 2), ("data", "length", "model"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_generation_with_a_cache_that_is_split(dtype):
    """11 positions are no multiple of two: the cache has one more."""
    apply, params = functional(Llama(TINY, scan=True, rngs=nnx.Rngs(0)))
    prompt = tokens(4, 5)
    expected = generate(apply, params, TINY, prompt, 6, cache_dtype=dtype)
    rules = partition_rules(TINY, tensor=("model", "length"), scan=True)
    split = shard(params, mesh_of_four(), rules)
    spec = PartitionSpec("data", "length", "model")
    got = generate(apply, split, TINY, prompt, 6, cache_dtype=dtype, cache_spec=spec)
    np.testing.assert_array_equal(got, expected)


def test_a_split_cache_has_no_whole_copy_and_says_what_cannot_be_split():
    spec = PartitionSpec("data", None, "model")
    with jax.set_mesh(mesh_of_four()):
        cache = init_cache((3, 4, 8), 2, 6, "int8", spec)
        for name in ("k", "v_scale"):
            assert cache[name].sharding.spec == PartitionSpec(None, *spec)
            assert cache[name].addressable_shards[0].data.shape[:4] == (3, 2, 6, 2)
        with pytest.raises(JaxcompError, match=r"\(3, 2, 6, 3\): .* 'model' of 2 .* axis 3 of 3"):
            init_cache((3, 3, 8), 2, 6, "int8", spec)
        with pytest.raises(JaxcompError, match="names the mesh axis 'x'"):
            init_cache((3, 4, 8), 2, 6, spec=PartitionSpec("x"))
    with pytest.raises(ModelError, match=r"under jax.set_mesh\(mesh\)"):
        init_cache((3, 4, 8), 2, 6, spec=spec)


def test_decoding_is_on_the_kernel_of_a_tpu(monkeypatch):
    """One for each window of the layers in the loop; a prompt is not, and nothing is on a CPU."""
    config = dataclasses.replace(TINY, head_dim=128, qk_norm=False)
    model = Llama(config, scan=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    apply, params = functional(model)
    step = jax.jit(lambda p, x, cache: apply(p, x, None, cache))

    def kernels(length, dtype, spec=None):
        lowered = step.trace(params, tokens(2, length), model.init_cache(2, 256, dtype, spec))
        text = lowered.lower(lowering_platforms=("tpu",)).as_text()
        step.clear_cache()
        return text.count('kernel_name = "sparse_attention_decode"')

    assert kernels(1, "int8") == 0
    monkeypatch.setattr(chips, "chip_of", lambda *_: chips.V5E)
    assert kernels(1, "int8") == kernels(1, None) == 2
    assert kernels(4, "int8") == 0
    # On a mesh each device runs it on its part of the cache, if it is known.
    with jax.set_mesh(mesh_of_four()):
        assert kernels(1, "int8") == 0
        assert kernels(1, "int8", PartitionSpec("data", "length", "model")) == 2
