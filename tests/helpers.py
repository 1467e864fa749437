"""What several test files share."""

import contextlib

import jax


@contextlib.contextmanager
def x64():
    """float64 inside the block."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)
