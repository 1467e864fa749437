"""Mixtures of experts without a reference implementation: routing, caches, checkpoints, errors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcomp import models
from jaxcomp.errors import ModelError
from jaxcomp.functional import functional, path_names
from jaxcomp.io import safetensors
from jaxcomp.models import Mixtral, MixtralConfig, generate
from jaxcomp.models.mixtral import SparseMLP
from tests.helpers import x64
from tests.models.helpers import tokens

TINY = MixtralConfig(
    64, 32, 24, 2, 4, 2, 8, num_experts=4, num_experts_per_tok=2, max_position_embeddings=32
)
JSON = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
QWEN = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_local_experts": ...,
    "num_experts": 4,
    "moe_intermediate_size": 24,
    "intermediate_size": 96,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(scope="module")
def mixtral():
    apply, params = functional(Mixtral(TINY, rngs=nnx.Rngs(0)))
    # The small random routers of a fresh model would find all experts alike.
    return jax.jit(apply), jax.tree.map(lambda a: a * 4 if a.ndim > 1 else a, params)


def write_folder(folder, params, **changes):
    values = {k: v for k, v in {**JSON, **changes}.items() if v is not ...}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    config, _ = models.read_config(folder)
    tensors = {k: np.asarray(v) for k, v in models.to_hf(params, config).items()}
    safetensors.write(folder / "model.safetensors", tensors, {"format": "pt"})
    return tensors


@pytest.mark.parametrize("normalize", [True, False])
def test_equals_all_experts_on_all_tokens(normalize):
    """Values and gradients, in float64; the last expert gets no token, the first almost all."""
    config = dataclasses.replace(TINY, norm_topk_prob=normalize)
    with x64():
        make = lambda: SparseMLP(config, 24, param_dtype=jnp.float64, rngs=nnx.Rngs(0))  # noqa: E731
        apply, params = functional(make())
        params = jax.tree.map(lambda a: a * 10, params)
        x = jax.random.normal(jax.random.key(1), (3, 5, 32), jnp.float64).at[..., 0].set(4)
        push = jnp.array([1.0, 0.0, 0.0, -30.0])
        params["router"]["kernel"] = params["router"]["kernel"].at[0].set(push)

        def dense(params, x):
            e = {name: p["kernel"] for name, p in params["experts"].items()}
            gate = jnp.einsum("bth,ehf->btef", x, e["gate_proj"])
            up = jnp.einsum("bth,ehf->btef", x, e["up_proj"])
            y = jnp.einsum("btef,efh->bteh", jax.nn.silu(gate) * up, e["down_proj"])
            p = jnp.exp(x @ params["router"]["kernel"])
            p = p / p.sum(-1, keepdims=True)
            p = jnp.where(p >= jnp.sort(p, -1)[..., -2:-1], p, 0)
            p = p / p.sum(-1, keepdims=True) if normalize else p
            return jnp.einsum("bteh,bte->bth", y, p)

        loss = lambda f: lambda *a: (f(*a) * jnp.sin(jnp.arange(32.0))).sum()  # noqa: E731
        got, want = (
            jax.jit(lambda *a, f=f: (f(*a), jax.grad(loss(f), (0, 1))(*a)))(params, x)
            for f in (apply, dense)
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), got, want
        )
        used = got[1][0]["experts"]["down_proj"]["kernel"].any((1, 2))
        assert used.tolist() == [True, True, True, False]


def test_generation_with_a_cache_equals_repeated_full_forward(mixtral):
    apply, params = mixtral
    x = tokens(2, 5)
    got = generate(apply, params, TINY, x, 4)
    full = jnp.pad(x, ((0, 0), (0, 4)))  # One shape, one compilation: later tokens are not seen.
    for i in range(5, 9):
        full = full.at[:, i].set(jnp.argmax(apply(params, full)[:, i - 1], -1))
    np.testing.assert_array_equal(got, full)
    assert len(set(np.asarray(got[:, 5:]).ravel().tolist())) > 2


def test_the_router_reads_float32_also_among_bfloat16_activations(mixtral):
    _, params = mixtral
    apply, _ = functional(Mixtral(TINY, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    jaxpr = jax.make_jaxpr(apply)(params, tokens(1, 3)).jaxpr
    experts = [e for e in jaxpr.eqns if e.primitive.name == "top_k"]
    assert len(experts) == 2 and all(e.invars[0].aval.dtype == jnp.float32 for e in experts)
    ragged = [e for e in jaxpr.eqns if e.primitive.name.startswith("ragged_dot")]
    assert len(ragged) == 6 and all(e.invars[0].aval.dtype == jnp.bfloat16 for e in ragged)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("changes", [{}, QWEN], ids=["mixtral", "qwen3_moe"])
def test_save_and_load_give_the_same_bytes(changes, scan, tmp_path):
    config = dataclasses.replace(TINY, model_type=changes.get("model_type", "mixtral"))
    config = dataclasses.replace(config, qk_norm=bool(changes))
    _, params = functional(Mixtral(config, rngs=nnx.Rngs(3)))
    tensors = write_folder(tmp_path / "a", params, **changes)
    model = models.load(tmp_path / "a", scan=scan)
    assert model.config == config
    if not scan:
        flat = path_names(params)
        for path, value in path_names(model.params).items():
            np.testing.assert_array_equal(value, flat[path], err_msg=path)
    models.save(tmp_path / "b", model.params, model.config, tmp_path / "a")
    again = safetensors.read_folder(tmp_path / "b")
    assert again.keys() == tensors.keys()
    for name, value in again.items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)


def test_narrower_experts_are_saved_and_loaded(tmp_path):
    """As the removal of neurons leaves them: in Qwen's config the width has a name of its own."""
    config = dataclasses.replace(TINY, model_type="qwen3_moe", qk_norm=True)
    write_folder(tmp_path / "a", functional(Mixtral(config, rngs=nnx.Rngs(0)))[1], **QWEN)
    slim = dataclasses.replace(config, intermediate_size=16)
    _, params = functional(Mixtral(slim, rngs=nnx.Rngs(0)))
    assert models.config_of(params, config) == slim
    models.save(tmp_path / "b", params, slim, tmp_path / "a")
    assert models.load(tmp_path / "b").config == slim


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("w1", None, r"1 tensors are missing.*experts\.2\.w1"),
        (
            "w2",
            np.zeros((32, 23), np.float32),
            r"experts\.2\.w2.*\(23, 32\).*differs from.*\.0\.w2",
        ),
        ("w3", np.zeros((24, 32), np.float16), r"experts\.2\.w3.*float16 differs from"),
    ],
)
def test_a_damaged_expert_is_refused(mixtral, tmp_path, name, value, message):
    tensors = write_folder(tmp_path, mixtral[1])
    name = f"model.layers.1.block_sparse_moe.experts.2.{name}.weight"
    tensors = {k: v for k, v in {**tensors, name: value}.items() if v is not None}
    safetensors.write(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(ModelError, match=message):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 5}, "'num_experts_per_tok': must be at most the 4 experts, got 5"),
        ({"num_experts": 4}, "'num_experts': is also given as num_local_experts"),
        ({"num_local_experts": ...}, "'num_local_experts': missing"),
        ({"norm_topk_prob": True}, "unknown field 'norm_topk_prob'"),
        ({**QWEN, "mlp_only_layers": [0]}, r"'mlp_only_layers': \[0\] makes some layers dense"),
        ({**QWEN, "decoder_sparse_step": 2}, "'decoder_sparse_step': 2 makes some layers dense"),
        ({**QWEN, "moe_intermediate_size": ...}, "'moe_intermediate_size': missing"),
    ],
)
def test_wrong_configurations_are_refused(changes, message, tmp_path):
    values = {k: v for k, v in {**JSON, **changes}.items() if v is not ...}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=message):
        models.read_config(tmp_path)
