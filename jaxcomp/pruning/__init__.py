"""Pruning of one layer's weight, and masks over trees: pure functions and the steps of recipes."""

from jaxcomp.pruning.magnitude import Magnitude, magnitude
from jaxcomp.pruning.masks import (
    apply_mask,
    drop_smallest,
    global_mask,
    nm_mask,
    row_mask,
    sparsity,
    tensor_mask,
)
from jaxcomp.pruning.sparsegpt import SparseGPT, sparsegpt
from jaxcomp.pruning.wanda import Wanda, wanda

__all__ = [
    "Magnitude",
    "SparseGPT",
    "Wanda",
    "apply_mask",
    "drop_smallest",
    "global_mask",
    "magnitude",
    "nm_mask",
    "row_mask",
    "sparsegpt",
    "sparsity",
    "tensor_mask",
    "wanda",
]
