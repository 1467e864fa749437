"""Exact counts, deterministic ties, and magnitude pruning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import pruning
from jaxcomp.errors import JaxcompError
from jaxcomp.pruning import Magnitude, magnitude
from jaxcomp.step import Layer, run
from tests.helpers import x64


def stable(scores, k):
    """Mask over the last axis by a stable sort."""
    keep = np.ones(scores.shape, bool)
    order = np.argsort(scores, axis=-1, kind="stable")[..., :k]
    np.put_along_axis(keep, order, False, -1)
    return keep


@pytest.fixture
def tied(rng):
    """Scores with many ties."""
    return np.round(np.abs(rng.normal(size=(7, 33))), 1).astype(np.float32)


@pytest.mark.parametrize("k", [0, 1, 5, 33])
def test_drop_smallest_is_a_stable_sort(tied, k):
    np.testing.assert_array_equal(pruning.drop_smallest(jnp.asarray(tied), k), stable(tied, k))


def test_drop_smallest_takes_counts_a_group(tied, rng):
    counts = rng.integers(0, 34, size=(7, 1))
    mask = np.asarray(pruning.drop_smallest(jnp.asarray(tied), jnp.asarray(counts)))
    for row, scores, (k,) in zip(mask, tied, counts, strict=True):
        np.testing.assert_array_equal(row, stable(scores, k))


def test_drop_smallest_tells_neighbouring_floats_apart():
    with x64():
        for dtype in (jnp.float32, jnp.float64):
            one = jnp.asarray(1.0, dtype)
            scores = jnp.stack([jnp.nextafter(one, 2 * one), one, jnp.nextafter(one, 0 * one)])
            assert pruning.drop_smallest(scores, 2).tolist() == [True, False, False]
    tiny = jnp.array([1e-45, 0.0, 1e-38, jnp.inf], jnp.float32)
    assert pruning.drop_smallest(tiny, 1).tolist() == [True, False, True, True]


def test_row_and_tensor_masks(tied):
    row = np.asarray(pruning.row_mask(jnp.asarray(tied), 0.4))
    np.testing.assert_array_equal(row, stable(tied, round(0.4 * 33)))
    tensor = np.asarray(pruning.tensor_mask(jnp.asarray(tied), 0.4))
    np.testing.assert_array_equal(tensor.ravel(), stable(tied.ravel(), round(0.4 * tied.size)))


def test_stacks_are_pruned_one_by_one(tied):
    stack = jnp.stack([tied, tied[::-1], 2 * tied])
    for function in (
        lambda s: pruning.row_mask(s, 0.3),
        lambda s: pruning.tensor_mask(s, 0.3),
        lambda s: pruning.nm_mask(s[..., :32], 2, 4),
    ):
        expected = np.stack([function(part) for part in stack])
        np.testing.assert_array_equal(function(stack), expected)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (4, 8), (3, 5)])
def test_nm_mask(rng, n, m):
    scores = np.round(np.abs(rng.normal(size=(3, 4 * m))), 1)
    mask = np.asarray(pruning.nm_mask(jnp.asarray(scores), n, m))
    blocks = scores.astype(np.float32).reshape(3, 4, m)
    np.testing.assert_array_equal(mask, stable(blocks, m - n).reshape(mask.shape))


def test_global_mask_is_one_threshold_over_the_tree(tied, rng):
    tree = {"a": tied, "b": {"c": np.float32(rng.uniform(size=(5,))), "d": tied[:2]}}
    masks = pruning.global_mask(jax.tree.map(jnp.asarray, tree), 0.37)
    flat = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    got = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(masks)])
    np.testing.assert_array_equal(got, stable(flat, round(0.37 * flat.size)))
    assert pruning.sparsity(masks) == pytest.approx(round(0.37 * flat.size) / flat.size)


def test_global_equals_local_when_tensors_share_scores(tied):
    distinct = np.random.default_rng(0).permutation(64).reshape(8, 8).astype(np.float32)
    masks = pruning.global_mask({"a": jnp.asarray(distinct), "b": jnp.asarray(distinct)}, 0.5)
    local = pruning.tensor_mask(jnp.asarray(distinct), 0.5)
    assert masks["a"].tolist() == masks["b"].tolist() == local.tolist()


def test_apply_mask_keeps_dtypes_and_unmasked_leaves():
    tree = {"a": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.ones(3)}
    out = pruning.apply_mask(tree, {"a": jnp.eye(2, dtype=bool), "b": None})
    assert out["a"].dtype == jnp.bfloat16 and out["a"].tolist() == [[1, 0], [0, 1]]
    assert out["b"].tolist() == [1, 1, 1]
    assert pruning.sparsity({"a": jnp.eye(2, dtype=bool), "b": None}) == 0.5


@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 1.0])
def test_magnitude_keeps_the_largest(rng, scope, sparsity):
    w = rng.normal(size=(6, 11)).astype(np.float32)
    got = np.asarray(magnitude(jnp.asarray(w), sparsity, scope=scope))
    scores = np.abs(w) if scope == "row" else np.abs(w).ravel()
    keep = stable(scores, round(sparsity * scores.shape[-1])).reshape(w.shape)
    np.testing.assert_array_equal(got, np.where(keep, w, 0))


def test_magnitude_does_not_depend_on_scale(rng):
    w = jnp.asarray(rng.normal(size=(6, 12)), jnp.float32)
    a, b = magnitude(w, 0.4), magnitude(8 * w, 0.4)
    np.testing.assert_array_equal(8 * np.asarray(a), np.asarray(b))


def test_magnitude_step_keeps_earlier_masks(rng):
    w = jnp.asarray(rng.normal(size=(4, 16)), jnp.float32)
    earlier = pruning.row_mask(-jnp.abs(w), 0.25)
    layer = Layer("p", jnp.where(earlier, w, 0), mask=earlier)
    (result,) = run(Magnitude(n=2, m=4), (layer,))
    assert not (result.mask & ~earlier).any()
    assert result.metrics["sparsity"] >= 0.5
    np.testing.assert_array_equal(result.parts[0].materialize(), result.weight)
    np.testing.assert_array_equal(result.weight != 0, result.mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sparsity=1.5), "sparsity 1.5"),
        (dict(sparsity=50), "write 50 % as 0.5"),
        (dict(), "either a sparsity or both n and m"),
        (dict(sparsity=0.5, n=2, m=4), "either a sparsity or both n and m"),
        (dict(n=2), "either a sparsity or both n and m"),
        (dict(n=5, m=4), "5:4"),
        (dict(n=2, m=5), "does not divide the input size 12"),
        (dict(sparsity=0.5, scope="layer"), "scope 'layer'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(JaxcompError, match=message):
        magnitude(jnp.ones((2, 12)), **options)


def test_errors_name_the_path():
    with pytest.raises(JaxcompError, match="layers/1/up: N:M pattern 2:5"):
        run(Magnitude(n=2, m=5), (Layer("layers/1/up", jnp.ones((2, 12))),))
    with pytest.raises(JaxcompError, match=r"layers/1/up: \(2, 12\) holds NaN"):
        run(Magnitude(sparsity=0.5), (Layer("layers/1/up", jnp.full((2, 12), jnp.nan)),))
