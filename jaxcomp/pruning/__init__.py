"""Pruning: of one layer's weight after training, and of parameter trees in training.

Pure functions on arrays and trees, the steps of recipes, and ``wrap``, which makes an optax
optimizer prune what it trains.
"""

from jaxcomp.pruning import hard_concrete, schedules
from jaxcomp.pruning.blocks import Units, unit_norms
from jaxcomp.pruning.gates import L0Gates, gates, unit_importance
from jaxcomp.pruning.gradual import GradualMagnitude
from jaxcomp.pruning.importance import (
    head_importance,
    mean_importance,
    normalize_layers,
    prune_units,
    taylor_scores,
    taylor_unit_scores,
)
from jaxcomp.pruning.lagrangian import Lagrangian, Multipliers, ascend, lagrangian
from jaxcomp.pruning.magnitude import Magnitude, magnitude
from jaxcomp.pruning.masks import (
    apply_mask,
    drop_smallest,
    global_mask,
    nm_mask,
    row_mask,
    sparsity,
    sparsity_counts,
    tensor_mask,
)
from jaxcomp.pruning.method import Layout, Method, Scored, Weight, keep_highest
from jaxcomp.pruning.movement import Movement, SoftMovement, soft_movement_penalty
from jaxcomp.pruning.regularization import (
    group_lasso_penalty,
    group_soft_threshold,
    l1_penalty,
    proximal_group_lasso,
    proximal_l1,
    soft_threshold,
)
from jaxcomp.pruning.removal import remove, unstack
from jaxcomp.pruning.rigl import RigL, layer_densities
from jaxcomp.pruning.sparsegpt import SparseGPT, sparsegpt
from jaxcomp.pruning.srste import SRSTE
from jaxcomp.pruning.structured import (
    apply_gates,
    apply_masks,
    find_units,
    parameter_counts,
    select_units,
    unit_scores,
    units,
)
from jaxcomp.pruning.taylor import Taylor
from jaxcomp.pruning.training import PruningState, get_masks, latent_weights, wrap
from jaxcomp.pruning.wanda import Wanda, wanda

__all__ = [
    "SRSTE",
    "GradualMagnitude",
    "L0Gates",
    "Lagrangian",
    "Layout",
    "Magnitude",
    "Method",
    "Movement",
    "Multipliers",
    "PruningState",
    "RigL",
    "Scored",
    "SoftMovement",
    "SparseGPT",
    "Taylor",
    "Units",
    "Wanda",
    "Weight",
    "apply_gates",
    "apply_mask",
    "apply_masks",
    "ascend",
    "drop_smallest",
    "find_units",
    "gates",
    "get_masks",
    "global_mask",
    "group_lasso_penalty",
    "group_soft_threshold",
    "hard_concrete",
    "head_importance",
    "keep_highest",
    "l1_penalty",
    "lagrangian",
    "latent_weights",
    "layer_densities",
    "magnitude",
    "mean_importance",
    "nm_mask",
    "normalize_layers",
    "parameter_counts",
    "proximal_group_lasso",
    "proximal_l1",
    "prune_units",
    "remove",
    "row_mask",
    "schedules",
    "select_units",
    "soft_movement_penalty",
    "soft_threshold",
    "sparsegpt",
    "sparsity",
    "sparsity_counts",
    "taylor_scores",
    "taylor_unit_scores",
    "tensor_mask",
    "unit_importance",
    "unit_norms",
    "unit_scores",
    "units",
    "unstack",
    "wanda",
    "wrap",
]
