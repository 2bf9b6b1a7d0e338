"""Preparation of point clouds for comparison, shared by geometries of clouds, and lower bounds.

Clouds are centred, their transport to themselves is computed once, and features become
coordinates.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, PyTree

from jdam._core import checks
from jdam._core.batching import map_in_batches
from jdam._core.compile import compiled
from jdam._core.linalg import rounding, safe_log, safe_sqrt
from jdam._entropic.bounds import cost_of_masses
from jdam._entropic.cost import Cost, HalfSquaredDistance
from jdam._entropic.problem import FREE, Marginals, Pair, SinkhornOutput
from jdam._measures.base import AnyMeasure
from jdam._measures.point_cloud import PointCloud, unchecked
from jdam.geometry.protocol import Geometry, Patterns, check_batch_ndim

#: The distance, in units of √ε, up to which padding keeps its position.
MAX_PADDING_DISTANCE = 100.0
#: The largest numbers of atoms of a cloud, and of pairs in all, whose median is the typical cost.
MOST_ATOMS, MOST_PAIRS = 512, 2**22
#: The fraction of ε added to λ, negligible except for the derivative of √λ at λ = 0.
MIN_FEATURE_SCALE = 1e-24
#: The ratio of successive step sizes tried by `shortening`.
SHORTENING = 2.0


class Prepared(NamedTuple):
    """Constants of lifted patterns: their centres and self transports."""

    centre: Float[Array, "N z"]
    offset: Float[Array, "N z"]  # of the mean from the centre, a rounding error
    self_transport: SinkhornOutput
    radius: Float[Array, " N"] | None = None  # of a ball about the centre; None without ρ


class View(NamedTuple):
    """A query, and of the lifted query its centre, its centred atoms and its self transport."""

    query: PointCloud
    centre: Float[Array, " z"]
    centred: Float[Array, "n z"]
    self_transport: SinkhornOutput
    force: Float[Array, "n d"]  # xⱼ − T₀(xⱼ), times the transported fraction of xⱼ


class Pull(NamedTuple):
    """The contribution of a pattern to the step: velocities of atoms, and first variations."""

    velocity: Float[Array, "n d"]  # −∇F(xⱼ), which is Tᵢ(xⱼ) − T₀(xⱼ)
    variation: Float[Array, " n"]  # F(xⱼ), which is fᵢ(xⱼ) − h(xⱼ), up to a constant


def check_cloud(geometry: Geometry, name: str, measure: AnyMeasure, batch_ndim: int) -> PointCloud:
    """Implement `Geometry.check` for a geometry of point clouds."""
    if not isinstance(measure, PointCloud):
        raise TypeError(
            f"{name} must be a jdam.PointCloud for {geometry}; got {type(measure).__name__}: "
            "jdam.PointCloud(points) makes one"
        )
    check_batch_ndim(name, measure, batch_ndim)
    return measure


def checked_parameters(
    epsilon: ArrayLike, rho: ArrayLike | None, hellinger_scale: ArrayLike, feature_scale: ArrayLike
) -> tuple[Array, Array | None, Array, Array]:
    """Return ε > 0, ρ > 0 or None, κ ≥ 0 and λ ≥ 0 as scalars, or raise."""
    dtype, positive = checks.scalar_dtype, checks.positive
    return (
        positive("epsilon", epsilon, dtype(epsilon)),
        None if rho is None else positive("rho", rho, dtype(rho)),
        positive("hellinger_scale", hellinger_scale, dtype(hellinger_scale), or_zero=True),
        positive("feature_scale", feature_scale, dtype(feature_scale), or_zero=True),
    )


def shown_parameters(geometry: PyTree) -> list[str]:
    """Return ε, ρ, κ and λ for a repr, omitting ρ = None and λ = 1."""

    def shown(value: Array) -> str:
        return f"{float(value):.4g}" if checks.is_concrete(value) and value.ndim == 0 else "…"

    settings = [f"epsilon={shown(geometry.epsilon)}"]
    settings += [f"rho={shown(geometry.rho)}"] if geometry.rho is not None else []
    settings += [f"hellinger_scale={shown(geometry.hellinger_scale)}"]
    scale = shown(geometry.feature_scale)
    return settings + ([f"feature_scale={scale}"] if scale != "1" else [])


def lifted(geometry: PyTree, cloud: PointCloud) -> PointCloud:
    """Return the cloud of zⱼ = (xⱼ, √λ uⱼ), where u are the features and λ is the feature scale of
    the geometry.

    The cost ½|x−y|² + ½λ|u−v|² of atoms is then ½|z−z'|². A cloud without features is returned as
    it is."""
    if cloud.features is None:
        return cloud
    least = MIN_FEATURE_SCALE * jax.lax.stop_gradient(geometry.epsilon)
    root = jnp.sqrt(geometry.feature_scale + least)
    return unchecked(jnp.concatenate([cloud.points, root * cloud.features], -1), cloud.weights)


def typical_cost(clouds: PointCloud, cost: Cost) -> Float[Array, ""]:
    """Compute the median of c(x, y) over pairs of different atoms of one cloud, weighted by aⱼaₖ.

    Every cloud has the same total weight. Large batches are subsampled evenly."""
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
    # If half of the mass lies below a gap between two costs, the median is the middle of the gap.
    eps = float(jnp.finfo(half.dtype).eps) ** 0.75
    first = jnp.searchsorted(below, half * (1 - eps))
    last = jnp.searchsorted(below, half * (1 + eps))
    return (costs[order[first]] + costs[order[last]]) / 2


@compiled(static=("cost",), rounded=False)
def unit_of(patterns: PointCloud, *, cost: Cost | None = None) -> Float[Array, ""]:
    """Compute `typical_cost` of clouds with any batch axes, for ½|x−y|² if `cost` is None."""
    batch = len(patterns.batch_shape)
    clouds = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[batch:]), patterns)
    return typical_cost(clouds, cost or HalfSquaredDistance())


def radius_of(centred: Float[Array, "N n d"], weights: Float[Array, "N n"]) -> Float[Array, " N"]:
    """Return the radii of balls about 0 that contain all atoms of positive weight."""
    squares = jnp.where(weights > 0, jnp.vecdot(centred, centred), 0)
    return safe_sqrt(squares.max(1))


def zero_padding(points: Float[Array, "*batch n d"], weights: Float[Array, "*batch n"]) -> Array:
    """Return the points with 0 for atoms of weight 0, since squared distances to padding may be
    infinite."""
    return jnp.where(weights[..., None] > 0, points, 0)


def relative_to(
    centre: Float[Array, "*batch d"], cloud: PointCloud, epsilon: Float[Array, ""]
) -> Float[Array, "*batch n d"]:
    """Return the atoms relative to a centre.

    Padding far outside, whose costs would overflow or lose all digits, is moved nearer in the same
    direction."""
    centred = cloud.points - centre[..., None, :]
    largest = jnp.abs(centred).max(-1, keepdims=True)
    extent = jnp.where(cloud.weights[..., None] > 0, largest, 0).max(-2, keepdims=True)
    reach = 3 * extent + MAX_PADDING_DISTANCE * jnp.sqrt(epsilon)
    far = (cloud.weights[..., None] == 0) & ~(largest <= reach)
    nearer = centred * (reach / jnp.where(far, largest, 1))
    return jnp.where(far, jax.lax.stop_gradient(nearer), centred)


def relative_coordinates(
    marginals: Marginals,
    view: View,
    centres: Float[Array, "B d"],
    centred: Float[Array, "B m d"],
    weights: Float[Array, "B m"],
) -> tuple[Float[Array, "B d"], Float[Array, " B"], Float[Array, "B m d"]]:
    """Return the shift between the centres, its contribution to the cost, and the atoms to compare
    with the query's centred ones.

    For exact marginals, clouds are compared about their own centres. For relaxed marginals, they
    are compared where they are, and shift and contribution are 0."""
    shift = view.centre[None] - centres
    if marginals.rho is not None:
        return jnp.zeros_like(shift), jnp.zeros_like(shift[:, 0]), centred - shift[:, None]
    # ½|x−y|² = ½|x̂−ŷ|² + ⟨Δ, x̂−ŷ⟩ + ½|Δ|² with x = c + x̂ and Δ = c_q − c_X is exact for any
    # centres, and avoids the cancellation of large coordinates.
    offset = view.query.weights @ view.centred
    offsets = jnp.vecmat(weights, centred)
    return shift, jnp.vecdot(shift, shift / 2 + offset[None] - offsets), centred


def rounding_of(
    view: View, centred: Float[Array, "N n d"], weights: Float[Array, "N n"], marginals: Marginals
) -> Float[Array, " N"]:
    """Return the rounding error of S_ε for clouds so large that rounding blurs plans more than ε
    does, and 0 for others."""
    sizes = jnp.where(weights > 0, jnp.vecdot(centred, centred), 0).max(-1)
    size = jnp.where(view.query.weights > 0, jnp.vecdot(view.centred, view.centred), 0).max()
    sizes = size + sizes
    if marginals.rho is not None:
        sizes = jnp.minimum(sizes, FREE * marginals.rho)
    error = float(jnp.finfo(sizes.dtype).eps) * sizes
    return jax.lax.stop_gradient(jnp.where(error > marginals.epsilon, error, 0))


def masses_of(query: PointCloud, p: Float[Array, " n"], kappa: Float[Array, ""]) -> PointCloud:
    """Return the masses of the SHK metric for atoms of masses p: pⱼ for points, pⱼ/κ for logarithms
    of weights, and 0 for features, which do not change."""
    reaction = jnp.where(kappa > 0, p / jnp.where(kappa > 0, kappa, 1), 0)
    zeros: PointCloud = jax.tree.map(jnp.zeros_like, query)
    return zeros.with_atoms(jnp.broadcast_to(p[:, None], query.points.shape), reaction)


def metric_length(
    weights: Float[Array, " n"],
    velocity: Float[Array, "n d"],
    variation: Float[Array, " n"],
    kappa: Float[Array, ""],
) -> Float[Array, ""]:
    """Compute the length √(Σ pⱼ|vⱼ|² + κ Var_p F) in the SHK metric."""
    centred = variation - jnp.vdot(weights, variation)
    reaction = safe_sqrt(kappa) * centred  # a velocity; F² alone may be out of range
    return safe_sqrt(jnp.vdot(weights, jnp.vecdot(velocity, velocity) + reaction**2))


def reweighted(
    weights: Float[Array, " n"], variation: Float[Array, " n"], rate: Float[Array, ""]
) -> Float[Array, " n"]:
    """Return weights ∝ pⱼ exp(−sFⱼ) for the rate s = τκ; padding keeps the weight 0."""
    # Logarithms are finite for padding, so that weights of padding alone are not NaN.
    log_weights = jnp.maximum(safe_log(weights), float(jnp.finfo(weights.dtype).min) / 2)
    new_weights = jax.nn.softmax(log_weights - rate * variation)
    # A weight that underflowed to 0 could never grow again.
    new_weights = jnp.maximum(new_weights, float(jnp.finfo(weights.dtype).tiny))
    # With κ = 0 the weights stay exactly the same.
    return jnp.where((weights > 0) & (rate > 0), new_weights, weights)


def shortening(
    weights: Float[Array, " n"], variation: Float[Array, " n"], rate: Float[Array, ""]
) -> Float[Array, ""]:
    """Return the factor that shortens a step whose reweighting, at a rate s = τκ, is not linear.

    Reweighting by exp(−s(F−F̄))/Z predicts a decrease of the energy by log Z/s, which is s/2 Var F
    for small s. If it is less than half of that, as for far stray atoms, the mass moves in a
    shorter time than the step's, while the support has hardly moved. The whole step is then
    shortened to that time."""
    factors = SHORTENING ** -jnp.arange(16, dtype=rate.dtype)
    rates = rate * factors
    # sF is dimensionless; the squares of F or s alone may be out of range.
    tilts = rates[:, None] * (variation - jnp.vdot(weights, variation))[None]
    gains = jax.nn.logsumexp(safe_log(weights)[None] - tilts, axis=1)
    linear = gains >= jnp.square(tilts) @ weights / 4
    return factors[jnp.argmax(linear)]


# ------------------------------------------------------------------ bounds on S_ε, with rounding


def by_means(view: View, patterns: Patterns) -> Float[Array, " B"]:
    """Compute ½|m_q − m_X|²: S_ε is the sum of this and of S_ε of the centred clouds, which is ≥
    0."""
    offset, prepared = view.query.weights @ view.centred, patterns.prepared
    shift = (view.centre[None] - prepared.centre) + (offset[None] - prepared.offset)
    return jnp.vecdot(shift, shift) / 2 * (1 - rounding(shift.shape[-1], shift.dtype))


def by_gap(epsilon: Array, rho: Array, view: View, patterns: Patterns) -> Float[Array, " B"]:
    """Compute a bound for a given ρ: all mass of each cloud is placed at the nearest points of two
    balls that contain them; S ≥ 0."""
    prepared, clouds = patterns.prepared, patterns.measures
    shift = view.centre[None] - prepared.centre
    distance = safe_sqrt(jnp.vecdot(shift, shift))
    radius = radius_of(view.centred[None], view.query.weights[None])[0] + prepared.radius
    error = rounding(shift.shape[-1], shift.dtype)
    gap = jnp.maximum(distance * (1 - error) - radius * (1 + error), 0)
    selves = (view.self_transport.cost + prepared.self_transport.cost) / 2
    cost = cost_of_masses(epsilon, rho, gap**2 / 2)
    slack = rounding(view.query.num_atoms + clouds.num_atoms, shift.dtype) * rho
    return jnp.maximum(cost - selves - slack, 0)


def by_dual(
    dual_value: Callable[[Pair, Array], Array],
    geometry: Geometry,
    marginals: Marginals,
    view: View,
    patterns: Patterns,
) -> Float[Array, " B"]:
    """Compute ½|m_q − m_X|² plus S_ε of the centred clouds, with a dual value in place of OT_ε; for
    relaxed marginals, of the clouds where they are.

    **Arguments:**

    - `dual_value`: pair, warm start ↦ a lower bound on OT_ε.
    - `geometry`, `marginals`, `view`, `patterns`: the problem."""
    prepared, clouds = patterns.prepared, lifted(geometry, patterns.measures)
    centred = relative_to(prepared.centre, clouds, marginals.epsilon)
    _, means, atoms = relative_coordinates(
        marginals, view, prepared.centre, centred, clouds.weights
    )

    def dual(cloud: tuple[Array, Array, Array]) -> Array:
        points, weights, potential = cloud
        query = view.centred, view.query.weights
        return dual_value(Pair(*query, points, weights, marginals), potential)

    at_once = max(1, 2**20 // (view.query.num_atoms * clouds.num_atoms))
    guess = prepared.self_transport.f if patterns.guess is None else patterns.guess
    duals = map_in_batches(dual, at_once, (atoms, clouds.weights, guess))
    selves = (view.self_transport.cost + prepared.self_transport.cost) / 2
    error = rounding(clouds.num_atoms, duals.dtype) * (selves + jnp.abs(means))
    result: Array = means + duals - selves - error
    return result
