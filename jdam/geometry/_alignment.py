"""Poses of patterns by alternation of transport plans and the best motion for a plan, and their
derivatives by the implicit function theorem."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, PyTree

from jdam._core.derivatives import full_precision, jvp
from jdam._core.lapack import eigh
from jdam._core.linalg import (
    nearest_rotation,
    polar,
    pseudo_solve,
    safe_log,
    safe_sqrt,
    squared_norm,
)
from jdam._entropic.problem import Marginals
from jdam._measures.base import AnyMeasure
from jdam._measures.mixture import GaussianMixture
from jdam._measures.point_cloud import PointCloud, unchecked, variance
from jdam.geometry._clouds import zero_padding
from jdam.geometry._poses import Pose, where_rows
from jdam.geometry.protocol import AnyView, Patterns

#: The largest factor between a scale and the ratio of the sizes of query and pattern.
MAX_SCALE_FACTOR = 8.0


class Group(NamedTuple):
    """The group of motions to minimise over; all fields are static."""

    rotations: bool
    translations: bool
    reflections: bool
    scale: bool


def atoms_of(measure: AnyMeasure) -> PointCloud:
    """Return a cloud itself, landmarks as a cloud, or a mixture as the cloud of its sigma points
    mₖ ± √d σᵢvᵢ, where σᵢ and vᵢ are the principal deviations and axes of a component. The cloud
    has the mean and covariance of the mixture.
    """
    if isinstance(measure, Array):
        return unchecked(measure, jnp.full_like(measure[..., 0], 1 / measure.shape[-2]))
    if not isinstance(measure, GaussianMixture):
        cloud: PointCloud = measure
        return cloud
    values, axes = eigh(measure.factors @ measure.factors.mT)
    dim = measure.dim
    deviations = (jnp.sqrt(dim * jnp.maximum(values, 0))[..., None, :] * axes).mT
    points = jnp.concatenate([deviations, -deviations], -2) + measure.means[..., None, :]
    weights = jnp.repeat(measure.weights / (2 * dim), 2 * dim, axis=-1)
    return unchecked(points.reshape(*weights.shape, dim), weights)


class Problem(NamedTuple):
    """A query of n atoms and B patterns of m atoms, each relative to its own centre."""

    x: Float[Array, "n d"]
    x_weights: Float[Array, " n"]
    y: Float[Array, "B m d"]
    log_weights: Float[Array, "B m"]
    feature_costs: Float[Array, "B n m"] | None  # ½λ|u−v|²
    centre: Float[Array, " d"]
    centres: Float[Array, "B d"]
    size: Float[Array, ""]  # the variance of the query
    sizes: Float[Array, " B"]

    @property
    def ratio(self) -> Float[Array, " B"]:
        """The scale at which patterns have the size of the query."""
        positive = (self.sizes > 0) & (self.size > 0)
        return jnp.where(positive, jnp.sqrt(self.size / jnp.where(positive, self.sizes, 1)), 1)


class Moments(NamedTuple):
    """Moments of a plan P of mass m between atoms x and y. Leaves lead with any batch axes."""

    mass: Float[Array, " *batch"]  # 0 if means are undefined
    x_mean: Float[Array, "*batch d"]  # Σ Px/m
    y_mean: Float[Array, "*batch d"]  # Σ Py/m
    cross: Float[Array, "*batch d d"]  # Σ P(x − x̄)(y − ȳ)ᵀ/m
    x_spread: Float[Array, " *batch"]  # Σ P|x − x̄|²/m
    y_spread: Float[Array, " *batch"]  # Σ P|y − ȳ|²/m


def alignment_problem(
    query: PointCloud, patterns: PointCloud, feature_scale: Array | None
) -> Problem:
    """Return the problem of a query and patterns, as clouds."""
    x = zero_padding(query.points - query.mean[None], query.weights)
    y = zero_padding(patterns.points - patterns.mean[:, None], patterns.weights)
    feature_costs = None
    if query.features is not None and patterns.features is not None and feature_scale is not None:
        differences = query.features[None, :, None] - patterns.features[:, None]
        feature_costs = feature_scale / 2 * jnp.vecdot(differences, differences)
    log_weights = safe_log(patterns.weights)
    return Problem(
        *(x, query.weights, y, log_weights, feature_costs),
        *(query.mean, patterns.mean, variance(query), variance(patterns)),
    )


def one_sided_moments(
    problem: Problem, marginals: Marginals, pose: Pose
) -> tuple[Moments, Float[Array, "B S"]]:
    """Compute the moments of the one-sided plans between a query and patterns in S poses each, (B,
    S), and their costs, up to a constant.

    The query is moved into the frames of the patterns, so that products are of few large matrices:
    many small ones would take several times as long.
    """
    num_patterns, num_poses, dim = pose.translation.shape
    x, weights, y = problem.x, problem.x_weights, problem.y
    epsilon, rho = marginals
    # (c + x − t − sRc')/(sR), the atoms of the query about the centre c' of a pattern.
    shift = problem.centre[None, None] - pose.translation
    shift = shift - pose.scale[..., None] * jnp.matvec(pose.rotation, problem.centres[:, None])
    frame = pose.rotation / pose.scale[..., None, None]
    atoms = (x[None, None] + shift[:, :, None]).reshape(num_patterns, num_poses, -1, dim) @ frame
    x_squares, y_squares = jnp.vecdot(atoms, atoms), jnp.vecdot(y, y)
    products = atoms.reshape(num_patterns, -1, dim) @ y.mT
    costs = products.reshape(*atoms.shape[:3], -1) - y_squares[:, None, None] / 2
    costs = -(pose.scale**2)[..., None, None] * costs
    costs = costs if problem.feature_costs is None else costs + problem.feature_costs[:, None]
    log_masses = problem.log_weights[:, None, None] - costs / epsilon
    maxima = log_masses.max(-1)
    masses = jnp.exp(log_masses - maxima[..., None])
    y_values = jnp.concatenate([y, y_squares[..., None], jnp.ones_like(y[..., :1])], -1)
    sums = masses.reshape(num_patterns, -1, y.shape[1]) @ y_values
    sums = sums.reshape(*atoms.shape[:3], -1)
    total = sums[..., -1]
    costs = (pose.scale**2)[..., None] * x_squares / 2 - epsilon * (maxima + jnp.log(total))
    weights = weights[None, None]
    if rho is None:
        score = jnp.vecdot(costs, weights)
        row_masses = jnp.broadcast_to(weights, costs.shape)
    else:
        reach = rho + epsilon
        least = jnp.where(weights > 0, costs, jnp.inf).min(-1)
        row_masses = jnp.exp((least[..., None] - costs) / reach)
        row_masses = jnp.where(weights > 0, weights * row_masses, 0)
        score = least - reach * jnp.log(row_masses.sum(-1))
    x_values = jnp.concatenate([x, jnp.vecdot(x, x)[:, None], jnp.ones_like(x[:, :1])], -1)
    products = jnp.einsum("bsnk,ni->bsik", sums * (row_masses / total)[..., None], x_values)
    mass = products[..., -1, -1]
    products = products / jnp.where(mass > 0, mass, 1)[..., None, None]
    x_mean, y_mean = products[..., :dim, -1], products[..., -1, :dim]
    moments = Moments(
        mass=mass,
        x_mean=x_mean + problem.centre[None, None],
        y_mean=y_mean + problem.centres[:, None],
        cross=products[..., :dim, :dim] - x_mean[..., :, None] * y_mean[..., None, :],
        x_spread=products[..., dim, -1] - jnp.vecdot(x_mean, x_mean),
        y_spread=products[..., -1, dim] - jnp.vecdot(y_mean, y_mean),
    )
    return moments, score


def best_pose(
    group: Group, moments: Moments, pose: Pose, ratio: Array, growth: Array | None = None
) -> Pose:
    """Return the pose of least cost for a plan of these moments, or the previous pose if the plan
    has no mass.

    The scale is s = ⟨R, cross⟩/(y_spread − a), where ½as² is the self cost of the pattern at the
    scale s, and a is `growth`. If `growth` is None, it is the ratio of the spreads, which blurring
    does not lower.
    """
    x_mean, y_mean, cross = moments.x_mean, moments.y_mean, moments.cross
    x_spread, y_spread = moments.x_spread, moments.y_spread
    if not group.translations:
        cross = cross + x_mean[..., :, None] * y_mean[..., None, :]
        x_spread = x_spread + jnp.vecdot(x_mean, x_mean)
        y_spread = y_spread + jnp.vecdot(y_mean, y_mean)
    rotation = jnp.broadcast_to(jnp.eye(x_mean.shape[-1], dtype=x_mean.dtype), cross.shape)
    if group.rotations:
        rotation = (polar if group.reflections else nearest_rotation)(cross)
    scale = jnp.ones_like(moments.mass)
    if group.scale:
        if growth is None:
            scale = safe_sqrt(x_spread / jnp.where(y_spread > 0, y_spread, 1))
        else:
            net_spread = jnp.maximum(y_spread - growth, y_spread / 2)
            scale = (rotation * cross).sum((-2, -1)) / jnp.where(net_spread > 0, net_spread, 1)
        scale = jnp.clip(scale, ratio / MAX_SCALE_FACTOR, ratio * MAX_SCALE_FACTOR)
    rotated = scale[..., None] * jnp.matvec(rotation, y_mean)
    shift = x_mean - rotated if group.translations else jnp.zeros_like(x_mean)
    has_mass: Bool[Array, " *batch"] = moments.mass > float(jnp.finfo(x_mean.dtype).tiny) ** 0.5
    result: Pose = where_rows(has_mass, Pose(rotation, shift, scale), pose)
    return result


def displacement(problem: Problem, old: Pose, new: Pose) -> Float[Array, "B W"]:
    """Return the distances by which atoms move between two poses, (B, W), for an atom at the
    typical radius of a pattern.
    """
    linear = new.scale[..., None, None] * new.rotation - old.scale[..., None, None] * old.rotation
    shift = jnp.matvec(linear, problem.centres[:, None]) + new.translation - old.translation
    rotated = jnp.square(linear).sum((-2, -1)) * problem.sizes[:, None]
    return jnp.sqrt(rotated + jnp.vecdot(shift, shift))


def landmark_moments(x: Float[Array, "n d"], y: Float[Array, "n d"]) -> Moments:
    """Compute the moments of the plan that maps each landmark to the one of the same number."""
    x_mean, y_mean, num = x.mean(0), y.mean(0), jnp.full((), len(x), x.dtype)
    x, y = x - x_mean[None], y - y_mean[None]
    return Moments(num, x_mean, y_mean, x.T @ y / num, jnp.vdot(x, x) / num, jnp.vdot(y, y) / num)


def plan_moments(plan: Float[Array, "n m"], query: PointCloud, cloud: PointCloud) -> Moments:
    """Compute the moments of a plan (n, m) between the atoms of two clouds."""
    x, y = (zero_padding(c.points, c.weights) for c in (query, cloud))
    mass = plan.sum()
    total = jnp.where(mass > float(jnp.finfo(mass.dtype).tiny) ** 0.5, mass, 1)
    x_masses, y_masses = plan.sum(1) / total, plan.sum(0) / total
    x_mean, y_mean = x_masses @ x, y_masses @ y
    x, y = x - x_mean[None], y - y_mean[None]
    cross = x.T @ (plan @ y) / total
    return Moments(
        mass,
        x_mean,
        y_mean,
        cross,
        jnp.vdot(x_masses, jnp.vecdot(x, x)),
        jnp.vdot(y_masses, jnp.vecdot(y, y)),
    )


def mixture_plan_moments(
    plan: Float[Array, "K L"],
    query: GaussianMixture,
    mixture: GaussianMixture,
    aligned: Float[Array, "K L d r"],
) -> Moments:
    """Compute the moments of a plan between mixtures, including the products of the factors Lₖ and
    MₗRₖₗ (`aligned`).
    """
    moments = plan_moments(
        plan, unchecked(query.means, query.weights), unchecked(mixture.means, mixture.weights)
    )
    total = jnp.where(moments.mass > 0, moments.mass, 1)
    plan = plan / total
    return moments._replace(
        cross=moments.cross + jnp.einsum("kl,kdr,kler->de", plan, query.factors, aligned),
        x_spread=moments.x_spread + plan.sum(1) @ squared_norm(query.factors),
        y_spread=moments.y_spread + plan.sum(0) @ squared_norm(mixture.factors),
    )


# ------------------------------------------------------------------ derivatives


@jax.custom_jvp
def with_derivative(aligned: PyTree, view: AnyView, patterns: Patterns, pose: Pose) -> Pose:
    """Return stationary poses (B,) of D, with their derivatives by the implicit function theorem.

    In coordinates δ about a pose, ∂D/∂δ = 0, so that dδ = −(∂²D/∂δ²)⁻¹ d(∂D/∂δ), which is computed
    only for derivatives. Motions that do not change D, such as rotations of a symmetric pattern,
    have derivative zero. Higher derivatives exist.
    """
    return pose


def _derivative_jvp(primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]) -> tuple[Pose, Pose]:
    aligned, view, patterns, constant = primals
    pose = with_derivative(aligned, view, patterns, constant)  # for higher derivatives
    atoms = atoms_of(jax.lax.stop_gradient(patterns.measures))
    radius = safe_sqrt(variance(atoms))
    zero = jnp.zeros((len(radius), len(directions(aligned.group, atoms.dim))), radius.dtype)
    if zero.size == 0:  # a discrete group, as of the reflections of a line
        return pose, jax.tree.map(jnp.zeros_like, pose)

    def pose_at(delta: Array) -> Pose:
        centre = pose.translation
        if aligned.group.translations:
            centre = pose(atoms.mean[:, None])[:, 0]
        return retract(aligned.group, pose, delta, (centre, radius))

    def gradient(delta: Array, aligned: PyTree, view: AnyView, patterns: Patterns) -> Array:
        def total_divergence(delta: Array) -> Array:
            posed = aligned.posed(patterns, pose_at(delta))
            total: Array = aligned.geometry.compare(view, posed).divergence.sum()
            return total

        result: Array = jax.grad(total_divergence)(delta)
        return result

    def gradient_at(delta: Array) -> Array:
        return gradient(delta, aligned, view, patterns)

    def column(direction: Array) -> Array:
        tangent = jnp.broadcast_to(direction[None], zero.shape)
        result: Array = jax.jvp(gradient_at, (zero,), (tangent,))[1]
        return result

    curvature = jnp.moveaxis(jax.vmap(column)(jnp.eye(zero.shape[1], dtype=zero.dtype)), 0, -1)
    inputs = aligned, view, patterns
    mixed = jvp(lambda *args: gradient(zero, *args), inputs, tangents[:3])[1]
    tangent = -pseudo_solve(curvature, mixed, float(jnp.finfo(mixed.dtype).eps) ** 0.5)
    return pose, jax.jvp(pose_at, (zero,), (tangent,))[1]


with_derivative.defjvp(full_precision(_derivative_jvp), symbolic_zeros=True)


def rigid_part(group: Group, measure: AnyMeasure, tangent: AnyMeasure) -> AnyMeasure:
    """Project a tangent at a measure on the changes by rigid motions, orthogonally in the metric in
    which each atom, component or landmark has its weight as mass."""
    measure = jax.lax.stop_gradient(measure)
    atoms = atoms_of(measure)
    zero = jnp.zeros(len(directions(group, atoms.dim)), atoms.dtype)
    if zero.size == 0:
        return jax.tree.map(jnp.zeros_like, tangent)
    ball = atoms.mean[None], safe_sqrt(variance(atoms))[None]
    identity = jnp.eye(atoms.dim, dtype=atoms.dtype)[None]
    still = Pose(identity, jnp.zeros_like(ball[0]), jnp.ones_like(ball[1]))

    def moved(delta: Array) -> AnyMeasure:
        pose = retract(group, still, delta[None], ball)
        moved = pose(jax.tree.map(lambda leaf: leaf[None], measure))
        return jax.tree.map(lambda leaf: leaf[0], moved)

    def rows(tangent: AnyMeasure) -> Float[Array, "n z"]:
        leaves = jax.tree.leaves(tangent)
        return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)

    units = jnp.eye(zero.size, dtype=zero.dtype)
    motions = jax.vmap(lambda unit: jax.jvp(moved, (zero,), (unit,))[1])(units)
    fields = jax.vmap(rows)(motions)
    weights = getattr(measure, "weights", jnp.ones(len(fields[0]), zero.dtype))
    momenta = fields * weights[None, :, None]
    gram = jnp.einsum("kij,lij->kl", momenta, fields)
    right = jnp.einsum("kij,ij->k", momenta, rows(tangent))
    # A body of revolution has a motion without displacement.
    lengths = pseudo_solve(gram, right, float(jnp.finfo(zero.dtype).eps) ** 0.5)
    return jax.tree.map(lambda leaf: jnp.tensordot(lengths, leaf, 1), motions)


def directions(group: Group, dim: int) -> Float[np.ndarray, "k d_and_1 d_and_1"]:
    """Return velocities (A, b) of motions y ↦ Ay + b about a centre, as matrices [A b; 0 0]:
    rotations in each plane, translations along each axis, and scaling.
    """
    result = []
    for i in range(dim):
        for j in range(i):
            velocity = np.zeros((dim + 1, dim + 1))
            velocity[i, j], velocity[j, i] = 1, -1
            result += [velocity] if group.rotations else []
    for i in range(dim):
        velocity = np.zeros((dim + 1, dim + 1))
        velocity[i, dim] = 1
        result += [velocity] if group.translations else []
    if group.scale:
        result.append(np.diag([1.0] * dim + [0.0]))
    return np.reshape(result, (-1, dim + 1, dim + 1))


def retract(
    group: Group, pose: Pose, delta: Float[Array, "B k"], balls: tuple[Array, Array]
) -> Pose:
    """Return poses after a small motion about centres (B, d), for atoms within radii (B,).

    `delta` has the units of a length, and the result is exact to second order.
    """
    (centre, radius), dim = balls, pose.translation.shape[-1]
    if not group.translations:
        centre = jnp.zeros_like(centre)
    velocity = jnp.tensordot(delta, jnp.asarray(directions(group, dim), delta.dtype), 1)
    linear, shift = velocity[:, :dim, :dim], velocity[:, :dim, dim]
    linear = linear / jnp.where(radius > 0, radius, 1)[:, None, None]
    log_scale = jnp.trace(linear, axis1=1, axis2=2) / dim
    identity = jnp.eye(dim, dtype=delta.dtype)[None]
    linear = linear - log_scale[:, None, None] * identity
    motion = identity + linear + linear @ linear / 2
    scale = jnp.exp(log_scale)
    displaced = jnp.matvec(motion, pose.translation - centre)
    return Pose(
        motion @ pose.rotation, centre + shift + scale[:, None] * displaced, scale * pose.scale
    )
