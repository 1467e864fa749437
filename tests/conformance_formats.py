"""The conformance suite of formats: what every part must hold, whatever it stores.

A new format adds a ``Case`` to its own test file and runs ``CHECKS`` on it:

    @pytest.mark.parametrize("check", conformance_formats.CHECKS, ids=lambda f: f.__name__)
    def test_conformance(check):
        check(Case("mine", make=lambda w: my_part(w)))
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxcomp.formats import CompressedArray, from_arrays, to_arrays


@dataclasses.dataclass(frozen=True)
class Case:
    """One format.

    Attributes:
      name: for test ids.
      make: dense matrix ``(*stack, out, in)`` -> part of the same shape.
      odd_sizes: whether an input axis of 33 can be stored.
      batched_exact: whether a stack gives bitwise what its matrices give one by one.
      rows_exact: whether ``scale_rows`` by powers of two is exact.
      rows_tolerance: relative error of ``scale_rows`` by any factors.
      keeps_zero: whether zeros stay exactly zero.
      idempotent: whether ``make`` gives its own output back (the same grid again).
      again: part, dense matrix -> values of the same grid, where ``make`` would fit another.
    """

    name: str
    make: Callable[[jax.Array], Any]
    odd_sizes: bool = True
    batched_exact: bool = True
    rows_exact: bool = True
    rows_tolerance: float = 1e-6
    keeps_zero: bool = True
    idempotent: bool = True
    again: Callable[[Any, jax.Array], jax.Array] | None = None


def matrices(shape=(2, 6, 64), dtype=jnp.float32, seed=0) -> jax.Array:
    """Gaussian matrices with an all-zero row, a constant row and one huge outlier."""
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    w[..., 1, :] = 0.0
    w[..., 2, :] = 0.37
    w[..., 3, 5] = 1e4
    return jnp.asarray(w, dtype)


def _leaves_equal(a, b):
    la, ta = jax.tree.flatten(a)
    lb, tb = jax.tree.flatten(b)
    assert ta == tb
    for x, y in zip(la, lb, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


def _dense(part, dtype=jnp.float32):
    return np.asarray(part.materialize(dtype))


def shapes_and_dtypes(case: Case) -> None:
    """Shape and dtype of everything, for no and two stack axes, odd sizes and bfloat16."""
    shapes = [(6, 64), (1, 2, 4, 33 if case.odd_sizes else 64)]
    for shape in shapes:
        w = matrices(shape)
        part = case.make(w)
        assert part.shape == shape
        assert part.stack == shape[:-2]
        for dtype in (jnp.float32, jnp.bfloat16):
            dense = part.materialize(dtype)
            assert dense.shape == shape
            assert dense.dtype == dtype
            assert np.isfinite(np.asarray(dense, np.float32)).all()
        for leaf in jax.tree.leaves(part):
            assert leaf.shape[: len(shape) - 2] == shape[:-2], "a leaf lacks the stack axes"
    w = matrices(dtype=jnp.bfloat16)
    leaf = CompressedArray.from_matrix(case.make(w), w.shape, w.dtype, (0,), (1,), (2,))
    assert leaf.materialize().dtype == jnp.bfloat16
    assert leaf.shape == leaf.materialize().shape == w.shape


def bits_are_those_of_the_leaves(case: Case) -> None:
    """``nbits`` counts every stored array, exactly, from shapes alone."""
    part = case.make(matrices())
    true = 0
    for leaf in jax.tree.leaves(part):
        host = np.asarray(leaf)
        narrow = {np.dtype(ml_dtypes.int4): 4, np.dtype(ml_dtypes.uint4): 4}
        true += host.size * narrow.get(host.dtype, 8 * host.dtype.itemsize)
    assert part.nbits == true
    shapes = jax.eval_shape(lambda p: p, part)
    assert shapes.nbits == true
    assert shapes.shape == part.shape
    leaf = CompressedArray.from_matrix((part, part), part.shape, jnp.float32, (0,), (1,), (2,))
    assert leaf.nbits == 2 * true


def jit_vmap_scan_and_indexing_agree(case: Case) -> None:
    """However its stack is walked, a part materializes to the same values."""
    part = case.make(matrices())
    dense = _dense(part)
    compare = np.testing.assert_array_equal
    if not case.batched_exact:
        compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # noqa: E731
    compare(jax.jit(lambda p: p.materialize())(part), dense)
    compare(jax.vmap(lambda p: p.materialize())(part), dense)
    compare(jax.lax.scan(lambda c, p: (c, p.materialize()), 0, part)[1], dense)
    slices = [jax.tree.map(lambda a, i=i: a[i], part) for i in range(2)]
    for i, one in enumerate(slices):
        assert one.shape == part.shape[1:]
        compare(_dense(one), dense[i])
    back = jax.tree.map(lambda *a: jnp.stack(a), *slices)
    _leaves_equal(back, part)
    deeper = jax.tree.map(lambda a: a[None], part)
    assert deeper.shape == (1, *part.shape)
    compare(_dense(deeper)[0], dense)


def a_stack_is_its_matrices(case: Case) -> None:
    """Compressing a stack is compressing its matrices."""
    w = matrices()
    together = _dense(case.make(w))
    alone = np.stack([_dense(case.make(one)) for one in w])
    if case.batched_exact:
        np.testing.assert_array_equal(together, alone)
    else:
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)


def serialization_is_exact(case: Case) -> None:
    """Through names, NumPy and JSON and back, bit for bit; also with dtypes hidden as bytes."""
    part = case.make(matrices())
    leaf = CompressedArray.from_matrix(part, part.shape, jnp.bfloat16, (0,), (1,), (2,))
    arrays, structure = to_arrays(leaf)
    structure = json.loads(json.dumps(structure))
    host = {name: np.asarray(array) for name, array in arrays.items()}
    _leaves_equal(from_arrays(host, structure), leaf)
    hidden = {name: np.frombuffer(array.tobytes(), np.uint8) for name, array in host.items()}
    shaped = {n: a if host[n].dtype != np.uint8 else host[n] for n, a in hidden.items()}
    _leaves_equal(from_arrays(shaped, structure), leaf)


def pytrees_round_trip(case: Case) -> None:
    """Flatten, unflatten, map, paths; leaves may be replaced by anything."""
    part = case.make(matrices())
    leaves, treedef = jax.tree.flatten(part)
    _leaves_equal(jax.tree.unflatten(treedef, leaves), part)
    _leaves_equal(jax.tree.map(lambda a: a, part), part)
    names = jax.tree.map(lambda a: a.dtype.name, part)
    assert len(jax.tree.leaves(names)) == len(leaves)
    assert hash(treedef) == hash(jax.tree.structure(case.make(matrices(seed=1))))
    leaf = CompressedArray.from_matrix(part, part.shape, jnp.float32, (0,), (1,), (2,))
    repr(jax.tree.map(lambda a: None, leaf))
    repr(leaf)


def compressing_again_changes_nothing(case: Case) -> None:
    """Values of a grid are their own nearest points on it."""
    part = case.make(matrices())
    dense = part.materialize()
    if case.again is not None:
        np.testing.assert_array_equal(np.asarray(case.again(part, dense)), np.asarray(dense))
    elif case.idempotent:
        np.testing.assert_array_equal(_dense(case.make(dense)), np.asarray(dense))


def rows_scale(case: Case) -> None:
    """``scale_rows`` multiplies rows: exactly by powers of two, else to a rounding."""
    part = case.make(matrices())
    dense = _dense(part).astype(np.float64)
    rng = np.random.default_rng(3)
    powers = 2.0 ** rng.integers(-3, 4, part.shape[:-1])
    scaled = part.scale_rows(jnp.asarray(powers, jnp.float32))
    assert scaled.shape == part.shape
    if case.rows_exact:
        np.testing.assert_array_equal(_dense(scaled), dense * powers[..., None])
    any_factor = rng.uniform(0.3, 3, part.shape[:-1]) * rng.choice([-1, 1], part.shape[:-1])
    any_factor = any_factor.astype(np.float32)
    scaled = part.scale_rows(jnp.asarray(any_factor))
    np.testing.assert_allclose(
        _dense(scaled), dense * any_factor[..., None], rtol=case.rows_tolerance, atol=1e-12
    )


def special_rows(case: Case) -> None:
    """An all-zero row stays zero, and neither it, a constant row nor an outlier makes a NaN."""
    w = matrices()
    dense = _dense(case.make(w))
    assert np.isfinite(dense).all()
    if case.keeps_zero:
        np.testing.assert_array_equal(dense[:, 1], 0.0)
    whole = _dense(case.make(jnp.zeros_like(w)))
    assert np.isfinite(whole).all()
    if case.keeps_zero:
        np.testing.assert_array_equal(whole, 0.0)


CHECKS = (
    shapes_and_dtypes,
    bits_are_those_of_the_leaves,
    jit_vmap_scan_and_indexing_agree,
    a_stack_is_its_matrices,
    serialization_is_exact,
    pytrees_round_trip,
    compressing_again_changes_nothing,
    rows_scale,
    special_rows,
)
