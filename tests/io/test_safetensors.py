"""The safetensors reader and writer against the safetensors package, and damaged files."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxcomp.errors import JaxcompError, ModelError
from jaxcomp.io import safetensors as ours


@pytest.fixture
def tensors(rng):
    return {
        "w": rng.normal(size=(3, 5)).astype(np.float32),
        "half": rng.normal(size=(2, 2, 2)).astype(ml_dtypes.bfloat16),
        "ids": np.arange(7, dtype=np.int64),
        "scalar": np.asarray(2.5, np.float16),
        "none": np.zeros((0, 4), np.float32),
        "flags": np.asarray([True, False]),
    }


def equal(got, want):
    assert sorted(got) == sorted(want)
    for name, value in want.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
        assert got[name].tobytes() == value.tobytes(), name


def test_reads_what_the_package_writes(tensors, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    equal(ours.read(path), tensors)


def test_the_package_reads_what_is_written(tensors, tmp_path):
    path = tmp_path / "x.safetensors"
    ours.write(path, tensors, {"format": "pt"})
    equal(safetensors.numpy.load_file(path), tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_eight_bit_floats_survive(tmp_path, name):
    values = np.arange(256, dtype=np.uint8).view(ours.DTYPES[name])
    ours.write(tmp_path / "x.safetensors", {"w": values, "t": values.reshape(16, 16).T})
    got = ours.read(tmp_path / "x.safetensors")
    equal(got, {"w": values, "t": np.ascontiguousarray(values.reshape(16, 16).T)})


def test_released_arrays_stay_valid(tmp_path, rng):
    w = rng.normal(size=(2000, 7)).astype(np.float32)
    ours.write(tmp_path / "x.safetensors", {"a": w[:3], "w": w})
    got = ours.read(tmp_path / "x.safetensors")
    for view in (got["w"], got["w"].T[2:], got["a"][:0], w):
        ours.release(view)
    np.testing.assert_array_equal(got["w"], w)


def test_release_gives_memory_back(tmp_path):
    resident = pytest.importorskip("psutil").Process().memory_info
    size = 64 * 2**20
    ours.write(tmp_path / "x.safetensors", {"w": np.ones(size, np.uint8)})
    w = ours.read(tmp_path / "x.safetensors")["w"]
    assert int(w.sum(dtype=np.int64)) == size
    before = resident().rss
    ours.release(w)
    assert before - resident().rss > size // 2


def damaged(path, kind):
    good = {"w": np.ones((4, 4), np.float32), "v": np.ones(3, np.float32)}
    ours.write(path, good)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]

    def rebuilt(header):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data

    entry = header["w"]
    return {
        "empty": b"",
        "header cut": raw[: 8 + length // 2],
        "data cut": raw[:-20],
        "not safetensors": b"PK\x03\x04" * 100,
        "not json": rebuilt(b"{'w': 1}"),
        "a list": rebuilt([1]),
        "no offsets": rebuilt({**header, "w": {"dtype": "F32", "shape": [4, 4]}}),
        "negative": rebuilt({**header, "w": {**entry, "data_offsets": [-64, 0]}}),
        "wrong size": rebuilt({**header, "w": {**entry, "shape": [4, 5]}}),
        "dtype": rebuilt({**header, "w": {**entry, "dtype": "F4"}}),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "0 bytes, too short"),
        ("header cut", "truncated: the header alone"),
        ("data cut", "truncated: tensor w ends at byte 76 of the data, the file has 56"),
        ("not safetensors", "not a safetensors file"),
        ("not json", "not JSON"),
        ("a list", "not a JSON object"),
        ("no offsets", "tensor w: the header's entry"),
        ("negative", "tensor w: the header's entry"),
        ("wrong size", r"shape \(4, 5\) of F32 needs 80 bytes, the header gives it 64"),
        ("dtype", "tensor w has dtype F4"),
    ],
)
def test_damaged_files_are_refused(tmp_path, kind, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(damaged(path, kind))
    with pytest.raises(ModelError, match=message) as caught:
        ours.read(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        ours.read(tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="holds neither"):
        ours.read_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="not an index"):
        ours.read_folder(tmp_path)


def test_write_refuses_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(JaxcompError, match="cannot store"):
        ours.write(tmp_path / "x", {"w": np.zeros(2, ml_dtypes.int4)})
    with pytest.raises(JaxcompError, match="cannot be written"):
        ours.write(tmp_path / "no" / "x", {"w": np.zeros(2)})

    class Full:
        shape, dtype = (2,), np.dtype(np.float32)

        def __array__(self, dtype=None, copy=None):
            raise OSError(28, "No space left on device")

    with pytest.raises(JaxcompError, match="No space left"):
        ours.write(tmp_path / "x", {"a": np.zeros(2), "w": Full()})
    assert not list(tmp_path.iterdir())
