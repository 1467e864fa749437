"""Pallas kernels for compressed weights, installed as ``jaxcomp.kernels``.

No kernel is here yet. This package will hold, one operation a folder with its XLA reference beside
it: weight-only matmuls on packed 4, 3 and 2 bit codes with group scales, matmuls on codebook and
N:M sparse weights, and block-sparse matmuls, for TPU (Mosaic) and for GPU (Mosaic GPU). It imports
only ``jax`` and knows no format: operations take the packed arrays (uint8 codes with the input axis
minor, scales ``(in_groups, out)``) as they are stored. Until then dispatch runs compressed weights
through XLA.
"""

import jax as _jax  # noqa: F401

__all__: list[str] = []
