"""Models loaded lazily: stacks that are read when needed, and compress to the same bytes."""

import weakref

import jax
import numpy as np
import pytest
from flax import nnx

import jaxcomp as jc
from jaxcomp import models
from jaxcomp.fingerprint import fingerprints
from jaxcomp.functional import functional, path_names
from jaxcomp.graph.trace import leaf_paths
from jaxcomp.io.stacked import Stacked
from jaxcomp.models import Mixtral
from tests.models.test_mixtral import TINY, write_folder

BATCHES = [(np.random.default_rng(0).integers(0, 64, (2, 8), np.int32),)]
EXPERTS = "*mlp/experts*"
RECIPES = {
    "data free": jc.presets.w4a16_rtn(group_size=8, include=(EXPERTS,)),
    "calibrated": jc.presets.wanda(sparsity=0.5, include=(EXPERTS,)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    _, params = functional(Mixtral(TINY, rngs=nnx.Rngs(0)))
    write_folder(folder, jax.tree.map(lambda a: a * 4 if a.ndim > 1 else a, params))
    return folder


@pytest.fixture
def stacks(monkeypatch):
    """Shapes of the stacks of experts that are made, each with how many others were alive."""
    made, alive, make = [], [], Stacked.__array__

    def watched(self, *arguments, **options):
        array = make(self, *arguments, **options)
        if array.shape[-3:-2] == (TINY.num_experts,):
            made.append((array.shape, sum(r() is not None for r in alive)))
            alive.append(weakref.ref(array))
        return array

    monkeypatch.setattr(Stacked, "__array__", watched)
    return made


@pytest.mark.parametrize("scan", [False, True])
def test_the_same_weights(folder, scan):
    eager, lazy = (
        path_names(models.load(folder, scan=scan, lazy=lazy).params) for lazy in (False, True)
    )
    experts = [path for path in eager if "/experts/" in path]
    assert all(isinstance(lazy[path], Stacked) for path in experts)
    for path, value in eager.items():
        found = lazy[path]
        assert (found.shape, found.dtype, found.ndim) == (value.shape, value.dtype, value.ndim)
        assert found.size == value.size
        np.testing.assert_array_equal(np.asarray(found), value, err_msg=path)
        if value.ndim < 3:
            continue
        for index in (1, -1, np.int64(0), (0, 1), slice(1, 3), (slice(None), 1), ([1, 0], 0), ...):
            np.testing.assert_array_equal(np.asarray(found[index]), value[index])
        assert found[1:1].shape == value[1:1].shape
    dense = models.densified(lazy)
    assert all(type(value) is not Stacked for value in dense.values())
    with pytest.raises(ValueError, match="always a copy"):
        np.array(lazy[experts[0]], copy=False)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("scan", [False, True])
def test_compressed_to_the_same_bytes_with_one_layer_in_memory(folder, scan, recipe, stacks):
    eager, lazy = (models.load(folder, scan=scan, lazy=lazy) for lazy in (False, True))
    assert not stacks  # Nothing is stacked at loading.
    results = [
        jc.compress(m.apply, m.params, RECIPES[recipe], BATCHES, progress=False)
        for m in (eager, lazy)
    ]
    a, b = (path_names(r.params) for r in results)
    assert list(a) == list(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert results[0].report.without_times() == results[1].report.without_times()
    # Gate and up read the same input, and are in memory together; then down.
    assert len(stacks) >= 3 and max(others for _, others in stacks) <= 1
    if recipe == "calibrated":  # Of one layer, also where the leaf is that of all layers.
        assert {shape[:-2] for shape, _ in stacks} == {(TINY.num_experts,)}


@pytest.mark.parametrize("scan", [False, True])
def test_a_journal_takes_both_for_the_same_model(folder, scan):
    found = []
    for lazy in (False, True):
        model = models.load(folder, scan=scan, lazy=lazy)
        graph = jc.trace(model.apply, model.params, *BATCHES[0])
        named, _ = leaf_paths(model.params)
        found.append(fingerprints(RECIPES["data free"], graph, named, BATCHES))
    assert found[0] == found[1]
