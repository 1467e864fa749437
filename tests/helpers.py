"""What several test files share."""

import contextlib
import functools

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


def counted(function):
    """A jitted function that counts how often it is traced, in ``traces``.

    JAX's own count of a function's compilations forgets the oldest when many have been made.
    """

    @functools.wraps(function)
    def tracing(*args, **kwargs):
        run.traces += 1
        return function(*args, **kwargs)

    jitted = jax.jit(tracing)

    def run(*args, **kwargs):
        return jitted(*args, **kwargs)

    run.traces = 0
    return run
