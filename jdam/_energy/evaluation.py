"""Result of one evaluation of the energy, and the blocks of patterns."""

from typing import NamedTuple

from jax import Array
from jaxtyping import Float, Int, PyTree

from jdam._measures.base import AnyMeasure
from jdam.geometry.protocol import AnyView, Patterns


class Nearest(NamedTuple):
    """The pattern of largest weight."""

    pattern: Int[Array, ""]  # index in the memory
    divergence: Float[Array, ""]
    inliers: Float[Array, " n"] | None = None
    pose: PyTree = None


class Evaluation(NamedTuple):
    """The energy at a query and the average of the pulls, with the weights w of the separation."""

    view: AnyView  # of the query, an argument of `Geometry.move`
    energy: Float[Array, ""]  # E(ξ)
    # `LogSumExp`: E(ξ) + β⁻¹ log Σ πᵢ, finite and accurate as β → 0; other separations: E(ξ).
    shifted_energy: Float[Array, ""]
    pull: AnyMeasure  # Σ wᵢ·pullᵢ; None if `Settings.with_pull` is False
    nearest: Nearest
    weight: Float[Array, ""]  # of `nearest`
    unsolved: Float[Array, ""]  # weight of the patterns whose comparison missed its tolerance
    neglected: Float[Array, ""]  # bound on the Gibbs mass of patterns that were not compared
    guess: PyTree  # warm start of the next evaluation


class Block(NamedTuple):
    """Patterns and the arrays that belong to them; leaves lead with (B,)."""

    indices: Int[Array, " B"]  # in the memory
    patterns: Patterns
    log_prior: Float[Array, " B"] | None
    weights: Float[Array, " B"] | None = None  # in the second pass over the patterns
