"""What tells one run of ``compress`` from another, so that no journal is continued by another."""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import msgspec
import numpy as np

import jaxcomp
from jaxcomp.recipe import Recipe


def fingerprints(recipe: Recipe, named: Sequence[tuple[str, Any]], batches: list[tuple]) -> dict:
    """What a journal belongs to.

    Args:
      recipe: the recipe.
      named: leaves of the model by name.
      batches: calibration data.

    Returns:
      Hashes of recipe, model (names, shapes, and a sample of the bytes of each leaf) and data.
    """
    model, data = hashlib.sha256(), hashlib.sha256()
    for path, leaf in named:
        model.update(f"{path} {getattr(leaf, 'shape', leaf)} {getattr(leaf, 'dtype', '')}".encode())
        if hasattr(leaf, "shape"):
            flat = np.asarray(leaf).reshape(-1) if isinstance(leaf, jax.Array) else leaf
            model.update(_sample(flat))
            jaxcomp.io.safetensors.release(leaf)
    for batch in batches:
        for value in jax.tree.leaves(batch):
            value = np.asarray(value)
            data.update(f"{value.shape} {value.dtype}".encode())
            data.update(np.ascontiguousarray(value).view(np.uint8).tobytes())
    return {
        "recipe": recipe.fingerprint(),
        "recipe_text": msgspec.json.encode(recipe).decode(),
        "model": model.hexdigest(),
        "data": data.hexdigest(),
        "jax": jax.__version__,
        "jaxcomp": jaxcomp.__version__,
    }


def _sample(leaf: Any, count: int = 4096) -> bytes:
    """Up to ``count`` values spread over a leaf."""
    size = int(np.prod(leaf.shape))
    if not size:
        return b""
    picks = np.unique(np.linspace(0, size - 1, min(count, size)).astype(np.int64))
    return np.ascontiguousarray(leaf[np.unravel_index(picks, leaf.shape)]).tobytes()
