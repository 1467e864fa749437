"""Masks against their definitions, a position at a time, and the list of blocks made of them."""

import doctest
import tracemalloc

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxcomp.kernels.sparse_attention import (
    Kind,
    api,
    blocks,
    causal,
    chunked,
    dilated,
    fixed,
    full,
    global_,
    masks,
    per_head,
    random,
    ring,
    rows,
    rules,
    schedule,
    shifts,
    strided,
    window,
)
from jaxcomp.kernels.sparse_attention.schedule import FULL, RULE, SKIP, TABLE

from tests.fuzz import fuzz

# What the papers say, in the plainest words.
DEFINITIONS = [
    (full(), lambda q, k: True),
    (causal(), lambda q, k: k <= q),
    (causal(3), lambda q, k: k <= q + 3),
    (window(6), lambda q, k: abs(q - k) <= 3),
    (window(6, causal=True), lambda q, k: 0 <= q - k < 6),
    (dilated(4, 3), lambda q, k: q - k in (-6, -3, 0, 3, 6)),
    (dilated(4, 3, causal=True), lambda q, k: q - k in (0, 3, 6, 9)),
    (strided(5), lambda q, k: k <= q and (q - k <= 5 or (q - k) % 5 == 0)),
    (fixed(5, 2), lambda q, k: k <= q and (q // 5 == k // 5 or k % 5 in (3, 4))),
    (chunked(5), lambda q, k: q // 5 == k // 5),
    (chunked(5) & causal(), lambda q, k: k <= q and q // 5 == k // 5),
    (global_(4), lambda q, k: q < 4 or k < 4),
    (blocks([[0, 1], [1, 1]], 7), lambda q, k: q < 14 and k < 14 and (q // 7, k // 7) != (0, 0)),
    (~causal() & window(6) | global_(2), lambda q, k: q < k <= q + 3 or q < 2 or k < 2),
]


@pytest.mark.parametrize("module", [masks, rules, rows, schedule, ring, shifts, api])
def test_examples(module):
    assert not doctest.testmod(module).failed


@pytest.mark.parametrize(("mask", "definition"), DEFINITIONS)
def test_masks_are_their_definitions(mask, definition):
    want = [[definition(q, k) for k in range(24)] for q in range(31)]
    assert np.array_equal(mask.block(0, 31, 0, 24), want)
    assert np.array_equal(mask.block(5, 9, 11, 7), np.array(want)[5:14, 11:18])
    if mask.lowers:
        q, k = np.arange(31, dtype=np.int32)[:, None], np.arange(24, dtype=np.int32)
        assert np.array_equal(jax.jit(mask.allowed)(q, k), want)


def test_random_draws_blocks_for_each_row():
    mask = random(2, seed=4, block_size=8).bind(64, 80)
    cells = mask.block(0, 64, 0, 80).reshape(8, 8, 10, 8)
    assert (cells == cells[:, :1, :, :1]).all()
    assert (cells[:, 0, :, 0].sum(1) == 2).all()
    other = random(2, seed=5, block_size=8).bind(64, 80)
    assert not np.array_equal(mask.block(0, 64, 0, 80), other.block(0, 64, 0, 80))
    assert random(9, block_size=8).bind(16, 16).block(0, 16, 0, 16).all()
    with pytest.raises(ValueError, match="bind"):
        random(2).block(0, 8, 0, 8)


def test_masks_are_values():
    assert causal() | window(4) == causal() | window(4) != causal() & window(4)
    assert len({window(4), window(4), ~~window(4)}) == 1
    assert blocks([[1]], 8) == blocks(np.ones((1, 1)), 8)
    heads = per_head([causal(), full()]) & window(4)
    assert heads == per_head([causal() & window(4), full() & window(4)])
    assert (causal() & window(8)).reach() == 4
    assert (causal() | window(8)).reach() is None
    with pytest.raises(ValueError, match="3 heads do not combine"):
        per_head([causal()] * 2) | per_head([causal()] * 3)
    for wrong in (lambda: window(0), lambda: fixed(4, 5), lambda: blocks([1], 8)):
        with pytest.raises(ValueError):
            wrong()
    for wrong in (
        lambda: window(2.5),
        lambda: window(True),
        lambda: causal(1.5),
        lambda: per_head([causal(), "full"]),
    ):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(TypeError, match="use & for and"):
        causal() and window(4)


LEAVES = st.one_of(
    st.builds(causal, st.integers(-9, 9)),
    st.builds(window, st.integers(1, 40), causal=st.booleans()),
    st.builds(dilated, st.integers(1, 9), st.integers(1, 9), causal=st.booleans()),
    st.builds(strided, st.integers(1, 20)),
    st.builds(lambda s, c: fixed(s, min(s, c)), st.integers(1, 20), st.integers(1, 5)),
    st.builds(chunked, st.integers(1, 40)),
    st.builds(global_, st.integers(1, 20)),
    st.builds(random, st.integers(1, 3), st.integers(0, 5), st.sampled_from([3, 8, 16])),
    st.builds(
        lambda bits, size: blocks(np.array(bits).reshape(3, 3), size),
        st.lists(st.booleans(), min_size=9, max_size=9),
        st.sampled_from([5, 16]),
    ),
)
MASKS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a: ~a, inner),
    ),
    max_leaves=4,
)


@fuzz(150)
@given(MASKS, st.integers(1, 70), st.integers(1, 70), st.integers(1, 24), st.integers(1, 24))
def test_the_list_of_blocks_is_the_mask(mask, queries, keys, block_q, block_k):
    made = schedule.schedule(mask, 1, queries, keys, block_q, block_k)
    bound = mask.bind(queries, keys)
    want = bound.block(0, queries, 0, keys)
    for steps, by_rows in ((made.rows, True), (made.columns(1), False)):
        got = np.zeros((made.row_blocks * block_q, made.column_blocks * block_k), bool)
        for major, minor, code, table in zip(
            steps.major[0], steps.minor[0], steps.code[0], steps.table[0], strict=True
        ):
            row, column = (major, minor) if by_rows else (minor, major)
            at = (row * block_q, block_q, column * block_k, block_k)
            if code == SKIP:
                continue
            part = {FULL: lambda: True, TABLE: lambda t=table: made.bitmaps[t]}.get(
                code, lambda c=code, at=at: made.rules[c - RULE].block(*at)
            )
            got[at[0] : at[0] + at[1], at[2] : at[2] + at[3]] |= part()
        assert np.array_equal(got[:queries, :keys], want)
        assert not got[:, keys:].any()
        # Every result is begun and ended once, in order.
        assert np.array_equal(np.unique(steps.major), np.arange(steps.major.max() + 1))
        assert (np.diff(steps.major) >= 0).all()
        first_last = steps.packed()[1] & 3
        assert (first_last & 1).sum() == (first_last >> 1).sum() == len(np.unique(steps.major))
    for row in range(queries // block_q):
        for column in range(keys // block_k):
            at = (row * block_q, block_q, column * block_k, block_k)
            part = bound.block(*at)
            kind = bound.kind(*at)
            assert kind == Kind.PARTIAL or part.all() == part.any() == (kind == Kind.FULL)


def test_no_step_is_spent_on_an_empty_block():
    apart = window(8, causal=True) & ~window(300)
    assert (schedule.schedule(apart, 1, 1024, 1024, 128, 128).rows.code == SKIP).all()
    made = schedule.schedule(~window(2000) & causal(), 1, 2048, 2048, 256, 256)
    parts = (~window(2000) & causal()).block(0, 2048, 0, 2048).reshape(8, 256, 8, 256)
    assert (made.rows.code != SKIP).sum() == parts.any((1, 3)).sum()
    assert (made.rows.code == FULL).sum() == parts.all((1, 3)).sum()


def test_heads_have_lists_of_their_own():
    mask = per_head([causal(), window(64), ~full(), causal()])
    made = schedule.schedule(mask, 4, 512, 512, 128, 128)
    assert made.rows.major.shape == (4, 10)
    assert (made.rows.code != SKIP).sum(1).tolist() == [10, 10, 0, 10]
    assert made.columns(2).major.shape[0] == 2
    assert set(made.columns(2).group[0].tolist()) == {0, 1}


@pytest.mark.slow
def test_a_million_tokens_cost_memory_by_the_block():
    length, size = 1 << 20, 512
    mask = window(256) | global_(64) | random(3)
    tracemalloc.start()
    made = schedule.schedule(mask, 1, length, length, size, size)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    bytes_of_one_row = length // 128 * 8 * 64
    bitmaps = made.bitmaps.nbytes
    assert made.rows.count < 2048 * 20
    assert peak < 3 * bitmaps + 1024 * made.rows.count + bytes_of_one_row
    bound = mask.bind(length, length)
    rng = np.random.default_rng(0)
    listed = {}
    for step in rng.integers(0, made.rows.count, 40):
        row, column = int(made.rows.major[0, step]), int(made.rows.minor[0, step])
        at = (row * size, size, column * size, size)
        code, table = int(made.rows.code[0, step]), int(made.rows.table[0, step])
        got = made.bitmaps[table] if code == TABLE else np.ones((size, size), bool)
        got = made.rules[code - RULE].block(*at) if code >= RULE else got
        listed[row, column] = np.array_equal(got, bound.block(*at))
    assert all(listed.values())
    known = set(zip(made.rows.major[0].tolist(), made.rows.minor[0].tolist(), strict=True))
    for row, column in rng.integers(0, length // size, (40, 2)).tolist():
        some = bound.block(row * size, size, column * size, size).any()
        assert some == ((row, column) in known)


def test_too_much_is_refused():
    with pytest.raises(ValueError, match="use larger blocks"):
        schedule.schedule(causal(), 1, 1 << 23, 1 << 23, 128, 128)
