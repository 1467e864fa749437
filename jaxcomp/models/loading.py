"""Model folders in Hugging Face layout: loading into Flax models, and back."""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxcomp.errors import JaxcompError, ModelError
from jaxcomp.functional import functional, path_names
from jaxcomp.io import safetensors
from jaxcomp.io.stacked import Stacked
from jaxcomp.models import bert, gpt2, llama, mixtral
from jaxcomp.models.attention import DEFAULT, Attending
from jaxcomp.models.config import Fields, read_json
from jaxcomp.models.sizes import config_fields

FAMILIES = {
    llama.LlamaConfig: (llama, llama.Llama),
    mixtral.MixtralConfig: (mixtral, mixtral.Mixtral),
    gpt2.GPT2Config: (gpt2, gpt2.GPT2),
    bert.BertConfig: (bert, bert.Bert),
}
ARCHITECTURES = {
    architecture: (family, kind)
    for family, _ in FAMILIES.values()
    for kind, architecture in family.MODEL_TYPES.items()
}
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "LICENSE.txt",
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
      name: the configuration's ``model_type``.
      config: sizes and variants.
      apply: ``apply(params, tokens, ..)``.
      params: nested dict of weights, read-only views of memory maps where nothing had to be copied.
      tokenizer: a ``tokenizers.Tokenizer``, or None when the folder has none.
      folder: where it came from.
    """

    name: str
    config: Any
    apply: Callable[..., Any]
    params: dict[str, Any]
    tokenizer: Any = None
    folder: pathlib.Path | None = None


def load(
    folder: str | os.PathLike,
    scan: bool = False,
    dtype: Any = None,
    lazy: bool = False,
    attention: Attending = DEFAULT,
) -> Model:
    """Loads a model from a local folder with ``config.json`` and safetensors weights.

    The weights keep the dtype in which they are stored and are views of memory maps: nothing is
    read before it is used. What is stacked is copied into host memory: the experts of a layer, and
    with ``scan`` the layers; unless it is ``lazy``.

    Args:
      folder: the model folder.
      scan: stack the layers on a leading axis and run them under ``lax.scan``.
      dtype: dtype of the activations, to which weights are cast where they are used; by default
        float32.
      lazy: stacks are ``jaxcomp.io.stacked.Stacked``: of the right shape, and read when a layer is
        needed. ``jc.compress`` and NumPy take them; JAX does not, ``models.densified`` makes
        arrays of them.
      attention: how attention is computed, and split on a mesh of Auto axes.

    Returns:
      The model.

    Raises:
      ModelError: the folder is incomplete or damaged, the architecture or a feature of its
        configuration is not supported, or tensors are missing, left over or of the wrong shape.
    """
    folder = pathlib.Path(folder)
    model = load_architecture(folder, scan, dtype, attention)
    config = model.config
    tensors = safetensors.read_folder(folder)
    values = from_hf(tensors, config, str(folder), lazy)
    family, _ = FAMILIES[type(config)]
    if scan:
        values = _stack(values, family.LAYERS, Stacked if lazy else _copied)
    flat = path_names(model.params)
    for path, want in flat.items():
        if values[path].shape != want.shape:
            raise ModelError(
                f"{folder}: {path} has shape {values[path].shape}, config.json asks for "
                f"{want.shape}; the weights and the configuration do not belong together"
            )
    return dataclasses.replace(model, params=_nest(values))


def load_architecture(
    folder: str | os.PathLike,
    scan: bool = False,
    dtype: Any = None,
    attention: Attending = DEFAULT,
) -> Model:
    """The model of a folder without its weights: only ``config.json`` and the tokenizer are read.

    Args:
      folder: the model folder.
      scan: as of ``load``.
      dtype: as of ``load``.
      attention: as of ``load``.

    Returns:
      The model; ``params`` holds ``jax.ShapeDtypeStruct`` (float32).

    Raises:
      ModelError: the configuration is missing, wrong, or not supported.
    """
    folder = pathlib.Path(folder)
    config, name = read_config(folder)
    dtype = jnp.float32 if dtype is None else dtype
    module = build(config, scan=scan, dtype=dtype, attention=attention)
    apply, params = functional(module)
    return Model(name, config, apply, params, _tokenizer(folder), folder)


def build(
    config: Any,
    *,
    scan: bool = False,
    dtype: Any = jnp.float32,
    attention: Attending = DEFAULT,
) -> nnx.Module:
    """The model of a configuration with abstract weights (shapes and dtypes only).

    Args:
      config: a ``LlamaConfig``, ``MixtralConfig``, ``GPT2Config`` or ``BertConfig``.
      scan: stack the layers on a leading axis.
      dtype: dtype of the activations.
      attention: how attention is computed, and split on a mesh of Auto axes.

    Returns:
      A module whose parameters hold ``jax.ShapeDtypeStruct``; give it to ``jc.functional``.
    """
    _, make = FAMILIES[type(config)]
    options = {"dtype": dtype, "scan": scan, "attention": attention}
    return nnx.eval_shape(lambda: make(config, **options, rngs=nnx.Rngs(0)))


def read_config(folder: str | os.PathLike) -> tuple[Any, str]:
    """Reads a folder's ``config.json``.

    Args:
      folder: the model folder.

    Returns:
      The configuration, and its ``model_type``.

    Raises:
      ModelError: it is missing or wrong, or asks for something that is not supported.
    """
    path = pathlib.Path(folder) / "config.json"
    return parse_config(read_json(path), path)


def parse_config(values: Mapping[str, Any], path: Any) -> tuple[Any, str]:
    """The configuration that the fields of a ``config.json`` describe.

    Args:
      values: the fields.
      path: name of the file, for errors.

    Returns:
      The configuration, and its ``model_type``.

    Raises:
      ModelError: a field is wrong, or asks for something that is not supported.
    """
    known = ", ".join(sorted(ARCHITECTURES))
    named = values.get("architectures") or []
    name = values.get("model_type")
    if not named:
        named = [arch for arch, (_, kind) in ARCHITECTURES.items() if kind == name]
    architecture = named[0] if isinstance(named, list) and named else name
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{path}: the architecture {architecture!r} is not supported; supported are {known}"
        )
    if values.get("quantization_config") is not None:
        raise ModelError(
            f"{path}: the weights are quantized already (quantization_config); load the model in "
            "full precision"
        )
    family, kind = ARCHITECTURES[architecture]
    fields = Fields(values, str(path))
    fields.take("quantization_config", None)
    for flag in ("is_encoder_decoder", "is_decoder", "add_cross_attention", "tie_encoder_decoder"):
        fields.only(flag, False)
    fields.only("cross_attention_hidden_size", None)
    return family.read_config(fields, kind), name or kind


def from_hf(
    tensors: Mapping[str, Any], config: Any, where: str = "checkpoint", lazy: bool = False
) -> dict[str, Any]:
    """Finds each parameter of an unrolled model among the tensors of a checkpoint.

    Args:
      tensors: arrays by their Hugging Face names.
      config: the model's configuration.
      where: name of the checkpoint, for errors.
      lazy: do not copy what is made of several tensors, give a ``Stacked``.

    Returns:
      Arrays by parameter path; transposed ones are views, those made of several tensors (a
      layer's experts) are copies.

    Raises:
      ModelError: a tensor is missing, left over, or not floating point.
    """
    family, _ = FAMILIES[type(config)]
    for old, new in family.RENAMES.items():
        tensors = {
            name.removesuffix(old) + new if name.endswith(old) else name: value
            for name, value in tensors.items()
        }
    left, values, missing = dict(tensors), {}, []

    def find(name):
        # Checkpoints of the bare encoder or decoder lack the prefix.
        return name if name in tensors else name.removeprefix(family.PREFIX)

    for path, (names, transposed) in family.tensor_names(config).items():
        parts = []
        for name in (names,) if isinstance(names, str) else names:
            if find(name) not in left:
                missing.append(name)
                continue
            value = left.pop(find(name))
            if not jnp.issubdtype(value.dtype, jnp.floating):
                raise ModelError(
                    f"{where}: tensor {name} has dtype {value.dtype}; expected floating-point "
                    "weights"
                )
            parts.append(value.T if transposed else value)
        if missing:
            continue
        if isinstance(names, str):
            (values[path],) = parts
        else:
            _check_parts(parts, names, where)
            values[path] = Stacked(parts) if lazy else _copied(parts)
    if missing:
        raise ModelError(
            f"{where}: {len(missing)} tensors are missing, the first is {missing[0]}; the "
            "checkpoint is incomplete, or config.json belongs to another model"
        )
    for name in list(left):
        if name.endswith(family.BUFFERS):
            del left[name]
        elif name in family.COPIES and find(family.COPIES[name]) in tensors:
            twin = np.asarray(tensors[find(family.COPIES[name])])
            if not np.array_equal(np.asarray(left.pop(name)), twin):
                raise ModelError(
                    f"{where}: {name} differs from {family.COPIES[name]}, but config.json ties the "
                    "two (tie_word_embeddings); set it to false if the model has two tables"
                )
    if left:
        raise ModelError(
            f"{where}: {len(left)} tensors have no place in the model, the first is "
            f"{sorted(left)[0]}; config.json belongs to another model, or the architecture is a "
            "variant that is not supported"
        )
    return values


def to_hf(params: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The tensors of a Hugging Face checkpoint, from the dense weights of a model.

    Args:
      params: nested dict of arrays, layers unrolled or stacked.
      config: the model's configuration.

    Returns:
      Arrays by Hugging Face names; transposed ones are views where the arrays are NumPy's.

    Raises:
      ModelError: ``params`` has other paths than the model.
    """
    family, _ = FAMILIES[type(config)]
    flat = path_names(params)
    stacked = f"{family.LAYERS}/"
    scanned = not any(path.startswith(f"{stacked}0/") for path in flat)
    bare = family is bert and not config.masked_lm_head
    tensors, used = {}, set()
    for path, (names, transposed) in family.tensor_names(config).items():
        key, index = path, None
        if scanned and path.startswith(stacked):
            _, number, rest = path.split("/", 2)
            key, index = stacked + rest, int(number)
        single = isinstance(names, str)
        if key not in flat:
            raise ModelError(
                f"params have no {key}, which {names if single else names[0]} is made from"
            )
        used.add(key)
        value = flat[key] if index is None else flat[key][index]
        for name, part in ((names, value),) if single else zip(names, value, strict=True):
            name = name.removeprefix(family.PREFIX) if bare else name
            tensors[name] = part.T if transposed else part
    extra = sorted(set(flat) - used)
    if extra:
        raise ModelError(f"params have {extra[0]}, which no tensor of the checkpoint holds")
    return tensors


def save(
    folder: str | os.PathLike, params: Mapping[str, Any], config: Any, like: str | os.PathLike
) -> None:
    """Writes dense weights as a model folder in Hugging Face layout.

    Sizes of layers that differ, as after physical pruning, go into ``heads_per_layer`` and the like
    of ``config.json`` (``models/sizes.py``); such a folder loads with this library only.

    Args:
      folder: the folder to write; made if need be.
      params: nested dict of arrays, layers unrolled or stacked.
      config: the model's configuration; of pruned weights, that of ``config_of``.
      like: the folder the model came from, whose ``config.json`` and tokenizer are taken over.

    Raises:
      ModelError: ``params`` do not fit the configuration.
      JaxcompError: the folder cannot be written.
    """
    folder, like = pathlib.Path(folder), pathlib.Path(like)
    tensors = to_hf(params, config)
    _check_shapes(params, config)
    values = _config_json(config, like)
    dtype = str(jnp.dtype(next(iter(tensors.values())).dtype))
    values["torch_dtype" if "torch_dtype" in values else "dtype"] = dtype
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in COMPANIONS:
            if (like / name).exists() and not (
                (folder / name).exists() and (folder / name).samefile(like / name)
            ):
                shutil.copyfile(like / name, folder / name)
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise JaxcompError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); choose another "
            "folder"
        ) from error
    safetensors.write(folder / safetensors.SINGLE, tensors, {"format": "pt"})


def _check_shapes(params, config):
    """Refuses weights of other shapes than the configuration's model has."""
    flat = path_names(params)
    family, _ = FAMILIES[type(config)]
    scan = not any(path.startswith(f"{family.LAYERS}/0/") for path in flat)
    for path, want in path_names(functional(build(config, scan=scan))[1]).items():
        if tuple(flat[path].shape) != want.shape:
            raise ModelError(
                f"{path} has shape {tuple(flat[path].shape)}, the configuration asks for "
                f"{want.shape}; if heads or neurons were removed, save with "
                "models.config_of(params, config)"
            )


def _config_json(config, like):
    """The fields of ``config.json`` for a configuration that differs in sizes from a folder's."""
    path = like / "config.json"
    values = read_json(path)
    if parse_config(values, path)[0] == config:
        return values
    for name, value in config_fields(config).items():
        values.pop(name, None)
        if value is not None:
            values[name] = value
    read = parse_config(values, path)[0]
    if read != config:
        other = [
            field.name
            for field in dataclasses.fields(config)
            if getattr(read, field.name, None) != getattr(config, field.name)
        ]
        raise ModelError(
            f"{path}: the configuration to save differs from this folder's in {', '.join(other)}; "
            "pass the folder of a model that differs in numbers of layers, heads and neurons only"
        )
    return values


def _stack(values, layers, stack):
    """Parameters of the scanned model from those of the unrolled one, stacked by a function."""
    stacked: dict[str, Any] = {}
    groups: dict[str, dict[int, Any]] = {}
    for path, value in values.items():
        if path.startswith(layers + "/"):
            _, number, rest = path.split("/", 2)
            groups.setdefault(f"{layers}/{rest}", {})[int(number)] = value
        else:
            stacked[path] = value
    for path, items in groups.items():
        stacked[path] = stack([items[i] for i in range(len(items))])
    return stacked


def _check_parts(parts, names, where):
    """Refuses tensors that cannot be stacked."""
    for name, part in zip(names, parts, strict=True):
        if part.shape != parts[0].shape or part.dtype != parts[0].dtype:
            raise ModelError(
                f"{where}: tensor {name} {part.shape} {part.dtype} differs from {names[0]} "
                f"{parts[0].shape} {parts[0].dtype}, with which it is stacked; the checkpoint is "
                "damaged"
            )


def _copied(items):
    """Stacks arrays of one shape; what reading them has filled of a memory map is let go."""
    out = np.empty((len(items), *items[0].shape), items[0].dtype)
    for i, item in enumerate(items):
        out[i] = item
        safetensors.release(item)
    return out


def _nest(values):
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parents, name = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[name] = value
    return tree


def _tokenizer(folder):
    if not (folder / "tokenizer.json").exists():
        return None
    from jaxcomp import data

    return data.load_tokenizer(folder)
