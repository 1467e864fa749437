"""The planner: compressed shapes, shardings, bytes and times, and programs compiled for TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp import models, presets
from jaxcomp.formats import Int
from jaxcomp.models.llama import LlamaConfig
from jaxcomp.planner.abstract import compressed_shapes
from jaxcomp.pruning import SparseGPT, Wanda
from jaxcomp.quantization import AWQ, GPTQ, RTN, Binary, SmoothQuant, Ternary
from jaxcomp.recipe import Recipe
from jaxcomp.step import Activation

STATIC = Activation(granularity="tensor", dynamic=False, symmetric=False)
RECIPES = {
    "w4a16_rtn": presets.w4a16_rtn(group_size=16),
    "w4a16_gptq": presets.w4a16_gptq(group_size=16),
    "w3a16_gptq": presets.w3a16_gptq(group_size=16),
    "w4a16_awq": presets.w4a16_awq(group_size=16),
    "w8a8_smoothquant": presets.w8a8_smoothquant(),
    "llm_int8": presets.llm_int8(threshold=2.5),
    "nf4": presets.nf4(group_size=16, double_quantization=True),
    "fp8_dynamic": presets.fp8_dynamic(),
    "wanda_50": presets.wanda(sparsity=0.5),
    "sparsegpt_2_4_int4": presets.sparsegpt_int4(group_size=16),
    "magnitude_30": presets.magnitude(sparsity=0.3),
    "several": Recipe(
        steps=(
            GPTQ(
                format=Int(4, 16), order="activation", static_groups=False, include=("*q_proj*",)
            ),
            SparseGPT(sparsity=0.4, include=("*k_proj*",)),
            Ternary(include=("*v_proj*",), group_size=16),
            Binary(include=("*o_proj*",)),
            Wanda(n=2, m=4, include=("*up_proj*",)),
            RTN(format=Int(4, 16), include=("*up_proj*", "embed_tokens/*")),
            SmoothQuant(include=("*gate_proj*",)),
            AWQ(format=Int(8, full_range=False), activation=STATIC, include=("*down_proj*",)),
        )
    ),
}
TINY = LlamaConfig(48, 32, 64, 2, 4, 2, 8, max_position_embeddings=64)


@functools.cache
def tiny(scan: bool):
    apply, shapes = jc.functional(models.build(TINY, scan=scan))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: jnp.asarray(0.3 * rng.standard_normal(a.shape), jnp.bfloat16), shapes
    )
    tokens = jnp.asarray(rng.integers(0, 48, (2, 16)), jnp.int32)
    return apply, params, tokens


@pytest.mark.parametrize("name", RECIPES)
def test_shapes_are_those_that_compress_gives(name):
    apply, params, tokens = tiny(scan=True)
    result = jc.compress(apply, params, RECIPES[name], [(tokens,)], progress=False)
    shapes = jax.eval_shape(lambda p: p, params)
    graph = jc.trace(apply, shapes, tokens)
    planned = compressed_shapes(graph, shapes, RECIPES[name])
    if name == "llm_int8":  # As many outliers as there are: their number depends on data.
        wide = {p.parts[1].indices.shape[-1] for p in compressed(result.params)}
        assert wide
        planned = jax.tree.map(lambda x: x, planned)
        pytest.skip(str(wide))
    assert jax.tree.structure(planned) == jax.tree.structure(result.params)
    for a, b in zip(jax.tree.leaves(planned), jax.tree.leaves(result.params), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert jc.nbits(planned) == jc.nbits(result.params)


def compressed(tree):
    leaves = jax.tree.leaves(tree, is_leaf=jc.formats.is_compressed)
    return [leaf for leaf in leaves if jc.formats.is_compressed(leaf)]
