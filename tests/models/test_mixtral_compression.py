"""Mixtures of experts compressed: each expert on its own tokens, routers left dense."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcomp as jc
from jaxcomp.formats import CompressedArray, Int
from jaxcomp.functional import path_names
from jaxcomp.models import Mixtral, MixtralConfig, attention, layers
from jaxcomp.models.llama import rope_frequencies
from jaxcomp.quantization import GPTQ, RTN, gptq, rtn
from jaxcomp.recipe import Recipe
from tests import tiny
from tests.test_cli import SMALL, _json

INT4 = Int(4, group_size=16)
CONFIG = MixtralConfig(64, 32, 48, 2, 4, 2, 8, num_experts=3, max_position_embeddings=16)
BATCHES = [(np.random.default_rng(i).integers(0, 64, (4, 16)).astype(np.int32),) for i in range(2)]
ROUTERS = ("*lm_head*", "*mlp/router*")


def make(config=CONFIG):
    module = Mixtral(config, rngs=nnx.Rngs(0))
    # The routers of a fresh model find all experts alike.
    nnx.update(module, jax.tree.map(lambda a: a * 4 if a.ndim > 1 else a, nnx.state(module)))
    return module


def experts_inputs(module, tokens):
    """What the experts of the first layer read: for each expert, its tokens."""
    layer, order = module.layers[0], jnp.arange(tokens.shape[1])[None]
    x = module.embed_tokens(tokens, jnp.float32)
    rope = layers.rotary(jnp.broadcast_to(order, tokens.shape), rope_frequencies(CONFIG))
    attend = functools.partial(attention.attend, order=order)
    x = x + layer.self_attn(layer.input_layernorm(x), rope, attend)[0]
    x = layer.post_attention_layernorm(x).reshape(-1, CONFIG.hidden_size)
    chosen = np.argsort(-np.asarray(x @ layer.mlp.router.kernel[...]), -1)[:, :2]
    return [x[(chosen == e).any(-1)] for e in range(CONFIG.num_experts)]


def test_gptq_sees_each_expert_on_its_own_tokens():
    module = make(dataclasses.replace(CONFIG, num_hidden_layers=1))
    apply, params = jc.functional(module)
    include = ("*mlp/experts*",)
    packed, nearest = (
        jc.compress(apply, params, Recipe(steps=(step,)), BATCHES).params["layers"]["0"]["mlp"]
        for step in (GPTQ(format=INT4, include=include), RTN(format=INT4, include=include))
    )
    seen = [experts_inputs(module, jnp.asarray(tokens)) for (tokens,) in BATCHES]
    for name in ("gate_proj", "up_proj"):
        w = params["layers"]["0"]["mlp"]["experts"][name]["kernel"]
        got, rounded = (p["experts"][name]["kernel"].materialize() for p in (packed, nearest))
        for e in range(CONFIG.num_experts):
            x = jnp.concatenate([batch[e] for batch in seen])
            assert 32 < len(x) < 128  # Enough for a full rank, and not all tokens.
            expected = gptq(w[e].T, x.T @ x, INT4).materialize().T
            # A value at the border of two integers may fall to either side.
            assert np.mean(np.abs(got[e] - expected) > 1e-5) < 0.01
            np.testing.assert_allclose(rounded[e], rtn(w[e].T, INT4).materialize().T, atol=1e-6)
            off = [jnp.linalg.norm(x @ (q[e] - w[e])) for q in (got, rounded)]
            assert off[0] < 0.95 * off[1]


def test_routers_stay_dense_scanned_equals_unrolled_and_dispatch_equals_materialize():
    apply, params = jc.functional(make())
    recipe = Recipe(steps=(GPTQ(format=INT4, exclude=ROUTERS),))
    result = jc.compress(apply, params, recipe, BATCHES)
    flat = path_names(jc.materialize(result.params))
    for path, leaf in path_names(params).items():
        if "router" in path or "lm_head" in path:
            np.testing.assert_array_equal(flat[path], leaf)
    kinds = {row.path: row.format for row in result.report.rows}
    assert sum("experts" in path for path in kinds) == 6 and not any("router" in p for p in kinds)

    tokens = BATCHES[0][0]
    want = jax.jit(apply)(jc.materialize(result.params), tokens)
    got = jax.jit(jc.dispatch(apply))(result.params, tokens)
    np.testing.assert_allclose(got, want, atol=1e-4)

    scanned, _ = jc.functional(Mixtral(CONFIG, scan=True, rngs=nnx.Rngs(1)))
    stack = lambda p: {  # noqa: E731
        **p,
        "layers": jax.tree.map(lambda *a: jnp.stack(a), *(p["layers"][i] for i in "01")),
    }
    again = jc.compress(scanned, stack(params), recipe, BATCHES)
    leaf = again.params["layers"]["mlp"]["experts"]["down_proj"]["kernel"]
    assert isinstance(leaf, CompressedArray) and leaf.shape == (2, 3, 48, 32)
    pairs = zip(
        *(
            path_names(p).items()
            for p in (jc.materialize(again.params), stack(jc.materialize(result.params)))
        ),
        strict=True,
    )
    for (path, a), (other, b) in pairs:
        assert path == other and np.mean(np.abs(a - b) > 1e-5) < 0.02, path
    np.testing.assert_allclose(
        jax.jit(jc.dispatch(scanned))(again.params, tokens),
        jax.jit(scanned)(jc.materialize(again.params), tokens),
        atol=1e-4,
    )


def test_command_line(tmp_path, capsys):
    folder = tiny.make(
        tmp_path / "model",
        architectures=["MixtralForCausalLM"],
        model_type="mixtral",
        num_hidden_layers=1,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    text = tiny.text(tmp_path / "text.txt", words=300)
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
    jc.presets.w4a16_gptq(group_size=16).dump(recipe)
    arguments = ["compress", folder, "--recipe", recipe, "--output", output]
    _json(capsys, *arguments, "--calibration", text, *SMALL)
    rows = _json(capsys, "inspect", output)["rows"]
    assert len(rows) == 7 and not any("router" in str(row) for row in rows)
    packed = _json(capsys, "evaluate", output, "--text", text, *SMALL, "--reference", folder)
    assert packed["kl"] > 0
    _json(capsys, "export", output, "--output", tmp_path / "dense")
    dense = _json(capsys, "evaluate", tmp_path / "dense", "--text", text, *SMALL)
    assert dense["perplexity"] == pytest.approx(packed["perplexity"], rel=1e-4)
