"""The products that the tuner asks about."""

import dataclasses
import itertools
from collections.abc import Sequence

from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.quantized_matmul import reference, weights

# Rows, outputs and inputs: of small models on a CPU, of Llama-3-8B elsewhere.
_CPU_SHAPES = tuple(itertools.product((16, 256, 4096), ((256, 256), (1024, 1024))))
_SHAPES = tuple(itertools.product((1, 16, 256, 2048), ((4096, 4096), (14336, 4096), (4096, 14336))))
# What rows are quantized to.
DTYPES = {"int8": "int8", "e4m3": "float8_e4m3fn"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A product to measure.

    Attributes:
      format: of the weight, a key of ``weights.FORMATS``.
      activation: "int8" or "e4m3", what rows are quantized to, or None.
      m: rows.
      n: outputs.
      k: inputs.
      group_size: inputs that share a scale.
    """

    format: str
    activation: str | None
    m: int
    n: int
    k: int
    group_size: int

    def __str__(self) -> str:
        quantized = f" of {self.activation} rows" if self.activation else ""
        return (
            f"{self.format} in groups of {self.group_size}{quantized}, {self.m} x {self.n} x "
            f"{self.k}"
        )


def cases(
    chip: Chip,
    formats: Sequence[str] | None = None,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    group_size: int = 128,
) -> list[Case]:
    """The products between whose ways there is something to choose on a chip.

    Args:
      chip: from ``chips.chip_of``.
      formats: of weights; None for those that are common.
      shapes: (rows, outputs, inputs); None for common ones.
      group_size: of formats below 8 bits; others have one scale a row.

    Returns:
      The cases, in order.
    """
    cpu = chip.platform == "cpu"
    formats = formats or (("int8", "int4") if cpu else ("int4", "int8", "fp8", "codebook"))
    shapes = shapes or [(m, *nk) for m, nk in (_CPU_SHAPES if cpu else _SHAPES)]
    found = []
    for format, (m, n, k) in itertools.product(formats, shapes):
        wide = weights.FORMATS[format].bits == 8
        for activation in (None, *DTYPES):
            exact = DTYPES.get(activation) in reference.activation_dtypes(format)
            if activation is None:
                useful = not cpu  # There, XLA is the only one.
            elif cpu:
                useful = exact and activation == "int8"
            else:
                useful = exact and chip.multiplies(DTYPES[activation])
            if useful:
                found.append(Case(format, activation, m, n, k, k if wide else min(group_size, k)))
    return found
