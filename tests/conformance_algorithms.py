"""The suite that every layer algorithm passes. An algorithm joins by an entry in ``ALGORITHMS``."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import calibration
from jaxcomp.formats import Codebook, CompressedArray, Float, InputScale, Int
from jaxcomp.formats.serialize import from_arrays, to_arrays
from jaxcomp.pruning import Magnitude, SparseGPT, Wanda, magnitude, sparsegpt, wanda
from jaxcomp.quantization import (
    AWQ,
    GPTQ,
    RTN,
    LLMInt8,
    SmoothQuant,
    awq,
    gptq,
    llm_int8,
    rtn,
)
from jaxcomp.quantization.binary import Binary, binary
from jaxcomp.quantization.ternary import Ternary, ternary
from jaxcomp.step import Layer, Step, run
from tests.helpers import x64


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One algorithm as the suite sees it.

    Attributes:
      name: of the test.
      step: the step that runs it.
      function: ``(w, x) -> CompressedArray`` with the step's options, or None where there is none.
      dense: ``(w, x) -> CompressedArray`` at the setting that gives W back.
      tolerance: of the dense limit, relative to the largest weight.
      jit: whether ``function`` runs under jit (its sizes do not depend on data).
    """

    name: str
    step: Step
    function: Callable | None = None
    dense: Callable | None = None
    tolerance: float = 0.0
    jit: bool = True


def gram(x):
    return jnp.einsum("...ti,...tj->...ij", x, x)


def norm(x):
    return jnp.sqrt((x * x).sum(-2))


WIDE = Int(16)
DOUBLE = Codebook("nf4", double_quantization=True)
ALGORITHMS = (
    Algorithm(
        "rtn",
        RTN(format=Int(4)),
        lambda w, x: rtn(w, Int(4)),
        lambda w, x: rtn(w, WIDE),
        1e-4,
    ),
    Algorithm(
        "gptq",
        GPTQ(format=Int(3)),
        lambda w, x: gptq(w, gram(x), Int(3)),
        lambda w, x: gptq(w, gram(x), WIDE),
        1e-3,
    ),
    Algorithm(
        "gptq-fp4",
        GPTQ(format=Float("e2m1")),
        lambda w, x: gptq(w, gram(x), Float("e2m1")),
    ),
    Algorithm(
        "gptq-nf4",
        GPTQ(format=Codebook("nf4"), order="activation"),
        lambda w, x: gptq(w, gram(x), Codebook("nf4"), order="activation"),
    ),
    Algorithm("rtn-nf4-double", RTN(format=DOUBLE), lambda w, x: rtn(w, DOUBLE)),
    Algorithm("gptq-nf4-double", GPTQ(format=DOUBLE), lambda w, x: gptq(w, gram(x), DOUBLE)),
    Algorithm("ternary", Ternary(), lambda w, x: ternary(w)),
    Algorithm("binary", Binary(center=True), lambda w, x: binary(w, center=True)),
    Algorithm(
        "awq",
        AWQ(format=Int(4)),
        lambda w, x: awq(w, x, Int(4)),
        lambda w, x: awq(w, x, WIDE),
        1e-3,
    ),
    Algorithm("smoothquant", SmoothQuant()),
    Algorithm(
        "llm_int8",
        LLMInt8(threshold=2.5),
        lambda w, x: llm_int8(w, x, 2.5),
        lambda w, x: llm_int8(w, x, 0.0),
        jit=False,
    ),
    Algorithm(
        "magnitude",
        Magnitude(sparsity=0.5),
        lambda w, x: magnitude(w, 0.5),
        lambda w, x: magnitude(w, 0.0),
    ),
    Algorithm(
        "wanda",
        Wanda(sparsity=0.5),
        lambda w, x: wanda(w, norm(x), 0.5),
        lambda w, x: wanda(w, norm(x), 0.0),
    ),
    Algorithm(
        "sparsegpt",
        SparseGPT(sparsity=0.5),
        lambda w, x: sparsegpt(w, gram(x), 0.5),
        lambda w, x: sparsegpt(w, gram(x), 0.0),
    ),
    Algorithm(
        "sparsegpt-int4",
        SparseGPT(sparsity=0.5, format=Int(4)),
        lambda w, x: sparsegpt(w, gram(x), 0.5, fmt=Int(4)),
        lambda w, x: sparsegpt(w, gram(x), 0.0, fmt=WIDE),
        1e-3,
    ),
)


def make(stack=(), out=6, size=13, tokens=40, seed=0, dtype=np.float32):
    """Weights and inputs of odd sizes; the first rows: zero, constant, one with an outlier."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(*stack, out, size))
    w[..., 0, :] = 0
    w[..., 1, :] = 0.7
    w[..., 2, 3] = 1e4
    x = rng.normal(size=(*stack, tokens, size)) @ rng.normal(size=(size, size)) / 3
    return jnp.asarray(w.astype(dtype)), jnp.asarray(x.astype(dtype))


def statistics(step, x):
    """Exactly what the step says that it needs."""
    start = calibration.init(x.shape[-1], step.needs(), x.shape[:-2])
    return calibration.update(start, x)


def layers(step, w, x):
    return (Layer("p", w, statistics(step, x)),)


def matrix(layer):
    """What a layer computes with, its input's transform included."""
    if layer.parts is None:
        total = layer.weight
    else:
        total = sum(part.materialize(jnp.float32) for part in layer.parts)
    return total if layer.input_scale is None else total * layer.input_scale[..., None, :]


def every(condition=lambda a: True):
    chosen = [a for a in ALGORITHMS if condition(a)]
    return pytest.mark.parametrize("algorithm", chosen, ids=[a.name for a in chosen])


functions = every(lambda a: a.function is not None)


class ConformanceSuite:
    """Inherit from it, or collect it as it is."""

    @functions
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_shape_dtype_and_difficult_rows(self, algorithm, dtype):
        w, x = make(dtype=jnp.dtype(dtype))
        result = algorithm.function(w, x)
        assert isinstance(result, CompressedArray)
        assert result.shape == w.shape and result.dtype == w.dtype
        dense = np.asarray(result.materialize(), np.float32)
        assert np.isfinite(dense).all()
        assert not dense[0].any()
        assert np.abs(dense[3:]).max() < 10

    @functions
    def test_stacks_equal_a_loop(self, algorithm):
        with x64():
            w, x = make(stack=(2,), dtype=np.float64)
            stacked = algorithm.function(w, x)
            assert stacked.shape == w.shape
            single = [algorithm.function(w[i], x[i]).materialize() for i in range(2)]
            np.testing.assert_allclose(stacked.materialize(), jnp.stack(single), atol=1e-9)
            if algorithm.jit:
                # A leading axis of the parts is sliced as lax.scan would.
                first = jax.tree.map(lambda a: a[0], stacked)
                np.testing.assert_allclose(first.materialize(), single[0], atol=1e-9)

    @every(lambda a: a.function is not None and a.jit)
    def test_runs_under_jit(self, algorithm):
        with x64():
            w, x = make(dtype=np.float64)
            eager = algorithm.function(w, x)
            jitted = jax.jit(algorithm.function)(w, x)
            assert jax.tree.structure(jitted) == jax.tree.structure(eager)
            np.testing.assert_allclose(jitted.materialize(), eager.materialize(), atol=1e-9)

    @every(lambda a: a.dense is not None)
    def test_dense_limit_gives_the_weight_back(self, algorithm):
        rng = np.random.default_rng(1)
        w = jnp.asarray(rng.normal(size=(6, 13)), jnp.float32)
        _, x = make()
        got = algorithm.dense(w, x).materialize()
        np.testing.assert_allclose(got, w, rtol=0, atol=algorithm.tolerance * jnp.abs(w).max())

    @functions
    def test_survives_saving(self, algorithm):
        w, x = make()
        result = algorithm.function(w, x)
        arrays, structure = to_arrays(result)
        arrays = {name: np.asarray(value) for name, value in arrays.items()}
        back = from_arrays(arrays, structure)
        assert jax.tree.structure(back) == jax.tree.structure(result)
        assert back.nbits == result.nbits
        np.testing.assert_array_equal(back.materialize(), result.materialize())

    @every()
    def test_step_needs_only_what_it_says(self, algorithm):
        assert algorithm.step.needs() <= set(calibration.FIELDS)
        w, x = make()
        (result,) = run(algorithm.step, layers(algorithm.step, w, x))
        assert result.path == "p" and result.weight.shape == w.shape
        dense = matrix(result)
        assert np.isfinite(np.asarray(dense)).all()
        if algorithm.function is not None:
            expected = algorithm.function(w, x).materialize()
            np.testing.assert_allclose(dense, expected, rtol=1e-4, atol=1e-4)
            assert np.isfinite(result.metrics["error"])
            # The weight and the parts speak of the same matrix.
            bare = jnp.asarray(sum(part.materialize() for part in result.parts))
            assert bare.shape == w.shape
            if result.mask is not None:
                np.testing.assert_array_equal(bare == 0, ~result.mask | (result.weight == 0))
        else:
            np.testing.assert_allclose(dense, w, rtol=1e-5, atol=1e-6)

    @every()
    def test_step_takes_a_group_and_keeps_its_order(self, algorithm):
        w, x = make()
        group = layers(algorithm.step, w, x)
        group = (group[0], group[0].replace(path="q", weight=-w))
        results = run(algorithm.step, group)
        assert [r.path for r in results] == ["p", "q"]
        assert all(np.isfinite(np.asarray(matrix(r))).all() for r in results)
        scales = [r.input_scale for r in results]
        if scales[0] is not None:
            np.testing.assert_array_equal(*scales)

    @every()
    def test_step_is_a_frozen_config(self, algorithm):
        step = algorithm.step
        assert hash(step) == hash(
            type(step)(**{f: getattr(step, f) for f in step.__struct_fields__})
        )
        assert step.__struct_config__.tag_field == "algorithm"

    @functions
    def test_nan_is_refused_with_the_path(self, algorithm):
        w, x = make()
        with pytest.raises(ValueError, match=r"p: .*NaN"):
            run(algorithm.step, layers(algorithm.step, w.at[3, 3].set(jnp.nan), x))

    @functions
    def test_parts_are_wrapped_at_most_by_input_transforms(self, algorithm):
        w, x = make()
        for part in algorithm.function(w, x).parts:
            if isinstance(part, InputScale):
                assert part.scale.shape == (w.shape[-1],)
            assert part.shape == w.shape
