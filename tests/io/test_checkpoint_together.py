"""Saving in the background, and by several processes."""

import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxcomp as jc
from jaxcomp.errors import JaxcompError
from jaxcomp.io import folder
from tests import processes


def contents(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.fixture
def held_back(monkeypatch):
    """Saves stop before they write, until this event is set."""
    go, write = threading.Event(), folder._write

    def later(*args):
        assert go.wait(60)
        write(*args)

    monkeypatch.setattr(folder, "_write", later)
    yield go
    go.set()


def test_what_was_there_at_the_call_is_saved(tmp_path, held_back):
    host, device = np.arange(6.0), jnp.arange(5.0)
    metadata = {"step": [1]}
    saving = jc.save(
        tmp_path / "out",
        SimpleNamespace(params={"w": host}),
        state={"w": device},
        metadata=metadata,
        wait=False,
    )
    # Donated, overwritten, changed: while nothing was written yet.
    host[:] = -1
    device.delete()
    metadata["step"].append(2)
    assert not saving.done() and not (tmp_path / "out").exists()
    with pytest.raises(JaxcompError, match="another save writes to it"):
        jc.save(tmp_path / "out", SimpleNamespace(params={"w": np.ones(1)}))
    held_back.set()
    jc.save(tmp_path / "other", SimpleNamespace(params={"w": np.ones(1)}))
    saving.wait()
    assert saving.done()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["other", "out"]
    loaded = jc.load(tmp_path / "out", like={"w": jnp.zeros(5)})
    np.testing.assert_array_equal(loaded.params["w"], np.arange(6.0))
    np.testing.assert_array_equal(loaded.state["w"], np.arange(5.0))
    assert loaded.metadata == {"step": [1]}
    # A save that waits writes the same bytes, and the lock is free again.
    jc.save(
        tmp_path / "waited",
        SimpleNamespace(params={"w": np.arange(6.0)}),
        state={"w": np.arange(5, dtype=np.float32)},
        metadata={"step": [1]},
    )
    assert contents(tmp_path / "waited") == contents(tmp_path / "out")


def test_an_error_in_the_background_is_raised_by_wait_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "_write", full)
    saving = jc.save(tmp_path / "out", state={"w": np.ones(4)}, wait=False)
    with pytest.raises(JaxcompError, match=r"no space left.*take 32 bytes"):
        saving.wait()
    assert not list(tmp_path.iterdir())


def test_read_only_arrays_are_not_copied():
    w = np.arange(4.0)
    w.flags.writeable = False
    held = folder.Contents({"w": jc.io.arrays.source(w)}, {}, {}).on_host()
    ((_, piece),) = held.sources["w"].pieces
    assert piece is w


SAVE = """
    import numpy as np, jax, jax.numpy as jnp, pathlib
    from types import SimpleNamespace
    from jax.sharding import PartitionSpec as P
    import jaxcomp as jc
    from jaxcomp.io import folder

    w = np.arange(64, dtype=np.float32).reshape(8, 8)
    part = jc.formats.quantize(jc.formats.Int(4, group_size=4), w)
    params = {
        "w": jc.CompressedArray.from_matrix((part,), w.shape, jnp.float32),
        "embed": w[:, :4], "norm": np.ones(3, np.float32),
    }
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
    rules = [("w", P("a", "b")), ("embed", P("b"))]
    placed = SimpleNamespace(params=jc.shard(params, mesh, rules))
    local = {"key": jax.random.key(3), "step": 5, "local": jnp.arange(3.0)}
    jc.save(FOLDER / "out", placed, state=local)
    jc.save(FOLDER / "later", placed, state=local, wait=False).wait()
    loaded = jc.load(FOLDER / "out", mesh=mesh, rules=[("w", P(("a", "b")))]).params
    for shard in loaded["w"].parts[0].values.addressable_shards:
        np.testing.assert_array_equal(shard.data, part.values[shard.index])

    def expect(text, call):
        try:
            call()
        except jc.JaxcompError as error:
            assert text in str(error), error
        else:
            raise AssertionError("no error: " + text)

    # One process cannot prepare, the trees differ, one cannot write: an error on both.
    bad = {"w": object() if PROCESS else w}
    expect("state w: a object cannot be stored", lambda: jc.save(FOLDER / "bad", state=bad))
    bad = {"w": w[PROCESS:]}
    expect("save different trees", lambda: jc.save(FOLDER / "bad", state=bad))
    write = folder._write
    def full(*args):
        if PROCESS:
            raise OSError(28, "No space left on device")
    folder._write = lambda *args: (full(), write(*args))
    expect(
        "no space left on the disk" if PROCESS else "process 1 could not save: OSError",
        lambda: jc.save(FOLDER / "bad", placed),
    )
    print("well")
"""


def test_two_processes_save_and_one_loads(tmp_path):
    with processes.start(SAVE, 2, tmp_path) as group:
        assert all("well" in output for output in group.wait())
    found = [f.name for f in tmp_path.iterdir() if not f.name.startswith("processes-")]
    assert sorted(found) == ["later", "out"]
    assert contents(tmp_path / "later") == contents(tmp_path / "out")
    w = np.arange(64, dtype=np.float32).reshape(8, 8)
    part = jc.formats.quantize(jc.formats.Int(4, group_size=4), w)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
    like = {"key": jax.random.key(0), "step": 0, "local": jnp.zeros(3)}
    for options in ({}, {"mesh": mesh, "rules": [("w", P("x")), ("embed", P(None, "x"))]}):
        loaded = jc.load(tmp_path / "out", like=like, **options)
        np.testing.assert_array_equal(loaded.params["w"].parts[0].values, part.values)
        np.testing.assert_array_equal(loaded.params["w"].parts[0].scale, part.scale)
        np.testing.assert_array_equal(loaded.params["embed"], w[:, :4])
        np.testing.assert_array_equal(loaded.params["norm"], np.ones(3))
        assert loaded.state["step"] == 5
        np.testing.assert_array_equal(loaded.state["local"], np.arange(3.0))
        assert (loaded.state["key"] == jax.random.key(3)).all()


LOAD = """
    import numpy as np, jax
    from jax.sharding import PartitionSpec as P
    import jaxcomp as jc
    from jaxcomp.io import reading

    opened = []
    check = reading.Reader._check
    def noted(reader, name, file):
        opened.append((name, file))
        check(reader, name, file)
    reading.Reader._check = noted
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
    rules = [("w", P("a", "b")), ("embed", P("b"))]
    saved = jc.load(FOLDER / "one", mesh=mesh, rules=rules)
    assert len(jax.tree.leaves(saved.params)[0].addressable_shards) == 1
    # Files of the split array that lie in another process's part are not opened.
    print(sorted(file for name, file in opened if name == "w/0/values" and file[0] != "."))
    jc.save(FOLDER / "four", saved)
    dense = jc.shard(jc.load(FOLDER / "one"), mesh, rules)
    jc.save(FOLDER / "placed", dense)
"""


def test_one_process_saves_and_four_load(tmp_path):
    """Written again, by four processes, the bytes are those of one with four devices."""
    w = np.arange(64, dtype=np.float32).reshape(8, 8)
    part = jc.formats.quantize(jc.formats.Int(4, group_size=4), w)
    leaf = jc.CompressedArray.from_matrix((part,), w.shape, jnp.float32)
    tree = {"w": leaf, "embed": w[:, :4], "norm": np.ones(3, np.float32)}
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    rules = [("w", P("a", "b")), ("embed", P("b"))]
    placed = SimpleNamespace(params=jc.shard(tree, mesh, rules))
    jc.save(tmp_path / "one", placed)
    with processes.start(LOAD, 4, tmp_path, devices=1) as group:
        printed = group.wait()
    assert sorted(p.split()[-1] for p in printed) == [f"['{i}.{j}']" for i in "01" for j in "01"]
    expected = contents(tmp_path / "one")
    assert contents(tmp_path / "placed") == contents(tmp_path / "four") == expected
