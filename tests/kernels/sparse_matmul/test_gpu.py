"""The kernels for Hopper GPUs: interpreted against float64, and through CUDA's assembler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxcomp.kernels import chips
from jaxcomp.kernels.implementations import Unsupported
from jaxcomp.kernels.sparse_matmul import BlockSparse, block_sparse_matmul, gpu, split_blocks

from tests.kernels import aot_gpu
from tests.kernels.sparse_matmul import cases
from tests.kernels.sparse_matmul.test_blocks import MASK
from tests.kernels.sparse_matmul.test_blocks import TestXla as Reference

OLD = tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11)
needs_mosaic = pytest.mark.skipif(OLD, reason="Mosaic GPU kernels need jax 0.11")


def assert_summed(actual, x, dense: np.ndarray, bias=None) -> None:
    """A float32 result within the rounding of its sums, in any order."""
    x = cases.double(x)
    size = np.abs(x) @ np.abs(dense).T
    size = size if bias is None else size + np.abs(cases.double(bias))
    bound = (dense.shape[1] + 1) * np.finfo(np.float32).eps * size
    assert (np.abs(cases.double(actual) - cases.product(x, dense, bias)) <= bound).all()


@needs_mosaic
class TestInterpreted(Reference):
    """On a simulated GPU whose shared memory is watched for races."""

    block = (128, 128)

    # These need float32 or int8, and are refused; gradients in bf16 are compared below.
    test_dtypes = None
    test_bias_reaches_rows_without_blocks = None
    test_int8_values = None
    test_one_block = None
    test_gradients = None
    test_gradients_of_int8_values = None

    def run(self, *args, **options):
        from jax.experimental.pallas import mosaic_gpu as plgpu

        interpret = plgpu.InterpretGPUParams(detect_races=True)
        options = {"implementation": "mosaic_gpu", "interpret": interpret} | options
        return block_sparse_matmul(*args, **options)

    @pytest.fixture
    def tiles(self, monkeypatch):
        """Names the tiles that are chosen."""

        def name(*sizes):
            chosen = gpu._kernels().Tiles(*sizes)
            monkeypatch.setattr(gpu, "choose_tiles", lambda *_: chosen)

        return name

    @pytest.mark.parametrize(("m", "sizes"), [(3, (64, 1, 2)), (150, (128, 2, 3))])
    def test_sums(self, rng, tiles, m, sizes):
        tiles(*sizes)
        w, dense = self.case(rng, dtype="bfloat16")
        x = cases.rows(rng, (m, w.shape[1]), "bfloat16")
        y = self.run(x, w, out_dtype=jnp.float32)
        assert_summed(y, x, dense)
        assert not np.asarray(y)[:, 128:256].any()

    def test_bias_and_activation_reach_rows_without_blocks(self, rng, tiles):
        tiles(64, 2, 2)
        w, dense = self.case(rng, dtype="bfloat16")
        x = cases.rows(rng, (2, 3, w.shape[1]), "bfloat16") / 10
        bias = jnp.asarray(rng.normal(size=w.shape[0]), jnp.bfloat16)
        y = self.run(x, w, bias, "gelu")
        assert y.dtype == jnp.bfloat16
        cases.assert_close(y, cases.product(x, dense, bias, "gelu"), "bfloat16")

    def test_lists_that_are_split(self, rng, tiles):
        tiles(64, 1, 2, 3)  # parts of 4 and 2 steps, and of none
        w, dense = self.case(rng, dtype="bfloat16")
        x = cases.rows(rng, (5, w.shape[1]), "bfloat16") / 10
        bias = jnp.asarray(rng.normal(size=w.shape[0]), jnp.float32)
        assert_summed(self.run(x, w, bias, out_dtype=jnp.float32), x, dense, bias)

    def test_a_weight_divided_for_devices(self, rng):
        self.block = (128, 256)
        mask = [[0, 1], [1, 1]]
        w, dense = self.case(rng, mask, "bfloat16", cut=0)
        x = cases.rows(rng, (2, w.shape[1]), "bfloat16")
        assert_summed(self.run(x, split_blocks(w, inputs=2), out_dtype=jnp.float32), x, dense)

    def test_gradients_of_blocks(self, rng):
        w, _ = self.case(rng, dtype="bfloat16")
        x = cases.rows(rng, (70, w.shape[1]), "bfloat16")
        dz = cases.rows(rng, (70, w.shape[0]), "bfloat16")
        from jax.experimental.pallas import mosaic_gpu as plgpu

        dvalues = gpu.gradients(x, w, dz, plgpu.InterpretGPUParams(detect_races=True))[1]
        whole = [np.pad(cases.double(a), ((0, 0), (0, -a.shape[1] % 128))) for a in (dz, x)]
        for values, row, column in zip(dvalues, w.rows, w.columns, strict=True):
            parts = [
                a[:, 128 * i : 128 * (i + 1)] for a, i in zip(whole, (row, column), strict=True)
            ]
            want, size = parts[0].T @ parts[1], np.abs(parts[0]).T @ np.abs(parts[1])
            error = np.abs(cases.double(values) - want)
            assert (error <= 2**-8 * np.abs(want) + 71 * 2**-23 * size).all()


class TestLists:
    def test_by_outputs_and_inputs(self, rng):
        w, _ = cases.blocks(rng, (384, 512), (128, 128), MASK)
        for weight in (w, split_blocks(w, inputs=4)):
            for axis in (0, 1):
                got = {name: np.asarray(x) for name, x in gpu.lists(weight, axis).items()}
                majors, minors = ((weight.rows, weight.columns), (weight.columns, weight.rows))[
                    axis
                ]
                np.testing.assert_array_equal(minors[got["blocks"]], got["minors"])
                want = np.repeat(np.arange(weight.grid[axis]), np.diff(got["starts"]))
                np.testing.assert_array_equal(majors[got["blocks"]], want)
                assert got["starts"][0] == 0 and got["starts"][-1] == len(weight.values)


@needs_mosaic
@pytest.mark.parametrize("rows", [1, 64, 65, 200, 2048])
@pytest.mark.parametrize("shape", [(4096, 14336), (14336, 4096), (128, 128)])
def test_tiles_fit_in_shared_memory(rows, shape):
    count = max(1, shape[0] // 128 * shape[1] // 128 // 10)
    struct = jax.ShapeDtypeStruct
    weight = BlockSparse(struct((count, 128, 128), jnp.bfloat16), None, None, None, shape)
    tiles = gpu.choose_tiles(rows, weight, 0)
    stages = tiles.stages * (tiles.height + 128) * 64 * 2
    assert stages + tiles.workers * 64 * 64 * 4 < 227 * 1024 - 1024
    assert tiles.split == 1 or (rows <= 64 and tiles.split * shape[0] // 128 <= 132)


class TestRefused:
    @needs_mosaic
    @pytest.mark.parametrize(
        ("dtypes", "block", "chip", "words"),
        [
            (("float32", "bfloat16"), (128, 128), chips.H100, "not x of float32"),
            (("bfloat16", "int8"), (128, 128), chips.H100, "values of int8"),
            (("bfloat16", "bfloat16"), (64, 128), chips.H100, "(64, 128) are not multiples"),
            (("bfloat16", "bfloat16"), (128, 128), chips.V5E, "not on v5e"),
        ],
    )
    def test_reasons(self, dtypes, block, chip, words):
        values = jax.ShapeDtypeStruct((2, *block), dtypes[1])
        weight = BlockSparse(values, None, None, None, (256, 256))
        assert words in gpu.unfit(jnp.dtype(dtypes[0]), weight, chip)

    def test_where_it_cannot_run(self, rng):
        w, _ = cases.blocks(rng, (128, 128), (128, 128), [[1]], "bfloat16")
        with pytest.raises(Unsupported, match="mosaic_gpu: it runs on Hopper GPUs, not on cpu"):
            block_sparse_matmul(jnp.ones((2, 128), "bfloat16"), w, implementation="mosaic_gpu")


def compiled(rows, outputs, inputs, block=(128, 128), density=0.1, gradient=False, **options):
    """A product, or its gradients, and the shapes of its arguments, for the compiler."""
    struct = jax.ShapeDtypeStruct
    count = round(outputs // block[0] * (inputs // block[1]) * density)
    arguments = [struct((rows, inputs), jnp.bfloat16), struct((count, *block), jnp.bfloat16)]
    arguments += [struct((count,), jnp.int32)] * 2 + [struct((outputs,), jnp.bfloat16)]

    def function(x, values, rows, columns, bias):
        def product(x, values, bias):
            weight = BlockSparse(values, rows, columns, None, (outputs, inputs))
            y = block_sparse_matmul(x, weight, bias, implementation="mosaic_gpu", **options)
            return y.astype(jnp.float32).sum() if gradient else y

        return (jax.grad(product, (0, 1)) if gradient else product)(x, values, bias)

    return function, tuple(arguments)


PROGRAMS = [
    {"rows": 1, "outputs": 4096, "inputs": 14336},
    {"rows": 16, "outputs": 14336, "inputs": 4096, "activation": "silu"},
    {"rows": 100, "outputs": 4096, "inputs": 4096, "block": (256, 128), "out_dtype": "float32"},
    {"rows": 2048, "outputs": 14336, "inputs": 4096, "activation": "gelu"},
    {"rows": 2048, "outputs": 4096, "inputs": 14336, "block": (256, 256), "gradient": True},
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
    assert len(result["kernels"]) == (2 if options.get("gradient") else 1)
    for kernel in result["kernels"]:
        assert kernel["spill_stores"] == kernel["spill_loads"] == 0
        assert not kernel["warnings"]
    # Nothing like the dense weight.
    assert result["memory"]["temporaries"] < options["outputs"] * options["inputs"]
