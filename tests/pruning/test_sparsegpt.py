"""SparseGPT against the paper's identities and an independent reference."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.calibration import init, update
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import Float, Int, NMPart, SparsePart
from jaxcomp.pruning import SparseGPT, magnitude, sparsegpt, wanda
from jaxcomp.quantization import GPTQ, RTN, SmoothQuant, gptq
from jaxcomp.step import Layer, run
from tests import references as ref
from tests.helpers import x64


def both(w, h, **options):
    with x64():
        ca = sparsegpt(jnp.asarray(w), jnp.asarray(h), **options)
        return np.asarray(ca.materialize()), ca


@pytest.mark.parametrize(
    ("target", "block"),
    [
        (dict(sparsity=0.5), 16),
        (dict(sparsity=0.3), 12),
        (dict(sparsity=0.7), 128),
        (dict(n=2, m=4), 16),
        (dict(n=4, m=8), 128),
    ],
)
def test_equals_the_column_by_column_reference(target, block):
    w, _, h = ref.layer(0, size=40, kind="outliers")
    got, _ = both(w, h, block_size=block, **target)
    nm = (target["n"], target["m"]) if "n" in target else None
    q, keep, _ = ref.sparsegpt(w, h, target.get("sparsity"), nm, block)
    np.testing.assert_array_equal(got != 0, keep)
    np.testing.assert_allclose(got, q, atol=1e-9)


@pytest.mark.parametrize(
    ("target", "group"), [(dict(sparsity=0.5), 8), (dict(sparsity=0.5), None), (dict(n=2, m=4), 16)]
)
def test_joint_quantization_equals_the_reference(target, group):
    w, _, h = ref.layer(1, kind="outliers")
    got, _ = both(w, h, block_size=16, fmt=Int(4, group, full_range=False), **target)
    nm = (target["n"], target["m"]) if "n" in target else None
    q, keep, _ = ref.sparsegpt(w, h, target.get("sparsity"), nm, 16, bits=4, group=group)
    np.testing.assert_allclose(got, q, atol=1e-9)
    assert not got[~keep].any()


@pytest.mark.parametrize("fmt", [None, Int(4, 8), Float("e4m3")], ids=str)
def test_summed_column_errors_are_the_quadratic_form(fmt):
    """The reference's sum of squared errors over U_kk, at our result, is tr(E Hd Eᵀ)."""
    w, _, h = ref.layer(2)
    hd, _ = ref.damped(h, 0.01)
    u = ref.inverse_factor(hd)
    q, _ = both(w, h, n=2, m=4, fmt=fmt)
    current, loss = w.copy(), 0.0
    for k in range(w.shape[1]):
        error = (current[:, k] - q[:, k]) / u[k, k]
        loss += (error**2).sum()
        current[:, k + 1 :] -= np.outer(error, u[k, k + 1 :])
    assert loss == pytest.approx(ref.prox(w - q, hd), rel=1e-10)


def test_zero_sparsity_leaves_the_weight():
    w, _, h = ref.layer(3)
    np.testing.assert_array_equal(both(w, h, sparsity=0.0)[0], w)


def test_zero_sparsity_with_a_grid_is_gptq():
    w, _, h = ref.layer(4)
    fmt = Int(3, 8, full_range=False)
    with x64():
        expected = np.asarray(gptq(jnp.asarray(w), jnp.asarray(h), fmt).materialize())
    np.testing.assert_allclose(both(w, h, sparsity=0.0, fmt=fmt)[0], expected, atol=1e-12)


def test_counts_are_exact_in_every_block_ties_included():
    w = np.random.default_rng(0).choice([-1.0, 1.0, 2.0], size=(6, 20))
    got, ca = both(w, np.eye(20), sparsity=0.5, block_size=8)
    kept = got != 0
    for cols in (slice(0, 8), slice(8, 16), slice(16, 20)):
        assert (~kept[:, cols]).sum() == round(0.5 * kept[:, cols].size)
    assert isinstance(ca.parts[0], SparsePart)


def test_nm_pattern_is_exact():
    w, _, h = ref.layer(5, size=48)
    got, ca = both(w, h, n=2, m=4)
    assert ((got != 0).reshape(24, -1, 4).sum(-1) == 2).all()
    assert isinstance(ca.parts[0], NMPart) and (ca.parts[0].n, ca.parts[0].m) == (2, 4)


def test_error_is_below_wandas_on_correlated_inputs():
    """Statistical; measured .45 times."""
    for seed in range(6):
        w, x, h = ref.layer(60 + seed, out=64, size=64, tokens=512)
        x_norm = jnp.float32(np.linalg.norm(x, axis=0))
        for target in (dict(sparsity=0.5), dict(n=2, m=4)):
            a = np.asarray(sparsegpt(jnp.float32(w), jnp.float32(h), **target))
            b = np.asarray(wanda(jnp.float32(w), x_norm, **target))
            c = np.asarray(magnitude(jnp.float32(w), **target))
            assert ref.prox(w - a, h) < 0.75 * ref.prox(w - b, h)
            assert ref.prox(w - a, h) < 0.75 * ref.prox(w - c, h)


def layer(seed=7, shape=(24, 32)):
    w, x, _ = ref.layer(seed, *shape)
    needs = frozenset({"hessian", "absmax"})
    return Layer("p", jnp.float32(w), update(init(shape[1], needs), jnp.float32(x)))


@pytest.mark.parametrize("step", [RTN(format=Int(4, 16)), GPTQ(format=Int(4, 16))], ids=str)
@pytest.mark.parametrize("target", [dict(n=2, m=4), dict(sparsity=0.5)], ids=str)
def test_a_quantizer_after_it_keeps_the_mask(step, target):
    (pruned,) = run(SparseGPT(**target), (layer(),))
    (result,) = run(step, (pruned,))
    dense = np.asarray(result.parts[0].materialize())
    assert not dense[~np.asarray(pruned.mask)].any()
    np.testing.assert_array_equal(result.mask, pruned.mask)
    assert type(result.parts[0]) is (NMPart if "n" in target else SparsePart)
    assert set(result.metrics) == {"error", "sparsity"}
    # Half of the codes, two 2-bit positions of four weights or a mask bit each, a scale a group.
    assert result.parts[0].nbits == 24 * 32 * (4 / 2 + 1 + 32 / 16)


def test_the_last_step_lets_go_of_the_weight():
    given = layer()
    (kept,), (gone,) = (
        run(SparseGPT(n=2, m=4), (given.replace(is_last=last),)) for last in (False, True)
    )
    assert gone.mask is None and gone.weight is given.weight  # Which it does not own.
    np.testing.assert_array_equal(gone.parts[0].materialize(), kept.weight)
    assert gone.metrics == kept.metrics


def test_smoothing_keeps_a_mask():
    (pruned,) = run(SparseGPT(n=2, m=4), (layer(),))
    (smooth,) = run(SmoothQuant(), (pruned,))
    assert isinstance(smooth.parts[0], NMPart)
    np.testing.assert_array_equal(smooth.parts[0].materialize(), smooth.weight)
    np.testing.assert_allclose(
        smooth.weight * smooth.input_scale, pruned.weight, rtol=1e-6, atol=1e-7
    )


def test_joint_step_stores_codes():
    (result,) = run(SparseGPT(n=2, m=4, format=Int(4, 16)), (layer(),))
    np.testing.assert_array_equal(result.parts[0].materialize(), result.weight)
    assert result.parts[0].values.bits == 4
    assert result.metrics["sparsity"] == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(n=3, m=2), "3:2"),
        (dict(sparsity=-0.1), "sparsity"),
        (dict(sparsity=0.5, block_size=12, fmt=Int(4, 8)), "8 does not divide 12"),
        (dict(sparsity=0.5, h=jnp.full((32, 32), jnp.inf)), "Hessian holds NaN"),
        (dict(sparsity=0.5, damping=float("nan")), "damping"),
    ],
)
def test_bad_input_is_refused(change, message):
    options = dict(w=jnp.ones((4, 32)), h=jnp.eye(32)) | change
    with pytest.raises(JaxcompError, match=message):
        sparsegpt(**options)
