"""What a compiled program sends between devices, read from its HLO text.

A scanned model is a loop in the program: what its body sends counts once for each trip. The
compiler splits one collective into fusions that overlap with other work (its start, the products
meanwhile, its end); these share a channel, so of a channel the fusion that sends most counts.
Outside of fusions each collective counts: those that a ``shard_map`` wrote share one channel.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2}


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
      kind: one of ``KINDS``.
      dtype: of its result, as HLO names it.
      shape: of its result on one device.
      group: devices that take part together; 0 where the text does not say.
      times: how often a call of the program runs it.
      where: the operation it came from.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    group: int
    times: int
    where: str

    @property
    def nbytes(self) -> int:
        """Bytes of its result on one device, once."""
        return math.prod(self.shape) * bits(self.dtype) // 8

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all runs, by the ring algorithm."""
        share = 1 - 1 / self.group if self.group else 1.0
        factor = {"all-reduce": 2 * share, "reduce-scatter": (self.group or 1) * share}
        if self.kind == "collective-permute":
            share = 1.0
        return self.times * self.nbytes * factor.get(self.kind, share)


def bits(dtype: str) -> int:
    """Bits of an element, by HLO's name of its type."""
    if dtype in _BITS:
        return _BITS[dtype]
    match = re.match(r"[a-z]+(\d+)", dtype)
    return int(match[1]) if match else 0


def collectives(text: str) -> list[Collective]:
    """The exchanges of a compiled program.

    Args:
      text: ``compiled.as_text()``.

    Returns:
      One entry for each, of those in fusions one for each channel.

    Example:
      >>> program = '''
      ... ENTRY %main (p: f32[2]) -> f32[8] {
      ...   %p = f32[2]{0} parameter(0)
      ...   ROOT %g = f32[8]{0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}
      ... }'''
      >>> [(c.kind, c.shape, c.sent) for c in collectives(program)]
      [('all-gather', (8,), 24.0)]
    """
    bodies, entry = computations(text)
    found: list[Collective] = []
    fusions: dict[object, dict[str, list[Collective]]] = {}
    for line, times, fusion in _reached(bodies, entry, 1, (), None):
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        arrays = [(d, _shape(s)) for d, s in _ARRAY.findall(match[1]) if bits(d)]
        dtype, shape = max(arrays, key=lambda a: math.prod(a[1]) * bits(a[0]))
        name = re.search(r'op_name="([^"]*)"', line)
        channel = re.search(r"channel_id=(\d+)", line)
        one = Collective(match[2], dtype, shape, _group(line), times, name[1] if name else "")
        if fusion is None:
            found.append(one)
        else:
            key = (match[2], channel[1] if channel else line)
            fusions.setdefault(key, {}).setdefault(fusion, []).append(one)
    for pieces in fusions.values():
        found += max(pieces.values(), key=lambda piece: sum(c.sent for c in piece))
    return found


def whole_weights(
    exchanges: Iterable[Collective], shapes: Iterable[tuple[int, ...]]
) -> list[Collective]:
    """The gathers whose result is a whole weight.

    Args:
      exchanges: what ``collectives`` found.
      shapes: shapes of weights and of the arrays that stand for compressed ones, before they are
        split over devices and without the axis of layers.

    Returns:
      The all-gathers with the elements of one of these arrays, axes in any order.
    """
    wanted = {tuple(sorted(n for n in shape if n > 1)) for shape in shapes}
    return [
        c
        for c in exchanges
        if c.kind == "all-gather" and tuple(sorted(n for n in c.shape if n > 1)) in wanted
    ]


def computation(line: str) -> str | None:
    """The name of the computation that begins in a line, if one does."""
    match = _COMPUTATION.match(line)
    return match[2] if match else None


def called(line: str) -> list[str]:
    """The computations that an operation runs."""
    return _CALLED.findall(line)


def is_loop(line: str) -> bool:
    """Whether an operation is a loop."""
    return " while(" in line


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of a program's computations by name, and the name of the one that runs first."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            match = _COMPUTATION.match(line)
            if match:
                current = bodies.setdefault(match[2], [])
                entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            current.append(line)
    return bodies, entry


def _reached(
    bodies: dict[str, list[str]], name: str, times: int, above: tuple[str, ...], fusion: str | None
) -> Iterator[tuple[str, int, str | None]]:
    """Every line that a run executes, with how often, and the fusion that it is in."""
    for line in bodies.get(name, ()):
        yield line, times, fusion
        repeat = times * trips(line, bodies) if is_loop(line) else times
        for other in called(line):
            if other not in above:
                inside = other if fusion is None and " fusion(" in line else fusion
                yield from _reached(bodies, other, repeat, (*above, name), inside)


def trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop runs: what the compiler noted, or the constant of its condition."""
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = bodies.get(condition[1], []) if condition else []
    limits = [int(n) for text in lines for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", text)]
    return max(limits, default=1)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _group(line: str) -> int:
    """Devices of one replica group, in any of the three spellings."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return listed[1].count(",") + 1
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if iota:
        return int(iota[1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    return 0
