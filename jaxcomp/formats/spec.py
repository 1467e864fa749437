"""What a weight is to become: small frozen configs, alike in Python, YAML and command line."""

from typing import Literal

import msgspec


class Format(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="format"):
    """Base of all formats."""


class Int(Format, frozen=True, tag="int"):
    """Uniform affine integers, w = scale * (q - zero_point).

    Attributes:
      bits: width of a stored value, 2 to 8, or 16 for tests of the dense limit.
      group_size: consecutive inputs that share a scale; None is one group a row.
      symmetric: no zero point is stored.
      full_range: the symmetric grid has 2**bits levels (GPTQ: zero point 2**(bits-1), scale
        2*absmax/(2**bits-1)); otherwise the 2**bits - 1 levels -(2**(bits-1)-1) .. 2**(bits-1)-1
        with scale absmax/(2**(bits-1)-1), which integer matmuls use.
      out_group_size: consecutive outputs that share a scale; 1 is one scale a row, None all rows
        (with ``group_size=None``: one scale a tensor).
      scale_dtype: dtype in which scales are stored and applied.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    full_range: bool = True
    out_group_size: int | None = 1
    scale_dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class Float(Format, frozen=True, tag="float"):
    """Small floating-point values with a scale a group.

    Attributes:
      kind: element type "e4m3", "e5m2", "e2m1" with a float scale; or a microscaling format that
        fixes ``group_size`` and its scale type: "mxfp8" (e4m3, 32, power of two), "mxfp4" (e2m1,
        32, power of two), "nvfp4" (e2m1, 16, e4m3 scales under one float32 a tensor).
      group_size: as in ``Int``; must be left None for the microscaling kinds.
      out_group_size: as in ``Int``.
      scale_dtype: dtype of the scales of e4m3, e5m2 and e2m1.
    """

    kind: Literal["e4m3", "e5m2", "e2m1", "mxfp8", "mxfp4", "nvfp4"]
    group_size: int | None = None
    out_group_size: int | None = 1
    scale_dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class Codebook(Format, frozen=True, tag="codebook"):
    """Values out of a table of levels.

    Attributes:
      kind: "nf4" (the 16 levels of QLoRA), "fp4_bnb" (bitsandbytes' FP4), "levels" (the given
        ones), or "kmeans" (2**bits levels fitted to each row).
      bits: for "kmeans" only, 2 to 8.
      levels: for "levels" only, ascending, 2 to 256 of them.
      group_size: inputs that share an absmax scale; None is one group a row. Not for "kmeans",
        whose rows have a table and no scale.
      scale_dtype: dtype of the scales; under double quantization, of their mean and steps.
      double_quantization: the scales, less their mean, are stored in 8 bits under one scale for
        every 256 of them (QLoRA).
    """

    kind: Literal["nf4", "fp4_bnb", "levels", "kmeans"]
    bits: int | None = None
    levels: tuple[float, ...] | None = None
    group_size: int | None = None
    scale_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    double_quantization: bool = False


class NM(Format, frozen=True, tag="nm"):
    """N of every M consecutive inputs kept, with their positions.

    Attributes:
      n: values kept.
      m: size of a block, which divides the input size.
      values: format of the kept values (its ``group_size`` counts inputs of the dense weight); None
        keeps the weight's own dtype.
    """

    n: int
    m: int
    values: Int | Float | None = None


class Sparse(Format, frozen=True, tag="sparse"):
    """Kept values at arbitrary positions, one bit a weight for the mask.

    Attributes:
      values: format of the kept values (its ``group_size`` counts inputs of the dense weight); None
        keeps the weight's own dtype.
    """

    values: Int | Float | None = None


class LowRank(Format, frozen=True, tag="low_rank"):
    """A product of two thin matrices, (out, rank) @ (rank, in).

    Attributes:
      rank: inner size.
    """

    rank: int


Element = Int | Float | Codebook
AnyFormat = Int | Float | Codebook | NM | Sparse | LowRank
