"""How the weights of the reference models are split over a mesh: tensor parallelism and FSDP.

Each family lists its weights by their part in Megatron's scheme, in ``PARTITION``:

    column       kernel (in, out): its outputs are split; the next kernel takes them as they are
    row          kernel (in, out): its inputs are split; the products are summed over devices
    vocabulary   table (rows, features): its rows are split
    features     table (rows, features): its features are split
    bias         (out,) of a column kernel: split like its outputs
    experts      kernels (experts, in, out): every device has some of the experts whole

What is not listed (norms, biases of row kernels, positions, routers) is small and replicated. FSDP
splits the other axis of each matrix but ``features``; the partitioner gathers a layer's slice where
it is used.

Source: https://arxiv.org/abs/1909.08053 (Megatron-LM).
"""

import re
from typing import Any

from jax.sharding import PartitionSpec

from jaxcomp import rules
from jaxcomp.models.loading import FAMILIES

Axes = str | tuple[str, ...] | None


def partition_rules(
    config: Any, *, tensor: Axes = "model", fsdp: Axes = None, scan: bool = False
) -> tuple[tuple[str, PartitionSpec], ...]:
    """The usual sharding of a reference model, as rules for ``jc.shard``.

    Args:
      config: the model's configuration.
      tensor: mesh axes that split heads, neurons and the vocabulary; None for no tensor
        parallelism.
      fsdp: mesh axes that split the other axis of every matrix; None keeps it whole. Of a
        compressed weight they may not split a group of inputs.
      scan: for the model with stacked layers (``build(config, scan=True)``).

    Returns:
      Pairs of a rule and the spec of the leaves it names, each of which matches.

    Example:
      >>> from jaxcomp.models import LlamaConfig
      >>> config = LlamaConfig(64, 32, 48, 2, 4, 2, head_dim=8)
      >>> tuple(dict(partition_rules(config))["layers/*/mlp/down_proj/kernel"])
      ('model', None)
      >>> rules = dict(partition_rules(config, fsdp="data", scan=True))
      >>> tuple(rules["layers/mlp/down_proj/kernel"])
      (None, 'model', 'data')
    """
    family, _ = FAMILIES[type(config)]
    specs = {
        "column": (fsdp, tensor),
        "row": (tensor, fsdp),
        "vocabulary": (tensor, fsdp),
        "features": (None, tensor),
        "bias": (tensor,),
        "experts": (tensor, fsdp, None),
    }
    paths = family.tensor_names(config)
    found = []
    for name, part in family.PARTITION:
        if not any(rules.fits(name, path) for path in paths):
            continue  # A bias or head that this configuration does not have.
        spec = specs[part]
        if scan and name.startswith(f"{family.LAYERS}/"):
            name, spec = re.sub(r"/\*/", "/", name, count=1), (None, *spec)
        found.append((name, PartitionSpec(*spec)))
    return tuple(found)
