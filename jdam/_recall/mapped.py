"""Recall from a memory in a file."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jdam._core import checks
from jdam._core.batching import batch_size as length_of
from jdam._core.batching import equal_parts
from jdam._core.compile import compiled, float_dtype
from jdam._energy.certified import Certified
from jdam._energy.energy import fit_queries, inverse_temperature
from jdam._energy.mapped import cell_bounds, with_cells
from jdam._energy.search import Search
from jdam._energy.separation import LogSumExp
from jdam._measures.base import AnyMeasure
from jdam._memory.mapped import MappedMemory
from jdam._memory.memory import Memory
from jdam._recall.result import Recall, Status

#: Queries, at most, that share the cells that are read: more need more memory.
QUERIES = 16


def recall_from_file(
    memory: MappedMemory,
    queries: AnyMeasure,
    beta: Any,
    recall_batch: Callable[..., Recall],
    *,
    batch_size: int,
    search: Search | None,
    save_trace: bool,
    **settings: Any,
) -> Recall:
    """Return what `jdam.recall_batch` returns.

    A recall of the patterns that were read is that of all patterns, up to the tolerance of the
    search, if at the query and after every step the cells that were not read have no more Gibbs
    mass. Otherwise these are read too, and the recall is repeated.
    """
    checks.positive_int("batch_size", batch_size)
    if type(settings["separation"]) is not LogSumExp:
        kind = settings["separation"]
        raise ValueError(f"a memory in a file needs separation=LogSumExp(); got {kind}")
    if not isinstance(save_trace, bool):
        raise TypeError(f"save_trace must be a bool; got {save_trace!r}")
    if search is not None and not isinstance(search, Certified):
        raise ValueError(f"a memory in a file needs search=Certified(), or None; got {search}")
    one_row = memory.rows(np.zeros(1, np.int32))
    queries, beta = fit_queries(one_row, queries), inverse_temperature(one_row, beta)
    double = float_dtype(memory.patterns) == jnp.float64
    search = Certified(tol=1e-12 if double else 1e-8) if search is None else search
    tol, half = search.tol, replace(search, tol=search.tol / 2)
    num = length_of(queries)
    if num == 0:
        empty: Recall = recall_batch(
            one_row, queries, beta, search=search, save_trace=save_trace, **settings
        )
        return empty
    prior = np.asarray(memory.cell_log_prior) / float(beta)

    def one_part(queries: AnyMeasure) -> Recall:
        bounds = np.asarray(cell_bounds(memory.geometry, memory.cells, queries)) - prior

        def compute(some: Memory) -> tuple[Recall, np.ndarray]:
            result = recall_batch(some, queries, beta, search=half, save_trace=True, **settings)
            start = jax.vmap(partial(_energy, search=half), (None, 0, None))(some, queries, beta)
            return result, _relative_masses(memory, result, bounds, np.asarray(start), float(beta))

        def may_matter(found: tuple[Recall, np.ndarray], closed: np.ndarray) -> np.ndarray:
            masses = np.where(closed, found[1], 0)
            too_many = (masses.sum(-1) > tol / 2).any(1)  # of some step
            # What is left is at most half of what may be left.
            matters: np.ndarray = (masses[too_many] > tol / (4 * len(closed))).any((0, 1))
            return matters

        (result, masses), index, closed = with_cells(memory, bounds, compute, may_matter)
        unread = np.where(closed, masses, 0).sum(-1).max(1)
        return _reported(result, index, unread, tol, save_trace)

    count, size = equal_parts(num, min(num, batch_size, QUERIES))
    parts = []
    for first in range(0, count * size, size):
        rows = np.minimum(np.arange(first, first + size), num - 1)
        part = one_part(jax.tree.map(lambda leaf, rows=rows: leaf[rows], queries))
        parts.append(part)
    joined: Recall = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:num], *parts)
    return joined


@compiled(static=("search",), batch_size=lambda memory, search: search.query_batch_size(memory))
def _energy(
    memory: Memory, query: AnyMeasure, beta: Float[Array, ""], *, search: Certified
) -> Float[Array, ""]:
    """Return the energy of the patterns that the search compares; that of all is not higher."""
    guess = search.first_guess(memory)
    return search.evaluate(memory, query, beta, guess, separation=LogSumExp()).energy


def _relative_masses(
    memory: MappedMemory, result: Recall, bounds: np.ndarray, start: np.ndarray, beta: float
) -> Float[np.ndarray, "Q T C"]:
    """Return bounds on the mass of each cell, at the query and after each step, relative to that of
    the patterns read."""
    assert result.trace is not None
    queries, steps = result.trace.energy.shape
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), result.trace.measure)
    after = np.asarray(cell_bounds(memory.geometry, memory.cells, flat))
    after = after.reshape(queries, steps, -1) - np.asarray(memory.cell_log_prior) / beta
    lower = np.concatenate([bounds[:, None], after], 1)
    energies = np.concatenate([start[:, None], np.asarray(result.trace.energy)], 1)
    masses: np.ndarray = np.exp(np.minimum(beta * (energies[..., None] - lower), 80))
    return masses


def _reported(
    result: Recall, index: np.ndarray, unread: np.ndarray, tol: float, save_trace: bool
) -> Recall:
    """Return the result with the indices of the whole memory and all that was neglected."""
    neglected = result.neglected + jnp.asarray(unread, result.neglected.dtype)
    decided = (result.status == Status.CONVERGED) | (result.status == Status.MIXTURE)
    status = jnp.where(decided & (neglected > tol), Status.UNCERTIFIED, result.status)
    reported: Recall = eqx.tree_at(
        lambda r: (r.nearest, r.neglected, r.status, r.trace),
        result,
        (
            jnp.asarray(index)[result.nearest],
            neglected,
            status.astype(jnp.int32),
            result.trace if save_trace else None,
        ),
        is_leaf=lambda leaf: leaf is None,
    )
    return reported
