"""Formats: compressed arrays as sums of parts, with exact bit counts."""

from jaxcomp.formats.affine import Affine
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
from jaxcomp.formats.grid import check, quantize
from jaxcomp.formats.spec import NM, Codebook, Float, Format, Int, LowRank, Sparse
from jaxcomp.formats.transforms import InputQuant, InputScale
