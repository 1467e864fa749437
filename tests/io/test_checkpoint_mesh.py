"""Checkpoints in parts: some leaves only, and shards written from and read onto meshes."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxcomp as jc
from jaxcomp import formats
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import CompressedArray, Int
from jaxcomp.io import arrays, reading

RULES = [("embed", P("b")), ("layer/w", P("a", "b")), ("layer/[bc]*", P("a"))]


def mesh_of(a, b):
    devices = np.array(jax.devices()[: a * b]).reshape(a, b)
    return jax.sharding.Mesh(devices, ("a", "b"))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((8, 64)).astype(np.float32)
    part = formats.quantize(Int(bits=4, group_size=16), w)
    return {
        "embed": jnp.asarray(rng.standard_normal((8, 3)), jnp.bfloat16),
        "layer": {
            "w": CompressedArray.from_matrix((part,), w.shape, jnp.float32),
            "codes": np.arange(-8, 8).astype(jnp.int4.dtype),
            "bias": rng.standard_normal(8).astype(np.float32),
            "scale": np.float32(3),
            "offset": np.array(-3, jnp.int4),
        },
        "steps": 7,
    }


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, params):
    """The parameters saved from a 2 x 2 mesh."""
    path = tmp_path_factory.mktemp("checkpoint") / "sharded"
    jc.save(path, SimpleNamespace(params=jc.shard(params, mesh_of(2, 2), RULES)))
    return path


def test_only_the_leaves_asked_for_are_read(folder, params):
    loaded = jc.load(folder, include=["layer/[wb]*"]).params
    assert_same(loaded["layer"]["w"], params["layer"]["w"])
    assert_same(loaded["layer"]["bias"], params["layer"]["bias"])
    assert loaded["embed"] == jax.ShapeDtypeStruct((8, 3), jnp.bfloat16)
    assert loaded["layer"]["codes"] == jax.ShapeDtypeStruct((16,), jnp.int4)
    assert loaded["steps"] == 7
    # A compressed leaf stands for its dense shape, not for those of its arrays.
    loaded = jc.load(folder, include=["re:emb.*"]).params
    assert loaded["layer"]["w"] == jax.ShapeDtypeStruct((8, 64), jnp.float32)
    assert_same(loaded["embed"], params["embed"])


def test_damage_outside_of_what_is_asked_for_is_no_matter(folder, tmp_path, params):
    jc.save(tmp_path / "out", SimpleNamespace(params=params))
    entry = json.loads((tmp_path / "out/jaxcomp.json").read_text())["arrays"]["embed"]
    (tmp_path / "out/arrays" / entry["shard"] / entry["key"] / "0.0").unlink()
    jc.load(tmp_path / "out", include=["layer/*"])
    with pytest.raises(JaxcompError, match=r"array 'embed' is damaged: its file .* is missing"):
        jc.load(tmp_path / "out")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"include": ["layer/w", "*/bais"]}, r"'\*/bais' matches none of its 6 arrays.*layer/bias"),
        ({"include": "layer/w"}, r"write include=\['layer/w'\]"),
        ({"rules": [("*", P("a"))]}, "give mesh="),
    ],
)
def test_what_cannot_be_read_so(folder, options, said):
    with pytest.raises(JaxcompError, match=said):
        jc.load(folder, **options)


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 4), (2, 2)])
def test_any_mesh_restores_what_another_saved(folder, params, shape):
    mesh = mesh_of(*shape)
    loaded = jc.load(folder, mesh=mesh, rules=RULES).params
    assert_same(loaded, params)
    expected = jc.sharding.shardings(params, RULES, mesh)
    for array, sharding in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        assert np.ndim(array) == 0 or array.sharding == sharding


def test_without_a_mesh_everything_is_put_together(folder, params):
    loaded = jc.load(folder).params
    assert_same(loaded, params)
    assert len(loaded["embed"].sharding.device_set) == 1


def test_a_shard_is_a_file_and_replicas_are_written_once(folder):
    entries = json.loads((folder / "jaxcomp.json").read_text())["arrays"]
    files = {name: len(entry["sha256"]) - 1 for name, entry in entries.items()}
    assert files["layer/w/0/values"] == 4  # 2 x 2
    assert files["embed"] == files["layer/bias"] == 2
    assert files["layer/scale"] == 1


def test_only_the_files_that_the_devices_need_are_read(folder, monkeypatch):
    """What one device of four asks for is one file of four."""
    read = []
    check = reading.Reader._check
    monkeypatch.setattr(
        reading.Reader, "_check", lambda self, n, f: (read.append((n, f)), check(self, n, f))
    )
    entries = json.loads((folder / "jaxcomp.json").read_text())["arrays"]
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    made = []

    def first_device(shape, sharding, piece):
        made.append(piece((slice(0, 4), slice(0, 16))))
        return made[-1]

    monkeypatch.setattr(jax, "make_array_from_callback", first_device)
    reading.Reader(folder / "arrays", entries).spread("layer/w/0/values", one)
    assert made[0].shape == (4, 16)
    assert read == [("layer/w/0/values", ".zarray"), ("layer/w/0/values", "0.0")]


def test_equal_shards_give_equal_bytes(folder, params, tmp_path):
    jc.save(tmp_path / "again", jc.load(folder, mesh=mesh_of(2, 2), rules=RULES))
    one, two = (
        {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}
        for root in (folder, tmp_path / "again")
    )
    assert one == two


def test_a_damaged_shard_is_named(tmp_path, params):
    placed = jc.shard(params, mesh_of(2, 2), RULES)
    jc.save(tmp_path / "out", SimpleNamespace(params=placed))
    entry = json.loads((tmp_path / "out/jaxcomp.json").read_text())["arrays"]["layer/w/0/values"]
    file = tmp_path / "out/arrays" / entry["shard"] / entry["key"] / "1.0"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(JaxcompError, match=r"array 'layer/w/0/values' is damaged.*1\.0 does not"):
        jc.load(tmp_path / "out", mesh=mesh_of(4, 1), rules=RULES)


def test_no_shard_is_gathered(tmp_path, monkeypatch):
    """Pieces of at most the chunk's size go to disk, whatever the array's size."""
    monkeypatch.setattr(arrays, "_CHUNK_BYTES", 64)
    w = np.arange(7 * 12, dtype=np.float32).reshape(12, 7)
    mesh = mesh_of(4, 1)
    placed = jc.shard({"w": w, "v": w[:7]}, mesh, [("w", P("a"))])
    jc.save(tmp_path / "out", SimpleNamespace(params=placed))
    entry = json.loads((tmp_path / "out/jaxcomp.json").read_text())["arrays"]
    assert len(entry["w"]["sha256"]) == 1 + 12  # 28 bytes each: a shard of 3 rows has no halves.
    assert len(entry["v"]["sha256"]) == 1 + 4  # Replicated: two rows each.
    assert_same(jc.load(tmp_path / "out").params, {"w": w, "v": w[:7]})
    loaded = jc.load(tmp_path / "out", mesh=mesh_of(2, 2), rules=[("w", P(("b", "a")))])
    assert_same(loaded.params, {"w": w, "v": w[:7]})
