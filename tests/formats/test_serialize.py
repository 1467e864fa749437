"""Names, arrays and JSON and back; damage is told."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.errors import JaxcompError
from jaxcomp.formats import (
    NM,
    CompressedArray,
    Dense,
    Float,
    InputQuant,
    InputScale,
    Int,
    Part,
    Sparse,
    from_arrays,
    quantize,
    sparse,
    to_arrays,
)
from jaxcomp.formats.base import part
from jaxcomp.step import Activation


def nested():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 32)), jnp.float32)
    mask = jnp.broadcast_to(jnp.arange(32) % 4 < 2, w.shape)
    spec = Activation(format="e4m3", granularity="tensor", dynamic=False)
    first = InputQuant(
        InputScale(sparse.quantize(NM(2, 4, Float("e4m3")), w, mask), jnp.ones((2, 32))),
        scale=jnp.ones(2),
        spec=spec,
    )
    second = sparse.quantize(Sparse(Int(4, symmetric=False)), w, ~mask)
    third = Dense(w.astype(jnp.int4))
    parts = (first, second, third, quantize(Float("nvfp4"), w))
    return CompressedArray.from_matrix(parts, (4, 2, 32), jnp.bfloat16, (1,), (0,), (2,))


def test_names_are_paths_and_the_structure_is_json():
    arrays, structure = to_arrays(nested())
    assert "0/part/part/values/values" in arrays
    assert arrays["0/part/part/values/values"].dtype == jnp.float8_e4m3fn
    assert arrays["2/values"].dtype == jnp.int4
    again = from_arrays(arrays, json.loads(json.dumps(structure)))
    assert jax.tree.structure(again) == jax.tree.structure(nested())
    assert again.parts[0].spec == Activation(format="e4m3", granularity="tensor", dynamic=False)
    assert again.parts[1].element == Int(4, symmetric=False)
    assert again.shape == (4, 2, 32)
    assert again.dtype == jnp.bfloat16
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(nested()), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_arrays_are_kept_as_they_are():
    """Memory-mapped arrays stay so: nothing is copied on the way in."""
    arrays, structure = to_arrays(nested())
    host = {name: np.asarray(array) for name, array in arrays.items()}
    again = from_arrays(host, structure)
    assert again.parts[0].part.scale is host["0/part/scale"]


def test_damage_is_told():
    arrays, structure = to_arrays(nested())
    with pytest.raises(JaxcompError, match=r"'0/part/scale' \(2, 32\) is missing"):
        from_arrays({k: v for k, v in arrays.items() if k != "0/part/scale"}, structure)
    with pytest.raises(JaxcompError, match=r"float32 \(2, 32\) was saved"):
        from_arrays({**arrays, "0/part/scale": np.ones((2, 31), np.float32)}, structure)
    with pytest.raises(JaxcompError, match="version 99"):
        from_arrays(arrays, {**structure, "version": 99})
    with pytest.raises(JaxcompError, match="unknown part 'Wavelet'"):
        from_arrays(arrays, {**structure, "parts": [{"part": "Wavelet", "fields": {}}]})


def test_a_foreign_part_cannot_be_saved():
    @part
    class Affine(Part):
        values: jax.Array

        @property
        def shape(self):
            return self.values.shape

    leaf = CompressedArray.from_matrix(Affine(jnp.ones((2, 3))), (2, 3), jnp.float32)
    with pytest.raises(JaxcompError, match="cannot be saved"):
        to_arrays(leaf)
