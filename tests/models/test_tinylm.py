"""The language model that ships with the library."""

import pathlib

import numpy as np
import pytest

import jaxcomp
from jaxcomp import data, evaluation, models

FOLDER = pathlib.Path(jaxcomp.__file__).parent / "assets" / "tinylm"


@pytest.fixture(scope="module")
def model():
    return models.load(FOLDER)


def test_it_is_small_and_complete(model):
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.is_file()}
    assert files["model.safetensors"] <= 8_000_000
    assert {"tokenizer.json", "calibration.txt", "heldout.txt", "LICENSE.txt"} <= set(files)
    assert "Python Software Foundation" in (FOLDER / "LICENSE.txt").read_text()
    config = model.config
    sizes = (config.hidden_size, config.intermediate_size, config.head_dim * 2)
    assert all(size % 128 == 0 for size in sizes)


def test_texts_are_long_enough_and_apart(model):
    calibration = data.batches(
        FOLDER / "calibration.txt", model.tokenizer, length=256, batch_size=128, samples=128
    )
    heldout = data.batches(FOLDER / "heldout.txt", model.tokenizer, length=256, batch_size=500)
    data.check_ids(calibration[0][0], model.config.vocab_size)
    assert heldout[0][0].size > 60_000
    # Runs of 16 tokens that both texts have are licences and idioms: few.
    runs = [
        {tuple(w) for w in np.lib.stride_tricks.sliding_window_view(b[0][0].ravel(), 16).tolist()}
        for b in (calibration, heldout)
    ]
    assert len(runs[0] & runs[1]) < 0.01 * len(runs[1])


def test_the_tokenizer_round_trips_and_equals_transformers(model):
    text = "def f(x, *, y=None):\n    return {'a': x ** 2}  # caf\u00e9 \U0001f600\n\t\n"
    ids = model.tokenizer.encode(text).ids
    assert model.tokenizer.decode(ids, skip_special_tokens=False) == text
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(FOLDER)
    assert theirs(text + "<|endoftext|>")["input_ids"] == [*ids, 0]
    assert theirs.eos_token_id == 0


def test_it_has_learned_python(model):
    batches = data.batches(
        FOLDER / "heldout.txt", model.tokenizer, length=256, batch_size=16, samples=32
    )
    got = evaluation.perplexity(model.apply, model.params, batches)
    assert got < 35  # Knowing only how frequent each token is gives about 490.
