"""Distillation: losses as pure functions, layer maps, streams of teacher logits, schedules.

The student always comes first, the teacher second; the teacher is a constant unless
``stop_gradient=False``. Losses are per position or example: ``masked_mean`` reduces them.
"""

from jaxcomp.distillation.common import masked_mean
from jaxcomp.distillation.distill import distill
from jaxcomp.distillation.features import (
    Projection,
    attention_score_loss,
    cosine_loss,
    hidden_mse,
    hint_loss,
    pkd_loss,
    projection,
)
from jaxcomp.distillation.layer_maps import (
    explicit_map,
    last_map,
    layer_taps,
    pair_taps,
    skip_map,
    uniform_map,
)
from jaxcomp.distillation.logits import (
    check_labels,
    hard_cross_entropy,
    hinton_loss,
    jensen_shannon,
    kl_divergence,
    logits_mse,
    reverse_kl_divergence,
    soft_cross_entropy,
)
from jaxcomp.distillation.relations import (
    attention_kl,
    fsp_loss,
    fsp_matrix,
    minilm_loss,
    minilmv2_loss,
    relation,
    rkd_angle_loss,
    rkd_distance_loss,
)
from jaxcomp.distillation.schedules import EMAState, EMATeacher, annealed_weight, ema_teacher
from jaxcomp.distillation.stream import TopKReader, TopKWriter, fingerprint
from jaxcomp.distillation.topk import TopK, compress_logits, topk_kl_divergence

__all__ = [
    "EMAState",
    "EMATeacher",
    "Projection",
    "TopK",
    "TopKReader",
    "TopKWriter",
    "annealed_weight",
    "attention_kl",
    "attention_score_loss",
    "check_labels",
    "compress_logits",
    "cosine_loss",
    "distill",
    "ema_teacher",
    "explicit_map",
    "fingerprint",
    "fsp_loss",
    "fsp_matrix",
    "hard_cross_entropy",
    "hidden_mse",
    "hint_loss",
    "hinton_loss",
    "jensen_shannon",
    "kl_divergence",
    "last_map",
    "layer_taps",
    "logits_mse",
    "masked_mean",
    "minilm_loss",
    "minilmv2_loss",
    "pair_taps",
    "pkd_loss",
    "projection",
    "relation",
    "reverse_kl_divergence",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "skip_map",
    "soft_cross_entropy",
    "topk_kl_divergence",
    "uniform_map",
]
