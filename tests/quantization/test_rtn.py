"""Rounding to nearest."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.errors import JaxcompError
from jaxcomp.formats import Codebook, Float, InputQuant, Int
from jaxcomp.pruning import magnitude
from jaxcomp.quantization import RTN, rtn
from jaxcomp.step import Activation, Layer, run
from tests import references as ref
from tests.helpers import x64


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize(("symmetric", "full"), [(True, False), (False, True)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_equals_the_reference(bits, symmetric, full, group):
    w, _, _ = ref.layer(bits)
    with x64():
        got = rtn(jnp.asarray(w), Int(bits, group, symmetric=symmetric, full_range=full))
        got = np.asarray(got.materialize())
    np.testing.assert_allclose(got, ref.rtn(w, bits, group, symmetric, full), atol=1e-12)


@pytest.mark.parametrize("fmt", [Int(3, 8), Int(4, 8, symmetric=False), Float("e2m1")], ids=str)
def test_search_is_never_worse_than_the_extremes_on_its_own_objective(fmt):
    w, _, _ = ref.layer(1)
    with x64():
        w64 = jnp.asarray(w)
        norm = {
            c: (np.abs(np.asarray(rtn(w64, fmt, clipping=c).materialize()) - w) ** 2.4).sum()
            for c in ("minmax", "mse")
        }
    assert norm["mse"] <= norm["minmax"] * (1 + 1e-12)
    assert norm["mse"] < 0.98 * norm["minmax"]


def test_percentile_clips_outliers():
    w = np.random.default_rng(0).normal(size=(4, 1000)).astype(np.float32)
    w[0, 0] = 50
    got = np.asarray(rtn(jnp.asarray(w), Int(4), clipping="percentile", percentile=99.0))
    assert got[0, 0] < 5
    plain = np.asarray(rtn(jnp.asarray(w), Int(4)))
    assert ((got - w)[0, 1:] ** 2).sum() < 0.1 * ((plain - w)[0, 1:] ** 2).sum()


def test_mask_is_kept():
    w, _, _ = ref.layer(2)
    mask = magnitude(jnp.float32(w), 0.5).materialize() != 0
    ca = rtn(jnp.float32(w), Int(4, 8, symmetric=False), mask=mask)
    assert not np.asarray(ca.materialize())[~np.asarray(mask)].any()
    with pytest.raises(JaxcompError, match="zero in it"):
        rtn(jnp.float32(w), Codebook("kmeans", bits=3), mask=mask)
    ca = rtn(jnp.float32(w), Codebook("nf4"), mask=mask)
    assert not np.asarray(ca.materialize())[~np.asarray(mask)].any()


def test_step_without_data_and_with_dynamic_activations():
    w, _, _ = ref.layer(3)
    activation = Activation()
    step = RTN(format=Int(8, full_range=False), activation=activation)
    assert step.needs() == frozenset()
    (layer,) = run(step, (Layer("p", jnp.float32(w)),))
    assert isinstance(layer.parts[0], InputQuant) and layer.parts[0].spec == activation
    assert layer.activation == activation
    assert 0 < layer.metrics["error"] < 0.01


def test_static_activations_need_the_range():
    activation = Activation(granularity="tensor", dynamic=False)
    step = RTN(format=Int(8), activation=activation)
    assert step.needs() == {"range"}
    with pytest.raises(JaxcompError, match="range"):
        run(step, (Layer("p", jnp.ones((2, 4))),))
    with pytest.raises(JaxcompError, match=r'p: .*granularity="tensor"'):
        bad = RTN(format=Int(8), activation=Activation(dynamic=False))
        run(bad, (Layer("p", jnp.ones((2, 4))),))


def test_not_an_element_format():
    with pytest.raises(JaxcompError, match="no element format"):
        rtn(jnp.ones((2, 4)), "int4")
