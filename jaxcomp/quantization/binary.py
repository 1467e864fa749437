"""Binary weights: every weight becomes -a or +a, with one a for each group.

    w ~ a sign(w),    a = mean|w|

is the least-squares optimum (BWN, XNOR-Net); on N(0, 1) its relative error is 1 - 2/pi = 0.3634.
With ``center`` the signs are those of w less the mean of its group, sign(w - mean(w)), which splits
a group in halves and keeps most information in the signs; a stays mean|w| (BiBERT).

sign(0) is +1, and a group of zeros has a = 0.

Differs from the papers in: groups of any size besides their rows.

Source: Rastegari et al., XNOR-Net, arXiv 1603.05279; Qin et al., BiBERT, arXiv 2203.06390.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcomp.errors import JaxcompError
from jaxcomp.formats.compressed import CompressedArray
from jaxcomp.quantization import checks, common
from jaxcomp.quantization.ternary import (
    check_groups,
    from_groups,
    store,
    to_groups,
    to_values,
)
from jaxcomp.step import Activation, Layer, Step, run


class Binary(Step, frozen=True, tag="binary"):
    """Weights in {-a, a}.

    Attributes:
      group_size: consecutive inputs that share an a; None is one group a row.
      out_group_size: consecutive outputs that share an a; None, with ``group_size`` None, is one a
        for the whole matrix.
      center: signs are those of the weights less their group's mean (BiBERT).
      scale_dtype: dtype in which a is stored.
      activation: how the input is quantized at run time; None leaves it alone.
    """

    group_size: int | None = None
    out_group_size: int | None = 1
    center: bool = False
    scale_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    activation: Activation | None = None

    def needs(self) -> frozenset[str]:
        """Nothing, or the inputs' range for static activation scales."""
        return common.activation_needs(self.activation)


@functools.partial(jax.jit, static_argnames=("group_size", "out_group_size", "center"))
def _fit(w, *, group_size, out_group_size, center):
    w = w.astype(common.working_dtype(w))
    g, shape = to_groups(w, group_size, out_group_size)
    scale = jnp.abs(g).mean(-1)
    if center:
        g = g - g.mean(-1, keepdims=True)
    codes = jnp.where(g < 0, -1, 1).astype(jnp.int8)
    return from_groups(codes, shape, group_size), scale


def binary_codes(
    w: jax.Array,
    group_size: int | None = None,
    out_group_size: int | None = 1,
    center: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Signs and scales of binary weights, element-wise and safe under jit.

    Args:
      w: ``(*stack, out, in)``.
      group_size: as in ``Binary``.
      out_group_size: as in ``Binary``.
      center: as in ``Binary``.

    Returns:
      int8 codes -1 and 1 like ``w``, and scales ``(*stack, out_groups, in_groups)``.

    Raises:
      JaxcompError: groups that do not divide the matrix.
    """
    check_groups(w, group_size, out_group_size)
    return _fit(w, group_size=group_size, out_group_size=out_group_size, center=center)


def binary_values(
    w: jax.Array,
    group_size: int | None = None,
    out_group_size: int | None = 1,
    center: bool = False,
    scale_dtype: str = "float32",
) -> tuple[jax.Array, jax.Array]:
    """Binary weights as a dense matrix, for training: what ``binary`` materializes.

    Args:
      w: ``(*stack, out, in)``.
      group_size: as in ``Binary``.
      out_group_size: as in ``Binary``.
      center: as in ``Binary``.
      scale_dtype: as in ``Binary``.

    Returns:
      Values like ``w`` (in its dtype) and scales ``(*stack, out_groups, in_groups)``.

    Example:
      >>> values, scale = binary_values(jnp.array([[3.0, -1.0]]))
      >>> values.tolist(), scale.tolist()
      ([[2.0, -2.0]], [[2.0]])
    """
    codes, scale = binary_codes(w, group_size, out_group_size, center)
    return to_values(codes, scale, w.dtype, scale_dtype)


def binary(
    w: jax.Array,
    group_size: int | None = None,
    out_group_size: int | None = 1,
    center: bool = False,
    scale_dtype: str = "float32",
    activation: Activation | None = None,
) -> CompressedArray:
    """Stores a weight as -a and +a, 1 bit each and one a for every group.

    Args:
      w: ``(*stack, out, in)`` float.
      group_size: consecutive inputs that share an a; None is one group a row.
      out_group_size: consecutive outputs that share an a; None is all.
      center: signs are those of the weights less their group's mean (BiBERT).
      scale_dtype: dtype in which a is stored.
      activation: how the input is quantized when the weight is used (dynamic scales).

    Returns:
      A compressed array of the shape and dtype of ``w``.

    Raises:
      JaxcompError: groups that do not divide the matrix, or weights that are not finite.

    Example:
      >>> w = binary(jnp.array([[3.0, -1.0]]))
      >>> w.materialize().tolist(), w.nbits
      ([[2.0, -2.0]], 104)

    Source: https://arxiv.org/abs/1603.05279; https://arxiv.org/abs/2203.06390.
    """
    options = dict(group_size=group_size, out_group_size=out_group_size, center=center)
    parts, _ = _parts(w, None, scale_dtype, options, "")
    return common.compressed(common.with_activation(parts, activation), w)


def _parts(w: Any, mask: Any, scale_dtype: str, options: dict, path: str):
    if mask is not None:
        raise JaxcompError(
            f"{path} {tuple(w.shape)}: a pruned weight needs a zero among its values, which binary "
            "weights do not have; use Ternary, or exclude this path"
        )
    checks.check_weight(w, path)
    check_groups(w, options["group_size"], options["out_group_size"], path)
    codes, scale = _fit(w, **options)
    part, values = store(codes, scale, levels=(-1.0, 1.0), scale_dtype=scale_dtype)
    return (part,), values


@run.register
def _(step: Binary, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    options = {name: getattr(step, name) for name in ("group_size", "out_group_size", "center")}
    results = []
    for layer in layers:
        parts, values = _parts(layer.weight, layer.mask, step.scale_dtype, options, layer.path)
        results.append(common.quantized(layer, parts, values, step.activation))
    return tuple(results)
