"""The identities of uniform quantization, and the grids against a float64 reference in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.errors import JaxcompError
from jaxcomp.formats import NM, Codebook, Float, Int, LowRank, Sparse, check, grid, quantize
from tests.fuzz import fuzz
from tests.helpers import x64


def reference_params(g, bits, symmetric, full_range, shrink=1.0):
    """GPTQ's quantizer on groups ``(..., n)``: unsigned scale and zero point, in float64."""
    low = np.minimum(g.min(-1, keepdims=True), 0) * shrink
    high = np.maximum(g.max(-1, keepdims=True), 0) * shrink
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    empty = (low == 0) & (high == 0)
    low, high = np.where(empty, -1, low), np.where(empty, 1, high)
    if symmetric and not full_range:
        return high / (2 ** (bits - 1) - 1), np.full(high.shape, 2 ** (bits - 1))
    scale = (high - low) / (2**bits - 1)
    zero = np.full(scale.shape, 2 ** (bits - 1)) if symmetric else np.round(-low / scale)
    return scale, zero


def reference(g, bits, symmetric, full_range, shrink=1.0):
    scale, zero = reference_params(g, bits, symmetric, full_range, shrink)
    lowest = 1 if symmetric and not full_range else 0
    q = np.clip(np.round(g / scale) + zero, lowest, 2**bits - 1)
    return scale * (q - zero)


KINDS = [(True, True), (True, False), (False, True)]


@pytest.mark.parametrize("symmetric, full_range", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_float64_reference(bits, symmetric, full_range, rng):
    w = rng.standard_normal((2, 4, 48))
    w[0, 1] = 0
    w[1, 2] = np.abs(w[1, 2])
    with x64():
        fmt = Int(bits, 16, symmetric=symmetric, full_range=full_range)
        part = quantize(fmt, jnp.asarray(w))
        assert part.scale.dtype == jnp.float64
        dense = np.asarray(part.materialize(jnp.float64))
    expected = reference(w.reshape(2, 4, 3, 16), bits, symmetric, full_range).reshape(w.shape)
    np.testing.assert_allclose(dense, expected, rtol=1e-12, atol=1e-15)
    assert part.symmetric is symmetric
    assert (part.zero_point is None) == symmetric


@pytest.mark.parametrize("symmetric, full_range", KINDS)
def test_identities_of_affine_quantization(symmetric, full_range, rng):
    """Idempotent on its grid; zero to zero; |error| <= S/2 inside the range; 16 bits ~ identity."""
    w = rng.standard_normal((6, 32)).astype(np.float32)
    w[4] = 0
    w[5] = -2.5
    w[:, 3] = 0
    fmt = Int(4, symmetric=symmetric, full_range=full_range)
    q = grid.expand(fmt, grid.fit(fmt, jnp.asarray(w)), 6, 32)
    codes = grid.encode(fmt, jnp.asarray(w), q)
    dense = np.asarray(grid.decode(fmt, codes, q))
    np.testing.assert_array_equal(grid.encode(fmt, jnp.asarray(dense), q), codes)
    assert (dense[:, 3] == 0).all()
    assert (dense[4] == 0).all()
    assert np.isfinite(dense).all()
    scale = np.asarray(q.scale)
    # The full-range symmetric grid ends at 7 steps, half a step before +absmax.
    slack = 1e-6 * np.abs(w)
    assert (np.abs(w - dense) <= scale / 2 + slack).all()
    wide = quantize(Int(16, symmetric=symmetric, full_range=full_range), jnp.asarray(w))
    np.testing.assert_allclose(wide.materialize(), w, atol=np.abs(w).max() * 2.0**-15)


@fuzz(20)
@given(
    row=st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8),
    kind=st.sampled_from(KINDS),
)
def test_any_row(row, kind):
    """Half a step of error at most, finite, and zeros stay zero, whatever the numbers."""
    w = np.array([row], np.float32)
    part = quantize(Int(4, symmetric=kind[0], full_range=kind[1]), jnp.asarray(w))
    dense = np.asarray(part.materialize(), np.float64)
    scale = float(part.scale[0, 0])
    assert np.isfinite(dense).all()
    # Tiny rows whose scale underflows are rounded to zero.
    assert (np.abs(dense - w) <= scale / 2 * (1 + 1e-4) + 1e-30).all()
    assert (dense[w == 0] == 0).all()


def test_codes_are_signed_and_the_part_is_scale_times_codes(rng):
    w = jnp.asarray(rng.standard_normal((2, 6, 32)), jnp.float32)
    for bits in (4, 8):
        part = quantize(Int(bits, full_range=False), w)
        codes = part.codes()
        assert codes.dtype == jnp.int8
        assert codes.shape == w.shape
        assert int(jnp.abs(codes).max()) == 2 ** (bits - 1) - 1
        assert part.scale.shape == (2, 1, 6)
        np.testing.assert_array_equal(
            part.materialize(), codes * np.swapaxes(np.asarray(part.scale), -1, -2)
        )
    assert part.values.dtype == jnp.int8
    np.testing.assert_array_equal(part.values, codes)


def test_integer_matmul_equals_the_simulated_one(rng):
    """int8 x int8 -> int32, then scales; with a zero point, less its share of the row sums."""
    x = rng.standard_normal((5, 64)).astype(np.float32)
    w = rng.standard_normal((7, 64)).astype(np.float32) + 0.3
    for symmetric in (True, False):
        fmt = Int(8, full_range=False, symmetric=symmetric)
        px, pw = quantize(fmt, jnp.asarray(x)), quantize(fmt, jnp.asarray(w))
        dims = (((1,), (1,)), ((), ()))
        total = jax.lax.dot_general(px.codes(), pw.codes(), dims, preferred_element_type=jnp.int32)
        total = np.asarray(total, np.int64)
        if not symmetric:
            zx = np.asarray(px.zero_point, np.int64).reshape(-1, 1)
            zw = np.asarray(pw.zero_point, np.int64).reshape(1, -1)
            rows_x = np.asarray(px.codes(), np.int64).sum(1, keepdims=True)
            rows_w = np.asarray(pw.codes(), np.int64).sum(1)[None]
            total = total - zx * rows_w - zw * rows_x + 64 * zx * zw
        out = total * np.asarray(px.scale).reshape(-1, 1) * np.asarray(pw.scale).reshape(1, -1)
        simulated = np.asarray(px.materialize(), np.float64) @ np.asarray(pw.materialize()).T
        np.testing.assert_allclose(out, simulated, rtol=1e-6, atol=1e-6)


def test_asymmetric_wins_a_bit_on_one_sided_data(rng):
    """After a ReLU a symmetric grid wastes half its levels: about 4 times the error."""
    x = np.maximum(rng.standard_normal((1, 4096)), 0)
    with x64():
        error = {
            s: float(
                (
                    (quantize(Int(8, symmetric=s), jnp.asarray(x)).materialize(jnp.float64) - x)
                    ** 2
                ).sum()
            )
            for s in (True, False)
        }
    assert 3.4 < error[True] / error[False] < 4.6


@pytest.mark.parametrize("symmetric", [True, False])
def test_finer_nested_groups_do_not_hurt(symmetric):
    w = jnp.asarray(np.random.default_rng(1).standard_t(4, (64, 512)), jnp.float32)
    errors = []
    for group in (512, 128, 32, 16):
        dense = quantize(Int(3, group, symmetric=symmetric), w).materialize()
        errors.append(float(((dense - w) ** 2).sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.4 * errors[0]


@pytest.mark.parametrize(
    "fmt",
    [Int(3, 32), Int(3, 32, symmetric=False), Float("e2m1", 32), Codebook("nf4", group_size=32)],
    ids=str,
)
def test_mse_clipping_is_never_above_min_max(fmt):
    """Its search includes the whole range; the objective is sum |w - what|^2.4 of each group."""
    w = np.random.default_rng(2).standard_t(4, (8, 64)).astype(np.float32)
    w[1] = 0
    cost = {}
    for clipping in ("minmax", "mse"):
        dense = quantize(fmt, jnp.asarray(w), clipping=clipping).materialize()
        off = np.abs(np.asarray(dense, np.float64) - w) ** 2.4
        cost[clipping] = off.reshape(8, 2, 32).sum(-1)
    assert (cost["mse"] <= cost["minmax"] * (1 + 1e-5)).all()
    assert cost["mse"].sum() < 0.95 * cost["minmax"].sum()


def test_mse_clipping_is_the_exhaustive_search(rng):
    """Factors 1.00, 0.99 .. 0.21 of the range, power 2.4, in float64."""
    w = rng.standard_t(4, (5, 40))
    best, cost = None, np.full((5, 1), np.inf)
    for i in range(80):
        dense = reference(w, 3, False, True, 1 - i / 100)
        err = (np.abs(dense - w) ** 2.4).sum(-1, keepdims=True)
        best = dense if best is None else np.where(err < cost, dense, best)
        cost = np.minimum(err, cost)
    with x64():
        part = quantize(Int(3, symmetric=False), jnp.asarray(w), clipping="mse")
        np.testing.assert_allclose(part.materialize(jnp.float64), best, rtol=1e-9, atol=1e-12)


def test_percentile_clipping(rng):
    w = rng.standard_normal((3, 1000))
    w[0, 0] = 100.0
    with x64():
        part = quantize(
            Int(8, full_range=False), jnp.asarray(w), clipping="percentile", percentile=99
        )
        bounds = np.quantile(np.abs(w), 0.99, axis=-1)
        np.testing.assert_allclose(np.asarray(part.scale)[0], bounds / 127, rtol=1e-12)
        part = quantize(
            Int(8, symmetric=False), jnp.asarray(w), clipping="percentile", percentile=99
        )
        width = np.quantile(w, 0.99, axis=-1) - np.quantile(w, 0.01, axis=-1)
        np.testing.assert_allclose(np.asarray(part.scale)[0], width / 255, rtol=1e-9)


def test_granularities(rng):
    """Per tensor, per row, per group and per block have their own extremes, and their own bits."""
    w = rng.standard_normal((4, 32)).astype(np.float32)
    for group, out_group, shape in [
        (None, None, (1, 1)),
        (None, 1, (1, 4)),
        (8, 1, (4, 4)),
        (16, 2, (2, 2)),
    ]:
        part = quantize(Int(8, group, full_range=False, out_group_size=out_group), jnp.asarray(w))
        g, o = group or 32, out_group or 4
        absmax = np.abs(w.reshape(4 // o, o, 32 // g, g)).max((1, 3))
        assert part.scale.shape == shape
        np.testing.assert_array_equal(part.scale, absmax.T / np.float32(127))
        assert part.nbits == 4 * 32 * 8 + 32 * shape[0] * shape[1]
        assert part.group_size == g
        assert part.out_group_size == o


def test_bits_by_hand():
    w = jnp.ones((3, 8, 128), jnp.bfloat16)
    # 4 bit g128 with bf16 scales: 4 + 16/128 bits a weight; an asymmetric one adds an int8 a group.
    assert quantize(Int(4, 128, scale_dtype="bfloat16"), w).nbits == 3 * 8 * (128 * 4 + 16)
    asymmetric = Int(4, 128, symmetric=False, scale_dtype="bfloat16")
    assert quantize(asymmetric, w).nbits == 3 * 8 * (128 * 4 + 16 + 8)
    # An odd row ends at a byte: 33 codes of 3 bits are 99 bits in 13 bytes.
    assert quantize(Int(3), jnp.ones((2, 33))).nbits == 2 * (13 * 8 + 32)
    # kmeans: 2^3 float32 levels a row.
    assert quantize(Codebook("kmeans", bits=3), jnp.ones((2, 40))).nbits == 2 * (40 * 3 + 8 * 32)
    # nf4 g64: a scale a group, and one table of 16 float32 for the matrix.
    assert quantize(Codebook("nf4", group_size=64), jnp.ones((2, 128))).nbits == (
        2 * 128 * 4 + 2 * 2 * 32 + 16 * 32
    )


def test_scales_are_applied_as_they_are_stored(rng):
    """bf16 scales: codes are chosen for the rounded scale, and decode agrees with the part."""
    w = jnp.asarray(rng.standard_normal((6, 64)), jnp.float32)
    for fmt in (
        Int(4, 16, scale_dtype="bfloat16"),
        Codebook("nf4", group_size=16, scale_dtype="float16"),
    ):
        context = grid.prepare(fmt, w)
        qparams = grid.fit(fmt, w, context)
        q = grid.expand(fmt, qparams, 6, 64)
        codes = grid.encode(fmt, w, q, context)
        part = grid.build(fmt, codes, qparams, context)
        assert part.scale.dtype == jnp.dtype(fmt.scale_dtype)
        np.testing.assert_array_equal(part.scale.astype(jnp.float32).T, qparams.scale)
        np.testing.assert_array_equal(part.materialize(), grid.decode(fmt, codes, q, context))


def test_tiny_and_huge_groups_in_float16_scales():
    """A scale that under- or overflows its dtype must not make NaN."""
    w = jnp.array([[1e-12] * 8, [1e9] * 8, [0.0] * 8])
    dense = quantize(Int(8, full_range=False, scale_dtype="float16"), w).materialize()
    assert np.isfinite(dense).all()
    np.testing.assert_array_equal(dense[2], 0)
    np.testing.assert_allclose(dense[0], 0, atol=1e-12)


def test_blocks_and_columns_are_encoded_as_the_matrix(rng):
    """What GPTQ does: fit some groups of columns, encode one column at a time."""
    w = jnp.asarray(rng.standard_normal((2, 4, 64)), jnp.float32)
    fmt = Int(4, 16, symmetric=False)
    whole = grid.fit(fmt, w)
    block = grid.fit(fmt, w[..., 32:64])
    np.testing.assert_array_equal(whole.scale[..., 2:], block.scale)
    np.testing.assert_array_equal(whole.zero_point[..., 2:], block.zero_point)
    q = grid.expand(fmt, whole, 4, 64)
    codes = grid.encode(fmt, w, q)
    for column in (0, 40):
        one = jax.tree.map(lambda a, c=column: a[..., c : c + 1], q)
        np.testing.assert_array_equal(
            grid.encode(fmt, w[..., column : column + 1], one), codes[..., column : column + 1]
        )


def test_group_index_of_activation_order(rng):
    """Groups of a permuted matrix, stored in the original order of columns."""
    w = rng.standard_normal((2, 4, 32)).astype(np.float32)
    order = np.stack([rng.permutation(32) for _ in range(2)])
    permuted = np.take_along_axis(w, order[:, None, :], -1)
    fmt = Int(4, 8, symmetric=False)
    qparams = grid.fit(fmt, jnp.asarray(permuted))
    q = grid.expand(fmt, qparams, 4, 32)
    codes = grid.encode(fmt, jnp.asarray(permuted), q)
    expected = np.asarray(grid.decode(fmt, codes, q))
    inverse = np.argsort(order, -1)
    group_index = jnp.asarray(inverse // 8)
    back = np.take_along_axis(np.asarray(codes), inverse[:, None, :], -1)
    part = grid.build(fmt, jnp.asarray(back), qparams, group_index=group_index)
    np.testing.assert_array_equal(
        part.materialize(), np.take_along_axis(expected, inverse[:, None, :], -1)
    )
    assert part.group_size is None
    assert part.nbits == 2 * (4 * 32 * 4 + 4 * 4 * (32 + 8) + 32 * 8)
    with pytest.raises(JaxcompError, match="static_groups"):
        grid.build(Float("e4m3"), jnp.asarray(back), qparams, group_index=group_index)


@pytest.mark.parametrize("clipping", ["minmax", "mse", "percentile"])
def test_masked_weights_do_not_count(clipping, rng):
    w = rng.standard_normal((4, 32)).astype(np.float32)
    mask = rng.random((4, 32)) < 0.5
    fmt = Int(4, 16, symmetric=False)
    fitted = grid.fit(fmt, jnp.asarray(w), clipping=clipping, mask=jnp.asarray(mask))
    loud = np.where(mask, w, 1e3).astype(np.float32)
    again = grid.fit(fmt, jnp.asarray(loud), clipping=clipping, mask=jnp.asarray(mask))
    np.testing.assert_array_equal(fitted.scale, again.scale)
    part = quantize(fmt, jnp.asarray(loud), clipping=clipping, mask=jnp.asarray(mask))
    assert (np.asarray(part.materialize())[~mask] == 0).all()


def test_everything_runs_under_jit_and_vmap(rng):
    w = jnp.asarray(rng.standard_normal((3, 4, 32)), jnp.float32)
    for fmt in (Int(4, 16, symmetric=False), Float("nvfp4"), Codebook("kmeans", bits=2)):
        eager = quantize(fmt, w).materialize()
        traced = jax.jit(lambda x, f=fmt: quantize(f, x))(w).materialize()
        np.testing.assert_allclose(traced, eager, rtol=1e-6, atol=1e-7)
        mapped = jax.vmap(lambda x, f=fmt: quantize(f, x))(w).materialize()
        np.testing.assert_allclose(mapped, eager, rtol=1e-6, atol=1e-7)


PATH = "layers/3/mlp/down/kernel"


@pytest.mark.parametrize(
    "fmt, shape, said",
    [
        (
            Int(4, group_size=128),
            (768, 250),
            "layers/3/mlp/down/kernel (768, 250): group_size 128 does not divide the input size "
            "250; use group_size 125 or 50, or exclude this path.",
        ),
        (Int(4, group_size=4), (8, 251), "use group_size None, or exclude"),
        (Int(4, group_size=0), (8, 16), "group_size 0 does not divide"),
        (Int(4, out_group_size=3), (8, 16), "out_group_size 3 does not divide the output size 8"),
        (Int(9), (8, 16), "9 bits"),
        (Int(1), (8, 16), "1 bits"),
        (Float("mxfp4"), (8, 48), "blocks of 32 inputs"),
        (Float("nvfp4", group_size=16), (8, 48), "leave group_size out"),
        (Codebook("kmeans"), (8, 16), "needs bits from 2 to 8"),
        (Codebook("kmeans", bits=3, group_size=8), (8, 16), "no group_size"),
        (Codebook("nf4", bits=3), (8, 16), "leave it out"),
        (Codebook("levels"), (8, 16), "if and only if"),
        (Codebook("levels", levels=(1.0, 0.0)), (8, 16), "ascending"),
        (NM(4, 4), (8, 16), "1 <= n < m"),
        (NM(2, 4), (8, 18), "do not divide the input size 18"),
        (NM(2, 4, Int(4, 6)), (8, 24), "no multiple of the m"),
        (NM(2, 4, Float("mxfp4")), (8, 64), "fixes its blocks"),
        (Sparse(Int(4, group_size=128)), (8, 250), "125 or 50"),
        (LowRank(9), (8, 16), "between 1 and 8"),
        (Int(4), (16,), "matrices"),
        (Int(4), (0, 16), "empty"),
    ],
)
def test_errors_name_the_path_the_shape_the_rule_and_the_fix(fmt, shape, said):
    with pytest.raises(JaxcompError) as error:
        check(fmt, shape, PATH)
    message = str(error.value)
    assert message.startswith(f"{PATH} {shape}: ")
    assert said in message


def test_unknown_clipping():
    with pytest.raises(JaxcompError, match="minmax"):
        grid.fit(Int(4), jnp.ones((2, 8)), clipping="best")


def test_valid_formats_pass():
    for fmt in (Int(4, 50), Float("e4m3"), NM(2, 5), Sparse(Int(3)), LowRank(8), Int(16)):
        check(fmt, (8, 250), PATH)
