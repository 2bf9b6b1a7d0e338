"""Separations: functions that turn the divergences D₁ … D_N into an energy and weights.

The energy E(D₁ … D_N) is nondecreasing in every Dᵢ. The weights wᵢ ≥ 0, with Σ wᵢ = 1 or all 0, are
such that a decrease of Σ wᵢDᵢ is a decrease of E. A step of recall moves the query towards the
barycentre of the patterns with weights wᵢ, so it descends on every one of these energies.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, PyTree

from jdam._core.derivatives import full_precision
from jdam._core.loops import bisect
from jdam._core.mesh import Layout, all_parts
from jdam._energy.evaluation import Block, Evaluation, Nearest
from jdam._measures.base import AnyMeasure
from jdam.geometry.protocol import AnyView, Comparison


class Separation(ABC):
    """An energy of the divergences (N,), and its weights. Subclasses are frozen dataclasses, or
    other hashable values: a program is compiled for each that differs.

    Steps descend if E is nondecreasing and concave in D, and the weights are proportional to its
    slopes. `log_prior` is −∞ for patterns that do not count, as free slots, whose D may be ∞; D of
    `DotProduct` may be negative. The weights are all zero if no pattern counts.
    """

    @abstractmethod
    def energy(
        self,
        divergences: Float[Array, " N"],
        log_prior: Float[Array, " N"] | None,
        beta: Float[Array, ""],
    ) -> Float[Array, ""]:
        """Return E(D₁ … D_N)."""

    @abstractmethod
    def weights(
        self,
        divergences: Float[Array, " N"],
        log_prior: Float[Array, " N"] | None,
        beta: Float[Array, ""],
    ) -> Float[Array, " N"]:
        """Return the weights of the patterns in a step, (N,)."""


@dataclass(frozen=True)
class LogSumExp(Separation):
    """E = −β⁻¹ log Σ πᵢ exp(−βDᵢ), w = softmax(log π − βD): the Gibbs weights, all positive.

    The energy of both papers (arXiv:2509.23162; eq. 1 of arXiv:2603.20656).
    """

    def energy(self, divergences: Array, log_prior: Array | None, beta: Array) -> Array:
        shifted = with_prior(divergences, log_prior, beta)
        lowest = jax.lax.stop_gradient(shifted.min())
        return lowest - jnp.log(mass(shifted - lowest, beta).sum()) / beta

    def weights(self, divergences: Array, log_prior: Array | None, beta: Array) -> Array:
        shifted = with_prior(divergences, log_prior, beta)
        masses = mass(shifted - jax.lax.stop_gradient(shifted.min()), beta)
        return masses / masses.sum()

    def sums(
        self, comparison: Comparison, block: Block, beta: Array, top: Array, with_pull: bool
    ) -> "Sums":
        """Return the sums over a block of patterns. `top` is log max πᵢ of all patterns."""
        if not with_pull:
            comparison = Comparison(
                comparison.divergence, None, not_converged=comparison.not_converged
            )
        divergences = comparison.divergence
        shifted = with_prior(divergences, block.log_prior, beta)
        # Every reference gives the same energy and average; the lowest D̃ overflows nowhere.
        low = jax.lax.stop_gradient(shifted).min()
        masses = mass(shifted - _finite(low), beta)
        prior, _ = relative_prior(masses, block.log_prior, top)
        on = jnp.where(prior > 0, divergences, jnp.inf)
        least = jax.lax.stop_gradient(on).min()
        row = _first(jax.lax.stop_gradient(shifted) == low)
        rows = Nearest(block.indices, divergences, comparison.inliers, comparison.pose)
        return Sums(
            lowest=shifted.min(),
            least=least,
            nearest=jax.tree.map(lambda leaf: leaf[row], rows),
            mass=masses.sum(),
            prior=prior.sum(),
            expm1_sum=(prior * jnp.expm1(_logits(on - _finite(least), beta))).sum(),
            pull=jax.tree.map(partial(jnp.tensordot, masses, axes=1), comparison.pull),
            unsolved=unsolved_mass(comparison, masses),
        )

    def total(self, parts: "Sums", beta: Array) -> "Sums":
        """Return the sums over several parts of the patterns, whose leaves lead with (P,). Sums
        that are all 0 are those of no patterns.
        """
        lows = jnp.where(parts.mass == 0, jnp.inf, jax.lax.stop_gradient(parts.lowest))
        low = lows.min()
        decay = mass(lows - _finite(low), beta)
        part = _first(lows == low)
        lowest, nearest = jax.tree.map(lambda leaf: leaf[part], (parts.lowest, parts.nearest))
        summed = parts.mass, parts.pull, parts.unsolved
        mass_, pull, unsolved = jax.tree.map(partial(jnp.tensordot, decay, axes=1), summed)
        leasts = jnp.where(parts.prior == 0, jnp.inf, parts.least)
        least = leasts.min()
        shift = _logits(leasts - _finite(least), beta)
        expm1_sum = jnp.exp(shift) * parts.expm1_sum + parts.prior * jnp.expm1(shift)
        prior, expm1_sum = parts.prior.sum(), expm1_sum.sum()
        return Sums(lowest, least, nearest, mass_, prior, expm1_sum, pull, unsolved)

    def over_shards(self, sums: "Sums", beta: Array, layout: Layout | None) -> "Sums":
        """Return the sums over all shards of a memory."""
        return sums if layout is None else self.total(all_parts(sums, layout), beta)

    def finish(
        self, sums: "Sums", total: tuple[Array, Array], beta: Array, view: AnyView, guess: PyTree
    ) -> Evaluation:
        """Return the evaluation of the sums.

        `total` is the pair log max πᵢ and Σ πᵢ / max π over all patterns. Patterns that are not in
        the sums count with mass 0.
        """
        log_top, prior = total
        low = jax.lax.stop_gradient(sums.lowest)
        energy = low - jnp.log(sums.mass) / beta
        mean_expm1 = (sums.expm1_sum - (prior - sums.prior)) / prior
        small = mean_expm1 > -0.5
        shifted = sums.least - jnp.log1p(jnp.where(small, mean_expm1, 0)) / beta
        offset = (log_top + jnp.log(prior)) / beta
        return Evaluation(
            view=view,
            energy=energy,
            shifted_energy=jnp.where(small, shifted, energy + offset),
            pull=jax.tree.map(lambda total: total / sums.mass, sums.pull),
            nearest=sums.nearest,
            weight=_mass_of_the_lowest(sums.lowest, beta) / sums.mass,
            unsolved=jax.lax.stop_gradient(sums.unsolved / sums.mass),
            neglected=jnp.zeros_like(beta),
            guess=guess,
        )


class Sums(NamedTuple):
    """Sums over patterns of exp(−β(D̃ᵢ − lowest)), D̃ᵢ = Dᵢ − β⁻¹ log πᵢ, and of its products."""

    lowest: Float[Array, ""]  # min D̃, with its derivative; as a reference it is a constant
    least: Float[Array, ""]  # min D over patterns with πᵢ > 0
    nearest: Nearest  # the pattern of `lowest`
    mass: Float[Array, ""]  # Σ exp(−β(D̃ᵢ − lowest))
    prior: Float[Array, ""]  # Σ πᵢ / max π
    expm1_sum: Float[Array, ""]  # Σ πᵢ expm1(−β(Dᵢ − least)) / max π: accurate as β → 0
    pull: AnyMeasure  # Σ exp(−β(D̃ᵢ − lowest))·pullᵢ
    unsolved: Float[Array, ""]  # mass of the comparisons that missed their tolerance


@dataclass(frozen=True)
class Entmax(Separation):
    """w = entmax_α(log π − βD): weights that vanish beyond a finite margin.

    With Tsallis' entropy H_α(p) = Σ (pᵢ − pᵢ^α)/(α(α−1)),

        E = −β⁻¹ max over p in the simplex of ⟨p, log π − βD⟩ + H_α(p),

    attained at p = w = [(α−1)(log π − βD) − τ]₊^(1/(α−1)) with τ such that Σ wᵢ = 1
    (Peters, Niculae and Martins, arXiv:1905.05702; Hopfield–Fenchel–Young, arXiv:2411.08590).
    α = 2 is sparsemax; α → 1 is `LogSumExp`. If D of one pattern is less than that of all
    others by 1/((α−1)β) or more, its weight is 1, and one step recalls it exactly.

    **Arguments:**

    - `alpha` ≥ 1.0001: the exponent α, finite. Nearer to 1, weights would lose digits, and those of
      `LogSumExp` differ from them by less than 1e-4.

    **Raises:** `TypeError` for an `alpha` that is no number, `ValueError` unless it is finite and ≥
    1.0001.
    """

    alpha: float = 1.5

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, int | float) or isinstance(self.alpha, bool):
            raise TypeError(f"alpha must be a number; got {self.alpha!r}")
        if not 1.0001 <= self.alpha < float("inf"):
            raise ValueError(
                f"alpha must be finite and ≥ 1.0001; got {self.alpha}: jdam.LogSumExp() is the "
                "limit α → 1"
            )

    def energy(self, divergences: Array, log_prior: Array | None, beta: Array) -> Array:
        shifted = with_prior(divergences, log_prior, beta)
        lowest = jax.lax.stop_gradient(shifted.min())
        return lowest - _conjugate(float(self.alpha), _logits(shifted - lowest, beta)) / beta

    def weights(self, divergences: Array, log_prior: Array | None, beta: Array) -> Array:
        shifted = with_prior(divergences, log_prior, beta)
        lowest = jax.lax.stop_gradient(shifted.min())
        return _entmax(float(self.alpha), _logits(shifted - lowest, beta))


@dataclass(frozen=True)
class Epanechnikov(Separation):
    """E = −β⁻¹ log Σ πᵢ [1 − βDᵢ/2]₊: patterns beyond D = 2/β have no influence.

    The log-sum-ReLU energy of Hoover et al. (arXiv:2506.10801). A step weighs the patterns within
    reach by their prior alone, wᵢ ∝ πᵢ for Dᵢ < 2/β. If no pattern is within reach, the energy is
    infinite, all weights are 0, the step leaves the query unchanged, and a recall has
    `Status.OUT_OF_REACH`.
    """

    def energy(self, divergences: Array, log_prior: Array | None, beta: Array) -> Array:
        prior, top = relative_prior(divergences, log_prior)
        total = jnp.vdot(prior, jnp.maximum(1 - beta * divergences / 2, 0))
        none = total == 0
        energy = -(top + jnp.log(jnp.where(none, 1, total))) / beta
        return jnp.where(none, jnp.inf, energy)

    def weights(self, divergences: Array, log_prior: Array | None, beta: Array) -> Array:
        prior, _ = relative_prior(divergences, log_prior)
        prior = jnp.where(beta * divergences < 2, prior, 0)
        total = prior.sum()
        return prior / jnp.where(total == 0, 1, total)


def unsolved_mass(comparison: Comparison, masses: Float[Array, " B"]) -> Float[Array, ""]:
    """Return the mass of the comparisons that missed their tolerance."""
    if comparison.not_converged is None:
        return jnp.zeros((), masses.dtype)
    return jnp.where(comparison.not_converged, masses, 0).sum()


def _first(marks: Array) -> Int[Array, ""]:
    """Return the index of the first true entry: an `argmax` that XLA vectorises."""
    size = marks.shape[0]
    return jnp.where(marks, jnp.arange(size, dtype=jnp.int32), size - 1).min()


def heaviest(
    weights: Float[Array, " N"],
    divergences: Float[Array, " N"],
    log_prior: Float[Array, " N"] | None,
) -> Int[Array, ""]:
    """Return the index of the pattern of largest weight; of several, the nearest."""
    on = True if log_prior is None else log_prior != -jnp.inf
    candidates = jnp.where((weights == weights.max()) & on, divergences, jnp.inf)
    return candidates.argmin().astype(jnp.int32)


def is_mixture(weight: Float[Array, "*batch"]) -> Bool[Array, "*batch"]:
    """Return whether the largest weight is at most one half, up to rounding."""
    result: Array = weight <= 0.5 + float(jnp.finfo(weight.dtype).eps) ** 0.5
    return result


def with_prior(divergences: Array, log_prior: Array | None, beta: Array) -> Float[Array, " B"]:
    """Return D̃ᵢ = Dᵢ − β⁻¹ log πᵢ, ∞ where the prior is 0.

    Callers subtract the lowest D̃ before they multiply by β, so that its mass is exactly 1 however
    large βD is.
    """
    if log_prior is None:
        return divergences
    on = log_prior != -jnp.inf  # NaN is not masked
    return jnp.where(on, divergences - jnp.where(on, log_prior, 0) / beta, jnp.inf)


def _logits(shifted: Array, beta: Array) -> Array:
    """Return −βD̃, with derivative 0 where D̃ is infinite."""
    infinite = shifted == jnp.inf
    return jnp.where(infinite, -jnp.inf, -beta * jnp.where(infinite, 0, shifted))


def _finite(lowest: Array) -> Array:
    """Return the lowest D̃, or 0 if it is ∞, as if the prior of all patterns so far is 0."""
    return jnp.where(lowest == jnp.inf, 0, lowest)


@jax.custom_jvp
def _mass_of_the_lowest(lowest: Array, beta: Array) -> Array:
    """Return exp(−β(D̃ − lowest)) = 1 for the lowest D̃, where the reference `lowest` is constant
    but D̃ is not; programs without derivatives need not compute it."""
    return jnp.ones_like(lowest)


@_mass_of_the_lowest.defjvp
def _mass_of_the_lowest_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (lowest, beta), (dlowest, dbeta) = primals, tangents
    one, zero = _mass_of_the_lowest(*primals), lowest - jax.lax.stop_gradient(lowest)
    return one, -one * (beta * dlowest + zero * dbeta)


def mass(shifted: Array, beta: Array) -> Array:
    """Return exp(−βD̃), with derivative 0 where D̃ is infinite."""
    return jnp.exp(_logits(shifted, beta))


def relative_prior(
    like: Array, log_prior: Array | None, top: Array | None = None
) -> tuple[Array, Array]:
    """Return πᵢ/max π, in the shape of `like`, and log max π; `top` is that of all patterns if
    these are a part of them.
    """
    if log_prior is None:
        return jnp.ones_like(like), jnp.zeros((), like.dtype)
    top = jax.lax.stop_gradient(log_prior.max()) if top is None else top
    on = log_prior != -jnp.inf
    return jnp.where(on, jnp.exp(jnp.where(on, log_prior, 0) - top), 0), top


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _entmax(alpha: float, logits: Float[Array, " N"]) -> Float[Array, " N"]:
    """Return the weights that attain `_conjugate`, by bisection of the threshold τ."""
    power = alpha - 1
    scaled = power * (logits - logits.max())
    rounds = jnp.finfo(scaled.dtype).nmant + 3

    def unnormalised(threshold: Array) -> Array:
        return jnp.maximum(scaled - threshold, 0) ** (1 / power)

    # At τ = −1 the largest term is 1, so that the sum is ≥ 1; at the upper end no term exceeds 1/N.
    ends = jnp.array(-1, scaled.dtype), jnp.array(-(scaled.size**-power), scaled.dtype)
    low, _ = bisect(lambda threshold: unnormalised(threshold).sum() >= 1, *ends, rounds, scaled)
    weights = unnormalised(low)
    return weights / weights.sum()


@_entmax.defjvp
@full_precision
def _entmax_jvp(
    alpha: float, primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> tuple[Array, Array]:
    weights = _entmax(alpha, *primals)
    on = weights > 0
    slopes = jnp.where(on, jnp.where(on, weights, 1) ** (2 - alpha), 0)
    mean = jnp.vdot(slopes, *tangents) / slopes.sum()
    return weights, slopes * (tangents[0] - mean)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _conjugate(alpha: float, logits: Float[Array, " N"]) -> Float[Array, ""]:
    """Return max over p of ⟨p, z⟩ + H_α(p)."""
    weights = _entmax(alpha, logits)
    product = jnp.vdot(weights, jnp.where(weights > 0, logits, 0))
    return product + jnp.sum(weights - weights**alpha) / (alpha * (alpha - 1))


@_conjugate.defjvp
@full_precision
def _conjugate_jvp(
    alpha: float, primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> tuple[Array, Array]:
    return _conjugate(alpha, *primals), jnp.vdot(_entmax(alpha, *primals), *tangents)


def check(separation: object) -> Separation:
    """Return `separation`, or raise `TypeError` if it is no `Separation`."""
    if not isinstance(separation, Separation):
        raise TypeError(f"separation must be one of jdam's, as jdam.LogSumExp(); got {separation}")
    return separation
