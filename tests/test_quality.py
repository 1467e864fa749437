"""The orderings that a user relies on, on the embedded model, with and without planted outliers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import quality
from jaxcomp import presets

SAMPLES, HELD_OUT = 48, 64
BITS = {
    4: (presets.w4a16_rtn, presets.w4a16_gptq),
    3: (presets.w3a16_rtn, presets.w3a16_gptq),
    2: (presets.w2a16_rtn, presets.w2a16_gptq),
}


class Measured:
    """Perplexities of one model by recipe; each recipe is run when it is first asked for."""

    def __init__(self, bench):
        self.bench = bench
        self.dense = bench.dense().perplexity
        self.row = functools.cache(self._row)

    def _row(self, recipe, dispatched=False):
        return self.bench.row("", recipe, dispatched=dispatched)

    def __call__(self, recipe, dispatched=False):
        return self.row(recipe, dispatched).perplexity


@pytest.fixture(scope="module")
def loaded():
    model, calibration, held = quality.load(SAMPLES, HELD_OUT)
    params = jax.tree.map(lambda a: np.asarray(a, np.float32), model.params)
    return model.apply, params, calibration, held


@pytest.fixture(scope="module")
def plain(loaded):
    return Measured(quality.Bench(*loaded))


@pytest.fixture(scope="module")
def planted(loaded, plain):
    apply, params, calibration, held = loaded
    outliers = quality.plant_outliers(params)
    return Measured(quality.Bench(apply, outliers, calibration, held, plain.bench.run))


def test_embedded_model_predicts(plain):
    """It does far better than a guess among its 2048 tokens."""
    assert plain.dense < 2048 / 20


@pytest.mark.parametrize("bits", BITS)
def test_dense_gptq_rtn(plain, bits):
    rtn, gptq = (make() for make in BITS[bits])
    assert plain.dense < plain(gptq) < plain(rtn)
    assert plain.row(gptq, False).kl < plain.row(rtn, False).kl


def test_more_bits_are_better(plain):
    for kind in (0, 1):
        found = [plain(BITS[bits][kind]()) for bits in (4, 3, 2)]
        assert found == sorted(found)


@pytest.mark.parametrize("pattern", [{"sparsity": 0.5}, {"n": 2, "m": 4}], ids=["half", "2:4"])
def test_sparsegpt_wanda_magnitude(plain, pattern):
    sparsegpt = plain(presets.sparsegpt(**pattern))
    assert plain.dense < sparsegpt
    assert sparsegpt < plain(presets.wanda(**pattern))
    assert sparsegpt < plain(presets.magnitude(**pattern))


def test_planted_outliers_change_no_output(plain, planted):
    assert planted.bench.measure(planted.bench.run, planted.bench.params).perplexity == (
        pytest.approx(plain.dense, rel=1e-5)
    )
    for ours, theirs in zip(planted.bench.logits, plain.bench.logits, strict=True):
        assert float(jnp.abs(ours - theirs).max()) < 1e-2
    largest = _largest_input(planted.bench) / _largest_input(plain.bench)
    assert largest > 3


def _largest_input(bench):
    gain = bench.params["layers"]["0"]["input_layernorm"]["scale"]
    return float(jnp.abs(gain).max())


def test_smoothquant_undoes_outliers(planted):
    smooth = planted(quality.w8a8("token", True), True)
    plain = planted(quality.w8a8("token", False), True)
    assert abs(smooth / planted.dense - 1) <= 0.002
    assert abs(plain / planted.dense - 1) > 0.002


def test_smoothquant_does_not_see_outliers(plain, planted):
    """Its scales are (max x / max w) ** alpha: what was planted cancels at alpha = 0.5."""
    recipe = quality.w8a8("token", True)
    assert planted(recipe, True) == pytest.approx(plain(recipe, True), rel=5e-4)


def test_awq_beats_rtn_on_outliers(planted):
    assert planted(presets.w4a16_awq()) < planted(presets.w4a16_rtn(symmetric=False))


@pytest.mark.parametrize("pattern", [{"sparsity": 0.5}, {"n": 2, "m": 4}], ids=["half", "2:4"])
def test_wanda_beats_magnitude_on_outliers(plain, planted, pattern):
    wanda = presets.wanda(**pattern)
    assert planted(wanda) < planted(presets.magnitude(**pattern))
    # The score |w| ‖x‖ is the same product whatever the two factors.
    assert planted(wanda) == pytest.approx(plain(wanda), rel=1e-3)
