"""What quantization-aware training needs of a step: a weight quantizer, found by the step's type.

``jc.qat`` asks ``weight_quantizer(step)`` for each weight that a step names. A method that can be
trained registers itself there, as ``FakeQuant`` and ``RTN`` do at the end of this file; nothing
else of the library has to know it.
"""

import dataclasses
import functools
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import msgspec

from jaxcomp.errors import RecipeError
from jaxcomp.formats import grid
from jaxcomp.formats.spec import Element, Int
from jaxcomp.quantization import checks, common
from jaxcomp.quantization.binary import Binary, binary, binary_values
from jaxcomp.quantization.inputs import check_share
from jaxcomp.quantization.lsq import (
    STARTS,
    check_learnable,
    initial_scales,
    learned_qparams,
    lsq,
)
from jaxcomp.quantization.rtn import RTN
from jaxcomp.quantization.ste import ESTIMATORS, fake_quantize, straight_through
from jaxcomp.quantization.ternary import Ternary, ternary, ternary_values
from jaxcomp.step import Activation, Layer, Step, run

Observer = Literal["ema", "percentile", "learned", "pact"]
OBSERVERS = ("ema", "percentile", "learned", "pact")


class WeightQuantizer(Protocol):
    """How a weight is quantized while it is trained. Hashable; all state is in ``learned``."""

    def check(self, shape: tuple[int, ...], path: str) -> None:
        """Raises a ``JaxcompError`` where a matrix ``(*stack, out, in)`` cannot be quantized so."""

    def init(self, w: jax.Array) -> dict[str, jax.Array]:
        """Parameters that are learned, ``(*stack, ..)`` each, from the weight; {} if none are."""

    def apply(
        self, w: jax.Array, learned: dict[str, jax.Array], bits: jax.Array | None
    ) -> jax.Array:
        """The quantized weight ``(*stack, out, in)``, differentiable in both.

        ``bits``, where a schedule of the bit width runs, is the width now.
        """

    def convert(self, w: jax.Array, learned: dict[str, jax.Array]) -> Any:
        """The part whose ``materialize`` gives what ``apply`` gave."""


@functools.singledispatch
def weight_quantizer(step: Step) -> WeightQuantizer | None:
    """The weight quantizer of a step; None where the step leaves weights alone.

    Raises:
      RecipeError: the step's algorithm cannot be trained.
    """
    known = sorted(
        t.__struct_config__.tag
        for t in weight_quantizer.registry
        if isinstance(t, type) and issubclass(t, Step) and t.__struct_config__.tag
    )
    raise RecipeError(
        f"{step.__struct_config__.tag} is no step of quantization-aware training; use one of "
        f"{', '.join(known)}, and run the others with compress before or after"
    )


class FakeQuant(Step, frozen=True, tag="fake_quant"):
    """Trains weights, inputs or both as they will be when quantized.

    Attributes:
      format: what weights become; None leaves them alone.
      scale: "dynamic" places the grid on the weights at each call as ``clipping`` says, without a
        gradient; "learned" (LSQ, LSQ+) trains its step size, and offset where there is one.
      start: where learned step sizes start: "mse", "minmax" or "lsq" (2 mean|w| / sqrt(high)).
      clipping: for dynamic scales, as in ``RTN``.
      percentile: of the magnitudes, for ``clipping="percentile"`` and ``observer="percentile"``.
      estimator: for dynamic scales: "ste" passes every gradient, "clipped" those inside the grid.
      activation: how the input is quantized; None leaves it alone.
      observer: where the range of a static activation comes from: "ema" of the extremes, "ema" of
        percentiles ("percentile"), or a learned step size ("learned": LSQ, LSQ+ when asymmetric) or
        clipping level ("pact").
      momentum: of the moving averages.
      matmul: "simulated" multiplies the rounded values in the model's own dtype; "int8" and "fp8"
        multiply codes, which is faster where the hardware does it.
      quantize_gradients: also multiply codes in the backward pass; for "int8" and "fp8".
    """

    format: Element | None = None
    scale: Literal["dynamic", "learned"] = "dynamic"
    start: Literal["minmax", "mse", "lsq"] = "mse"
    clipping: str = "minmax"
    percentile: float = 99.9
    estimator: Literal["ste", "clipped"] = "ste"
    activation: Activation | None = None
    observer: Literal["ema", "percentile", "learned", "pact"] = "ema"
    momentum: float = 0.95
    matmul: Literal["simulated", "int8", "fp8"] = "simulated"
    quantize_gradients: bool = False

    def needs(self) -> frozenset[str]:
        """As post-training quantization: the inputs' range for static activation scales."""
        return common.activation_needs(self.activation)


class FakeQuantValues(Step, frozen=True, tag="fake_quant_values"):
    """Quantizes values that the model names with ``jax.ad_checkpoint.checkpoint_name``.

    The reference models name "query", "key", "value" (as they enter the KV cache) and "hidden".

    Attributes:
      include: globs over names of values, not over weights.
      activation: how they are quantized; a token is the last axis.
      observer: as in ``FakeQuant``, for static scales.
      percentile: as in ``FakeQuant``.
      momentum: of the moving averages.
    """

    activation: Activation = msgspec.field(default_factory=Activation)
    observer: Literal["ema", "percentile", "learned", "pact"] = "ema"
    percentile: float = 99.9
    momentum: float = 0.95


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """A grid placed on the weights at each call."""

    format: Element
    clipping: str = "minmax"
    percentile: float = 99.9
    estimator: str = "ste"

    def check(self, shape, path):
        """Checks options and format."""
        grid.check(self.format, shape, path)
        checks.check_choice("clipping", self.clipping, checks.CLIPPINGS, path)
        if self.clipping == "percentile":
            check_share(path, self.percentile)
        checks.check_choice("estimator", self.estimator, ESTIMATORS, path)

    def init(self, w):
        """Nothing is learned."""
        del w
        return {}

    def apply(self, w, learned, bits):
        """Rounds to nearest."""
        del learned
        if bits is not None:
            return _at_width(w, self.format, bits)
        options = self.clipping, self.percentile, self.estimator
        return fake_quantize(w, self.format, *options)

    def convert(self, w, learned):
        """As ``rtn``."""
        del learned
        return grid.quantize(self.format, w, self.clipping, self.percentile)


@dataclasses.dataclass(frozen=True)
class Learned:
    """A grid whose step size is trained."""

    format: Element
    start: str = "mse"

    def check(self, shape, path):
        """Checks options and format."""
        grid.check(self.format, shape, path)
        check_learnable(self.format, path)
        checks.check_choice("start", self.start, STARTS, path)

    def init(self, w):
        """Step sizes, and offsets of asymmetric grids."""
        return initial_scales(w, self.format, self.start)

    def apply(self, w, learned, bits):
        """Rounds to the learned grid."""
        del bits
        return lsq(w, self.format, learned)

    def convert(self, w, learned):
        """Codes on the learned grid."""
        qparams = learned_qparams(self.format, learned)
        context = grid.prepare(self.format, w)
        spread = grid.expand(self.format, qparams, *w.shape[-2:])
        codes = grid.encode(self.format, w, spread, context)
        return grid.build(self.format, codes, qparams, context)


@dataclasses.dataclass(frozen=True)
class FewLevels:
    """Ternary or binary weights, their scale that of the weights at each call.

    All gradients pass straight through. (BiBERT stops those of |w| > 1, which assumes weights of
    that size; here they have their pretrained one.)
    """

    step: Ternary | Binary

    def check(self, shape, path):
        """Checks the groups."""
        groups = self.step.group_size, self.step.out_group_size
        grid.check(Int(8, groups[0], out_group_size=groups[1]), shape, path)
        if getattr(self.step, "method", None) == "lat":
            raise RecipeError(
                f'{path}: method="lat" weighs by statistics of calibration, which training has '
                'none of; use "twn" or "optimal"'
            )

    def init(self, w):
        """Nothing is learned."""
        del w
        return {}

    def apply(self, w, learned, bits):
        """Rounds to the levels."""
        del learned, bits
        values = ternary_values if isinstance(self.step, Ternary) else binary_values
        return straight_through(w, values(jax.lax.stop_gradient(w), **self.options)[0])

    def convert(self, w, learned):
        """As ``ternary`` and ``binary``."""
        del learned
        convert = ternary if isinstance(self.step, Ternary) else binary
        return convert(w, **self.options).parts[0]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the functions."""
        names = ["group_size", "out_group_size", "scale_dtype"]
        names += ["method"] if isinstance(self.step, Ternary) else ["center"]
        return {name: getattr(self.step, name) for name in names}


def _at_width(w: jax.Array, fmt: Int, bits: jax.Array) -> jax.Array:
    """Integers of a width known only when the program runs; the range is that of the weights."""
    *stack, out, cols = w.shape
    fixed = jax.lax.stop_gradient(w).astype(common.working_dtype(w))
    og = out if fmt.out_group_size is None else fmt.out_group_size
    groups = fixed.reshape(*stack, out // og, og, -1, grid.group_size_of(fmt, cols))
    high = jnp.maximum(groups.max((-3, -1)), 0)
    low = jnp.minimum(groups.min((-3, -1)), 0)
    levels = 2.0 ** jnp.clip(bits, 2, 8).astype(fixed.dtype) - 1
    absmax = jnp.maximum(-low, high)
    most, zero = (levels - 1) / 2, None
    if not fmt.symmetric:
        empty = absmax == 0
        low, high = jnp.where(empty, -1, low), jnp.where(empty, 1, high)
        scale, least, most = grid.divided(high - low, levels), 0, levels
        zero = jnp.round(-low / grid.representable(fmt, scale))
    elif fmt.full_range:
        scale, least = grid.divided(2 * absmax, levels), -most - 1
    else:
        scale, least = grid.divided(absmax, most), -most
    qparams = grid.QParams(grid.representable(fmt, scale), zero)
    spread = grid.expand(fmt, qparams, out, cols)
    offset = 0 if zero is None else spread.zero_point
    codes = jnp.round(grid.scaled(fixed, spread)) + offset
    return straight_through(w, (jnp.clip(codes, least, most) - offset) * spread.scale)


@weight_quantizer.register
def _(step: RTN) -> WeightQuantizer:
    return Dynamic(step.format, step.clipping, step.percentile)


@weight_quantizer.register
def _(step: FakeQuant) -> WeightQuantizer | None:
    if step.quantize_gradients and step.matmul == "simulated":
        raise RecipeError(
            "fake_quant: quantize_gradients multiplies codes backward, so it needs "
            'matmul="int8" or "fp8"'
        )
    if step.format is None:
        return None
    if step.scale == "learned":
        if (step.clipping, step.estimator) != ("minmax", "ste"):
            raise RecipeError(
                'fake_quant with scale="learned" has no clipping and no estimator: its ends are '
                'learned (start="mse" begins from clipped ones); leave them out, or use '
                'scale="dynamic"'
            )
        return Learned(step.format, step.start)
    return Dynamic(step.format, step.clipping, step.percentile, step.estimator)


@weight_quantizer.register(Ternary)
@weight_quantizer.register(Binary)
def _(step: Ternary | Binary) -> WeightQuantizer:
    return FewLevels(step)


@weight_quantizer.register
def _(step: FakeQuantValues) -> None:
    return None


@run.register
def _(step: FakeQuant, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """After training: what ``convert`` of an untrained model would give."""
    if step.format is None or step.scale == "learned":
        raise RecipeError(
            "fake_quant without a format or with learned scales has nothing to store before "
            "training; use rtn here, or jc.qat and its convert"
        )
    options = {name: getattr(step, name) for name in ("clipping", "percentile", "activation")}
    return run(RTN(format=step.format, **options), layers)
