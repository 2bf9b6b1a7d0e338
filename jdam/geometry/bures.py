"""Gaussians under the 2-Wasserstein distance: the Bures–Wasserstein space."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam import _checks
from jdam.geometry.euclidean import (
    VECTORS_AT_ONCE,
    fast_squared_distances,
    squared_distances,
)
from jdam.geometry.protocol import Geometry, with_leaves
from jdam.linalg import polar, squared_norm
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
    """

    def check(self, name, measure, batch_ndim):
        if not isinstance(measure, Gaussian | DiagonalGaussian):
            raise TypeError(
                f"{name} must be a jdam.Gaussian or jdam.DiagonalGaussian for {self}; "
                f"got {type(measure).__name__}"
            )
        if len(measure.batch_shape) != batch_ndim:
            wanted = "(N,)" if batch_ndim else "(), one measure: use jax.vmap over a batch"
            raise ValueError(f"{name} must have batch shape {wanted}; got {measure.batch_shape}")
        return measure

    def match(self, query, patterns):
        if isinstance(query, Gaussian):
            # With fewer columns than the patterns, R Rᵀ would be a projection, not I.
            query = query.pad(patterns.rank)
        return query

    def compare(self, query, patterns):
        if isinstance(patterns, DiagonalGaussian):
            return fast_squared_distances(_stacked(query), _stacked(patterns)), patterns
        means = squared_distances(query.mean, patterns.mean)
        rotations = polar(patterns.factor.mT @ query.factor[None])
        covariances = _aligned_gap(query.factor, patterns.factor, rotations)
        aligned = patterns.factor @ rotations
        return means + covariances, with_leaves(patterns, patterns.mean, aligned)

    def move(self, query, pull, step_size):
        moved = super().move(query, pull, step_size)
        if isinstance(moved, DiagonalGaussian):  # a map that overshoots (τ > 1) may flip an axis
            scale = jnp.where(moved.scale < 0, -moved.scale, moved.scale)
            moved = with_leaves(moved, moved.mean, scale)
        return moved

    def divergence(self, query, patterns):
        if isinstance(patterns, DiagonalGaussian):
            return squared_distances(_stacked(query), _stacked(patterns))
        return self.compare(query, patterns)[0]

    def block_size(self, patterns):
        diagonal = isinstance(patterns, DiagonalGaussian)
        return VECTORS_AT_ONCE if diagonal else super().block_size(patterns)


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
    return jnp.concatenate([measure.mean, measure.scale], axis=-1)
