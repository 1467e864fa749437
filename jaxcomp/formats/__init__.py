"""Formats: compressed arrays as sums of parts, with exact bit counts.

``Int``, ``Float``, ``Codebook``, ``NM``, ``Sparse`` and ``LowRank`` say what a weight is to become;
the parts (``Affine``, ``FloatPart``, ..) hold it; ``CompressedArray`` is the sum of parts that
stands in for the weight. ``formats.grid`` and ``formats.sparse`` make parts from matrices.
"""

from jaxcomp.formats import grid, packing, sparse
from jaxcomp.formats.affine import Affine
from jaxcomp.formats.base import Part
from jaxcomp.formats.checks import check
from jaxcomp.formats.codebook import CodebookPart, kmeans_levels
from jaxcomp.formats.compressed import (
    CompressedArray,
    is_compressed,
    materialize,
    nbits,
    to_matrix,
)
from jaxcomp.formats.dense import Dense, DenseColumns, LowRankPart, low_rank
from jaxcomp.formats.floating import FloatPart
from jaxcomp.formats.grid import quantize
from jaxcomp.formats.serialize import from_arrays, to_arrays
from jaxcomp.formats.sparse import NMPart, SparsePart
from jaxcomp.formats.spec import (
    NM,
    AnyFormat,
    Codebook,
    Element,
    Float,
    Format,
    Int,
    LowRank,
    Sparse,
)
from jaxcomp.formats.transforms import InputQuant, InputScale

__all__ = [
    "NM",
    "Affine",
    "AnyFormat",
    "Codebook",
    "CodebookPart",
    "CompressedArray",
    "Dense",
    "DenseColumns",
    "Element",
    "Float",
    "FloatPart",
    "Format",
    "InputQuant",
    "InputScale",
    "Int",
    "LowRank",
    "LowRankPart",
    "NMPart",
    "Part",
    "Sparse",
    "SparsePart",
    "check",
    "from_arrays",
    "grid",
    "is_compressed",
    "kmeans_levels",
    "low_rank",
    "materialize",
    "nbits",
    "packing",
    "quantize",
    "sparse",
    "to_arrays",
    "to_matrix",
]
