"""Which layer of the student learns from which layer of the teacher, and their taps in pairs.

A map is a dict of layer indices from 0, student's to teacher's. With M layers in the student, N in
the teacher, and s = N / M (layers counted from 1 in the papers, from 0 here):

    uniform   m -> (m + 1) s - 1                       every s-th, the last with the last
    skip      the same without the last                PKD-Skip: 12 to 6 is 2, 4, 6, 8, 10 from 1
    last      m -> N - M + m, without the last         PKD-Last: 12 to 6 is 7 to 11 from 1

Source: PKD https://arxiv.org/abs/1908.09355; TinyBERT https://arxiv.org/abs/1909.10351 (uniform).
"""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from jaxcomp.errors import JaxcompError


def _check_depths(student_layers: int, teacher_layers: int) -> None:
    if not 1 <= student_layers <= teacher_layers:
        raise JaxcompError(
            f"a student of {student_layers} layers and a teacher of {teacher_layers}: the student "
            "must have at least 1 layer and at most as many as the teacher; use explicit_map for "
            "anything else"
        )


def uniform_map(student_layers: int, teacher_layers: int) -> dict[int, int]:
    """Every s-th layer of the teacher, the last for the last.

    Args:
      student_layers: number of layers of the student.
      teacher_layers: number of layers of the teacher, a multiple of that.

    Returns:
      The map.

    Raises:
      JaxcompError: the depths do not divide.

    Example:
      >>> uniform_map(3, 12)
      {0: 3, 1: 7, 2: 11}

    Source: https://arxiv.org/abs/1909.10351.
    """
    _check_depths(student_layers, teacher_layers)
    if teacher_layers % student_layers:
        near = {
            m: -(-(m + 1) * teacher_layers // student_layers) - 1 for m in range(student_layers)
        }
        raise JaxcompError(
            f"{student_layers} layers of the student do not divide the teacher's {teacher_layers}; "
            f"name the layers with explicit_map, for instance {near}"
        )
    step = teacher_layers // student_layers
    return {m: (m + 1) * step - 1 for m in range(student_layers)}


def skip_map(student_layers: int, teacher_layers: int) -> dict[int, int]:
    """PKD-Skip: every s-th layer of the teacher, without the last, which the logits teach.

    Args:
      student_layers: number of layers of the student, at least 2.
      teacher_layers: number of layers of the teacher, a multiple of that.

    Returns:
      The map.

    Raises:
      JaxcompError: the depths do not divide, or no layer is left.

    Example:
      >>> skip_map(6, 12)
      {0: 1, 1: 3, 2: 5, 3: 7, 4: 9}

    Source: https://arxiv.org/abs/1908.09355.
    """
    full = uniform_map(student_layers, teacher_layers)
    return _without_last(full, student_layers)


def last_map(student_layers: int, teacher_layers: int) -> dict[int, int]:
    """PKD-Last: the layers before the teacher's last, in order.

    Args:
      student_layers: number of layers of the student, at least 2.
      teacher_layers: number of layers of the teacher.

    Returns:
      The map.

    Raises:
      JaxcompError: the student is deeper than the teacher, or no layer is left.

    Example:
      >>> last_map(6, 12)
      {0: 6, 1: 7, 2: 8, 3: 9, 4: 10}

    Source: https://arxiv.org/abs/1908.09355.
    """
    _check_depths(student_layers, teacher_layers)
    offset = teacher_layers - student_layers
    return _without_last({m: m + offset for m in range(student_layers)}, student_layers)


def _without_last(full, student_layers):
    if student_layers < 2:
        raise JaxcompError(
            "a student of 1 layer has none besides its last, which the logits teach; use "
            "uniform_map or explicit_map"
        )
    del full[student_layers - 1]
    return full


def explicit_map(
    pairs: Mapping[int, int], student_layers: int, teacher_layers: int
) -> dict[int, int]:
    """A map as given, checked.

    Args:
      pairs: teacher's layer for each of the student's, from 0; negative ones count from the end.
      student_layers: number of layers of the student.
      teacher_layers: number of layers of the teacher.

    Returns:
      The map, in the order of the student's layers.

    Raises:
      JaxcompError: it is empty, names a layer that does not exist, or one of the student's twice.

    Example:
      >>> explicit_map({0: 2, -1: -1}, 4, 12)
      {0: 2, 3: 11}
    """
    if not pairs:
        raise JaxcompError("an explicit map pairs no layers; give at least one")
    found = {}
    for m, n in pairs.items():
        for owner, index, count in (("student", m, student_layers), ("teacher", n, teacher_layers)):
            if not -count <= index < count:
                raise JaxcompError(
                    f"layer map {dict(pairs)}: the {owner} has no layer {index}, its {count} "
                    f"layers are 0 to {count - 1}"
                )
        if m % student_layers in found:
            raise JaxcompError(
                f"layer map {dict(pairs)}: names the student's layer {m % student_layers} twice"
            )
        found[m % student_layers] = n % teacher_layers
    return dict(sorted(found.items()))


def layer_taps(taps: Mapping[str, Any], pattern: str) -> dict[int, Any]:
    """The taps that a pattern names, by layer.

    Args:
      taps: values by name, as from ``jc.tap``.
      pattern: a name with ``{}`` for the index of the layer, or, for taps of scanned layers, the
        name without one: then the leading axis is the layers.

    Returns:
      Values by index of the layer, in order.

    Raises:
      JaxcompError: the pattern has several ``{}``, or matches no tap (close names are listed).

    Example:
      >>> layer_taps({"layers/0/mlp": "a", "layers/10/mlp": "b", "head": "c"}, "layers/{}/mlp")
      {0: 'a', 10: 'b'}
    """
    pieces = pattern.split("{}")
    if len(pieces) > 2:
        raise JaxcompError(
            f"pattern {pattern!r}: has {len(pieces) - 1} wildcards; exactly one {{}} stands for "
            "the index of the layer"
        )
    if len(pieces) == 1:
        if pattern in taps:
            return dict(enumerate(taps[pattern]))
    else:
        matcher = re.compile(r"(\d+)".join(re.escape(piece) for piece in pieces))
        matches = {name: matcher.fullmatch(name) for name in taps}
        found = {int(match[1]): taps[name] for name, match in matches.items() if match}
        if found:
            return dict(sorted(found.items()))
    # Compared with the numbers taken out, so that no layer is closer than another.
    shapes = {re.sub(r"\d+", "{}", name): name for name in reversed(list(taps))}
    close = difflib.get_close_matches(pattern, shapes, n=3, cutoff=0.4)
    names = [shapes[name] for name in close] or sorted(taps)[:5]
    hint = f"close names: {', '.join(names)}" if names else "there are no taps at all"
    raise JaxcompError(f"pattern {pattern!r} matches none of {len(taps)} taps; {hint}")


def pair_taps(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    pattern: str,
    layer_map: Mapping[int, int],
    teacher_pattern: str | None = None,
) -> dict[int, tuple[Any, Any]]:
    """Pairs the taps of the student with those of the teacher under a layer map.

    Args:
      student: the student's taps by name.
      teacher: the teacher's taps by name.
      pattern: names of the student's taps with ``{}`` for the index of the layer; without it, one
        tap whose leading axis is the layers (scanned layers).
      layer_map: teacher's layer for each of the student's.
      teacher_pattern: names of the teacher's taps; the same pattern by default.

    Returns:
      ``(student's value, teacher's value)`` by index of the student's layer.

    Raises:
      JaxcompError: a pattern matches nothing, or a layer of the map has no tap.

    Example:
      >>> ours = {"layers/0/mlp": 1, "layers/1/mlp": 2}
      >>> theirs = {f"h/{i}/ff": 10 + i for i in range(4)}
      >>> pair_taps(ours, theirs, "layers/{}/mlp", uniform_map(2, 4), "h/{}/ff")
      {0: (1, 11), 1: (2, 13)}
    """
    sides = []
    for owner, taps, names, layers in (
        ("student", student, pattern, layer_map.keys()),
        ("teacher", teacher, teacher_pattern or pattern, layer_map.values()),
    ):
        found = layer_taps(taps, names)
        missing = sorted(set(layers) - set(found))
        if missing:
            raise JaxcompError(
                f"pattern {names!r}: the {owner} has no tap of layer "
                f"{', '.join(map(str, missing))}, which the layer map {dict(layer_map)} names; its "
                f"taps are of layers {', '.join(map(str, found))}"
            )
        sides.append(found)
    return {m: (sides[0][m], sides[1][n]) for m, n in layer_map.items()}
