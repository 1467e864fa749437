"""The demo: the language model that ships with jaxcomp, compressed several ways and compared."""

import collections.abc
import functools
import importlib.resources
import json
import math
import pathlib
import sys
import time
from typing import Any

import jax
import msgspec

from jaxcomp import presets
from jaxcomp.errors import JaxcompError
from jaxcomp.io import checkpoint
from jaxcomp.progress import Progress
from jaxcomp.recipe import Recipe
from jaxcomp.report import megabytes

SAMPLES, LENGTH, BATCH_SIZE = 128, 256, 16
HELD_OUT = 64
RESULTS = "results.json"

RECIPES: dict[str, str] = {
    "RTN W4 g128": "w4a16_rtn",
    "RTN W3 g128": "w3a16_rtn",
    "RTN W2 g128": "w2a16_rtn",
    "GPTQ W4 g128": "w4a16_gptq",
    "GPTQ W3 g128": "w3a16_gptq",
    "GPTQ W2 g128": "w2a16_gptq",
    "AWQ W4 g128": "w4a16_awq",
    "AWQ W3 g128": "w3a16_awq",
    "SmoothQuant W8A8": "w8a8_smoothquant",
    "Wanda 50%": "wanda_50",
    "Wanda 2:4": "wanda_2_4",
    "SparseGPT 50%": "sparsegpt_50",
    "SparseGPT 2:4": "sparsegpt_2_4",
    "SparseGPT 2:4 + INT4": "sparsegpt_2_4_int4",
}


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One way to store the model, and what it costs.

    Attributes:
      recipe: name for people.
      preset: name of the preset, None for the dense model.
      bits_per_weight: over the weights that the recipe compresses.
      nbytes: of the whole model, embeddings and norms counted.
      perplexity: on the held-out text.
      kl: mean KL divergence of the next-token distribution from the dense model's, in nats.
      seconds: to compress, compilation included.
    """

    recipe: str
    preset: str | None
    bits_per_weight: float
    nbytes: int
    perplexity: float
    kl: float
    seconds: float | None


def tinylm() -> pathlib.Path:
    """Folder of the language model that ships with jaxcomp, in Hugging Face layout.

    It also holds ``calibration.txt`` and ``heldout.txt``.
    """
    return pathlib.Path(str(importlib.resources.files("jaxcomp") / "assets" / "tinylm"))


def run(
    output: pathlib.Path,
    *,
    show: bool = True,
    recipes: collections.abc.Mapping[str, str | Recipe] | None = None,
    samples: int = SAMPLES,
    held_out: int = HELD_OUT,
) -> dict[str, Any]:
    """Compresses the model by each recipe, measures the results and writes them to a folder.

    Args:
      output: folder to write: ``results.json``, ``table.md``, ``perplexity.png``, and a folder with
        the compressed model for each recipe.
      show: show progress on standard error and the table on standard output.
      recipes: presets or recipes by name for people; by default ``RECIPES``.
      samples: sequences of calibration text.
      held_out: sequences of held-out text.

    Returns:
      What ``results.json`` holds.

    Raises:
      JaxcompError: the folder holds something else.
    """
    from jaxcomp import cli

    recipes = dict(RECIPES if recipes is None else recipes)
    _claim(output)
    folder = tinylm()
    loaded = cli.load_model(folder)
    calibration = cli.token_batches(loaded, folder / "calibration.txt", LENGTH, BATCH_SIZE, samples)
    text = cli.token_batches(loaded, folder / "heldout.txt", LENGTH, BATCH_SIZE, held_out)
    started = time.perf_counter()
    bar = Progress("dense", len(recipes) + 1, show and sys.stderr.isatty())
    try:
        logits = [_logits(loaded.apply, loaded.params, *batch) for batch in text]
        rows = [_dense_row(loaded, text)]
        for name, preset in recipes.items():
            bar.advance(name)
            result, seconds = _compressed(preset, loaded, calibration)
            label = preset if isinstance(preset, str) else name
            checkpoint.save(output / label, result, files=cli.companions(folder), overwrite=True)
            rows.append(_row(name, preset, result, seconds, loaded, text, logits))
    finally:
        bar.close()
    results = {
        "model": folder.name,
        "tokens": sum(batch[0].size for batch in text),
        "rows": [msgspec.to_builtins(row) for row in rows],
        "seconds": time.perf_counter() - started,
    }
    (output / RESULTS).write_text(json.dumps(results, indent=1))
    (output / "table.md").write_text(markdown(rows))
    plot(rows, output / "perplexity.png")
    if show:
        cli.show(table(rows))
        cli.show(
            f"{results['seconds']:.0f} s in all; the table, a plot (perplexity.png) and the "
            f"compressed models are in {output}"
        )
    return {"output": str(output), **results}


def _dense_row(loaded: Any, text: Any) -> Row:
    from jaxcomp import evaluation, nbits

    matrices = [leaf for leaf in jax.tree.leaves(loaded.params) if leaf.ndim > 1]
    return Row(
        recipe="dense",
        preset=None,
        bits_per_weight=nbits(matrices) / sum(leaf.size for leaf in matrices),
        nbytes=-(-nbits(loaded.params) // 8),
        perplexity=evaluation.evaluate(loaded.apply, loaded.params, text).perplexity,
        kl=0.0,
        seconds=None,
    )


def _compressed(preset: str | Recipe, loaded: Any, calibration: Any) -> tuple[Any, float]:
    import jaxcomp as jc

    recipe = presets.get(preset) if isinstance(preset, str) else preset
    started = time.perf_counter()
    result = jc.compress(loaded.apply, loaded.params, recipe, calibration, progress=False)
    return result, time.perf_counter() - started


def _row(
    name: str,
    preset: str | Recipe,
    result: Any,
    seconds: float,
    loaded: Any,
    text: Any,
    logits: list[jax.Array],
) -> Row:
    import jaxcomp as jc
    from jaxcomp import evaluation

    fast = jc.dispatch(loaded.apply)
    found = [  # Batch by batch, so that the dense model runs once for all recipes.
        evaluation.evaluate(fast, result.params, [batch], reference=(_recorded, recorded))
        for batch, recorded in zip(text, logits, strict=True)
    ]
    return Row(
        recipe=name,
        preset=preset if isinstance(preset, str) else None,
        bits_per_weight=result.report.bits_per_weight,
        nbytes=-(-jc.nbits(result.params) // 8),
        perplexity=math.exp(_mean(found, "nats")),
        kl=_mean(found, "kl"),
        seconds=seconds,
    )


def _mean(found: list[Any], field: str) -> float:
    return sum(getattr(f, field) * f.tokens for f in found) / sum(f.tokens for f in found)


def _recorded(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """A model that was run before."""
    return logits


@functools.partial(jax.jit, static_argnums=0)
def _logits(apply: Any, params: Any, tokens: Any) -> jax.Array:
    return apply(params, tokens)


_COLUMNS = ("recipe", "bits/weight", "size", "perplexity", "KL to dense", "seconds")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.recipe,
        f"{row.bits_per_weight:.2f}",
        megabytes(row.nbytes),
        f"{row.perplexity:.2f}",
        f"{row.kl:.4f}",
        "" if row.seconds is None else f"{row.seconds:.1f}",
    )


def table(rows: collections.abc.Sequence[Row]) -> Any:
    """The rows as a ``rich.table.Table``."""
    from rich.table import Table

    made = Table()
    for i, name in enumerate(_COLUMNS):
        made.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        made.add_row(*_cells(row))
    return made


def markdown(rows: collections.abc.Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [_COLUMNS, ("---", *["---:"] * (len(_COLUMNS) - 1)), *map(_cells, rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def plot(rows: collections.abc.Sequence[Row], path: pathlib.Path) -> None:
    """Draws perplexity against size, a colour for each algorithm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.recipe.split()[0], []).append(row)
    for family, members in families.items():
        labels = [r.recipe.removeprefix(family).removesuffix(" g128").strip() for r in members]
        sizes = [row.nbytes / 1e6 for row in members]
        ladder = all(label.startswith("W") for label in labels)  # Of bits: worth a line.
        style = "o-" if ladder else "o"
        axes.plot(sizes, [row.perplexity for row in members], style, label=family, alpha=0.8)
        for size, row, label in zip(sizes, members, labels, strict=True):
            left = family in ("RTN", "Wanda")  # So that labels do not meet.
            axes.annotate(
                label,
                (size, row.perplexity),
                xytext=(-6, -3) if left else (6, -3),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=8,
            )
    if rows[0].preset is None:
        axes.axhline(rows[0].perplexity, color="gray", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.1f}")
    axes.yaxis.set_minor_formatter("{x:.1f}")
    axes.set_xlabel("size of the whole model [MB]")
    axes.set_ylabel("perplexity on held-out text (lower is better)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _claim(output: pathlib.Path) -> None:
    """Makes the folder, or takes that of an earlier demo; refuses any other."""
    marker = output / RESULTS
    if output.exists() and not output.is_dir():
        raise JaxcompError(f"output {output}: is a file; name a new or empty folder.")
    if output.is_dir() and not marker.exists() and (held := sorted(output.iterdir())):
        raise JaxcompError(
            f"output {output}: is a folder that holds something else ({held[0].name}); name a new "
            "or empty folder."
        )
    output.mkdir(parents=True, exist_ok=True)
    marker.write_text("{}")
