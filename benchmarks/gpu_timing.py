"""How the variants of a computation are timed on a GPU, and what a child process replies."""

import functools
import json
import statistics
import sys
import time
import traceback
from typing import Any

import jax

CACHE = 60e6  # bytes: the second-level cache of an H100 or H200, and a little more
SAMPLES = 15
MARK = "reply: "


def reply(message: dict) -> None:
    print(MARK + json.dumps(message), flush=True)


class Variants:
    """Functions of (list of x, list of weights) that take turns in being timed."""

    def __init__(self, deadline: float) -> None:
        self.calls: dict[str, tuple] = {}
        self.failures: dict[str, str] = {}
        self.deadline = deadline

    def add(self, name: str, function: Any, xs: list, operands: list) -> None:
        """Compiles the products of all x with the weights in turn, and tries them."""
        if time.perf_counter() > self.deadline:
            self.failures[name] = "no time left"
            return
        try:
            once = jax.jit(function)  # lowered once, called often
            every = jax.jit(
                lambda xs, operands: [
                    once(x, operands[i % len(operands)]) for i, x in enumerate(xs)
                ]
            )
            call = functools.partial(every, xs, operands)
            jax.block_until_ready(call())
            jax.block_until_ready(call())
            started = time.perf_counter()
            jax.block_until_ready([call() for _ in range(3)])
            seconds = (time.perf_counter() - started) / 3
            self.calls[name] = (call, len(xs), max(1, min(50, round(10e-3 / seconds))))
        except Exception as failure:
            self.failures[name] = f"{type(failure).__name__}: {str(failure)[:160]}"
            traceback.print_exc(file=sys.stderr)

    def measure(self) -> dict[str, tuple[float, float]]:
        """Median and spread (half the distance between quartiles) of seconds a product."""
        samples: dict[str, list[float]] = {name: [] for name in self.calls}
        for _ in range(SAMPLES):
            for name, (call, products, repeats) in self.calls.items():
                started = time.perf_counter()
                jax.block_until_ready([call() for _ in range(repeats)][-1])
                samples[name].append((time.perf_counter() - started) / repeats / products)
        medians = {}
        for name, seconds in samples.items():
            low, middle, high = statistics.quantiles(seconds, n=4)
            medians[name] = (middle, (high - low) / 2)
        return medians


def copies(weight_bytes: float) -> int:
    """Distinct weights that exceed the cache four times."""
    return max(2, min(16, int(4 * CACHE / weight_bytes) + 1))
