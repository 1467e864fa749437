"""The examples run, read all their settings, go on after a kill, and the guide's snippets hold."""

import ast
import doctest
import os
import pathlib
import runpy
import signal
import subprocess
import sys

import jax
import jax.flatten_util
import msgspec
import numpy as np
import pytest

import jaxcomp as jc

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
COMMON = "batch_size=2 length=32 training_text=20000 held_out=4"
SMALL = {
    "qat": f"{COMMON} steps=2 bits=[3] calibration=4",
    "distill": f"{COMMON} steps=4",
    "qlora": f"{COMMON} steps=2",
    "scale": "recipe=w4a16_rtn length=32 batch_size=2 calibration=2 held_out=4",
    "prune_minilm": "steps=2 sentences=64 candidates=16 batch_size=8 length=16",
}


def test_notebooks_are_in_step_with_the_examples():
    command = [sys.executable, "scripts/notebooks.py", "--check"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_reads_all_its_settings_and_no_others(path):
    tree = ast.parse(path.read_text())
    ((name, file),) = (
        (node.targets[0].id, node.value.args[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and getattr(node.value.func, "id", None) == "read_settings"
    )
    assert file == f"configs/examples/{path.stem}.yaml"
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == name
    }
    assert read == set(msgspec.yaml.decode((ROOT / file).read_bytes()))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs an example at its small size in an empty folder: its names, once for each setting."""
    done = {}

    def run(name, extra=""):
        settings = f"{SMALL[name]} {extra}".strip()
        if settings not in done:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("JAXCOMP_SETTINGS", settings)
                patch.chdir(tmp_path_factory.mktemp(name))
                names = runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
                assert not list(pathlib.Path.cwd().iterdir())
            done[settings] = names
        return done[settings]

    return run


@pytest.mark.parametrize("name", SMALL)
def test_an_example_runs(name, run, capsys):
    run(name)
    out = capsys.readouterr().out
    if "skipped:" in out:
        pytest.skip(out.strip())
    if name != "prune_minilm":
        assert "perplexity: dense" in out and out.count("perplexity:") > 1
    if name == "scale":
        assert "4 x cpu: data 2 x model 2" in out and "-> (256, 192)" in out
    else:
        assert "step" in out and "loss" in out


def test_a_model_on_a_mesh_says_what_one_device_says(run):
    names = run("scale")
    alone = names["evaluation"].perplexity(
        jc.dispatch(names["model"].apply), names["result"].params, names["held_out"]
    )
    meshed = names["evaluation"].perplexity(names["run"], names["loaded"], names["held_out"])
    np.testing.assert_allclose(meshed, alone, rtol=1e-4)
    assert names["apart"] < 1e-3


def test_qat_stores_what_it_says(run):
    names = run("qat")
    assert names["width"] == 3 + 16 / 64
    assert np.isfinite(names["trained"])


def test_qlora_counts_bits_and_merges_exactly(run):
    names = run("qlora")
    # 4 bits, 8 a scale of 64; in float32 a step for 256 scales, and for each matrix the mean of its
    # scales and the 16 levels.
    matrices = [row.weights for row in names["result"].report.rows]
    exact = sum(n * 4 + n // 64 * 8 + -(-n // 64 // 256) * 32 + 17 * 32 for n in matrices)
    assert names["result"].report.bits_per_weight == exact / sum(matrices)
    assert names["same"] and names["apart"] < 1e-3
    np.testing.assert_allclose(names["whole"], names["tuned"], rtol=1e-4)


def test_a_teacher_on_disk(run, capsys):
    names = run("distill", "stream=true top_k=2048")
    assert "top-2048 logits of 4 batches" in capsys.readouterr().out
    # With all of the vocabulary kept, the stream says what the teacher in the step says, up to
    # half precision on disk; the hidden states are the teacher's alone.
    whole = run("distill", "hidden_weight=0.0")
    trees = names["trained"], whole["trained"], names["small"]
    streamed, inside, start = (jax.flatten_util.ravel_pytree(tree)[0] for tree in trees)
    apart = np.linalg.norm(streamed - inside) / np.linalg.norm(inside - start)
    assert apart < 0.01


KILLED = """
import os, runpy, signal, sys
from jaxcomp import data
taken, windows = [], data.random_windows
def kill_at_the_eighth(*args):
    taken.append(args)
    if len(taken) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return windows(*args)
data.random_windows = kill_at_the_eighth
runpy.run_path(sys.argv.pop(), run_name="__main__")
"""


def test_a_killed_run_goes_on_to_the_same_bits(run, tmp_path, capsys):
    extra = f"checkpoint={tmp_path} checkpoint_every=1"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(ROOT / "examples" / "distill.py")],
        cwd=ROOT,
        env={**os.environ, "JAXCOMP_SETTINGS": f"{SMALL['distill']} {extra}"},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = run("distill", extra)
    out = capsys.readouterr().out
    assert "alone: going on from step 4" in out
    assert "distilled: going on from step" in out
    jax.tree.map(np.testing.assert_array_equal, again["trained"], run("distill")["trained"])


GUIDES = {"training": 80, "scale": 25, "attention": 40, "serving": 35}


@pytest.mark.parametrize(("name", "snippets"), GUIDES.items())
def test_a_guide(name, snippets):
    failed, tried = doctest.testfile(str(ROOT / "docs" / f"{name}.md"), module_relative=False)
    assert failed == 0 and tried > snippets
