"""GPTQ against the paper's identities and an independent reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.calibration import init, update
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import Affine, Codebook, Float, Int, grid
from jaxcomp.pruning import nm_mask
from jaxcomp.quantization import GPTQ, gptq, obs, rtn
from jaxcomp.step import Layer, run
from tests import references as ref
from tests.helpers import x64


def solve(w, h, fmt, damping=0.01, qparams=None, mask=None, **options):
    """The solver on float64 arrays, with what the compressed array leaves out."""
    w, h = jnp.asarray(w), jnp.asarray(h)
    context = grid.prepare(fmt, w)
    factor = obs.inverse_factor(h, damping)
    if qparams == "static":
        qparams = grid.fit(fmt, w, context)
    solution = obs.solve(
        w, factor.upper, fmt=fmt, context=context, qparams=qparams, mask=mask, **options
    )
    return solution, factor


def dense(ca):
    return np.asarray(ca.materialize(), np.float64)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("kind", ["iid", "correlated", "outliers"])
def test_inverse_factor_is_the_papers(kind, array):
    _, _, h = ref.layer(0, size=150, tokens=400, kind=kind)
    h[:, [3, 149]] = h[[3, 149]] = 0
    hd, dead = ref.damped(h, 0.01)
    with x64():
        factor = obs.inverse_factor(array(h), 0.01)
    np.testing.assert_allclose(factor.upper, ref.inverse_factor(hd), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(factor.dead, dead)
    assert float(factor.damping) == 0.01


# The largest weight of a group lies on a tie of the symmetric full-range grid (7.5 steps of 15),
# where the last bit of the updated weight decides: groups fitted inside the loop are compared on
# the others, here and below.
@pytest.mark.parametrize(
    ("bits", "symmetric", "full_range", "group"),
    [
        (2, True, True, None),
        (3, False, True, None),
        (4, True, True, None),
        (3, True, False, 4),
        (4, True, False, 16),
        (2, False, True, 16),
    ],
)
def test_equals_the_column_by_column_reference(bits, symmetric, full_range, group):
    w, _, h = ref.layer(bits, kind="outliers")
    with x64():
        got = gptq(
            jnp.asarray(w),
            jnp.asarray(h),
            Int(bits, group, symmetric=symmetric, full_range=full_range),
            block_size=8,
        )
        got = dense(got)
    expected, _ = ref.gptq(w, h, bits, group, symmetric=symmetric, full_range=full_range)
    np.testing.assert_allclose(got, expected, atol=1e-9)


@pytest.mark.parametrize("static", [True, False])
def test_activation_order_equals_the_reference(static):
    w, _, h = ref.layer(3, kind="outliers")
    order = np.argsort(-np.diag(h), kind="stable")
    with x64():
        ca = gptq(
            jnp.asarray(w),
            jnp.asarray(h),
            Int(3, 8, full_range=False),
            order="activation",
            static_groups=static,
        )
        got = dense(ca)
    expected, _ = ref.gptq(w, h, 3, 8, static=static, order=order, full_range=False)
    np.testing.assert_allclose(got, expected, atol=1e-9)
    assert (ca.parts[0].group_index is None) == static


def test_activation_order_is_static_unless_asked_otherwise():
    w, _, h = ref.layer(3)
    ca = gptq(jnp.float32(w), jnp.float32(h), Int(4, 8), order="activation")
    assert ca.parts[0].group_index is None


FORMATS = [
    Int(3),
    Int(4, 8, symmetric=False),
    Int(8, full_range=False),
    Float("e4m3"),
    Float("mxfp4"),
    Float("nvfp4"),
    Codebook("nf4", group_size=16),
    Codebook("levels", levels=(-1.0, -0.4, 0.1, 0.9)),
    Codebook("kmeans", bits=3),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_summed_column_errors_are_the_quadratic_form(fmt):
    """(1) sum_k ||w_k - q_k||² / U_kk² == tr(E Hd Eᵀ), for any grid."""
    w, _, h = ref.layer(1)
    hd, _ = ref.damped(h, 0.01)
    with x64():
        solution, _ = solve(w, h, fmt)
        e = w - np.asarray(solution.values)
        assert np.asarray(solution.loss).sum() == pytest.approx(ref.prox(e, hd), rel=1e-10)


@pytest.mark.parametrize(
    ("block", "group"), [(1, None), (5, None), (31, None), (1000, None), (3, 8), (16, 8), (8, 32)]
)
def test_block_size_does_not_matter(block, group):
    """(2) lazy blocks only reorder memory traffic."""
    w, _, h = ref.layer(2, size=64)
    with x64():
        fmt = Int(3, group, full_range=False)
        base, _ = solve(w, h, fmt, block_size=64)
        other, _ = solve(w, h, fmt, block_size=block)
    np.testing.assert_array_equal(base.codes, other.codes)
    np.testing.assert_allclose(base.values, other.values, rtol=1e-12)


def test_free_columns_stay_at_their_conditional_optimum():
    """(3) column k is the rounded least-squares optimum given the columns before it."""
    w, _, h = ref.layer(4)
    hd, _ = ref.damped(h, 0.01)
    scale, zero = ref.int_grid(w, 3)
    with x64():
        q = np.asarray(solve(w, h, Int(3))[0].values)
    for k in range(1, w.shape[1]):
        e = w[:, :k] - q[:, :k]
        optimum = w[:, k:] + e @ hd[:k, k:] @ np.linalg.inv(hd[k:, k:])
        expected = ref.int_round(optimum[:, :1], scale, zero, 3)
        np.testing.assert_allclose(q[:, k : k + 1], expected, atol=1e-9)


def test_unclamped_gptq_is_ldlq():
    """(4)"""
    w, _, h = ref.layer(5, out=64)
    hd, _ = ref.damped(h, 0.01)
    scale = 8.0 * np.abs(w).max() / 255
    with x64():
        qparams = grid.QParams(jnp.full((len(w), 1), scale))
        q = np.asarray(solve(w, h, Int(8), qparams=qparams)[0].values)
    assert np.abs(q / scale).max() < 127
    np.testing.assert_allclose(q, ref.ldlq(w, hd, scale, -128, 127), atol=1e-12)


@pytest.mark.parametrize("fmt", FORMATS[:3], ids=str)
def test_diagonal_hessian_gives_rounding_to_nearest(fmt):
    """(5)"""
    w, _, _ = ref.layer(6)
    diagonal = np.diag(np.random.default_rng(0).uniform(0.5, 3, size=w.shape[1]))
    with x64():
        a = dense(gptq(jnp.asarray(w), jnp.asarray(diagonal), fmt))
        b = dense(rtn(jnp.asarray(w), fmt))
    # Equal but for the sign of the error of weights that lie exactly between two values.
    np.testing.assert_allclose(np.abs(a - w), np.abs(b - w), atol=1e-12)
    assert (a == b).mean() > 0.9


def test_activation_order_is_permutation_equivariant():
    """(6)"""
    w, _, h = ref.layer(7, kind="outliers")
    perm = np.random.default_rng(1).permutation(w.shape[1])
    with x64():
        options = dict(fmt=Int(3), order="activation")
        plain = dense(gptq(jnp.asarray(w), jnp.asarray(h), **options))
        moved = dense(gptq(jnp.asarray(w[:, perm]), jnp.asarray(h[perm][:, perm]), **options))
        natural = dense(gptq(jnp.asarray(w), jnp.asarray(h), Int(3)))
        shuffled = dense(gptq(jnp.asarray(w[:, perm]), jnp.asarray(h[perm][:, perm]), Int(3)))
    np.testing.assert_allclose(moved, plain[:, perm], atol=1e-9)
    assert np.abs(shuffled - natural[:, perm]).max() > 1e-3


@pytest.mark.parametrize(("kind", "bound"), [("correlated", 0.6), ("outliers", 0.6)])
def test_layer_error_is_well_below_rounding(kind, bound):
    """Statistical: prox(GPTQ) / prox(RTN) on correlated inputs, on the undamped Hessian."""
    worst = 0.0
    for seed in range(8):
        w, _, h = ref.layer(100 + seed, out=64, size=128, tokens=512, kind=kind)
        a = dense(gptq(jnp.float32(w), jnp.float32(h), Int(3)))
        b = dense(rtn(jnp.float32(w), Int(3)))
        worst = max(worst, ref.prox(w - a, h) / ref.prox(w - b, h))
    assert worst < bound


def test_any_multiple_of_the_hessian_gives_the_same():
    w, _, h = ref.layer(8)
    h[:, 3] = h[3] = 0
    with x64():
        a = dense(gptq(jnp.asarray(w), jnp.asarray(h), Int(3)))
        b = dense(gptq(jnp.asarray(w), jnp.asarray(h) * 1024, Int(3)))
    np.testing.assert_array_equal(a, b)


def test_dead_inputs_become_zero_and_change_nothing_else():
    w, _, h = ref.layer(9)
    h[:, [2, 7]] = h[[2, 7]] = 0
    expected, _ = ref.gptq(w, h, 4)
    with x64():
        got = dense(gptq(jnp.asarray(w), jnp.asarray(h), Int(4)))
    np.testing.assert_allclose(got[:, [2, 7]], expected[:, [2, 7]], atol=1e-12)
    np.testing.assert_allclose(got, expected, atol=1e-9)


def test_without_any_input_weights_are_rounded():
    w, _, h = ref.layer(9)
    fmt = Int(4, full_range=False)
    got = gptq(jnp.float32(w), jnp.zeros_like(jnp.float32(h)), fmt)
    np.testing.assert_array_equal(got.matrix(), rtn(jnp.float32(w), fmt).matrix())


def test_singular_hessian_is_damped_alike_on_the_host():
    _, _, h = ref.layer(10, tokens=6)
    found = obs.inverse_factor(np.float32(h), 0.0)
    expected = obs.inverse_factor(jnp.float32(h), 0.0)
    assert float(found.damping) == float(expected.damping) > 0
    hd, _ = ref.damped(h, float(found.damping))
    for factor in (found, expected):
        upper = np.asarray(factor.upper, np.float64)
        np.testing.assert_allclose(upper @ hd @ upper.T, np.eye(len(h)), atol=0.05)


def test_singular_hessian_raises_its_own_damping_and_says_so():
    w, x, _ = ref.layer(10, tokens=6)
    stats = update(init(32, frozenset({"hessian"})), jnp.float32(x))
    layer = Layer("a/b", jnp.float32(w), stats)
    (result,) = run(GPTQ(format=Int(4), damping=0.0), (layer,))
    assert np.isfinite(result.metrics["error"]) and result.metrics["error"] < 0.2
    assert result.metrics["damping"] > 0
    (usual,) = run(GPTQ(format=Int(4)), (layer,))
    assert "damping" not in usual.metrics


def test_parity_trap_group_inside_a_block_sees_the_blocks_own_errors():
    """The released code fits a group that starts inside a block to weights without its errors."""
    w, _, h = ref.layer(11)
    with x64():
        w64, h64, fmt = jnp.asarray(w), jnp.asarray(h), Int(3, 8, full_range=False)
        dynamic = dense(gptq(w64, h64, fmt, block_size=32))
        static = dense(gptq(w64, h64, fmt, block_size=32, static_groups=True))
    reference = functools.partial(ref.gptq, w, h, 3, 8, full_range=False)
    np.testing.assert_allclose(dynamic, reference()[0], atol=1e-9)
    np.testing.assert_allclose(static, reference(static=True)[0], atol=1e-9)
    assert np.abs(dynamic - static).max() > 1e-3


def test_kmeans_levels_are_weighted_by_the_hessian():
    w, _, h = ref.layer(12, kind="outliers")
    with x64():
        fmt = Codebook("kmeans", bits=2)
        got = gptq(jnp.asarray(w), jnp.diag(jnp.diagonal(jnp.asarray(h))), fmt)
        plain = rtn(jnp.asarray(w), fmt)
        e, f = w - dense(got), w - dense(plain)
    assert ref.prox(e, np.diag(np.diag(h))) < ref.prox(f, np.diag(np.diag(h)))


def test_mask_is_kept_and_stored_sparse():
    w, _, h = ref.layer(13)
    mask = nm_mask(jnp.abs(jnp.float32(w)), 2, 4)
    for nm, name in ((None, "SparsePart"), ((2, 4), "NMPart")):
        ca = gptq(jnp.float32(w), jnp.float32(h), Int(4, 16), mask=mask, nm=nm)
        assert type(ca.parts[0]).__name__ == name
        assert not np.asarray(ca.matrix())[~np.asarray(mask)].any()
    # Errors of the pruned positions are spread, too: better than rounding under the same mask.
    nearest = rtn(jnp.float32(w), Int(4, 16), mask=mask)
    masked = np.where(mask, w, 0)
    a, b = dense(ca), dense(nearest)
    assert ref.prox(masked - a, h) < ref.prox(masked - b, h)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(fmt=Int(4, 12)), "group_size 12 does not divide the input size 32"),
        (dict(damping=-1.0), "damping"),
        (dict(block_size=0), "block_size"),
        (dict(order="random"), "order 'random'"),
        (dict(clipping="best"), "clipping 'best'"),
        (dict(h=jnp.ones((31, 31))), "needs a Hessian"),
        (dict(h=jnp.full((32, 32), jnp.nan)), "NaN"),
        (dict(w=jnp.full((4, 32), jnp.inf)), "NaN or infinite weights"),
        (dict(w=jnp.ones((4, 32), jnp.int8)), "float weight"),
        (
            dict(fmt=Float("e4m3", group_size=8), order="activation", static_groups=False),
            "static_groups",
        ),
    ],
)
def test_bad_input_is_refused(change, message):
    options = dict(w=jnp.ones((4, 32)), h=jnp.eye(32), fmt=Int(4)) | change
    with pytest.raises(JaxcompError, match=message):
        gptq(**options)


def test_step_names_the_path_in_errors():
    layer = Layer("layers/0/q", jnp.ones((4, 32)))
    with pytest.raises(JaxcompError, match=r"layers/0/q: .*calibration data"):
        run(GPTQ(format=Int(4)), (layer,))
    stats = update(init(32, frozenset({"hessian"})), jnp.ones((3, 32)))
    with pytest.raises(JaxcompError, match=r"layers/0/q \(4, 32\): group_size 10"):
        run(GPTQ(format=Int(4, 10)), (Layer("layers/0/q", jnp.ones((4, 32)), stats),))


def test_one_compilation_for_all_sizes(monkeypatch):
    """Rows are taken in slabs and columns in blocks, so layers of all sizes share a compilation."""
    traces, loop = [], obs._columns

    def counted(*args, **kwargs):
        traces.append(1)
        return loop(*args, **kwargs)

    monkeypatch.setattr(obs, "_columns", counted)
    obs._solve_block.clear_cache()
    for seed, (out, size) in enumerate(((24, 32), (300, 80), (7, 48))):
        w, _, h = ref.layer(seed, out=out, size=size, tokens=200)
        got = gptq(jnp.float32(w), jnp.float32(h), Int(4, 8), block_size=16)
        assert got.shape == w.shape
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("fmt", "static"),
    [
        (Int(3), False),
        (Int(3, 8, symmetric=False), False),
        (Int(3, 8), True),
        (Float("mxfp4"), False),
        (Codebook("nf4", group_size=32), True),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_on_the_host_equal_the_compiled_loop(fmt, static, masked):
    """The last block is filled up: 96 columns are no multiple of 40."""
    w, _, h = ref.layer(17, size=96, tokens=200)
    mask = np.random.default_rng(2).random(w.shape) < 0.6 if masked else None
    with x64():
        upper = obs.inverse_factor(h, 0.01).upper
        context = grid.prepare(fmt, jnp.asarray(w))
        qparams = grid.fit(fmt, jnp.asarray(w), context) if static else None
        options = dict(fmt=fmt, context=context, qparams=qparams, block_size=40)
        found = obs.solve(w, upper, mask=mask, **options)
        expected = obs.solve(jnp.asarray(w), jnp.asarray(upper), mask=mask, **options)
    np.testing.assert_array_equal(found.codes, expected.codes)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_zero_columns_on_which_nothing_depends_change_nothing():
    """What fills up the last block of columns."""
    w, _, h = ref.layer(18)
    wide, factor = np.zeros((len(w), 40)), np.eye(40)
    wide[:, :32] = w
    with x64():
        factor[:32, :32] = upper = obs.inverse_factor(h, 0.01).upper
        qparams = grid.fit(Int(3, 8), w)
        more = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 1)), mode="edge"), qparams)
        options = dict(fmt=Int(3, 8), context=grid.EMPTY)
        a = obs.solve(jnp.asarray(w), jnp.asarray(upper), qparams=qparams, **options)
        b = obs.solve(jnp.asarray(wide), jnp.asarray(factor), qparams=more, **options)
    np.testing.assert_array_equal(a.codes, b.codes[:, :32])
    np.testing.assert_allclose(a.errors, b.errors[:, :32], rtol=1e-9, atol=1e-12)
    assert not np.asarray(b.values)[:, 32:].any() and not np.asarray(b.errors)[:, 32:].any()


def test_slabs_of_rows_equal_the_whole():
    """On the CPU rows are taken in slabs; a stack of one is not."""
    for fmt in (Int(3, 8, full_range=False), Codebook("kmeans", bits=2)):
        w, _, h = ref.layer(16, out=300, size=16)
        with x64():
            slabs = gptq(jnp.asarray(w), jnp.asarray(h), fmt)
            whole = gptq(jnp.asarray(w)[None], jnp.asarray(h), fmt)
            np.testing.assert_allclose(slabs.matrix(), whole.matrix()[0], atol=1e-9)


def test_part_is_what_the_format_names():
    w, _, h = ref.layer(15)
    ca = gptq(jnp.float32(w), jnp.float32(h), Int(4, 16))
    assert isinstance(ca.parts[0], Affine) and ca.parts[0].bits == 4
    assert ca.nbits == w.size * 4 + w.size // 16 * 32
    assert ca.dtype == jnp.float32 and ca.shape == w.shape
    assert jax.tree.leaves(ca)
