"""Texts to token batches."""

import numpy as np
import pytest
import tokenizers

from jaxcomp import data
from jaxcomp.errors import DataError, ModelError


@pytest.fixture
def tokenizer():
    """One token a byte, ids are the bytes' ranks among printable characters."""
    vocab = {chr(c): c - 32 for c in range(32, 127)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="~ $A", special_tokens=[("~", 94)]
    )
    return made


def test_batches_are_the_text_in_order(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh")
    (tmp_path / "b.txt").write_text("ijklmnopqrstu")
    got = data.batches(
        [tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer, length=4, batch_size=2, vocab_size=95
    )
    ids = np.frombuffer(b"abcdefghijklmnopqrst", np.uint8).astype(np.int32) - 32
    assert [len(batch) for batch in got] == [1, 1, 1]
    assert [batch[0].shape for batch in got] == [(2, 4), (2, 4), (1, 4)]
    assert all(batch[0].dtype == np.int32 for batch in got)
    np.testing.assert_array_equal(np.concatenate([b[0] for b in got]).ravel(), ids)
    few = data.batches(tmp_path / "b.txt", tokenizer, length=4, batch_size=2, samples=2)
    np.testing.assert_array_equal(few[0][0].ravel(), ids[8:16])
    assert len(few) == 1


def test_a_folder_serves_as_tokenizer(tokenizer, tmp_path):
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("abcdefgh")
    assert data.batches(tmp_path / "a.txt", tmp_path, length=8, batch_size=1)[0][0].shape == (1, 8)
    (tmp_path / "tokenizer.json").write_text("nothing")
    with pytest.raises(ModelError, match="not a tokenizer"):
        data.load_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="missing"):
        data.load_tokenizer(tmp_path / "no")


def test_bad_texts_are_refused(tokenizer, tmp_path):
    def batches(text, **options):
        path = tmp_path / "a.txt"
        path.write_bytes(text)
        return data.batches(
            path, tokenizer, **{"length": 4, "batch_size": 2, "vocab_size": 95, **options}
        )

    with pytest.raises(DataError, match=r"a\.txt: the text is empty"):
        batches(b" \n ")
    with pytest.raises(DataError, match="not UTF-8"):
        batches(b"\xff\xfe")
    with pytest.raises(DataError, match=r"too short: 3 tokens make 0 windows of 4, 1 asked for"):
        batches(b"abc")
    with pytest.raises(DataError, match=r"8 tokens make 2 windows of 4, 3 asked for"):
        batches(b"abcdefgh", samples=3)
    with pytest.raises(DataError, match="0 windows asked for"):
        batches(b"abcdefgh", samples=0)
    with pytest.raises(DataError, match="windows of 1 tokens"):
        batches(b"abcdefgh", length=1)
    with pytest.raises(DataError, match="batches of 0 rows"):
        batches(b"abcdefgh", batch_size=0)
    with pytest.raises(DataError, match="token id 72 is outside the model's vocabulary of 70"):
        batches(b"abcdefgh", vocab_size=70)
    with pytest.raises(DataError, match="cannot be read"):
        data.batches(tmp_path / "no.txt", tokenizer, length=4, batch_size=2)
    with pytest.raises(DataError, match="no text was given"):
        data.batches([], tokenizer, length=4, batch_size=2)
    with pytest.raises(ModelError, match="no tokenizer"):
        data.batches(tmp_path / "a.txt", None, length=4, batch_size=2)


def test_ids_are_checked():
    with pytest.raises(DataError, match="token id -1 is outside"):
        data.check_ids(np.asarray([[0, -1]]), 5)
    with pytest.raises(DataError, match="must be integers"):
        data.check_ids(np.zeros((1, 2)), 5)
    with pytest.raises(DataError, match=r"expected \(rows, length\)"):
        data.group(np.zeros((0, 4), np.int32), 2)
