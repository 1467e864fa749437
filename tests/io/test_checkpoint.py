import json
import os
import pathlib
import shutil
import subprocess
import tarfile
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxcomp import formats
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import NM, Codebook, CompressedArray, Float, Int, Sparse
from jaxcomp.io import arrays, checkpoint
from jaxcomp.quantization import RTN
from jaxcomp.recipe import Recipe
from jaxcomp.report import Report, Row

FORMATS = [
    Int(bits=4, group_size=8),
    Int(bits=3, group_size=8, symmetric=False, scale_dtype="bfloat16"),
    Float(kind="e4m3"),
    Float(kind="mxfp4"),
    Codebook(kind="nf4", group_size=16),
]


def _compressed(rng, fmt, stack=()):
    w = rng.standard_normal((*stack, 4, 32)).astype(np.float32)
    axes = dict(
        stack_axes=tuple(range(len(stack))), out_axes=(len(stack),), in_axes=(len(stack) + 1,)
    )
    return CompressedArray.from_matrix(
        (formats.quantize(fmt, w),), leaf_shape=w.shape, dtype=jnp.bfloat16, **axes
    )


@pytest.fixture
def result(rng):
    params = {
        "embed": jnp.asarray(rng.standard_normal((5, 3)), jnp.bfloat16),
        "layers": [
            {"kernel": _compressed(rng, fmt, stack=(2,) if i == 1 else ())}
            for i, fmt in enumerate(FORMATS)
        ],
        "other": (
            rng.standard_normal(3).astype(ml_dtypes.float8_e4m3fn),
            np.arange(-8, 8).astype(ml_dtypes.int4),
            np.arange(4).astype(ml_dtypes.uint4),
            np.zeros((0, 2), np.float32),
            np.float64(1 / 3),
            None,
            7,
        ),
        "numbered": {0: np.array(True), 10: 2.5, 9: False},
    }
    row = Row(path="a", kind="dot", shape=(4, 32), format="int4", nbits=512, seconds=1.25)
    recipe = Recipe(steps=(RTN(format=Int(bits=4, group_size=8)),))
    return SimpleNamespace(params=params, report=Report(rows=(row,), seconds=3.0), recipe=recipe)


def _assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def _contents(folder):
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def test_exact_round_trip(tmp_path, result):
    checkpoint.save(
        tmp_path / "out", result, files={"config.json": b"{}"}, metadata={"model": "toy"}
    )
    loaded = checkpoint.load(tmp_path / "out")
    _assert_same(loaded.params, result.params)
    assert loaded.recipe == result.recipe
    assert loaded.report == result.report.without_times()
    assert loaded.metadata == {"model": "toy"}
    assert (tmp_path / "out" / "config.json").read_bytes() == b"{}"
    for i in range(len(FORMATS)):
        np.testing.assert_array_equal(
            loaded.params["layers"][i]["kernel"].materialize().astype(jnp.float32),
            result.params["layers"][i]["kernel"].materialize().astype(jnp.float32),
        )
    checkpoint.save(tmp_path / "again", loaded, metadata=loaded.metadata)
    _assert_same(checkpoint.load(tmp_path / "again").params, result.params)


def test_equal_results_give_equal_bytes_whatever_the_folder_and_the_times(tmp_path, result):
    checkpoint.save(tmp_path / "one", result)
    result.report = Report(
        rows=tuple(Row(**{**_fields(row), "seconds": 9.0}) for row in result.report.rows),
        seconds=10.0,
    )
    to_numpy = lambda a: np.asarray(a) if isinstance(a, jax.Array) else a  # noqa: E731
    result.params = jax.tree.map(to_numpy, result.params)
    checkpoint.save(tmp_path / "sub" / "two", result)
    assert _contents(tmp_path / "one") == _contents(tmp_path / "sub" / "two")


def _fields(row):
    return {name: getattr(row, name) for name in row.__struct_fields__}


def test_stored_size_is_near_the_bits_counted(tmp_path, rng):
    w = rng.standard_normal((512, 1024)).astype(np.float32)
    axes = dict(stack_axes=(), out_axes=(0,), in_axes=(1,))
    part = formats.quantize(Int(bits=3, group_size=128), w)
    packed = CompressedArray.from_matrix((part,), leaf_shape=w.shape, dtype=jnp.float32, **axes)
    checkpoint.save(tmp_path / "out", SimpleNamespace(params={"w": packed}))
    stored = sum(map(len, _contents(tmp_path / "out").values()))
    assert stored < formats.nbits(packed) / 8 + 5000


def test_shards_hold_what_one_does(tmp_path, result, monkeypatch):
    checkpoint.save(tmp_path / "one", result)
    monkeypatch.setattr(arrays, "_GROUP_BYTES", 100)
    checkpoint.save(tmp_path / "many", result)
    assert len(list((tmp_path / "many" / "arrays").iterdir())) > 3
    _assert_same(checkpoint.load(tmp_path / "many").params, result.params)


def test_plain_orbax_reads_the_arrays(tmp_path, rng):
    import orbax.checkpoint as ocp

    w = rng.standard_normal((3, 4)).astype(np.float32)
    checkpoint.save(tmp_path / "out", SimpleNamespace(params={"w": w}))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(
            tmp_path / "out" / "arrays" / "00000",
            args=ocp.args.PyTreeRestore(
                restore_args={"a00000": ocp.RestoreArgs(restore_type=np.ndarray)}
            ),
        )
    np.testing.assert_array_equal(tree["a00000"], w)


def test_files_and_metadata_that_no_folder_can_hold(tmp_path, result):
    for name in ("../escaped", "sub/file", "jaxcomp.json", "arrays", ".."):
        with pytest.raises(JaxcompError, match="cannot be the name of a file of its own"):
            checkpoint.save(tmp_path / "out", result, files={name: b"x"})
    with pytest.raises(JaxcompError, match="to be copied, is no file"):
        checkpoint.save(tmp_path / "out", result, files={"a": tmp_path / "missing"})
    with pytest.raises(JaxcompError, match=r"metadata: .* serializable; give what JSON has"):
        checkpoint.save(tmp_path / "out", result, metadata={"a": object()})
    assert _contents(tmp_path) == {}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_something_else_is_refused(tmp_path, result, overwrite):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(JaxcompError, match=r"holds something else \(thesis.tex\)"):
        checkpoint.save(tmp_path / "out", result, overwrite=overwrite)
    with pytest.raises(JaxcompError, match="is a file"):
        checkpoint.save(tmp_path / "out" / "thesis.tex", result, overwrite=overwrite)
    assert _contents(tmp_path) == {"out/thesis.tex": b"precious"}


def test_an_earlier_checkpoint_is_replaced_only_on_request(tmp_path, result):
    (tmp_path / "out").mkdir()  # An empty folder is fine.
    checkpoint.save(tmp_path / "out", result)
    before = _contents(tmp_path)
    with pytest.raises(JaxcompError, match="already holds a compressed model"):
        checkpoint.save(tmp_path / "out", SimpleNamespace(params={"w": np.ones(2)}))
    assert _contents(tmp_path) == before
    checkpoint.save(tmp_path / "out", SimpleNamespace(params={"w": np.ones(2)}), overwrite=True)
    assert list(checkpoint.load(tmp_path / "out").params) == ["w"]


def test_leftovers_of_a_killed_save_do_no_harm(tmp_path, result):
    (tmp_path / ".out.saving" / "arrays").mkdir(parents=True)
    (tmp_path / ".out.saving" / "arrays" / "junk").write_text("x")
    checkpoint.save(tmp_path / "out", result)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert "arrays/junk" not in _contents(tmp_path / "out")


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing", "no folder"])
def test_a_damaged_array_is_named(tmp_path, rng, damage):
    params = {"good": np.ones(3), "layer": {"bad": rng.standard_normal((16, 16))}}
    checkpoint.save(tmp_path / "out", SimpleNamespace(params=params))
    entry = json.loads((tmp_path / "out" / "jaxcomp.json").read_text())["arrays"]["layer/bad"]
    folder = tmp_path / "out" / "arrays" / "00000" / entry["key"]
    (chunk,) = (f for f in folder.iterdir() if not f.name.startswith("."))
    data = chunk.read_bytes()
    if damage == "changed":
        # Another array of the same shape in its place: only the checksum can tell.
        other = tmp_path / "other"
        checkpoint.save(
            other, SimpleNamespace(params={**params, "layer": {"bad": np.ones((16, 16))}})
        )
        shutil.copytree(other / "arrays" / "00000" / entry["key"], folder, dirs_exist_ok=True)
    elif damage == "truncated":
        chunk.write_bytes(data[: len(data) // 2])
    elif damage == "missing":
        (folder / ".zarray").unlink()
    else:
        shutil.rmtree(tmp_path / "out" / "arrays")
    expected = "array '(good|layer/bad)'" if damage == "no folder" else "array 'layer/bad'"
    with pytest.raises(JaxcompError, match=f"{expected}.*make the checkpoint again") as caught:
        checkpoint.load(tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value)


@pytest.mark.parametrize(
    "text, said",
    [
        (None, r"cannot read jaxcomp.json \(No such file"),
        ("{", "jaxcomp.json: is damaged"),
        ("[]", "jaxcomp.json: is damaged"),
        ('{"format_version": 2}', "has format version 2, and this jaxcomp reads version 1"),
    ],
)
def test_damaged_or_newer_metadata(tmp_path, result, text, said):
    checkpoint.save(tmp_path / "out", result)
    file = tmp_path / "out" / "jaxcomp.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(JaxcompError, match=said):
        checkpoint.load(tmp_path / "out")


@pytest.mark.parametrize("remove", ["tree", "recipe", "kind"])
def test_incomplete_metadata(tmp_path, result, remove):
    checkpoint.save(tmp_path / "out", result)
    file = tmp_path / "out" / "jaxcomp.json"
    plain = json.loads(file.read_text())
    if remove == "tree":
        plain["tree"] = {"kind": "dict"}
    elif remove == "recipe":
        plain["recipe"]["steps"][0]["algorithm"] = "from the future"
    else:
        plain["tree"]["kind"] = "graph"
    file.write_text(json.dumps(plain))
    with pytest.raises(JaxcompError, match=r"jaxcomp.json: is damaged or of another version"):
        checkpoint.load(tmp_path / "out")


@pytest.mark.parametrize(
    "params, said",
    [
        ({"a": {"b": object()}}, "a/b: a object cannot be stored"),
        ({"rng": jax.random.key(0)}, "rng: a key<fry> cannot be stored"),
        ({("a", "b"): np.ones(2)}, "keys of a dict must be text or integers"),
    ],
)
def test_what_cannot_be_stored_is_named_and_nothing_is_written(tmp_path, params, said):
    with pytest.raises(JaxcompError, match=said):
        checkpoint.save(tmp_path / "out", SimpleNamespace(params=params))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_says_what_was_needed(tmp_path, result, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(arrays, "_write_group", full)
    with pytest.raises(
        JaxcompError, match=r"no space left.*take [\d,]+ bytes.*nothing is computed"
    ):
        checkpoint.save(tmp_path / "out", result)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_truly_full_disk(tmp_path, rng):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        params = {"w": rng.standard_normal((512, 1024))}
        with pytest.raises(JaxcompError, match=r"no space left.*4,194,304 bytes"):
            checkpoint.save(disk / "out", SimpleNamespace(params=params))
        assert not list(pathlib.Path(disk).iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


def _mask(w):
    """Keeps the two largest of every four."""
    blocks = np.abs(w).reshape(4, 8, 4)
    return (blocks.argsort(-1).argsort(-1) >= 2).reshape(w.shape)


@pytest.mark.parametrize(
    "fmt", [NM(n=2, m=4), NM(n=2, m=4, values=Int(bits=4, group_size=8)), Sparse()]
)
def test_sparse_parts_round_trip(tmp_path, rng, fmt):
    w = rng.standard_normal((4, 32)).astype(np.float32)
    part = formats.sparse.quantize(fmt, w, mask=_mask(w))
    axes = dict(stack_axes=(), out_axes=(0,), in_axes=(1,))
    leaf = CompressedArray.from_matrix((part,), leaf_shape=w.shape, dtype=jnp.float32, **axes)
    checkpoint.save(tmp_path / "out", SimpleNamespace(params={"w": leaf}))
    _assert_same(checkpoint.load(tmp_path / "out").params, {"w": leaf})


@pytest.fixture(scope="module")
def oldest(tmp_path_factory):
    """A checkpoint that the first release of format version 1 wrote, and what it holds."""
    folder = tmp_path_factory.mktemp("oldest")
    archive = pathlib.Path(__file__).parent / "data" / "checkpoint_version_1.tar.xz"
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "version_1", json.loads((folder / "expected.json").read_text())


def test_the_oldest_format_loads_bit_for_bit(oldest):
    path, expected = oldest
    loaded = checkpoint.load(path)
    flat, _ = jax.tree_util.tree_flatten_with_path(loaded.params)
    found = {
        jax.tree_util.keystr(k, simple=True, separator="/"): [
            np.asarray(leaf).dtype.name,
            list(np.shape(leaf)),
            np.asarray(leaf).tobytes().hex(),
        ]
        for k, leaf in flat
    }
    assert found == expected["leaves"]
    compressed = loaded.params["layers"][0]
    assert compressed.keys() == expected["dense"].keys()
    for name, leaf in compressed.items():
        dense = np.asarray(leaf.materialize().astype(jnp.float32))
        assert dense.tobytes().hex() == expected["dense"][name], name
    assert loaded.recipe.dumps() == expected["recipe"]
    assert loaded.report.rows[0].nbits == 512
    assert loaded.metadata == {"model": "toy"}
