"""Decoding against attention over the part of the cache that is filled, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels import chips
from jaxcomp.kernels.sparse_attention import (
    Mask,
    blocks,
    causal,
    decode_attention,
    fixed,
    global_,
    per_head,
    random,
    rows,
    tpu_decode,
    tpu_decode_kernel,
    window,
)

from tests.fuzz import fuzz
from tests.kernels.sparse_attention import cases

LENGTHS = (300, 5, 2, 129)


def check(
    run, mask=None, dtype="float32", code=None, lengths=LENGTHS, capacity=320, heads=4, kv_heads=2,
    dim=128, **options,
):  # fmt: skip
    """Compares each sequence with attention over its own keys; the rest of the cache is NaN."""
    sizes = {"queries": 3, "keys": capacity, "heads": heads, "kv_heads": kv_heads, "dim": dim}
    q, k, v = (x.astype(dtype) for x in cases.operands(1, batch=len(lengths), **sizes))
    scales = {}
    if code:
        (k, k_scale), (v, v_scale) = (cases.quantized(np.float32(x), code) for x in (k, v))
        scales = {"k_scale": k_scale, "v_scale": v_scale}
    filled = np.arange(capacity)[None, :, None] < np.array(lengths)[:, None, None]
    held = {n: jnp.where(filled, x, jnp.nan) for n, x in scales.items()}
    cached = [jnp.asarray(x) if code else jnp.where(filled[..., None], x, jnp.nan) for x in (k, v)]
    out, lse = run(
        jnp.asarray(q), *cached, jnp.asarray(lengths), mask,
        return_logsumexp=True, **held, **options,
    )  # fmt: skip
    assert out.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    out, lse = np.asarray(out), np.asarray(lse)
    for b, length in enumerate(lengths):
        rule = Moved(causal() if mask is None else mask, length - 3)
        part = {n: x[b : b + 1, :length] for n, x in scales.items()}
        rest = (k[b : b + 1, :length], v[b : b + 1, :length])
        want, want_lse = cases.expected(q[b : b + 1], *rest, rule, **part, **options)
        # A sequence shorter than the queries: those before its start look at nothing.
        want[:, : max(3 - length, 0)] = 0
        want_lse[:, :, : max(3 - length, 0)] = -np.inf
        cases.assert_close(out[b : b + 1], want, dtype)
        cases.assert_close(lse[b : b + 1], want_lse, dtype)


class Moved(Mask):
    """A mask whose queries are further on."""

    def __init__(self, mask, by):
        self.mask, self.by = mask, by

    def allowed(self, q, k):
        return self.mask.allowed(q + self.by, k)


# Of a cache of 320 keys: every kind of mask that a step looks up by its position.
CELLS = np.random.default_rng(5).random((5, 5)) < 0.5
ROWS = {
    "bigbird": (window(64) | global_(5) | random(1, seed=3, block_size=64), {}),
    "heads": (
        per_head([~blocks(CELLS, 64), window(70), random(1, block_size=100), fixed(80, 3)]),
        {"soft_cap": 3.0, "code": "int8", "dtype": "bfloat16"},
    ),
    "segments and span": (
        window(40) | global_(2),
        {"segments": True, "code": "float8_e4m3fn", "span": [5.0, 0.0, 90.0, 400.0]},
    ),
}  # fmt: skip


def check_rows(
    run, mask, lengths=(300, 2), kv_heads=2, dim=128, span=None, segments=False, code=None,
    dtype="float32", **options,
):  # fmt: skip
    """Compares each step with the same rows of attention over all positions, in float64."""
    capacity, queries, batch = 320, 3, len(lengths)
    sizes = {"queries": queries, "keys": capacity, "heads": 4, "kv_heads": kv_heads, "dim": dim}
    q, k, v = (x.astype(dtype) for x in cases.operands(1, batch=batch, **sizes))
    wanted, given = {}, {}
    if code:
        (k, wanted["k_scale"]), (v, wanted["v_scale"]) = (
            cases.quantized(np.float32(x), code) for x in (k, v)
        )
    if span:
        options["span"] = jnp.array(span)
    if segments:
        ids = np.random.default_rng(2).integers(-1, 2, (batch, capacity))
        at = np.array(lengths)[:, None] - queries + np.arange(queries)
        given["segment_ids"] = jnp.asarray(np.take_along_axis(ids, np.maximum(at, 0), 1))
        given["kv_segment_ids"] = jnp.asarray(ids)
    out, lse = run(
        *map(jnp.asarray, (q, k, v)), jnp.asarray(lengths), mask, return_logsumexp=True,
        **{n: jnp.asarray(x) for n, x in wanted.items()}, **given, **options,
    )  # fmt: skip
    out, lse = np.asarray(out), np.asarray(lse)
    bound = mask.bind(capacity, capacity)
    for b, length in enumerate(lengths):
        first = max(length - queries, 0)
        row = np.zeros((1, length, 4, dim), q.dtype)
        row[:, first:] = q[b : b + 1, queries - (length - first) :]
        part = {n: x[b : b + 1, :length] for n, x in wanted.items()}
        if segments:
            part["segment_ids"] = ids[b : b + 1, :length]
        want, want_lse = cases.expected(
            row, k[b : b + 1, :length], v[b : b + 1, :length], bound, **part, **options
        )
        cases.assert_close(out[b, queries - (length - first) :], want[0, first:], dtype)
        cases.assert_close(lse[b, :, queries - (length - first) :], want_lse[0, :, first:], dtype)
        assert not out[b, : queries - (length - first)].any()


def jitted(q, k, v, lengths, mask, **options):
    arrays = {n: options.pop(n) for n in tuple(options) if isinstance(options[n], jax.Array)}
    step = functools.partial(decode_attention, mask=mask, **options)
    return jax.block_until_ready(jax.jit(step)(q, k, v, lengths, **arrays))


def layered(held):
    """Keys, values and their scales as the second of three layers, the others of ones."""
    names = [n for n in ("k", "v", "k_scale", "v_scale") if n in held]
    beside = {n: jnp.ones_like(held[n]) for n in names}
    stacked = {n: jnp.stack([beside[n], held[n], beside[n]]) for n in names}
    return stacked | {"layer": jnp.int32(1)}


class TestPlain:
    """The reference."""

    dtype = "float32"
    sizes = {}  # noqa: RUF012

    def run(self, *args, **options):
        return jitted(*args, implementation="xla", **options)

    def test_lengths(self):
        check(self.run, dtype=self.dtype, **self.sizes)

    @pytest.mark.parametrize("code", ["int8", "float8_e4m3fn"])
    def test_quantized_cache(self, code):
        run = self.run_layer if code == "int8" else self.run
        check(run, causal(), "bfloat16", code, soft_cap=3.0, **self.sizes)

    def run_layer(self, q, k, v, lengths, mask, **options):
        held = layered({"k": k, "v": v, **options})
        return self.run(q, held.pop("k"), held.pop("v"), lengths, mask, **options | held)

    def test_masks(self):
        check(self.run, window(150, causal=True), self.dtype, scale=0.3, **self.sizes)
        sizes = {**self.sizes, "lengths": (300, 64)}
        check(self.run, window(40) | global_(2), self.dtype, **sizes)

    @pytest.mark.parametrize("name", ROWS)
    def test_rows_of_any_mask(self, name):
        mask, options = ROWS[name]
        check_rows(self.run, mask, **options)


class TestInterpretedTpu(TestPlain):
    """The TPU kernel, interpreted, with the detection of races."""

    def run(self, *args, **options):
        interpret = pltpu.InterpretParams(detect_races=True)
        options = {"implementation": "mosaic_tpu", "block_k": 128, "interpret": interpret} | options
        return jitted(*args, **options)

    @pytest.mark.parametrize(
        "heads, kv_heads, code",
        [(16, 8, "int8"), (8, 4, None), (5, 5, "int8"), (3, 3, None), (16, 1, "float8_e4m3fn")],
    )
    @pytest.mark.parametrize("loops", [False, True])
    def test_heads(self, monkeypatch, heads, kv_heads, code, loops):
        """They share registers in other ways, and have loops where they are many."""
        if loops:
            monkeypatch.setattr(tpu_decode_kernel, "PRODUCTS", 1 << 11)
            monkeypatch.setattr(tpu_decode, "WITHOUT_LOOP", 0)
        sizes = {"heads": heads, "kv_heads": kv_heads, "lengths": (300, 2)}
        check(self.run, None, "bfloat16" if code else "float32", code, **sizes)


@pytest.mark.parametrize("code", ["float8_e4m3fn", "float8_e5m2"])
def test_codes_that_the_matrix_unit_takes(monkeypatch, code):
    """As on 7x; elsewhere they are converted."""
    chip = dataclasses.replace(chips.CPU, products=chips.V7X.products)
    monkeypatch.setattr(chips, "CPU", chip)
    check(TestInterpretedTpu().run, None, "bfloat16", code, (300, 2), heads=8, kv_heads=4)


def test_listed_blocks_are_those_of_the_row():
    """Each list holds every block with a key that one of its queries looks at, and few others."""
    capacity, block = 1000, 128
    mask = (window(100) | global_(3) | random(1, block_size=128)).bind(capacity, capacity)
    found = rows.lists(mask, 2, capacity, block)
    lengths = np.array([1, 2, 129, 130, 700, 1000])
    listed, count = found.at(jnp.asarray(lengths) - 2, 0, jnp.asarray(-(-lengths // block)))
    listed, count = np.asarray(listed), np.asarray(count)
    dense = mask.block(0, capacity, 0, capacity)
    for row, length in enumerate(lengths):
        keys = dense[max(length - 2, 0) : length, :length].any(0)
        held = {k // block for k in np.nonzero(keys)[0]}
        assert held <= set(listed[row, : count[row]].tolist())
        assert count[row] <= len(held) + 2
    assert found.longest <= 6 and rows.lists(causal(), 1, capacity, block) is None
    assert rows.lists(window(100, causal=True), 1, capacity, block) is None


def test_wrong_operands_are_refused():
    q, k, v = (jnp.asarray(x) for x in cases.operands(0, queries=1))
    lengths = jnp.array([4])
    with pytest.raises(ValueError, match=r"lengths \(2,\) must be \(batch,\)"):
        decode_attention(q, k, v, jnp.array([1, 2]))
    with pytest.raises(ValueError, match="do not cover 200 queries and 200 keys"):
        decode_attention(q, k, v, lengths, blocks(CELLS, 64))
    with pytest.raises(ValueError, match=r"k .* must have an axis of layers in front, 5 in all"):
        decode_attention(q, k, v, lengths, layer=0)
    with pytest.raises(ValueError, match="without kv_segment_ids, those of the cache"):
        decode_attention(q, k, v, lengths, segment_ids=jnp.zeros((1, 1), jnp.int32))
    with pytest.raises(NotImplementedError, match="it runs on TPU, not on cpu"):
        decode_attention(q, k, v, lengths, implementation="mosaic_tpu")


@fuzz(3)
@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=3),
    st.integers(0, 100),
    st.sampled_from([(1, 1), (4, 2), (6, 2)]),
    st.sampled_from(["causal", "window causal", "fixed", "not window"]),
    st.sampled_from([None, "int8", "float8_e4m3fn"]),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_any_lengths_interpreted(lengths, room, heads, mask, code, dtype):
    check(
        TestInterpretedTpu().run, cases.MASKS[mask], dtype, code, tuple(lengths),
        max(lengths) + room, *heads,
    )  # fmt: skip
