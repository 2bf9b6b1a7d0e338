"""The geometry `EntropicBures`: Gaussians with the debiased Sinkhorn divergence, in closed form.

`EntropicBures` selects between two sets of formulas, the classes `Full` and `Diagonal`.
"""

from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, PyTree

from jdam._core import checks
from jdam._core.batching import map_in_batches
from jdam._core.derivatives import full_precision, moves
from jdam._core.lapack import full_svd, svd
from jdam._core.linalg import ShrunkPolar, rounding, shrink, shrunk_polar, squared_distances
from jdam._measures.base import AnyMeasure, with_leaves
from jdam._measures.gaussian import DiagonalGaussian, Gaussian
from jdam.geometry.bures import Gaussians, deviations_along_axes, is_diagonal, principal, upright
from jdam.geometry.protocol import AnyView, Bound, Comparison, Patterns, norm


class EntropicBures(Gaussians):
    """D = S_ε, the debiased Sinkhorn divergence with cost ½|x−y|², on Gaussians, in closed form
    (arXiv:2006.02572; as a memory: arXiv:2603.20656).

    With φ(s) = t − ε − ε log((t+ε)/2ε), t = √(4s²+ε²), and singular values σ,

        S_ε(N(m,LLᵀ), N(μ,MMᵀ)) = ½|m − μ|² + ½Σ(½φ(σ(LᵀL)) + ½φ(σ(MᵀM)) − φ(σ(MᵀL))).

    A step follows the barycentric maps to the patterns minus the one of the self transport of the
    query:

        m⁺ = m + τ(Σ wᵢμᵢ − m),    L⁺ = L + τ(Σ wᵢMᵢRᵢ − LR₀).

    R is the shrunk polar factor of MᵀL, that is U diag(2s/(t+ε)) Vᵀ for MᵀL = U diag(s) Vᵀ, and R₀
    is the shrunk polar factor of LᵀL. No inverse and no matrix root are computed, and all results
    are smooth, also at singular covariances. As ε → 0, D tends to ½W₂², the divergence of `Bures`
    with half its β; as ε → ∞, D tends to ½|m − μ|² and the covariance of the query does not change.

    A full step never raises the energy: E(ξ) − E(ξ⁺) ≥ τ(1 − 0.6τ)|v|² for the velocity v. The
    gradient LR₀ of ½Σ½φ(σ(LᵀL)) has the Lipschitz constant max (1 + 2/t)√((t−1)/(t+1)) < 1.2, the
    other terms of D are concave in L, and E is concave in D.

    Variances λ ≪ ε are recalled slowly: their error falls by the factor 1 − 2λ/ε in each step, and
    a variance that is 0 in the pattern is ε/2k after k steps. The maps are linear, so that the
    covariance of the query keeps its null space: for a Dirac query only the mean is recalled.

    D is computed as a sum of squares and convexity gaps, which are all ≥ 0, so that there is no
    cancellation. At a distance of 1 % from a pattern its relative error is about 5e-5 in float32
    and 1e-13 in float64, for all ε and condition numbers. This takes r×r stored numbers for each
    pattern of rank r.

    Patterns are all `Gaussian` or all `DiagonalGaussian`, and queries have the type of the
    patterns. For `DiagonalGaussian` all operations are elementwise.

    **Arguments:**

    - `epsilon`: the regularisation ε > 0, in squared units of distance. It scales with the data,
      S_{l²ε}(lμ, lν) = l²S_ε(μ, ν). It is a traced array, so that new values do not recompile and
      derivatives with respect to it exist.

    **Raises:** `TypeError` or `ValueError` unless `epsilon` is a number > 0.
    """

    epsilon: Float[Array, ""]

    cost_scale: ClassVar[float | None] = 0.5
    positive: ClassVar[tuple[str, ...]] = ("epsilon",)

    def __init__(self, epsilon: ArrayLike):
        self.epsilon = checks.positive("epsilon", epsilon, checks.scalar_dtype(epsilon))

    def _formulas(self, x: PyTree) -> "Full | Diagonal":
        return Diagonal(self.epsilon) if is_diagonal(x) else Full(self.epsilon)

    def residual(self, view: AnyView, pull: AnyMeasure) -> Array:
        """Compute |v| = √(|Σ wᵢμᵢ − m|² + |Σ wᵢMᵢRᵢ − LR₀|²)."""
        return norm(jax.tree.map(jnp.subtract, pull, view.self_pull))

    def __repr__(self) -> str:
        shown = checks.is_concrete(self.epsilon) and self.epsilon.ndim == 0
        return f"EntropicBures(epsilon={f'{float(self.epsilon):.4g}' if shown else '…'})"


def _toward(query: PyTree, pull: PyTree, self_pull: PyTree, step_size: Array) -> PyTree:
    """Return the query after a step, ξ + τ(pull − self_pull)."""
    return jax.tree.map(lambda x, y, z: x + step_size * (y - z), query, pull, self_pull)


def _with_shifts(mean: Array, means: Array, epsilon: Array, gaps: Array) -> Float[Array, " B"]:
    """Compute ½|m − μ|² + ½ε·gaps, minus the rounding error."""
    shifts = squared_distances(mean, means)
    return (shifts + epsilon * gaps) * ((1 - rounding(mean.size, shifts.dtype)) / 2)


class View(NamedTuple):
    """A query and its self transport. A full covariance has the factor L V, whose columns are along
    its principal axes."""

    query: AnyMeasure
    self_pull: AnyMeasure  # the pull of the self transport, (m, LR₀)
    shrunk: PyTree = None  # R₀, (r, r); None for diagonal covariances
    axes: PyTree = None  # Vᵀ, (r, r); None for diagonal covariances


# ------------------------------------------------------------------ diagonal covariances


class Diagonal(NamedTuple):
    """The formulas for standard deviations α and β of independent coordinates:
    D = ½|m − μ|² + ½Σₖ(½φ(αₖ²) + ½φ(βₖ²) − φ(αₖβₖ))."""

    epsilon: Float[Array, ""]

    def view(self, query: DiagonalGaussian) -> View:
        scale = query.scale * shrink(query.scale**2 / self.epsilon)
        return View(query, with_leaves(query, query.mean, scale))

    def compare(self, view: View, patterns: Patterns) -> Comparison:
        query, measures = view.query, patterns.measures
        first, second = self._scales(view, measures)
        gaps = _scalar_gap(first, second).sum(-1)
        shifts = squared_distances(query.mean, measures.mean)
        aligned = measures.scale * shrink(first * second)
        divergence = (shifts + self.epsilon * gaps) / 2
        return Comparison(divergence, with_leaves(measures, measures.mean, aligned))

    def prepare(self, patterns: DiagonalGaussian) -> None:
        return None

    def bounds(self) -> tuple[Bound, ...]:
        return (self._less_rounding,)

    def _less_rounding(self, view: View, patterns: Patterns) -> Float[Array, " B"]:
        first, second = self._scales(view, patterns.measures)
        error = rounding(1, first.dtype) * (first + second)
        gaps = _gap_less_rounding(first, second, error).sum(-1)
        return _with_shifts(view.query.mean, patterns.measures.mean, self.epsilon, gaps)

    def move(self, view: View, pull: PyTree, step_size: Array) -> DiagonalGaussian:
        moved = _toward(view.query, pull, view.self_pull, step_size)
        return upright(moved.mean, moved.scale)

    def _scales(self, view: View, measures: DiagonalGaussian) -> tuple[Array, Array]:
        """Return α and β in units of √ε, so that ε = 1."""
        root = jnp.sqrt(self.epsilon)
        return (view.query.scale / root)[None], measures.scale / root


# ------------------------------------------------------------------ full covariances


class Prepared(NamedTuple):
    """The right singular vectors and the singular values of the factors of patterns,
    M = U diag(s) Vᵀ."""

    axes: Float[Array, "N r r"]  # Vᵀ
    sizes: Float[Array, "N r"]  # s, padded with zeros


class Full(NamedTuple):
    """The formulas for full covariances:
    D = ½|m − μ|² + ½Σ(½φ(σ(LᵀL)) + ½φ(σ(MᵀM)) − φ(σ(MᵀL)))."""

    epsilon: Float[Array, ""]

    def view(self, query: Gaussian) -> View:
        factor, axes = principal(query.factor)
        rotated = with_leaves(query, query.mean, factor)
        scaled = self._scaled(factor)
        shrunk = shrunk_polar(scaled.mT @ scaled).factor
        return View(rotated, with_leaves(query, query.mean, factor @ shrunk), shrunk, axes)

    def compare(self, view: View, patterns: Patterns) -> Comparison:
        query, measures, prepared = view.query, patterns.measures, patterns.prepared
        factor, factors = self._scaled(query.factor), self._scaled(measures.factor)
        polar = shrunk_polar(factors.mT @ factor[None])
        spectra = Prepared(prepared.axes, self._scaled(prepared.sizes))
        gaps = _gap(factor, factors, view.shrunk, polar, spectra)
        shifts = squared_distances(query.mean, measures.mean)
        aligned = measures.factor @ polar.factor
        divergence = (shifts + self.epsilon * gaps) / 2
        return Comparison(divergence, with_leaves(measures, measures.mean, aligned))

    def prepare(self, patterns: Gaussian) -> Prepared:
        factor = jax.lax.stop_gradient(patterns.factor)
        # Batches bound the memory, since decompositions copy their argument.
        return Prepared(*map_in_batches(_axes, 1024, factor))

    def bounds(self) -> tuple[Bound, ...]:
        return self._by_spectra, self._by_principal_axes

    def _by_spectra(self, view: View, patterns: Patterns) -> Float[Array, " B"]:
        """Return the lower bound ½|m − μ|² + ½Σₖ(½φ(αₖ²) + ½φ(βₖ²) − φ(αₖβₖ)) on D, where α and β
        are the standard deviations along the principal axes in descending order. It holds because
        φ(eˣ) is convex and increasing, and the singular values of MᵀL are weakly log-majorised by
        the products of those of M and L (Horn).
        """
        query, measures = view.query, patterns.measures
        first, second = self._sizes(query)[None], self._scaled(patterns.prepared.sizes)
        second = jnp.pad(second, [(0, 0), (0, first.size - second.shape[-1])])
        error = _size_error(first, second, measures)
        gaps = _gap_less_rounding(first, second, error).sum(-1)
        return _with_shifts(query.mean, measures.mean, self.epsilon, gaps)

    def _by_principal_axes(self, view: View, patterns: Patterns) -> Float[Array, " B"]:
        """Return the lower bound ½|m − μ|² + ½Σₖ(½φ(αₖ²) + ½φ(βₖ²) − φ(αₖnₖ)) on D, where
        nₖ = |Mᵀuₖ| are the standard deviations of the pattern along the principal axes uₖ of the
        query, L = U diag(α) Vᵀ. It holds because φ(√x) is concave, so that
        Σφ(σ(MᵀL)) ≤ Σφ(|MᵀLvₖ|). The bound is exact where the covariances commute.
        """
        query, measures = view.query, patterns.measures
        sizes, along = map(self._scaled, deviations_along_axes(query, measures))
        first = sizes[None]
        second = self._scaled(patterns.prepared.sizes)
        gaps = _gap_less_rounding(first, along, _size_error(first, second, measures)).sum(-1)
        # Σφ(βₖ²) ≥ Σφ(nₖ²), because φ is convex.
        total, part = _phi(second**2).sum(-1), _phi(along**2).sum(-1)
        error = 2 * rounding(measures.factor[0].size, total.dtype) * (total + part)
        rest = jnp.maximum(total - part - error, 0)
        return _with_shifts(query.mean, measures.mean, self.epsilon, gaps + rest / 2)

    def move(self, view: View, pull: PyTree, step_size: Array) -> Gaussian:
        moved = _toward(view.query, pull, view.self_pull, step_size)
        result: Gaussian = with_leaves(moved, moved.mean, moved.factor @ view.axes)
        return result

    def _scaled(self, lengths: Array) -> Array:
        """Return `lengths` in units of √ε, so that ε = 1."""
        return lengths / jnp.sqrt(self.epsilon)

    def _sizes(self, query: Gaussian) -> Array:
        """Return the standard deviations of a query along its principal axes, in units of √ε."""
        return self._scaled(jnp.linalg.norm(query.factor, axis=-2))


def _axes(factor: Float[Array, "d r"]) -> tuple[Float[Array, "r r"], Float[Array, " r"]]:
    """Return Vᵀ and s of M = U diag(s) Vᵀ, with s padded with zeros to r entries."""
    dim, rank = factor.shape
    _, sizes, axes = (full_svd if rank > dim else svd)(factor)
    return axes, jnp.pad(sizes, (0, rank - sizes.size))


@jax.custom_jvp
def _gap(
    factor: Float[Array, "d r"],
    factors: Float[Array, "B d s"],
    shrunk: Float[Array, "r r"],
    polar: ShrunkPolar,
    spectra: Prepared,
) -> Float[Array, " B"]:
    """Compute Σ½φ(σ(LᵀL)) + ½φ(σ(MᵀM)) − φ(σ(MᵀL)) for ε = 1, as a sum of terms ≥ 0. The columns of
    L are along its principal axes, and `shrunk` is R₀.

    With MᵀL = U diag(σ) Vᵀ and the convexity gaps δ(x, y) of φ the sum is

        Σₖ rₖ|(LV − MU)ₖ|² + ½Σᵢₖ Vᵢₖ² δ(αᵢ², σₖ) + ½Σᵢₖ Wᵢₖ² δ(βᵢ², σₖ),

    where W are the overlaps of the principal axes of MᵀM with U. It is the expansion of tr φ(X)
    about H = V diag(σ) Vᵀ for X = LᵀL and X = QᵀMᵀMQ, Q = UVᵀ, where LᵀL +
    QᵀMᵀMQ − 2H = (L − MQ)ᵀ(L − MQ).
    """
    rank = factors.shape[-1]
    values = jnp.pad(polar.values, [(0, 0), (0, factor.shape[-1] - rank)])
    rotated = factor[None] @ polar.right.mT
    difference = rotated.at[..., :rank].add(-factors @ polar.left)
    squares = jnp.vecdot(shrink(values), jnp.vecdot(difference, difference, axis=-2))
    query = jnp.vecdot(factor, factor, axis=-2)[None, None]
    first = polar.right**2 * _convexity_gap(query, values[..., None])
    overlaps = spectra.axes @ polar.left
    patterns = (spectra.sizes**2)[..., None]
    second = overlaps**2 * _convexity_gap(patterns, polar.values[..., None, :])
    return squares + (first.sum((-1, -2)) + second.sum((-1, -2))) / 2


@partial(_gap.defjvp, symbolic_zeros=True)
@full_precision
def _gap_jvp(primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]) -> PyTree:
    """Return the derivative of `_gap` in the factors: by the envelope theorem dΣφ(σ(K)) = 2⟨R,
    dK⟩.
    """
    factor, factors, shrunk, polar, _ = primals
    dfactor, dfactors, *_ = tangents
    aligned = factors @ polar.factor
    change = jnp.zeros(len(factors), factor.dtype)
    if moves(dfactor):
        change += 2 * jnp.sum(((factor @ shrunk)[None] - aligned) * dfactor[None], axis=(-1, -2))
    if moves(dfactors):
        self_pull = factors @ shrunk_polar(factors.mT @ factors).factor
        back = factor[None] @ polar.factor.mT
        change += 2 * jnp.sum((self_pull - back) * dfactors, axis=(-1, -2))
    return _gap(*primals), change


@jax.custom_jvp
def _scalar_gap(first: Array, second: Array) -> Array:
    """Compute ½φ(a²) + ½φ(b²) − φ(ab) for ε = 1, as a sum of terms ≥ 0."""
    product = first * second
    gaps = _convexity_gap(first**2, product) + _convexity_gap(second**2, product)
    return shrink(product) * (first - second) ** 2 + gaps / 2


@_scalar_gap.defjvp
@full_precision
def _scalar_gap_jvp(
    primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> tuple[PyTree, PyTree]:
    (first, second), (dfirst, dsecond) = primals, tangents
    shrunk = shrink(first * second)
    slope = first * shrink(first**2) - second * shrunk
    other = second * shrink(second**2) - first * shrunk
    return _scalar_gap(*primals), 2 * (slope * dfirst + other * dsecond)


def _convexity_gap(x: Array, y: Array) -> Array:
    """Return the convexity gap δ(x, y) = φ(x) − φ(y) − φ'(y)(x − y) ≥ 0 for ε = 1, x, y ≥ 0.

    It is computed without cancellation: with t(x) = √(4x²+1) and u = (t(x) − t(y))/(t(y) + 1),

        4(x−y)²/((t(x)t(y) + 4xy + 1)(t(y) + 1)) + u − log(1 + u).
    """
    tx, ty, off = jnp.hypot(2 * x, 1), jnp.hypot(2 * y, 1), x - y
    flatness = 1 / tx / ty
    curved = flatness / (1 + (2 * x / tx) * (2 * y / ty) + flatness)
    rise = 4 * ((x + y) / (tx + ty)) * off
    up, down = rise / (ty + 1), -rise / (tx + 1)
    return 4 * curved * off * (off / (ty + 1)) + _less_log(up, down)


def _less_log(up: Array, down: Array) -> Array:
    """Compute u − log(1 + u), for `up` = u and `down` = v with (1 + u)(1 + v) = 1. For u < 0 the
    logarithm is that of 1 + v, which is accurate as u → −1.
    """
    # Series of log(1 + u) = 2 artanh w; its remainder is below the rounding error of float64.
    w = up / (2 + up)
    square = w * w
    series = 1 / 3 + square * (1 / 5 + square * (1 / 7 + square / 9))
    near = up * w - 2 * w * square * series
    far = up - jnp.log1p(jnp.maximum(up, 0)) + jnp.log1p(jnp.maximum(down, 0))
    return jnp.where(jnp.abs(up) < 0.03, near, far)


def _phi(x: Array) -> Array:
    """Compute φ for ε = 1."""
    half = x * shrink(x)
    return 2 * half - jnp.log1p(half)


def _size_error(first: Array, second: Array, patterns: Gaussian) -> Array:
    """Return a bound on the rounding error of singular values, which is relative to the largest
    one.
    """
    error = rounding(sum(patterns.factor.shape[1:]), first.dtype)
    return error * (first.max(-1) + second.max(-1))[..., None]


def _gap_less_rounding(first: Array, second: Array, error: Array) -> Array:
    """Return a lower bound on `_scalar_gap` of exact arguments that differ from `first` and
    `second` by at most `error`. In each argument `_scalar_gap` has the Lipschitz constant 3|a − b|.
    """
    difference = jnp.abs(first - second)
    return jnp.maximum(_scalar_gap(first, second) - 6 * error * (difference + 2 * error), 0)
