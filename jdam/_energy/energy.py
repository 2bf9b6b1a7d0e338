"""Divergences, the energy and the Gibbs weights: pure functions of a memory and one query."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jdam._core import checks
from jdam._core.compile import compiled, working_dtype
from jdam._core.mesh import all_rows
from jdam._energy.average import Settings, compare_all, evaluate
from jdam._energy.separation import LogSumExp, Separation, heaviest
from jdam._energy.separation import check as check_separation
from jdam._measures.base import AnyMeasure, check_like
from jdam._measures.batches import as_batch
from jdam._memory import slots
from jdam._memory.memory import Memory, check_memory


def divergences(memory: Memory, query: AnyMeasure) -> Float[Array, " N"]:
    """Return D(ξ, Xᵢ) for every pattern, in squared units of distance.

    D is W₂² (cost |x−y|²) for `Bures`, the Sinkhorn divergence S_ε (cost ½|x−y|²) for `Sinkhorn`,
    the one-sided divergence of `Chamfer` (the same cost), and |x−y|² for `Euclidean`.

    **Arguments:**

    - `memory`: N patterns.
    - `query`: one measure of the patterns' type, dimension and dtype.
      `jax.vmap(jdam.divergences, (None, 0))` takes a batch of queries.

    **Returns:** (N,); ∞ for the free slots of a memory with capacity.

    **Raises:** `TypeError` or `ValueError` for a query that does not fit the memory.
    """
    return _divergences(memory, fit_query(memory, query))


def divergences_of(memory: Memory, query: AnyMeasure) -> Float[Array, " N"]:
    """Return D(ξ, Xᵢ) for every pattern, ∞ for free slots."""
    result, occupied = compare_all(memory, query), memory.occupied
    if occupied is None:
        return result
    return jnp.where(occupied, result, jnp.where(slots.size_of(memory) < 0, jnp.nan, jnp.inf))


def query_batch_size(memory: Memory, **_: Any) -> int:
    """Return the number of queries of a batch that are compared with the patterns at once."""
    return memory.geometry.batch_sizes(memory.patterns).queries


_divergences = compiled(batch_size=query_batch_size)(divergences_of)


def energy(
    memory: Memory, query: AnyMeasure, beta: ArrayLike, *, separation: Separation = LogSumExp()
) -> Float[Array, ""]:
    """Return E(ξ) = −β⁻¹ log Σᵢ πᵢ exp(−β D(ξ, Xᵢ)); πᵢ = 1 unless the memory has a prior.

    For Gaussians, D = W₂²: the energy of arXiv:2509.23162. It can be differentiated in the query,
    the patterns, β and the prior, twice.

    **Arguments:**

    - `memory`: N patterns.
    - `query`: one measure of the patterns' type, dimension and dtype.
    - `beta` > 0: the inverse temperature, a scalar, per squared unit of distance.
    - `separation`: the shape of the energy; `jdam.Entmax` and `jdam.Epanechnikov` define others.

    **Returns:** a scalar, in squared units of distance.

    **Raises:** `TypeError` or `ValueError` for a query that does not fit the memory, and for a β
    that is no positive number. Under a trace, β ≤ 0 gives NaN.
    """
    query = fit_query(memory, query)
    check_separation(separation)
    return _energy(memory, query, inverse_temperature(memory, beta), separation=separation)


@compiled(static=("separation",), batch_size=query_batch_size)
def _energy(
    memory: Memory, query: AnyMeasure, beta: Float[Array, ""], *, separation: Separation
) -> Float[Array, ""]:
    return evaluate(Settings(separation, with_pull=False), memory, query, beta).energy


def gibbs_weights(
    memory: Memory, query: AnyMeasure, beta: ArrayLike, *, separation: Separation = LogSumExp()
) -> Float[Array, " N"]:
    """Return the weights wᵢ(ξ) = softmaxᵢ(log πᵢ − β D(ξ, Xᵢ)), (N,), or those of another
    separation.

    Arguments and errors are those of `energy`.
    """
    return weigh(memory, query, beta, separation)[0]


def weigh(
    memory: Memory, query: AnyMeasure, beta: ArrayLike, separation: Separation
) -> tuple[Float[Array, " N"], Int[Array, ""]]:
    """Return the weights, (N,), and the index of the heaviest pattern."""
    query = fit_query(memory, query)
    check_separation(separation)
    return _weigh(memory, query, inverse_temperature(memory, beta), separation=separation)


@compiled(static=("separation",), batch_size=query_batch_size)
def _weigh(
    memory: Memory, query: AnyMeasure, beta: Float[Array, ""], *, separation: Separation
) -> tuple[Float[Array, " N"], Int[Array, ""]]:
    divergences = compare_all(memory, query)
    prior = all_rows(memory.log_prior, memory.layout)
    weights = separation.weights(divergences, prior, beta)
    return weights, heaviest(weights, divergences, prior)


def fit_query(memory: Memory, query: AnyMeasure) -> AnyMeasure:
    """Return the query, checked against the memory and padded to the sizes of its patterns."""
    check_memory(memory)
    query = memory.geometry.check("query", query, 0)
    check_like("query", query, memory.patterns, "the memory")
    return memory.geometry.match(query, memory.patterns)


def fit_queries(memory: Memory, queries: AnyMeasure) -> AnyMeasure:
    """Return a batch of queries (Q,), or a list as one, checked and padded as in `fit_query`."""
    check_memory(memory)
    queries = memory.geometry.check("queries", as_batch(queries), 1)
    check_like("queries", queries, memory.patterns, "the memory")
    return memory.geometry.match(queries, memory.patterns)


def inverse_temperature(memory: Memory, beta: Any) -> Float[Array, ""]:
    """Return β as a checked scalar, NaN where a traced value is not positive."""
    return positive_for(memory, "beta", beta)


def positive_for(
    memory: Memory, name: str, value: Any, *, or_zero: bool = False
) -> Float[Array, ""]:
    """Return the value as a checked scalar > 0, or ≥ 0, in the dtype of computations with the
    memory; NaN where a traced value is not.
    """
    return checks.positive(name, value, working_dtype(memory.dtype), or_zero=or_zero)
