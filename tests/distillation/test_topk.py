"""Compressed teacher logits: against the full divergence, and on disk through kills and damage."""

import functools
import itertools
import json
import multiprocessing
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.distillation import (
    TopKReader,
    TopKWriter,
    compress_logits,
    fingerprint,
    kl_divergence,
    topk_kl_divergence,
)
from jaxcomp.errors import DataError, JaxcompError
from tests.helpers import x64


def logits(rng, *shape):
    return jnp.float32(3 * rng.normal(size=shape)), jnp.float32(3 * rng.normal(size=shape))


def test_all_entries_kept_is_the_full_divergence(rng):
    z, v = logits(rng, 6, 11)
    got = compared(z, v, 11, 4.0)
    want = jax.jit(jax.value_and_grad(lambda z: kl_divergence(z, v, 4.0).sum()))(z)
    np.testing.assert_allclose(got[0].sum(), want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=2e-6)


@functools.partial(jax.jit, static_argnames=("k", "t"))
def compared(z, v, k, t=1.0, where=None):
    """The loss of positions, the gradient of its sum, and the compressed teacher."""
    top = compress_logits(v, k, t)
    out, pull = jax.vjp(lambda z: topk_kl_divergence(z, top, where), z)
    return out, pull(jnp.ones_like(out))[0], top


@pytest.mark.parametrize("k", [1, 3, 10])
def test_it_is_the_divergence_of_merged_distributions(rng, k):
    z, v = (np.float64(a) for a in logits(rng, 6, 11))
    p, q = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (v, z))
    order = np.argsort(-p, -1)
    merged = []
    for d in (p, q):
        d = np.take_along_axis(d, order, -1)
        merged.append(np.concatenate([d[:, :k], d[:, k:].sum(-1, keepdims=True)], -1))
    want = (merged[0] * np.log(merged[0] / merged[1])).sum(-1)
    with x64():
        got, _, top = compared(z, v, k)
        np.testing.assert_allclose(got, want, rtol=1e-10)
        np.testing.assert_array_equal(top.indices, order[:, :k])
        total = np.exp(top.log_probs).sum(-1) + np.exp(top.log_tail)
        np.testing.assert_allclose(total, 1, rtol=1e-14)


def test_never_above_the_full_divergence_and_rising_with_k(rng):
    z, v = logits(rng, 100, 17)
    losses = [compared(z, v, k)[0] for k in (1, 6, 17)]
    losses.append(jax.jit(kl_divergence)(z, v))
    for smaller, larger in itertools.pairwise(losses):
        assert np.all(smaller <= larger + 1e-5)
    assert np.mean(losses[0]) < 0.9 * np.mean(losses[-1])


def test_zero_at_equality_and_gradients_against_finite_differences(rng):
    z, v = (np.float64(a) for a in logits(rng, 9))
    with x64():
        _, gradient, top = compared(z, v, 3, 2.0)
        np.testing.assert_allclose(compared(v + 7, v, 3, 2.0)[0], 0, atol=1e-14)
        h = 1e-5 * np.eye(9)
        many = jax.jit(jax.vmap(lambda z: topk_kl_divergence(z, top)))
        np.testing.assert_allclose(gradient, (many(z + h) - many(z - h)) / 2e-5, atol=1e-8)


def test_masks_infinities_and_sharp_teachers(rng):
    z, v = (np.asarray(a).copy() for a in logits(rng, 6, 8))
    where = np.array([True, True, False, False, False, False])
    want = compared(z, v, 3)[0]
    broken = np.where(where[:, None], z, np.nan)
    loss, gradient, _ = compared(broken, v, 3, where=where)
    np.testing.assert_allclose(loss, np.where(where, want, 0), rtol=1e-6)
    assert np.isfinite(gradient).all() and np.all(gradient[2:] == 0)

    inside = (np.arange(8) < 6)[None]
    padded = [np.where(inside, a, -np.inf) for a in (z, v)]
    want = jax.jit(kl_divergence)(*padded)
    np.testing.assert_allclose(compared(*padded, 7)[0], want, rtol=1e-5, atol=1e-6)
    masked = jax.jit(compress_logits, static_argnums=1)(v, 7, where=inside)
    got = jax.jit(topk_kl_divergence)(np.where(inside, z, np.nan), masked, inside)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

    loss, gradient, _ = compared(1e4 * z, 1e5 * v, 3)
    assert np.isfinite(loss).all() and np.isfinite(gradient).all()


def test_it_is_a_pytree_under_jit_and_vmap(rng):
    z, v = logits(rng, 6, 8)
    want, _, top = compared(z, v, 3, 2.0)
    assert top.k == 3 and top.vocab_size == 8 and top.temperature == 2.0
    got = jax.jit(jax.vmap(topk_kl_divergence))(z, top)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_bad_input_is_refused(rng):
    z, v = logits(rng, 4, 8)
    top = compress_logits(v, 3)
    with pytest.raises(JaxcompError, match="vocabulary has 8"):
        topk_kl_divergence(z[:, :7], top)
    with pytest.raises(JaxcompError, match=r"positions are \(4,\)"):
        topk_kl_divergence(z[:3], top)
    with pytest.raises(JaxcompError, match="k 9"):
        compress_logits(v, 9)
    with pytest.raises(JaxcompError, match="Python number"):
        compress_logits(v, 3, jnp.array(2.0))


# On disk.

OPTIONS = dict(record_shape=(2, 3), vocab_size=8, k=3, teacher="t", data="d", records_per_shard=3)


compress = jax.jit(compress_logits, static_argnums=(1, 2))


def batches(count, k=3):
    rng = np.random.default_rng(1)
    return [
        jax.tree.map(np.asarray, compress(np.float32(rng.normal(size=(2, 3, 8))), k))
        for _ in range(count)
    ]


def write(path, tops, **options):
    with TopKWriter(path, **{**OPTIONS, **options}) as writer:
        for top in tops[len(writer) :]:
            writer.append(top)


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


def check(reader, tops):
    assert len(reader) == len(tops)
    for i in (*range(len(tops)), -1):
        jax.tree.map(np.testing.assert_array_equal, reader[i], tops[i])


@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_what_is_written_is_read(tmp_path, count):
    tops = batches(count)
    write(tmp_path / "a", tops)
    reader = TopKReader(tmp_path / "a", teacher="t", data="d", k=3)
    if count:
        check(reader, tops)
        assert [top.k for top in reader] == [3] * count
    header = json.loads((tmp_path / "a" / "header.json").read_text())
    assert header["count"] == count == len(reader)
    assert {header[key] for key in ("vocab_size", "k", "teacher", "data")} == {8, 3, "t", "d"}
    assert len(list((tmp_path / "a").glob("shard-*"))) == -(-count // 3)


def test_a_batch_goes_into_a_jitted_step(tmp_path, rng):
    tops = batches(2)
    write(tmp_path, tops)
    z = jnp.float32(rng.normal(size=(2, 3, 8)))
    step = jax.jit(topk_kl_divergence)
    np.testing.assert_array_equal(step(z, TopKReader(tmp_path)[1]), step(z, tops[1]))


def test_half_precision_comes_back_normalised(tmp_path):
    tops = batches(2)
    write(tmp_path, tops, dtype="float16")
    got = TopKReader(tmp_path)[1]
    np.testing.assert_allclose(got.log_probs, tops[1].log_probs, atol=2e-3)
    total = np.exp(got.log_probs).sum(-1) + np.exp(got.log_tail)
    assert got.log_probs.dtype == np.float32
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_all_entries_kept_survive_the_disk(tmp_path):
    tops = batches(1, k=8)
    write(tmp_path, tops, k=8)
    assert np.isneginf(TopKReader(tmp_path)[0].log_tail).all()


@pytest.mark.parametrize("written", [0, 2, 3, 5, 6])
@pytest.mark.parametrize("torn", [0, 1, 100])
def test_resuming_after_a_kill_gives_the_same_bytes(tmp_path, written, torn):
    tops = batches(7)
    write(tmp_path / "whole", tops)
    writer = TopKWriter(tmp_path / "killed", **OPTIONS)
    for top in tops[:written]:
        writer.append(top)
    size = writer._record.itemsize
    writer.close(finished=False)  # as the kernel does for a process that dies
    assert torn < size
    shard = tmp_path / "killed" / f"shard-{written // 3:05d}.bin"
    with open(shard, "ab") as stream:
        stream.write(b"\xff" * torn)
    if written == 5:  # and a whole record of pages that never reached the disk
        with open(shard, "ab") as stream:
            stream.write(bytes(size - torn))
    with TopKWriter(tmp_path / "killed", **OPTIONS) as writer:
        assert len(writer) == written
        for top in tops[written:]:
            writer.append(top)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def _endless(path, tops, ready):
    writer = TopKWriter(path, **OPTIONS)
    for i, top in enumerate(tops):
        if i == 4:
            ready.set()
            signal.pause()
        writer.append(top)


def test_a_killed_process(tmp_path):
    tops = batches(7)
    write(tmp_path / "whole", tops)
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    process = context.Process(target=_endless, args=(tmp_path / "killed", tops, ready))
    process.start()
    try:
        assert ready.wait(60)
        with pytest.raises(DataError, match="another process"):
            TopKWriter(tmp_path / "killed", **OPTIONS)
    finally:
        process.kill()
        process.join()
    write(tmp_path / "killed", tops)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_an_exception_leaves_it_unfinished_and_an_end_may_be_moved(tmp_path):
    tops = batches(5)
    with pytest.raises(KeyboardInterrupt), TopKWriter(tmp_path / "a", **OPTIONS) as writer:
        writer.append(tops[0])
        raise KeyboardInterrupt
    with pytest.raises(DataError, match=r"unfinished \(1 batches\)"):
        TopKReader(tmp_path / "a")
    check(TopKReader(tmp_path / "a", unfinished=True), tops[:1])
    write(tmp_path / "a", tops[:4])
    check(TopKReader(tmp_path / "a"), tops[:4])
    write(tmp_path / "a", tops)
    write(tmp_path / "b", tops)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("teacher", "other"),
        ("data", "other"),
        ("k", 4),
        ("vocab_size", 9),
        ("temperature", 2.0),
        ("dtype", "float16"),
        ("record_shape", (3, 2)),
        ("records_per_shard", 4),
    ],
)
def test_another_stream_is_not_continued(tmp_path, option, value):
    write(tmp_path, batches(2))
    before = contents(tmp_path)
    with pytest.raises(DataError, match=f"other top-k logits .*{option} is"):
        TopKWriter(tmp_path, **{**OPTIONS, option: value})
    assert contents(tmp_path) == before
    if option in ("teacher", "data", "k"):
        with pytest.raises(DataError, match=f"its {option} is"):
            TopKReader(tmp_path, **{option: value})


def test_damage_is_named(tmp_path):
    tops = batches(5)
    write(tmp_path, tops)
    first, second = tmp_path / "shard-00000.bin", tmp_path / "shard-00001.bin"
    good = first.read_bytes(), second.read_bytes()

    second.write_bytes(good[1][:-1])
    for opened in (TopKReader, lambda path: TopKWriter(path, **OPTIONS)):
        with pytest.raises(DataError, match=r"shard-00001.bin: has .* bytes instead of"):
            opened(tmp_path)
    second.write_bytes(good[1] + b"x")
    with pytest.raises(DataError, match="instead of"):
        TopKReader(tmp_path)
    second.unlink()
    with pytest.raises(DataError, match=r"shard-00001.bin: is missing"):
        TopKReader(tmp_path)
    second.write_bytes(good[1])

    size = len(good[0]) // 3
    damaged = bytearray(good[0])
    damaged[size + 5] ^= 1
    first.write_bytes(damaged)
    reader = TopKReader(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, reader[0], tops[0])
    with pytest.raises(DataError, match=r"shard-00000.bin: batch 1 is damaged"):
        reader[1]
    with pytest.raises(DataError, match="no batch 5"):
        reader[5]

    (tmp_path / "header.json").write_text('{"format": "jaxcomp top-k", "version": 1')
    with pytest.raises(DataError, match=r"header.json: cannot be read"):
        TopKReader(tmp_path)
    (tmp_path / "header.json").write_text('{"format": "something", "version": 1}')
    with pytest.raises(DataError, match="is not 'jaxcomp top-k'"):
        TopKReader(tmp_path)


def test_an_unfinished_stream_with_a_hole_is_refused(tmp_path):
    writer = TopKWriter(tmp_path, **OPTIONS)
    for top in batches(7):
        writer.append(top)
    writer.close(finished=False)
    middle = tmp_path / "shard-00001.bin"
    good = middle.read_bytes()
    middle.write_bytes(good[:-1])
    with pytest.raises(DataError, match="instead of"):
        TopKWriter(tmp_path, **OPTIONS)
    middle.unlink()
    with pytest.raises(DataError, match=r"shard-00001.bin: is missing"):
        TopKWriter(tmp_path, **OPTIONS)


def test_writer_refuses_what_does_not_fit(tmp_path, rng):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(DataError, match="holds something else"):
        TopKWriter(tmp_path / "notes", **OPTIONS)
    assert os.listdir(tmp_path / "notes") == ["a.txt"]
    with pytest.raises(DataError, match="is a file"):
        TopKWriter(tmp_path / "notes" / "a.txt", **OPTIONS)
    with pytest.raises(DataError, match="holds no top-k logits"):
        TopKReader(tmp_path)
    for option, value in (("dtype", "int8"), ("k", 9), ("records_per_shard", 0)):
        with pytest.raises(DataError, match=option):
            TopKWriter(tmp_path / "new", **{**OPTIONS, option: value})
    assert not (tmp_path / "new").exists()
    with TopKWriter(tmp_path / "new", **OPTIONS) as writer:
        v = jnp.float32(rng.normal(size=(1, 3, 8)))
        with pytest.raises(DataError, match=r"batch 0: record_shape \(1, 3\) .*pad the last"):
            writer.append(compress_logits(v, 3))
        v = jnp.full((2, 3, 8), jnp.nan)
        with pytest.raises(DataError, match="NaN"):
            writer.append(compress_logits(v, 3))
        with pytest.raises(DataError, match=r"temperature 2.0 is not 1.0"):
            writer.append(compress_logits(jnp.zeros((2, 3, 8)), 3, 2.0))
        assert len(writer) == 0
    with pytest.raises(DataError, match="closed"):
        writer.append(batches(1)[0])


def test_fingerprints_tell_values_names_and_dtypes_apart():
    base = {"w": np.arange(4.0)}
    others = [
        {"w": np.arange(4.0) + 1},
        {"v": np.arange(4.0)},
        {"w": np.arange(4.0, dtype=np.float32)},
        {"w": np.arange(4.0).reshape(2, 2)},
    ]
    assert len({fingerprint(tree) for tree in (base, *others)}) == 5
    assert fingerprint({"k": jax.random.key(0)}) != fingerprint({"k": jax.random.key(1)})
    assert fingerprint({"w": jnp.ones(3)}) == fingerprint({"w": np.ones(3, np.float32)})


def test_a_full_disk_leaves_no_half_of_a_record(tmp_path):
    tops = batches(2)
    with TopKWriter(tmp_path, **OPTIONS) as writer:
        writer.append(tops[0])
        real = writer._file

        class Full:
            name = real.name

            def write(self, data):
                real.write(data[:10])
                raise OSError(28, "No space left on device")

        writer._file = Full()
        with pytest.raises(OSError, match="No space"):
            writer.append(tops[1])
        writer._file = real
        writer.append(tops[1])
    check(TopKReader(tmp_path), tops)
