"""Layer maps of the papers, and taps in pairs."""

import numpy as np
import pytest

from jaxcomp.distillation import (
    explicit_map,
    last_map,
    layer_taps,
    pair_taps,
    skip_map,
    uniform_map,
)
from jaxcomp.errors import JaxcompError


def from_one(layers):
    return {m + 1: n + 1 for m, n in layers.items()}


def test_maps_are_those_of_the_papers():
    assert from_one(skip_map(6, 12)) == {1: 2, 2: 4, 3: 6, 4: 8, 5: 10}
    assert from_one(last_map(6, 12)) == {1: 7, 2: 8, 3: 9, 4: 10, 5: 11}
    assert from_one(skip_map(3, 12)) == {1: 4, 2: 8}
    assert from_one(uniform_map(4, 12)) == {1: 3, 2: 6, 3: 9, 4: 12}
    assert uniform_map(5, 5) == {i: i for i in range(5)}
    assert explicit_map({-1: -1, 0: 3}, 2, 8) == {0: 3, 1: 7}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform_map(5, 12), r"do not divide the teacher's 12; .*4: 11\}"),
        (lambda: skip_map(5, 12), "explicit_map"),
        (lambda: last_map(13, 12), "at most as many"),
        (lambda: uniform_map(0, 12), "at least 1 layer"),
        (lambda: skip_map(1, 12), "student of 1 layer"),
        (lambda: explicit_map({}, 2, 4), "pairs no layers"),
        (lambda: explicit_map({0: 4}, 2, 4), "teacher has no layer 4, its 4 layers are 0 to 3"),
        (lambda: explicit_map({2: 0}, 2, 4), "student has no layer 2"),
        (lambda: explicit_map({1: 0, -1: 2}, 2, 4), "layer 1 twice"),
    ],
)
def test_maps_that_cannot_be(call, message):
    with pytest.raises(JaxcompError, match=message):
        call()


def test_the_map_that_the_message_proposes_is_close_to_uniform():
    with pytest.raises(JaxcompError) as error:
        uniform_map(5, 12)
    assert "{0: 2, 1: 4, 2: 7, 3: 9, 4: 11}" in str(error.value)


TAPS = {f"layers/{i}/{part}": 100 * i + j for i in range(12) for j, part in enumerate(("mlp", "q"))}


def test_pairs_by_pattern():
    student = {f"h/{i}/ff": -i for i in range(3)}
    pairs = pair_taps(student, TAPS, "h/{}/ff", uniform_map(3, 12), "layers/{}/mlp")
    assert pairs == {0: (0, 300), 1: (-1, 700), 2: (-2, 1100)}
    assert list(layer_taps(TAPS, "layers/{}/q")) == list(range(12))


def test_characters_of_regular_expressions_are_themselves():
    assert layer_taps({"a.0(x)": 1, "ab0(x)": 2}, "a.{}(x)") == {0: 1}
    with pytest.raises(JaxcompError, match="matches none"):
        layer_taps({"layers/0/mlp/out": 1}, "layers/{}/mlp")


def test_taps_of_scanned_layers_have_them_on_the_leading_axis():
    stacked = {"layers/mlp": np.arange(12.0)[:, None] * np.ones(3)}
    pairs = pair_taps({"h/0": 5}, stacked, "h/{}", {0: 7}, "layers/mlp")
    assert pairs[0][0] == 5
    np.testing.assert_array_equal(pairs[0][1], np.full(3, 7.0))


def test_names_that_match_nothing():
    with pytest.raises(JaxcompError, match=r"'layer/{}/mlp' matches none .*layers/0/mlp"):
        layer_taps(TAPS, "layer/{}/mlp")
    with pytest.raises(JaxcompError, match="2 wildcards"):
        layer_taps(TAPS, "layers/{}/{}")
    with pytest.raises(JaxcompError, match="no taps at all"):
        layer_taps({}, "layers/{}/mlp")
    with pytest.raises(JaxcompError, match=r"teacher has no tap of layer 12, .*layers 0, 1"):
        pair_taps({"h/0": 1}, TAPS, "h/{}", {0: 12}, "layers/{}/mlp")
