"""What is known of point clouds before they are compared, and what a step needs of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam._core import checks
from jdam._core.compile import compiled
from jdam._core.linalg import safe_log, safe_sqrt
from jdam._entropic.cost import Cost, HalfSquaredDistance
from jdam._entropic.problem import FREE, Marginals, SelfTransport
from jdam._measures.base import AnyMeasure
from jdam._measures.point_cloud import PointCloud, unchecked
from jdam.geometry.protocol import Geometry, check_batch_ndim

#: In units of √ε, how far out padding may count where it lies.
FARTHEST = 100.0
#: For a typical cost, of how many atoms of a cloud and pairs of all to take the median.
MOST_ATOMS, MOST_PAIRS = 512, 2**22
#: Of ε, what is added to the price of features: nothing to see, but the derivative of √λ at λ = 0.
LEAST = 1e-24
#: By what factors a step is shortened whose reweighting would not be linear.
SHORTENING = 2.0


class Prepared(NamedTuple):
    """What is constant about patterns, lifted: a centre each, and the coupling with itself."""

    centre: Float[Array, "N z"]
    offset: Float[Array, "N z"]  # of the mean from it: rounding
    known: SelfTransport
    radius: Float[Array, " N"] | None = None  # of a ball about the centre, where ρ is given


class Solved(NamedTuple):
    """Potentials of patterns that are known to be the solution."""

    g: Float[Array, "N m"]


class View(NamedTuple):
    """A query, and of it lifted its centre, its atoms about that, and its coupling with itself."""

    query: PointCloud
    centre: Float[Array, " z"]
    centred: Float[Array, "n z"]
    known: SelfTransport
    force: Float[Array, "n d"]  # xⱼ − T₀(xⱼ), times the share of xⱼ that finds a partner


class Pull(NamedTuple):
    """What a pattern asks of each atom: a velocity, and to weigh less by its first variation."""

    velocity: Float[Array, "n d"]  # −∇F(xⱼ), which is Tᵢ(xⱼ) − T₀(xⱼ)
    variation: Float[Array, " n"]  # F(xⱼ), which is fᵢ(xⱼ) − h(xⱼ), up to a constant


class Tangent(NamedTuple):
    """How a cloud changes: where its atoms move, and what is added to the logarithms of weights, in
    units of √κ."""

    points: Float[Array, "n d"]
    reaction: Float[Array, " n"]


def check_cloud(geometry: Geometry, name: str, measure: AnyMeasure, batch_ndim: int) -> PointCloud:
    """`Geometry.check` of a geometry of point clouds."""
    if not isinstance(measure, PointCloud):
        raise TypeError(
            f"{name} must be a jdam.PointCloud for {geometry}; got {type(measure).__name__}"
        )
    check_batch_ndim(name, measure, batch_ndim)
    return measure


def checked_parameters(
    epsilon: ArrayLike, rho: ArrayLike | None, hellinger_scale: ArrayLike, feature_scale: ArrayLike
) -> tuple[Array, Array | None, Array, Array]:
    """ε > 0, ρ > 0 or None, κ ≥ 0 and λ ≥ 0 as scalars."""
    dtype, least = checks.scalar_dtype, checks.nonnegative_scalar
    return (
        checks.positive("epsilon", epsilon, dtype(epsilon)),
        None if rho is None else checks.positive("rho", rho, dtype(rho)),
        least("hellinger_scale", hellinger_scale, dtype(hellinger_scale)),
        least("feature_scale", feature_scale, dtype(feature_scale)),
    )


def shown_parameters(geometry: Any) -> list[str]:
    """ε, ρ, κ and λ for a repr, without those that are usual."""

    def shown(value: Array) -> str:
        return f"{float(value):.4g}" if checks.is_concrete(value) and value.ndim == 0 else "…"

    settings = [f"epsilon={shown(geometry.epsilon)}"]
    settings += [f"rho={shown(geometry.rho)}"] if geometry.rho is not None else []
    settings += [f"hellinger_scale={shown(geometry.hellinger_scale)}"]
    scale = shown(geometry.feature_scale)
    return settings + ([f"feature_scale={scale}"] if scale != "1" else [])


def lifted(cloud: PointCloud, scale: Float[Array, ""], epsilon: Float[Array, ""]) -> PointCloud:
    """The cloud of zⱼ = (xⱼ, √λ uⱼ), u being its features: the cost ½|x−y|² + ½λ|u−v|² of atoms is
    ½|z−z'|². A cloud without features is its own."""
    if cloud.features is None:
        return cloud
    root = jnp.sqrt(scale + LEAST * jax.lax.stop_gradient(epsilon))
    return unchecked(jnp.concatenate([cloud.points, root * cloud.features], -1), cloud.weights)


def typical_cost(clouds: PointCloud, cost: Cost) -> Float[Array, ""]:
    """The median of c(x, y) over pairs of different atoms of one cloud, with mass aⱼaₖ, every cloud
    counted once; of large batches over some clouds and atoms, evenly spread."""
    step = -(-clouds.num_atoms // MOST_ATOMS)
    points, weights = clouds.points[:, ::step], clouds.weights[:, ::step]
    pairs = points.shape[1] ** 2
    skip = -(-len(points) * pairs // MOST_PAIRS)
    points, weights = points[::skip], weights[::skip]
    costs = jax.vmap(cost.matrix)(points, points)
    apart = ~jnp.eye(points.shape[1], dtype=bool)[None]
    masses = jnp.where(apart, weights[:, :, None] * weights[:, None], 0)
    total = masses.sum((1, 2), keepdims=True)
    masses = (masses / jnp.where(total > 0, total, 1)).reshape(-1)
    costs = jnp.where(masses > 0, costs.reshape(-1), 0)
    order = jnp.argsort(costs)
    below = jnp.cumsum(masses[order])
    half = below[-1] / 2
    # Where half of the mass is below a gap between two costs, the middle of it, as of equal masses.
    eps = float(jnp.finfo(half.dtype).eps) ** 0.75
    first = jnp.searchsorted(below, half * (1 - eps))
    last = jnp.searchsorted(below, half * (1 + eps))
    return (costs[order[first]] + costs[order[last]]) / 2


@compiled(static=("cost",), rounded=False)
def unit_of(patterns: PointCloud, *, cost: Cost | None = None) -> Float[Array, ""]:
    """`typical_cost` of clouds with any batch axes; ½|x−y|² if None."""
    batch = len(patterns.batch_shape)
    clouds = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[batch:]), patterns)
    return typical_cost(clouds, cost or HalfSquaredDistance())


def radius_of(centred: Float[Array, "N n d"], weights: Float[Array, "N n"]) -> Float[Array, " N"]:
    """Of balls about 0 that hold all atoms with mass."""
    squares = jnp.where(weights > 0, jnp.vecdot(centred, centred), 0)
    return safe_sqrt(squares.max(1))


def without_padding(points: Float[Array, "N n d"], weights: Float[Array, "N n"]) -> Array:
    """The points, 0 where a weight is 0: the square of a distance to padding may be infinite."""
    return jnp.where(weights[..., None] > 0, points, 0)


def about(
    centre: Float[Array, "*batch d"], cloud: PointCloud, epsilon: Float[Array, ""]
) -> Float[Array, "*batch n d"]:
    """Atoms about a centre. Padding that lies far outside, where its costs would be out of
    range or would leave no digits, counts as a nearer atom in the same direction."""
    centred = cloud.points - centre[..., None, :]
    largest = jnp.abs(centred).max(-1, keepdims=True)
    held = jnp.where(cloud.weights[..., None] > 0, largest, 0).max(-2, keepdims=True)
    reach = 3 * held + FARTHEST * jnp.sqrt(epsilon)
    far = (cloud.weights[..., None] == 0) & ~(largest <= reach)
    nearer = centred * (reach / jnp.where(far, largest, 1))
    return jnp.where(far, jax.lax.stop_gradient(nearer), centred)


def place(
    marginals: Marginals,
    view: View,
    centres: Float[Array, "B d"],
    centred: Float[Array, "B m d"],
    weights: Float[Array, "B m"],
) -> tuple[Float[Array, "B d"], Float[Array, " B"], Float[Array, "B m d"]]:
    """Where to compare clouds with the query: about their own centres, the shift between which
    and its cost are added to the result; or, where marginals are relaxed, where they are."""
    shift = view.centre[None] - centres
    if marginals.rho is not None:
        return jnp.zeros_like(shift), jnp.zeros_like(shift[:, 0]), centred - shift[:, None]
    # ½|x−y|² = ½|x̂−ŷ|² + ⟨Δ, x̂−ŷ⟩ + ½|Δ|² with x = c + x̂ and Δ = c_q − c_X: exact for any
    # centres, and without the digits that large coordinates lose.
    offset = view.query.weights @ view.centred
    offsets = jnp.vecmat(weights, centred)
    return shift, jnp.vecdot(shift, shift / 2 + offset[None] - offsets), centred


def rounding_of(
    view: View, centred: Float[Array, "N n d"], weights: Float[Array, "N n"], marginals: Marginals
) -> Float[Array, " N"]:
    """What of S_ε rounding may change, of clouds so large that it blurs plans more than ε
    does: 0 of others."""
    sizes = jnp.where(weights > 0, jnp.vecdot(centred, centred), 0).max(-1)
    size = jnp.where(view.query.weights > 0, jnp.vecdot(view.centred, view.centred), 0).max()
    sizes = size + sizes
    if marginals.rho is not None:
        sizes = jnp.minimum(sizes, FREE * marginals.rho)
    error = float(jnp.finfo(sizes.dtype).eps) * sizes
    return jax.lax.stop_gradient(jnp.where(error > marginals.epsilon, error, 0))


def shortening(
    weights: Float[Array, " n"], variation: Float[Array, " n"], rate: Float[Array, ""]
) -> Float[Array, ""]:
    """By how much to shorten a step whose reweighting, at a rate s = τκ, would not be linear.

    Reweighting by exp(−s(F−F̄))/Z promises log Z/s of energy, which for small s
    is s/2 Var F. Where it is less than half of that, as for far stray atoms, mass goes in
    a shorter time than the step's, in which the support has hardly moved: the whole step
    is shortened to that time.
    """
    factors = SHORTENING ** -jnp.arange(16, dtype=rate.dtype)
    rates = rate * factors
    # sF is a number; F and s alone have units, in which their squares may be out of range.
    tilts = rates[:, None] * (variation - jnp.vdot(weights, variation))[None]
    gains = jax.nn.logsumexp(safe_log(weights)[None] - tilts, axis=1)
    linear = gains >= jnp.square(tilts) @ weights / 4
    return factors[jnp.argmax(linear)]
