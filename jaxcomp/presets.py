"""Recipes by name: the usual ways to compress a model, each a function that returns a ``Recipe``.

All leave the output head dense where it has its usual name, as the papers do, and the routers of
experts, which are small and decide much (``exclude=("*lm_head*", "*router*")``); embeddings are
compressed only by a recipe that names them.
"""

import collections.abc
import os
import pathlib
from typing import Literal

from jaxcomp.errors import RecipeError
from jaxcomp.formats.spec import Codebook, Float, Int
from jaxcomp.pruning import Magnitude, SparseGPT, Wanda
from jaxcomp.quantization import AWQ, GPTQ, RTN, FakeQuant, LLMInt8, SmoothQuant
from jaxcomp.recipe import KEPT, Recipe
from jaxcomp.step import Activation

Rules = tuple[str, ...]
ALL: Rules = ("*",)


def _weights(bits: int, group_size: int | None, symmetric: bool) -> Int:
    # A group's scale in bfloat16 costs 16 / group_size bits a weight, and at 4 bits and below its
    # rounding is far finer than a step.
    return Int(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype="bfloat16")


def w4a16_rtn(
    group_size: int | None = 128,
    symmetric: bool = True,
    clipping: Literal["minmax", "mse", "percentile"] = "minmax",
    include: Rules = ALL,
    exclude: Rules = KEPT,
) -> Recipe:
    """4-bit weights, rounded to nearest; needs no calibration data.

    Args:
      group_size: consecutive inputs that share a scale; None is one scale a row.
      symmetric: without zero points.
      clipping: how the range of a group is chosen.
      include: rules for the weights it applies to.
      exclude: rules for the weights it leaves alone.

    Returns:
      The recipe.

    Example:
      >>> w4a16_rtn(group_size=64).steps[0].format.group_size
      64
    """
    return _rtn(4, group_size, symmetric, clipping, include, exclude)


def w3a16_rtn(
    group_size: int | None = 128,
    symmetric: bool = False,
    clipping: Literal["minmax", "mse", "percentile"] = "minmax",
    include: Rules = ALL,
    exclude: Rules = KEPT,
) -> Recipe:
    """3-bit weights, rounded to nearest, with zero points; arguments as in ``w4a16_rtn``."""
    return _rtn(3, group_size, symmetric, clipping, include, exclude)


def w2a16_rtn(
    group_size: int | None = 128,
    symmetric: bool = False,
    clipping: Literal["minmax", "mse", "percentile"] = "minmax",
    include: Rules = ALL,
    exclude: Rules = KEPT,
) -> Recipe:
    """2-bit weights, rounded to nearest, with zero points; arguments as in ``w4a16_rtn``."""
    return _rtn(2, group_size, symmetric, clipping, include, exclude)


def _rtn(bits, group_size, symmetric, clipping, include, exclude) -> Recipe:
    step = RTN(
        format=_weights(bits, group_size, symmetric),
        clipping=clipping,
        include=include,
        exclude=exclude,
    )
    return Recipe(steps=(step,))


def w4a16_gptq(
    group_size: int | None = 128,
    symmetric: bool = True,
    order: Literal["natural", "activation"] = "natural",
    static_groups: bool | None = None,
    damping: float = 0.01,
    include: Rules = ALL,
    exclude: Rules = KEPT,
) -> Recipe:
    """4-bit weights, each rounding error corrected by the weights not yet rounded (GPTQ).

    Args:
      group_size: consecutive inputs that share a scale; None is one scale a row.
      symmetric: without zero points.
      order: inputs as they are, or those with the largest activations first.
      static_groups: fit the scales of all groups first; None does so for the activation order only.
      damping: added to the Hessian's diagonal, as a fraction of its mean.
      include: rules for the weights it applies to.
      exclude: rules for the weights it leaves alone.

    Returns:
      The recipe.
    """
    return _gptq(4, group_size, symmetric, order, static_groups, damping, include, exclude)


def w3a16_gptq(
    group_size: int | None = 128,
    symmetric: bool = False,
    order: Literal["natural", "activation"] = "natural",
    static_groups: bool | None = True,
    damping: float = 0.01,
    include: Rules = ALL,
    exclude: Rules = KEPT,
) -> Recipe:
    """3-bit weights with GPTQ and zero points; arguments as in ``w4a16_gptq``.

    Scales are fitted to the original weights: below 4 bits, groups fitted to weights that already
    carry their predecessors' errors come out worse (``python -m benchmarks.quality``).
    """
    return _gptq(3, group_size, symmetric, order, static_groups, damping, include, exclude)


def w2a16_gptq(
    group_size: int | None = 128,
    symmetric: bool = False,
    order: Literal["natural", "activation"] = "natural",
    static_groups: bool | None = True,
    damping: float = 0.01,
    include: Rules = ALL,
    exclude: Rules = KEPT,
) -> Recipe:
    """2-bit weights with GPTQ and zero points; arguments as in ``w4a16_gptq``.

    Scales are fitted to the original weights: below 4 bits, groups fitted to weights that already
    carry their predecessors' errors come out worse (``python -m benchmarks.quality``).
    """
    return _gptq(2, group_size, symmetric, order, static_groups, damping, include, exclude)


def _gptq(bits, group_size, symmetric, order, static_groups, damping, include, exclude) -> Recipe:
    step = GPTQ(
        format=_weights(bits, group_size, symmetric),
        order=order,
        static_groups=static_groups,
        damping=damping,
        include=include,
        exclude=exclude,
    )
    return Recipe(steps=(step,))


def w4a16_awq(
    group_size: int | None = 128,
    symmetric: bool = False,
    include: Rules = ALL,
    exclude: Rules = KEPT,
) -> Recipe:
    """4-bit weights, salient inputs scaled up before they are rounded (AWQ), with zero points.

    Args:
      group_size: consecutive inputs that share a scale; None is one scale a row.
      symmetric: without zero points.
      include: rules for the weights it applies to.
      exclude: rules for the weights it leaves alone.

    Returns:
      The recipe.
    """
    return _awq(4, group_size, symmetric, include, exclude)


def w3a16_awq(
    group_size: int | None = 128,
    symmetric: bool = False,
    include: Rules = ALL,
    exclude: Rules = KEPT,
) -> Recipe:
    """3-bit weights with AWQ and zero points; arguments as in ``w4a16_awq``."""
    return _awq(3, group_size, symmetric, include, exclude)


def _awq(bits, group_size, symmetric, include, exclude) -> Recipe:
    format = _weights(bits, group_size, symmetric)
    return Recipe(steps=(AWQ(format=format, include=include, exclude=exclude),))


_INT8 = Int(bits=8, full_range=False)


def w8a8_smoothquant(
    alpha: float = 0.5,
    granularity: Literal["token", "tensor"] = "token",
    dynamic: bool = True,
    include: Rules = ALL,
    exclude: Rules = KEPT,
) -> Recipe:
    """8-bit weights and activations, outliers smoothed into the weights first (SmoothQuant).

    Args:
      alpha: how much of the difficulty moves from activations to weights, 0 to 1.
      granularity: one activation scale a token, or one a tensor.
      dynamic: activation scales computed at each call, or frozen from calibration ("tensor" only).
      include: rules for the weights it applies to.
      exclude: rules for the weights it leaves alone.

    Returns:
      The recipe.
    """
    activation = Activation(format="int8", granularity=granularity, dynamic=dynamic)
    smooth = SmoothQuant(alpha=alpha, include=include, exclude=exclude)
    return Recipe(
        steps=(
            smooth,
            RTN(format=_INT8, activation=activation, include=include, exclude=exclude),
        )
    )


def w8a8_dynamic(include: Rules = ALL, exclude: Rules = KEPT) -> Recipe:
    """8-bit weights, one scale a row, and 8-bit activations, one scale a token; needs no data."""
    step = RTN(format=_INT8, activation=Activation(), include=include, exclude=exclude)
    return Recipe(steps=(step,))


def fp8_dynamic(include: Rules = ALL, exclude: Rules = KEPT) -> Recipe:
    """fp8 (e4m3) weights, one scale a row, and activations, one scale a token; needs no data."""
    step = RTN(
        format=Float(kind="e4m3"),
        activation=Activation(format="e4m3"),
        include=include,
        exclude=exclude,
    )
    return Recipe(steps=(step,))


def llm_int8(threshold: float = 6.0, include: Rules = ALL, exclude: Rules = KEPT) -> Recipe:
    """8-bit weights and activations, inputs beyond ``threshold`` kept in float (LLM.int8())."""
    return Recipe(steps=(LLMInt8(threshold=threshold, include=include, exclude=exclude),))


def nf4(
    group_size: int | None = 64,
    double_quantization: bool = False,
    include: Rules = ALL,
    exclude: Rules = KEPT,
) -> Recipe:
    """4-bit weights on the NormalFloat grid of QLoRA, absmax scales; needs no data.

    Args:
      group_size: consecutive inputs that share a scale; None is one group a row.
      double_quantization: scales stored in 8 bits under second scales, as QLoRA's base.
      include: rules for the weights it applies to.
      exclude: rules for the weights it leaves alone.

    Returns:
      The recipe.
    """
    format = Codebook(
        kind="nf4",
        group_size=group_size,
        scale_dtype="float32" if double_quantization else "bfloat16",
        double_quantization=double_quantization,
    )
    return Recipe(steps=(RTN(format=format, include=include, exclude=exclude),))


def w2a16_qat(group_size: int | None = 64, include: Rules = ALL, exclude: Rules = KEPT) -> Recipe:
    """For ``jc.qat``: 2-bit weights whose step sizes are trained (LSQ)."""
    format = Int(bits=2, group_size=group_size, scale_dtype="bfloat16")
    step = FakeQuant(format=format, scale="learned", include=include, exclude=exclude)
    return Recipe(steps=(step,))


def w4a8_qat(group_size: int | None = 128, include: Rules = ALL, exclude: Rules = KEPT) -> Recipe:
    """For ``jc.qat``: 4-bit weights, 8-bit inputs with one dynamic scale a token."""
    format = Int(bits=4, group_size=group_size, full_range=False, scale_dtype="bfloat16")
    step = FakeQuant(format=format, activation=Activation(), include=include, exclude=exclude)
    return Recipe(steps=(step,))


def magnitude(
    sparsity: float | None = None,
    n: int | None = None,
    m: int | None = None,
    include: Rules = ALL,
    exclude: Rules = KEPT,
) -> Recipe:
    """The smallest weights dropped; needs no data.

    Args:
      sparsity: fraction of weights to drop; give this, or ``n`` and ``m``.
      n: weights kept of every ``m`` consecutive inputs.
      m: size of such a block.
      include: rules for the weights it applies to.
      exclude: rules for the weights it leaves alone.

    Returns:
      The recipe.
    """
    pattern = _pattern(sparsity, n, m)
    return Recipe(steps=(Magnitude(**pattern, include=include, exclude=exclude),))


def wanda(
    sparsity: float | None = None,
    n: int | None = None,
    m: int | None = None,
    include: Rules = ALL,
    exclude: Rules = KEPT,
) -> Recipe:
    """Weights with the smallest |w| * ‖x‖ dropped (Wanda); arguments as in ``magnitude``."""
    pattern = _pattern(sparsity, n, m)
    return Recipe(steps=(Wanda(**pattern, include=include, exclude=exclude),))


def sparsegpt(
    sparsity: float | None = None,
    n: int | None = None,
    m: int | None = None,
    include: Rules = ALL,
    exclude: Rules = KEPT,
) -> Recipe:
    """Weights dropped, the others corrected for it (SparseGPT); arguments as in ``magnitude``."""
    pattern = _pattern(sparsity, n, m)
    return Recipe(steps=(SparseGPT(**pattern, include=include, exclude=exclude),))


def sparsegpt_int4(
    n: int = 2,
    m: int = 4,
    group_size: int | None = 128,
    symmetric: bool = True,
    include: Rules = ALL,
    exclude: Rules = KEPT,
) -> Recipe:
    """N of every M weights kept and those quantized to 4 bits, in one solve (SparseGPT, joint).

    Args:
      n: weights kept of every ``m`` consecutive inputs.
      m: size of such a block.
      group_size: consecutive inputs, dropped ones counted, that share a scale.
      symmetric: without zero points.
      include: rules for the weights it applies to.
      exclude: rules for the weights it leaves alone.

    Returns:
      The recipe.
    """
    step = SparseGPT(
        n=n, m=m, format=_weights(4, group_size, symmetric), include=include, exclude=exclude
    )
    return Recipe(steps=(step,))


def _pattern(sparsity: float | None, n: int | None, m: int | None) -> dict:
    if (sparsity is None) == (n is None and m is None) or (n is None) != (m is None):
        raise RecipeError("give either sparsity, or both n and m: sparsity=0.5, or n=2, m=4.")
    return {"sparsity": sparsity} if n is None else {"n": n, "m": m}


def named() -> dict[str, Recipe]:
    """All recipes that the command line and ``configs/`` know by name."""
    return {name: make() for name, make in _NAMED.items()}


def get(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
      RecipeError: there is none; the message lists all.
    """
    if name not in _NAMED:
        raise RecipeError(f"no preset is called {name!r}; there are {', '.join(_NAMED)}.")
    return _NAMED[name]()


def write(folder: str | os.PathLike) -> list[pathlib.Path]:
    """Writes every named recipe to a YAML file in ``folder``, the origin of ``configs/``."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return [_write(folder / f"{name}.yaml", make()) for name, make in _NAMED.items()]


def _write(path: pathlib.Path, recipe: Recipe) -> pathlib.Path:
    recipe.dump(path)
    return path


_NAMED: dict[str, collections.abc.Callable[[], Recipe]] = {
    "w4a16_rtn": w4a16_rtn,
    "w3a16_rtn": w3a16_rtn,
    "w2a16_rtn": w2a16_rtn,
    "w4a16_gptq": w4a16_gptq,
    "w3a16_gptq": w3a16_gptq,
    "w2a16_gptq": w2a16_gptq,
    "w4a16_awq": w4a16_awq,
    "w3a16_awq": w3a16_awq,
    "w2a16_qat": w2a16_qat,
    "w4a8_qat": w4a8_qat,
    "w8a8_smoothquant": w8a8_smoothquant,
    "w8a8_dynamic": w8a8_dynamic,
    "fp8_dynamic": fp8_dynamic,
    "llm_int8": llm_int8,
    "nf4": nf4,
    "magnitude_50": lambda: magnitude(sparsity=0.5),
    "magnitude_2_4": lambda: magnitude(n=2, m=4),
    "wanda_50": lambda: wanda(sparsity=0.5),
    "wanda_2_4": lambda: wanda(n=2, m=4),
    "sparsegpt_50": lambda: sparsegpt(sparsity=0.5),
    "sparsegpt_2_4": lambda: sparsegpt(n=2, m=4),
    "sparsegpt_2_4_int4": sparsegpt_int4,
}
