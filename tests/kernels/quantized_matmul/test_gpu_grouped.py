"""Experts on Hopper GPUs: the kernel interpreted, and where it puts the rows of each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxcomp.kernels.quantized_matmul import gpu_grouped, grouped_quantized_matmul, prepare

from tests.fuzz import fuzz
from tests.kernels.quantized_matmul import cases
from tests.kernels.quantized_matmul.test_gpu import needs_mosaic
from tests.kernels.quantized_matmul.test_grouped import TestXla as Reference
from tests.kernels.quantized_matmul.test_grouped import product


@needs_mosaic
class TestInterpreted(Reference):
    """On a simulated GPU whose shared memory is watched for races."""

    implementation = "mosaic_gpu"
    shape = (128, 256, 64)
    widest = "bfloat16"
    many = (70, 0, 30, 150), 260  # tiles of 128 rows

    # These need zero points beside quantized rows, or float32; gradients are XLA's on all chips.
    prepared_for = "h100"
    test_quantized_activations = None
    test_prepared_and_gradients = None

    @property
    def interpret(self):
        from jax.experimental.pallas import mosaic_gpu as plgpu

        return plgpu.InterpretGPUParams(detect_races=True)

    @pytest.mark.parametrize("format", cases.BITS)
    def test_formats(self, rng, format):
        super().test_formats(rng, format)

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the simulator
    def test_rows_do_not_see_each_other(self, rng):
        super().test_rows_do_not_see_each_other(rng)

    @pytest.mark.parametrize(("format", "dtype"), [("int4", "int8"), ("fp8", "float8_e4m3fn")])
    def test_quantized_rows(self, rng, format, dtype):
        sizes = (9, 0, 1)
        case = self.case(rng, format, 3)
        x = cases.rows(rng, (11, self.shape[1]), "bfloat16")
        y = self.run(x, sizes, case, activation_dtype=dtype, out_dtype=jnp.float32)
        expected = product(cases.quantized_rows(x, dtype), sizes, case)
        cases.assert_close(y, expected, "float32")

    def test_prepared_with_a_bias_and_an_activation(self, rng):
        sizes = (3, 0, 40)
        case = self.case(rng, "int4", 3, zeros=True, scale_dtype="bfloat16")
        x = cases.rows(rng, (44, self.shape[1]), "bfloat16") / 30
        bias = jnp.asarray(rng.normal(size=(3, self.shape[0])), jnp.float32)
        weight = prepare(*case.arguments(), **case.options, chip="h100")
        assert weight.layout == "mosaic_gpu/1"
        y = grouped_quantized_matmul(
            x, jnp.array(sizes), weight, bias=bias, activation="gelu",
            implementation=self.implementation, interpret=self.interpret,
        )  # fmt: skip
        assert y.dtype == jnp.bfloat16
        cases.assert_close(y, product(x, sizes, case, bias, "gelu"), "bfloat16")


planned = jax.jit(gpu_grouped.plan, static_argnums=(1, 2))


@fuzz(60)
@given(st.integers(0, 60), st.lists(st.integers(0, 40), min_size=5, max_size=5))
def test_every_row_has_a_place_in_a_tile_of_its_expert(before, sizes):
    m, tokens = 90, 16
    bounds = np.minimum(before + np.cumsum([0, *sizes]), m)
    owners, sources, places = map(np.asarray, planned(jnp.asarray(bounds, jnp.int32), m, tokens))
    sizes = np.diff(bounds)
    assert (owners >= 0).sum() == (-(-sizes // tokens)).sum()
    rows = np.arange(bounds[0], bounds[-1])
    expert = np.repeat(np.arange(5), sizes)
    np.testing.assert_array_equal(sources[places[rows]], rows)
    np.testing.assert_array_equal(owners[places[rows] // tokens], expert)
