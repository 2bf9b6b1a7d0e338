"""Searches of a memory in a file, which read the cells that may matter."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, PyTree

from jdam._core import checks
from jdam._energy.energy import fit_query
from jdam._measures.base import AnyMeasure
from jdam._memory.cells import embedded
from jdam._memory.mapped import MappedMemory
from jdam._memory.memory import Memory

T = TypeVar("T")

#: Cells that are read first for a query, and numbers that `pairwise` reads at a time.
FIRST, BLOCK = 8, 2**24


@jax.jit
def cell_bounds(geometry: PyTree, cells: PyTree, queries: AnyMeasure) -> Float[Array, "Q C"]:
    """Return lower bounds on D for the cells, ∞ for empty ones."""

    def one(embedding: PyTree) -> PyTree:
        return cells.lower_bounds(jax.tree.map(lambda leaf: leaf[None], embedding))

    bounds: Array = jax.vmap(one)(embedded(geometry, queries))
    return bounds


def with_cells(
    memory: MappedMemory,
    bounds: np.ndarray,
    compute: Callable[[Memory], T],
    may_matter: Callable[[T, Bool[np.ndarray, " C"]], Bool[np.ndarray, " C"]],
) -> tuple[T, np.ndarray, Bool[np.ndarray, " C"]]:
    """Return `compute(memory of some cells)`, the indices of their patterns in ascending order, and
    a mask of the cells that were not read.

    The first cells are those of least bounds, (Q, C). `may_matter(result, closed)` marks the closed
    cells that have to be read for the result; the computation is repeated until there are none.
    Each time at most as many cells are read as are open, those of least bounds: with them the
    others may no longer matter.
    """
    cells, least = memory.cells, bounds.min(0)
    first = np.unique(np.argsort(bounds, axis=1)[:, :FIRST])
    closed = np.ones(bounds.shape[1], bool)
    members = np.asarray(cells.members)
    while True:
        closed[first] = False
        index = np.sort(members[~closed].ravel())
        index = index[index >= 0]
        result = compute(memory.rows(index))
        first = np.flatnonzero(may_matter(result, closed) & closed)
        if first.size == 0:
            return result, index, closed
        first = first[np.argsort(least[first])[: (~closed).sum()]]


def nearest_in_file(
    memory: MappedMemory, query: AnyMeasure, k: int, nearest: Callable[..., tuple[Array, Array]]
) -> tuple[Array, Array]:
    """Return what `jdam.nearest` returns; `nearest` searches patterns that were read."""
    query = fit_query(memory.rows(np.zeros(1, np.int32)), query)
    k = checks.positive_int("k", k)
    if k > len(memory):
        raise ValueError(f"k must be at most the number of patterns, {len(memory)}; got {k}")
    queries = jax.tree.map(lambda leaf: leaf[None], query)
    bounds = np.asarray(cell_bounds(memory.geometry, memory.cells, queries))

    def compute(some: Memory) -> tuple[Array, Array]:
        return nearest(some, query, min(k, some.capacity))

    def may_matter(found: tuple[Array, Array], closed: np.ndarray) -> np.ndarray:
        order, divergences = found
        farthest = divergences[-1] if len(order) == k else np.inf
        matters: np.ndarray = ~(bounds[0] > farthest) & (bounds[0] < np.inf)
        return matters

    (order, divergences), index, _ = with_cells(memory, bounds, compute, may_matter)
    return jnp.asarray(index)[order], divergences


def pairwise_in_file(
    memory: MappedMemory, queries: AnyMeasure | None, pairwise: Callable[..., Array]
) -> Float[Array, "Q N"]:
    """Return what `jdam.pairwise` returns; `pairwise` compares patterns that were read."""
    if queries is None:
        raise ValueError("queries must be given for a memory in a file; jdam.load reads all of it")
    num = len(memory)
    numbers = sum(leaf[0].size for leaf in jax.tree.leaves(memory.patterns))
    size = max(1, min(num, BLOCK // numbers))
    columns = []
    for start in range(0, num, size):
        index = np.arange(start, min(num, start + size), dtype=np.int32)
        block = pairwise(memory.rows(index), queries)
        columns.append(np.asarray(block[:, : len(index)]))
    return jnp.asarray(np.concatenate(columns, 1))
