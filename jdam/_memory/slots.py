"""Slots of a memory: compiled changes that keep all array shapes, except for `reserve`; indices;
and padding of patterns to the sizes of one memory, which does not change the measures."""

from dataclasses import replace as replaced
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, PyTree

from jdam._core import checks
from jdam._core.batching import batch_size
from jdam._measures.base import AnyMeasure, Measure, describe
from jdam._memory.cells import (
    Cells,
    embedded,
    moved_up,
    widened,
    with_fingerprint,
    with_patterns,
    without_patterns,
)
from jdam._memory.prepared import fingerprint, prepare

if TYPE_CHECKING:
    from jdam._memory.memory import Memory


#: The size of a memory after an invalid change inside `jax.jit`, where errors cannot be raised.
SPOILED = -1


@jax.jit(static_argnames="capacity")
def reserve(memory: "Memory", capacity: int) -> "Memory":
    """Return the memory with `capacity` slots; free ones hold the last pattern, with prior 0."""

    def resize(leaf: Array, **fill: Any) -> Array:
        missing = max(0, capacity - len(leaf))
        widths = [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, widths, **fill)[:capacity]

    rows = jax.tree.map(lambda leaf: resize(leaf, mode="edge"), _rows(memory))
    prior = resize(memory.log_weights, constant_values=-jnp.inf)
    cells = None if memory.cells is None else widened(memory.cells, capacity)
    return _with_rows(replaced(memory, cells=cells), rows, prior, size_of(memory))


@jax.jit
def append(
    memory: "Memory", patterns: AnyMeasure, values: PyTree, log_prior: Float[Array, " M"] | None
) -> "Memory":
    """Return the memory with patterns and their values at the first free slots."""
    count, size = batch_size(patterns), size_of(memory)
    fits = (size >= 0) & (size + count <= memory.capacity)
    first = jnp.where(fits, size, 0)

    def put(old: Array, new: Array) -> Array:
        stored = jax.lax.dynamic_slice_in_dim(old, first, count)
        return jax.lax.dynamic_update_slice_in_dim(old, jnp.where(fits, new, stored), first, 0)

    prior = jnp.zeros(count, memory.dtype) if log_prior is None else log_prior
    new = _prepared_rows(memory, patterns, values)
    rows = jax.tree.map(put, _rows(memory), new)
    if memory.cells is not None:
        index = jnp.where(fits, first + jnp.arange(count, dtype=jnp.int32), -1)
        memory = _in_cells(memory, new, index)
    return _nan_unless(fits, _with_rows(memory, rows, put(memory.log_weights, prior), size + count))


@jax.jit
def replace(
    memory: "Memory", index: Int[Array, " M"], patterns: AnyMeasure, values: PyTree
) -> "Memory":
    """Return the memory with other patterns at some slots, and other values unless these are
    None.
    """
    valid = (index >= 0) & (index < size_of(memory))
    # Of several patterns for one slot the last one stays.
    order = jnp.arange(len(index), dtype=jnp.int32)
    last = jnp.zeros(memory.capacity, jnp.int32).at[index].max(order, mode="drop")
    once = valid & (last[index] == order)
    slot = jnp.where(once, index, memory.capacity)

    def put(old: Array, new: Array) -> Array:
        return old.at[slot].set(new, mode="drop")

    if values is None:
        values = jax.tree.map(lambda leaf: leaf[index], memory.values)
    new = _prepared_rows(memory, patterns, values)
    rows = jax.tree.map(put, _rows(memory), new)
    if memory.cells is not None:
        left = jnp.ones(memory.capacity, bool).at[slot].set(False, mode="drop")
        cells = without_patterns(memory.cells, left)
        memory = _in_cells(replaced(memory, cells=cells), new, jnp.where(once, index, -1))
    return _nan_unless(valid.all(), _with_rows(memory, rows, memory.log_prior, memory.size))


@jax.jit
def remove(memory: "Memory", index: Int[Array, " M"]) -> "Memory":
    """Return the memory without the patterns at some slots; later patterns move up."""
    valid = (index >= 0) & (index < size_of(memory))
    drop = jnp.where(valid, index, memory.capacity)
    number = jnp.arange(memory.capacity, dtype=jnp.int32)
    remains = (number < size_of(memory)).at[drop].set(False, mode="drop")
    size = remains.sum(dtype=jnp.int32)
    order = jnp.argsort(~remains, stable=True)
    order = order[jnp.minimum(number, jnp.maximum(size - 1, 0))]
    rows, prior = jax.tree.map(lambda leaf: leaf[order], (_rows(memory), memory.log_prior))
    prior = jnp.where(number < size, prior, -jnp.inf)
    if memory.cells is not None:
        memory = replaced(memory, cells=moved_up(memory.cells, remains))
    return _nan_unless(valid.all() & (size > 0), _with_rows(memory, rows, prior, size))


def with_cells(
    memory: "Memory", cells: Cells | None, first: int, remains: Bool[Array, " N"] | None = None
) -> "Memory":
    """Return a memory in the cells of an earlier one: without the patterns that do not remain, and
    with those from `first` on.
    """
    if cells is None:
        return memory
    if remains is not None:
        cells = moved_up(cells, remains)
    new = jax.tree.map(lambda leaf: leaf[first:], _rows(memory))
    index = jnp.arange(first, memory.capacity, dtype=jnp.int32)
    memory = replaced(memory, cells=widened(cells, memory.capacity))
    return with_fingerprint(_in_cells(memory, new, index))


def _in_cells(memory: "Memory", rows: tuple[PyTree, ...], index: Int[Array, " M"]) -> "Memory":
    """Return the memory with its patterns at `index`, of these rows, in cells; −1 for none."""
    patterns, prepared, *_ = rows
    embedding = embedded(memory.geometry, patterns, prepared)
    assert memory.cells is not None
    assert embedding is not None
    return replaced(memory, cells=with_patterns(memory.cells, embedding, index))


def size_of(memory: "Memory") -> Int[Array, ""]:
    """Return the number of patterns, as an array."""
    return jnp.asarray(memory.capacity if memory.size is None else memory.size, jnp.int32)


def checked_index(memory: "Memory", index: Any) -> Any:
    """Return an index ≥ 0; raise `TypeError` unless it is one integer, and `IndexError` unless it
    is that of a pattern, or of a slot if the number of patterns is traced.
    """
    if not np.issubdtype(getattr(index, "dtype", type(index)), np.integer) or np.ndim(index):
        raise TypeError(f"index must be an int; got {index!r}: use jax.vmap for more")
    if not checks.is_concrete(index):
        return memory.from_start(index)
    checks.index(int(index), memory.length_or_capacity, "a memory")
    if not memory.size_is_known:
        return memory.from_start(index)
    return np.int32(int(index) % len(memory))  # jnp would compile


def checked_indices(memory: "Memory", indices: int | ArrayLike) -> Any:
    """Return indices ≥ 0; raise `IndexError` unless they are those of patterns, if that is
    known.
    """
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
    prepared, marks = prepare(patterns, memory.geometry)
    valid = memory.validated()  # whose cells are NaN if they are those of other patterns
    return replaced(valid, patterns=patterns, prepared=prepared, fingerprint=marks)


def _rows(memory: "Memory") -> tuple[PyTree, ...]:
    """Return all arrays with a row for each pattern, except the prior."""
    return memory.patterns, memory.prepared, memory.fingerprint, memory.values


def _prepared_rows(memory: "Memory", patterns: AnyMeasure, values: PyTree) -> tuple[PyTree, ...]:
    prepared, marks = prepare(patterns, memory.geometry)
    if memory.fingerprint is not None and marks is None:
        marks = fingerprint(patterns, memory.geometry)
    return patterns, prepared, marks, values


def _with_rows(memory: "Memory", rows: tuple[PyTree, ...], prior: Any, size: Any) -> "Memory":
    patterns, prepared, marks, values = rows
    return replaced(
        memory,
        patterns=patterns,
        prepared=prepared,
        fingerprint=marks,
        values=values,
        log_prior=prior,
        size=size,
    )


def _nan_unless(good: Bool[Array, ""], memory: "Memory") -> "Memory":
    """Return the memory if `good`, else a memory whose recalls have `Status.NONFINITE`."""
    if memory.size is not None:
        return replaced(memory, size=jnp.where(good, memory.size, SPOILED))

    def mark(leaf: Array) -> Array:
        return leaf.at[0].set(jnp.where(good, leaf[0], jnp.nan))

    return replaced(memory, patterns=jax.tree.map(mark, memory.patterns))
