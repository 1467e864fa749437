"""Lists of blocks that must fit in a core's scalar memory: larger blocks, or a reason."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxcomp.kernels.implementations import Unsupported
from jaxcomp.kernels.sparse_attention import (
    attention,
    blocks,
    causal,
    full,
    per_head,
    random,
    tpu,
    tpu_parts,
    window,
)
from jaxcomp.kernels.sparse_attention.schedule import schedule

from tests.kernels import aot
from tests.kernels.sparse_attention import cases


def operands(length: int, heads: int = 1, kv_heads: int = 1):
    q, k = (jax.ShapeDtypeStruct((1, length, n, 128), jnp.bfloat16) for n in (heads, kv_heads))
    return q, k, k


@pytest.mark.parametrize("name", [*cases.MASKS, "no keys"])
def test_bytes_are_those_of_the_longest_packed_list(name):
    mask = (
        per_head([~full(), ~full(), causal(), full()]) if name == "no keys" else cases.MASKS[name]
    )
    listed = schedule(mask, 4, 500, 700, 128, 128)
    packed = [sum(words.nbytes for words in steps.packed()) for steps in (
        listed.rows, listed.columns(2)
    )]  # fmt: skip
    assert listed.scalar_bytes(2) == max(packed)


def test_blocks_grow_while_that_costs_less_and_until_their_list_fits():
    diagonal = blocks(np.eye(8), 512)
    for length, mask, want, *heads in [
        (2048, causal(), (512, 512)),
        (4096, causal(), (1024, 1024)),
        (4096, diagonal, (512, 512)),
        # Of less than all keys in 1024 by 1024 it would need a bitmap.
        (4096, ~diagonal, (512, 512)),
        (300, causal(), (384, 384)),
        (1 << 18, causal(), (1024, 1024)),
        (1 << 20, window(512), (512, 512)),
        (3072, causal(), (1024, 1024)),
        # Two heads of a step share what it costs.
        (3072, causal(), (512, 512), 2),
        (3072, per_head([causal(), causal()]), (1024, 1024), 2),
    ]:
        q, k, v = operands(length, *heads)
        assert tpu.fitting_blocks(q, k, mask) == (want, None)
        out = jax.eval_shape(
            lambda *x, mask=mask: attention(*x, mask, implementation="mosaic_tpu", interpret=True),
            q, k, v,
        )  # fmt: skip
        assert out.shape == q.shape


def test_a_list_that_cannot_fit_is_a_reason_and_not_an_abort():
    x = operands(1 << 16)
    span = jnp.ones(1)  # With which queries are not divided.

    def run(*x, **options):
        return attention(*x, span=span, block_q=128, block_k=128, interpret=True, **options)

    told = (
        r"1050624 bytes of scalar memory, .* larger block.* or leave out the span.* 8 GiB of scores"
    )
    with pytest.raises(Unsupported, match=told):
        jax.eval_shape(lambda *x: run(*x, implementation="mosaic_tpu"), *x)
    assert jax.eval_shape(run, *x).shape == x[0].shape  # XLA's turn
    masks = per_head([causal()] * 299 + [window(9)])
    with pytest.raises(Unsupported, match="at most 256 query heads a key head, not 300"):
        jax.eval_shape(
            lambda *x: attention(*x, masks, implementation="mosaic_tpu", interpret=True),
            *operands(128, 300),
        )


def test_long_lists_are_divided_and_each_fits():
    for length, calls in ((1 << 18, 1), (1 << 19, 2)):
        q, k, _ = operands(length)
        parts, reason = tpu_parts.plan(q, k, causal())
        assert reason is None and len(parts) == calls
        assert sum(part.queries[1] for part in parts) == length
        for part in parts:
            listed = schedule(part.mask, 1, part.queries[1], length, *part.blocks)
            assert listed.scalar_bytes(1) <= tpu.SCALAR_BYTES


def test_queries_in_several_calls_give_what_one_gives(monkeypatch):
    """Outputs to the bit."""
    q, k, v = map(jnp.asarray, cases.operands(3, queries=300, keys=300, heads=1, kv_heads=1))
    mask = causal() | random(1, seed=2, block_size=64)
    ids = jnp.where(jnp.arange(300) < 200, 0, 1)[None]
    sizes = {"block_q": 128, "block_k": 128}

    def loss(q, k, v):
        out = attention(
            q, k, v, mask, segment_ids=ids, **sizes, implementation="mosaic_tpu", interpret=True
        )
        return (out**2).sum(), out

    def run():
        return jax.jit(jax.value_and_grad(lambda *x: loss(*x), (0, 1, 2), has_aux=True))(q, k, v)

    ((_, want), gradients) = run()
    # Four steps, and one for each of three blocks of keys.
    monkeypatch.setattr(tpu, "SCALAR_BYTES", 8 * (4 + 3))
    parts, _ = tpu_parts.plan(q, k, mask, **sizes)
    assert [part.queries for part in parts] == [(0, 128), (128, 128), (256, 44)]
    ((_, got), divided) = run()
    np.testing.assert_array_equal(got, want)
    for one, other in zip(divided, gradients, strict=True):
        cases.assert_close(one, other, "float32", cases.GRADIENT_TOLERANCE)


PROGRAM = "tests.kernels.sparse_attention.programs:attend"
ONE = {"heads": 1, "kv_heads": 1, "gradient": True}


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler (libtpu) is not installed")
def test_the_longest_lists_compile():
    # 507 blocks of causal rows are 1,030,224 bytes, 508 too many.
    for count, fits in ((507, True), (508, False)):
        listed = schedule(causal(), 1, count * 512, count * 512, 512, 512)
        assert (listed.scalar_bytes(1) <= tpu.SCALAR_BYTES) == fits
    longest = ONE | {"queries": 507 * 512, "block_q": 512, "block_k": 512}
    # The chip with the least scalar memory.
    (result,) = aot.compile_cases("v5e", [(PROGRAM, longest)])
    assert result["error"] is None


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler (libtpu) is not installed")
def test_the_largest_blocks_compile():
    large = ONE | {"block_q": 1024, "block_k": 1024, "queries": 4096}
    programs = [
        (PROGRAM, large | {"mask": "bigbird", "segments": True, "span": True, "soft_cap": 30.0}),
        (PROGRAM, large | {"dtype": "float32"}),
    ]
    # The chip with the least vector memory.
    results = aot.compile_cases("7x", programs)
    assert [r["error"] for r in results] == [None] * len(programs)
