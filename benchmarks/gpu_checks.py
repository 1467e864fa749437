"""What the checks of ``benchmarks.gpu`` share: an answer's error, and whether it stays the same."""

import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np

# ||error|| / ||y||, by what y is rounded to or what x was rounded to.
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 4e-3}


def check_one(check: Any, interpret) -> tuple[float, bool]:
    """The relative error of a kernel's answer, and whether three runs agree."""
    return check.error(np.random.default_rng(zlib.crc32(str(check).encode())), interpret)


def repeated(run, arguments, interpret) -> list:
    """Results of three runs, or of one where they are interpreted, in float64."""

    def once():
        return [np.asarray(x.astype(jnp.float32), np.float64) for x in run(*arguments)]

    return [once() for _ in range(1 if interpret else 3)]


def stable(answers: list) -> bool:
    first, *others = answers
    return all(np.array_equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def distance(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
