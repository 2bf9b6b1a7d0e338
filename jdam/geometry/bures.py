"""The geometry `Bures`: Gaussians with the 2-Wasserstein distance (Bures–Wasserstein space).

`Bures` selects between two sets of formulas, the classes `Full` and `Diagonal`; `Full` is also the
geometry of the components of `MixtureWasserstein`.
"""

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree

from jdam._core.derivatives import full_precision
from jdam._core.jacobi import SMALL, small_principal
from jdam._core.lapack import full_svd, svd
from jdam._core.linalg import polar, rounding, squared_distances, squared_norm
from jdam._measures.base import AnyMeasure, with_leaves
from jdam._measures.batches import as_row
from jdam._measures.gaussian import DiagonalGaussian, Gaussian
from jdam.geometry.euclidean import (
    embedding_bound,
    fast_squared_distances,
    products_err,
    squared_distances_less_rounding,
    vector_batch_sizes,
)
from jdam.geometry.protocol import (
    AnyView,
    BatchSizes,
    Bound,
    Comparison,
    Embedding,
    Geometry,
    Patterns,
    check_batch_ndim,
    norm,
)


class Gaussians(Geometry):
    """The base class of geometries of Gaussians: patterns are all `Gaussian` or all
    `DiagonalGaussian`, and queries have the type of the patterns, which selects the formulas."""

    max_backtracks: ClassVar[int] = 0

    def check(self, name: str, measure: AnyMeasure, batch_ndim: int) -> AnyMeasure:
        if not isinstance(measure, Gaussian | DiagonalGaussian):
            raise TypeError(
                f"{name} must be a jdam.Gaussian or jdam.DiagonalGaussian for {self}; "
                f"got {type(measure).__name__}: jdam.Gaussian.from_samples makes one of samples"
            )
        check_batch_ndim(name, measure, batch_ndim)
        return measure

    def match(self, query: AnyMeasure, patterns: AnyMeasure) -> AnyMeasure:
        if isinstance(query, Gaussian):
            # The polar factor R of MᵀL satisfies R Rᵀ = I only if L has at least as many columns as
            # M; otherwise R Rᵀ is a projection.
            query = query.padded(r=patterns.sizes["r"])
        return query

    @abstractmethod
    def _formulas(self, x: PyTree) -> PyTree:
        """Return the formulas for a query, a view or patterns."""

    def view(self, query: AnyMeasure) -> AnyView:
        return self._formulas(query).view(query)

    def compare(self, view: AnyView, patterns: Patterns) -> Comparison:
        comparison: Comparison = self._formulas(view).compare(view, patterns)
        return comparison

    def prepare(self, patterns: AnyMeasure) -> PyTree:
        return self._formulas(patterns).prepare(patterns)

    def bounds(self, patterns: Patterns) -> tuple[Bound, ...]:
        bounds: tuple[Bound, ...] = self._formulas(patterns.measures).bounds()
        return bounds

    def move(self, view: AnyView, pull: AnyMeasure, step_size: Array) -> AnyMeasure:
        return self._formulas(view).move(view, pull, step_size)


def is_diagonal(x: PyTree) -> bool:
    """Return whether a query, a view or patterns have diagonal covariances."""
    return isinstance(getattr(x, "query", x), DiagonalGaussian)


class Bures(Gaussians):
    """D = W₂², the squared 2-Wasserstein distance with cost |x−y|², on Gaussians.

    W₂²(N(m,LLᵀ), N(μ,MMᵀ)) = |m − μ|² + min |L − MR|_F² over all R with RRᵀ = I. The minimiser is
    the polar factor R of MᵀL. The pull of a pattern is (μ, MR), the pattern with its factor
    aligned with the factor of the query. The Gibbs average of the pulls gives the Gibbs average of
    the optimal transport maps (arXiv:2509.23162): (Σ wᵢTᵢ)_# N(m, LLᵀ) = N(Σ wᵢμᵢ, L⁺L⁺ᵀ) with
    L⁺ = Σ wᵢMᵢRᵢ. No inverse and no matrix root are computed, and covariances may be singular.

    Patterns are all `Gaussian` or all `DiagonalGaussian`, and queries have the type of the
    patterns. For `DiagonalGaussian`, W₂² = |m − μ|² + |σ − s|², and all operations are those of
    vectors (m, σ).

    If the covariance of a pattern does not vanish on the null space of the covariance of the query,
    there are several optimal plans and no optimal map. The distance is unique nevertheless. The
    step follows one of the plans, which depends on the factors of the patterns; for large β it ends
    at a pattern.
    """

    cost_scale: ClassVar[float | None] = 1.0
    is_squared_metric: ClassVar[bool] = True
    bounds_pay: ClassVar[bool] = True

    def _formulas(self, x: PyTree) -> "type[Full | Diagonal]":
        return Diagonal if is_diagonal(x) else Full

    def embed(self, measures: AnyMeasure, prepared: PyTree = None) -> Embedding:
        return self._formulas(measures).embed(measures, prepared)

    def approximation(
        self, query: AnyMeasure, patterns: AnyMeasure, beta: Array
    ) -> tuple[Geometry, Array] | None:
        if type(self) is not Bures or not is_diagonal(query):
            return None
        errs = products_err(query, patterns, beta)
        return None if errs is None else (_ByProducts(), errs)

    def residual(self, view: AnyView, pull: AnyMeasure) -> Array:
        return self._formulas(view).residual(view, pull)

    def batch_sizes(self, patterns: AnyMeasure) -> BatchSizes:
        return vector_batch_sizes() if is_diagonal(patterns) else super().batch_sizes(patterns)


class _ByProducts(Bures):
    """`Bures` on diagonal Gaussians, with distances by matrix products."""

    def compare(self, view: AnyView, patterns: Patterns) -> Comparison:
        stacked = _stacked(patterns.measures)
        return Comparison(fast_squared_distances(_stacked(view), stacked), stacked)


# ------------------------------------------------------------------ diagonal covariances


class Diagonal:
    """The formulas for diagonal covariances: W₂² = |m − μ|² + |σ − s|², distances of the vectors
    (m, σ). The view of a query is the query."""

    @staticmethod
    def view(query: DiagonalGaussian) -> DiagonalGaussian:
        return query

    @staticmethod
    def compare(view: DiagonalGaussian, patterns: Patterns) -> Comparison:
        stacked = _stacked(patterns.measures)
        return Comparison(squared_distances(_stacked(view), stacked), stacked)

    @staticmethod
    def prepare(patterns: DiagonalGaussian) -> None:
        return None

    @staticmethod
    def embed(measures: DiagonalGaussian, prepared: None) -> Embedding:
        return _stacked(measures), jnp.zeros_like(measures.mean[:, 0])

    @staticmethod
    def bounds() -> tuple[PyTree, ...]:
        def bound(view: DiagonalGaussian, patterns: Patterns) -> Float[Array, " B"]:
            return squared_distances_less_rounding(_stacked(view), _stacked(patterns.measures))

        return (bound,)

    @staticmethod
    def move(view: DiagonalGaussian, pull: Array, step_size: Array) -> DiagonalGaussian:
        vector = _stacked(view)
        return upright(*jnp.split(vector + step_size * (pull - vector), 2))

    @staticmethod
    def residual(view: DiagonalGaussian, pull: Array) -> Float[Array, ""]:
        return norm(pull - _stacked(view))


def upright(mean: Float[Array, " d"], scale: Float[Array, " d"]) -> DiagonalGaussian:
    """The Gaussian with standard deviations |scale|. For τ > 1 a step may make scales negative,
    which is a reflection of the axis."""
    return DiagonalGaussian(mean, jnp.where(scale < 0, -scale, scale))


def _stacked(measure: DiagonalGaussian) -> Float[Array, "*batch two_d"]:
    return jnp.concatenate([measure.mean, measure.scale], axis=-1)


# ------------------------------------------------------------------ full covariances


class View(NamedTuple):
    """A Gaussian query with the factor L V, whose columns are along its principal axes, and Vᵀ."""

    query: Gaussian
    axes: Float[Array, "r r"]


class Full:
    """The formulas for full covariances: W₂² = |m − μ|² + |L − MR|², R the polar factor of MᵀL."""

    @staticmethod
    def view(query: Gaussian) -> View:
        factor, axes = principal(query.factor)
        return View(with_leaves(query, query.mean, factor), axes)

    @staticmethod
    def compare(view: View, patterns: Patterns) -> Comparison:
        query, measures = view.query, patterns.measures
        rotations = polar(measures.factor.mT @ query.factor[None])
        shifts = squared_distances(query.mean, measures.mean)
        gaps = _aligned_gap(query.factor, measures.factor, rotations)
        aligned = with_leaves(measures, measures.mean, measures.factor @ rotations)
        return Comparison(shifts + gaps, aligned)

    @staticmethod
    def prepare(patterns: Gaussian) -> Float[Array, "N d"]:
        """The standard deviations along the coordinate axes."""
        spread: Array = jnp.linalg.norm(jax.lax.stop_gradient(patterns.factor), axis=-1)
        return spread

    @staticmethod
    def embed(measures: Gaussian, prepared: Float[Array, "N d"] | None) -> Embedding:
        """The vectors (μ, √diag Σ). For any plan and any orthonormal basis
        E|X−Y|² = Σₖ E⟨X−Y, vₖ⟩², and each term is at least W₂² of the marginals along vₖ."""
        spread = Full.prepare(measures) if prepared is None else prepared
        errors = rounding(measures.rank, spread.dtype) * jnp.linalg.norm(spread, axis=-1)
        return jnp.concatenate([measures.mean, spread], axis=-1), errors

    @staticmethod
    def bounds() -> tuple[PyTree, ...]:
        return _by_embedding, _by_principal_axes

    @staticmethod
    def move(view: View, pull: Gaussian, step_size: Array) -> Gaussian:
        moved = jax.tree.map(lambda x, y: x + step_size * (y - x), view.query, pull)
        result: Gaussian = with_leaves(moved, moved.mean, moved.factor @ view.axes)
        return result

    @staticmethod
    def residual(view: View, pull: Gaussian) -> Float[Array, ""]:
        return norm(jax.tree.map(jnp.subtract, pull, view.query))


def _by_embedding(view: View, patterns: Patterns) -> Float[Array, " B"]:
    """The lower bound |m − μ|² + Σₖ (√Ωₖₖ − √Σₖₖ)² on W₂², by the means and the standard deviations
    along the coordinate axes."""
    query: Gaussian = as_row(view.query)
    own = Full.embed(query, None)
    return embedding_bound(own, Full.embed(patterns.measures, patterns.prepared))


def _by_principal_axes(view: View, patterns: Patterns) -> Float[Array, " B"]:
    """The lower bound on W₂² by the marginals along the principal axes uₖ of the query,
    L = U S Vᵀ: |m − μ|² plus

        Σₖ (sₖ − |Mᵀuₖ|)² + |M|² − Σₖ |Mᵀuₖ|².

    The last two terms are the variance of the pattern along axes on which L vanishes. The bound is
    exact where the covariances commute.
    """
    query, measures = view.query, patterns.measures
    sizes, along = deviations_along_axes(query, measures)
    total = squared_norm(measures.factor)
    rest = total * (1 - rounding(measures.factor[0].size, total.dtype))
    rest = jnp.maximum(rest - jnp.vecdot(along, along), 0)
    return _shifts(query.mean, measures.mean) + _gaps(sizes, along) + rest


def deviations_along_axes(
    query: Gaussian, measures: Gaussian
) -> tuple[Float[Array, " r"], Float[Array, "B r"]]:
    """The standard deviations along the principal axes uₖ of the query, L = U S Vᵀ: sₖ of the query
    and |Mᵀuₖ| of `measures`. The factor of the query has to be L V."""
    sizes = jnp.linalg.norm(query.factor, axis=-2)
    axes = query.factor / jnp.where(sizes > 0, sizes, 1)[None]
    return sizes, jnp.linalg.norm(measures.factor.mT @ axes[None], axis=-2)


def principal(factor: Float[Array, "d r"]) -> tuple[Float[Array, "d r"], Float[Array, "r r"]]:
    """The factor L V = U S along principal axes, and Vᵀ, of the singular value decomposition
    L = U S Vᵀ.

    Each column of U S, and of MᵀU S, is rounded relative to its own norm. In float32 this gains two
    digits of W₂² for ill-conditioned covariances. V has no derivative: all results are equivariant
    under L → L V, so that it would cancel.
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
    """Compute |L − LᵢRᵢ|_F² for the minimisers Rᵢ. By the envelope theorem its derivative is the
    one for constant Rᵢ."""
    return squared_norm(factor[None] - factors @ rotations)


@_aligned_gap.defjvp
@full_precision
def _aligned_gap_jvp(
    primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> tuple[PyTree, PyTree]:
    factor, factors, rotations = primals
    dfactor, dfactors, _ = tangents
    gap = factor[None] - factors @ rotations
    dgap = dfactor[None] - dfactors @ rotations
    return squared_norm(gap), 2 * jnp.sum(gap * dgap, axis=(-1, -2))


def _shifts(mean: Float[Array, " d"], means: Float[Array, "B d"]) -> Float[Array, " B"]:
    """Compute |m − μᵢ|² minus its rounding error."""
    return squared_distances(mean, means) * (1 - rounding(mean.size, mean.dtype))


def _gaps(first: Float[Array, " k"], second: Float[Array, "B k"]) -> Float[Array, " B"]:
    """Compute Σₖ (aₖ − bₖ)² of standard deviations, minus its rounding error."""
    error = rounding(first.size, first.dtype)
    gap = jnp.abs(first[None] - second) - error * (first[None] + second)
    gap = jnp.maximum(gap, 0)
    return jnp.vecdot(gap, gap) * (1 - error)
