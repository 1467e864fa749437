"""Every implementation of sparse attention against float64, and their gradients against autodiff.

The kernels' tests are the reference's, subclassed: ``run`` is all that differs.
"""

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
    attention,
    causal,
    full,
    global_,
    per_head,
    random,
    reference,
    window,
    xla,
)
from jaxcomp.kernels.sparse_attention.schedule import schedule

from tests.fuzz import fuzz
from tests.kernels.sparse_attention import cases

INTERPRETED = {
    "implementation": "mosaic_tpu",
    "interpret": pltpu.InterpretParams(detect_races=True),
    "block_q": 128,
    "block_k": 128,
}


def check(run, q, k, v, mask, dtype="float32", **options):
    """Runs in a dtype, and compares with float64 on what the operands were rounded to."""
    q, k, v = (x.astype(dtype) if x.dtype == np.float32 else x for x in (q, k, v))
    arrays = {"q": q, "k": k, "v": v}
    arrays |= {n: x for n, x in options.items() if isinstance(x, np.ndarray)}
    rest = {n: x for n, x in options.items() if n not in arrays}
    out, lse = jax.jit(lambda arrays: run(mask=mask, **arrays, **rest))(arrays)
    want_out, want_lse = cases.expected(q, k, v, mask, **options)
    assert out.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    cases.assert_close(out, want_out, dtype)
    cases.assert_close(lse, want_lse, dtype)


class TestReference:
    """The plain implementation."""

    masks = tuple(cases.MASKS)
    dtype = "float32"
    sizes = {}  # noqa: RUF012 - of operands, where an implementation takes no others

    def run(self, q, k, v, mask, scale=None, segment_ids=None, kv_segment_ids=None, **options):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if segment_ids is not None and kv_segment_ids is None:
            kv_segment_ids = segment_ids
        segments = {"segment_ids": segment_ids, "kv_segment_ids": kv_segment_ids}
        return reference.attention(q, k, v, mask, scale=scale, **segments, **options)

    def test_masks(self):
        q, k, v = cases.operands(0, **self.sizes)
        for name in self.masks:
            mask = cases.mask(name, q.shape[1], k.shape[1])
            check(self.run, q, k, v, mask, self.dtype)

    def test_bfloat16(self):
        check(self.run, *cases.operands(1, dim=128, heads=2), causal(), "bfloat16")

    def test_lengths_and_widths_that_differ(self):
        operands = cases.operands(2, batch=2, queries=70, keys=150, dim=24, out_dim=40)
        check(self.run, *operands, window(40) | global_(3))

    def test_all_options_together(self):
        q, k, v = cases.operands(3, batch=2, queries=150, heads=2, kv_heads=1)
        rng = np.random.default_rng(3)
        check(
            self.run, q, k, v, causal(20), scale=0.7, soft_cap=2.5,
            segment_ids=np.sort(rng.integers(-1, 3, (2, 150)), 1).astype(np.int32),
            kv_segment_ids=np.sort(rng.integers(-1, 3, (2, 200)), 1).astype(np.int32),
            span=np.array([3.0, 90.5], np.float32), span_ramp=24.0,
        )  # fmt: skip

    def test_caps_that_all_scores_reach(self):
        """The kernels take no maxima of scores that a low cap bounds."""
        q, k, v = cases.operands(11, queries=150, keys=200, heads=2, kv_heads=1)
        options = {"scale": 9.0, "soft_cap": 55.0}
        check(self.run, np.abs(q), -np.abs(k), v, causal(30), **options)
        check(self.run, q, k, v, causal(30), self.dtype, **options)
        options["soft_cap"] = 90.0
        check(self.run, q, k, v, causal(30), **options)
        check(self.run, q, k, v, causal(30), **options, span=np.array([9.0, 95.0], np.float32))

    @pytest.mark.parametrize("code", ["int8", "float8_e4m3fn", "float8_e5m2"])
    def test_quantized_keys_and_values(self, code):
        kv_heads = 1 if code == "int8" else 2
        q, k, v = cases.operands(4, queries=100, keys=140, heads=2, kv_heads=kv_heads)
        (k, k_scale), (v, v_scale) = (cases.quantized(x, code) for x in (k, v))
        check(self.run, q, k, v, causal(40), k_scale=k_scale, v_scale=v_scale)

    def test_rows_that_look_at_nothing_are_zero(self):
        q, k, v = cases.operands(5, queries=130, keys=130, heads=2, **self.sizes)
        mask = ~window(400) | (global_(130) & causal(-3))
        _, lse = cases.expected(q, k, v, mask)
        assert np.isneginf(lse[:, :, :3]).all()
        check(self.run, q, k, v, mask, self.dtype)

    def gradients(self, mask, dtype="float32", lse_too=True, **sizes):
        """Against autodiff of the reference, in float32 on the same rounded operands."""
        extras = {n: sizes.pop(n) for n in ("soft_cap", "segment_ids", "span") if n in sizes}
        q, k, v = (x.astype(dtype) for x in cases.operands(6, **sizes))
        rng = np.random.default_rng(7)
        names = ("q", "k", "v", *(["span"] if "span" in extras else []))
        operands = {"q": q, "k": k, "v": v, **{n: x for n, x in extras.items() if n == "span"}}
        rest = {n: x for n, x in extras.items() if n not in operands}
        out_shape = (*q.shape[:3], v.shape[3])
        d_out = rng.standard_normal(out_shape).astype(dtype).astype(np.float32)
        d_lse = rng.standard_normal((q.shape[0], q.shape[2], q.shape[1])).astype(np.float32)

        def loss(run, values):
            out, lse = run(mask=mask, **values, **rest)
            if lse_too:
                out = (out.astype(jnp.float32) * d_out).sum()
                return out + jnp.where(jnp.isfinite(lse), lse * d_lse, 0).sum()
            return (out.astype(jnp.float32) * d_out).sum()

        exact = {n: jnp.asarray(x, jnp.float32) for n, x in operands.items()}
        plain = functools.partial(TestReference.run, self)
        want = jax.jit(jax.grad(functools.partial(loss, plain)))(exact)
        got = jax.jit(jax.grad(functools.partial(loss, self.run)))(operands)
        for name in names:
            assert got[name].dtype == operands[name].dtype
            assert np.isfinite(np.asarray(got[name], np.float32)).all()
            cases.assert_close(got[name], want[name], dtype, cases.GRADIENT_TOLERANCE)

    def test_gradients(self):
        mask = window(64) & causal() | random(1, seed=2, block_size=64)
        # A step has several heads: here those of one key head, in bfloat16 each with its own.
        self.gradients(mask, queries=200, keys=200, soft_cap=3.0, kv_heads=1)

    def test_gradients_of_all_options(self):
        segments = np.repeat([[0, 1, -1]], [90, 70, 20], axis=1).astype(np.int32)
        # Not whole numbers: where a ramp ends on a distance, its slope is a matter of convention.
        span = np.array([5.3, 60.6], np.float32)
        self.gradients(
            causal(), queries=180, keys=180, heads=2, kv_heads=1, segment_ids=segments, span=span
        )

    def test_spans_that_end_within_beyond_and_before_a_block(self):
        sizes = {"queries": 300, "keys": 300, "kv_heads": 2}
        span = np.array([500.0, 600.0, 5.3, 7.1], np.float32)
        check(self.run, *cases.operands(12, **sizes), causal(150), span=span)
        self.gradients(causal(150), span=span, soft_cap=4.0, lse_too=False, **sizes)

    def test_gradients_of_heads_with_masks_of_their_own(self):
        mask = per_head([causal(), window(40), ~full(), causal() & random(1)])
        self.gradients(mask, queries=150, keys=150, lse_too=False)

    def test_gradients_in_bfloat16(self):
        self.gradients(causal(), "bfloat16", queries=130, keys=130, kv_heads=4, dim=128)

    def test_the_spans_gradient_is_its_definition(self):
        q, k, v = (jnp.asarray(x) for x in cases.operands(8, queries=60, keys=60, heads=2))

        def loss(span):
            return self.run(q, k, v, causal(), span=span)[0].sum()

        def exact(span):
            return cases.expected(q, k, v, causal(), span=span)[0].sum()

        span = np.array([4.3, 20.7], np.float32)
        got = jax.jit(jax.grad(loss))(jnp.asarray(span))
        for head in range(2):
            step = np.eye(2)[head] * 1e-3
            want = (exact(span + step) - exact(span - step)) / 2e-3
            np.testing.assert_allclose(got[head], want, atol=2e-4)

    def test_quantized_operands_are_constants(self):
        q, k, v = cases.operands(9, queries=100, keys=100, heads=2, kv_heads=1)
        (k, k_scale), (v, v_scale) = (cases.quantized(x, "int8") for x in (k, v))

        def gradient(run, k, v, **scales):
            k, v = jnp.asarray(k), jnp.asarray(v)
            return jax.jit(jax.grad(lambda q: (run(q, k, v, causal(), **scales)[0] ** 2).sum()))(q)

        got = gradient(self.run, k, v, k_scale=k_scale, v_scale=v_scale)
        k, v = k * k_scale[..., None], v * v_scale[..., None]
        want = gradient(functools.partial(TestReference.run, self), k, v)
        cases.assert_close(got, want, "float32", cases.GRADIENT_TOLERANCE)

    def test_what_is_no_number_reaches_those_that_look_at_it(self):
        """And no others, nor their gradients."""
        q, k, v = (jnp.asarray(x) for x in cases.operands(10, queries=150, keys=150, heads=2))
        k, v = k.at[:, 145:].set(jnp.nan), v.at[:, 130, 0, 3].set(jnp.inf).at[:, 145:].set(jnp.nan)
        segments = jnp.where(jnp.arange(150) < 145, 0, -1)[None]

        def loss(q, k, v):
            out = self.run(q, k, v, causal(), segment_ids=segments)[0]
            return (out[:, :130] ** 2).sum() + (out[:, 145:] ** 2).sum(), out

        gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
        assert all(np.isfinite(x).all() for x in gradients)
        defined = np.isfinite(out).all((0, 2, 3))
        assert defined.tolist() == [not 130 <= i < 145 for i in range(150)]
        out = self.run(q, k.at[:, 120].set(jnp.nan), v, causal(), segment_ids=segments)[0]
        assert np.isfinite(out[:, :120]).all() and not np.isfinite(out[:, 120]).all()


class TestXla(TestReference):
    """The listed blocks, gathered."""

    masks = ("causal", "fixed", "bigbird", "per head")

    def run(self, q, k, v, mask, scale=None, segment_ids=None, kv_segment_ids=None, **options):
        blocks = schedule(mask, q.shape[2], q.shape[1], k.shape[1], 128, 128)
        if segment_ids is not None and kv_segment_ids is None:
            kv_segment_ids = segment_ids
        return xla.attention(
            q, k, v, blocks, block_q=128, block_k=128, segment_ids=segment_ids,
            kv_segment_ids=kv_segment_ids, scale=q.shape[-1] ** -0.5 if scale is None else scale,
            **options,
        )  # fmt: skip

    def test_memory_is_linear_in_the_blocks(self):
        """A window at twice the length needs twice the memory, not four times."""

        def temporaries(length):
            x = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)

            def loss(q, k, v):
                return attention(q, k, v, window(256), implementation="xla").sum()

            compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        assert temporaries(8192) < 2.2 * temporaries(4096)


class TestInterpretedTpu(TestReference):
    """The TPU kernels, interpreted, with the detection of races."""

    # Rules with bitmaps, a list for each head, and every rule that is evaluated in the kernel.
    masks = ("bigbird", "per head", "strided", "fixed")
    blocks = {}  # noqa: RUF012 - other sizes of blocks
    # That is of the reference itself; here gradients are compared with the reference's.
    test_the_spans_gradient_is_its_definition = None
    # In a block that is computed a kernel multiplies all values, those of weight zero too.
    test_what_is_no_number_reaches_those_that_look_at_it = None

    def run(self, q, k, v, mask, **options):
        options |= INTERPRETED | self.blocks
        return attention(q, k, v, mask, return_logsumexp=True, **options)

    def test_caps_that_all_scores_reach(self):
        """Also in a full block, and with a row's maxima from several."""
        self.blocks = {"block_q": 128, "block_k": 128}
        super().test_caps_that_all_scores_reach()

    def test_blocks_of_several_tiles(self):
        """Two halves of a block beside each other, and a loop along its other side."""
        self.blocks = {"block_q": 1024, "block_k": 1024}
        sizes = {"queries": 1000, "keys": 700, "heads": 1, "kv_heads": 1}
        check(self.run, *cases.operands(10, **sizes), causal(300))
        self.gradients(causal(300), soft_cap=3.0, **sizes)

    def test_gradients_in_bfloat16(self, monkeypatch):
        """As on a chip with a narrow matrix unit, where less waits in memory."""
        monkeypatch.setattr(chips, "chip_of", lambda *arrays: chips.V5E)
        super().test_gradients_in_bfloat16()


def test_log_sum_exps_that_nobody_asked_for_change_nothing():
    q, k, v = (
        jnp.asarray(x) for x in cases.operands(1, queries=100, keys=100, heads=2, kv_heads=1)
    )
    options = INTERPRETED | {"interpret": True}

    def loss(q, told):
        out = attention(q, k, v, causal(), **told, **options)
        return ((out[0] if told else out) ** 2).sum()

    plain, asked = (
        jax.jit(jax.value_and_grad(functools.partial(loss, told=told)))(q)
        for told in ({}, {"return_logsumexp": True})
    )
    jax.tree.map(np.testing.assert_array_equal, plain, asked)


@fuzz(5)
@given(
    st.sampled_from([n for n in cases.MASKS if n != "per head"]),
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([(1, 1), (2, 1), (6, 3)]),
    st.sampled_from([8, 40, 128]),
)
def test_any_shape(name, queries, keys, heads, dim):
    """The door, with the implementation that it chooses on this machine."""
    sizes = {"queries": queries, "keys": keys, "heads": heads[0], "kv_heads": heads[1], "dim": dim}
    run = functools.partial(attention, return_logsumexp=True)
    check(run, *cases.operands(queries, **sizes), cases.mask(name, queries, keys))


@fuzz(2)
@given(
    st.sampled_from([n for n in cases.MASKS if n != "per head"]),
    st.integers(1, 260),
    st.integers(1, 260),
    st.sampled_from([1, 2]),
    st.sampled_from([16, 128]),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_any_shape_interpreted(name, queries, keys, group, dim, dtype):
    sizes = {"queries": queries, "keys": keys, "heads": group, "kv_heads": 1, "dim": dim}
    run = functools.partial(attention, return_logsumexp=True, **INTERPRETED)
    check(run, *cases.operands(keys, **sizes), cases.mask(name, queries, keys), dtype)


def composed() -> st.SearchStrategy:
    """Masks of two rules or three, in any composition."""
    rules = st.sampled_from([x for n, x in cases.MASKS.items() if n not in ("per head", "blocks")])
    return st.recursive(
        rules,
        lambda inner: (
            st.builds(lambda a, b: a | b, inner, inner)
            | st.builds(lambda a, b: a & b, inner, inner)
            | st.builds(lambda a: ~a, inner)
        ),
        max_leaves=3,
    )


@fuzz(2)
@given(composed(), st.integers(1, 260), st.sampled_from([(2, 1), (1, 1)]), st.booleans())
def test_any_gradients_interpreted(mask, length, heads, padded):
    ids = np.random.default_rng(length).integers(-1, 2, (1, length))
    extras = {"segment_ids": ids} if padded else {}
    TestInterpretedTpu().gradients(
        mask, queries=length, keys=length, heads=heads[0], kv_heads=heads[1], **extras
    )
