"""Compiles functions of the tests for TPUs that are not here, with the real compiler."""

import pathlib

import pytest
from jaxcomp.kernels import offline
from jaxcomp.kernels.offline import available

TOPOLOGIES = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4", "7x": "tpu7x:2x2x1"}
# Parameters of a test that is not slow for all: one chip of either generation in every run.
EVERY_RUN = ("v5e", "7x")
CHIPS = [pytest.param(c, marks=() if c in EVERY_RUN else pytest.mark.slow) for c in TOPOLOGIES]
ROOT = pathlib.Path(__file__).parents[2]

__all__ = ["CHIPS", "TOPOLOGIES", "available", "compile_cases"]


def compile_cases(
    chip: str, cases: list[tuple[str, dict]], dump: pathlib.Path | None = None, timeout: float = 900
) -> list[dict]:
    """Compiles cases for a chip in one new process, as ``offline.compile_cases`` does.

    Args:
      chip: a key of ``TOPOLOGIES``.
      cases: ("module:function", options) each.
      dump: a folder for the compiler's schedules, or None.
      timeout: seconds for all of them.

    Returns:
      A dict for each case.
    """
    return offline.compile_cases(TOPOLOGIES[chip], cases, dump, timeout, ROOT)
