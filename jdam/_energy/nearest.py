"""The nearest patterns, by all divergences or by bounds that prove the other patterns farther."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, PyTree

from jdam._core import checks
from jdam._core.batching import in_batches
from jdam._core.compile import compiled
from jdam._energy.average import compare, view_of
from jdam._energy.branch_and_bound import Goal, bounds_of, branch_and_bound, rows_of
from jdam._energy.certified import Certified, choose
from jdam._energy.energy import divergences_of, fit_query, query_batch_size
from jdam._energy.evaluation import Block
from jdam._energy.mapped import nearest_in_file
from jdam._energy.search import Search
from jdam._energy.separation import LogSumExp
from jdam._measures.base import AnyMeasure
from jdam._memory.mapped import MappedMemory
from jdam._memory.memory import Memory
from jdam.geometry.protocol import AnyView, Comparison


def nearest(
    memory: Memory | MappedMemory, query: AnyMeasure, k: int = 1, *, search: Search | None = None
) -> tuple[Int[Array, " k"], Float[Array, " k"]]:
    """Return the k patterns of least divergence D(ξ, Xᵢ) and these divergences, in ascending order.

    The result is exact: either all patterns are compared, or lower bounds prove the others farther.
    The prior of the memory has no influence. Patterns at the same divergence come in the order of
    their indices if all are compared, in any order otherwise.

    **Arguments:**

    - `memory`, `query` as in `divergences`; a batch of queries by
      `jax.vmap(lambda query: jdam.nearest(memory, query, k))`. A memory from `jdam.open` takes one
      query, outside of `jax.jit`.
    - `k`: from 1 to the number of patterns.
    - `search`: `Exhaustive()` compares all patterns; `Certified()` compares as many as the proof
      needs, and only its `num_candidates` is used. None chooses as `recall` does. A sharded memory
      and a geometry without bounds are always searched exhaustively.

    **Returns:** indices (k,), int32, and divergences (k,), in the units of `divergences`. Free
    slots of a memory with capacity have divergence ∞. The divergences can be differentiated.

    **Raises:** as `divergences`; `TypeError` or `ValueError` for a `k` that is no int from 1 to N,
    and for another `search`.
    """
    if isinstance(memory, MappedMemory):
        return nearest_in_file(memory, query, k, partial(nearest, search=search))
    query = fit_query(memory, query)
    k, most = checks.positive_int("k", k), memory.length_or_capacity
    if k > most:
        raise ValueError(f"k must be at most the number of patterns, {most}; got {k}")
    chosen = choose(search, memory, LogSumExp())
    result: tuple[Array, Array]
    if isinstance(chosen, Certified) and memory.layout is None and bounds_of(memory):
        size = min(memory.capacity, max(k, chosen.num_candidates))
        result = _certified(memory, query, k=k, size=size)
    else:
        result = _exhaustive(memory, query, k=k)
    return result


@compiled(static=("k",))
def _exhaustive(memory: Memory, query: AnyMeasure, *, k: int) -> tuple[Array, Array]:
    divergences = in_batches(divergences_of, query_batch_size(memory), memory, query)
    index = jnp.argsort(jax.lax.stop_gradient(divergences), stable=True)[:k].astype(jnp.int32)
    return index, divergences[index]


class Closest(Goal):
    """The k patterns of least D that were compared, in ascending order."""

    k: int = eqx.field(static=True)

    def start(self, memory: Memory, view: AnyView, block: Block) -> tuple[Array, Array]:
        return jnp.full(self.k, jnp.nan, memory.dtype), jnp.full(self.k, -1, jnp.int32)

    def add(self, result: PyTree, comparison: Comparison, block: Block) -> tuple[Array, Array]:
        # Old entries come last: they are NaN at the start, as new ones are for invalid queries.
        divergences = jnp.concatenate([comparison.divergence, result[0]])
        on = jnp.concatenate([block.log_prior != -jnp.inf, jnp.ones(self.k, bool)])
        order = jnp.lexsort((divergences, ~on))[: self.k]
        return divergences[order], jnp.concatenate([block.indices, result[1]])[order]

    def shifted(self, bounds: Array, log_prior: Array | None) -> Array:
        return bounds if log_prior is None else jnp.where(log_prior == -jnp.inf, jnp.inf, bounds)

    def least(self, bounds: Array) -> Array:
        bound: Array = bounds.min(-1)
        return bound

    def matters(self, bound: Array, result: PyTree, share: ArrayLike) -> Bool[Array, ""]:
        # A NaN bound proves nothing, and the pattern is compared; of an invalid query nothing is.
        invalid = jnp.isnan(result[0][0]) & (result[1][0] >= 0)
        matters: Array = ~(result[0][-1] <= bound) & (bound != jnp.inf) & ~invalid
        return matters


@compiled(static=("k", "size"))
def _certified(memory: Memory, query: AnyMeasure, *, k: int, size: int) -> tuple[Array, Array]:
    view, prior = view_of(memory.geometry, query), None
    if memory.occupied is not None:
        prior = jnp.where(memory.occupied, jnp.zeros((), memory.dtype), -jnp.inf)
    args = jax.lax.stop_gradient((replace(memory, log_prior=prior), query, view))
    rounds = -(-memory.capacity // size)
    state = branch_and_bound(Closest(k), *args, None, size=size, rounds=rounds)
    # With fewer patterns than k, the last ones are free slots.
    index = jnp.where(state.result[1] < 0, memory.capacity - 1, state.result[1])
    exact = compare(memory.geometry, view, rows_of(memory, index, index >= 0).patterns).divergence
    if memory.occupied is not None:
        exact = jnp.where(memory.occupied[index], exact, jnp.inf)
    order = jnp.argsort(jax.lax.stop_gradient(exact), stable=True)
    return index[order], exact[order]
