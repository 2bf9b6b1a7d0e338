"""The result of one evaluation of the energy, and the blocks of patterns it is summed over."""

from typing import Any, NamedTuple

from jax import Array
from jaxtyping import Float, Int

from jdam._measures.base import AnyMeasure
from jdam.geometry.protocol import AnyView, Patterns


class Nearest(NamedTuple):
    """The heaviest pattern."""

    pattern: Int[Array, ""]  # its index
    divergence: Float[Array, ""]
    inliers: Float[Array, " n"] | None = None
    pose: Any = None


class Evaluation(NamedTuple):
    """The energy at a query and the average of the pulls; w are the weights of the separation."""

    view: AnyView  # of the query, as `Geometry.move` wants it
    energy: Float[Array, ""]  # E(ξ)
    relative: Float[Array, ""]  # E(ξ) + β⁻¹ log Σ πᵢ, which keeps its digits as β → 0
    pull: AnyMeasure  # Σ wᵢ·pullᵢ, None if not asked for
    nearest: Nearest
    weight: Float[Array, ""]  # its weight
    unsolved: Float[Array, ""]  # weight of the patterns whose comparison missed its tolerance
    neglected: Float[Array, ""]  # bound on the Gibbs mass of the patterns that were left out
    guess: Any  # to start the next evaluation from


class Block(NamedTuple):
    """Some patterns, and all that goes with them; leaves lead with (B,)."""

    indices: Int[Array, " B"]  # in the memory
    patterns: Patterns
    log_prior: Float[Array, " B"] | None
    prior: Float[Array, " B"] | None  # relative to that of most weight
    weights: Float[Array, " B"] | None = None  # where they are known before the pulls
