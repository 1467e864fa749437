"""Runs before any test imports JAX: four virtual CPU devices, no network."""

import os

from tests import xla

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla.flags(4)}".strip()
# A test that reaches for a hub is wrong: all it needs is made or shipped here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import gc

import jax
import numpy as np
import pytest

# Tracing makes millions of small objects and few cycles: with Python's thresholds one second in
# fifteen went into looking for them.
gc.freeze()
gc.set_threshold(20_000, 10, 5)


@pytest.fixture
def rng() -> np.random.Generator:
    """A NumPy generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture
def key() -> jax.Array:
    """A JAX key with a fixed seed."""
    return jax.random.key(0)
