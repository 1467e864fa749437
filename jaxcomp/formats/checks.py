"""Does a format fit a matrix? Asked before any work, answered with what to do."""

from jaxcomp.errors import JaxcompError
from jaxcomp.formats import floating
from jaxcomp.formats.spec import NM, AnyFormat, Codebook, Float, Int, LowRank, Sparse


def _divisors(size: int, at_most: int) -> list[int]:
    """The two largest divisors of ``size`` from 2 to ``at_most``."""
    return [d for d in range(min(at_most, size), 1, -1) if size % d == 0][:2]


def _divides(where: str, option: str, group: int, axis: str, size: int) -> None:
    if group > 0 and size % group == 0:
        return
    choices = _divisors(size, group) if group > 0 else []
    fix = f"{option} " + " or ".join(str(d) for d in choices) if choices else f"{option} None"
    raise JaxcompError(
        f"{where}: {option} {group} does not divide the {axis} size {size}; "
        f"use {fix}, or exclude this path."
    )


def _int(fmt: Int, where: str) -> None:
    if not (2 <= fmt.bits <= 8 or fmt.bits == 16):
        raise JaxcompError(
            f"{where}: integers of {fmt.bits} bits cannot be stored; use 2 to 8 bits, or 16."
        )


def _codebook(fmt: Codebook, where: str) -> None:
    if fmt.kind == "kmeans":
        if fmt.bits is None or not 2 <= fmt.bits <= 8:
            raise JaxcompError(
                f'{where}: a "kmeans" codebook needs bits from 2 to 8, got {fmt.bits}; set bits.'
            )
        if fmt.group_size is not None:
            raise JaxcompError(
                f'{where}: a "kmeans" codebook has a table a row and no group_size; leave it out.'
            )
        if fmt.double_quantization:
            raise JaxcompError(
                f'{where}: a "kmeans" codebook has no scales that double_quantization could store; '
                "leave it out."
            )
    elif fmt.bits is not None:
        raise JaxcompError(f'{where}: bits is an option of "kmeans" codebooks; leave it out.')
    if (fmt.kind == "levels") != (fmt.levels is not None):
        raise JaxcompError(
            f'{where}: a codebook has levels if and only if its kind is "levels"; got kind '
            f"{fmt.kind!r} with levels {fmt.levels}."
        )
    if fmt.levels is not None:
        ascending = all(a < b for a, b in zip(fmt.levels, fmt.levels[1:], strict=False))
        if not (2 <= len(fmt.levels) <= 256 and ascending):
            raise JaxcompError(
                f"{where}: levels must be 2 to 256 ascending numbers, got {len(fmt.levels)}; "
                "sort them and drop repeated ones."
            )


def check(fmt: AnyFormat, shape: tuple[int, ...], path: str = "weight") -> None:
    """Raises where a format cannot store a matrix.

    Args:
      fmt: any format.
      shape: ``(*stack, out, in)``.
      path: name of the weight.

    Raises:
      JaxcompError: names the path, the shape, the rule and the fix.

    Example:
      >>> check(Int(4, group_size=125), (768, 250), "layers/3/mlp/down/kernel")
      >>> try:
      ...     check(Int(4, group_size=128), (768, 250), "layers/3/mlp/down/kernel")
      ... except JaxcompError as error:
      ...     print(str(error).partition("; ")[2])
      use group_size 125 or 50, or exclude this path.
    """
    shape = tuple(shape)
    where = f"{path} {shape}"
    if len(shape) < 2:
        raise JaxcompError(
            f"{where}: a format stores matrices (*stack, out, in); exclude this path."
        )
    out, size = shape[-2:]
    if 0 in shape:
        raise JaxcompError(f"{where}: an empty matrix cannot be compressed; exclude this path.")
    if isinstance(fmt, NM):
        _nm(fmt, size, where)
    elif isinstance(fmt, LowRank):
        if not 1 <= fmt.rank <= min(out, size):
            raise JaxcompError(
                f"{where}: rank {fmt.rank} is not between 1 and {min(out, size)}; "
                f"use rank {min(out, size)} or less, or exclude this path."
            )
    if isinstance(fmt, (NM, Sparse)):
        if fmt.values is not None:
            check(fmt.values, shape, path)
        return
    if isinstance(fmt, Int):
        _int(fmt, where)
    elif isinstance(fmt, Codebook):
        _codebook(fmt, where)
    if isinstance(fmt, Float) and fmt.kind in floating.BLOCK:
        block = floating.BLOCK[fmt.kind]
        if fmt.group_size is not None:
            raise JaxcompError(
                f"{where}: {fmt.kind} fixes its group_size to {block}; leave group_size out."
            )
        if fmt.out_group_size != 1:
            raise JaxcompError(f"{where}: {fmt.kind} has a scale a row; leave out_group_size out.")
        if size % block:
            raise JaxcompError(
                f"{where}: the blocks of {block} inputs of {fmt.kind} do not divide the input size "
                f'{size}; use Float("{floating.ELEMENT_OF[fmt.kind]}") or exclude this path.'
            )
        return
    group = getattr(fmt, "group_size", None)
    if group is not None:
        _divides(where, "group_size", group, "input", size)
    out_group = getattr(fmt, "out_group_size", None)
    if out_group is not None:
        _divides(where, "out_group_size", out_group, "output", out)


def _nm(fmt: NM, size: int, where: str) -> None:
    if not 1 <= fmt.n < fmt.m <= 256:
        raise JaxcompError(
            f"{where}: {fmt.n}:{fmt.m} sparsity keeps n of m with 1 <= n < m <= 256; change n or m."
        )
    if size % fmt.m:
        raise JaxcompError(
            f"{where}: blocks of m = {fmt.m} do not divide the input size {size}; "
            "use an m that does, unstructured sparsity, or exclude this path."
        )
    group = None
    if isinstance(fmt.values, Float) and fmt.values.kind in floating.BLOCK:
        raise JaxcompError(
            f"{where}: {fmt.values.kind} fixes its blocks over dense inputs and cannot hold the "
            f'kept values of {fmt.n}:{fmt.m}; use Float("{floating.ELEMENT_OF[fmt.values.kind]}").'
        )
    if fmt.values is not None:
        group = fmt.values.group_size
    if group is not None and group % fmt.m:
        raise JaxcompError(
            f"{where}: group_size {group} is no multiple of the m of {fmt.n}:{fmt.m} sparsity; "
            f"use group_size {max(fmt.m, group // fmt.m * fmt.m)}."
        )
