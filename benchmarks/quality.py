"""Quality of every method on the embedded model, and on the same model with planted outliers.

python -m benchmarks.quality [--samples 128] [--held-out 128] [--save]
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc
from benchmarks import common
from jaxcomp import data, evaluation, models, presets
from jaxcomp.formats.spec import Int
from jaxcomp.quantization import RTN, SmoothQuant
from jaxcomp.recipe import Recipe
from jaxcomp.step import Activation

FACTOR, CHANNELS = 30.0, 6
HEADS = ("*lm_head*",)
READERS = {
    "input_layernorm": ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
    "post_attention_layernorm": ("mlp/gate_proj", "mlp/up_proj"),
}


def plant_outliers(
    params: Mapping[str, Any], factor: float = FACTOR, channels: int = CHANNELS, seed: int = 0
) -> dict[str, Any]:
    """The same function with outlier channels in the activations, as large language models have.

    In each layer, some entries of the gain of the norms before the attention and before the MLP are
    multiplied by ``factor``, and the rows of the kernels (columns of the weights) that read these
    channels are divided by it.

    Args:
      params: weights of an unrolled Llama.
      factor: what the channels are multiplied by; a power of two changes no rounding.
      channels: how many channels of each norm.
      seed: of the choice of channels.

    Returns:
      New weights, float32.
    """
    rng = np.random.default_rng(seed)
    planted = jax.tree.map(lambda a: np.array(a, np.float32), dict(params))
    for layer in planted["layers"].values():
        for norm, readers in READERS.items():
            gain = layer[norm]["scale"]
            chosen = rng.choice(gain.shape[0], channels, replace=False)
            gain[chosen] *= factor
            for reader in readers:
                block, name = reader.split("/")
                layer[block][name]["kernel"][chosen, :] /= factor
    return planted


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to store the model, and what it costs.

    Attributes:
      name: for people.
      bits: bits a compressed weight, None for the dense model.
      perplexity: on the held-out text.
      kl: mean KL divergence from the dense model, in nats a token.
      seconds: to compress, compilation included.
    """

    name: str
    bits: float | None
    perplexity: float
    kl: float
    seconds: float | None


class Bench:
    """A model with its calibration batches and held-out batches; the dense model runs once."""

    def __init__(
        self,
        apply: Callable,
        params: Any,
        calibration: Sequence,
        held: Sequence,
        run: Callable | None = None,
    ):
        """Runs the dense model; ``run`` is its jitted ``apply``, if there is one already."""
        self.apply, self.params = apply, jax.tree.map(jnp.asarray, params)
        self.calibration, self.held = calibration, held
        self.run = jax.jit(apply) if run is None else run
        self.logits = [self.run(self.params, *batch) for batch in held]

    def dense(self) -> Row:
        """The dense model itself."""
        return Row("dense", None, self.measure(self.run, self.params).perplexity, 0.0, None)

    def measure(self, apply: Callable, params: Any) -> evaluation.Evaluation:
        """Perplexity and divergence of another model on the held-out batches."""
        found = [  # Batch by batch: the reference is the logits recorded for that batch.
            evaluation.evaluate(apply, params, [batch], reference=(_recorded, logits))
            for batch, logits in zip(self.held, self.logits, strict=True)
        ]
        tokens = sum(f.tokens for f in found)
        nats = sum(f.nats * f.tokens for f in found) / tokens
        kl = sum(f.kl * f.tokens for f in found) / tokens
        return evaluation.Evaluation(nats, float(np.exp(nats)), kl, None, tokens)

    def row(self, name: str, recipe: Recipe, *, dispatched: bool = True) -> Row:
        """Compresses by a recipe and measures the result.

        Args:
          name: for people.
          recipe: what to do.
          dispatched: run the compressed weights; else dense copies of them, which for recipes that
            leave activations alone is the same function and needs no compilation of its own.

        Returns:
          The row.
        """
        started = time.perf_counter()
        result = jc.compress(self.apply, self.params, recipe, self.calibration, progress=False)
        jax.block_until_ready(jax.tree.leaves(result.params))
        seconds = time.perf_counter() - started
        if dispatched:
            found = self.measure(jc.dispatch(self.apply), result.params)
        else:
            found = self.measure(self.run, jc.materialize(result.params))
        bits = result.report.bits_per_weight
        return Row(name, bits, found.perplexity, found.kl, seconds)


def _recorded(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """A model that was run before."""
    return logits


def load(samples: int, held_out: int | None) -> tuple[Any, Sequence, Sequence]:
    """The embedded model, its calibration batches and its held-out batches.

    Args:
      samples: windows of calibration text.
      held_out: windows of held-out text, None for all.

    Returns:
      Model, calibration batches, held-out batches.
    """
    model = models.load(common.TINYLM, dtype=jnp.float32)
    size = {"length": common.LENGTH, "batch_size": common.BATCH_SIZE}
    calibration = data.batches(
        common.TINYLM / "calibration.txt", model.tokenizer, samples=samples, **size
    )
    held = data.batches(common.TINYLM / "heldout.txt", model.tokenizer, samples=held_out, **size)
    if held_out is None and len(held) > 1 and len(held[-1][0]) < common.BATCH_SIZE:
        held = held[:-1]  # A shorter batch would be compiled for anew.
    return model, calibration, held


def w8a8(granularity: str, smooth: bool) -> Recipe:
    """8-bit weights, a scale a row; 8-bit activations, a dynamic scale a token or a tensor."""
    activation = Activation(granularity=granularity)
    rules = {"exclude": HEADS}
    rounded = RTN(format=Int(bits=8, full_range=False), activation=activation, **rules)
    return Recipe(steps=(SmoothQuant(**rules), rounded) if smooth else (rounded,))


def weight_recipes() -> dict[str, Recipe]:
    """The recipes of the first table."""
    recipes = {"RTN W4": presets.w4a16_rtn(), "RTN W4 asym": presets.w4a16_rtn(symmetric=False)}
    recipes |= {"RTN W3 asym": presets.w3a16_rtn(), "RTN W2 asym": presets.w2a16_rtn()}
    gptq = {"W4": presets.w4a16_gptq, "W3 asym": presets.w3a16_gptq, "W2 asym": presets.w2a16_gptq}
    recipes |= {f"GPTQ {name}": make() for name, make in gptq.items()}
    recipes |= {f"GPTQ {name}, act. order": make(order="activation") for name, make in gptq.items()}
    recipes |= {"AWQ W4 asym": presets.w4a16_awq(), "AWQ W3 asym": presets.w3a16_awq()}
    recipes |= {"W8A8": w8a8("token", False), "SmoothQuant W8A8": w8a8("token", True)}
    recipes |= pruning_recipes()
    recipes["SparseGPT 2:4 + INT4"] = presets.sparsegpt_int4()
    return recipes


def pruning_recipes() -> dict[str, Recipe]:
    """Magnitude, Wanda and SparseGPT at 50% and 2:4."""
    makes = {"magnitude": presets.magnitude, "Wanda": presets.wanda, "SparseGPT": presets.sparsegpt}
    half = {f"{name} 50%": make(sparsity=0.5) for name, make in makes.items()}
    return half | {f"{name} 2:4": make(n=2, m=4) for name, make in makes.items()}


def outlier_recipes() -> dict[str, Recipe]:
    """The recipes of the second table."""
    recipes = {
        "W8A8": w8a8("token", False),
        "SmoothQuant W8A8": w8a8("token", True),
        "W8A8, per tensor": w8a8("tensor", False),
        "SmoothQuant W8A8, per tensor": w8a8("tensor", True),
        "RTN W4": presets.w4a16_rtn(),
        "GPTQ W4": presets.w4a16_gptq(),
        "RTN W4 asym": presets.w4a16_rtn(symmetric=False),
        "AWQ W4 asym": presets.w4a16_awq(),
    }
    kept = ("magnitude 50%", "Wanda 50%", "magnitude 2:4", "Wanda 2:4")
    pruning = pruning_recipes()
    return recipes | {name: pruning[name] for name in kept}


def requirements(rows: Mapping[str, Row]) -> list[tuple[str, bool]]:
    """The orderings that must hold on the embedded model.

    Args:
      rows: of the first table, by name.

    Returns:
      Text and whether it holds.
    """
    p = {name: row.perplexity for name, row in rows.items()}
    found = []
    for bits in ("W4", "W3 asym", "W2 asym"):
        chain = (p["dense"], p[f"GPTQ {bits}"], p[f"RTN {bits}"])
        found.append((f"dense < GPTQ < RTN at {bits}", chain[0] < chain[1] < chain[2]))
    for pattern in ("50%", "2:4"):
        ours = p[f"SparseGPT {pattern}"]
        found.append((f"SparseGPT < Wanda at {pattern}", ours < p[f"Wanda {pattern}"]))
        found.append((f"SparseGPT < magnitude at {pattern}", ours < p[f"magnitude {pattern}"]))
    return found


def outlier_requirements(rows: Mapping[str, Row]) -> list[tuple[str, bool]]:
    """The orderings that must hold with planted outliers.

    Args:
      rows: of the second table, by name.

    Returns:
      Text and whether it holds.
    """
    p = {name: row.perplexity for name, row in rows.items()}
    dense = p["dense"]
    smooth, plain = (abs(p[k] / dense - 1) for k in ("SmoothQuant W8A8", "W8A8"))
    return [
        (f"SmoothQuant W8A8 within 0.2% of dense ({smooth:.3%})", smooth <= 0.002),
        (f"plain W8A8 not within 0.2% of dense ({plain:.3%})", plain > 0.002),
        ("AWQ < RTN at W4 asym", p["AWQ W4 asym"] < p["RTN W4 asym"]),
        ("GPTQ < RTN at W4", p["GPTQ W4"] < p["RTN W4"]),
        ("Wanda < magnitude at 50%", p["Wanda 50%"] < p["magnitude 50%"]),
        ("Wanda < magnitude at 2:4", p["Wanda 2:4"] < p["magnitude 2:4"]),
    ]


def text(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    dense = rows[0].perplexity
    cells = [
        (
            row.name,
            None if row.bits is None else f"{row.bits:.2f}",
            f"{row.perplexity:.3f}",
            f"{row.perplexity / dense - 1:+.2%}",
            f"{row.kl:.4f}",
            None if row.seconds is None else f"{row.seconds:.1f}",
        )
        for row in rows
    ]
    columns = ("recipe (groups of 128)", "bits/weight", "perplexity", "to dense", "KL", "seconds")
    return common.table(columns, cells)


def measured(bench: Bench, recipes: Mapping[str, Recipe], only: Sequence[str]) -> list[Row]:
    """A row for the dense model and for each recipe, with progress on standard error."""
    rows = [bench.dense()]
    for name, recipe in recipes.items():
        if only and name not in only:
            continue
        rows.append(bench.row(name, recipe))
        print(f"{name}: {rows[-1].perplexity:.3f}", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    """Prints both tables and the requirements; the exit code is 1 if one is not met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=common.SAMPLES, help="calibration windows")
    parser.add_argument("--held-out", type=int, default=common.HELD_OUT, help="windows, 0 for all")
    parser.add_argument("--factor", type=float, default=FACTOR, help="of the planted outliers")
    parser.add_argument("--channels", type=int, default=CHANNELS, help="planted in each norm")
    parser.add_argument("--only", nargs="*", default=(), help="recipes by their name in the table")
    parser.add_argument("--save", action="store_true", help="write results/quality.txt")
    options = parser.parse_args()
    model, calibration, held = load(options.samples, options.held_out or None)
    output = common.Output()
    windows = sum(len(batch[0]) for batch in held)
    output(common.machine("jax", "jaxlib"))
    output(
        f"embedded model, {options.samples} calibration windows and {windows} held-out windows of "
        f"{common.LENGTH} tokens"
    )
    output()
    bench = Bench(model.apply, model.params, calibration, held)
    rows = measured(bench, weight_recipes(), options.only)
    output(text(rows))
    met = [] if options.only else requirements({row.name: row for row in rows})
    planted = plant_outliers(model.params, options.factor, options.channels)
    other = Bench(model.apply, planted, calibration, held, bench.run)
    difference = other.measure(bench.run, bench.params)
    output()
    output(
        f"with planted outliers ({options.channels} channels of each norm x{options.factor:g}; the "
        f"function is unchanged: KL to the model above {difference.kl:.1e})"
    )
    output()
    rows = measured(other, outlier_recipes(), options.only)
    output(text(rows))
    met += [] if options.only else outlier_requirements({row.name: row for row in rows})
    output()
    for claim, holds in met:
        output(common.requirement(claim, holds))
    if options.save:
        output.save("quality")
    return 0 if all(holds for _, holds in met) else 1


if __name__ == "__main__":
    sys.exit(main())
