"""Compressed parameters as shapes are those that compress makes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp import models
from jaxcomp.errors import RecipeError
from jaxcomp.formats import Codebook, Int
from jaxcomp.models import LlamaConfig
from jaxcomp.planner.abstract import compressed_shapes
from jaxcomp.pruning import SparseGPT, Wanda
from jaxcomp.quantization import AWQ, GPTQ, RTN, Binary, FakeQuant, LLMInt8, SmoothQuant, Ternary
from jaxcomp.recipe import Recipe
from jaxcomp.step import Activation

STATIC = Activation(granularity="tensor", dynamic=False, symmetric=False)
RECIPES = {
    "scales": Recipe(
        steps=(
            AWQ(format=Int(4, 16), include=("*/q_proj/*", "*/k_proj/*", "*/v_proj/*")),
            GPTQ(
                format=Int(4, 16), order="activation", static_groups=False, include=("*/o_proj/*",)
            ),
            SmoothQuant(include=("*/gate_proj/*",)),
            Wanda(n=2, m=4, include=("*/up_proj/*",)),
            RTN(format=Int(4, 16), include=("*/up_proj/*", "embed_tokens/*")),
            AWQ(format=Int(8, full_range=False), activation=STATIC, include=("*/down_proj/*",)),
        )
    ),
    "codes": Recipe(
        steps=(
            SparseGPT(sparsity=0.4, include=("*/q_proj/*",)),
            SparseGPT(n=2, m=4, format=Int(4, 16), include=("*/k_proj/*",)),
            Ternary(include=("*/v_proj/*",), group_size=16),
            Binary(include=("*/o_proj/*",)),
            RTN(
                format=Codebook(kind="nf4", group_size=16, double_quantization=True),
                include=("*/mlp/*",),
            ),
        )
    ),
}
TINY = LlamaConfig(48, 32, 64, 2, 4, 2, 8, max_position_embeddings=64)


@functools.cache
def tiny():
    apply, shapes = jc.functional(models.build(TINY, scan=True))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: jnp.asarray(0.3 * rng.standard_normal(a.shape), jnp.bfloat16), shapes
    )
    tokens = jnp.asarray(rng.integers(0, 48, (2, 16)), jnp.int32)
    return apply, params, tokens


def both(recipe):
    """What compress gives, and what is planned."""
    apply, params, tokens = tiny()
    result = jc.compress(apply, params, recipe, [(tokens,)], progress=False)
    return result.params, planned(recipe)


def planned(recipe, **options):
    apply, params, tokens = tiny()
    shapes = jax.eval_shape(lambda p: p, params)
    return compressed_shapes(jc.trace(apply, shapes, tokens), shapes, recipe, **options)


def check_same(params, planned):
    assert jax.tree.structure(planned) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(planned), jax.tree.leaves(params), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert jc.nbits(planned) == jc.nbits(params)


@pytest.mark.parametrize("name", RECIPES)
def test_shapes_are_those_that_compress_gives(name):
    check_same(*both(RECIPES[name]))


def test_llm_int8_with_as_many_outliers_as_there_are():
    recipe = Recipe(steps=(LLMInt8(threshold=0.5, include=("*/q_proj/*",)),))
    params, _ = both(recipe)
    (leaf,) = compressed(params)
    count = leaf.parts[1].indices.shape[-1]
    assert 0 < count < 32
    check_same(params, planned(recipe, outliers=count / 32))


def test_a_step_that_only_trains_is_an_error():
    apply, params, tokens = tiny()
    graph = jc.trace(apply, params, tokens)
    recipe = Recipe(steps=(FakeQuant(format=None, activation=Activation()),))
    with pytest.raises(RecipeError, match=r"layers/.*only trains.*such as\s+rtn"):
        compressed_shapes(graph, params, recipe)


def compressed(tree):
    leaves = jax.tree.leaves(tree, is_leaf=jc.formats.is_compressed)
    return [leaf for leaf in leaves if jc.formats.is_compressed(leaf)]
