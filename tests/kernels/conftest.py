"""Of all kernels that a test interprets for a TPU, none may have a race."""

import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """What was found of each kernel: JAX itself keeps that of the last one only."""
    found, make = [], interpreter.RaceDetectionState

    def keep(*args, **options):
        found.append(make(*args, **options))
        return found[-1]

    monkeypatch.setattr(interpreter, "RaceDetectionState", keep)
    yield found
    assert not any(state.races_found for state in found)
