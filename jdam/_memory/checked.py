"""Checks of measures against a memory."""

from typing import TYPE_CHECKING

from jdam._core.compile import float_dtype
from jdam._measures.base import AnyMeasure, Measure, check_same_arrays, dim_of

if TYPE_CHECKING:
    from jdam._memory.memory import Memory


def length_or_capacity(memory: "Memory") -> int:
    """Return the number of patterns if it is known, else that of slots."""
    return len(memory) if memory.size_is_known else memory.capacity


def check_against(memory: "Memory", name: str, measure: AnyMeasure) -> None:
    """Raise unless the single measure has the memory's type, dtype and dimension."""
    if type(measure) is not type(memory.patterns) and isinstance(measure, Measure):
        raise TypeError(
            f"{name} must be a {type(memory.patterns).__name__} like the memory's patterns; "
            f"got {type(measure).__name__}"
        )
    if float_dtype(measure) != memory.dtype:
        raise TypeError(
            f"{name} must have the memory's dtype {memory.dtype}; got {float_dtype(measure)}: "
            "convert one"
        )
    expected, actual = dim_of(memory.patterns), dim_of(measure)
    if actual != expected:
        raise ValueError(f"{name} must have the memory's dimension d = {expected}; got {actual}")
    check_same_arrays(name, measure, memory.patterns, "the patterns have")
