"""Texts as batches of token windows, for calibration and evaluation."""

import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcomp.errors import DataError, ModelError


def load_tokenizer(folder: str | os.PathLike) -> Any:
    """The tokenizer of a model folder.

    Args:
      folder: a folder with ``tokenizer.json``.

    Returns:
      A ``tokenizers.Tokenizer``.

    Raises:
      ModelError: there is none, or it cannot be read.
    """
    import tokenizers

    path = pathlib.Path(folder) / "tokenizer.json"
    if not path.exists():
        raise ModelError(
            f"{path}: missing; a text needs the model's tokenizer (convert older tokenizer files "
            "with transformers' AutoTokenizer.save_pretrained)"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The package raises bare Exception.
        raise ModelError(f"{path}: not a tokenizer ({error}); download it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_text(path: str | os.PathLike) -> str:
    """A UTF-8 text file.

    Args:
      path: the file.

    Returns:
      Its text.

    Raises:
      DataError: the file is missing, not UTF-8, or empty.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); convert it") from error
    if not text.strip():
        raise DataError(f"{path}: the text is empty; give a text with some content")
    return text


def encode(text: str, tokenizer: Any, *, where: str = "text") -> np.ndarray:
    """Token ids of a text, without added special tokens.

    Args:
      text: the text.
      tokenizer: a ``tokenizers.Tokenizer``.
      where: name of the text, for errors.

    Returns:
      ``(tokens,)`` int32.

    Raises:
      DataError: the text has no tokens.
    """
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    if not ids.size:
        raise DataError(f"{where}: the text is empty; give a text with some content")
    return ids


def windows(
    ids: np.ndarray, length: int, *, rows: int | None = None, where: str = "text"
) -> np.ndarray:
    """Cuts token ids into windows that do not overlap; what is left at the end is dropped.

    Args:
      ids: ``(tokens,)`` integers.
      length: tokens of a window.
      rows: how many windows, from the start; None is all.
      where: name of the text, for errors.

    Returns:
      ``(rows, length)`` int32.

    Raises:
      DataError: the text is too short.

    Example:
      >>> windows(np.arange(7), 3)
      array([[0, 1, 2],
             [3, 4, 5]], dtype=int32)
    """
    if length < 2:
        raise DataError(f"{where}: windows of {length} tokens; ask for at least 2")
    if rows is not None and rows < 1:
        raise DataError(f"{where}: {rows} windows asked for; ask for at least 1")
    have = len(ids) // length
    need = 1 if rows is None else rows
    if have < need:
        raise DataError(
            f"{where}: too short: {len(ids)} tokens make {have} windows of {length}, {need} asked "
            "for; give a longer text, or ask for fewer or shorter windows"
        )
    rows = have if rows is None else rows
    return np.asarray(ids[: rows * length], np.int32).reshape(rows, length)


def check_ids(tokens: np.ndarray, vocab_size: int, *, where: str = "tokens") -> None:
    """Refuses token ids that an embedding of ``vocab_size`` rows does not have.

    Args:
      tokens: integer array.
      vocab_size: rows of the embedding.
      where: name of the data, for errors.

    Raises:
      DataError: an id is out of range.
    """
    tokens = np.asarray(tokens)
    if not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(f"{where}: token ids must be integers, got {tokens.dtype}")
    if not tokens.size:
        raise DataError(f"{where}: no tokens")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"{where}: token id {low if low < 0 else high} is outside the model's vocabulary of "
            f"{vocab_size}; use the tokenizer that belongs to the model"
        )


def group(
    tokens: np.ndarray, batch_size: int, *, vocab_size: int | None = None, where: str = "tokens"
) -> tuple[tuple[np.ndarray], ...]:
    """Groups windows into the tuples of inputs that ``jc.compress`` and the evaluations take.

    Args:
      tokens: ``(rows, length)`` int32 windows.
      batch_size: rows of a batch; the last one may have fewer.
      vocab_size: rows of the model's embedding, to check the ids against.
      where: name of the data, for errors.

    Returns:
      One-element tuples of ``(batch_size, length)`` int32.

    Raises:
      DataError: there are no rows, or an id is out of range.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size:
        raise DataError(f"{where}: expected (rows, length) token ids, got shape {tokens.shape}")
    if batch_size < 1:
        raise DataError(f"{where}: batches of {batch_size} rows; ask for at least 1")
    if vocab_size is not None:
        check_ids(tokens, vocab_size, where=where)
    return tuple((tokens[i : i + batch_size],) for i in range(0, len(tokens), batch_size))


def batches(
    texts: str | os.PathLike | Sequence[str | os.PathLike],
    tokenizer: Any,
    *,
    length: int,
    batch_size: int,
    samples: int | None = None,
    vocab_size: int | None = None,
) -> tuple[tuple[np.ndarray], ...]:
    """Batches of token windows from one or more text files, joined in their order.

    Args:
      texts: path of a UTF-8 text, or several.
      tokenizer: a ``tokenizers.Tokenizer``, or a folder with ``tokenizer.json``.
      length: tokens of a window.
      batch_size: windows of a batch; the last one may have fewer.
      samples: how many windows in all, from the start; None is all.
      vocab_size: rows of the model's embedding, to check the ids against.

    Returns:
      One-element tuples of ``(batch_size, length)`` int32.

    Raises:
      DataError: a text is missing, empty or too short, or its ids do not fit the vocabulary.
      ModelError: there is no tokenizer.
    """
    paths = [texts] if isinstance(texts, str | os.PathLike) else list(texts)
    if not paths:
        raise DataError("no text was given; name at least one file")
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(tokenizer)
    elif tokenizer is None:
        raise ModelError("the model has no tokenizer.json; a text needs the model's tokenizer")
    where = ", ".join(str(p) for p in paths)
    ids = np.concatenate([encode(read_text(p), tokenizer, where=str(p)) for p in paths])
    rowed = windows(ids, length, rows=samples, where=where)
    return group(rowed, batch_size, vocab_size=vocab_size, where=where)


_SKIP = frozenset(
    "test tests idle_test site-packages encodings pydoc_data __pycache__ lib-dynload ensurepip "
    "turtledemo dist-packages".split()
)


def name_hash(name: str) -> int:
    """A number that depends on a name alone, for choices that stay the same everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def standard_library() -> tuple[dict[str, str], dict[str, str]]:
    """The Python standard library's own source, a text that is at hand without a network.

    Returns:
      Training and held-out texts by file name, in a fixed order: without tests and generated
      tables, one file in fourteen held out by the hash of its name. What the model that ships with
      the library was trained on.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    train: dict[str, str] = {}
    heldout: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _SKIP & set(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        text = path.read_bytes().decode("utf-8", errors="replace")
        if len(text) < 400:
            continue
        (heldout if name_hash(str(name)) % 14 == 0 else train)[str(name)] = text
    return train, heldout


def random_windows(
    tokens: np.ndarray, length: int, batch_size: int, step: int, seed: int = 0
) -> np.ndarray:
    """A training batch: windows at random places, the same for the same step and seed.

    Args:
      tokens: ``(tokens,)`` integers.
      length: tokens in a window.
      batch_size: windows in a batch.
      step: which batch; a run that is resumed at a step sees what it would have seen.
      seed: of the whole sequence of batches.

    Returns:
      ``(batch_size, length)`` int32.

    Raises:
      DataError: there are fewer tokens than a window has.
    """
    if len(tokens) < length:
        raise DataError(f"{len(tokens)} tokens are fewer than one window of {length}; give more")
    starts = np.random.default_rng((seed, step)).integers(0, len(tokens) - length + 1, batch_size)
    return np.stack([tokens[s : s + length] for s in starts]).astype(np.int32)
