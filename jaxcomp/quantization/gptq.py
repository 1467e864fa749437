"""GPTQ: rounds column after column, each time moving the free columns to make up for the error.

With H the sum of x xᵀ over the calibration inputs, damped by a fraction of its mean diagonal, and
U the upper Cholesky factor of its inverse (H⁻¹ = Uᵀ U), for k = 1 .. in and all rows at once:

    q_k = Q(w_k),   e_k = (w_k - q_k) / U_kk,   w_j <- w_j - e_k U_kj   for j > k.

A group's scale is fitted when the loop reaches the group, to the weights as they stand by then, or
(``static_groups``) to the original weights before the loop. With ``order="activation"`` columns
are taken by decreasing diagonal of H; without static groups the groups then follow that order and
each input's group is stored. The loop itself is in ``obs``.

Differs from the paper's code in:
1. A group that starts inside a lazy block is fitted to weights that hold all earlier errors; the
   released code leaves out those of the same block.
2. Inputs that are always zero get the mean diagonal instead of 1, so that the result does not
   depend on the scale of H; their weights become zero as there. Without any input at all (an
   expert that saw no token) the weights are kept and rounded.
3. Where the damped H is still not positive definite the damping is raised tenfold until it is, and
   reported.
4. The grid may be any element format, with a mask of pruned weights that stay zero.

Source: GPTQ, https://arxiv.org/abs/2210.17323.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.calibration import Unsummed
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import grid
from jaxcomp.formats.affine import packed
from jaxcomp.formats.compressed import CompressedArray
from jaxcomp.formats.spec import Codebook, Element, Int
from jaxcomp.quantization import checks, common, obs
from jaxcomp.quantization.factored import LAPACK, factor_of, restore
from jaxcomp.step import Activation, Layer, Step, run


class GPTQ(Step, frozen=True, tag="gptq"):
    """Rounds weights so that the layer's output changes least.

    Attributes:
      format: what weights become.
      damping: fraction of the mean diagonal added to the Hessian.
      block_size: columns of a lazy block; changes speed, not the result.
      order: columns from left to right, or by decreasing activation.
      static_groups: fit all scales before the loop; None does so for the activation order only.
      clipping: how a group's range is chosen.
      percentile: of the magnitudes, for ``clipping="percentile"``.
      activation: how the input is quantized at run time; None leaves it alone.
    """

    format: Element
    damping: float = 0.01
    block_size: int = 128
    order: Literal["natural", "activation"] = "natural"
    static_groups: bool | None = None
    clipping: str = "minmax"
    percentile: float = 99.9
    activation: Activation | None = None

    def needs(self) -> frozenset[str]:
        """The Hessian, and the inputs' range for static activation scales."""
        return frozenset({"hessian"}) | common.activation_needs(self.activation)

    def by_matrix(self) -> bool:
        """Yes."""
        return True

    def overwrites_hessian(self) -> bool:
        """If the columns stay in their order."""
        return self.order == "natural"


class _Rows(NamedTuple):
    """What the loop gives: arrays with the rows (outputs) first; ``context`` may be shared.

    On the host the codes of dense integers are packed: those of one slab of rows exist apart.
    """

    codes: jax.Array
    qparams: Any
    context: Any
    energy: Any


_STATIC = ("fmt", "block_size", "static", "clipping", "percentile", "report")


def _hessian(h, damping, *, order):
    """Factor of the inverse Hessian in the order of the columns, and that order."""
    permutation = _permutation(h, order)
    if permutation is not None:
        h = h[permutation][:, permutation]
    return obs.inverse_factor(h, damping), permutation


def _permutation(h, order):
    return (-h.diagonal()).argsort(stable=True) if order == "activation" else None


def _rows(w, mask, h, upper, permutation, *, fmt, block_size, static, clipping, percentile, report):
    """Quantizes rows of a matrix; on the host, with LAPACK's factor for ``h`` and ``upper``."""
    size, on_host = w.shape[-1], isinstance(h, LAPACK)
    if on_host:  # In the order of the columns; the solver converts the weight.
        diagonal = h.diagonal if permutation is None else h.diagonal[permutation.argsort()]
    else:
        w, h = w.astype(upper.dtype), h.astype(upper.dtype)
        diagonal = h.diagonal()
    original = w
    group = grid.group_size_of(fmt, size)
    dead = (diagonal <= 0) & (diagonal > 0).any()
    if not on_host or dead.any():
        w = w * ~dead
    importance = None
    if mask is not None:
        w = w * mask
    if isinstance(fmt, Codebook):
        importance = jnp.broadcast_to(diagonal, w.shape)
    context = grid.prepare(fmt, w, importance)
    qparams = column_group = None
    if static or group == size:
        fit = functools.partial(grid.fit, clipping=clipping, percentile=percentile)
        qparams = fit(fmt, w, context, mask=mask)
    if permutation is not None:
        column_group = permutation // group
        w = w[:, permutation]
        original = original[:, permutation] if on_host else original
        mask = None if mask is None else mask[:, permutation]
    solution = obs.solve(
        w,
        upper,
        fmt=fmt,
        context=context,
        qparams=qparams,
        column_group=column_group,
        mask=mask,
        block_size=block_size,
        clipping=clipping,
        percentile=percentile,
    )
    values, codes, qparams = solution.values, solution.codes, solution.qparams
    del solution
    if on_host:
        energy = common.energies(original, values, h) if report else None
    if permutation is not None:
        back = permutation.argsort()
        values, codes = None if on_host else values[:, back], codes[:, back]
    if not on_host:
        energy = common.energies(original, values, h) if report else None
    elif _packs(fmt, mask):
        codes = packed(codes, fmt.bits)
    return _Rows(codes, qparams, context, energy)


def _packs(fmt: Element, mask: Any) -> bool:
    """Whether codes of rows on the host are packed as soon as they are known."""
    return isinstance(fmt, Int) and mask is None


def _in_memory_of(h, dtype, damping, order, owned) -> tuple[LAPACK, Any]:
    """What ``_hessian`` gives, on the host.

    The Hessian's own memory is taken if it is ``owned``, to be restored; otherwise a copy's. One
    that is yet to be summed is only there as its factor.
    """
    if order == "natural":
        return factor_of(h, dtype, damping, owned), None
    h = h.whole() if isinstance(h, Unsummed) else np.asarray(h)
    permutation = _permutation(h, order)
    h = h[np.ix_(permutation, permutation)]
    return factor_of(h, dtype, damping, owned=True), permutation


@functools.partial(jax.jit, static_argnames=(*_STATIC, "order"))
def _gptq(w, h, mask, damping, *, order, **options):
    def one(w, h, mask):
        factor, permutation = _hessian(h.astype(common.working_dtype(w)), damping, order=order)
        return _rows(w, mask, h, factor.upper, permutation, **options), factor, permutation

    return common.over_stack(one, w, (h, 2), (mask, 2))


def _solve(w, h, mask, nm, path, options, report, known=None, owned=False):
    """Checks everything and runs the algorithm.

    Args:
      w: the weight.
      h: its Hessian.
      mask: its mask or None.
      nm: the mask's pattern or None.
      path: its name.
      options: of ``gptq``.
      report: also compute the error.
      known: what was returned last for this very ``h``, if it was called before.
      owned: whether ``h``, of NumPy, may be written to: it has to be restored (``known``) after.

    Returns:
      Parts, the damping used, the error (None without ``report``), and on the host the factor and
      the order of the columns.
    """
    fmt, order, damping = options["fmt"], options["order"], options["damping"]
    checks.check_format(fmt, w, mask, nm, path)
    checks.check_choice("clipping", options["clipping"], checks.CLIPPINGS, path)
    checks.check_choice("order", order, ("natural", "activation"), path)
    checks.check_damping(damping, options["block_size"], path)
    static = options["static_groups"]
    static = order == "activation" if static is None else static
    size = w.shape[-1]
    group = grid.group_size_of(fmt, size)
    scattered = order == "activation" and not static and group != size
    if scattered and (mask is not None or not isinstance(fmt, Int)):
        raise JaxcompError(
            f"{path + ': ' if path else ''}groups in activation order can be stored for dense "
            "integers only; use static_groups=True"
        )
    checks.check_weight(w, path)
    if known is None:
        checks.check_hessian(h, w, path)
    chosen = {name: options[name] for name in ("fmt", "block_size", "clipping", "percentile")}
    chosen |= {"static": static, "report": report}
    in_size = None
    if common.splits_rows(w, h, fmt) or common.spreads_rows(w, h, fmt):
        in_size = size if _packs(fmt, mask) else None
        if known is None:
            dtype = common.working_dtype(w)
            known = common.by_itself(w, lambda: _in_memory_of(h, dtype, damping, order, owned))
        factor, permutation = known
        rows = common.by_rows(
            lambda w, mask: _rows(w, mask, factor, factor, permutation, **chosen),
            w,
            mask,
            rows=common.slab_rows(size),
        )
    else:
        h = h.whole() if isinstance(h, Unsummed) else h
        solve = functools.partial(_gptq, damping=damping, order=order, **chosen)
        if common.spreads_stack(w, h):
            rows, factor, permutation = common.by_stack(solve, w, (h, 2), (mask, 2))
        else:
            rows, factor, permutation = solve(w, h, mask)
    group_index = None
    if scattered:
        group_index = (permutation.argsort(axis=-1) // group).astype(jnp.int32)
    part = None
    if in_size is not None:
        part = grid.build(fmt, rows.codes, rows.qparams, rows.context, group_index, in_size)
    rounded = common.Rounded(None, rows.codes, rows.qparams, rows.context, group_index, part)
    parts = common.store(fmt, rounded, mask, nm)
    error = common.error_of(rows.energy) if report else None
    return parts, factor.damping, error, known


def gptq(
    w: jax.Array,
    h: jax.Array,
    fmt: Element,
    damping: float = 0.01,
    block_size: int = 128,
    order: Literal["natural", "activation"] = "natural",
    static_groups: bool | None = None,
    clipping: str = "minmax",
    percentile: float = 99.9,
    activation: Activation | None = None,
    mask: jax.Array | None = None,
    nm: tuple[int, int] | None = None,
) -> CompressedArray:
    """Quantizes a weight so that its output on the calibration inputs changes least.

    Args:
      w: ``(*stack, out, in)`` float.
      h: ``(in, in)`` or ``(*stack, in, in)``, sum or mean of x xᵀ over the inputs; any positive
        multiple gives the same result.
      fmt: element format, ``Int``, ``Float`` or ``Codebook``.
      damping: fraction of the mean diagonal of ``h`` added to its diagonal.
      block_size: columns of a lazy block; changes speed, not the result.
      order: "natural" or "activation" (decreasing diagonal of ``h``).
      static_groups: fit all scales to the original weights before the loop; None does so for the
        activation order only. The activation order without static groups stores each input's group.
      clipping: "minmax", "mse" or "percentile".
      percentile: of the magnitudes in a group, in percent, for ``clipping="percentile"``.
      activation: how the input is quantized when the weight is used (dynamic scales).
      mask: bool like ``w``, False where the weight is zero and stays so.
      nm: (n, m) if ``mask`` has that pattern, to store it as such.

    Returns:
      A compressed array of the shape and dtype of ``w``.

    Raises:
      JaxcompError: the format does not fit the shape, an option is out of its range, or values are
        not finite.

    Example:
      >>> from jaxcomp.formats.spec import Int
      >>> w = jnp.array([[0.3, -0.7, 0.6], [1.0, 0.2, -0.4]])
      >>> h = jnp.array([[2.0, 1.0, 0.5], [1.0, 2.0, 1.0], [0.5, 1.0, 2.0]])
      >>> gptq(w, h, Int(4)).shape
      (2, 3)

    Source: https://arxiv.org/abs/2210.17323, algorithm 1.
    """
    options = dict(
        fmt=fmt,
        damping=damping,
        block_size=block_size,
        order=order,
        static_groups=static_groups,
        clipping=clipping,
        percentile=percentile,
    )
    parts, *_ = _solve(w, h, mask, nm, "", options, report=False)
    return common.compressed(common.with_activation(parts, activation), w)


@run.register
def _(step: GPTQ, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    names = ("damping", "block_size", "order", "static_groups", "clipping", "percentile")
    options = {"fmt": step.format, **{name: getattr(step, name) for name in names}}
    results = []
    hessian = known = None
    try:
        for layer in layers:
            if layer.statistics is None or layer.statistics.hessian is not hessian:
                restore(None if known is None else known[0], hessian)
                known = None
                checks.check_statistics(layer, "hessian")
                hessian = layer.statistics.hessian
            nm = common.pattern(layer)
            parts, damping, error, known = _solve(
                layer.stored_weight, hessian, layer.mask, nm, layer.path, options, True, known, True
            )
            layer = common.quantized(layer, parts, None, step.activation, error)
            common.report_damping(layer, damping, step.damping)
            results.append(layer)
    finally:
        restore(None if known is None else known[0], hessian)
    return tuple(results)
