"""Sizes that differ from layer to layer, as physical removal of heads and neurons leaves them.

A configuration has one number of heads and one MLP width for all layers, and for a model whose
layers differ a tuple of them: ``heads_per_layer``, ``key_value_heads_per_layer`` (grouped-query
attention) and ``intermediate_sizes``. In ``config.json`` these are lists of the same names, which
Hugging Face does not know: such a folder loads with this library only. Sizes that all layers share
are written in Hugging Face's own fields where it has any for them; it has none for the heads of
BERT and GPT-2, whose head size is the width divided by their number.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxcomp.errors import ModelError
from jaxcomp.functional import path_names


@dataclasses.dataclass(frozen=True)
class LayerSize:
    """One size of a layer.

    Attributes:
      per_layer: field of the configuration that holds one number a layer, or is empty.
      field: field that holds the number of all layers.
      weight: path, inside a layer, of a weight that shows the size.
      axis: its axis, from the end.
      heads: the size is a number of heads, each ``head_dim`` long.
      shared: ``field`` may be changed; otherwise it also fixes ``head_dim``.
    """

    per_layer: str
    field: str
    weight: str
    axis: int
    heads: bool = False
    shared: bool = True


def layer_sizes(config: Any) -> list[tuple[int, ...]]:
    """The sizes of each layer.

    Args:
      config: a model's configuration.

    Returns:
      One tuple a layer, in the order of the configuration's ``LAYER_SIZES``.

    Raises:
      ModelError: a tuple of sizes has not one for each layer.

    Example:
      >>> from jaxcomp.models import BertConfig
      >>> layer_sizes(BertConfig(8, 4, 6, 2, 2, heads_per_layer=(1, 2)))
      [(1, 6), (2, 6)]
    """
    layers, found = config.num_hidden_layers, []
    for size in config.LAYER_SIZES:
        values = getattr(config, size.per_layer) or (getattr(config, size.field),) * layers
        if len(values) != layers:
            raise ModelError(
                f"{type(config).__name__}: {size.per_layer} has {len(values)} numbers for {layers} "
                "layers; give one for each layer"
            )
        found.append(values)
    return list(zip(*found, strict=True))


def common_sizes(config: Any) -> tuple[int, ...]:
    """The sizes that all layers share, for layers that are stacked.

    Args:
      config: a model's configuration.

    Returns:
      Sizes in the order of ``LAYER_SIZES``.

    Raises:
      ModelError: the layers differ.
    """
    sizes = layer_sizes(config)
    for size, values in zip(config.LAYER_SIZES, zip(*sizes, strict=True), strict=True):
        if len(set(values)) > 1:
            raise ModelError(
                f"{size.per_layer} {list(values)}: layers of different sizes cannot be stacked for "
                f"a scan; build or load the model with scan=False"
            )
    return sizes[0]


def config_of(params: Mapping[str, Any], config: Any) -> Any:
    """The configuration of a model whose heads, neurons or layers were removed.

    Args:
      params: nested dict of arrays (dense or compressed) or of their shapes, layers unrolled or
        stacked.
      config: configuration of the model before the removal.

    Returns:
      ``config`` with the number of layers, heads and neurons that the arrays show.

    Raises:
      ModelError: the arrays are not those of such a model: a path is missing, or a shape is not a
        whole number of heads.

    Example:
      >>> import jaxcomp as jc
      >>> config = jc.models.BertConfig(8, 4, 6, 1, 2)
      >>> _, params = jc.functional(jc.models.build(config))
      >>> smaller = jc.models.BertConfig(8, 4, 5, 1, 2, heads_per_layer=(1,))
      >>> _, params = jc.functional(jc.models.build(smaller))
      >>> config_of(params, config) == smaller
      True
    """
    prefix = f"{config.LAYERS}/"
    shapes = {path: tuple(leaf.shape) for path, leaf in path_names(params).items()}
    names = {path.split("/")[1] for path in shapes if path.startswith(prefix)}
    unrolled = bool(names) and all(name.isdecimal() for name in names)
    if unrolled and names != {str(i) for i in range(len(names))}:
        raise ModelError(f"params: {prefix}.. are not numbered from 0 on, but {sorted(names)}")
    changes: dict[str, Any] = {}
    for size in config.LAYER_SIZES:
        paths = [f"{prefix}{i}/{size.weight}" for i in range(len(names))]
        paths = paths if unrolled else [prefix + size.weight]
        values = []
        for path in paths:
            if path not in shapes:
                raise ModelError(f"params have no {path}, of which the {size.field} is read")
            value, unit = shapes[path][size.axis], config.head_dim if size.heads else 1
            if value % unit:
                raise ModelError(
                    f"{path} {shapes[path]}: axis {size.axis} of size {value} is not a whole "
                    f"number of heads of {unit}; remove whole heads"
                )
            values.append(value // unit)
        if not unrolled:
            values *= shapes[paths[0]][0]
        same = len(set(values)) == 1 and (size.shared or values[0] == getattr(config, size.field))
        changes[size.per_layer] = () if same else tuple(values)
        if same:
            changes[size.field] = values[0]
    if len(values) != config.num_hidden_layers:
        if getattr(config, "sliding_windows", ()):
            raise ModelError(
                f"params have {len(values)} layers of {config.num_hidden_layers}; which sliding "
                "windows are left is not to be seen, set num_hidden_layers and sliding_windows"
            )
        changes[config.DEPTH] = len(values)
    return dataclasses.replace(config, **changes)


def config_fields(config: Any) -> dict[str, Any]:
    """The sizes as fields of ``config.json``.

    Args:
      config: a model's configuration.

    Returns:
      Values by field; None for fields that must not be there.
    """
    names = getattr(config, "json_names", {})
    found: dict[str, Any] = {config.DEPTH: config.num_hidden_layers}
    for size in config.LAYER_SIZES:
        found[names.get(size.field, size.field)] = getattr(config, size.field)
        found[size.per_layer] = list(getattr(config, size.per_layer)) or None
    if "head_dim" in {f.name for f in dataclasses.fields(config)}:
        found["head_dim"] = config.head_dim
    return found
