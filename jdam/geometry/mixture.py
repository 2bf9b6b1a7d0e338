"""The geometry `MixtureWasserstein`: Gaussian mixtures under the distance MW₂."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree

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
    """A query, and its components as prepared by `Bures`."""

    query: GaussianMixture
    components: GaussianView


class Prepared(NamedTuple):
    """The moments of patterns, and what `Bures` prepares for them."""

    moments: Gaussian
    prepared_moments: Float[Array, "N d"]


class MixtureWasserstein(Geometry):
    """D = MW₂², the squared mixture Wasserstein distance with cost |x−y|², on Gaussian mixtures.

    It is the exact transport cost between components, whose ground cost is W₂² of Gaussians (Delon
    and Desolneux, arXiv:1907.05254): with Rₖₗ the polar factor of MₗᵀLₖ,

        MW₂²(ξ, X) = min over P ∈ Π(p, b) of Σₖₗ Pₖₗ (|mₖ − μₗ|² + |Lₖ − MₗRₖₗ|²).

    It is W₂² for mixtures of one component, the exact transport cost of clouds if all factors are
    0, and W₂ ≤ MW₂ always. MW₂ is a metric on mixtures as lists of components. The target of
    component k of a query, for one pattern, is the mean Σₗ Pₖₗ(μₗ, MₗRₖₗ)/pₖ of the components that
    its mass is moved to:

        mₖ⁺ = mₖ + τ(Σᵢ wᵢ Σₗ Pⁱₖₗ μⁱₗ/pₖ − mₖ),    Lₖ⁺ = Lₖ + τ(Σᵢ wᵢ Σₗ Pⁱₖₗ MⁱₗRⁱₖₗ/pₖ − Lₖ).

    Weights do not change. For constant P and R the energy has a quadratic majorant, whose minimum
    is at τ = 1: the energy never rises. A query with fewer components than a pattern, or with other
    weights, ends at a mixture of its own number and weights near the pattern; choose those of the
    patterns.

    Plans are vertices of polytopes, exact up to rounding; the status is `Status.SOLVER` if a plan
    is not. For `jdam.theory`, D ≥ |Δ mean|², and means follow m⁺ = m + τ(Σ wᵢmᵢ − m).
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

    def prepare(self, patterns: AnyMeasure) -> PyTree:
        moments = jax.lax.stop_gradient(patterns).moments
        return Prepared(moments, Full.prepare(moments))

    def view(self, query: AnyMeasure) -> AnyView:
        return View(query, jax.vmap(Full.view)(query.components))

    def compare(self, view: AnyView, patterns: Patterns) -> Comparison:
        measures, query = patterns.measures, view.query
        comparison, costs, plans = _solve(view, measures)
        has_weight = query.weights > 0
        fractions = plans.mass / jnp.where(has_weight, query.weights, 1)[None, :, None]
        aligned = _by_pattern(comparison.pull.factor, measures)
        pull = Gaussian(
            jnp.einsum("bkl,bld->bkd", fractions, measures.means),
            jnp.einsum("bkl,bkldr->bkdr", fractions, aligned),
        )
        rounding_error = rounding(sum(costs.shape[1:]), costs.dtype) * costs.max((1, 2))
        not_converged = jax.lax.stop_gradient(plans.gap > 64 * rounding_error)
        return Comparison(plans.cost, pull, not_converged=not_converged)

    def plan(self, view: AnyView, patterns: Patterns) -> Float[Array, "B K L"]:
        """Return the plans between components."""
        return _solve(view, patterns.measures)[2].mass

    def embed(self, measures: AnyMeasure, prepared: Prepared | None = None) -> Embedding:
        """Return the vectors of the moments, whose W₂ is at most that of the mixtures
        (Gelbrich).
        """
        moments, prepared_moments = self.prepare(measures) if prepared is None else prepared
        vectors, errors = Full.embed(moments, prepared_moments)
        return vectors, errors + _rounding(moments, measures.num_components)

    def bounds(self, patterns: Patterns) -> tuple[Bound, ...]:
        """Return bounds by the moments, since W₂² ≥ |Δ mean|² + Bures² of the covariances
        (Gelbrich), which `Bures` bounds; and by exact transport with lower bounds on the costs.
        """
        return *map(_by_moments, Full.bounds()), _by_components

    def move(self, view: AnyView, pull: AnyMeasure, step_size: Array) -> AnyMeasure:
        query = view.query
        moved = jax.vmap(Full.move, (0, 0, None))(view.components, pull, step_size)
        has_weight = (query.weights > 0)[:, None]  # padding does not move
        means = jnp.where(has_weight, moved.mean, query.means)
        factors = jnp.where(has_weight[..., None], moved.factor, query.factors)
        return with_leaves(query, query.weights, means, factors)

    def residual(self, view: AnyView, pull: AnyMeasure) -> Array:
        """Compute √Σ pₖ(|Δmₖ|² + |ΔLₖ|²), which is at least MW₂ of the step."""
        components = view.components.query
        means, factors = pull.mean - components.mean, pull.factor - components.factor
        squares = jnp.vecdot(means, means) + squared_norm(factors)
        return safe_sqrt(jnp.vdot(view.query.weights, squares))

    def gauge(self, measure: AnyMeasure, tangent: AnyMeasure) -> AnyMeasure:
        """Project a tangent on the gauge of the components, and on the weights, which no step
        moves.
        """
        projected = super().gauge(measure, tangent)
        return with_leaves(projected, tangent.weights, projected.means, projected.factors)

    def typical_norm(self, patterns: AnyMeasure, weights: Array | None = None) -> Array:
        """Return the root mean square of |x| over all patterns."""
        squares = jnp.vecdot(patterns.means, patterns.means) + squared_norm(patterns.factors)
        return safe_sqrt(average(jnp.vecdot(patterns.weights, squares), weights))

    def batch_sizes(self, patterns: AnyMeasure) -> BatchSizes:
        pairs = patterns.num_components**2
        return batch_sizes_of(pairs * patterns.factors[0, 0].size)


def _solve(view: View, mixtures: GaussianMixture) -> tuple[Comparison, Float[Array, "B K L"], Plan]:
    """Compare each component of a query with those of mixtures, and return the comparison, the
    costs and the plans.
    """
    components = Patterns(_flattened(mixtures))
    comparison = jax.vmap(lambda component: Full.compare(component, components))(view.components)
    costs = _by_pattern(comparison.divergence, mixtures)
    plans = jax.vmap(transport, (0, None, 0))(costs, view.query.weights, mixtures.weights)
    return comparison, costs, plans


def aligned_plan(
    view: View, mixtures: GaussianMixture
) -> tuple[Float[Array, "B K L"], Float[Array, "B K L d r"]]:
    """Return the plans between components, and the factors MₗRₖₗ of mixtures aligned with those of
    the query.
    """
    comparison, _, plans = _solve(view, mixtures)
    return plans.mass, _by_pattern(comparison.pull.factor, mixtures)


def _flattened(mixtures: GaussianMixture) -> Gaussian:
    """Return all components of a batch (B,) as one batch (B·L,)."""
    means, factors = mixtures.means, mixtures.factors
    return Gaussian(means.reshape(-1, mixtures.dim), factors.reshape(-1, *factors.shape[2:]))


def _by_pattern(rows: Float[Array, "K BL ..."], mixtures: GaussianMixture) -> Array:
    """Split results for pairs of components by pattern, (B, K, L, …)."""
    split = rows.reshape(len(rows), *mixtures.weights.shape, *rows.shape[2:])
    return jnp.moveaxis(split, 0, 1)


def _by_moments(bound: Callable[[PyTree, Patterns], Array]) -> Bound:
    def of_moments(view: View, patterns: Patterns) -> Float[Array, " B"]:
        prepared = patterns.prepared
        moments = view.query.moments.pad(prepared.moments.rank)
        stored = Patterns(prepared.moments, prepared.prepared_moments)
        value = bound(Full.view(moments), stored)
        # The rounding errors of both moments, in W₂.
        num_components = view.query.num_components
        error = _rounding(moments, num_components) + _rounding(prepared.moments, num_components)
        return jnp.maximum(safe_sqrt(value) - error, 0) ** 2

    return of_moments


def by_spectra(view: View, patterns: Patterns, *, about_means: bool) -> Float[Array, " B"]:
    """Compute a lower bound on D over all poses: Σᵣ(√λᵣ − √λ'ᵣ)² of the spectra of both
    covariances, which bounds Bures² in every pose.

    With `about_means` the means are aligned; otherwise motions are rotations about the origin,
    which keep the lengths of means, and the squared difference of these is added.
    """
    moments = patterns.prepared.moments
    query = view.query.moments.pad(moments.rank)
    values = singular_values(moments.factor)
    differences = singular_values(query.factor)[None, : values.shape[1]] - values
    bound = jnp.vecdot(differences, differences)
    if not about_means:
        length = safe_sqrt(jnp.vecdot(query.mean, query.mean))
        bound = bound + (length - safe_sqrt(jnp.vecdot(moments.mean, moments.mean))) ** 2
    num_components = view.query.num_components
    error = _rounding(query, num_components) + _rounding(moments, num_components)
    return jnp.maximum(safe_sqrt(bound) - error, 0) ** 2


def _rounding(moments: Gaussian, num_components: int) -> Array:
    """Return the rounding error of moments in W₂, which is relative to their W₂ distance from the
    point 0.
    """
    size = safe_sqrt(jnp.vecdot(moments.mean, moments.mean) + squared_norm(moments.factor))
    return rounding(moments.dim * moments.rank + num_components, size.dtype) * size


def _by_components(view: View, patterns: Patterns) -> Float[Array, " B"]:
    measures = patterns.measures
    components = Patterns(_flattened(measures))
    principal = Full.bounds()[1]
    costs = jax.vmap(lambda component: principal(component, components))(view.components)
    costs = _by_pattern(costs, measures)
    plans = jax.vmap(transport, (0, None, 0))(costs, view.query.weights, measures.weights)
    error = rounding(4 * sum(costs.shape[1:]), costs.dtype) * costs.max((1, 2))
    return plans.cost - plans.gap - error
