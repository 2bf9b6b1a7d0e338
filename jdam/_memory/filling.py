"""Patterns of one memory filled up to one size, which changes nothing that they are."""

from dataclasses import replace as replaced
from typing import TYPE_CHECKING

from jdam._core import checks
from jdam._measures.base import AnyMeasure, Measure, describe
from jdam._memory.prepared import prepare

if TYPE_CHECKING:
    from jdam._memory.memory import Memory


def as_large(memory: "Memory", patterns: AnyMeasure) -> AnyMeasure:
    """Patterns filled up to the sizes of the memory's."""
    if not isinstance(patterns, Measure):
        return patterns
    got, room = patterns.sizes, memory.patterns.sizes
    for axis, size in room.items():
        if axis not in patterns.padding and got[axis] != size:
            raise ValueError(
                f"patterns must have {axis} = {size}, as the memory's; got {got[axis]}"
            )
    larger = [axis for axis in room if got[axis] > room[axis]]
    if larger:
        wanted = ", ".join(f"{axis} ≤ {room[axis]}" for axis in larger)
        sizes = ", ".join(f"{axis}={got[axis]}" for axis in larger)
        raise ValueError(
            f"patterns must have {wanted}, for which the memory has room; got {sizes}: "
            f"memory.reserve({memory.capacity}, {sizes}) makes room"
        )
    return patterns.padded(**{axis: room[axis] for axis in patterns.padding})


def enlarge(memory: "Memory", sizes: dict[str, int]) -> "Memory":
    """The same memory, each pattern filled up to these sizes and prepared anew."""
    possible = tuple(getattr(memory.patterns, "padding", ()))
    for axis, size in sizes.items():
        if axis not in possible:
            wanted = f"some of {possible}" if possible else "left out"
            kind = describe(memory.patterns)
            raise ValueError(f"sizes must be {wanted} for {kind}; got {axis}={size!r}")
        checks.int_at_least(memory.patterns.sizes[axis], axis, size)
    patterns = memory.patterns.padded(**sizes)
    prepared, fingerprint = prepare(patterns, memory.geometry)
    return replaced(memory, patterns=patterns, prepared=prepared, fingerprint=fingerprint)
