"""The shape of the energy: how divergences become one number and a weight for each pattern.

Each separation is an energy E(D₁ … D_N) that does not fall when a divergence rises, and weights
wᵢ ≥ 0 with Σ wᵢ = 1, such that lowering Σ wᵢDᵢ lowers E: so the step of recall, which moves a
query towards the wᵢ-weighted barycentre of the patterns, descends for all of them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jdam._core.derivatives import full_precision
from jdam._core.loops import repeat
from jdam._core.mesh import Layout, of_one_part, pmin, psum
from jdam._energy.evaluation import Block, Evaluation, Nearest
from jdam._measures.base import AnyMeasure
from jdam.geometry.protocol import AnyView, Comparison


@dataclass(frozen=True)
class Separation(ABC):
    """An energy of divergences (N,), and the weights that go with it."""

    @abstractmethod
    def energy(
        self,
        divergences: Float[Array, " N"],
        log_prior: Float[Array, " N"] | None,
        beta: Float[Array, ""],
    ) -> Float[Array, ""]:
        """E(D₁ … D_N)."""

    @abstractmethod
    def weights(
        self,
        divergences: Float[Array, " N"],
        log_prior: Float[Array, " N"] | None,
        beta: Float[Array, ""],
    ) -> Float[Array, " N"]:
        """The weights of the patterns in a step."""


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

    def empty(self, zero: Comparison, with_pull: bool) -> "Sums":
        """The sums over no pattern, in the shapes of a comparison with one."""
        nothing, lowest = zero.divergence, jnp.full_like(zero.divergence, jnp.inf)
        details = (zero.inliers, zero.pose) if with_pull else ()
        nearest = Nearest(jnp.zeros((), jnp.int32), nothing, *details)
        pull = zero.pull if with_pull else None
        return Sums(lowest, lowest, nearest, nothing, nothing, nothing, pull, nothing)

    def accumulate(self, sums: "Sums", found: Comparison, block: Block, beta: Array) -> "Sums":
        """The sums with some more patterns, relative to the lowest of all so far (online
        softmax)."""
        shifted = with_prior(found.divergence, block.log_prior, beta)
        # Energy and average do not depend on the reference, only their rounding does.
        fixed = jax.lax.stop_gradient(shifted)
        low = fixed.min()
        lowest = jnp.minimum(sums.lowest, low)
        reference = jnp.where(lowest == jnp.inf, 0, lowest)  # a block may be switched off whole
        masses = mass(shifted - reference, beta)
        decay = mass(sums.lowest - reference, beta)
        pulls = None if sums.pull is None else found.pull
        row = _first(fixed == low)
        prior = jnp.ones_like(masses) if block.prior is None else block.prior
        least, deficit = _deficits(
            sums, jnp.where(prior > 0, found.divergence, jnp.inf), prior, beta
        )
        details = () if sums.pull is None else (found.inliers, found.pose)
        rows = Nearest(block.indices, found.divergence, *details)
        return Sums(
            lowest=lowest,
            least=least,
            nearest=jax.tree.map(
                lambda new, old: jnp.where(low < sums.lowest, new[row], old), rows, sums.nearest
            ),
            mass=decay * sums.mass + masses.sum(),
            prior=sums.prior + prior.sum(),
            deficit=deficit,
            pull=jax.tree.map(
                lambda total, pull: decay * total + jnp.tensordot(masses, pull, 1),
                sums.pull,
                pulls,
            ),
            unsolved=decay * sums.unsolved + unsolved_mass(found, masses),
        )

    def merge(self, part: "Sums", beta: Array, layout: Layout | None) -> "Sums":
        """The sums over all parts of a memory that is spread over devices."""
        if layout is None:
            return part
        lowest = pmin(part.lowest, layout)
        decay = mass(part.lowest - jnp.where(lowest == jnp.inf, 0, lowest), beta)
        last = jnp.iinfo(jnp.int32).max
        pattern = pmin(jnp.where(part.lowest == lowest, part.nearest.pattern, last), layout)
        nearest = of_one_part(part.nearest, part.nearest.pattern == pattern, layout)
        mass_, pull, unsolved = psum(
            jax.tree.map(lambda leaf: decay * leaf, (part.mass, part.pull, part.unsolved)), layout
        )
        least = pmin(part.least, layout)
        deficit = _raised(part.deficit, part.prior, part.least, least, beta)
        prior, deficit = psum((part.prior, deficit), layout)
        return Sums(lowest, least, nearest, mass_, prior, deficit, pull, unsolved)

    def finish(
        self, sums: "Sums", total: tuple[Array, Array], beta: Array, view: AnyView, guess: Any
    ) -> Evaluation:
        """The evaluation of these sums, `total` being log max πᵢ and Σ πᵢ in units of it, of all
        patterns: also of those that were left out because their mass is nothing."""
        log_top, prior = total
        log_mass = jnp.log(sums.mass)
        energy = sums.lowest - log_mass / beta
        share = (sums.deficit - (prior - sums.prior)) / prior
        close = share > -0.5
        digits = sums.least - jnp.log1p(jnp.where(close, share, 0)) / beta
        offset = (log_top + jnp.log(prior)) / beta
        return Evaluation(
            view=view,
            energy=energy,
            relative=jnp.where(close, digits, energy + offset),
            pull=jax.tree.map(lambda total: total / sums.mass, sums.pull),
            nearest=sums.nearest,
            weight=1 / sums.mass,
            unsolved=jax.lax.stop_gradient(sums.unsolved / sums.mass),
            neglected=jnp.zeros_like(beta),
            guess=guess,
        )


class Sums(NamedTuple):
    """Σ exp(−β(D̃ᵢ − lowest)), D̃ᵢ = Dᵢ − β⁻¹ log πᵢ, alone and times other things."""

    lowest: Float[Array, ""]  # D̃ so far
    least: Float[Array, ""]  # D so far
    nearest: Nearest  # where it is
    mass: Float[Array, ""]
    prior: Float[Array, ""]  # Σ πᵢ
    deficit: Float[Array, ""]  # Σ πᵢ (exp(−β(Dᵢ − least)) − 1): the digits of the mass as β → 0
    pull: AnyMeasure  # times pulls
    unsolved: Float[Array, ""]  # over comparisons that missed their tolerance


def _deficits(
    sums: Sums, divergences: Float[Array, " B"], prior: Float[Array, " B"], beta: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The least D, and Σ πᵢ expm1(−β(Dᵢ − least)), with some more patterns."""
    least = jnp.minimum(sums.least, jax.lax.stop_gradient(divergences).min())
    new = prior * jnp.expm1(_logits(divergences - jnp.where(least == jnp.inf, 0, least), beta))
    return least, _raised(sums.deficit, sums.prior, sums.least, least, beta) + new.sum()


def _raised(deficit: Array, prior: Array, old: Array, least: Array, beta: Array) -> Array:
    """Σ πᵢ expm1(−β(Dᵢ − least)) from that with another least D."""
    step = _logits(old - jnp.where(least == jnp.inf, 0, least), beta)
    return jnp.exp(step) * deficit + prior * jnp.expm1(step)


@dataclass(frozen=True)
class Entmax(Separation):
    """w = entmax_α(log π − βD): weights that vanish beyond a finite margin.

    With Tsallis' entropy H_α(p) = Σ (pᵢ − pᵢ^α)/(α(α−1)),

        E = −β⁻¹ max over p in the simplex of ⟨p, log π − βD⟩ + H_α(p),

    attained at p = w = [(α−1)(log π − βD) − τ]₊^(1/(α−1)) with τ such that Σ wᵢ = 1
    (Peters, Niculae and Martins, arXiv:1905.05702; Hopfield–Fenchel–Young, arXiv:2411.08590).
    α = 2 is sparsemax; α → 1 is `LogSumExp`. Where D of one pattern is less than that of all
    others by 1/((α−1)β) or more, it has weight 1, and one step recalls it exactly.

    **Raises:** `ValueError` unless α > 1 is finite.
    """

    alpha: float = 1.5

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, int | float) or isinstance(self.alpha, bool):
            raise TypeError(f"alpha must be a number; got {self.alpha!r}")
        if not 1 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be finite and > 1; got {self.alpha}")

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
    """E = −β⁻¹ log Σ πᵢ [1 − βDᵢ/2]₊: patterns beyond D = 2/β have no influence at all.

    The log-sum-ReLU energy of Hoover et al. (arXiv:2506.10801). A step weighs the patterns
    within reach by their prior alone, wᵢ ∝ πᵢ for Dᵢ < 2/β. Where none is within reach the energy
    is infinite and all weights are 0; a step then stays where it is, and a recall has
    `Status.OUT_OF_REACH`.
    """

    def energy(self, divergences: Array, log_prior: Array | None, beta: Array) -> Array:
        prior, top = _prior(divergences, log_prior)
        total = jnp.vdot(prior, jnp.maximum(1 - beta * divergences / 2, 0))
        none = total == 0
        energy = -(top + jnp.log(jnp.where(none, 1, total))) / beta
        return jnp.where(none, jnp.inf, energy)

    def weights(self, divergences: Array, log_prior: Array | None, beta: Array) -> Array:
        prior, _ = _prior(divergences, log_prior)
        prior = jnp.where(beta * divergences < 2, prior, 0)
        total = prior.sum()
        return prior / jnp.where(total == 0, 1, total)


def unsolved_mass(found: Comparison, masses: Float[Array, " B"]) -> Float[Array, ""]:
    """The mass of comparisons that missed their tolerance."""
    if found.not_converged is None:
        return jnp.zeros((), masses.dtype)
    return jnp.where(found.not_converged, masses, 0).sum()


def _first(marks: Array) -> Int[Array, ""]:
    """Index of the first true entry: an `argmax` that XLA vectorises."""
    size = marks.shape[0]
    return jnp.where(marks, jnp.arange(size, dtype=jnp.int32), size - 1).min()


def heaviest(
    weights: Float[Array, " N"],
    divergences: Float[Array, " N"],
    log_prior: Float[Array, " N"] | None,
) -> Int[Array, ""]:
    """The pattern of most weight, of several the nearest."""
    on = True if log_prior is None else log_prior != -jnp.inf
    candidates = jnp.where((weights == weights.max()) & on, divergences, jnp.inf)
    return candidates.argmin().astype(jnp.int32)


def with_prior(divergences: Array, log_prior: Array | None, beta: Array) -> Float[Array, " B"]:
    """D̃ᵢ = Dᵢ − β⁻¹ log πᵢ, infinite where a pattern is switched off. Subtracted from each other
    before β multiplies them, so that the lowest has mass 1 exactly however large βD is."""
    if log_prior is None:
        return divergences
    on = log_prior != -jnp.inf  # NaN is not off
    return jnp.where(on, divergences - jnp.where(on, log_prior, 0) / beta, jnp.inf)


def _logits(shifted: Array, beta: Array) -> Array:
    """−βD̃, with derivative 0 where D̃ is infinite."""
    infinite = shifted == jnp.inf
    return jnp.where(infinite, -jnp.inf, -beta * jnp.where(infinite, 0, shifted))


def mass(shifted: Array, beta: Array) -> Array:
    """exp(−βD̃), with derivative 0 where D̃ is infinite."""
    return jnp.exp(_logits(shifted, beta))


def _prior(divergences: Array, log_prior: Array | None) -> tuple[Array, Array]:
    """π/max π, and log max π."""
    if log_prior is None:
        return jnp.ones_like(divergences), jnp.zeros((), divergences.dtype)
    top = jax.lax.stop_gradient(log_prior.max())
    on = log_prior != -jnp.inf
    return jnp.where(on, jnp.exp(jnp.where(on, log_prior, 0) - top), 0), top


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _entmax(alpha: float, logits: Float[Array, " N"]) -> Float[Array, " N"]:
    """The weights that attain `_conjugate`, by bisection of their threshold τ."""
    power = alpha - 1
    scaled = power * (logits - logits.max())
    rounds = jnp.finfo(scaled.dtype).nmant + 3

    def unnormalised(threshold: Array) -> Array:
        return jnp.maximum(scaled - threshold, 0) ** (1 / power)

    def halve(bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = (low + high) / 2
        above = unnormalised(middle).sum() >= 1
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    # One weight alone is 1 at τ = −1, and all of them at most 1/N at the other end.
    ends = jnp.array(-1, scaled.dtype), jnp.array(-(scaled.size**-power), scaled.dtype)
    weights = unnormalised(repeat(rounds, halve, ends, scaled)[0])
    return weights / weights.sum()


@_entmax.defjvp
@full_precision
def _entmax_jvp(
    alpha: float, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    weights = _entmax(alpha, *primals)
    on = weights > 0
    slopes = jnp.where(on, jnp.where(on, weights, 1) ** (2 - alpha), 0)
    mean = jnp.vdot(slopes, *tangents) / slopes.sum()
    return weights, slopes * (tangents[0] - mean)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _conjugate(alpha: float, logits: Float[Array, " N"]) -> Float[Array, ""]:
    """max over p of ⟨p, z⟩ + H_α(p)."""
    weights = _entmax(alpha, logits)
    product = jnp.vdot(weights, jnp.where(weights > 0, logits, 0))
    return product + jnp.sum(weights - weights**alpha) / (alpha * (alpha - 1))


@_conjugate.defjvp
@full_precision
def _conjugate_jvp(
    alpha: float, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    return _conjugate(alpha, *primals), jnp.vdot(_entmax(alpha, *primals), *tangents)


def check(separation: object) -> Separation:
    """The argument `separation`, which must be one."""
    if not isinstance(separation, Separation):
        raise TypeError(f"separation must be one of jdam's, as jdam.LogSumExp(); got {separation}")
    return separation
