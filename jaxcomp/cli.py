"""The command line: ``jaxcomp compress | evaluate | inspect | export | plan | demo``.

MODEL is a folder in Hugging Face layout, or one that ``compress`` wrote. Wrong input ends with exit
code 2 and one message that says what, where and what to do; ``--debug`` adds the traceback.
``--json`` prints one line of JSON on standard output; all else goes to standard error.
"""

import collections.abc
import json as jsonlib
import os
import pathlib
import shutil
import sys
import time
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from jaxcomp import presets
from jaxcomp.errors import DataError, JaxcompError, ModelError, RecipeError
from jaxcomp.io import checkpoint
from jaxcomp.io.output import clear
from jaxcomp.progress import Progress
from jaxcomp.recipe import Recipe

Model = Annotated[
    pathlib.Path,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="MODEL", help="folder in Hugging Face layout, or one that compress wrote"
    ),
]
Text = Annotated[pathlib.Path, tyro.conf.arg(metavar="TEXT")]
Folder = Annotated[pathlib.Path, tyro.conf.arg(metavar="FOLDER")]
JSON = Annotated[bool, tyro.conf.arg(help="print one line of JSON")]
Debug = Annotated[bool, tyro.conf.arg(help="show tracebacks of errors")]


class Loaded(NamedTuple):
    """A model, dense or compressed, ready to run.

    Attributes:
      folder: where it is.
      config: sizes and variants of its architecture.
      apply: ``apply(params, tokens) -> logits`` of the dense model.
      params: dense or compressed parameters.
      tokenizer: a ``tokenizers.Tokenizer``, or None.
      saved: what the checkpoint holds, None for a dense model.
    """

    folder: pathlib.Path
    config: Any
    apply: collections.abc.Callable[..., Any]
    params: Any
    tokenizer: Any
    saved: checkpoint.Saved | None


def load_model(folder: pathlib.Path, lazy: bool = False) -> Loaded:
    """Loads a folder in Hugging Face layout (``lazy`` as of ``models.load``) or a checkpoint."""
    from jaxcomp import data, functional, models

    if not folder.is_dir():
        raise ModelError(f"model {folder}: there is no such folder; give a local folder.")
    if not checkpoint.is_checkpoint(folder):
        model = models.load(folder, lazy=lazy)
        return Loaded(folder, model.config, model.apply, model.params, model.tokenizer, None)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model {folder}: holds compressed parameters but no config.json, so its architecture "
            "is not known; load it in Python with jc.load, or copy the model's config.json there."
        )
    saved = checkpoint.load(folder)
    config, _ = models.read_config(folder)
    apply, _ = functional(models.build(config))
    tokenizer = data.load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    return Loaded(folder, config, apply, saved.params, tokenizer, saved)


def read_recipe(name: str) -> Recipe:
    """Reads a recipe from a YAML file, or takes the preset of that name."""
    if os.sep in name or name.endswith((".yaml", ".yml")) or os.path.exists(name):
        return Recipe.load(name)
    try:
        return presets.get(name)
    except RecipeError as error:
        raise RecipeError(f"recipe {name!r}: is no file, and {error}") from None


def compress(
    model: Model,
    /,
    recipe: str,
    output: Folder,
    calibration: Text | None = None,
    samples: int = 128,
    length: int = 256,
    batch_size: int = 16,
    journal: Folder | None = None,
    overwrite: bool = False,
    json: JSON = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Compress a model.

    A killed run continues when the same command is given again, and writes the same bytes.

    Args:
      model: the model.
      recipe: a YAML file, or the name of a preset, such as w4a16_gptq.
      output: folder to write; it appears when all is done.
      calibration: text file; only recipes that need no data do without.
      samples: sequences of calibration text.
      length: tokens a sequence.
      batch_size: sequences run at once.
      journal: folder of finished weights, from which a killed run goes on. By default
        OUTPUT.unfinished, deleted at the end.
      overwrite: replace an earlier compressed model at OUTPUT.
      json: print one line of JSON.
      debug: show tracebacks of errors.
    """
    import jaxcomp as jc

    steps = read_recipe(recipe)
    output = pathlib.Path(os.path.abspath(output))
    if min(samples, length, batch_size) < 1:
        raise DataError("--samples, --length and --batch-size must be at least 1.")
    if output.resolve() == model.resolve():
        raise JaxcompError(f"output {output}: is the model itself; name another folder.")
    if checkpoint.is_checkpoint(model):
        raise ModelError(
            f"model {model}: is already compressed; compress the dense model, or make it dense "
            "with `jaxcomp export`."
        )
    finished = checkpoint.is_checkpoint(output) and not overwrite
    if not finished:
        checkpoint.check_output(output, overwrite)
    loaded = load_model(model, lazy=True)
    batches = _calibration(loaded, steps, calibration, samples, length, batch_size)
    identity = _identity(model, loaded, steps, batches)
    if finished:
        if checkpoint.read_metadata(output)["metadata"] != identity:
            raise JaxcompError(
                f"output {output}: already holds a model compressed with another recipe, model or "
                "data; name another folder, delete it, or add --overwrite."
            )
        saved = checkpoint.load(output)
        clear(output)  # Killed before it was deleted.
        _say(f"{output} is already complete.")
        return _finish(json, saved.report, output, None)
    started = time.perf_counter()
    result = jc.compress(
        loaded.apply,
        loaded.params,
        steps,
        batches,
        journal=journal,
        progress=sys.stderr.isatty() and not json,
        save_to=jc.Output(output, companions(model), identity, overwrite),
    )
    return _finish(json, result.report, output, time.perf_counter() - started)


def _finish(json: bool, report: Any, output: pathlib.Path, seconds: float | None) -> dict[str, Any]:
    if not json:
        show(report.table())
        show(f"written to {output}")
    return {"output": str(output), **report.totals(), "seconds": seconds}


def evaluate(
    model: Model,
    /,
    text: Text,
    reference: Folder | None = None,
    length: int = 256,
    batch_size: int = 16,
    samples: int | None = None,
    json: JSON = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Measure perplexity on a text, and the divergence from a reference model.

    Args:
      model: the model.
      text: text file.
      reference: another model with the same tokens, to which the KL divergence is measured.
      length: tokens a sequence.
      batch_size: sequences run at once.
      samples: use the first sequences only.
      json: print one line of JSON.
      debug: show tracebacks of errors.
    """
    from jaxcomp import dispatch, evaluation, models

    loaded = load_model(model)
    if isinstance(loaded.config, models.BertConfig):
        raise ModelError(
            f"model {model}: predicts no next token, so it has no perplexity; evaluate takes "
            "causal language models."
        )
    batches = token_batches(loaded, text, length, batch_size, samples)
    other = None
    if reference is not None:
        dense = load_model(reference)
        other = (dispatch(dense.apply), dense.params)
    started = time.perf_counter()
    bar = Progress("evaluate", len(batches), sys.stderr.isatty() and not json)
    try:
        found = evaluation.evaluate(
            dispatch(loaded.apply),
            loaded.params,
            batches,
            reference=other,
            progress=lambda done: bar.advance(f"batch {done} of {len(batches)}"),
        )
    finally:
        bar.close()
    values = {
        "model": str(model),
        "text": str(text),
        "reference": None if reference is None else str(reference),
        **found._asdict(),
        "seconds": time.perf_counter() - started,
    }
    if not json:
        compared = "" if other is None else f", KL to {reference} {found.kl:.5f}"
        show(
            f"perplexity {found.perplexity:.4f}{compared} "
            f"({found.tokens} tokens, {values['seconds']:.1f} s)"
        )
    return values


def inspect(
    output: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    /,
    verify: Annotated[bool, tyro.conf.arg(help="compare every file with its checksum")] = False,
    json: JSON = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Show what a compressed model holds; its arrays are not loaded.

    Args:
      output: folder that compress wrote.
      verify: compare every file with its checksum.
      json: print one line of JSON.
      debug: show tracebacks of errors.
    """
    plain = checkpoint.read_metadata(output)
    saved = checkpoint.load(output, include=())
    report = saved.report
    if report is None:
        raise JaxcompError(f"checkpoint {output}: was saved without a report.")
    values = {
        "output": str(output),
        "format_version": plain["format_version"],
        "metadata": saved.metadata,
        **jsonlib.loads(report.to_json()),
    }
    if verify:
        progress = Progress("verify", len(plain["arrays"]), sys.stderr.isatty() and not json)
        try:
            found = checkpoint.verify(output, progress.advance)
        finally:
            progress.close()
        values["verified"] = {"arrays": len(found), "bytes": sum(found.values())}
    if not json:
        show(f"format version: {plain['format_version']}")
        if saved.recipe is not None:
            show(f"recipe:\n{saved.recipe.dumps()}")
        show(report.table())
        if verify:
            show(f"verified: {len(found)} arrays, {sum(found.values())} bytes as written.")
    return values


def export(
    model: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    /,
    output: Folder,
    format: Literal["dense"] = "dense",
    json: JSON = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Write a compressed model for other programs.

    Args:
      model: folder that compress wrote.
      output: folder to write, in Hugging Face layout.
      format: "dense", plain safetensors with the values that the compressed weights stand for.
        Activations are not quantized there.
      json: print one line of JSON.
      debug: show tracebacks of errors.
    """
    import jaxcomp as jc

    output = pathlib.Path(os.path.abspath(output))
    checkpoint.check_output(output)
    loaded = load_model(model)
    dense = jc.materialize(loaded.params)
    temporary = output.with_name(f".{output.name}.saving")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        jc.models.save(temporary, dense, loaded.config, model)
        if output.exists():  # Checked above: it is empty.
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    nbytes = sum(file.stat().st_size for file in output.iterdir())
    if not json:
        show(f"written to {output}")
    return {"output": str(output), "format": format, "bytes": nbytes}


def plan(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    /,
    topology: str,
    recipe: str | None = None,
    batch: int = 16,
    context: int = 4096,
    chunk: int = 512,
    new_tokens: int | None = None,
    cache_dtype: str = "bfloat16",
    tries: int = 2,
    json: JSON = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Compile a compressed model's decode and prefill steps for TPUs or GPUs, without any.

    Says for each device how many bytes weights, cache and temporaries take, whether they fit, and
    the least time of a step, beside the same model in bfloat16. Needs no weights; needs libtpu, or
    for GPUs JAX's CUDA plugin.

    Args:
      model: llama-3-8b, llama-3-70b, llama-3.1-405b, qwen3-8b, qwen3-32b, mixtral-8x7b,
        qwen3-30b-a3b, a config.json, or a folder that has one.
      topology: such as v5e:4x4, v5p:2x2x2, v6e:2x4, 7x:2x2x1 or h100:8.
      recipe: a YAML file, or the name of a preset; without it only bfloat16 is planned.
      batch: sequences decoded at once.
      context: positions of the key-value cache of each.
      chunk: prompt tokens that a prefill step reads.
      new_tokens: how many tokens a request makes, by default an eighth of the context; the rest is
        its prompt. Splits are ranked for such requests.
      cache_dtype: of the cache: bfloat16, float32, int8, float8_e4m3fn or float8_e5m2.
      tries: splits of the devices to compile, those with the best estimates.
      json: print one line of JSON.
      debug: show tracebacks of errors.
    """
    from jaxcomp import planner

    steps = None if recipe is None else read_recipe(recipe)
    found = planner.plan(
        model,
        steps,
        topology,
        batch=batch,
        context=context,
        chunk=chunk,
        new_tokens=new_tokens,
        cache_dtype=cache_dtype,
        tries=tries,
        recipe_name="" if recipe is None else pathlib.Path(recipe).stem,
        say=_say,
    )
    if not json:
        show(found.table())
        show(found.notes())
    return found.to_dict()


def demo(
    output: pathlib.Path = pathlib.Path("demo-output"),
    json: JSON = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Compress the small language model that ships with jaxcomp several ways, and compare.

    Writes a table, a plot of perplexity against size, and the compressed models. Needs no network.

    Args:
      output: folder to write.
      json: print one line of JSON.
      debug: show tracebacks of errors.
    """
    from jaxcomp import demo as module

    return module.run(pathlib.Path(os.path.abspath(output)), show=not json)


def companions(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Configuration, tokenizer and licence of a model's folder, by name."""
    from jaxcomp.models.loading import COMPANIONS

    names = ("config.json", *COMPANIONS)
    return {name: folder / name for name in names if (folder / name).is_file()}


def _calibration(
    loaded: Loaded,
    recipe: Recipe,
    text: pathlib.Path | None,
    samples: int,
    length: int,
    batch_size: int,
) -> tuple[tuple[np.ndarray], ...]:
    if text is not None:
        batches = token_batches(loaded, text, length, batch_size, samples)
        # Batches of one shape: the largest size up to the wanted one that leaves no rest.
        tokens = np.concatenate([tokens for (tokens,) in batches])
        rows = len(tokens)
        even = max(d for d in range(1, min(batch_size, rows) + 1) if rows % d == 0)
        return tuple((part,) for part in np.split(tokens, rows // even))
    hungry = [step.__struct_config__.tag for step in recipe.steps if step.needs()]
    if hungry:
        raise DataError(
            f"the recipe needs calibration data (for {', '.join(hungry)}); give --calibration TEXT."
        )
    return ((np.zeros((1, min(length, 8)), np.int32),),)


def token_batches(
    loaded: Loaded, text: pathlib.Path, length: int, batch_size: int, samples: int | None
) -> tuple[tuple[np.ndarray], ...]:
    """Token batches of a text file, as the tuples of inputs that follow ``params``."""
    from jaxcomp import data

    return data.batches(
        text,
        loaded.tokenizer,
        length=length,
        batch_size=batch_size,
        samples=samples,
        vocab_size=loaded.config.vocab_size,
    )


def _identity(model: pathlib.Path, loaded: Loaded, recipe: Recipe, batches: Any) -> dict[str, str]:
    """What a compressed model was made from; the same that its journal goes by."""
    from jaxcomp.fingerprint import fingerprints
    from jaxcomp.graph.trace import leaf_paths, trace

    batches = list(batches)
    graph = trace(loaded.apply, loaded.params, *batches[0])
    found = fingerprints(recipe, graph, leaf_paths(loaded.params)[0], batches)
    return {"name": model.resolve().name, **{k: found[k] for k in ("model", "recipe", "data")}}


def show(what: Any) -> None:
    """Prints text or a table on standard output, as wide as the terminal (100 without one)."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 100, soft_wrap=isinstance(what, str)).print(
        what, markup=False, highlight=False
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr)


_DESCRIPTION = """Compress models: quantization and pruning for JAX.

MODEL is a folder in Hugging Face layout, or one that compress wrote."""

_COMMANDS = {
    "compress": compress,
    "evaluate": evaluate,
    "inspect": inspect,
    "export": export,
    "plan": plan,
    "demo": demo,
}


def main(arguments: collections.abc.Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0, or 2 after an error that the user can mend.

    Args:
      arguments: those after the program's name; by default those of this process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug, json = "--debug" in arguments, "--json" in arguments
    try:
        values = tyro.extras.subcommand_cli_from_dict(
            _COMMANDS,
            args=arguments,
            prog="jaxcomp",
            description=_DESCRIPTION,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except (JaxcompError, OSError) as error:
        if debug:
            raise
        message = str(error)
        if json:
            print(jsonlib.dumps({"error": message}))
        print(f"jaxcomp: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if debug:
            raise
        print("jaxcomp: interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)
    if json:
        print(jsonlib.dumps(values))


if __name__ == "__main__":
    main()
