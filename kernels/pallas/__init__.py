"""Pallas kernels for compressed weights and compact attention, installed as ``jaxcomp.kernels``.

- ``quantized_matmul``: products with weights of 2, 4 and 8 bits that stay packed in memory;
- ``sparse_matmul``: products with block-sparse and N:M weights;
- ``sparse_attention``: attention over the blocks that a mask leaves.

An operation is a folder: its public functions in ``api``, plain JAX in ``reference``, a file or two
for each kind of chip. It imports only ``jax``, takes plain arrays and knows no format of jaxcomp.
"""
