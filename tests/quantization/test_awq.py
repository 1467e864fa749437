"""AWQ against the exact objective and an independent search."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.calibration import init, update
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import Float, InputScale, Int
from jaxcomp.pruning import magnitude
from jaxcomp.quantization import AWQ, awq, rtn
from jaxcomp.step import Activation, Layer, run
from tests import references as ref
from tests.helpers import x64


def output_error(w, ca, x):
    return ((x @ (np.asarray(ca.materialize(), np.float64) - w).T) ** 2).sum()


def search(w, x, bits, group):
    """The published search, with outputs instead of the Hessian."""
    mean = np.abs(x).mean(0)
    best = (np.inf, None)
    for i in range(20):
        s = mean ** (i / 20)
        s = s / np.sqrt(s.max() * s.min())
        q = ref.rtn(w * s, bits, group, symmetric=False)
        error = ((q @ (x / s).T - w @ x.T) ** 2).sum()
        if error < best[0]:
            best = (error, q / s)
    return best


@pytest.mark.parametrize("kind", ["iid", "outliers"])
def test_scale_search_equals_the_reference(kind):
    w, x, _ = ref.layer(0, kind=kind)
    with x64():
        ca = awq(jnp.asarray(w), jnp.asarray(x), Int(3, 8, symmetric=False), search_clip=False)
        got = np.asarray(ca.materialize())
    error, expected = search(w, x, 3, 8)
    np.testing.assert_allclose(got, expected, atol=1e-9)
    assert ((x @ (got - w).T) ** 2).sum() == pytest.approx(error, rel=1e-8)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("fmt", [Int(4, 16), Int(3, 8, symmetric=False), Float("e2m1")], ids=str)
def test_never_worse_than_rounding(fmt, clip):
    """Exact: ratio 0 is rounding, and clips that do not pay are dropped."""
    for seed, kind in ((1, "iid"), (2, "correlated"), (3, "outliers")):
        w, x, _ = ref.layer(seed, kind=kind)
        with x64():
            a = awq(jnp.asarray(w), jnp.asarray(x), fmt, search_clip=clip)
            b = rtn(jnp.asarray(w), fmt)
            assert output_error(w, a, x) <= output_error(w, b, x) * (1 + 1e-9)


def test_ratio_zero_alone_is_rounding():
    w, x, _ = ref.layer(4, kind="outliers")
    with x64():
        fmt = Int(4, 8, full_range=False)
        a = awq(jnp.asarray(w), jnp.asarray(x), fmt, grid_size=1, search_clip=False)
        b = rtn(jnp.asarray(w), fmt)
        np.testing.assert_array_equal(a.materialize(), b.materialize())


def test_clipping_never_hurts_and_helps_at_few_bits():
    w, x, _ = ref.layer(5, out=48, size=64)
    with x64():
        w64, x64_ = jnp.asarray(w), jnp.asarray(x)
        with_clip = output_error(w, awq(w64, x64_, Int(2, 32)), x)
        without = output_error(w, awq(w64, x64_, Int(2, 32), search_clip=False), x)
    assert with_clip < 0.95 * without


def test_helps_with_outlier_channels():
    """Statistical, measured .27 with outlier channels."""
    for seed in range(4):
        w, x, _ = ref.layer(30 + seed, out=48, size=64, kind="outliers")
        fmt = Int(4, 32)
        a = output_error(w, awq(jnp.float32(w), jnp.float32(x), fmt), x)
        b = output_error(w, rtn(jnp.float32(w), fmt), x)
        assert a < 0.8 * b


def layers(step, seed=6):
    w, x, _ = ref.layer(seed, kind="outliers")
    stats = update(init(32, step.needs()), jnp.float32(x))
    return tuple(Layer(p, jnp.float32(w[i::3]), stats) for i, p in enumerate("qkv")), w, x


def test_group_shares_the_scale_of_the_summed_error():
    """Three layers of one group are one layer of three times the rows."""
    step = AWQ(format=Int(4, 8), search_clip=False)
    group, w, x = layers(step)
    results = run(step, group)
    whole = awq(jnp.float32(w), jnp.float32(x), Int(4, 8), search_clip=False)
    for i, layer in enumerate(results):
        np.testing.assert_allclose(layer.input_scale, whole.parts[0].scale, rtol=1e-5)
        dense = layer.parts[0].materialize() * layer.input_scale
        np.testing.assert_allclose(dense, np.asarray(whole)[i::3], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            layer.weight * layer.input_scale, group[i].weight, rtol=1e-5, atol=1e-7
        )
        e = np.asarray(dense) - w[i::3]
        expected = np.linalg.norm(x @ e.T) / np.linalg.norm(x @ w[i::3].T)
        assert layer.metrics["error"] == pytest.approx(expected, rel=1e-3)
        assert 0 <= layer.metrics["ratio"] < 1


def test_dead_inputs_keep_their_scale():
    w, x, _ = ref.layer(7)
    x[:, 5] = 0
    ca = awq(jnp.float32(w), jnp.float32(x), Int(4, 8))
    assert float(ca.parts[0].scale[5]) == 1.0
    assert np.isfinite(np.asarray(ca)).all()


def test_mask_and_activation():
    w, x, _ = ref.layer(8)
    mask = magnitude(jnp.float32(w), n=2, m=4).materialize() != 0
    ca = awq(
        jnp.float32(w), jnp.float32(x), Int(4, 16), mask=mask, nm=(2, 4), activation=Activation()
    )
    assert isinstance(ca.parts[0], InputScale)
    assert type(ca.parts[0].part.part).__name__ == "NMPart"
    assert not np.asarray(ca)[~np.asarray(mask)].any()


def test_bad_input_is_refused():
    with pytest.raises(JaxcompError, match="needs inputs"):
        awq(jnp.ones((2, 4)), jnp.ones((5, 3)), Int(4))
    with pytest.raises(JaxcompError, match="NaN"):
        awq(jnp.ones((2, 4)), jnp.full((5, 4), jnp.nan), Int(4))
    with pytest.raises(JaxcompError, match="grid_size"):
        awq(jnp.ones((2, 4)), jnp.ones((5, 4)), Int(4), grid_size=0)
    with pytest.raises(JaxcompError, match=r"a/b: .*hessian"):
        run(AWQ(format=Int(4)), (Layer("a/b", jnp.ones((2, 4))),))
