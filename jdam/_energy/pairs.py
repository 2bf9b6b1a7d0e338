"""Divergences between all pairs of two batches of measures."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree

from jdam._core.batching import batch_size, in_batches
from jdam._core.compile import compiled
from jdam._core.mesh import all_rows
from jdam._core.progress import check_progress, in_parts, is_here, rows_from
from jdam._energy.branch_and_bound import bounds_of
from jdam._energy.energy import divergences_of, fit_queries, query_batch_size
from jdam._energy.mapped import pairwise_in_file
from jdam._measures.base import AnyMeasure
from jdam._memory.mapped import MappedMemory
from jdam._memory.memory import Memory, check_memory

#: Number of tiles, of `Geometry.batch_sizes`, in one program on the device: about a second of work.
#: TILES if D takes decompositions or iterations; PRODUCTS if D is a matrix product, where smaller
#: parts would cost more in copies than in arithmetic.
TILES, PRODUCTS = 4, 64


def pairwise(
    memory: Memory | MappedMemory,
    queries: AnyMeasure | None = None,
    *,
    progress: bool | None = None,
) -> Float[Array, "Q N"]:
    """Return D(ξⱼ, Xᵢ) of every query to every pattern, or between the patterns.

    The units are those of `divergences`: W₂² (cost |x−y|²) for `Bures`, S_ε (cost ½|x−y|²) for
    `Sinkhorn`. The result is computed in tiles, which need some tens of megabytes beside it. For
    Gaussians of n samples in d > n dimensions, as in the Fréchet distance of image features,
    `jdam.Gaussian.from_samples` has factors d×n, and no d×d matrix is formed.

    Outside of `jax.jit` a large result is computed part by part, and Ctrl-C stops it.

    **Arguments:**

    - `memory`, which may be sharded, or in a file from `jdam.open`, which needs queries.
    - `queries`: measures of the patterns' kind with one batch axis (Q,), or a list of single ones;
      None stands for the patterns themselves.
    - `progress`: True draws a progress bar of the parts, False none, and None one on a terminal
      after 2 seconds.

    **Returns:** (Q, N), or (N, N); ∞ for the free slots of a memory with capacity.

    **Raises:** as `divergences`; `TypeError` for a `progress` that is no bool.
    """
    if isinstance(memory, MappedMemory):
        return pairwise_in_file(memory, queries, partial(pairwise, progress=progress))
    check_memory(memory)
    if queries is not None:
        queries = fit_queries(memory, queries)
    return pairs(memory, queries, "pairwise", check_progress(progress))


def pairs(
    memory: Memory, queries: AnyMeasure | None, name: str, progress: bool | None
) -> Float[Array, "Q N"]:
    """Return `pairwise` of queries that fit the memory; the progress bar has the title `name`."""
    rows = memory.patterns if queries is None else queries
    sizes = batch_size(rows), memory.capacity
    at_once = _pairs_at_once(memory)
    few = all(size <= most for size, most in zip(sizes, at_once, strict=True))
    if few or memory.layout is not None or not is_here(memory, queries):
        return _pairwise(memory, queries)
    part = partial(_part, memory, queries)
    result: Array = in_parts(part, sizes, at_once, name, progress)
    return result


def _pairs_at_once(memory: Memory) -> tuple[int, int]:
    """Return the number of queries and of patterns that one program on the device compares: all
    patterns, and more queries, if there are few patterns.
    """
    queries, patterns, _ = memory.geometry.batch_sizes(memory.patterns)
    # A geometry whose D is a matrix product has D itself as its only bound.
    is_product = len(bounds_of(memory)) == 1
    columns = patterns * (PRODUCTS if is_product else TILES)
    repeats = columns // memory.capacity
    return (repeats * queries, memory.capacity) if repeats else (queries, columns)


@partial(jax.jit, static_argnames="widths")
def _part(
    memory: Memory, queries: AnyMeasure | None, row: Any, column: PyTree, *, widths: tuple[int, int]
) -> Float[Array, "q n"]:
    """Return the divergences of some queries to some patterns; `queries` None: the patterns."""
    among_patterns = queries is None
    if queries is None:
        queries = memory.geometry.match(memory.patterns, memory.patterns)
    height, width = widths
    rows = memory.patterns, memory.prepared, memory.fingerprint, memory.log_prior
    patterns, prepared, fingerprint, prior = rows_from(rows, column, width=width)
    size = memory.size
    if size is not None:
        size = jnp.where(size < 0, size, jnp.clip(size - column, 0, width))
    block = dataclasses.replace(
        memory,
        patterns=patterns,
        prepared=prepared,
        fingerprint=fingerprint,
        log_prior=prior,
        size=size,
        cells=None,
    )
    divergences = _pairwise(block, rows_from(queries, row, width=height))
    if among_patterns and memory.occupied is not None:
        on = rows_from(memory.occupied, row, width=height)
        divergences = jnp.where(on[:, None], divergences, jnp.inf)
    return divergences


@compiled()
def _pairwise(memory: Memory, queries: AnyMeasure | None) -> Float[Array, "Q N"]:
    among_patterns = queries is None
    if queries is None:
        every = partial(all_rows, layout=memory.layout)
        queries = memory.geometry.match(jax.tree.map(every, memory.patterns), memory.patterns)

    def one(query: AnyMeasure) -> Float[Array, " N"]:
        return in_batches(divergences_of, query_batch_size(memory), memory, query)

    divergences = jax.vmap(one)(queries)
    if among_patterns and memory.occupied is not None:
        return jnp.where(memory.occupied[:, None], divergences, jnp.inf)
    return divergences
