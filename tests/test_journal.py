import errno
import os
import signal
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxcomp import journal as journal_module
from jaxcomp.errors import JaxcompError
from jaxcomp.io.stacked import Stacked
from jaxcomp.journal import Journal, write_atomically

RUN = {"recipe": "r" * 64, "model": "m" * 64, "data": "d" * 64, "jaxcomp": "0.1.0"}


def _arrays(rng):
    return {
        "f32": rng.standard_normal((3, 5)).astype(np.float32),
        "bf16": rng.standard_normal((2, 3)).astype(ml_dtypes.bfloat16),
        "fp8": rng.standard_normal((7,)).astype(ml_dtypes.float8_e4m3fn),
        "int4": np.arange(-8, 8).astype(ml_dtypes.int4),
        "packed": rng.integers(0, 256, (4, 9), dtype=np.uint8),
        "bools": np.array([True, False]),
        "scalar": np.float64(2.5),
        "empty": np.zeros((0, 3), np.float32),
        "strided": np.arange(12).reshape(3, 4).T,
        "jax": jnp.arange(4, dtype=jnp.bfloat16),
    }


def _same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        value = np.asarray(value)
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        np.testing.assert_array_equal(found[name], value)


def test_records_come_back_exactly(tmp_path, rng):
    arrays, meta = _arrays(rng), {"structure": [1, None, {"a": "ä"}], "error": 0.125}
    with Journal.open(tmp_path / "j", RUN) as journal:
        assert journal.get("layers/0/kernel[3]") is None
        _same(journal.put("layers/0/kernel[3]", arrays, meta)[0], arrays)
        journal.put("layers/0/kernel.3.", {}, None)  # Nearly the same name is another record.
        assert len(journal) == 2
    with Journal.open(tmp_path / "j", RUN) as journal:
        found, found_meta = journal.get("layers/0/kernel[3]")
        _same(found, arrays)
        assert found_meta == meta
        assert journal.get("layers/0/kernel.3.") == ({}, None)
        assert journal.keys() == ["layers/0/kernel.3.", "layers/0/kernel[3]"]


def test_a_stack_is_written_from_its_parts(tmp_path, rng):
    parts = [rng.standard_normal((2, 5)).astype(ml_dtypes.bfloat16) for _ in range(6)]
    parts[3] = np.asfortranarray(parts[3])
    nested = Stacked([Stacked(parts[i : i + 3]) for i in (0, 3)])
    whole = {"odd": np.zeros(3, np.int8), "stack": np.stack(parts).reshape(2, 3, 2, 5)}
    with Journal.open(tmp_path / "j", RUN) as journal:
        _same(journal.put("lazy", {**whole, "stack": nested})[0], whole)
        journal.put("lazy", whole)
        expected = next((tmp_path / "j" / "records").iterdir()).read_bytes()
        journal.put("lazy", {**whole, "stack": nested})
        assert next((tmp_path / "j" / "records").iterdir()).read_bytes() == expected


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="maps need no open file")
def test_more_weights_than_files_may_be_open(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.open(os.devnull, os.O_RDONLY)
    os.close(probe)
    count = probe + 8  # Descriptors are numbered from below.
    with Journal.open(tmp_path / "j", RUN) as journal:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, before[1]))
            kept = [journal.put(str(k), {"a": np.full(3, k)})[0] for k in range(12)]
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[1]
            assert [int(arrays["a"][0]) for arrays in kept] == list(range(12))
            monkeypatch.setattr(resource, "getrlimit", lambda kind: (count, count))
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, before[1]))
            with pytest.raises(JaxcompError, match=r"ulimit -n"):
                journal.get("0")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_arrays_are_mapped_not_copied_and_read_only(tmp_path):
    with Journal.open(tmp_path / "j", RUN) as journal:
        found, _ = journal.put("w", {"a": np.arange(6, dtype=np.float32), "b": np.ones(3)})
        for array in found.values():
            assert not array.flags.owndata and not array.flags.writeable
            assert array.ctypes.data % 64 == 0


def test_equal_contents_give_equal_bytes(tmp_path, rng):
    arrays = _arrays(rng)
    for name in ("one", "two"):
        with Journal.open(tmp_path / name, RUN) as journal:
            journal.put("w", arrays, {"b": 1, "a": 2})
    (one,), (two,) = ([*(tmp_path / n / "records").iterdir()] for n in ("one", "two"))
    assert one.name == two.name and one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("key", ["recipe", "model", "data", "jaxcomp"])
def test_another_run_is_refused_and_told_what_differs(tmp_path, key):
    Journal.open(tmp_path / "j", RUN).close()
    with pytest.raises(JaxcompError, match=f"another {key} .*resume.*delete") as caught:
        Journal.open(tmp_path / "j", {**RUN, key: "x"})
    assert not [k for k in RUN if k != key and f"another {k}" in str(caught.value)]
    Journal.open(tmp_path / "j", RUN).close()  # Nothing was changed by the refusal.


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(JaxcompError, match=r"holds something else \(thesis.tex\)"):
        Journal.open(tmp_path, RUN)
    with pytest.raises(JaxcompError, match="is a file"):
        Journal.open(tmp_path / "thesis.tex", RUN)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_writers_are_refused(tmp_path):
    with Journal.open(tmp_path / "j", RUN):
        with pytest.raises(JaxcompError, match="another process"):
            Journal.open(tmp_path / "j", RUN)
    Journal.open(tmp_path / "j", RUN).close()


@pytest.mark.parametrize("where", ["magic", "header", "array", "truncated", "empty"])
def test_a_damaged_record_is_named_with_the_fix(tmp_path, where):
    with Journal.open(tmp_path / "j", RUN) as journal:
        journal.put("good", {"a": np.arange(100)})
        journal.put("bad", {"a": np.arange(100)})
        (file,) = (tmp_path / "j" / "records").glob("bad-*.record")
        data = bytearray(file.read_bytes())
        if where in ("magic", "header", "array"):
            data[{"magic": 0, "header": 60, "array": -3}[where]] ^= 0xFF
        file.write_bytes(data[: {"truncated": -50, "empty": 0}.get(where, len(data))])
        with pytest.raises(JaxcompError, match=r"damaged.*delete this file") as caught:
            journal.get("bad")
        assert str(file) in str(caught.value)
        assert journal.get("good") is not None
        file.unlink()  # The fix that the message gives.
        assert journal.get("bad") is None
        journal.put("bad", {"a": np.arange(100)})


def test_a_damaged_manifest_is_named(tmp_path):
    Journal.open(tmp_path / "j", RUN).close()
    (tmp_path / "j" / "manifest.json").write_text('{"recipe"')
    with pytest.raises(JaxcompError, match=r"manifest.json.*delete the folder"):
        Journal.open(tmp_path / "j", RUN)


class _FullDisk:
    """A file that takes ``room`` bytes, then says that the disk is full."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data):
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)


def test_a_full_disk_keeps_finished_records(tmp_path, monkeypatch):
    with Journal.open(tmp_path / "j", RUN) as journal:
        journal.put("done", {"a": np.arange(3)})
        with monkeypatch.context() as patch:
            opened = lambda *a, **k: _FullDisk(open(*a, **k), 500)  # noqa: E731
            patch.setattr(journal_module, "open", opened, raising=False)
            with pytest.raises(JaxcompError, match=r"no space left.*8,\d\d\d bytes.*are kept"):
                journal.put("large", {"a": np.arange(1000)})
        assert journal.keys() == ["done"]
        assert not list((tmp_path / "j" / "records").glob("*.tmp"))
        journal.put("large", {"a": np.arange(1000)})


def test_room_is_in_a_file_that_nobody_sees(tmp_path):
    with Journal.open(tmp_path / "j", RUN) as journal:
        files = sorted((tmp_path / "j").rglob("*"))
        room = journal.room((3, 2**18), ml_dtypes.bfloat16)
        assert room.shape == (3, 2**18) and room.dtype == ml_dtypes.bfloat16
        assert not room.any() and room.flags.writeable and not room.ctypes.data % 64
        assert sorted((tmp_path / "j").rglob("*")) == files
        room[2] = 1.5
        journal.put("grown", {"a": room})
        np.testing.assert_array_equal(journal.get("grown")[0]["a"], room)
        assert journal.room((0, 3), np.int8).shape == (0, 3)
        assert journal.room((5,), np.float32).tolist() == [0] * 5


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_truly_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with Journal.open(disk / "j", RUN) as journal:
            journal.put("done", {"a": np.arange(3)})
            with pytest.raises(JaxcompError, match=r"no space left.*1,048,576 bytes"):
                journal.room((2**20,), np.uint8)
            with pytest.raises(JaxcompError, match="no space left"):
                journal.put("large", {"a": np.zeros(1 << 17)})
            assert journal.keys() == ["done"]
            journal.close()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_killed_at_any_moment_it_holds_whole_records_only(tmp_path):
    script = textwrap.dedent(
        """
        import sys
        import numpy as np
        from jaxcomp.journal import Journal
        journal = Journal.open(sys.argv[1], {"run": 1})
        print("ready", flush=True)
        for i in range(10**6):
            if journal.get(str(i)) is None:
                journal.put(str(i), {"a": np.full(50_000, i)}, i)
        """
    )
    count = 0
    for delay in (0.0, 0.01, 0.03, 0.07):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "j")], stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with Journal.open(tmp_path / "j", {"run": 1}) as journal:
            assert len(journal) >= count  # Nothing already written is lost.
            count = len(journal)
            for i in range(count):
                arrays, meta = journal.get(str(i))
                assert meta == i and (arrays["a"] == i).all()
            assert not list((tmp_path / "j" / "records").glob("*.tmp"))
    assert count > 0


def test_killed_before_the_manifest_it_starts_over(tmp_path):
    (tmp_path / "j" / "records").mkdir(parents=True)
    (tmp_path / "j" / "lock").touch()
    (tmp_path / "j" / "manifest.json.tmp").write_text("{")
    with Journal.open(tmp_path / "j", RUN) as journal:
        assert len(journal) == 0


def test_remove(tmp_path):
    with Journal.open(tmp_path / "j", RUN) as journal:
        arrays, _ = journal.put("w", {"a": np.arange(3)})
        journal.remove()
    assert not (tmp_path / "j").exists()
    assert arrays["a"].tolist() == [0, 1, 2]  # Mapped arrays outlive the file's name.


def test_write_atomically_replaces(tmp_path):
    write_atomically(tmp_path / "f", b"one")
    write_atomically(tmp_path / "f", b"two")
    assert (tmp_path / "f").read_bytes() == b"two"
    assert [f.name for f in tmp_path.iterdir()] == ["f"]
