"""Model folders: what is read, and what is refused."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxcomp import models
from jaxcomp.errors import JaxcompError, ModelError
from jaxcomp.functional import functional, path_names
from jaxcomp.io import safetensors
from tests.models.helpers import tokens, write_folder


def edit(folder, change):
    """Rewrites the tensors of a folder."""
    tensors = {k: np.array(v) for k, v in safetensors.read_folder(folder).items()}
    change(tensors)
    safetensors.write(folder / "model.safetensors", tensors)


def test_weights_are_views_of_the_file_in_their_stored_dtype(tmp_path):
    model = models.load(write_folder(tmp_path, ml_dtypes.bfloat16))
    flat = path_names(model.params)
    assert len(flat) == 2 + 2 * 9
    kernel = flat["layers/1/mlp/down_proj/kernel"]
    for name, leaf in flat.items():
        assert leaf.dtype == ml_dtypes.bfloat16, name
        assert not leaf.flags.owndata and not leaf.flags.writeable, name
    stored = safetensors.read(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(kernel.T, stored["model.layers.1.mlp.down_proj.weight"])
    assert model.name == "llama" and model.tokenizer is None
    assert model.apply(model.params, tokens(1, 3)).dtype == jnp.float32


def test_architecture_alone_has_the_shapes_of_the_loaded_model(tmp_path):
    write_folder(tmp_path)
    for scan in (False, True):
        empty = models.load_architecture(tmp_path, scan=scan)
        full = models.load(tmp_path, scan=scan)
        assert jax.tree.map(lambda a: a.shape, empty.params) == jax.tree.map(
            lambda a: a.shape, full.params
        )


def test_shards_equal_one_file(tmp_path):
    write_folder(tmp_path)
    want = path_names(models.load(tmp_path).params)
    tensors = safetensors.read(tmp_path / "model.safetensors")
    names = sorted(tensors)
    index = {}
    for shard, part in (("a.safetensors", names[:7]), ("b.safetensors", names[7:])):
        safetensors.write(tmp_path / shard, {n: tensors[n] for n in part})
        index |= dict.fromkeys(part, shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "model.safetensors").unlink()
    got = path_names(models.load(tmp_path).params)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"b\.safetensors: cannot be read"):
        models.load(tmp_path)
    safetensors.write(tmp_path / "b.safetensors", {"x": np.zeros(1, np.float32)})
    with pytest.raises(ModelError, match=r"is missing, which .* says is there"):
        models.load(tmp_path)


@pytest.mark.parametrize("scan", [False, True])
def test_save_and_load_give_the_same_bytes(tmp_path, scan):
    like = write_folder(tmp_path / "a")
    model = models.load(like, scan=scan)
    models.save(tmp_path / "b", model.params, model.config, like)
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
    assert first == second
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "float32"


def test_to_hf_refuses_other_trees(tmp_path):
    model = models.load(write_folder(tmp_path))
    with pytest.raises(ModelError, match="params have no norm/scale"):
        models.to_hf({k: v for k, v in model.params.items() if k != "norm"}, model.config)
    with pytest.raises(ModelError, match="params have extra"):
        models.to_hf({**model.params, "extra": np.zeros(1)}, model.config)


def test_save_to_a_place_that_cannot_be_written(tmp_path):
    model = models.load(write_folder(tmp_path / "a"))
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxcompError, match="cannot be written"):
        models.save(tmp_path / "file" / "b", model.params, model.config, tmp_path / "a")


def test_a_second_copy_of_the_tied_head_must_be_equal(tmp_path):
    write_folder(tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    models.load(tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ModelError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"1 tensors are missing.*model\.norm"),
        (lambda t: t.update(more=np.zeros(2)), "1 tensors have no place.*more"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(31, np.float32)}),
            r"norm/scale has shape \(31,\), config\.json asks for \(32,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(32, np.int8)}),
            "dtype int8; expected floating-point",
        ),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, change, message):
    write_folder(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ModelError, match=message):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["T5Model"]}, "'T5Model' is not supported; supported are Bert.*Qwen3"),
        ({"architectures": None, "model_type": "mamba"}, "'mamba' is not supported"),
        ({"hidden_sizes": 3}, r"unknown field 'hidden_sizes' \(did you mean 'hidden_size'\?\)"),
        ({"hidden_size": ...}, "'hidden_size': missing"),
        ({"hidden_size": "32"}, "must be a positive integer, got '32'"),
        ({"hidden_size": True}, "must be a positive integer, got True"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers': must be a positive integer"),
        ({"num_key_value_heads": 3}, "3 must divide the 4 attention heads"),
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, "6 must divide the hidden size 32"),
        ({"rms_norm_eps": 0}, "'rms_norm_eps': must be a positive number"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported; supported: 'silu'"),
        ({"attention_bias": 1}, "must be true or false, got 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: field 'factor': missing"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1}}, "unknown.*'mscale'"),
        ({"rope_scaling": 3}, "must be an object or null"),
        ({"is_encoder_decoder": True}, "True is not supported; supported: False"),
        ({"quantization_config": {"bits": 4}}, "quantized already"),
        ({"sliding_window": 4}, "unknown field 'sliding_window'"),
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 0},
            "'sliding_window': must be a positive integer or null",
        ),
        (
            {
                "model_type": "qwen2",
                "architectures": ["Qwen2ForCausalLM"],
                "layer_types": ["full_attention"],
            },
            "'layer_types': must be a list of 2",
        ),
    ],
)
def test_wrong_configurations_are_refused(tmp_path, changes, message):
    write_folder(tmp_path, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        models.load(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        models.load(tmp_path / "nothing")
    write_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="not a tokenizer"):
        models.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a PyTorch file"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="holds list, not a JSON object"):
        models.load(tmp_path)


def test_build_is_abstract(tmp_path):
    config, name = models.read_config(write_folder(tmp_path))
    _, params = functional(models.build(config))
    assert name == "llama"
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))


def test_old_spellings_of_a_bert_checkpoint():
    config = models.BertConfig(16, 8, 12, 1, 2, max_position_embeddings=8, masked_lm_head=True)
    _, params = functional(models.Bert(config, rngs=nnx.Rngs(0)))
    tensors = models.to_hf(params, config)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in tensors.items()
    }
    old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"]
    old["cls.seq_relationship.weight"] = np.zeros((2, 8), np.float32)
    old["bert.pooler.dense.weight"] = np.zeros((8, 8), np.float32)
    values, want = models.from_hf(old, config), path_names(params)
    assert sorted(values) == sorted(want)
    for name, value in want.items():
        np.testing.assert_array_equal(values[name], value)
