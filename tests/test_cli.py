import json
import os
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp import cli, demo
from jaxcomp.io import checkpoint
from tests import tiny, xla

SMALL = ["--samples", "4", "--length", "16", "--batch-size", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny.make(folder / "model")
    tiny.text(folder / "text.txt")
    return folder


def _contents(folder):
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def _json(capsys, *arguments):
    cli.main([*map(str, arguments), "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.fixture(scope="module")
def recipe(folder):
    path = folder / "recipe.yaml"
    jc.presets.w4a16_gptq(group_size=16).dump(path)
    return path


@pytest.fixture(scope="module")
def compressed(folder, recipe):
    """The folder that an uninterrupted compress writes."""
    arguments = ["compress", folder / "model", "--recipe", recipe, "--output", folder / "out"]
    cli.main([*map(str, arguments), "--calibration", str(folder / "text.txt"), *SMALL, "--json"])
    return folder / "out"


def test_compress_is_what_the_library_does(compressed, folder):
    saved = jc.load(compressed)
    loaded = cli.load_model(folder / "model")
    batches = cli.token_batches(loaded, folder / "text.txt", 16, 2, 4)
    expected = jc.compress(loaded.apply, loaded.params, saved.recipe, batches, progress=False)
    for a, b in zip(jax.tree.leaves(saved.params), jax.tree.leaves(expected.params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert not (folder / "out.unfinished").exists()
    assert (compressed / "config.json").read_bytes() == (
        folder / "model" / "config.json"
    ).read_bytes()


def test_a_finished_output_is_left_as_it_is(compressed, folder, recipe, capsys):
    before = {f: f.stat().st_mtime_ns for f in compressed.rglob("*")}
    arguments = ["compress", folder / "model", "--recipe", recipe, "--output", compressed]
    values = _json(capsys, *arguments, "--calibration", folder / "text.txt", *SMALL)
    assert values["output"] == str(compressed) and 4 < values["bits_per_weight"] < 6
    assert {f: f.stat().st_mtime_ns for f in compressed.rglob("*")} == before
    with pytest.raises(SystemExit) as caught:
        other = ["--calibration", str(folder / "text.txt"), "--samples", "2", "--length", "8"]
        cli.main([*map(str, arguments), *other])
    assert caught.value.code == 2
    assert "already holds a model compressed with another" in capsys.readouterr().err


def test_evaluate(compressed, folder, capsys):
    options = ["--text", folder / "text.txt", *SMALL]
    dense = _json(capsys, "evaluate", folder / "model", *options)
    packed = _json(capsys, "evaluate", compressed, *options, "--reference", folder / "model")
    assert dense["kl"] is None and dense["tokens"] == packed["tokens"] == 4 * 15
    assert packed["kl"] > 0
    itself = _json(capsys, "evaluate", folder / "model", *options, "--reference", folder / "model")
    assert itself["kl"] == pytest.approx(0, abs=1e-6)
    # The same numbers as a dense model with the values that the compressed weights stand for.
    cli.main(["export", str(compressed), "--output", str(folder / "dense"), "--format", "dense"])
    capsys.readouterr()
    exported = _json(capsys, "evaluate", folder / "dense", *options)
    assert exported["perplexity"] == pytest.approx(packed["perplexity"], rel=1e-4)
    assert exported["perplexity"] != pytest.approx(dense["perplexity"], rel=1e-3)


def test_export_holds_the_materialized_values(compressed, folder, capsys):
    output = folder / "dense2"
    values = _json(capsys, "export", compressed, "--output", output)
    model = jc.models.load(output)
    expected = jc.materialize(jc.load(compressed).params)
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert values["bytes"] == sum(f.stat().st_size for f in output.iterdir())


def test_inspect(compressed, capsys):
    values = _json(capsys, "inspect", compressed)
    assert len(values["rows"]) == 14  # 7 matrices in each of 2 layers; the head is left alone.
    assert values["metadata"]["name"] == "model"
    cli.main(["inspect", str(compressed)])
    out = capsys.readouterr().out
    assert "layers/1/mlp/down_proj" in out and "group_size: 16" in out
    assert values["format_version"] == 1 and "format version: 1" in out


def test_inspect_verifies_every_file(compressed, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(compressed, copy)
    verified = _json(capsys, "inspect", copy, "--verify")["verified"]
    on_disk = {f for f in (copy / "arrays").rglob("*") if f.is_file()}
    arrays = json.loads((copy / "jaxcomp.json").read_text())["arrays"]
    ours = {
        copy / "arrays" / entry["shard"] / entry["key"] / file
        for entry in arrays.values()
        for file in entry["sha256"]
    }
    assert verified == {
        "arrays": len(arrays),
        "bytes": sum(f.stat().st_size for f in ours),
    }
    # What is not an array's is orbax's own bookkeeping.
    assert ours < on_disk and all(
        f.name.startswith(("_", ".")) or "ocdbt" in str(f) for f in on_disk - ours
    )
    # One bit in one file: a look at the metadata does not see it, verifying does, and says where.
    name = "layers/1/mlp/down_proj/kernel/0/values"
    file = copy / "arrays" / arrays[name]["shard"] / arrays[name]["key"] / "0.0"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    _json(capsys, "inspect", copy)
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(copy), "--verify"])
    assert f"array '{name}' is damaged" in capsys.readouterr().err


def test_presets_by_name_and_no_data_where_none_is_needed(folder, capsys):
    values = _json(
        capsys, "compress", folder / "model", "--recipe", "w8a8_dynamic", "--output", folder / "w8"
    )
    assert 8 < values["bits_per_weight"] < 10
    assert checkpoint.load(folder / "w8").recipe == jc.presets.w8a8_dynamic()


def _start(folder, recipe, output, *more):
    environment = {**os.environ, "XLA_FLAGS": xla.flags(None), "JAX_PLATFORMS": "cpu"}
    arguments = ["compress", folder / "model", "--recipe", recipe, "--output", output, *SMALL]
    arguments += ["--calibration", folder / "text.txt", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "jaxcomp", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(compressed, folder, recipe, tmp_path):
    output, journal = tmp_path / "out", tmp_path / "out.unfinished"

    def records():
        return len(list(journal.glob("records/*.record")))

    moments = [
        lambda: (journal / "manifest.json").exists(),
        lambda: records() >= 1,
        lambda: len(list(journal.glob("arrays/*"))) > records() >= 5,  # Arrays without a record.
        lambda: records() >= 9,
        lambda: (tmp_path / ".out.saving").exists(),
    ]
    finished = 0
    for moment in moments:
        process = _start(folder, recipe, output)
        while process.poll() is None and not moment():
            time.sleep(0.0005)
        process.kill()
        process.communicate()
        assert records() >= finished or output.exists()  # Nothing already written is lost.
        finished = records()
    process = _start(folder, recipe, output)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert _contents(output) == _contents(compressed)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out"]


def test_resuming_with_another_recipe_or_data_is_refused(folder, recipe, tmp_path, capsys):
    def run(recipe, *more):
        arguments = ["compress", folder / "model", "--recipe", recipe, "--output", tmp_path / "o"]
        arguments += ["--journal", tmp_path / "j", *SMALL, *more]
        with pytest.raises(SystemExit) as caught:
            cli.main([str(a) for a in arguments])
        assert caught.value.code == 2
        return capsys.readouterr().err

    arguments = ["compress", folder / "model", "--recipe", recipe, "--output", tmp_path / "done"]
    arguments += ["--journal", tmp_path / "j", "--calibration", folder / "text.txt", *SMALL]
    cli.main([str(a) for a in arguments])
    capsys.readouterr()
    other = tiny.text(tmp_path / "other.txt", seed=1)
    assert re.search("belongs to a run with another data", run(recipe, "--calibration", other))
    text = ["--calibration", folder / "text.txt"]
    assert re.search("belongs to a run with another recipe", run("w8a8_dynamic", *text))
    shutil.copytree(folder / "model", tmp_path / "model")
    assert (tmp_path / "j" / "manifest.json").exists()  # What was there is kept.


def test_a_json_error_is_one_line_too(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["inspect", str(tmp_path), "--json"])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["error"] in err


def test_help_is_quick_to_read(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for command in ("compress", "evaluate", "inspect", "export", "demo"):
        assert command in out


def test_demo_writes_a_table_a_plot_and_checkpoints(tmp_path, capsys):
    output = tmp_path / "demo"
    recipes = {"RTN W2 g128": "w2a16_rtn", "RTN W8A8": "w8a8_dynamic"}
    values = demo.run(output, recipes=recipes, samples=2, held_out=2)
    table = capsys.readouterr().out
    assert [row["recipe"] for row in values["rows"]] == ["dense", *recipes]
    dense, two, eight = values["rows"]
    # Eight bits may come out a hair below dense on so little text.
    assert max(dense["perplexity"], eight["perplexity"]) < two["perplexity"]
    assert dense["nbytes"] > eight["nbytes"] > two["nbytes"]
    assert dense["kl"] == 0 < eight["kl"] < two["kl"]
    assert dense["bits_per_weight"] == 16
    for name in recipes:
        assert name in table and f"| {name} |" in (output / "table.md").read_text()
    assert (output / "perplexity.png").read_bytes()[:4] == b"\x89PNG"
    text = ["--text", demo.tinylm() / "heldout.txt", "--samples", "2", "--batch-size", "16"]
    # The checkpoints give the numbers in the table.
    again = _json(capsys, "evaluate", output / "w8a8_dynamic", *text)
    assert again["perplexity"] == pytest.approx(eight["perplexity"], rel=1e-6)
    demo.run(output, recipes={}, samples=2, held_out=2, show=False)  # Over an earlier demo: fine.


def test_demo_covers_what_it_should():
    names = " ".join(demo.RECIPES)
    for part in ("RTN W4", "RTN W3", "RTN W2", "GPTQ W4", "GPTQ W3", "GPTQ W2", "AWQ W4", "AWQ W3"):
        assert part in names
    for part in ("SmoothQuant W8A8", "Wanda 50%", "Wanda 2:4", "SparseGPT 50%", "2:4 + INT4"):
        assert part in names
    assert set(demo.RECIPES.values()) <= set(jc.presets.named())
