"""Gaussians under the debiased Sinkhorn divergence, in closed form."""

from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam._core import checks
from jdam._core.batching import map_in_batches
from jdam._core.derivatives import full_precision, moves
from jdam._core.lapack import full_svd, svd
from jdam._core.linalg import ShrunkPolar, rounding, shrink, shrunk_polar
from jdam._measures.base import AnyMeasure, with_leaves
from jdam._measures.gaussian import DiagonalGaussian, Gaussian
from jdam.geometry.bures import Gaussians, deviations_along_axes, principal, upright
from jdam.geometry.euclidean import squared_distances
from jdam.geometry.protocol import AnyView, Bound, Comparison, Patterns, norm


class EntropicBures(Gaussians):
    """D = S_ε, the debiased Sinkhorn divergence with cost ½|x−y|², on Gaussians, without
    iterations (closed form: arXiv:2006.02572; the memory: arXiv:2603.20656).

    With φ(s) = t − ε − ε log((t+ε)/2ε), t = √(4s²+ε²), and singular values σ of factors,

        S_ε(N(m,LLᵀ), N(μ,MMᵀ)) = ½|m − μ|² + ½Σ(½φ(σ(LᵀL)) + ½φ(σ(MᵀM)) − φ(σ(MᵀL))),

    and a step follows barycentric maps, less that of the query to itself:

        m⁺ = m + τ(Σ wᵢμᵢ − m),    L⁺ = L + τ(Σ wᵢMᵢRᵢ − LR₀),

    R the shrunk polar factor of MᵀL, U diag(2s/(t+ε)) Vᵀ of MᵀL = U diag(s) Vᵀ, and R₀ that of
    LᵀL. There is no inverse and no root; everything is smooth, at singular covariances too. As
    ε → 0, D is ½W₂², and this is `Bures` with half its β; as ε → ∞, D is ½|m − μ|² and
    covariances stay. A full step never raises the energy: E(ξ) − E(ξ⁺) ≥ τ(1 − 0.6τ)|v|², v
    being the velocity, for the gradient LR₀ of ½Σ½φ(σ(LᵀL)) has Lipschitz constant
    max (1 + 2/t)√((t−1)/(t+1)) < 1.2, what remains of D is concave in L, and E concave in D.

    Variances λ far below ε are recalled slowly: their error falls by 1 − 2λ/ε in a step, and where
    a pattern has none they are ε/2k after k steps. Maps are linear, so that covariances keep
    their null space: a Dirac recalls means alone.

    D is computed as a sum of squares and convexity gaps, none negative, and does not cancel: at
    1 % from a pattern its relative error is some 5e-5 in float32 and 1e-13 in float64, for all ε
    and conditions. For that, `store` keeps r×r numbers beside each pattern of rank r.

    Patterns are all `Gaussian` or all `DiagonalGaussian`, queries of the same type; on the latter
    everything is elementwise.

    **Arguments:** `epsilon` > 0, the regularisation, in squared units of distance; it scales with
    the data, S_{l²ε}(lμ, lν) = l²S_ε(μ, ν). It is traced: changing it does not recompile, and it
    can be differentiated.

    **Raises:** `TypeError` or `ValueError` unless `epsilon` is a number > 0.
    """

    epsilon: Float[Array, ""]

    cost_scale: ClassVar[float | None] = 0.5
    positive: ClassVar[tuple[str, ...]] = ("epsilon",)

    def __init__(self, epsilon: ArrayLike):
        self.epsilon = checks.positive("epsilon", epsilon, checks.scalar_dtype(epsilon))

    def view(self, query: AnyMeasure) -> AnyView:
        return self._kernel(query).view(query)

    def compare(self, view: AnyView, patterns: Patterns, *, exact: bool = True) -> Comparison:
        return self._kernel(view).compare(view, patterns)

    def prepare(self, patterns: AnyMeasure) -> Any:
        return self._kernel(patterns).prepare(patterns)

    def bounds(self, patterns: Patterns) -> tuple[Bound, ...]:
        return self._kernel(patterns.measures).bounds()

    def move(self, view: AnyView, pull: AnyMeasure, step_size: Array) -> AnyMeasure:
        return self._kernel(view).move(view, pull, step_size)

    def residual(self, view: AnyView, pull: AnyMeasure) -> Array:
        """|v| = √(|Σ wᵢμᵢ − m|² + |Σ wᵢMᵢRᵢ − LR₀|²)."""
        return norm(jax.tree.map(jnp.subtract, pull, view.own))

    def __repr__(self) -> str:
        shown = checks.is_concrete(self.epsilon) and self.epsilon.ndim == 0
        return f"EntropicBures(epsilon={f'{float(self.epsilon):.4g}' if shown else '…'})"

    def _kernel(self, of: Any) -> "Full | Diagonal":
        diagonal = isinstance(of, DiagonalGaussian | DiagonalView)
        return Diagonal(self.epsilon) if diagonal else Full(self.epsilon)


def _toward(query: Any, pull: Any, own: Any, step_size: Array) -> Any:
    """ξ + τ(pull − own)."""
    return jax.tree.map(lambda x, y, z: x + step_size * (y - z), query, pull, own)


def _with_shifts(mean: Array, means: Array, epsilon: Array, gaps: Array) -> Float[Array, " B"]:
    """½|m − μ|² + ½ε·gaps, less its rounding."""
    shifts = squared_distances(mean, means)
    return (shifts + epsilon * gaps) * ((1 - rounding(mean.size, shifts.dtype)) / 2)


# ------------------------------------------------------------------ diagonal covariances


class DiagonalView(NamedTuple):
    """A query, and what it asks of itself."""

    query: DiagonalGaussian
    own: DiagonalGaussian


class Diagonal(NamedTuple):
    """½|m − μ|² + ½Σₖ(½φ(αₖ²) + ½φ(βₖ²) − φ(αₖβₖ)) of standard deviations α and β."""

    epsilon: Float[Array, ""]

    def view(self, query: DiagonalGaussian) -> DiagonalView:
        own = query.scale * shrink(query.scale**2 / self.epsilon)
        return DiagonalView(query, with_leaves(query, query.mean, own))

    def compare(self, view: DiagonalView, patterns: Patterns) -> Comparison:
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

    def _less_rounding(self, view: DiagonalView, patterns: Patterns) -> Float[Array, " B"]:
        first, second = self._scales(view, patterns.measures)
        error = rounding(1, first.dtype) * (first + second)
        gaps = _gap_less_rounding(first, second, error).sum(-1)
        return _with_shifts(view.query.mean, patterns.measures.mean, self.epsilon, gaps)

    def move(self, view: DiagonalView, pull: Any, step_size: Array) -> DiagonalGaussian:
        moved = _toward(view.query, pull, view.own, step_size)
        return upright(moved.mean, moved.scale)

    def _scales(self, view: DiagonalView, measures: DiagonalGaussian) -> tuple[Array, Array]:
        """α and β in units of √ε, in which ε = 1."""
        root = jnp.sqrt(self.epsilon)
        return (view.query.scale / root)[None], measures.scale / root


# ------------------------------------------------------------------ full covariances


class View(NamedTuple):
    """A query with its factor turned to its principal axes, L V, and Vᵀ; and what it asks of
    itself, (m, LR₀)."""

    query: Gaussian
    own: Gaussian
    shrunk: Float[Array, "r r"]  # R₀
    axes: Float[Array, "r r"]


class Prepared(NamedTuple):
    """The right singular vectors of the patterns' factors, M = U diag(s) Vᵀ, and s with zeros."""

    axes: Float[Array, "N r r"]  # Vᵀ
    sizes: Float[Array, "N r"]


class Full(NamedTuple):
    """½|m − μ|² + ½Σ(½φ(σ(LᵀL)) + ½φ(σ(MᵀM)) − φ(σ(MᵀL)))."""

    epsilon: Float[Array, ""]

    def view(self, query: Gaussian) -> View:
        factor, axes = principal(query.factor)
        turned = with_leaves(query, query.mean, factor)
        scaled = self._scaled(factor)
        shrunk = shrunk_polar(scaled.mT @ scaled).factor
        return View(turned, with_leaves(query, query.mean, factor @ shrunk), shrunk, axes)

    def compare(self, view: View, patterns: Patterns) -> Comparison:
        query, measures, prepared = view.query, patterns.measures, patterns.prepared
        factor, factors = self._scaled(query.factor), self._scaled(measures.factor)
        found = shrunk_polar(factors.mT @ factor[None])
        spectra = Prepared(prepared.axes, self._scaled(prepared.sizes))
        gaps = _gap(factor, factors, view.shrunk, found, spectra)
        shifts = squared_distances(query.mean, measures.mean)
        aligned = measures.factor @ found.factor
        divergence = (shifts + self.epsilon * gaps) / 2
        return Comparison(divergence, with_leaves(measures, measures.mean, aligned))

    def prepare(self, patterns: Gaussian) -> Prepared:
        factor = jax.lax.stop_gradient(patterns.factor)
        # In batches: decompositions copy what they are given.
        return Prepared(*map_in_batches(_axes, 1024, factor))

    def bounds(self) -> tuple[Bound, ...]:
        return self._by_spectra, self._by_principal_axes

    def _by_spectra(self, view: View, patterns: Patterns) -> Float[Array, " B"]:
        """½|m − μ|² + ½Σₖ(½φ(αₖ²) + ½φ(βₖ²) − φ(αₖβₖ)), α and β the falling standard deviations
        along principal axes: φ(eˣ) is convex and increasing, and the singular values of MᵀL are
        weakly log-majorised by the products of those of M and L (Horn)."""
        query, measures = view.query, patterns.measures
        first, second = self._sizes(query)[None], self._scaled(patterns.prepared.sizes)
        second = jnp.pad(second, [(0, 0), (0, first.size - second.shape[-1])])
        error = _size_error(first, second, measures)
        gaps = _gap_less_rounding(first, second, error).sum(-1)
        return _with_shifts(query.mean, measures.mean, self.epsilon, gaps)

    def _by_principal_axes(self, view: View, patterns: Patterns) -> Float[Array, " B"]:
        """½|m − μ|² + ½Σₖ(½φ(αₖ²) + ½φ(βₖ²) − φ(αₖnₖ)), nₖ = |Mᵀuₖ| the standard deviations along
        the principal axes uₖ of the query, L = U diag(α) Vᵀ: φ(√x) is concave, so that
        Σφ(σ(MᵀL)) ≤ Σφ(|MᵀLvₖ|). It is exact where the covariances commute."""
        query, measures = view.query, patterns.measures
        sizes, along = map(self._scaled, deviations_along_axes(query, measures))
        first = sizes[None]
        second = self._scaled(patterns.prepared.sizes)
        gaps = _gap_less_rounding(first, along, _size_error(first, second, measures)).sum(-1)
        # Σφ(βₖ²) ≥ Σφ(nₖ²), for φ is convex.
        whole, part = _phi(second**2).sum(-1), _phi(along**2).sum(-1)
        error = 2 * rounding(measures.factor[0].size, whole.dtype) * (whole + part)
        rest = jnp.maximum(whole - part - error, 0)
        return _with_shifts(query.mean, measures.mean, self.epsilon, gaps + rest / 2)

    def move(self, view: View, pull: Any, step_size: Array) -> Gaussian:
        moved = _toward(view.query, pull, view.own, step_size)
        result: Gaussian = with_leaves(moved, moved.mean, moved.factor @ view.axes)
        return result

    def _scaled(self, lengths: Array) -> Array:
        """In units of √ε, in which ε = 1."""
        return lengths / jnp.sqrt(self.epsilon)

    def _sizes(self, query: Gaussian) -> Array:
        """The standard deviations of a query along its principal axes."""
        return self._scaled(jnp.linalg.norm(query.factor, axis=-2))


def _axes(factor: Float[Array, "d r"]) -> tuple[Float[Array, "r r"], Float[Array, " r"]]:
    dim, rank = factor.shape
    _, sizes, axes = (full_svd if rank > dim else svd)(factor)
    return axes, jnp.pad(sizes, (0, rank - sizes.size))


@jax.custom_jvp
def _gap(
    factor: Float[Array, "d r"],
    factors: Float[Array, "B d s"],
    shrunk: Float[Array, "r r"],
    found: ShrunkPolar,
    spectra: Prepared,
) -> Float[Array, " B"]:
    """Σ½φ(σ(LᵀL)) + ½φ(σ(MᵀM)) − φ(σ(MᵀL)) for ε = 1, L in its principal axes, R₀ = `shrunk`.

    With MᵀL = U diag(σ) Vᵀ and the convexity gaps δ(x, y) of φ it is

        Σₖ rₖ|(LV − MU)ₖ|² + ½Σᵢₖ Vᵢₖ² δ(αᵢ², σₖ) + ½Σᵢₖ Wᵢₖ² δ(βᵢ², σₖ),

    W the overlaps of the principal axes of MᵀM and those of U: tr φ(X) about the point
    H = V diag(σ) Vᵀ for X = LᵀL and X = QᵀMᵀMQ, Q = UVᵀ, where LᵀL + QᵀMᵀMQ − 2H =
    (L − MQ)ᵀ(L − MQ).
    """
    rank = factors.shape[-1]
    values = jnp.pad(found.values, [(0, 0), (0, factor.shape[-1] - rank)])
    turned = factor[None] @ found.right.mT
    off = turned.at[..., :rank].add(-factors @ found.left)
    squares = jnp.vecdot(shrink(values), jnp.vecdot(off, off, axis=-2))
    query = jnp.vecdot(factor, factor, axis=-2)[None, None]
    first = found.right**2 * _convexity_gap(query, values[..., None])
    overlaps = spectra.axes @ found.left
    patterns = (spectra.sizes**2)[..., None]
    second = overlaps**2 * _convexity_gap(patterns, found.values[..., None, :])
    return squares + (first.sum((-1, -2)) + second.sum((-1, -2))) / 2


@partial(_gap.defjvp, symbolic_zeros=True)
@full_precision
def _gap_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    """By the envelope theorem dΣφ(σ(K)) = 2⟨R, dK⟩."""
    factor, factors, shrunk, found, _ = primals
    dfactor, dfactors, *_ = tangents
    aligned = factors @ found.factor
    change = jnp.zeros(len(factors), factor.dtype)
    if moves(dfactor):
        change += 2 * jnp.sum(((factor @ shrunk)[None] - aligned) * dfactor[None], axis=(-1, -2))
    if moves(dfactors):
        own = factors @ shrunk_polar(factors.mT @ factors).factor
        back = factor[None] @ found.factor.mT
        change += 2 * jnp.sum((own - back) * dfactors, axis=(-1, -2))
    return _gap(*primals), change


@jax.custom_jvp
def _scalar_gap(first: Array, second: Array) -> Array:
    """½φ(a²) + ½φ(b²) − φ(ab) for ε = 1, in the same way."""
    product = first * second
    gaps = _convexity_gap(first**2, product) + _convexity_gap(second**2, product)
    return shrink(product) * (first - second) ** 2 + gaps / 2


@_scalar_gap.defjvp
@full_precision
def _scalar_gap_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    (first, second), (dfirst, dsecond) = primals, tangents
    shrunk = shrink(first * second)
    slope = first * shrink(first**2) - second * shrunk
    other = second * shrink(second**2) - first * shrunk
    return _scalar_gap(*primals), 2 * (slope * dfirst + other * dsecond)


def _convexity_gap(x: Array, y: Array) -> Array:
    """δ(x, y) = φ(x) − φ(y) − φ'(y)(x − y) ≥ 0 for ε = 1, x, y ≥ 0.

    With t(x) = √(4x²+1) and u = (t(x) − t(y))/(t(y) + 1) it is

        4(x−y)²/((t(x)t(y) + 4xy + 1)(t(y) + 1)) + u − log(1 + u).
    """
    tx, ty, off = jnp.hypot(2 * x, 1), jnp.hypot(2 * y, 1), x - y
    flatness = 1 / tx / ty
    curved = flatness / (1 + (2 * x / tx) * (2 * y / ty) + flatness)
    rise = 4 * ((x + y) / (tx + ty)) * off
    up, down = rise / (ty + 1), -rise / (tx + 1)
    return 4 * curved * off * (off / (ty + 1)) + _less_log(up, down)


def _less_log(up: Array, down: Array) -> Array:
    """u − log(1 + u), given v too, (1 + u)(1 + v) = 1, which matters as u → −1."""
    # 2 artanh w = log(1 + u); what is cut off is below the rounding of float64.
    w = up / (2 + up)
    square = w * w
    series = 1 / 3 + square * (1 / 5 + square * (1 / 7 + square / 9))
    near = up * w - 2 * w * square * series
    far = up - jnp.log1p(jnp.maximum(up, 0)) + jnp.log1p(jnp.maximum(down, 0))
    return jnp.where(jnp.abs(up) < 0.03, near, far)


def _phi(x: Array) -> Array:
    """φ for ε = 1."""
    half = x * shrink(x)
    return 2 * half - jnp.log1p(half)


def _size_error(first: Array, second: Array, patterns: Gaussian) -> Array:
    """A bound on the error of singular values: relative to the largest."""
    error = rounding(sum(patterns.factor.shape[1:]), first.dtype)
    return error * (first.max(-1) + second.max(-1))[..., None]


def _gap_less_rounding(first: Array, second: Array, error: Array) -> Array:
    """What `_scalar_gap` surely is not less than where its arguments err by this much: it is
    3|a − b|-Lipschitz in each."""
    off = jnp.abs(first - second)
    return jnp.maximum(_scalar_gap(first, second) - 6 * error * (off + 2 * error), 0)
