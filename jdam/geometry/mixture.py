"""Gaussian mixtures under the mixture Wasserstein distance MW₂."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam._core.lapack import singular_values
from jdam._core.linalg import rounding, safe_sqrt, squared_norm
from jdam._measures.base import AnyMeasure, with_leaves
from jdam._measures.gaussian import Gaussian
from jdam._measures.mixture import GaussianMixture
from jdam.geometry._transport import Plan, transport
from jdam.geometry.bures import Full
from jdam.geometry.bures import View as GaussianView
from jdam.geometry.protocol import (
    AnyView,
    BatchSizes,
    Bound,
    Comparison,
    Embedding,
    Geometry,
    Patterns,
    average,
    batch_sizes_of,
    check_batch_ndim,
)


class View(NamedTuple):
    """A query, and each of its components as `Bures` views it."""

    query: GaussianMixture
    components: GaussianView


class Prepared(NamedTuple):
    """The moments of patterns, and what `Bures` prepares of these."""

    moments: Gaussian
    of_moments: Float[Array, "N d"]


class MixtureWasserstein(Geometry):
    """D = MW₂², the squared mixture Wasserstein distance with cost |x−y|², on Gaussian mixtures.

    Exact transport between components, whose cost is W₂² of Gaussians (Delon and Desolneux,
    arXiv:1907.05254): with Rₖₗ the polar factor of MₗᵀLₖ,

        MW₂²(ξ, X) = min over P ∈ Π(p, b) of Σₖₗ Pₖₗ (|mₖ − μₗ|² + |Lₖ − MₗRₖₗ|²).

    It is W₂² of mixtures of one component, the exact transport cost of clouds where all factors
    are 0, and W₂ ≤ MW₂ always. MW₂ is a metric on mixtures as lists of components. A pattern pulls
    each component of a query to Σₗ Pₖₗ(μₗ, MₗRₖₗ)/pₖ, the mean of those that its mass goes to:

        mₖ⁺ = mₖ + τ(Σᵢ wᵢ Σₗ Pⁱₖₗ μⁱₗ/pₖ − mₖ),    Lₖ⁺ = Lₖ + τ(Σᵢ wᵢ Σₗ Pⁱₖₗ MⁱₗRⁱₖₗ/pₖ − Lₖ).

    Weights stay. With P and R held, which majorises the energy, τ = 1 is its minimum: the energy
    never rises. A query of fewer components than a pattern, or of other weights, ends at a
    mixture of its own number and weights near it; give it those of the patterns it may be.

    Plans are vertices of polytopes, found to rounding; `Status.SOLVER` would say that one was not.
    For `jdam.theory`, D ≥ |Δ mean|², and means follow m⁺ = m + τ(Σ wᵢmᵢ − m).
    """

    max_backtracks: ClassVar[int] = 0
    cost_scale: ClassVar[float | None] = 1.0
    bounds_pay: ClassVar[bool] = True

    def check(self, name: str, measure: AnyMeasure, batch_ndim: int) -> AnyMeasure:
        if not isinstance(measure, GaussianMixture):
            raise TypeError(
                f"{name} must be a jdam.GaussianMixture for {self}; got {type(measure).__name__}"
            )
        check_batch_ndim(name, measure, batch_ndim)
        return measure

    def match(self, query: AnyMeasure, patterns: AnyMeasure) -> AnyMeasure:
        return query.padded(r=patterns.rank)

    def prepare(self, patterns: AnyMeasure) -> Any:
        moments = jax.lax.stop_gradient(patterns).moments
        return Prepared(moments, Full.prepare(moments))

    def view(self, query: AnyMeasure) -> AnyView:
        return View(query, jax.vmap(Full.view)(query.components))

    def compare(self, view: AnyView, patterns: Patterns) -> Comparison:
        measures, query = patterns.measures, view.query
        found, costs, plans = _transported(view, measures)
        on = query.weights > 0
        shares = plans.mass / jnp.where(on, query.weights, 1)[None, :, None]
        aligned = _by_pattern(found.pull.factor, measures)
        pull = Gaussian(
            jnp.einsum("bkl,bld->bkd", shares, measures.means),
            jnp.einsum("bkl,bkldr->bkdr", shares, aligned),
        )
        allowed = rounding(sum(costs.shape[1:]), costs.dtype) * costs.max((1, 2))
        not_converged = jax.lax.stop_gradient(plans.gap > 64 * allowed)
        return Comparison(plans.cost, pull, not_converged=not_converged)

    def plan(self, view: AnyView, patterns: Patterns) -> Float[Array, "B K L"]:
        """Between components."""
        return _transported(view, patterns.measures)[2].mass

    def embed(self, measures: AnyMeasure, prepared: Prepared | None = None) -> Embedding:
        """Those of the moments, whose W₂ is at most that of the mixtures (Gelbrich)."""
        moments, spread = self.prepare(measures) if prepared is None else prepared
        vectors, errors = Full.embed(moments, spread)
        return Embedding(vectors, errors + _rounding(moments, measures.num_components))

    def bounds(self, patterns: Patterns) -> tuple[Bound, ...]:
        """By the moments, since W₂² ≥ |Δ mean|² + Bures² of the covariances (Gelbrich), which
        `Bures` bounds; and by exact transport with lower bounds on the costs."""
        return *map(_by_moments, Full.bounds()), _by_components

    def move(self, view: AnyView, pull: AnyMeasure, step_size: Array) -> AnyMeasure:
        query = view.query
        moved = jax.vmap(Full.move, (0, 0, None))(view.components, pull, step_size)
        on = (query.weights > 0)[:, None]  # padding stays where it is
        means = jnp.where(on, moved.mean, query.means)
        factors = jnp.where(on[..., None], moved.factor, query.factors)
        return with_leaves(query, query.weights, means, factors)

    def residual(self, view: AnyView, pull: AnyMeasure) -> Array:
        """√Σ pₖ(|Δmₖ|² + |ΔLₖ|²), which is at least MW₂ of the step."""
        own = view.components.query
        means, factors = pull.mean - own.mean, pull.factor - own.factor
        squares = jnp.vecdot(means, means) + squared_norm(factors)
        return safe_sqrt(jnp.vdot(view.query.weights, squares))

    def gauge(self, measure: AnyMeasure, tangent: AnyMeasure) -> AnyMeasure:
        """The weights too."""
        still = super().gauge(measure, tangent)
        return with_leaves(still, tangent.weights, still.means, still.factors)

    def typical_norm(self, patterns: AnyMeasure, weights: Array | None = None) -> Array:
        """The root mean square of |x| over all patterns."""
        squares = jnp.vecdot(patterns.means, patterns.means) + squared_norm(patterns.factors)
        return safe_sqrt(average(jnp.vecdot(patterns.weights, squares), weights))

    def batch_sizes(self, patterns: AnyMeasure) -> BatchSizes:
        pairs = patterns.num_components**2
        return batch_sizes_of(pairs * patterns.factors[0, 0].size)


def _transported(
    view: View, mixtures: GaussianMixture
) -> tuple[Comparison, Float[Array, "B K L"], Plan]:
    """Of each component of a query with those of mixtures; their costs; and the plans."""
    held = Patterns(_flat(mixtures))
    found = jax.vmap(lambda component: Full.compare(component, held))(view.components)
    costs = _by_pattern(found.divergence, mixtures)
    plans = jax.vmap(transport, (0, None, 0))(costs, view.query.weights, mixtures.weights)
    return found, costs, plans


def aligned_plan(
    view: View, mixtures: GaussianMixture
) -> tuple[Float[Array, "B K L"], Float[Array, "B K L d r"]]:
    """Plans between components, and the factors MₗRₖₗ of mixtures aligned with the query's."""
    found, _, plans = _transported(view, mixtures)
    return plans.mass, _by_pattern(found.pull.factor, mixtures)


def _flat(mixtures: GaussianMixture) -> Gaussian:
    """All components of a batch (B,) in a row, (B·L,)."""
    means, factors = mixtures.means, mixtures.factors
    return Gaussian(means.reshape(-1, mixtures.dim), factors.reshape(-1, *factors.shape[2:]))


def _by_pattern(rows: Float[Array, "K BL ..."], mixtures: GaussianMixture) -> Array:
    """What belongs to pairs of components, (B, K, L, …)."""
    apart = rows.reshape(len(rows), *mixtures.weights.shape, *rows.shape[2:])
    return jnp.moveaxis(apart, 0, 1)


def _by_moments(bound: Callable[[Any, Patterns], Array]) -> Bound:
    def of_moments(view: View, patterns: Patterns) -> Float[Array, " B"]:
        prepared = patterns.prepared
        moments = view.query.moments.pad(prepared.moments.rank)
        held = Patterns(prepared.moments, prepared.of_moments)
        found = bound(Full.view(moments), held)
        # The moments are rounded, each by so much in W₂.
        num = view.query.num_components
        error = _rounding(moments, num) + _rounding(prepared.moments, num)
        return jnp.maximum(safe_sqrt(found) - error, 0) ** 2

    return of_moments


def by_spectra(view: View, patterns: Patterns, *, about_means: bool) -> Float[Array, " B"]:
    """Of mixtures in any pose: Σᵣ(√λᵣ − √λ'ᵣ)² of the spectra of both covariances, which bounds
    Bures² in every pose, and of means, which turns about the origin leave as long, unless they are
    laid on each other."""
    moments = patterns.prepared.moments
    query = view.query.moments.pad(moments.rank)
    own = singular_values(moments.factor)
    gaps = singular_values(query.factor)[None, : own.shape[1]] - own
    found = jnp.vecdot(gaps, gaps)
    if not about_means:
        longer = safe_sqrt(jnp.vecdot(query.mean, query.mean))
        found = found + (longer - safe_sqrt(jnp.vecdot(moments.mean, moments.mean))) ** 2
    num = view.query.num_components
    error = _rounding(query, num) + _rounding(moments, num)
    return jnp.maximum(safe_sqrt(found) - error, 0) ** 2


def _rounding(moments: Gaussian, num_components: int) -> Array:
    """The rounding error of moments in W₂, relative to their distance W₂ from the point 0."""
    size = safe_sqrt(jnp.vecdot(moments.mean, moments.mean) + squared_norm(moments.factor))
    return rounding(moments.dim * moments.rank + num_components, size.dtype) * size


def _by_components(view: View, patterns: Patterns) -> Float[Array, " B"]:
    measures = patterns.measures
    held = Patterns(_flat(measures))
    principal = Full.bounds()[1]
    costs = jax.vmap(lambda component: principal(component, held))(view.components)
    costs = _by_pattern(costs, measures)
    plans = jax.vmap(transport, (0, None, 0))(costs, view.query.weights, measures.weights)
    error = rounding(4 * sum(costs.shape[1:]), costs.dtype) * costs.max((1, 2))
    return plans.cost - plans.gap - error
