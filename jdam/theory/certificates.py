"""Certificates: proofs that recall from a given query ends near a given pattern."""

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
    stable_radii,
    step_bound,
)

#: Number of recall steps for whose rounding errors of the energy the proof has an allowance.
STEPS = 100


class Certificate(NamedTuple):
    """The result of `certify`."""

    #: The index of the pattern near which recall ends; −1 if nothing is proved.
    index: Int[Array, ""]  # type: ignore[assignment]
    #: An upper bound on the distance from that pattern; ∞ if nothing is proved.
    error: Float[Array, ""]


def certify(memory: Memory, query: AnyMeasure, beta: ArrayLike) -> Certificate:
    """Prove that recall from `query` ends near a pattern, if possible, and bound its distance from
    that pattern.

    **Gaussians and vectors.** Let s = W₂(ξ, Xᵢ) for the heaviest pattern i. If s, or a bound on the
    distance after one step from the distances of the query to all patterns, is at most
    `basin_radius`, no later step leaves that ball. Then `error` bounds W₂ to Xᵢ for all limits of
    the iteration, and for the result of `jdam.recall` with step size 1 and the default tol, which
    is included. Covariances need not commute and patterns need not be on a sphere, as they must for
    Theorem 2 of arXiv:2509.23162.

    **Point clouds with κ = 0, mixtures and `EntropicBures`.** Means follow
    m⁺ = m + τ(Σ wₖmₖ − m), and the energy never exceeds the energy E₀ of the query. D ≥ c|Δm|² with
    c = 1 for mixtures and ½ else. If for some a ≥ |m − mᵢ|

        Σ_{k≠i} πₖ dₖ exp(β(E₀ − c(dₖ−a)²)) ≤ a,        dₖ = |mᵢ − mₖ|,

    then for all step sizes τ ≤ 1 the mean stays within a of mᵢ, and D(ξ, Xᵢ) stays below
    E₀ − β⁻¹ log(1 − Σ_{k≠i} πₖ exp(β(E₀ − c(dₖ−a)²))), with πᵢ = 1. `error` is √(D/c) for this
    bound on D, so that it is about the distance of the query; the certificate of a recalled
    measure bounds the distance of the result. The proof uses means only: it never separates
    patterns whose means coincide, and rarely succeeds for queries that differ from a pattern in
    shape by more than the distance between means, or at small β. With κ > 0 nothing is proved.

    Few patterns are compared exactly. Use `jax.vmap` for batches of queries.

    **Arguments:** as in `jdam.energy`.

    **Returns:** a `Certificate`. It allows for rounding errors of the usual size. The index −1 does
    not prove that recall fails.

    **Raises:** as `jdam.energy`; `TypeError` for `DotProduct` memories, for which nothing is
    proved, and `ValueError` for sharded ones.
    """
    check_memory(memory)
    query = fit_query(memory, query)
    return Certificate(*_certify(memory, query, inverse_temperature(memory, beta)))


@compiled()
def _certify(memory: Memory, query: AnyMeasure, beta: Float[Array, ""]) -> tuple[Array, Array]:
    bounded = bound_all(Certified(), memory, query, beta)
    prove = _by_distances if memory.geometry.is_squared_metric else _by_means
    proved, error = prove(memory, query, beta, bounded)
    proved &= jnp.isfinite(error)
    return jnp.where(proved, bounded.nearest, -1), jnp.where(proved, error, jnp.inf)


def _margin(memory: Memory) -> Float[Array, ""]:
    """Return the allowance for rounding errors of a distance: eps^0.7 times the typical norm of the
    patterns, which is also the default of `Geometry.tolerances`.
    """
    scale, _ = memory.magnitudes()
    margin: Array = jax.lax.stop_gradient(scale) * float(jnp.finfo(scale.dtype).eps) ** 0.7
    return margin


def _by_distances(
    memory: Memory, query: AnyMeasure, beta: Array, bounded: Bounded
) -> tuple[Array, Array]:
    """Return the proof for squared metrics: whether it succeeds, and the bound on the distance."""
    others = neighbourhood(memory, bounded.nearest, beta)
    b, tol = beta * cost_scale(memory), _margin(memory)
    prior = memory.log_weights
    on = prior > -jnp.inf
    bounds = jnp.where(on, bounded.lower + jnp.where(on, prior, 0) / beta, 0) / cost_scale(memory)
    distances = jnp.sqrt(jnp.maximum(bounds, 0))
    s = distances[bounded.nearest]
    # `step_bound` uses dₖ − s as the distance from the query to pattern k; where the distance of
    # the query is known to be larger, dₖ is replaced by that distance plus s.
    one_step = step_bound(
        others._replace(distance=jnp.maximum(others.distance, distances + s)), s, b
    )
    smallest, largest = stable_radii(condensed(others), b, tol)
    return jnp.minimum(s, one_step + tol) <= largest, smallest


def _by_means(
    memory: Memory, query: AnyMeasure, beta: Array, bounded: Bounded
) -> tuple[Array, Array]:
    """Return the proof by means and the energy: whether it succeeds, and the bound on √(D/c)."""
    nearest, b = memory[bounded.nearest], beta * cost_scale(memory)
    is_self = jnp.arange(memory.capacity, dtype=jnp.int32) == bounded.nearest
    distances = jnp.where(is_self, jnp.inf, distances_of_means(memory, nearest))
    shift = query.mean - nearest.mean
    tol = _margin(memory)
    start = jnp.sqrt(jnp.vdot(shift, shift)) + tol
    highest = bounded.energy + STEPS * memory.magnitudes()[1]
    prior = memory.log_weights

    def logs(a: Array) -> Array:
        """Return upper bounds on the log-weights of the other patterns while |m − mᵢ| ≤ a."""
        gap = jnp.where(is_self, 0, jnp.maximum(distances - a, 0))
        return jnp.where(is_self, -jnp.inf, prior + beta * highest - b * gap**2)

    def drift(a: Array) -> Array:
        """Return an upper bound on |Σ wₖmₖ − mᵢ| while |m − mᵢ| ≤ a."""
        lengths = jnp.where(is_self, 0, distances)
        return (lengths * jnp.exp(jnp.minimum(logs(a), 0))).sum() + tol

    a = jax.lax.fori_loop(0, 8, lambda _, a: jnp.maximum(a, drift(a)), start)
    weight = jnp.exp(jax.nn.logsumexp(logs(a)))
    constant_weights = getattr(memory.geometry, "hellinger_scale", jnp.zeros(())) == 0
    proved = constant_weights & (drift(a) <= a) & (weight < 1)
    level = highest - jnp.log1p(-jnp.where(weight < 1, weight, 0)) / beta
    own_prior = jnp.where(jnp.isfinite(prior[bounded.nearest]), prior[bounded.nearest], 0)
    squared = jnp.maximum(level + own_prior / beta, 0) / cost_scale(memory)
    return proved, jnp.sqrt(squared)
