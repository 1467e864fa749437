"""How many random examples tests of properties draw, and which.

The suite draws the same ones each time, so that what passes passes again. ``JAXCOMP_TEST_FUZZ=20``
draws twenty times as many, others each time: the way to look for what the suite does not know yet.
A failure prints its example, which ``@example`` adds to the suite.
"""

import os

from hypothesis import settings

__all__ = ["fuzz"]

_TIMES = int(os.environ.get("JAXCOMP_TEST_FUZZ", "0"))


def fuzz(examples: int) -> settings:
    """Settings of a test of a property, for so many examples in the suite."""
    return settings(
        max_examples=examples * max(1, _TIMES),
        derandomize=_TIMES == 0,
        database=None,
        deadline=None,
        print_blob=True,
    )
