"""Every kind of bad input: exit code 2, one message that says what, where and what to do, no
traceback."""

import errno
import json
import os
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp import cli, journal
from jaxcomp.io import safetensors
from tests import tiny

SMALL = ["--samples", "2", "--length", "8", "--batch-size", "2"]


@pytest.fixture
def folder(tmp_path):
    tiny.make(tmp_path / "model")
    tiny.text(tmp_path / "text.txt", words=50)
    jc.presets.w4a16_gptq(group_size=16).dump(tmp_path / "recipe.yaml")
    return tmp_path


@pytest.fixture
def compress(folder, capsys):
    """Runs ``jaxcomp compress`` where it must fail, and returns its message."""

    def run(*more, recipe=None, calibration=None, output=None, model=None):
        arguments = [
            *("compress", model or folder / "model"),
            *("--recipe", recipe or folder / "recipe.yaml"),
            *("--calibration", calibration or folder / "text.txt"),
            *("--output", output or folder / "out"),
            *SMALL,
            *more,
        ]
        return fails(capsys, *arguments)

    return run


def fails(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.startswith("jaxcomp: error: ") and err.count("\n") == 1
    assert "Traceback" not in err
    return err


def says(message, *parts):
    for part in parts:
        assert str(part) in message, message


def _edit_config(folder, **changes):
    file = folder / "model" / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def _edit_tensor(folder, name, edit):
    file = folder / "model" / "model.safetensors"
    tensors = {k: np.array(v) for k, v in safetensors.read_folder(file.parent).items()}
    edit(tensors, name)
    safetensors.write(file, tensors, {"format": "pt"})


# Model folders.


def test_no_such_model(compress, folder):
    says(compress(model=folder / "nowhere"), folder / "nowhere", "no such folder")


def test_a_missing_safetensors_file(compress, folder):
    (folder / "model" / "model.safetensors").unlink()
    says(compress(), folder / "model", "safetensors")


def test_a_truncated_safetensors_file(compress, folder):
    file = folder / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    says(compress(), file)


@pytest.mark.parametrize("content", [b"", b"1234", struct.pack("<Q", 1 << 40) + b"{}"])
def test_a_file_that_is_no_safetensors(compress, folder, content):
    file = folder / "model" / "model.safetensors"
    file.write_bytes(content)
    says(compress(), file)


def test_a_missing_tensor(compress, folder):
    name = "model.layers.1.mlp.up_proj.weight"
    _edit_tensor(folder, name, lambda tensors, name: tensors.pop(name))
    says(compress(), name, "missing")


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"hidden_size": "wide"}, ["config.json", "hidden_size"]),
        ({"hidden_size": None}, ["config.json", "hidden_size"]),
        ({"hidden_size": 33}, []),
        ({"sliding_windowz": 3}, ["config.json", "sliding_windowz"]),
        ({"architectures": ["MambaForCausalLM"]}, ["MambaForCausalLM", "LlamaForCausalLM"]),
        ({"intermediate_size": 128}, ["(64, 32)"]),
    ],
)
def test_a_wrong_or_unknown_config_field(compress, folder, changes, parts):
    _edit_config(folder, **changes)
    says(compress(), folder / "model", *parts)


def test_a_config_that_is_no_json(compress, folder):
    (folder / "model" / "config.json").write_text("{")
    says(compress(), folder / "model" / "config.json")


def test_a_tokenizer_that_is_none(compress, folder):
    (folder / "model" / "tokenizer.json").write_text("{}")
    says(compress(), "tokenizer.json")
    (folder / "model" / "tokenizer.json").unlink()
    says(compress(), "tokenizer.json")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(compress, folder, value):
    def edit(tensors, name):
        tensors[name][3, 5] = value

    _edit_tensor(folder, "model.layers.1.mlp.up_proj.weight", edit)
    says(compress(), "layers/1/mlp/up_proj/kernel")
    says(compress(recipe="w8a8_dynamic", output=folder / "o"), "layers/1/mlp/up_proj/kernel")


def test_activations_that_are_not_finite():
    params = {"a": jnp.ones((16, 16)), "b": jnp.ones((16, 16))}

    def apply(params, x):
        return jnp.log(x @ params["a"] - 1e6) @ params["b"]

    recipe = jc.presets.w4a16_gptq(group_size=16)
    with pytest.raises(jc.JaxcompError, match=r"\bb.*NaN"):
        jc.compress(apply, params, recipe, [(jnp.ones((4, 16)),)], progress=False)


# Recipes.


@pytest.mark.parametrize(
    "text, parts",
    [
        (
            "steps: [{algorithm: rtn, format: {format: int, bitz: 4}}]",
            ["recipe.yaml", "steps[0].format", "'bitz'", "Allowed keys", "group_size"],
        ),
        ("steps: [{algorithm: rtm}]", ["recipe.yaml", "'rtm'", "rtn", "gptq"]),
        ("steps:\n  - [", ["recipe.yaml", "not valid YAML"]),
        (
            "steps: [{algorithm: rtn, format: {format: int, bits: 4}, include: ['*upp*']}]",
            ["step 0 (rtn)", "'*upp*'", "matches none", "up_proj"],
        ),
        (
            "steps: [{algorithm: rtn, format: {format: int, bits: 4, group_size: 24}}]",
            ["layers/0/self_attn/q_proj/kernel (32, 32)", "24", "does not divide", "16"],
        ),
        ("steps: [{algorithm: wanda, sparsity: 1.5}]", ["1.5"]),
        ("steps: [{algorithm: wanda, n: 2, m: 5}]", ["layers/0", "m = 5", "32"]),
        ("steps: [{algorithm: rtn, format: {format: int, bits: 99}}]", ["99"]),
        (
            "steps: [{algorithm: rtn, clipping: maximal, format: {format: int, bits: 4}}]",
            ["maximal", "minmax"],
        ),
    ],
)
def test_recipes_that_are_wrong_or_do_not_fit(compress, folder, text, parts):
    (folder / "recipe.yaml").write_text(text)
    says(compress(), *parts)
    assert not (folder / "out").exists()


def test_no_such_recipe(compress, folder):
    says(compress(recipe=folder / "no.yaml"), "no.yaml", "No such file")
    says(compress(recipe="w4a17"), "'w4a17'", "w4a16_gptq")


# Data.


@pytest.mark.parametrize("text", ["", "   \n", "too short"])
def test_empty_or_too_short_calibration_data(compress, folder, text):
    (folder / "text.txt").write_text(text)
    says(compress(), folder / "text.txt", "short" if text.strip() else "empty")


def test_no_calibration_data(folder, capsys):
    arguments = ["compress", folder / "model", "--recipe", folder / "recipe.yaml", "--output", "o"]
    says(fails(capsys, *arguments), "gptq", "--calibration")


def test_no_such_text(compress, folder):
    says(compress(calibration=folder / "no.txt"), folder / "no.txt")


def test_a_text_that_is_not_utf8(compress, folder):
    (folder / "text.txt").write_bytes(b"\xff\xfe\xfa" * 100)
    says(compress(), folder / "text.txt", "UTF-8")


def test_token_ids_outside_the_vocabulary(compress, folder):
    """A tokenizer that knows more than the model."""
    import shutil

    shutil.rmtree(folder / "model")
    tiny.make(folder / "model", vocab_size=100)
    says(compress(), "vocabulary", "100")


@pytest.mark.parametrize("option", ["--samples", "--length", "--batch-size"])
def test_options_that_make_no_sense(compress, option):
    says(compress(option, "0"), "at least 1")


# Outputs, journals and checkpoints.


def test_an_output_that_holds_something_else(compress, folder):
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("precious")
    says(compress(), folder / "out", "holds something else (thesis.tex)")
    says(compress("--overwrite"), "holds something else (thesis.tex)")
    assert (folder / "out" / "thesis.tex").read_text() == "precious"
    says(compress(output=folder / "text.txt"), "is a file")
    says(compress(output=folder / "model"), "is the model itself")


def test_a_journal_that_holds_something_else(compress, folder):
    says(compress("--journal", folder / "model"), folder / "model", "holds something else")


def test_a_full_disk_keeps_what_was_done(compress, folder, monkeypatch):
    real, written = journal._write, []

    def fills_up(file, pieces):
        if len(written) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(file)
        return real(file, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(journal, "_write", fills_up)
        says(compress(), "no space left", "bytes", "run the same command again", "are kept")
    records = list((folder / "out.unfinished" / "records").iterdir())
    assert len(records) == 5  # The manifest was the sixth file.
    with journal.Journal.open(folder / "out.unfinished", _manifest(folder)) as opened:
        before = {key: opened.get(key)[0] for key in opened.keys()}
    with monkeypatch.context() as patch:
        patch.setattr(journal, "_write", fills_up)
        written.clear()
        says(compress(), "no space left")  # Resumes, and stops later.
    with journal.Journal.open(folder / "out.unfinished", _manifest(folder)) as opened:
        assert len(opened) > 5
        for key, arrays in before.items():
            for name, array in opened.get(key)[0].items():
                assert array.tobytes() == arrays[name].tobytes()


def _manifest(folder):
    return json.loads((folder / "out.unfinished" / "manifest.json").read_text())


def test_a_corrupted_journal_record(compress, folder, monkeypatch):
    with monkeypatch.context() as patch:
        module = sys.modules["jaxcomp.compress"]
        patch.setattr(module, "save_among", _raise(OSError(errno.EIO, "broken disk")))
        says(compress(), "broken disk")
    record = sorted((folder / "out.unfinished" / "records").iterdir())[3]
    whole = record.read_bytes()
    record.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    says(compress(), record, "damaged", "delete this file")
    record.unlink()
    arguments = ["compress", folder / "model", "--recipe", folder / "recipe.yaml"]
    arguments += ["--calibration", folder / "text.txt", "--output", folder / "out", *SMALL]
    cli.main([str(a) for a in arguments])
    assert (folder / "out" / "jaxcomp.json").exists()


def _raise(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_a_corrupted_checkpoint(folder, capsys):
    arguments = ["compress", folder / "model", "--recipe", "w8a8_dynamic", "--output"]
    cli.main([str(a) for a in [*arguments, folder / "out", *SMALL]])
    metadata = json.loads((folder / "out" / "jaxcomp.json").read_text())
    name, entry = next(iter(metadata["arrays"].items()))
    chunk = next(
        f
        for f in (folder / "out" / "arrays" / "00000" / entry["key"]).iterdir()
        if not f.name.startswith(".")
    )
    chunk.write_bytes(chunk.read_bytes()[:-4])
    for command, *more in (["inspect", "--verify"], ["evaluate", "--text", folder / "text.txt"]):
        message = fails(capsys, command, folder / "out", *more)
        says(message, folder / "out", repr(name), "make the checkpoint again")
    (folder / "out" / "jaxcomp.json").write_text("{")
    says(fails(capsys, "inspect", folder / "out"), "jaxcomp.json", "damaged")


def test_inspecting_what_is_no_checkpoint(folder, capsys):
    says(fails(capsys, "inspect", folder / "model"), folder / "model", "jaxcomp.json")


def test_compressing_twice(compress, folder):
    arguments = ["compress", folder / "model", "--recipe", "w8a8_dynamic", "--output"]
    cli.main([str(a) for a in [*arguments, folder / "w8", *SMALL]])
    says(compress(model=folder / "w8"), "already compressed")


def test_debug_shows_the_traceback(folder):
    with pytest.raises(jc.ModelError):
        cli.main(["evaluate", str(folder / "no"), "--text", str(folder / "text.txt"), "--debug"])
