"""Divergences, the energy and the Gibbs weights: pure functions of one query."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jdam._core import checks
from jdam._core.batching import in_batches
from jdam._core.compile import compiled, working_dtype
from jdam._core.mesh import all_rows
from jdam._energy.average import Settings, compare_all, evaluate
from jdam._energy.separation import LogSumExp, Separation, heaviest
from jdam._energy.separation import check as check_separation
from jdam._measures.base import AnyMeasure, any_of
from jdam._measures.batches import as_batch
from jdam._memory import slots
from jdam._memory.memory import Memory, check_against, check_memory


def divergences(memory: Memory, query: AnyMeasure) -> Float[Array, " N"]:
    """D(ξ, Xᵢ) to every pattern: W₂² (cost |x−y|²) for `Bures`, the Sinkhorn divergence S_ε
    (cost ½|x−y|²) for `Sinkhorn`, the one-sided divergence of `Chamfer` (the same cost), |x−y|² for
    `Euclidean`.

    **Arguments:** a `memory` and one `query` of its patterns' type, dimension and dtype.
    `jax.vmap(jdam.divergences, (None, 0))` takes a batch of queries.

    **Returns:** (N,), in squared units of distance; ∞ for the free slots of a memory with room
    to grow.

    **Raises:** `TypeError` or `ValueError` for a query that does not fit the memory.
    """
    return _divergences(memory, fit_query(memory, query))


@compiled()
def _divergences(memory: Memory, query: AnyMeasure) -> Float[Array, " N"]:
    return in_batches(divergences_of, query_batch_size(memory), memory, query)


def divergences_of(memory: Memory, query: AnyMeasure) -> Float[Array, " N"]:
    """D(ξ, Xᵢ), ∞ for free slots."""
    found, occupied = compare_all(memory, query), memory.occupied
    if occupied is None:
        return found
    return jnp.where(occupied, found, jnp.where(slots.size_of(memory) < 0, jnp.nan, jnp.inf))


def query_batch_size(memory: Memory) -> int:
    """How many queries of a batch to compare with the patterns at once."""
    return memory.geometry.batch_sizes(memory.patterns).queries


def energy(
    memory: Memory, query: AnyMeasure, beta: ArrayLike, *, separation: Separation = LogSumExp()
) -> Float[Array, ""]:
    """E(ξ) = −β⁻¹ log Σᵢ πᵢ exp(−β D(ξ, Xᵢ)), πᵢ = 1 unless the memory has a prior.

    For Gaussians, D = W₂²: the energy of arXiv:2509.23162. Differentiable in query, patterns,
    β and prior, to second order.

    **Arguments:** a `memory`; one `query` of its patterns' type, dimension and dtype; the
    inverse temperature `beta` > 0, a scalar, per squared unit of distance; the `separation`,
    of which `jdam.Entmax` and `jdam.Epanechnikov` define other energies.

    **Raises:** `TypeError` or `ValueError` for a query that does not fit the memory, and
    for a β that is no positive number. Under a trace, β ≤ 0 gives NaN.
    """
    query = fit_query(memory, query)
    check_separation(separation)
    return _energy(memory, query, inverse_temperature(memory, beta), separation=separation)


@compiled(static=("separation",))
def _energy(
    memory: Memory, query: AnyMeasure, beta: Float[Array, ""], *, separation: Separation
) -> Float[Array, ""]:
    def at(memory: Memory, query: AnyMeasure, beta: Array) -> Array:
        return evaluate(Settings(separation, with_pull=False), memory, query, beta).energy

    return in_batches(at, query_batch_size(memory), memory, query, beta)


def gibbs_weights(
    memory: Memory, query: AnyMeasure, beta: ArrayLike, *, separation: Separation = LogSumExp()
) -> Float[Array, " N"]:
    """wᵢ(ξ) = softmaxᵢ(log πᵢ − β D(ξ, Xᵢ)), of shape (N,); other separations say how else.

    Arguments and errors as in `energy`.
    """
    return weigh(memory, query, beta, separation)[0]


def weigh(
    memory: Memory, query: AnyMeasure, beta: ArrayLike, separation: Separation
) -> tuple[Float[Array, " N"], Int[Array, ""]]:
    """The weights, and the heaviest pattern."""
    query = fit_query(memory, query)
    check_separation(separation)
    return _weigh(memory, query, inverse_temperature(memory, beta), separation=separation)


@compiled(static=("separation",))
def _weigh(
    memory: Memory, query: AnyMeasure, beta: Float[Array, ""], *, separation: Separation
) -> tuple[Float[Array, " N"], Int[Array, ""]]:
    def at(memory: Memory, query: AnyMeasure, beta: Array) -> tuple[Array, Array]:
        divergences = compare_all(memory, query)
        prior = all_rows(memory.log_prior, memory.layout)
        weights = separation.weights(divergences, prior, beta)
        return weights, heaviest(weights, divergences, prior)

    return in_batches(at, query_batch_size(memory), memory, query, beta)


def fit_query(memory: Memory, query: AnyMeasure) -> AnyMeasure:
    """The query, checked against the memory and padded to go with its patterns."""
    check_memory(memory)
    query = memory.geometry.check("query", query, 0)
    check_against(memory, "query", query)
    return memory.geometry.match(query, memory.patterns)


def fit_queries(memory: Memory, queries: AnyMeasure) -> AnyMeasure:
    """A batch of queries (Q,), or a list, checked and padded likewise."""
    check_memory(memory)
    queries = memory.geometry.check("queries", as_batch(queries), 1)
    check_against(memory, "queries", any_of(queries))
    return memory.geometry.match(queries, memory.patterns)


def inverse_temperature(memory: Memory, beta: Any) -> Float[Array, ""]:
    """β as a checked scalar: NaN where a traced value is not positive."""
    return checks.positive("beta", beta, working_dtype(memory.dtype))
