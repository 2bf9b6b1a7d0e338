"""Vectors: classical modern Hopfield memories, by distance and by inner product."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam import _checks
from jdam._batching import compute_if
from jdam.geometry.protocol import Geometry
from jdam.measures import Measure

#: Queries and patterns to compare at once: large enough for matrix products to be efficient.
VECTOR_TILE = 512, 2048


class Vectors(Geometry):
    """What `Euclidean` and `DotProduct` share: measures are arrays (d,), pulls the patterns."""

    def check(self, name, measure, batch_ndim):
        if isinstance(measure, Measure):
            raise TypeError(f"{name} must be an array for {self}; got {type(measure).__name__}")
        array = _checks.float_array(name, measure)
        if array.ndim != batch_ndim + 1 or array.shape[-1] == 0:
            wanted = "(N, d)" if batch_ndim else "(d,)"
            raise ValueError(f"{name} must have shape {wanted}, d ≥ 1; got {array.shape}")
        return array

    def tile(self, patterns):
        return VECTOR_TILE


class Euclidean(Vectors):
    """D(x, y) = |x − y|² on vectors: the distance-softmax Hopfield memory.

    Its step is x⁺ = x + τ(Σ wᵢyᵢ − x) with wᵢ ∝ exp(−β|x − yᵢ|²). On patterns of equal norm
    it is `DotProduct` with 2β.
    """

    def compare(self, view, patterns, beta):
        return fast_squared_distances(view, patterns, beta), patterns

    def divergence(self, view, patterns):
        return squared_distances(view, patterns)


class DotProduct(Vectors):
    """D(x, y) = ½|x|² − ⟨x, y⟩ on vectors: the modern Hopfield network of Ramsauer et al.

    The energy is theirs up to a constant, ½|x|² − β⁻¹ log Σᵢ exp(β⟨x, yᵢ⟩) (eq. 3 of
    arXiv:2008.02217), and the full step is attention, x⁺ = Σ softmaxᵢ(β⟨x, yᵢ⟩) yᵢ. D is no
    divergence: it may be negative, and a pattern need not be its own nearest.
    """

    def compare(self, view, patterns, beta):
        return self.divergence(view, patterns), patterns

    def divergence(self, view, patterns):
        return jnp.vdot(view, view) / 2 - jnp.vecmat(view, patterns.mT)


def squared_distances(x: Float[Array, " d"], ys: Float[Array, "B d"]) -> Float[Array, " B"]:
    """|x − yᵢ|² from differences: relative accuracy even for near-coincident points."""
    difference = x[None] - ys
    return jnp.vecdot(difference, difference)


def fast_squared_distances(
    x: Float[Array, " d"], ys: Float[Array, "B d"], beta: Float[Array, ""]
) -> Float[Array, " B"]:
    """|x − yᵢ|², where that is accurate enough by one matrix product over a batch of queries.

    About the centre c of the block, |x−c|² + |yᵢ−c|² − 2⟨x−c, yᵢ−c⟩ costs a fifth of the
    differences when many queries are vmapped, but errs by some eps·(|x−c|² + |yᵢ−c|²). Where
    that could change a logit β|x−yᵢ|² by more than 1 %, differences are taken after all; and
    always in float64, which is chosen for its digits.
    """
    if jnp.finfo(x.dtype).bits >= 64:
        return squared_distances(x, ys)
    centre = jax.lax.stop_gradient(ys.mean(0))
    shifted, centred = x - centre, ys - centre[None]
    size, sizes = jnp.vdot(shifted, shifted), jnp.vecdot(centred, centred)
    ones = jnp.ones_like(sizes)[:, None]
    left = jnp.concatenate([-2 * shifted, jnp.stack([size, ones[0, 0]])])
    right = jnp.concatenate([centred, ones, sizes[:, None]], axis=1)
    # In this order the product, vmapped over x, is (queries, patterns) and row-major.
    product = jnp.maximum(jnp.vecmat(left, right.mT), 0)
    error = 4 * float(jnp.finfo(x.dtype).eps) * (size + sizes.max())
    return compute_if(beta * error > 0.01, squared_distances, product, (x, ys))
