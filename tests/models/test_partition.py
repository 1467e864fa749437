"""The usual shardings of the reference models: complete, and harmless to what they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import jaxcomp as jc
from jaxcomp.graph.trace import leaf_paths
from jaxcomp.models import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    Mixtral,
    MixtralConfig,
    build,
    partition_rules,
)
from jaxcomp.models.bert import Bert
from jaxcomp.models.gpt2 import GPT2
from jaxcomp.models.llama import Llama

LLAMA = LlamaConfig(64, 32, 64, 2, 4, 2, head_dim=8, qkv_bias=True, mlp_bias=True)
MODELS = {
    "llama": (Llama, LLAMA),
    "mixtral": (
        Mixtral,
        MixtralConfig(64, 32, 48, 2, 4, 2, head_dim=8, num_experts=4, num_experts_per_tok=2),
    ),
    "gpt2": (GPT2, GPT2Config(65, 16, 32, 2, 4, 64)),
    "bert": (Bert, BertConfig(65, 32, 64, 2, 4, max_position_embeddings=16)),
}


def mesh():
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    return jax.sharding.Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_every_matrix_is_split_over_the_whole_mesh(name, scan):
    _, config = MODELS[name]
    _, shapes = jc.functional(build(config, scan=scan))
    rules = partition_rules(config, fsdp="data", scan=scan)
    found = jc.sharding.shardings(shapes, rules, mesh())
    for path, sharding in leaf_paths(found)[0]:
        if path.endswith("router/kernel"):
            assert sharding.is_fully_replicated
        elif path.endswith("kernel"):
            assert set(sharding.spec) - {None} == {"data", "model"}, path


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_outputs_are_those_of_one_device(name, scan):
    make, config = MODELS[name]
    apply, params = jc.functional(make(config, scan=scan, rngs=nnx.Rngs(0)))
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    here = mesh()
    placed = jc.shard(params, here, partition_rules(config, fsdp="data", scan=scan))
    np.testing.assert_allclose(
        jax.jit(apply)(placed, tokens), jax.jit(apply)(params, tokens), rtol=2e-5, atol=2e-5
    )


def test_a_weight_that_the_mesh_does_not_divide():
    config = LlamaConfig(63, 32, 64, 2, 4, 2, head_dim=8)
    _, shapes = jc.functional(build(config))
    with pytest.raises(jc.JaxcompError, match=r"embed_tokens/embedding \(63, 32\): .*'model'"):
        jc.sharding.specs(shapes, partition_rules(config), mesh())
