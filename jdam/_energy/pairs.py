"""All divergences between two batches of measures."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam._core.batching import batch_size, in_batches
from jdam._core.compile import compiled
from jdam._core.mesh import all_rows
from jdam._core.progress import check_progress, in_parts, is_here, rows_from
from jdam._energy.energy import divergences_of, fit_queries, query_batch_size
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory, check_memory
from jdam.geometry.protocol import Patterns

#: How many tiles of comparisons to ask a device for at a time: a second's work or so, for D that
#: takes decompositions or iterations, and for D that is a product, where copying parts would tell.
TILES, PRODUCTS = 4, 64


def pairwise(
    memory: Memory, queries: AnyMeasure | None = None, *, progress: bool | None = None
) -> Float[Array, "Q N"]:
    """D(ξⱼ, Xᵢ) of every query to every pattern, or of the patterns to each other.

    The units are those of `divergences`: W₂² (cost |x−y|²) for `Bures`, S_ε (cost ½|x−y|²) for
    `Sinkhorn`. Computed in tiles: beside the result some tens of megabytes are needed. For
    Gaussians of n samples in d > n dimensions, as features of images for the Fréchet distance,
    `jdam.Gaussian.from_samples` has factors d×n, and nothing d×d is formed.

    Outside of `jax.jit` many comparisons are made part by part, and Ctrl-C stops them.

    **Arguments:** a `memory`, which may be sharded; `queries`: measures of its patterns' kind with
    one batch axis (Q,), or a list of single ones; if None, the patterns themselves. `progress`:
    True draws a progress bar of the parts, False none, and None one on a terminal after 2 seconds.

    **Returns:** (Q, N), or (N, N); ∞ for the free slots of a memory with room to grow.

    **Raises:** as `divergences`; `TypeError` for a `progress` that is no bool.
    """
    check_memory(memory)
    if queries is not None:
        queries = fit_queries(memory, queries)
    return pairs(memory, queries, "pairwise", check_progress(progress))


def pairs(
    memory: Memory, queries: AnyMeasure | None, name: str, progress: bool | None
) -> Float[Array, "Q N"]:
    """The same of queries that fit the memory, under a bar of this name."""
    rows = memory.patterns if queries is None else queries
    sizes = batch_size(rows), memory.capacity
    at_once = _pairs_at_once(memory)
    few = all(size <= most for size, most in zip(sizes, at_once, strict=True))
    if few or memory.layout is not None or not is_here(memory, queries):
        return _pairwise(memory, queries)
    part = partial(_part, memory, queries)
    found: Array = in_parts(part, sizes, at_once, name, progress)
    return found


def _pairs_at_once(memory: Memory) -> tuple[int, int]:
    """Of how many queries to how many patterns to ask a device for at a time: to all patterns if
    these are not too many."""
    geometry = memory.geometry
    queries, patterns, _ = geometry.batch_sizes(memory.patterns)
    # The only bound on products are these themselves.
    is_product = len(geometry.bounds(Patterns(memory.patterns, memory.prepared))) == 1
    columns = patterns * (PRODUCTS if is_product else TILES)
    turns = columns // memory.capacity
    return (turns * queries, memory.capacity) if turns else (queries, columns)


@partial(jax.jit, static_argnames="widths")
def _part(
    memory: Memory, queries: AnyMeasure | None, row: Any, column: Any, *, widths: tuple[int, int]
) -> Float[Array, "q n"]:
    """The divergences of some queries to some patterns."""
    own = queries is None
    if queries is None:
        queries = memory.geometry.match(memory.patterns, memory.patterns)
    height, width = widths
    held = memory.patterns, memory.prepared, memory.fingerprint, memory.log_prior
    patterns, prepared, fingerprint, prior = rows_from(held, column, width=width)
    size = memory.size
    if size is not None:
        size = jnp.where(size < 0, size, jnp.clip(size - column, 0, width))
    some = dataclasses.replace(
        memory,
        patterns=patterns,
        prepared=prepared,
        fingerprint=fingerprint,
        log_prior=prior,
        size=size,
    )
    found = _pairwise(some, rows_from(queries, row, width=height))
    if own and memory.occupied is not None:
        on = rows_from(memory.occupied, row, width=height)
        found = jnp.where(on[:, None], found, jnp.inf)
    return found


@compiled()
def _pairwise(memory: Memory, queries: AnyMeasure | None) -> Float[Array, "Q N"]:
    among = queries is None
    if queries is None:
        every = partial(all_rows, layout=memory.layout)
        queries = memory.geometry.match(jax.tree.map(every, memory.patterns), memory.patterns)

    def one(query: AnyMeasure) -> Float[Array, " N"]:
        return in_batches(divergences_of, query_batch_size(memory), memory, query)

    found = jax.vmap(one)(queries)
    if among and memory.occupied is not None:
        return jnp.where(memory.occupied[:, None], found, jnp.inf)
    return found
