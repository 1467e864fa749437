"""``compress(.., save_to=..)`` writes what ``save`` writes, and holds no result."""

import errno
import itertools
import json
import os
from types import SimpleNamespace
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.fingerprint import leaf_bytes
from jaxcomp.formats import Int
from jaxcomp.io import arrays, checkpoint
from jaxcomp.io.checkpoint import save_among
from jaxcomp.io.later import Later, Shares
from jaxcomp.io.stacked import Stacked
from jaxcomp.io.staged import Staged, stage, staged_files
from jaxcomp.quantization import RTN, LLMInt8, SmoothQuant
from jaxcomp.recipe import Recipe
from jaxcomp.records import Store
from jaxcomp.step import Activation
from tests.test_compress import block, blocks, inputs

# Scales go into a stacked gain and into the rows of a compressed stack; outlier columns, of which
# each layer has another number, are padded; one stack and one vector stay dense.
RECIPE = Recipe(
    steps=(
        SmoothQuant(include=["*down"]),
        RTN(
            include=["*down", "*up"],
            format=Int(8, full_range=False),
            activation=Activation(),
        ),
        LLMInt8(include=["*mixed"], threshold=8.0),
    )
)


def apply(params, x):
    def layer(x, p):
        return block(x, p) + np.float32(0.1) * (x @ p["mixed"]), None

    return jax.lax.scan(layer, x * params["scale"], params["layers"])[0]


def model():
    layers = jax.tree.map(np.asarray, blocks())
    layers["mixed"] = np.random.default_rng(0).standard_normal((3, 16, 16), np.float32)
    layers["gate"] = Stacked(list(layers["gate"]))
    return {"layers": layers, "scale": np.linspace(0.5, 1.5, 16, dtype=np.float32)}


def contents(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_the_checkpoint_is_that_of_save_also_after_a_kill(tmp_path, monkeypatch):
    # So that there are arrays of many files, and slices that files hold one or several of.
    monkeypatch.setattr(arrays, "_CHUNK_BYTES", 256)
    linked = []
    link = lambda path, target: (linked.append(target), os.link(path, target))  # noqa: E731
    monkeypatch.setattr(arrays, "link", link)
    params, data = model(), inputs()
    result = jc.compress(apply, params, RECIPE, data)
    jc.save(tmp_path / "saved", result, files={"a": b"b"}, metadata={"of": 1})
    assert any("folded into layers/up" in row.notes for row in result.report.rows)
    outliers = np.asarray(result.params["layers"]["mixed"].parts[1].indices)
    assert len(set((outliers < 16).sum(-1).tolist())) == 3

    put = Store.put
    kept = itertools.count(1)

    def dies(store, path, index, record):
        put(store, path, index, record)
        if next(kept) == 5:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    output = jc.Output(out, files={"a": b"b"}, metadata={"of": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", dies)
        with pytest.raises(KeyboardInterrupt):
            jc.compress(apply, params, RECIPE, data, save_to=output)
    assert not out.exists() and output.unfinished.is_dir()
    with pytest.raises(jc.JaxcompError, match=r"is not finished: .*out.unfinished.*run it again"):
        jc.load(out)
    again = []
    monkeypatch.setattr(Store, "put", lambda *args: (again.append(args[1:3]), put(*args)))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "publish", mock.Mock(side_effect=arrays.CheckpointError("full")))
        with pytest.raises(jc.JaxcompError, match="full"):
            jc.compress(apply, params, RECIPE, data, save_to=output)
    assert len(again) == 9 - 5  # No weight twice, and no stack of them.
    # What is finished is not evaluated again either.
    monkeypatch.setitem(jc.compress.__globals__, "Sequential", None)
    # Killed when all is published and nothing is cleaned up yet: the next call is soon done.
    run = jc.compress.__globals__
    with monkeypatch.context() as patch:
        patch.setitem(run, "clear", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            jc.compress(apply, params, RECIPE, data, save_to=output)
    assert out.is_dir() and output.unfinished.is_dir()
    with pytest.raises(jc.JaxcompError, match="already holds a compressed model"):
        jc.compress(apply, params, Recipe(steps=RECIPE.steps[1:]), data, save_to=output)
    (output.unfinished / "replaces").touch()  # As where it was to replace that checkpoint.
    with pytest.raises(jc.JaxcompError, match="already holds a compressed model"):
        jc.compress(apply, params, RECIPE, data, save_to=output)
    (output.unfinished / "replaces").unlink()
    (tmp_path / ".out.finished").mkdir()  # Killed while it was cleaned up.
    with monkeypatch.context() as patch:
        patch.setitem(run, "save_among", None)
        streamed = jc.compress(apply, params, RECIPE, data, save_to=output)
    assert len(again) == 4
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "saved"]
    assert contents(out) == contents(tmp_path / "saved")
    # The codes are linked: what finished weights were written to are the checkpoint's own files.
    stored = checkpoint.read_metadata(out)["arrays"]
    files = {"/".join(f.parts[-3:]) for f in linked}
    for name in ("down/0/part/values", "up/0/part/values", "mixed/0/part/part/values"):
        entry = stored[f"layers/{name}"]
        mine = {f"{entry['shard']}/{entry['key']}/{file}" for file in entry["sha256"]}
        assert mine - files == {f"{entry['shard']}/{entry['key']}/.zarray"}, name

    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), result.params)
    shapes["layers"]["gate"] = jax.ShapeDtypeStruct((3, 16, 32), np.float32)
    assert jax.tree.leaves(streamed.params) == jax.tree.leaves(shapes)
    assert jax.tree.structure(streamed.params) == jax.tree.structure(shapes)
    assert streamed.report.without_times() == result.report.without_times()
    with pytest.raises(jc.JaxcompError, match="already holds a compressed model"):
        jc.compress(apply, params, RECIPE, data, save_to=out)
    with pytest.raises(TypeError):  # There is no pass any more.
        jc.compress(apply, params, RECIPE, data, save_to=jc.Output(out, overwrite=True))
    assert (output.unfinished / "replaces").exists()


@pytest.mark.parametrize("copies", [False, True])
def test_staged_files_are_those_of_a_checkpoint(tmp_path, monkeypatch, rng, copies):
    """Of arrays and slices; slices of which a file holds several are not staged."""
    monkeypatch.setattr(arrays, "_CHUNK_BYTES", 128)
    if copies:  # Another disk.
        monkeypatch.setattr(os, "link", mock.Mock(side_effect=OSError(errno.EXDEV, "")))
    array = rng.standard_normal((2, 3, 4, 8)).astype(ml_dtypes.float8_e3m4)
    assert stage(tmp_path / "none", array[0, 0, 0], (0, 0), (2, 3)) is None
    assert stage(tmp_path / "none", array[:0], (), ()) is None
    wide = array.astype(np.float32)
    for name, slices, depth in [("all", array, 0), ("odd", wide, 2), ("one", wide[1, 1, 1, 1], 0)]:
        staged = {}
        for index in np.ndindex(slices.shape[:depth]):
            folder = tmp_path / name / "-".join(map(str, index))
            entry = stage(folder, slices[index], index, slices.shape[:depth])
            staged[index] = Staged(folder, json.loads(json.dumps(entry)))
            np.testing.assert_array_equal(np.asarray(staged[index]), slices[index])
            assert staged[index].damaged() is None
        held = staged.get(()) or Stacked(
            [Stacked([staged[i, j] for j in range(3)]) for i in range(2)]
        )
        later = Later.of(held)
        later.files = staged_files(held)
        jc.save(tmp_path / f"{name}-saved", SimpleNamespace(params=[slices]))
        save_among(
            (0,), tmp_path / f"{name}-linked", SimpleNamespace(params=[later]), None, None, 0
        )
        assert contents(tmp_path / f"{name}-linked") == contents(tmp_path / f"{name}-saved")
        assert later.files
        # Slices of another stack, as those are that are padded: these are read.
        assert not depth or not staged_files(Stacked(held.parts[:1]))
    file, _ = next(iter(held.files.values()))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert held.damaged() == file


def test_several_processes_write_each_part_once(rng):
    """Every element of an array of few or many files is in a piece of just one process."""
    for shape, chunks in [((7, 6), (2, 6)), ((7, 6), (7, 6)), ((2, 9), (1, 9)), ((), ())]:
        value = rng.standard_normal(shape)
        found = np.zeros(shape)
        for rank in range(3):
            for index, piece in Later.of(value).pieces(chunks, Shares(rank, 3)):
                assert piece.read().shape == piece.shape
                np.testing.assert_array_equal(piece.read(), value[index])
                found[index] += 1
                assert all(i.start % c == 0 for i, c in zip(index, chunks, strict=True))
        np.testing.assert_array_equal(found, np.ones(shape))


@pytest.mark.parametrize("form", [np.asarray, lambda a: a.T, lambda a: a.swapaxes(1, 2), Stacked])
def test_samples_of_a_weight_reach_from_its_start_to_its_end(form):
    """Of what processes compare, little is read, and a file that was cut short differs."""
    array = np.zeros((16, 32, 64), np.float32)
    most = array.nbytes // 8

    def sample():
        return b"".join(leaf_bytes(form(array), most))

    before = sample()
    assert len(before) <= 2 * most
    for where in [np.s_[0, 0, 0], np.s_[-1, -1, -1], np.s_[6:9]]:
        array[where] = 1
        assert sample() != before
        array[where] = 0
