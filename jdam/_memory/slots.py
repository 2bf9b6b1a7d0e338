"""A memory with room to grow: changes of its values that leave all shapes as they are."""

from dataclasses import replace as replaced
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from jdam._core import checks
from jdam._core.batching import batch_size
from jdam._measures.base import AnyMeasure
from jdam._memory.prepared import prepare

if TYPE_CHECKING:
    from jdam._memory.memory import Memory


#: The size of a memory to which something was done that inside `jax.jit` could not raise.
SPOILED = -1


@jax.jit(static_argnames="capacity")
def reserve(memory: "Memory", capacity: int) -> "Memory":
    """The memory with so many slots, free ones with copies of the last pattern, which are switched
    off by the prior."""

    def resize(leaf: Array, **fill: Any) -> Array:
        missing = max(0, capacity - len(leaf))
        widths = [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, widths, **fill)[:capacity]

    rows = jax.tree.map(lambda leaf: resize(leaf, mode="edge"), _rows(memory))
    prior = resize(memory.log_weights, constant_values=-jnp.inf)
    return _with_rows(memory, rows, prior, size_of(memory))


@jax.jit
def append(
    memory: "Memory", patterns: AnyMeasure, values: Any, log_prior: Float[Array, " M"] | None
) -> "Memory":
    """The memory with patterns and their values at the first free slots."""
    count, size = batch_size(patterns), size_of(memory)
    fits = (size >= 0) & (size + count <= memory.capacity)
    first = jnp.where(fits, size, 0)

    def put(old: Array, new: Array) -> Array:
        kept = jax.lax.dynamic_slice_in_dim(old, first, count)
        return jax.lax.dynamic_update_slice_in_dim(old, jnp.where(fits, new, kept), first, 0)

    prior = jnp.zeros(count, memory.dtype) if log_prior is None else log_prior
    rows = jax.tree.map(put, _rows(memory), _prepared_rows(memory, patterns, values))
    return _nan_unless(fits, _with_rows(memory, rows, put(memory.log_weights, prior), size + count))


@jax.jit
def replace(
    memory: "Memory", index: Int[Array, " M"], patterns: AnyMeasure, values: Any
) -> "Memory":
    """The memory with other patterns at some slots, and other values unless these are None."""
    there = (index >= 0) & (index < size_of(memory))
    place = jnp.where(there, index, memory.capacity)

    def put(old: Array, new: Array) -> Array:
        return old.at[place].set(new, mode="drop")

    if values is None:
        values = jax.tree.map(lambda leaf: leaf[index], memory.values)
    rows = jax.tree.map(put, _rows(memory), _prepared_rows(memory, patterns, values))
    return _nan_unless(there.all(), _with_rows(memory, rows, memory.log_prior, memory.size))


@jax.jit
def remove(memory: "Memory", index: Int[Array, " M"]) -> "Memory":
    """The memory without the patterns at some slots, those behind them moved up."""
    there = (index >= 0) & (index < size_of(memory))
    drop = jnp.where(there, index, memory.capacity)
    number = jnp.arange(memory.capacity, dtype=jnp.int32)
    kept = (number < size_of(memory)).at[drop].set(False, mode="drop")
    size = kept.sum(dtype=jnp.int32)
    order = jnp.argsort(~kept, stable=True)
    order = order[jnp.minimum(number, jnp.maximum(size - 1, 0))]
    rows, prior = jax.tree.map(lambda leaf: leaf[order], (_rows(memory), memory.log_prior))
    prior = jnp.where(number < size, prior, -jnp.inf)
    return _nan_unless(there.all() & (size > 0), _with_rows(memory, rows, prior, size))


def size_of(memory: "Memory") -> Int[Array, ""]:
    """The number of patterns, as an array."""
    return jnp.asarray(memory.capacity if memory.size is None else memory.size, jnp.int32)


def checked_indices(memory: "Memory", indices: int | ArrayLike) -> Any:
    """Integers, ≥ 0 and of patterns that are there as far as that is known."""
    index = indices if isinstance(indices, Array) else np.asarray(indices)
    if index.size and not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"indices must be an int or a list of ints; got {indices!r}")
    if index.ndim > 1:
        raise TypeError(f"indices must be an int or a list of ints; got shape {index.shape}")
    if not checks.is_concrete(index) or not memory.size_is_known:
        return memory.from_start(index)
    index, num = np.asarray(index), len(memory)
    if index.size and not (-num <= index.min() and index.max() < num):
        raise IndexError(
            f"indices must be in [−N, N), N = {num}; got {index.min()} to {index.max()}"
        )
    return (index % num).astype(np.int32)


def _rows(memory: "Memory") -> tuple[Any, ...]:
    """All that has a row for each pattern, but for the prior."""
    return memory.patterns, memory.prepared, memory.fingerprint, memory.values


def _prepared_rows(memory: "Memory", patterns: AnyMeasure, values: Any) -> tuple[Any, ...]:
    return patterns, *prepare(patterns, memory.geometry), values


def _with_rows(memory: "Memory", rows: tuple[Any, ...], prior: Any, size: Any) -> "Memory":
    patterns, prepared, fingerprint, values = rows
    return replaced(
        memory,
        patterns=patterns,
        prepared=prepared,
        fingerprint=fingerprint,
        values=values,
        log_prior=prior,
        size=size,
    )


def _nan_unless(good: Bool[Array, ""], memory: "Memory") -> "Memory":
    """The memory if that is good, else one of which every recall says that it is not finite."""
    if memory.size is not None:
        return replaced(memory, size=jnp.where(good, memory.size, SPOILED))

    def mark(leaf: Array) -> Array:
        return leaf.at[0].set(jnp.where(good, leaf[0], jnp.nan))

    return replaced(memory, patterns=jax.tree.map(mark, memory.patterns))
