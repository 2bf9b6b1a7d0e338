"""Proofs about one query: to which pattern recall takes it, and how close."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jdam._core.compile import compiled
from jdam._energy.certified import Bounded, Certified, bound_all
from jdam._energy.energy import fit_query, inverse_temperature
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory
from jdam.theory._neighbourhood import (
    check_memory,
    condensed,
    cost_scale,
    distances_of_means,
    neighbourhood,
)
from jdam.theory.basins import stable_radii, step_bound

#: How many steps of recall the energy's rounding is allowed for.
STEPS = 100


class Certificate(NamedTuple):
    """What is proved of a recall."""

    #: The pattern it surely ends at; −1 if nothing is proved.
    index: Int[Array, ""]  # type: ignore[assignment]
    #: A bound on its distance from that pattern; ∞ if nothing is proved.
    error: Float[Array, ""]


def certify(memory: Memory, query: AnyMeasure, beta: ArrayLike) -> Certificate:
    """Whether recall from this query is proved to converge to a pattern, and how close.

    **Gaussians and vectors.** With s = W₂(ξ, Xᵢ) for the heaviest pattern i, if s, or what the
    distances of the query from all patterns prove of it after one step, is within `basin_radius`,
    no later step leaves that ball, and `error` bounds W₂ to Xᵢ of all limits, and of what
    `jdam.recall` returns with step size 1 and its default tol, which is counted in. Neither
    commuting covariances nor a sphere are needed, as they are for Theorem 2 of
    arXiv:2509.23162.

    **Point clouds with κ = 0 and `EntropicBures`.** Means follow m⁺ = m + τ(Σ wₖmₖ − m), and the
    energy E₀ of the query is never exceeded: so if for some a ≥ |m − mᵢ|

        Σ_{k≠i} πₖ dₖ exp(β(E₀ − ½(dₖ−a)²)) ≤ a,        dₖ = |mᵢ − mₖ|,

    the mean stays within a of mᵢ for ever, and S_ε(ξ, Xᵢ) below
    E₀ − β⁻¹ log(1 − Σ_{k≠i} πₖ exp(β(E₀ − ½(dₖ−a)²))) (with πᵢ = 1), of any steps τ ≤ 1. `error`
    is √(2S_ε) of that: a query says how far it is now, its recall how close it came. Patterns
    whose means coincide are never told apart so. With κ > 0 nothing is proved.

    Clouds are told apart by their means alone: of queries that differ from a pattern in shape more
    than its mean is from the others', few are certified, and at small β none.

    Thousands of patterns take a few exact comparisons. Use `jax.vmap` over queries.

    **Arguments:** as `jdam.energy`.

    **Returns:** a `Certificate`: never wrong, but for rounding beyond what it allows for, and
    −1 is no proof of the contrary.

    **Raises:** as `jdam.energy`; `TypeError` for `DotProduct` memories, of which nothing is
    proved, and `ValueError` for sharded ones.
    """
    check_memory(memory)
    query = fit_query(memory, query)
    return Certificate(*_certify(memory, query, inverse_temperature(memory, beta)))


@compiled()
def _certify(memory: Memory, query: AnyMeasure, beta: Float[Array, ""]) -> tuple[Array, Array]:
    seen = bound_all(Certified(), memory, query, beta)
    prove = _by_distances if memory.geometry.is_squared_metric else _by_means
    proved, error = prove(memory, query, beta, seen)
    proved &= jnp.isfinite(error)
    return jnp.where(proved, seen.nearest, -1), jnp.where(proved, error, jnp.inf)


def _margin(memory: Memory) -> Float[Array, ""]:
    """What rounding may add to a distance: eps^0.7 times the size of the patterns."""
    scale, _ = memory.magnitudes()
    margin: Array = jax.lax.stop_gradient(scale) * float(jnp.finfo(scale.dtype).eps) ** 0.7
    return margin


def _by_distances(
    memory: Memory, query: AnyMeasure, beta: Array, seen: Bounded
) -> tuple[Array, Array]:
    others = neighbourhood(memory, seen.nearest, beta)
    b, tol = beta * cost_scale(memory), _margin(memory)
    prior = (
        jnp.zeros(memory.capacity, memory.dtype) if memory.log_prior is None else memory.log_prior
    )
    on = prior > -jnp.inf
    bounds = jnp.where(on, seen.lower + jnp.where(on, prior, 0) / beta, 0) / cost_scale(memory)
    distances = jnp.sqrt(jnp.maximum(bounds, 0))
    s = distances[seen.nearest]
    # The query's own distances, where they are more than the triangle inequality tells.
    once = step_bound(others._replace(distance=jnp.maximum(others.distance, distances + s)), s, b)
    least, largest = stable_radii(condensed(others), b, tol)
    return jnp.minimum(s, once + tol) <= largest, least


def _by_means(memory: Memory, query: AnyMeasure, beta: Array, seen: Bounded) -> tuple[Array, Array]:
    nearest, b = memory[seen.nearest], beta * cost_scale(memory)
    own = jnp.arange(memory.capacity, dtype=jnp.int32) == seen.nearest
    distances = jnp.where(own, jnp.inf, distances_of_means(memory, nearest))
    shift = query.mean - nearest.mean
    tol = _margin(memory)
    start = jnp.sqrt(jnp.vdot(shift, shift)) + tol
    highest = seen.energy + STEPS * memory.magnitudes()[1]
    prior = (
        jnp.zeros(memory.capacity, memory.dtype) if memory.log_prior is None else memory.log_prior
    )

    def logs(a: Array) -> Array:
        """log of the most that others can weigh while the mean is within a."""
        gap = jnp.where(own, 0, jnp.maximum(distances - a, 0))
        return jnp.where(own, -jnp.inf, prior + beta * highest - b * gap**2)

    def drift(a: Array) -> Array:
        lengths = jnp.where(own, 0, distances)
        return (lengths * jnp.exp(jnp.minimum(logs(a), 0))).sum() + tol

    a = jax.lax.fori_loop(0, 8, lambda _, a: jnp.maximum(a, drift(a)), start)
    weight = jnp.exp(jax.nn.logsumexp(logs(a)))
    still = getattr(memory.geometry, "hellinger_scale", jnp.zeros(())) == 0
    proved = still & (drift(a) <= a) & (weight < 1)
    level = highest - jnp.log1p(-jnp.where(weight < 1, weight, 0)) / beta
    own_prior = jnp.where(jnp.isfinite(prior[seen.nearest]), prior[seen.nearest], 0)
    squared = jnp.maximum(level + own_prior / beta, 0) / cost_scale(memory)
    return proved, jnp.sqrt(squared)
