"""Attention that computes only the blocks a mask leaves: masks, and the operation on them."""

from jaxcomp.kernels.sparse_attention.api import (
    attention,
    attention_fn,
    decode_attention,
    problems,
)
from jaxcomp.kernels.sparse_attention.masks import (
    blocks,
    causal,
    chunked,
    dilated,
    fixed,
    full,
    global_,
    per_head,
    random,
    strided,
    window,
)
from jaxcomp.kernels.sparse_attention.rules import Kind, Mask

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
    "problems",
    "random",
    "strided",
    "window",
]
