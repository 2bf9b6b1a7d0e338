"""The nearest patterns, by all divergences or by bounds that prove the other patterns farther."""

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
    """Return the k patterns of least divergence D(ξ, Xᵢ) and these divergences, in ascending order.

    The result is exact: either all patterns are compared, or lower bounds prove the others farther.
    The prior of the memory has no influence. Patterns at the same divergence come in the order of
    their indices if all are compared, in any order otherwise.

    **Arguments:**

    - `memory`, `query` as in `divergences`; a batch of queries by
      `jax.vmap(lambda query: jdam.nearest(memory, query, k))`.
    - `k`: from 1 to the number of patterns.
    - `search`: `Exhaustive()` compares all patterns; `Certified()` compares as many as the proof
      needs, and only its `num_candidates` is used. None chooses as `recall` does. A sharded memory
      and a geometry without bounds are always searched exhaustively.

    **Returns:** indices (k,), int32, and divergences (k,), in the units of `divergences`. Free
    slots of a memory with capacity have divergence ∞. The divergences can be differentiated.

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
    use_bounds = isinstance(search, Certified) and memory.layout is None and len(bounds) > 0
    result: tuple[Array, Array] = (
        _certified(memory, query, k=k, size=min(memory.capacity, max(k, search.num_candidates)))
        if isinstance(search, Certified) and use_bounds
        else _exhaustive(memory, query, k=k)
    )
    return result


@compiled(static=("k",))
def _exhaustive(memory: Memory, query: AnyMeasure, *, k: int) -> tuple[Array, Array]:
    divergences = in_batches(divergences_of, query_batch_size(memory), memory, query)
    index = jnp.argsort(jax.lax.stop_gradient(divergences), stable=True)[:k].astype(jnp.int32)
    return index, divergences[index]


class _Progress(NamedTuple):
    """Bounds and divergences computed so far."""

    lower: Float[Array, " N"]  # lower bounds on D; D itself where patterns were compared
    level: Int[Array, " N"]  # index of the bound in `lower`; the number of bounds where compared


@compiled(static=("k", "size"))
def _certified(memory: Memory, query: AnyMeasure, *, k: int, size: int) -> tuple[Array, Array]:
    view, constants = view_of(memory.geometry, query), jax.lax.stop_gradient(memory)
    bounds = memory.geometry.bounds(Patterns(memory.patterns, memory.prepared))
    lower = bounds[0](jax.lax.stop_gradient(view), Patterns(constants.patterns, constants.prepared))
    if constants.occupied is not None:
        lower = jnp.where(constants.occupied, lower, jnp.inf)
    start = _Progress(lower, jnp.zeros(lower.shape, jnp.int32))
    args = (constants, jax.lax.stop_gradient(view))
    cond_fun, body_fun = partial(_cond_fun, k, len(bounds)), partial(_body_fun, k, size)
    end = batched_while_loop(cond_fun, body_fun, start, args, at_once=query_batch_size(memory))
    order = jnp.argsort(_compared(end, len(bounds)), stable=True)[:k].astype(jnp.int32)
    exact = compare(memory.geometry, view, _rows(memory, order)).divergence
    by_exact = jnp.argsort(jax.lax.stop_gradient(exact), stable=True)
    return order[by_exact], exact[by_exact]


def _cond_fun(k: int, num: int, state: _Progress, _: Any) -> Bool[Array, ""]:
    """Return whether a pattern that was not compared may be nearer than the k nearest so far."""
    rest = jnp.where(state.level < num, state.lower, jnp.inf).min()
    # A NaN bound proves nothing: all patterns are compared then.
    return ~(_farthest(state, k, num) <= rest) & (state.level < num).any()


def _body_fun(k: int, size: int, state: _Progress, args: tuple[Memory, AnyView]) -> _Progress:
    """Refine the bounds of the patterns of least bound, then compare those of least bound."""
    memory, view = args
    bounds = memory.geometry.bounds(Patterns(memory.patterns, memory.prepared))
    num = len(bounds)
    for level, bound in enumerate(bounds[1:], 1):
        width = min(len(state.lower), REFINED[min(level, len(REFINED)) - 1])
        index = _least(jnp.where(state.level < level, state.lower, jnp.inf), width)
        closer = bound(view, _rows(memory, index))
        state = _Progress(state.lower.at[index].max(closer), state.level.at[index].max(level))
    index = _least(jnp.where(state.level < num, state.lower, jnp.inf), size)
    exact = compare(memory.geometry, view, _rows(memory, index)).divergence
    new = state.level[index] < num
    exact = jnp.where(new & (state.lower[index] != jnp.inf), exact, state.lower[index])
    return _Progress(state.lower.at[index].set(exact), state.level.at[index].set(num))


def _farthest(state: _Progress, k: int, num: int) -> Float[Array, ""]:
    """Return the k-th least divergence so far."""
    return -jax.lax.top_k(-_compared(state, num), k)[0][-1]


def _compared(state: _Progress, num: int) -> Float[Array, " N"]:
    """Return the divergences so far, ∞ where there is none."""
    return jnp.where(state.level == num, state.lower, jnp.inf)


def _least(lower: Float[Array, " N"], size: int) -> Int[Array, " size"]:
    """Return the indices of the least entries, those of NaN first, so that these are compared."""
    index: Array = jax.lax.top_k(-jnp.where(jnp.isnan(lower), -jnp.inf, lower), size)[1]
    return index


def _rows(memory: Memory, index: Int[Array, " B"]) -> Patterns:
    """Return the patterns at `index`."""
    return rows_of(memory, index, jnp.ones_like(index, bool)).patterns
