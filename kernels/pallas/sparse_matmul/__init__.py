"""Products with sparse weights: blocks that are listed, and N of every M inputs."""

from jaxcomp.kernels.sparse_matmul.api import block_sparse_matmul, nm_matmul, prepare_nm
from jaxcomp.kernels.sparse_matmul.blocks import (
    BlockSparse,
    block_list,
    block_sparse,
    split_blocks,
)
from jaxcomp.kernels.sparse_matmul.layers import layer_of
from jaxcomp.kernels.sparse_matmul.nm import NMSparse, nm_sparse, nm_stored

__all__ = [
    "BlockSparse",
    "NMSparse",
    "block_list",
    "block_sparse",
    "block_sparse_matmul",
    "layer_of",
    "nm_matmul",
    "nm_sparse",
    "nm_stored",
    "prepare_nm",
    "split_blocks",
]
