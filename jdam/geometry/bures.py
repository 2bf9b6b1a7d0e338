"""Gaussians under the 2-Wasserstein distance: the Bures–Wasserstein space."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam.geometry.euclidean import (
    VECTOR_TILE,
    fast_squared_distances,
    products_err,
    squared_distances,
)
from jdam.geometry.protocol import Comparison, Geometry, check_batch_ndim, with_leaves
from jdam.linalg import polar, rotation_part, squared_norm
from jdam.measures import DiagonalGaussian, Gaussian


class Bures(Geometry):
    """D = W₂², the squared 2-Wasserstein distance with cost |x−y|², on Gaussians.

    W₂²(N(m,LLᵀ), N(μ,MMᵀ)) = |m − μ|² + min over R with RRᵀ = I of |L − MR|_F², attained by
    the polar factor R of MᵀL. The pull of a pattern is (μ, MR): the pattern, its factor
    aligned with the query's. Averaging pulls is the Gibbs average of optimal transport maps
    (arXiv:2509.23162), (Σ wᵢTᵢ)_# N(m, LLᵀ) = N(Σ wᵢμᵢ, L⁺L⁺ᵀ) with L⁺ = Σ wᵢMᵢRᵢ, without
    an inverse or a matrix root, and for singular covariances too.

    Patterns are all `Gaussian` or all `DiagonalGaussian`, queries of the same type; on the
    latter everything is a vector operation on (m, σ), and W₂² = |m − μ|² + |σ − s|².

    Where the query's covariance is singular on directions that a pattern fills, several
    optimal plans exist and no map. Distances are unique all the same; the step follows one of
    the plans, which depends on the patterns' factors, and ends at a pattern where β is large.
    """

    def check(self, name, measure, batch_ndim):
        if not isinstance(measure, Gaussian | DiagonalGaussian):
            raise TypeError(
                f"{name} must be a jdam.Gaussian or jdam.DiagonalGaussian for {self}; "
                f"got {type(measure).__name__}"
            )
        check_batch_ndim(name, measure, batch_ndim)
        return measure

    def match(self, query, patterns):
        if isinstance(query, Gaussian):
            # With fewer columns than the patterns, R Rᵀ would be a projection, not I.
            query = query.pad(patterns.rank)
        return query

    def view(self, query):
        if isinstance(query, DiagonalGaussian):
            return _stacked(query)
        factor, axes = _principal(query.factor)
        return View(with_leaves(query, query.mean, factor), axes)

    def compare(self, view, patterns, prepared, guess, exact):
        if isinstance(patterns, DiagonalGaussian):
            stacked = _stacked(patterns)
            distances = squared_distances if exact else fast_squared_distances
            return Comparison(distances(view, stacked), stacked)
        query = view.query
        rotations = polar(patterns.factor.mT @ query.factor[None])
        divergences = squared_distances(query.mean, patterns.mean) + _aligned_gap(
            query.factor, patterns.factor, rotations
        )
        aligned = with_leaves(patterns, patterns.mean, patterns.factor @ rotations)
        return Comparison(divergences, aligned)

    def approximation_errs(self, query, patterns, beta):
        diagonal = isinstance(patterns, DiagonalGaussian)
        return products_err(query, patterns, beta) if diagonal else None

    def move(self, view, pull, step_size, attempt=0):
        if isinstance(view, View):
            moved = super().move(view.query, pull, step_size)
            return with_leaves(moved, moved.mean, moved.factor @ view.axes)
        mean, scale = jnp.split(super().move(view, pull, step_size), 2)
        # A map that overshoots (τ > 1) may turn an axis round.
        return DiagonalGaussian(mean, jnp.where(scale < 0, -scale, scale))

    def conserved(self, measure, tangent):
        """Rotations L Ω of the factor, Ω skew, which leave the measure as it is."""
        still = super().conserved(measure, tangent)
        if isinstance(measure, DiagonalGaussian):
            return still
        return with_leaves(still, still.mean, rotation_part(measure.factor, tangent.factor))

    def residual(self, view, pull):
        return super().residual(view.query if isinstance(view, View) else view, pull)

    def tile(self, patterns):
        return VECTOR_TILE if isinstance(patterns, DiagonalGaussian) else super().tile(patterns)


class View(NamedTuple):
    """A Gaussian query with its factor turned to its principal axes, L V, and Vᵀ."""

    query: Gaussian
    axes: Float[Array, "r r"]


def _principal(factor: Float[Array, "d r"]) -> tuple[Float[Array, "d r"], Float[Array, "r r"]]:
    """L V = U S, of the singular value decomposition L = U S Vᵀ, and Vᵀ.

    The columns of U S, and so those of MᵀU S, are each rounded relative to their own size,
    which in float32 gains two digits of W₂² where covariances are ill-conditioned. All that
    follows is equivariant under L → L V, so V needs no derivative.
    """
    dim, rank = factor.shape
    value = jax.lax.stop_gradient(factor)
    left, sizes, right = jnp.linalg.svd(value, full_matrices=rank > dim)
    principal = jnp.pad(left[:, : sizes.size] * sizes[None], [(0, 0), (0, rank - sizes.size)])
    return principal + (factor - value) @ right.mT, right


@jax.custom_jvp
def _aligned_gap(
    factor: Float[Array, "d r"], factors: Float[Array, "B d s"], rotations: Float[Array, "B s r"]
) -> Float[Array, " B"]:
    """|L − LᵢRᵢ|_F², where Rᵢ minimises it, so that by the envelope theorem its derivative is
    that with Rᵢ held fixed."""
    return squared_norm(factor[None] - factors @ rotations)


@_aligned_gap.defjvp
def _aligned_gap_jvp(primals, tangents):
    factor, factors, rotations = primals
    dfactor, dfactors, _ = tangents
    gap = factor[None] - factors @ rotations
    dgap = dfactor[None] - dfactors @ rotations
    return squared_norm(gap), 2 * jnp.sum(gap * dgap, axis=(-1, -2))


def _stacked(measure: DiagonalGaussian) -> Float[Array, "*batch 2d"]:
    """(m, σ), the vector as which a diagonal Gaussian takes part in everything."""
    return jnp.concatenate([measure.mean, measure.scale], axis=-1)
