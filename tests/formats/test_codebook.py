"""Tables of levels: NF4, FP4, given levels, k-means."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy.stats import norm

import jaxcomp as jc
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import Codebook, Int, grid, kmeans_levels, quantize
from jaxcomp.formats.codebook import FP4_BNB, NF4
from jaxcomp.quantization import RTN, gptq, rtn
from tests.helpers import x64

DOUBLE = Codebook("nf4", group_size=64, double_quantization=True)
E4M3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def test_nf4_levels_are_normal_quantiles():
    """QLoRA's construction: 8 positive and 7 negative quantiles and zero, over the largest."""
    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([positive, negative, [0.0]]))
    np.testing.assert_allclose(NF4, levels / levels.max(), atol=3e-7)
    assert len(NF4) == 16
    assert np.array_equal(np.float32(NF4), NF4)


def test_fp4_of_bitsandbytes():
    table = np.array([0, 0.0625, 2, 3, 4, 6, 8, 12]) / 12
    np.testing.assert_allclose(FP4_BNB, np.unique(np.concatenate([-table, table])), rtol=1e-15)


@pytest.mark.parametrize("kind, table", [("nf4", NF4), ("fp4_bnb", FP4_BNB)])
def test_values_are_the_nearest_levels(kind, table, rng):
    w = rng.standard_normal((2, 3, 128)).astype(np.float32)
    part = quantize(Codebook(kind, group_size=64), jnp.asarray(w))
    assert part.levels.shape == (2, 1, len(table))
    grouped = w.reshape(2, 3, 2, 64)
    scale = np.abs(grouped).max(-1, keepdims=True)
    np.testing.assert_array_equal(np.swapaxes(part.scale, -1, -2)[..., None], scale)
    ratio = (grouped / scale).astype(np.float64)
    index = np.abs(ratio[..., None] - np.array(table)).argmin(-1)
    np.testing.assert_array_equal(part.codes(), index.reshape(w.shape))
    expected = np.float32(table)[index] * scale
    np.testing.assert_array_equal(part.materialize(), expected.reshape(w.shape))
    assert part.bits == 4
    assert part.nbits == 2 * 3 * (128 * 4 + 2 * 32) + 2 * len(table) * 32


@pytest.mark.parametrize("group", [None, 16])
def test_equal_spacing_is_affine_bit_for_bit(group, rng):
    w = jnp.asarray(rng.standard_normal((2, 5, 64)), jnp.float32)
    for clipping in ("minmax", "mse"):
        integers = quantize(Int(4, group, full_range=False), w, clipping=clipping)
        levels = quantize(
            Codebook("levels", levels=tuple(range(-7, 8)), group_size=group), w, clipping=clipping
        )
        np.testing.assert_array_equal(levels.scale, integers.scale)
        np.testing.assert_array_equal(levels.codes().astype(np.int32) - 7, integers.codes())
        np.testing.assert_array_equal(levels.materialize(), integers.materialize())


def lloyd(x, weight, levels, iterations):
    """Reference: Lloyd's algorithm as written in textbooks."""
    for _ in range(iterations):
        index = np.abs(x[:, None] - levels).argmin(1)
        for k in range(len(levels)):
            if weight[index == k].sum() > 0:
                levels[k] = np.average(x[index == k], weights=weight[index == k])
    return levels


def test_kmeans_is_lloyd(rng):
    x = rng.standard_normal((2, 3, 200))
    weight = rng.uniform(0.1, 2, (2, 1, 200))
    start = np.sort(rng.standard_normal((2, 3, 8)))
    with x64():
        levels = kmeans_levels(jnp.asarray(x), 3, jnp.asarray(weight), jnp.asarray(start), 20)
    assert levels.shape == (2, 3, 8)
    for i in range(2):
        for j in range(3):
            expected = lloyd(x[i, j], weight[i, 0], start[i, j].copy(), 21)
            np.testing.assert_allclose(levels[i, j], expected, rtol=1e-9, atol=1e-12)


def error(x, levels, weight=1.0):
    return (np.abs(x[..., None] - np.asarray(levels)[..., None, :]).min(-1) ** 2 * weight).sum(-1)


def test_kmeans_from_the_uniform_grid_is_never_worse(rng):
    x = rng.standard_t(4, (16, 256))
    with x64():
        start = kmeans_levels(jnp.asarray(x), 3, init="uniform", iterations=0)
        errors = [
            error(x, kmeans_levels(jnp.asarray(x), 3, init="uniform", iterations=n))
            for n in (0, 1, 5, 50)
        ]
    np.testing.assert_array_less(0, np.diff(start))
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-12)).all()
    uniform = Int(3, symmetric=False)
    dense = np.asarray(quantize(uniform, jnp.asarray(x, jnp.float32)).materialize(), np.float64)
    assert (errors[-1] <= ((dense - x) ** 2).sum(-1)).all()


def test_kmeans_default_beats_nf4_and_finds_planted_clusters(rng):
    centers = np.array([-3.0, -1.0, 0.5, 4.0])
    x = centers[rng.integers(0, 4, (5, 300))] + 0.01 * rng.standard_normal((5, 300))
    levels = kmeans_levels(jnp.asarray(x, jnp.float32), 2)
    np.testing.assert_allclose(levels, np.broadcast_to(centers, (5, 4)), atol=0.01)
    w = jnp.asarray(rng.standard_normal((8, 256)), jnp.float32)
    fitted = quantize(Codebook("kmeans", bits=4), w).materialize()
    fixed = quantize(Codebook("nf4"), w).materialize()
    assert float(((fitted - w) ** 2).sum()) < float(((fixed - w) ** 2).sum())


def test_importance_moves_levels_and_zero_importance_leaves_out(rng):
    x = rng.standard_normal((3, 64)).astype(np.float32)
    keep = np.ones((1, 64), np.float32)
    keep[:, ::2] = 0
    loud = np.where(keep > 0, x, 50.0).astype(np.float32)
    levels = kmeans_levels(jnp.asarray(loud), 2, jnp.asarray(keep))
    alone = kmeans_levels(jnp.asarray(x[:, 1::2]), 2)
    np.testing.assert_allclose(levels, alone, rtol=1e-5)
    none = kmeans_levels(jnp.asarray(x), 2, jnp.zeros((1, 64)))
    np.testing.assert_array_equal(none, kmeans_levels(jnp.asarray(x), 2))


def test_kmeans_rows_with_few_values():
    """Constant rows, fewer distinct values than levels: exact, and levels stay ascending."""
    x = jnp.stack([jnp.full(32, 0.37), jnp.zeros(32), jnp.tile(jnp.array([-1.0, 2.0]), 16)])
    part = quantize(Codebook("kmeans", bits=3), x)
    np.testing.assert_array_equal(part.materialize(), x)
    assert (np.diff(part.levels) >= 0).all()
    same = quantize(Codebook("kmeans", bits=3), jnp.concatenate([x, x]))
    np.testing.assert_array_equal(same.materialize()[:3], same.materialize()[3:])


def test_one_column_at_a_time(rng):
    w = jnp.asarray(rng.standard_normal((2, 4, 32)), jnp.float32)
    fmt = Codebook("kmeans", bits=2)
    context = grid.prepare(fmt, w)
    q = grid.expand(fmt, grid.fit(fmt, w, context), 4, 32)
    assert jax.tree.leaves(q) == []
    codes = grid.encode(fmt, w, q, context)
    column = grid.encode(fmt, w[..., 5:6], q, context)
    np.testing.assert_array_equal(column, codes[..., 5:6])
    np.testing.assert_array_equal(
        grid.decode(fmt, column, q, context), grid.decode(fmt, codes, q, context)[..., 5:6]
    )


def doubly_quantized(scale):
    """Reference in float64: scales (in_groups, out) less their mean, to e4m3 in blocks of 256."""
    flat = scale.astype(np.float64).ravel()
    mean = flat.mean()
    grid_points = np.concatenate([-E4M3, E4M3])
    result = np.empty_like(flat)
    for start in range(0, flat.size, 256):
        apart = flat[start : start + 256] - mean
        step = np.abs(apart).max() / 448
        nearest = np.abs(apart[:, None] / step - grid_points).argmin(1)
        result[start : start + 256] = mean + step * grid_points[nearest]
    return result.reshape(scale.shape)


@pytest.mark.parametrize("shape", [(128, 512), (100, 320), (3, 64)])
def test_double_quantization_is_the_papers(shape, rng):
    w = rng.standard_normal(shape) * rng.uniform(0.5, 2, (shape[0], 1))
    with x64():
        plain = quantize(Codebook("nf4", group_size=64), jnp.asarray(w))
        part = quantize(DOUBLE, jnp.asarray(w))
        scale = np.asarray(part.effective_scale())
        expected = doubly_quantized(np.asarray(plain.scale))
        np.testing.assert_allclose(scale, expected, rtol=1e-5)
        # Codes are those of the scales that are stored.
        spread = np.repeat(scale.T, 64, axis=1)
        index = np.abs((w / spread)[..., None] - np.array(NF4)).argmin(-1)
        np.testing.assert_array_equal(part.codes(), index)
        np.testing.assert_allclose(part.materialize(jnp.float64), np.array(NF4)[index] * spread)


@pytest.mark.parametrize("shape, scales", [((256, 256), 1024), ((2, 64, 256), 256), ((3, 320), 15)])
def test_double_quantization_bits(shape, scales, rng):
    w = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    part = quantize(DOUBLE, w)
    stack = shape[0] if len(shape) == 3 else 1
    blocks = -(-scales // 256)
    of_scales = stack * (8 * scales + 32 * blocks + 32)
    assert part.nbits == 4 * w.size + of_scales + stack * 16 * 32
    if scales % 256 == 0:
        # 8/64 + 32/(64 * 256) bits a weight, and a mean a matrix.
        assert (of_scales - 32 * stack) * 64 * 256 == (8 * 256 + 32) * w.size
        assert round((of_scales - 32 * stack) / w.size, 3) == 0.127


def test_double_quantization_costs_little(rng):
    """NF4 of a Gaussian: relative error .0919 (.00844 squared) with and without."""
    w = rng.standard_normal((256, 1024)).astype(np.float32)
    errors = [
        float(np.mean((np.asarray(quantize(fmt, jnp.asarray(w)).materialize()) - w) ** 2))
        for fmt in (Codebook("nf4", group_size=64), DOUBLE)
    ]
    assert errors[0] == pytest.approx(0.00844, rel=0.02)
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


def test_scales_far_apart_stay_positive(rng):
    """Empty groups count for nothing; one of a millionth of the mean still has a scale above 0."""
    w = rng.standard_normal((8, 64 * 4)).astype(np.float32)
    w[0] *= 1e-6
    w[1] = 0
    w[2] *= 1e4
    part = quantize(DOUBLE, jnp.asarray(w))
    scale = np.asarray(part.effective_scale())
    assert (scale > 0).all()
    dense = np.asarray(part.materialize())
    assert np.isfinite(dense).all() and not dense[1].any()
    empty = quantize(DOUBLE, jnp.zeros((4, 64)))
    assert not np.asarray(empty.materialize()).any()
    w[2] /= 1e4
    with_zeros = quantize(DOUBLE, jnp.asarray(w)).scale_mean
    np.testing.assert_allclose(
        with_zeros, quantize(DOUBLE, jnp.asarray(np.delete(w, 1, 0))).scale_mean, rtol=1e-6
    )


def test_nearly_equal_scales_are_read_off_again(rng):
    """Scales that differ in their last bits: what is decoded is what was fitted, bit for bit."""
    for width in (1e-7, 1e-5, 1e-3):
        w = rng.standard_normal((64, 256)).astype(np.float32)
        w = np.clip(w, -1, 1)
        w[:, ::64] = 1 + width * rng.uniform(-1, 1, (64, 4))
        context = grid.prepare(DOUBLE, jnp.asarray(w))
        fitted = grid.fit(DOUBLE, jnp.asarray(w), context)
        part = quantize(DOUBLE, jnp.asarray(w))
        np.testing.assert_array_equal(part.effective_scale().T, fitted.scale)


def test_double_quantization_through_algorithms_recipes_and_files(rng, tmp_path):
    w = jnp.asarray(rng.standard_normal((2, 40, 128)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((300, 128)) @ rng.standard_normal((128, 128)), jnp.float32)
    h = x.T @ x
    solved, rounded = gptq(w, h, DOUBLE), rtn(w, DOUBLE)
    scales = [np.asarray(a.parts[0].effective_scale()) for a in (solved, rounded)]
    np.testing.assert_array_equal(*scales)
    for a in (solved, rounded):
        assert a.nbits == 4 * w.size + 2 * (80 * 8 + 32 + 32 + 16 * 32)
    error = [
        float(jc.quantization.relative_error(w, a.materialize(), h)) for a in (solved, rounded)
    ]
    assert error[0] < 0.8 * error[1]

    recipe = jc.Recipe(steps=(RTN(format=DOUBLE),))
    assert jc.Recipe.loads(recipe.dumps()) == recipe
    assert "double_quantization: true" in recipe.dumps()
    apply = lambda p, x: jax.lax.scan(lambda c, w: (c, c @ w.T), x, p["w"])[1]  # noqa: E731
    result = jc.compress(apply, {"w": w}, recipe, [(x,)], progress=False)
    part = result.params["w"].parts[0]
    np.testing.assert_array_equal(part.materialize(), rounded.parts[0].materialize())
    fast = jax.jit(jc.dispatch(apply))(result.params, x)
    np.testing.assert_allclose(fast, apply({"w": rounded.materialize()}, x), rtol=1e-4, atol=1e-4)
    jc.save(tmp_path / "saved", result)
    again = jc.load(tmp_path / "saved").params
    assert jc.nbits(again) == jc.nbits(result.params)
    np.testing.assert_array_equal(again["w"].materialize(), result.params["w"].materialize())


def test_kmeans_has_no_scales_to_quantize():
    with pytest.raises(JaxcompError, match=r"has no scales.*leave it out"):
        quantize(Codebook("kmeans", bits=3, double_quantization=True), jnp.ones((2, 64)))
