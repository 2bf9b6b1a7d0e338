"""Gaussians under the 2-Wasserstein distance: the Bures–Wasserstein space."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam._core.batching import map_in_batches
from jdam._core.derivatives import full_precision
from jdam._core.jacobi import SMALL, small_principal
from jdam._core.lapack import cholesky, full_svd, singular_values, solve_lower, svd
from jdam._core.linalg import polar, rounding, squared_norm
from jdam._measures.base import AnyMeasure, with_leaves
from jdam._measures.gaussian import DiagonalGaussian, Gaussian
from jdam.geometry.euclidean import (
    fast_squared_distances,
    products_err,
    squared_distances,
    squared_distances_less_rounding,
    vector_batch_sizes,
)
from jdam.geometry.protocol import (
    AnyView,
    BatchSizes,
    Bound,
    Comparison,
    Geometry,
    Patterns,
    check_batch_ndim,
    norm,
)


class Gaussians(Geometry):
    """What geometries of Gaussians share: patterns are all `Gaussian` or all `DiagonalGaussian`,
    queries of the same type."""

    max_backtracks: ClassVar[int] = 0

    def check(self, name: str, measure: AnyMeasure, batch_ndim: int) -> AnyMeasure:
        if not isinstance(measure, Gaussian | DiagonalGaussian):
            raise TypeError(
                f"{name} must be a jdam.Gaussian or jdam.DiagonalGaussian for {self}; "
                f"got {type(measure).__name__}"
            )
        check_batch_ndim(name, measure, batch_ndim)
        return measure

    def match(self, query: AnyMeasure, patterns: AnyMeasure) -> AnyMeasure:
        if isinstance(query, Gaussian):
            # Polar factors R of MᵀL are of matrices with no more rows than columns: with fewer
            # columns of L than of M, R Rᵀ would be a projection, not I.
            query = query.pad(patterns.rank)
        return query


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
    bounds_pay: ClassVar[bool] = True

    def view(self, query: AnyMeasure) -> AnyView:
        return _kernel(query).view(query)

    def compare(self, view: AnyView, patterns: Patterns, *, exact: bool = True) -> Comparison:
        return _kernel(view).compare(view, patterns, exact)

    def prepare(self, patterns: AnyMeasure) -> Any:
        return _kernel(patterns).prepare(patterns)

    def bounds(self, patterns: Patterns) -> tuple[Bound, ...]:
        return _kernel(patterns.measures).bounds()

    def approximation_errs(
        self, query: AnyMeasure, patterns: AnyMeasure, beta: Array
    ) -> Array | None:
        return products_err(query, patterns, beta) if _kernel(query) is Diagonal else None

    def move(self, view: AnyView, pull: AnyMeasure, step_size: Array) -> AnyMeasure:
        return _kernel(view).move(view, pull, step_size)

    def residual(self, view: AnyView, pull: AnyMeasure) -> Array:
        return _kernel(view).residual(view, pull)

    def batch_sizes(self, patterns: AnyMeasure) -> BatchSizes:
        diagonal = _kernel(patterns) is Diagonal
        return vector_batch_sizes() if diagonal else super().batch_sizes(patterns)


def _kernel(of: Any) -> "type[Full | Diagonal]":
    return Diagonal if isinstance(of, DiagonalGaussian | DiagonalView) else Full


# ------------------------------------------------------------------ diagonal covariances


class DiagonalView(NamedTuple):
    """A diagonal Gaussian as the vector (m, σ), as which it takes part in everything."""

    vector: Float[Array, " two_d"]


class Diagonal:
    """W₂² = |m − μ|² + |σ − s|²."""

    @staticmethod
    def view(query: DiagonalGaussian) -> DiagonalView:
        return DiagonalView(_stacked(query))

    @staticmethod
    def compare(view: DiagonalView, patterns: Patterns, exact: bool) -> Comparison:
        stacked = _stacked(patterns.measures)
        distances = squared_distances if exact else fast_squared_distances
        return Comparison(distances(view.vector, stacked), stacked)

    @staticmethod
    def prepare(patterns: DiagonalGaussian) -> None:
        return None

    @staticmethod
    def bounds() -> tuple[Any, ...]:
        def bound(view: DiagonalView, patterns: Patterns) -> Float[Array, " B"]:
            return squared_distances_less_rounding(view.vector, _stacked(patterns.measures))

        return (bound,)

    @staticmethod
    def move(view: DiagonalView, pull: Array, step_size: Array) -> DiagonalGaussian:
        return upright(*jnp.split(view.vector + step_size * (pull - view.vector), 2))

    @staticmethod
    def residual(view: DiagonalView, pull: Array) -> Float[Array, ""]:
        return norm(pull - view.vector)


def upright(mean: Float[Array, " d"], scale: Float[Array, " d"]) -> DiagonalGaussian:
    """The Gaussian with scales of either sign: a map that overshoots (τ > 1) may turn an axis."""
    return DiagonalGaussian(mean, jnp.where(scale < 0, -scale, scale))


def _stacked(measure: DiagonalGaussian) -> Float[Array, "*batch two_d"]:
    return jnp.concatenate([measure.mean, measure.scale], axis=-1)


# ------------------------------------------------------------------ full covariances


class View(NamedTuple):
    """A Gaussian query with its factor turned to its principal axes, L V, and Vᵀ."""

    query: Gaussian
    axes: Float[Array, "r r"]


class Prepared(NamedTuple):
    """Standard deviations of patterns along coordinate and, in falling order, principal axes."""

    spread: Float[Array, "N d"]
    spectrum: Float[Array, "N k"]


class Full:
    """W₂² = |m − μ|² + |L − MR|², R the polar factor of MᵀL."""

    @staticmethod
    def view(query: Gaussian) -> View:
        factor, axes = principal(query.factor)
        return View(with_leaves(query, query.mean, factor), axes)

    @staticmethod
    def compare(view: View, patterns: Patterns, exact: bool) -> Comparison:
        query, measures = view.query, patterns.measures
        rotations = polar(measures.factor.mT @ query.factor[None])
        shifts = squared_distances(query.mean, measures.mean)
        gaps = _aligned_gap(query.factor, measures.factor, rotations)
        aligned = with_leaves(measures, measures.mean, measures.factor @ rotations)
        return Comparison(shifts + gaps, aligned)

    @staticmethod
    def prepare(patterns: Gaussian) -> Prepared:
        factor = jax.lax.stop_gradient(patterns.factor)
        # In batches: decompositions copy what they are given.
        return Prepared(
            spread=jnp.linalg.norm(factor, axis=-1),
            spectrum=map_in_batches(singular_values, 1024, factor),
        )

    @staticmethod
    def bounds() -> tuple[Any, ...]:
        return _by_spreads, _by_principal_axes, _by_nuclear_norm

    @staticmethod
    def move(view: View, pull: Gaussian, step_size: Array) -> Gaussian:
        moved = jax.tree.map(lambda x, y: x + step_size * (y - x), view.query, pull)
        result: Gaussian = with_leaves(moved, moved.mean, moved.factor @ view.axes)
        return result

    @staticmethod
    def residual(view: View, pull: Gaussian) -> Float[Array, ""]:
        return norm(jax.tree.map(jnp.subtract, pull, view.query))


def _by_spreads(view: View, patterns: Patterns) -> Float[Array, " B"]:
    """|m − μ|² plus the larger of two sums of squared differences of standard deviations:

    along the coordinate axes, Σₖ (√Ωₖₖ − √Σₖₖ)², since for any plan and any orthonormal
    basis E|X−Y|² = Σₖ E⟨X−Y, vₖ⟩², and each term is at least W₂² of the marginals along vₖ;

    of the sorted spectra, Σₖ (σₖ(L) − σₖ(M))², since W₂² = |m−μ|² + |L|² + |M|² − 2|MᵀL|_*
    and the nuclear norm |MᵀL|_* ≤ Σₖ σₖ(M) σₖ(L) (von Neumann).
    """
    query, prepared = view.query, patterns.prepared
    spread = jnp.linalg.norm(query.factor, axis=-1)
    sizes = jnp.linalg.norm(query.factor, axis=-2)[: query.dim]
    missing = sizes.size - prepared.spectrum.shape[-1]
    spectrum = jnp.pad(prepared.spectrum, [(0, 0), (0, missing)])
    gaps = jnp.maximum(_gaps(spread, prepared.spread), _gaps(sizes, spectrum))
    return _shifts(query.mean, patterns.measures.mean) + gaps


def _by_principal_axes(view: View, patterns: Patterns) -> Float[Array, " B"]:
    """|m − μ|² plus the sum over the principal axes uₖ of the query, L = U S Vᵀ, of squared
    differences of standard deviations:

        Σₖ (sₖ − |Mᵀuₖ|)² + |M|² − Σₖ |Mᵀuₖ|²,

    the bound by marginals in that basis, its last terms those along axes on which L vanishes.
    It is exact where the covariances commute.
    """
    query, measures = view.query, patterns.measures
    sizes, along = deviations_along_axes(query, measures)
    whole = squared_norm(measures.factor)
    rest = whole * (1 - rounding(measures.factor[0].size, whole.dtype))
    rest = jnp.maximum(rest - jnp.vecdot(along, along), 0)
    return _shifts(query.mean, measures.mean) + _gaps(sizes, along) + rest


def deviations_along_axes(
    query: Gaussian, measures: Gaussian
) -> tuple[Float[Array, " r"], Float[Array, "B r"]]:
    """Of a query in its principal axes uₖ, L = U S Vᵀ, and of others along these: sₖ and |Mᵀuₖ|."""
    sizes = jnp.linalg.norm(query.factor, axis=-2)
    axes = query.factor / jnp.where(sizes > 0, sizes, 1)[None]
    return sizes, jnp.linalg.norm(measures.factor.mT @ axes[None], axis=-2)


def _by_nuclear_norm(view: View, patterns: Patterns) -> Float[Array, " B"]:
    """|m − μ|² + |L|² + |M|² − tr H − tr(H⁻¹KᵀK), K = MᵀL V, for an H ≻ 0 near (KᵀK)^½, since
    2|K|_* is the least value of tr H + tr(H⁻¹KᵀK) over all H ≻ 0."""
    query, measures = view.query, patterns.measures
    return _shifts(query.mean, measures.mean) + _gap_from_below(query, measures)


def principal(factor: Float[Array, "d r"]) -> tuple[Float[Array, "d r"], Float[Array, "r r"]]:
    """L V = U S, of the singular value decomposition L = U S Vᵀ, and Vᵀ.

    The columns of U S, and so those of MᵀU S, are each rounded relative to their own size,
    which in float32 gains two digits of W₂² where covariances are ill-conditioned. All that
    follows is equivariant under L → L V, so V needs no derivative.
    """
    dim, rank = factor.shape
    value = jax.lax.stop_gradient(factor)
    if rank <= SMALL:
        principal, right = small_principal(value)
        return principal + (factor - value) @ right.mT, right
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
def _aligned_gap_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
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
