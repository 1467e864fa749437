"""Compact attention: composable masks, and attention that computes only the blocks they leave.

``attention_fn(mask)`` goes where Flax's attention layers take their ``attention_fn``.
"""

from jaxcomp.kernels.sparse_attention import (
    Kind,
    Mask,
    attention,
    attention_fn,
    blocks,
    causal,
    chunked,
    decode_attention,
    dilated,
    fixed,
    full,
    global_,
    per_head,
    random,
    strided,
    window,
)

__all__ = [
    "Kind",
    "Mask",
    "attention",
    "attention_fn",
    "blocks",
    "causal",
    "chunked",
    "decode_attention",
    "dilated",
    "fixed",
    "full",
    "global_",
    "per_head",
    "random",
    "strided",
    "window",
]
