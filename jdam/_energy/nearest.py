"""The nearest patterns, by all divergences or by bounds that prove the others farther."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdam._core import checks
from jdam._core.batching import batched_while_loop, in_batches
from jdam._core.compile import compiled
from jdam._energy.average import compare, view_of
from jdam._energy.certified import REFINED, Certified, choose, rows_of
from jdam._energy.energy import divergences_of, fit_query, query_batch_size
from jdam._energy.search import Search
from jdam._energy.separation import LogSumExp
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory, length_or_capacity
from jdam.geometry.protocol import AnyView, Patterns


def nearest(
    memory: Memory, query: AnyMeasure, k: int = 1, *, search: Search | None = None
) -> tuple[Int[Array, " k"], Float[Array, " k"]]:
    """The k patterns of least divergence D(ξ, Xᵢ), and these divergences, least first. The result
    is exact: either all patterns are compared, or lower bounds prove the others farther.

    The prior of the memory plays no part. Patterns at the same divergence come in the order of
    their indices when all are compared, in any order else.

    **Arguments:**

    - `memory`, `query` as in `divergences`; a batch of queries by
      `jax.vmap(lambda query: jdam.nearest(memory, query, k))`.
    - `k`: from 1 to the number of patterns.
    - `search`: `Exhaustive()` compares all patterns, `Certified()` as many as it needs for the
      proof, of which only `num_candidates` counts. None chooses as `recall` does. A sharded memory
      and a geometry without bounds are searched exhaustively in any case.

    **Returns:** indices (k,), int32, and divergences (k,), in the units of `divergences`. A memory
    with room to grow has free slots at divergence ∞. The divergences can be differentiated.

    **Raises:** as `divergences`; `TypeError` or `ValueError` for a `k` that is no int from 1 to N,
    and for another `search`.
    """
    query = fit_query(memory, query)
    k, most = checks.positive_int("k", k), length_or_capacity(memory)
    if k > most:
        raise ValueError(f"k must be at most the number of patterns, {most}; got {k}")
    search = choose(search, memory, LogSumExp())
    if not isinstance(search, Search):
        raise TypeError(f"search must be one of jdam's, as jdam.Exhaustive(); got {search!r}")
    bounds = memory.geometry.bounds(Patterns(memory.patterns, memory.prepared))
    proves = isinstance(search, Certified) and memory.layout is None and len(bounds) > 0
    found: tuple[Array, Array] = (
        _proved(memory, query, k=k, size=min(memory.capacity, max(k, search.num_candidates)))
        if isinstance(search, Certified) and proves
        else _of_all(memory, query, k=k)
    )
    return found


@compiled(static=("k",))
def _of_all(memory: Memory, query: AnyMeasure, *, k: int) -> tuple[Array, Array]:
    divergences = in_batches(divergences_of, query_batch_size(memory), memory, query)
    index = jnp.argsort(jax.lax.stop_gradient(divergences), stable=True)[:k].astype(jnp.int32)
    return index, divergences[index]


class _Progress(NamedTuple):
    """How far a search has come."""

    lower: Float[Array, " N"]  # lower bounds on D; D itself where patterns were compared
    level: Int[Array, " N"]  # by which of the bounds, from 0; their number where compared


@compiled(static=("k", "size"))
def _proved(memory: Memory, query: AnyMeasure, *, k: int, size: int) -> tuple[Array, Array]:
    view, held = view_of(memory.geometry, query), jax.lax.stop_gradient(memory)
    bounds = memory.geometry.bounds(Patterns(memory.patterns, memory.prepared))
    lower = bounds[0](jax.lax.stop_gradient(view), Patterns(held.patterns, held.prepared))
    if held.occupied is not None:
        lower = jnp.where(held.occupied, lower, jnp.inf)
    start = _Progress(lower, jnp.zeros(lower.shape, jnp.int32))
    args = (held, jax.lax.stop_gradient(view))
    unfinished, turn = partial(_unfinished, k, len(bounds)), partial(_turn, k, size)
    end = batched_while_loop(unfinished, turn, start, args, at_once=query_batch_size(memory))
    order = jnp.argsort(_compared(end, len(bounds)), stable=True)[:k].astype(jnp.int32)
    exact = compare(memory.geometry, view, _rows(memory, order)).divergence
    again = jnp.argsort(jax.lax.stop_gradient(exact), stable=True)
    return order[again], exact[again]


def _unfinished(k: int, num: int, at: _Progress, _: Any) -> Bool[Array, ""]:
    """Whether a pattern that was not compared may be nearer than the k nearest so far."""
    rest = jnp.where(at.level < num, at.lower, jnp.inf).min()
    # Where a bound is NaN nothing is proved: all are compared.
    return ~(_farthest(at, k, num) <= rest) & (at.level < num).any()


def _turn(k: int, size: int, at: _Progress, args: tuple[Memory, AnyView]) -> _Progress:
    """Bound the patterns of least bound more closely, and compare those of least bound then."""
    memory, view = args
    bounds = memory.geometry.bounds(Patterns(memory.patterns, memory.prepared))
    num = len(bounds)
    for level, bound in enumerate(bounds[1:], 1):
        width = min(len(at.lower), REFINED[min(level, len(REFINED)) - 1])
        index = _least(jnp.where(at.level < level, at.lower, jnp.inf), width)
        closer = bound(view, _rows(memory, index))
        at = _Progress(at.lower.at[index].max(closer), at.level.at[index].max(level))
    index = _least(jnp.where(at.level < num, at.lower, jnp.inf), size)
    exact = compare(memory.geometry, view, _rows(memory, index)).divergence
    new = at.level[index] < num
    exact = jnp.where(new & (at.lower[index] != jnp.inf), exact, at.lower[index])
    return _Progress(at.lower.at[index].set(exact), at.level.at[index].set(num))


def _farthest(at: _Progress, k: int, num: int) -> Float[Array, ""]:
    """The k-th least divergence so far."""
    return -jax.lax.top_k(-_compared(at, num), k)[0][-1]


def _compared(at: _Progress, num: int) -> Float[Array, " N"]:
    """The divergences so far, ∞ elsewhere."""
    return jnp.where(at.level == num, at.lower, jnp.inf)


def _least(lower: Float[Array, " N"], size: int) -> Int[Array, " size"]:
    """The indices of the least entries; of NaN first, lest they are never compared."""
    index: Array = jax.lax.top_k(-jnp.where(jnp.isnan(lower), -jnp.inf, lower), size)[1]
    return index


def _rows(memory: Memory, index: Int[Array, " B"]) -> Patterns:
    """The patterns at some indices."""
    return rows_of(memory, index, jnp.ones_like(index, bool)).patterns
