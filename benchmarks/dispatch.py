"""Evaluation of compressed models on a CPU against that of the dense model.

    python -m benchmarks.dispatch [--rounds 11] [--save]

The demo's evaluation: the embedded model, batches of 16 windows of 256 tokens, compiled once. Dense
and compressed take turns, batch by batch, and the ratio is the median of those of two turns: a
machine's speed drifts by more than they differ. The recipes are one for each way of storing a
weight that the demo's have, and a few more.
"""

import argparse
import statistics
import sys
import time

import jax
import numpy as np

import jaxcomp as jc
from benchmarks import common
from jaxcomp import demo, evaluation, presets

RECIPES = (
    "w4a16_rtn",
    "w3a16_rtn",
    "w2a16_rtn",
    "w8a8_dynamic",
    "fp8_dynamic",
    "nf4",
    "magnitude_50",
    "magnitude_2_4",
    "w4a16_awq",
    "w8a8_smoothquant",
    "sparsegpt_2_4_int4",
)
LIMIT = 1.10


def seconds(apply, params, batch) -> float:
    """How long one batch takes."""
    started = time.perf_counter()
    evaluation.evaluate(apply, params, [batch])
    return time.perf_counter() - started


def main() -> int:
    """Prints the table; the exit code is 1 if a recipe is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="turns of each model")
    parser.add_argument("--save", action="store_true", help="write results/dispatch.txt")
    options = parser.parse_args()
    model = jc.models.load(demo.tinylm())
    dense = jax.tree.map(jax.numpy.asarray, model.params)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (16, 256), np.int32)
    fast = jc.dispatch(model.apply)
    rows, ratios = [], []
    for name in RECIPES:
        recipe = presets.get(name)
        params = jc.compress(model.apply, dense, recipe, [(tokens,)], progress=False).params
        choices = fast.report(params, tokens)
        used = sorted({c.implementation for c in choices if c.kind != "attention"})
        turns = [(model.apply, dense), (fast, params)]
        for turn in turns:
            seconds(*turn, (tokens,))  # Compiles.
        taken = [[seconds(*turn, (tokens,)) for turn in turns] for _ in range(options.rounds)]
        plain, compressed = (statistics.median(column) for column in zip(*taken, strict=True))
        ratios.append(statistics.median(ours / theirs for theirs, ours in taken))
        rows.append(
            (name, ", ".join(used), f"{plain:.3f}", f"{compressed:.3f}", f"{ratios[-1]:.2f}")
        )
        print(rows[-1], file=sys.stderr, flush=True)
    output = common.Output()
    output(common.machine("jax", "jaxlib"))
    output("evaluation of the embedded model on a CPU, a batch of 16 x 256 tokens, medians")
    output()
    output(common.table(("recipe", "implementation", "dense s", "compressed s", "ratio"), rows))
    output()
    holds = max(ratios) <= LIMIT
    output(common.requirement(f"at most {LIMIT:.2f} of dense ({max(ratios):.2f})", holds))
    if options.save:
        output.save("dispatch")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
