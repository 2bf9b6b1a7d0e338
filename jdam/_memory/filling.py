"""Padding of patterns to the sizes of one memory, which does not change the measures."""

from dataclasses import replace as replaced
from typing import TYPE_CHECKING

from jdam._core import checks
from jdam._measures.base import AnyMeasure, Measure, describe
from jdam._memory.prepared import prepare

if TYPE_CHECKING:
    from jdam._memory.memory import Memory


def as_large(memory: "Memory", patterns: AnyMeasure) -> AnyMeasure:
    """Return `patterns`, padded to the sizes of the memory's."""
    if not isinstance(patterns, Measure):
        return patterns
    got, limits = patterns.sizes, memory.patterns.sizes
    for axis, size in limits.items():
        if axis not in patterns.padding and got[axis] != size:
            raise ValueError(
                f"patterns must have {axis} = {size}, as the memory's; got {got[axis]}"
            )
    larger = [axis for axis in limits if got[axis] > limits[axis]]
    if larger:
        expected = ", ".join(f"{axis} ≤ {limits[axis]}" for axis in larger)
        sizes = ", ".join(f"{axis}={got[axis]}" for axis in larger)
        raise ValueError(
            f"patterns must have {expected}, for which the memory has room; got {sizes}: "
            f"memory.reserve({memory.capacity}, {sizes}) makes room"
        )
    return patterns.padded(**{axis: limits[axis] for axis in patterns.padding})


def enlarge(memory: "Memory", sizes: dict[str, int]) -> "Memory":
    """Return the memory with each pattern padded to `sizes` and prepared again."""
    possible = tuple(getattr(memory.patterns, "padding", ()))
    for axis, size in sizes.items():
        if axis not in possible:
            expected = f"some of {possible}" if possible else "left out"
            kind = describe(memory.patterns)
            raise ValueError(f"sizes must be {expected} for {kind}; got {axis}={size!r}")
        checks.int_at_least(memory.patterns.sizes[axis], axis, size)
    patterns = memory.patterns.padded(**sizes)
    prepared, fingerprint = prepare(patterns, memory.geometry)
    valid = memory.validated()  # whose cells are NaN if they are those of other patterns
    return replaced(valid, patterns=patterns, prepared=prepared, fingerprint=fingerprint)
