"""Models whose layers differ in size: saved, loaded, run and generated from."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxcomp import models, pruning
from jaxcomp.errors import ModelError
from jaxcomp.functional import functional, path_names
from jaxcomp.io import safetensors
from tests.models.helpers import tokens, write_folder

TOKENS = tokens(2, 6)
BERT = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
}
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 64,
    "n_positions": 16,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_inner": 20,
}
# Consumers of heads and neurons, input channels of one head.
UNITS = {
    "llama": ("*o_proj/kernel", "*down_proj/kernel", 16),
    "bert": ("*attention_output/kernel", "*/output/kernel", 8),
    "gpt2": ("*attn/c_proj/kernel", "*mlp/c_proj/kernel", 8),
}


def folder_of(folder, name):
    """A folder with a random model."""
    if name == "llama":
        return write_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(BERT if name == "bert" else GPT2))
    config, _ = models.read_config(folder)
    safetensors.write(folder / "model.safetensors", models.to_hf(random(config), config))
    return folder


def random(config):
    """Random weights of a configuration, large enough that all of them matter."""
    _, shapes = functional(models.build(config))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.float32(0.3 * rng.normal(size=leaf.shape)), shapes)


def pruned(model, keep):
    """The masked and the physically removed weights; ``keep(i, count)`` units of layer ``i``."""
    heads, neurons, size = UNITS[model.name]
    groups = pruning.units(
        model.apply, model.params, TOKENS, include=heads, kind="head", size=size
    ) + pruning.units(model.apply, model.params, TOKENS, include=neurons)
    masks = {}
    for group in groups:
        layer = int(group.name.split("/")[1])
        masks[group.name] = np.arange(group.count) >= group.count - keep(layer, group.count)
    masked = pruning.apply_masks(model.params, groups, masks)
    return masked, pruning.remove(model.params, groups, masks)


@pytest.mark.parametrize("name", UNITS)
def test_an_uneven_model_is_saved_and_loaded_bit_for_bit(tmp_path, name):
    model = models.load(folder_of(tmp_path / "a", name))
    masked, small = pruned(model, lambda i, n: n - 1 if i else n // 2)
    config = models.config_of(small, model.config)
    models.save(tmp_path / "b", small, config, tmp_path / "a")
    again = models.load(tmp_path / "b")
    assert again.config == config != model.config
    for path, value in path_names(small).items():
        np.testing.assert_array_equal(path_names(again.params)[path], value)
    out = jax.jit(model.apply)(small, TOKENS)
    np.testing.assert_array_equal(jax.jit(again.apply)(again.params, TOKENS), out)
    np.testing.assert_allclose(out, jax.jit(model.apply)(masked, TOKENS), atol=2e-6, rtol=2e-5)
    # A second round of pruning starts from the folder, and ends in one without the lists' traces.
    models.save(tmp_path / "c", model.params, model.config, tmp_path / "b")
    assert models.read_config(tmp_path / "c")[0] == model.config
    fields = json.loads((tmp_path / "c" / "config.json").read_text())
    assert not {"heads_per_layer", "intermediate_sizes"} & set(fields)
    with pytest.raises(
        ModelError, match=r"layers of different sizes cannot be stacked.*scan=False"
    ):
        models.load(tmp_path / "b", scan=True)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_uneven_models_generate_with_a_cache(tmp_path, name):
    like = folder_of(tmp_path / "a", name)
    config, _ = models.read_config(like)
    sizes = {"heads_per_layer": (2, 3), "intermediate_sizes": (7, 20)}
    if name == "llama":
        sizes |= {"heads_per_layer": (2, 4), "key_value_heads_per_layer": (1, 2)}
    config = dataclasses.replace(config, **sizes)
    models.save(tmp_path / "b", random(config), config, like)
    again = models.load(tmp_path / "b")
    assert again.config == config and config.cache_shape[1] == (2 if name == "llama" else 3)
    found = models.generate(again.apply, again.params, again.config, TOKENS, 5)
    logits = jax.jit(again.apply)(again.params, found)  # Without a cache.
    np.testing.assert_array_equal(found[:, 6:], logits[:, 5:-1].argmax(-1))


def test_sizes_that_all_layers_share_are_plain_fields(tmp_path):
    model = models.load(write_folder(tmp_path / "a"))
    _, small = pruned(model, lambda i, n: n // 2)
    config = models.config_of(small, model.config)
    assert config == dataclasses.replace(
        model.config, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24
    )
    models.save(tmp_path / "b", small, config, tmp_path / "a")
    fields = json.loads((tmp_path / "b" / "config.json").read_text())
    assert fields["head_dim"] == 8 and not [f for f in fields if f.endswith(("_layer", "_sizes"))]
    stacked = models.load(tmp_path / "b", scan=True)
    assert models.config_of(stacked.params, model.config) == config
    out = jax.jit(stacked.apply)(stacked.params, TOKENS)
    np.testing.assert_allclose(out, jax.jit(model.apply)(small, TOKENS), atol=1e-6)
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(np.array(TOKENS)).long()).logits
    np.testing.assert_allclose(out, logits.numpy(), atol=1e-5)


def test_a_model_of_fewer_layers_is_saved(tmp_path):
    model = models.load(write_folder(tmp_path / "a"))
    student = model.params | {"layers": {"0": model.params["layers"]["1"]}}
    config = models.config_of(student, model.config)
    assert config == dataclasses.replace(model.config, num_hidden_layers=1)
    models.save(tmp_path / "b", student, config, tmp_path / "a")
    assert models.load(tmp_path / "b").config == config


def test_sizes_that_contradict_the_tensors_are_refused(tmp_path):
    like = folder_of(tmp_path / "a", "bert")
    model = models.load(like)
    config = dataclasses.replace(model.config, heads_per_layer=(1, 2), intermediate_sizes=(10, 19))
    small = random(config)
    with pytest.raises(
        ModelError, match=r"output/kernel has shape \(8, 24\), the configuration.*config_of"
    ):
        models.save(tmp_path / "b", small, model.config, like)
    assert models.config_of(small, model.config) == config
    models.save(tmp_path / "b", small, config, like)
    path = tmp_path / "b" / "config.json"
    fields = json.loads(path.read_text())
    for change, message in (
        ({"intermediate_sizes": [10, 20]}, r"layers/1/intermediate/\S+ has shape"),
        ({"heads_per_layer": [1, 3]}, r"layers/1/\S+ has shape"),
        ({"heads_per_layer": [1]}, "'heads_per_layer': must be a list of 2 positive integers"),
        ({"heads_per_layer": [1, 0]}, "'heads_per_layer': must be a list"),
        ({"head_per_layer": [1, 2]}, "did you mean 'heads_per_layer'"),
    ):
        path.write_text(json.dumps(fields | change))
        with pytest.raises(ModelError, match=message):
            models.load(tmp_path / "b")
    write_folder(tmp_path / "c", heads_per_layer=[3, 4])
    with pytest.raises(ModelError, match="the 2 of layer 0 must divide its 3 attention heads"):
        models.read_config(tmp_path / "c")


def test_configurations_of_other_models_are_refused(tmp_path):
    like = write_folder(tmp_path / "a")
    model = models.load(like)
    with pytest.raises(ModelError, match=r"params have no layers/0/self_attn/o_proj/kernel"):
        models.config_of({"layers": {"0": {"scale": np.ones(2)}}}, model.config)
    cut = jax.tree.map(lambda leaf: leaf, model.params)
    cut["layers"]["1"]["self_attn"]["o_proj"]["kernel"] = np.zeros((12, 32), np.float32)
    with pytest.raises(ModelError, match=r"layers/1/\S+ \(12, 32\).*whole number of heads of 8"):
        models.config_of(cut, model.config)
    other = dataclasses.replace(model.config, rope_theta=5.0)
    with pytest.raises(ModelError, match="differs from this folder's in rope_theta"):
        models.save(tmp_path / "b", model.params, other, like)
    wrong = dataclasses.replace(model.config, intermediate_sizes=(8, 8, 8))
    with pytest.raises(ModelError, match="3 numbers for 2 layers"):
        models.build(wrong)
