"""Every format of the library passes the conformance suite."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.formats import (
    NM,
    Codebook,
    Dense,
    DenseColumns,
    Float,
    InputQuant,
    InputScale,
    Int,
    Sparse,
    grid,
    low_rank,
    quantize,
    sparse,
)
from jaxcomp.step import Activation
from tests import conformance_formats as conformance
from tests.conformance_formats import CHECKS, Case


def element(name, fmt, **options):
    """A case of an element format, whose grid is refitted only where that gives the same grid."""

    def again(part, dense):
        original = made[0]
        context = grid.prepare(fmt, original)
        qparams = grid.expand(fmt, grid.fit(fmt, original, context), *dense.shape[-2:])
        return grid.decode(fmt, grid.encode(fmt, dense, qparams, context), qparams, context)

    made = [None]

    def make(w):
        made[0] = w
        return quantize(fmt, w)

    return Case(name, make, again=again, **options)


def largest(w, share):
    """Mask of the largest magnitudes of each row."""
    rank = np.argsort(np.argsort(-np.abs(np.asarray(w)), axis=-1), axis=-1)
    return rank < round(w.shape[-1] * share)


def blockwise(w, n, m):
    """Mask of the n largest of every m."""
    blocks = np.abs(np.asarray(w)).reshape(*w.shape[:-1], -1, m)
    rank = np.argsort(np.argsort(-blocks, axis=-1), axis=-1)
    return (rank < n).reshape(w.shape)


def columns(w):
    at = jnp.broadcast_to(jnp.array([0, 5, 7]), (*w.shape[:-2], 3))
    return DenseColumns(w[..., at[(0,) * (w.ndim - 2)]], at, in_size=w.shape[-1])


def scaled(w):
    s = 2.0 ** (jnp.arange(w.shape[-1]) % 3 - 1)
    s = jnp.broadcast_to(s, (*w.shape[:-2], w.shape[-1]))
    return InputScale(quantize(Int(8, full_range=False), w / s[..., None, :]), s)


def activation(w):
    part = quantize(Int(8, full_range=False), w)
    one = jnp.ones(w.shape[:-2])
    return InputQuant(part, scale=one, spec=Activation(granularity="tensor", dynamic=False))


bf16 = {"rows_tolerance": 2**-7, "rows_exact": True}
CASES = (
    element("int2", Int(2)),
    element("int3", Int(3)),
    element("int4", Int(4)),
    element("int4_signed", Int(4, full_range=False)),
    element("int4_asymmetric_g16", Int(4, group_size=16, symmetric=False), odd_sizes=False),
    element("int3_asymmetric", Int(3, symmetric=False)),
    element("int5", Int(5)),
    element("int8", Int(8, full_range=False)),
    element("int8_asymmetric", Int(8, symmetric=False)),
    element("int8_tensor", Int(8, full_range=False, out_group_size=None)),
    element("int4_block", Int(4, 32, symmetric=False, out_group_size=2), odd_sizes=False),
    element("int4_bf16", Int(4, 32, scale_dtype="bfloat16"), odd_sizes=False, **bf16),
    element("int16", Int(16)),
    element("e4m3", Float("e4m3")),
    element("e5m2_tensor", Float("e5m2", out_group_size=None)),
    element("e2m1_g32", Float("e2m1", group_size=32), odd_sizes=False),
    element("mxfp8", Float("mxfp8"), odd_sizes=False),
    element("mxfp4", Float("mxfp4"), odd_sizes=False),
    element("nvfp4", Float("nvfp4"), odd_sizes=False),
    element("nf4_g64", Codebook("nf4", group_size=64), odd_sizes=False),
    element(
        "nf4_double", Codebook("nf4", group_size=16, double_quantization=True), odd_sizes=False
    ),
    element(
        "fp4_double_bf16",
        Codebook("fp4_bnb", scale_dtype="bfloat16", double_quantization=True),
        odd_sizes=True,
    ),
    element("fp4_bnb", Codebook("fp4_bnb")),
    element("levels", Codebook("levels", levels=(-1.0, -0.2, 0.0, 0.3, 1.0))),
    element("kmeans", Codebook("kmeans", bits=3), batched_exact=False),
    Case("dense", lambda w: Dense(w)),
    Case(
        "dense_bf16",
        lambda w: Dense(w.astype(jnp.bfloat16)),
        rows_tolerance=2**-8,
    ),
    Case("columns", columns),
    Case("nm_2_4", lambda w: sparse.quantize(NM(2, 4), w, blockwise(w, 2, 4)), odd_sizes=False),
    Case("nm_1_4", lambda w: sparse.quantize(NM(1, 4), w, blockwise(w, 1, 4)), odd_sizes=False),
    Case("nm_4_8", lambda w: sparse.quantize(NM(4, 8), w, blockwise(w, 4, 8)), odd_sizes=False),
    Case(
        "nm_2_4_int4",
        lambda w: sparse.quantize(
            NM(2, 4, Int(4, group_size=16, symmetric=False)), w, blockwise(w, 2, 4)
        ),
        odd_sizes=False,
        idempotent=False,
    ),
    Case("sparse", lambda w: sparse.build(Sparse(), largest(w, 0.5), w)),
    Case(
        "sparse_int4",
        lambda w: sparse.quantize(Sparse(Int(4, symmetric=False)), w, largest(w, 0.5)),
        idempotent=False,
    ),
    Case(
        "sparse_mxfp4",
        lambda w: sparse.quantize(Sparse(Float("mxfp4")), w, largest(w, 0.25)),
        odd_sizes=False,
    ),
    Case(
        "sparse_nvfp4",
        lambda w: sparse.quantize(Sparse(Float("nvfp4")), w, largest(w, 0.25)),
        odd_sizes=False,
        idempotent=False,
    ),
    Case(
        "low_rank",
        lambda w: low_rank(w, 3),
        batched_exact=False,
        rows_tolerance=1e-4,
        rows_exact=False,
        keeps_zero=False,
        idempotent=False,
    ),
    Case("input_scale", scaled, idempotent=False),
    Case("input_quant", activation, idempotent=False),
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_conformance(case, check):
    check(case)


def test_the_suite_covers_every_part():
    from jaxcomp.formats import serialize

    w = jnp.ones((2, 6, 64))
    seen = {type(n).__name__ for c in CASES for n in nodes(c.make(w))}
    assert seen == set(serialize.PARTS)


def nodes(part):
    yield part
    for name in ("part", "values"):
        inner = getattr(part, name, None)
        if inner is not None and not hasattr(inner, "dtype"):
            yield from nodes(inner)


def test_a_wrong_part_fails():
    """The suite can fail: a stack forgotten, a second grid, a zero that moves."""
    fixed = quantize(Int(4), jnp.ones((6, 64)))
    with pytest.raises(AssertionError):
        conformance.shapes_and_dtypes(Case("fixed", lambda w: fixed))
    with pytest.raises(AssertionError):
        conformance.compressing_again_changes_nothing(Case("halved", lambda w: Dense(w * 0.5)))
    with pytest.raises(AssertionError):
        conformance.special_rows(Case("moved", lambda w: Dense(w + 1)))
