"""Gaussians under the 2-Wasserstein distance: the Bures–Wasserstein space."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam._batching import map_in_chunks
from jdam._derivatives import full_precision
from jdam._lapack import cholesky, full_svd, singular_values, solve_lower, svd
from jdam.geometry.euclidean import (
    VECTOR_TILE,
    fast_squared_distances,
    products_err,
    squared_distances,
    squared_distances_less_rounding,
)
from jdam.geometry.protocol import Comparison, Geometry, check_batch_ndim, with_leaves
from jdam.linalg import polar, rotation_part, rounding, squared_norm
from jdam.measures import DiagonalGaussian, Gaussian


class Gaussians(Geometry):
    """What geometries of Gaussians share: patterns are all `Gaussian` or all `DiagonalGaussian`,
    queries of the same type."""

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
            # Polar factors R of MᵀL are of matrices with no more rows than columns: with fewer
            # columns of L than of M, R Rᵀ would be a projection, not I.
            query = query.pad(patterns.rank)
        return query

    def conserved(self, measure, tangent):
        """Rotations L Ω of the factor, Ω skew, which leave the measure as it is."""
        still = super().conserved(measure, tangent)
        if isinstance(measure, DiagonalGaussian):
            return still
        return with_leaves(still, still.mean, rotation_part(measure.factor, tangent.factor))


class Bures(Gaussians):
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

    cost_scale: ClassVar[float | None] = 1.0
    is_squared_metric: ClassVar[bool] = True

    def view(self, query):
        if isinstance(query, DiagonalGaussian):
            return _stacked(query)
        factor, axes = principal(query.factor)
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

    def prepare(self, patterns):
        if isinstance(patterns, DiagonalGaussian):
            return None
        factor = jax.lax.stop_gradient(patterns.factor)
        # In batches: decompositions copy what they are given.
        return Prepared(
            spread=jnp.linalg.norm(factor, axis=-1),
            spectrum=map_in_chunks(singular_values, 1024, factor),
        )

    def bound(self, view, patterns, prepared):
        """|m − μ|² plus the larger of two sums of squared differences of standard deviations:

        along the coordinate axes, Σₖ (√Ωₖₖ − √Σₖₖ)², since for any plan and any orthonormal
        basis E|X−Y|² = Σₖ E⟨X−Y, vₖ⟩², and each term is at least W₂² of the marginals along vₖ;

        of the sorted spectra, Σₖ (σₖ(L) − σₖ(M))², since W₂² = |m−μ|² + |L|² + |M|² − 2|MᵀL|_*
        and the nuclear norm |MᵀL|_* ≤ Σₖ σₖ(M) σₖ(L) (von Neumann).
        """
        if isinstance(patterns, DiagonalGaussian):
            return squared_distances_less_rounding(view, _stacked(patterns))
        query = view.query
        spread = jnp.linalg.norm(query.factor, axis=-1)
        sizes = jnp.linalg.norm(query.factor, axis=-2)[: query.dim]
        missing = sizes.size - prepared.spectrum.shape[-1]
        spectrum = jnp.pad(prepared.spectrum, [(0, 0), (0, missing)])
        marginal = _gaps(spread, prepared.spread)
        return _shifts(query.mean, patterns.mean) + jnp.maximum(marginal, _gaps(sizes, spectrum))

    def sharpenings(self, patterns):
        return 0 if isinstance(patterns, DiagonalGaussian) else 2

    def sharpen(self, view, patterns, prepared, level):
        """Level 1: |m − μ|² plus the sum over the principal axes uₖ of the query, L = U S Vᵀ, of
        squared differences of standard deviations:

            Σₖ (sₖ − |Mᵀuₖ|)² + |M|² − Σₖ |Mᵀuₖ|²,

        the bound by marginals in that basis, its last terms those along axes on which L vanishes.
        It is exact where the covariances commute.

        Level 2: |m − μ|² + |L|² + |M|² − tr H − tr(H⁻¹KᵀK), K = MᵀL V, for an H ≻ 0 near
        (KᵀK)^½, since 2|K|_* is the least value of tr H + tr(H⁻¹KᵀK) over all H ≻ 0.
        """
        query = view.query
        if level == 2:
            return _shifts(query.mean, patterns.mean) + _gap_from_below(query, patterns)
        sizes = jnp.linalg.norm(query.factor, axis=-2)
        axes = query.factor / jnp.where(sizes > 0, sizes, 1)[None]
        along = jnp.linalg.norm(patterns.factor.mT @ axes[None], axis=-2)
        whole = squared_norm(patterns.factor)
        rest = whole * (1 - rounding(patterns.factor[0].size, whole.dtype))
        rest = jnp.maximum(rest - jnp.vecdot(along, along), 0)
        return _shifts(query.mean, patterns.mean) + _gaps(sizes, along) + rest

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

    def residual(self, view, pull):
        return super().residual(view.query if isinstance(view, View) else view, pull)

    def tile(self, patterns):
        return VECTOR_TILE if isinstance(patterns, DiagonalGaussian) else super().tile(patterns)


class Prepared(NamedTuple):
    """Standard deviations of patterns along coordinate and, in falling order, principal axes."""

    spread: Float[Array, "N d"]
    spectrum: Float[Array, "N k"]


class View(NamedTuple):
    """A Gaussian query with its factor turned to its principal axes, L V, and Vᵀ."""

    query: Gaussian
    axes: Float[Array, "r r"]


def principal(factor: Float[Array, "d r"]) -> tuple[Float[Array, "d r"], Float[Array, "r r"]]:
    """L V = U S, of the singular value decomposition L = U S Vᵀ, and Vᵀ.

    The columns of U S, and so those of MᵀU S, are each rounded relative to their own size,
    which in float32 gains two digits of W₂² where covariances are ill-conditioned. All that
    follows is equivariant under L → L V, so V needs no derivative.
    """
    dim, rank = factor.shape
    value = jax.lax.stop_gradient(factor)
    left, sizes, right = (full_svd if rank > dim else svd)(value)
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
@full_precision
def _aligned_gap_jvp(primals, tangents):
    factor, factors, rotations = primals
    dfactor, dfactors, _ = tangents
    gap = factor[None] - factors @ rotations
    dgap = dfactor[None] - dfactors @ rotations
    return squared_norm(gap), 2 * jnp.sum(gap * dgap, axis=(-1, -2))


def _gap_from_below(query: Gaussian, patterns: Gaussian) -> Float[Array, " B"]:
    """|L|² + |M|² − tr H − tr(H⁻¹A), less its rounding, where A = KᵀK, nᵢ² = Aᵢᵢ and

        Hᵢⱼ = Aᵢⱼ/(nᵢ + nⱼ) + ½nᵢδᵢⱼ,

    the root of A to first order in what is off its diagonal. H ≻ 0, for the Schur product of A
    with a Cauchy matrix is ⪰ 0; scaled to a diagonal of 1 its condition is at most twice its size.
    """
    crossed = patterns.factor.mT @ query.factor[None]
    sizes = jnp.linalg.norm(crossed, axis=-2)
    crossed = crossed / jnp.sqrt(jnp.where(sizes > 0, sizes, 1))[:, None]
    sums = sizes[:, :, None] + sizes[:, None]
    half = jnp.eye(sizes.shape[-1], dtype=sizes.dtype)[None] / 2
    scaled = crossed.mT @ crossed / jnp.where(sums > 0, sums, 1) + half
    solved = solve_lower(cholesky(scaled), crossed.mT)
    squares = squared_norm(query.factor) + squared_norm(patterns.factor)
    squares = squares * (1 - rounding(8 * patterns.dim, squares.dtype))
    return jnp.maximum(squares - sizes.sum(-1) - squared_norm(solved), 0)


def _shifts(mean: Float[Array, " d"], means: Float[Array, "B d"]) -> Float[Array, " B"]:
    """|m − μᵢ|², less its rounding."""
    return squared_distances(mean, means) * (1 - rounding(mean.size, mean.dtype))


def _gaps(first: Float[Array, " k"], second: Float[Array, "B k"]) -> Float[Array, " B"]:
    """Σₖ (aₖ − bₖ)² of sizes that are sums of some k² squares, less their rounding."""
    error = rounding(first.size, first.dtype)
    gap = jnp.abs(first[None] - second) - error * (first[None] + second)
    gap = jnp.maximum(gap, 0)
    return jnp.vecdot(gap, gap) * (1 - error)


def _stacked(measure: DiagonalGaussian) -> Float[Array, "*batch 2d"]:
    """(m, σ), the vector as which a diagonal Gaussian takes part in everything."""
    return jnp.concatenate([measure.mean, measure.scale], axis=-1)
