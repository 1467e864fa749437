"""Lists of blocks that must fit in a core's scalar memory: larger blocks, or a reason."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxcomp.kernels.implementations import Unsupported
from jaxcomp.kernels.sparse_attention import attention, blocks, causal, full, per_head, tpu, window
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

    def run(*x, **options):
        return attention(*x, block_q=128, block_k=128, interpret=True, **options)

    with pytest.raises(Unsupported, match=r"1050624 bytes of scalar memory, .* larger block"):
        jax.eval_shape(lambda *x: run(*x, implementation="mosaic_tpu"), *x)
    assert jax.eval_shape(run, *x).shape == x[0].shape  # XLA's turn
    masks = per_head([causal()] * 299 + [window(9)])
    with pytest.raises(Unsupported, match="at most 256 query heads a key head, not 300"):
        jax.eval_shape(
            lambda *x: attention(*x, masks, implementation="mosaic_tpu", interpret=True),
            *operands(128, 300),
        )


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
