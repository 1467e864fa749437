"""Kernels in programs with 64-bit numbers enabled, of which they know none."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jaxcomp.kernels import chips

from tests.helpers import x64
from tests.kernels.cases import CASES, NOT_ON_GPUS, with_gradients


@pytest.mark.parametrize(
    "chip, rows", [("v5e", 8), pytest.param("v6e", 512, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", CASES)
def test_tpu_kernels_lower(name, chip, rows, rng, monkeypatch):
    monkeypatch.setattr(chips, "chip_of", lambda *arrays: chips.BY_NAME[chip])
    with x64():
        traced = trace(CASES[name](rng, rows, "bfloat16"), "mosaic_tpu")
        assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11")
@pytest.mark.parametrize("name", CASES)
def test_gpu_kernels_trace(name, rng, monkeypatch):
    monkeypatch.setattr(chips, "chip_of", lambda *arrays: chips.H100)
    if name in NOT_ON_GPUS:
        pytest.skip(NOT_ON_GPUS[name])
    with x64():
        jaxpr = str(trace(CASES[name](rng, 8, "bfloat16"), "mosaic_gpu").jaxpr)
    assert "pallas_call" in jaxpr or "mpmd_map" in jaxpr


def trace(case, implementation):
    """A call and its gradients, where integers of the operands have 64 bits."""
    assert jnp.arange(1).dtype == jnp.int64

    def run(operands):
        return case.call(**operands, implementation=implementation)

    return jax.jit(functools.partial(with_gradients, case, run)).trace(case.operands)
