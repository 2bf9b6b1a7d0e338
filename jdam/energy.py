"""Divergences, the energy and the Gibbs weights: pure functions of one query."""

from typing import Any

from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jdam import _checks
from jdam._average import compare_all, gibbs_average
from jdam._batching import in_tiles
from jdam._compile import compiled, working_dtype
from jdam._layout import gathered
from jdam.geometry.protocol import AnyMeasure
from jdam.memory import Memory, check_against
from jdam.separation import LogSumExp, Separation, heaviest
from jdam.separation import check as check_separation


def divergences(memory: Memory, query: AnyMeasure) -> Float[Array, " N"]:
    """D(ξ, Xᵢ) to every pattern: W₂² (cost |x−y|²) for `Bures`, the Sinkhorn divergence S_ε
    (cost ½|x−y|²) for `Sinkhorn`, |x−y|² for `Euclidean`.

    **Arguments:** a `memory` and one `query` of its patterns' type, dimension and dtype.
    `jax.vmap(jdam.divergences, (None, 0))` takes a batch of queries.

    **Returns:** (N,), in squared units of distance.

    **Raises:** `TypeError` or `ValueError` for a query that does not fit the memory.
    """
    return _divergences(memory, fit_query(memory, query))


@compiled()
def _divergences(memory: Memory, query: AnyMeasure) -> Float[Array, " N"]:
    return in_tiles(compare_all, queries_at_once(memory), memory, query)


def queries_at_once(memory: Memory) -> int:
    """How many queries of a batch to compare with the patterns at once."""
    return memory.geometry.tile(memory.patterns)[0]


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
    def look(memory: Memory, query: AnyMeasure, beta: Array) -> Array:
        return gibbs_average(memory, query, beta, separation=separation, with_pull=False).energy

    return in_tiles(look, queries_at_once(memory), memory, query, beta)


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
    def look(memory: Memory, query: AnyMeasure, beta: Array) -> tuple[Array, Array]:
        divergences = compare_all(memory, query)
        prior = gathered(memory.log_prior, memory.layout)
        weights = separation.weights(divergences, prior, beta)
        return weights, heaviest(weights, divergences)

    return in_tiles(look, queries_at_once(memory), memory, query, beta)


def fit_query(memory: Memory, query: AnyMeasure) -> AnyMeasure:
    """The query, checked against the memory and padded to go with its patterns."""
    if not isinstance(memory, Memory):
        raise TypeError(f"memory must be a jdam.Memory, made by jdam.store; got {type(memory)}")
    query = memory.geometry.check("query", query, 0)
    check_against(memory, "query", query)
    return memory.geometry.match(query, memory.patterns)


def inverse_temperature(memory: Memory, beta: Any) -> Float[Array, ""]:
    """β as a checked scalar: NaN where a traced value is not positive."""
    return _checks.positive("beta", beta, working_dtype(memory.dtype))
