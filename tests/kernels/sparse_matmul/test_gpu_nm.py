"""The 2:4 kernel for Hopper GPUs: interpreted against float64, and through CUDA's assembler."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jaxcomp.kernels import chips
from jaxcomp.kernels.sparse_matmul import gpu_nm, nm, nm_matmul, prepare_nm

from tests.kernels import aot_gpu
from tests.kernels.sparse_matmul import cases
from tests.kernels.sparse_matmul.test_gpu import OLD, assert_summed, needs_mosaic
from tests.kernels.sparse_matmul.test_nm import TestXla as Reference


@needs_mosaic
class TestInterpreted(Reference):
    """On a simulated GPU whose shared memory is watched for races."""

    shape = (128, 512)
    group_sizes = (32, 128, 512)
    dtypes = ("bfloat16",) * 3

    # These need float32, and are refused; gradients are XLA's, as of all chips.
    test_dtypes = None
    test_prepared_with_bias_and_activation = None
    test_gradients = None
    test_gradient_of_scales = None

    def run(self, *args, **options):
        from jax.experimental.pallas import mosaic_gpu as plgpu

        interpret = plgpu.InterpretGPUParams(detect_races=True)
        options = {"implementation": "mosaic_gpu", "interpret": interpret} | options
        return nm_matmul(*args, **options)

    def test_rows_that_fill_no_tile_and_inputs_in_two_parts(self, rng):
        w, dense = cases.nm(rng, (128, 2048), dtype="bfloat16")
        x = cases.rows(rng, (13, 2048), "bfloat16")
        assert_summed(self.run(x, w, out_dtype=jnp.float32), x, dense)

    def test_int4_values_in_two_parts_of_which_one_is_shorter(self, rng):
        w, dense = cases.nm(rng, (128, 2304), dtype="int4", group_size=256)
        x = cases.rows(rng, (13, 2304), "bfloat16")
        cases.assert_close(self.run(x, w), cases.product(x, dense), "bfloat16")

    def test_prepared_with_a_bias_and_an_activation(self, rng):
        w, dense = cases.nm(rng, self.shape, dtype="bfloat16")
        prepared = prepare_nm(w, chip="h100")
        assert prepared.layout != "stored"
        x = cases.rows(rng, (2, 3, self.shape[1]), "bfloat16") / 10
        bias = jnp.asarray(rng.normal(size=self.shape[0]), jnp.float32)
        y = self.run(x, prepared, bias, "silu")
        assert y.dtype == jnp.bfloat16
        cases.assert_close(y, cases.product(x, dense, bias, "silu"), "bfloat16")


class TestRefused:
    def weight(self, shape=(128, 256), dtype="bfloat16", n=2, m=4, group_size=None):
        struct = jax.ShapeDtypeStruct
        values = struct((shape[0], shape[1] * n // m), dtype)
        scales = (
            None if group_size is None else struct((shape[1] // group_size, shape[0]), "float32")
        )
        return nm.NMSparse(values, None, scales, n, m, group_size, shape)

    @needs_mosaic
    @pytest.mark.parametrize(
        ("change", "dtype", "chip", "words"),
        [
            ({}, "float32", chips.H100, "x of float32"),
            ({"dtype": "float32"}, "bfloat16", chips.H100, "values of float32"),
            ({"dtype": "uint8", "group_size": 16}, "bfloat16", chips.H100, "no multiple of 32"),
            (
                {"dtype": "uint8", "group_size": 96, "shape": (128, 768)},
                "bfloat16",
                chips.H100,
                "neither divide 256",
            ),
            ({"n": 1}, "bfloat16", chips.H100, "2:4 sparsity, not 1:4"),
            ({"shape": (192, 256)}, "bfloat16", chips.H100, "of 128 and inputs of 256, not 192"),
            ({"shape": (128, 384)}, "bfloat16", chips.H100, "not 128 and 384"),
            ({}, "bfloat16", chips.V5E, "Hopper GPUs, not on v5e"),
            ({}, "bfloat16", None, "an unknown chip"),
        ],
    )
    def test_reasons(self, change, dtype, chip, words):
        assert re.search(words, gpu_nm.unfit(jnp.dtype(dtype), self.weight(**change), chip))

    def test_versions(self):
        told = gpu_nm.unfit(jnp.bfloat16, self.weight(), chips.H100)
        assert "jax 0.11" in told if OLD else told is None


def compiled(rows, outputs, inputs, group_size=None, **options):
    """A product with a prepared weight, and the shapes of its arguments, for the compiler."""
    struct, quarter = jax.ShapeDtypeStruct, inputs // 4
    values = struct((2, outputs, quarter), jnp.int4 if group_size else jnp.bfloat16)
    positions = struct((outputs, quarter), jnp.int4)
    scales = struct((outputs, inputs // group_size), jnp.float32) if group_size else None
    weight = nm.NMSparse(values, positions, scales, 2, 4, group_size, (outputs, inputs), nm.LAYOUT)

    def function(x, weight):
        return nm_matmul(x, weight, implementation="mosaic_gpu", **options)

    return function, (struct((rows, inputs), jnp.bfloat16), weight)


PROGRAMS = [
    {"rows": 1, "outputs": 4096, "inputs": 14336},
    {"rows": 16, "outputs": 14336, "inputs": 4096, "activation": "silu"},
    {"rows": 300, "outputs": 4096, "inputs": 4096, "out_dtype": "float32"},
    {"rows": 1, "outputs": 14336, "inputs": 4096, "group_size": 128},
    {"rows": 300, "outputs": 4096, "inputs": 4096, "group_size": 32},
]


@functools.cache
def built() -> list[dict]:
    return aot_gpu.compile_cases([(f"{__name__}:compiled", options) for options in PROGRAMS])


@pytest.mark.skipif(OLD or not aot_gpu.available(), reason="needs JAX's CUDA plugin and a toolkit")
@pytest.mark.parametrize("index", range(len(PROGRAMS)), ids=lambda index: str(PROGRAMS[index]))
def test_compiles_for_h100(index):
    results, options = built(), PROGRAMS[index]
    assert index < len(results), results[-1]["error"]
    result = results[index]
    assert result["error"] is None, result["error"]
    (kernel,) = result["kernels"]
    assert kernel["spill_stores"] == kernel["spill_loads"] == 0
    assert not kernel["warnings"]
    # Nothing like the dense weight, nor its planes in another order.
    rows = -(-options["rows"] // 128) * 128
    sums = 4 * 4 * rows * options["outputs"] + 2 * rows * options["inputs"]
    assert result["memory"]["temporaries"] <= 2 * sums
