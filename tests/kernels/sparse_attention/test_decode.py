"""Decoding against attention over the part of the cache that is filled, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels.sparse_attention import Mask, causal, decode_attention, global_, random, window

from tests.kernels.sparse_attention import cases

LENGTHS = (300, 5, 2, 129)


def check(
    run, mask=None, dtype="float32", code=None, lengths=LENGTHS, capacity=320, kv_heads=2, dim=128,
    **options,
):  # fmt: skip
    """Compares each sequence with attention over its own keys; the rest of the cache is NaN."""
    sizes = {"queries": 3, "keys": capacity, "heads": 4, "kv_heads": kv_heads, "dim": dim}
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
        rule = Moved(mask or causal(), length - 3)
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


class TestPlain:
    """The reference."""

    dtype = "float32"
    sizes = {}  # noqa: RUF012

    def run(self, *args, **options):
        return decode_attention(*args, implementation="xla", **options)

    def test_lengths(self):
        check(self.run, dtype=self.dtype, **self.sizes)

    @pytest.mark.parametrize("code", ["int8", "float8_e4m3fn"])
    def test_quantized_cache(self, code):
        check(self.run, causal(), "bfloat16", code, soft_cap=3.0, **self.sizes)

    def test_masks(self):
        check(self.run, window(150, causal=True), self.dtype, scale=0.3, **self.sizes)
        sizes = {**self.sizes, "lengths": (300, 64)}
        check(self.run, window(40) | global_(2), self.dtype, **sizes)


class TestInterpretedTpu(TestPlain):
    """The TPU kernel, interpreted, with the detection of races."""

    def run(self, *args, **options):
        interpret = pltpu.InterpretParams(detect_races=True)
        options = {"implementation": "mosaic_tpu", "block_k": 128, "interpret": interpret} | options
        out = decode_attention(*args, **options)
        assert not interpreter.races.races_found
        return out


def test_wrong_operands_are_refused():
    q, k, v = (jnp.asarray(x) for x in cases.operands(0, queries=1))
    lengths = jnp.array([4])
    with pytest.raises(ValueError, match=r"lengths \(2,\) must be \(batch,\)"):
        decode_attention(q, k, v, jnp.array([1, 2]))
    with pytest.raises(ValueError, match="one rule on positions"):
        decode_attention(q, k, v, lengths, random(1))
    with pytest.raises(NotImplementedError, match="it runs on TPU, not on cpu"):
        decode_attention(q, k, v, lengths, implementation="mosaic_tpu")
