"""Poses of patterns by alternation: what belongs to what, and the best motion for that."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jdam._core.lapack import eigh
from jdam._core.linalg import nearest_rotation, polar, safe_log, safe_sqrt, squared_norm
from jdam._measures.base import AnyMeasure
from jdam._measures.mixture import GaussianMixture
from jdam._measures.point_cloud import PointCloud, unchecked
from jdam.geometry._poses import Pose, choose_rows

#: How far from the ratio of the sizes of a query and a pattern a scale may lie, as a factor.
FARTHEST = 8.0


class Group(NamedTuple):
    """Which motions are free; all static."""

    rotations: bool
    translations: bool
    reflections: bool
    scale: bool


def atoms_of(measure: AnyMeasure) -> PointCloud:
    """A cloud itself; a mixture as the cloud of its sigma points mₖ ± √d σᵢvᵢ, σᵢ and vᵢ the
    principal deviations and axes of the component, which has its mean and covariance."""
    if not isinstance(measure, GaussianMixture):
        cloud: PointCloud = measure
        return cloud
    values, axes = eigh(measure.factors @ measure.factors.mT)
    dim = measure.dim
    ways = (jnp.sqrt(dim * jnp.maximum(values, 0))[..., None, :] * axes).mT
    points = jnp.concatenate([ways, -ways], -2) + measure.means[..., None, :]
    weights = jnp.repeat(measure.weights / (2 * dim), 2 * dim, axis=-1)
    return unchecked(points.reshape(*weights.shape, dim), weights)


class Problem(NamedTuple):
    """A query of n atoms and B patterns of m, each about its own centre."""

    x: Float[Array, "n d"]
    x_weights: Float[Array, " n"]
    y: Float[Array, "B m d"]
    log_weights: Float[Array, "B m"]
    other: Float[Array, "B n m"] | None  # ½λ|u−v|²
    centre: Float[Array, " d"]
    centres: Float[Array, "B d"]
    size: Float[Array, ""]  # the variance of the query
    sizes: Float[Array, " B"]

    @property
    def ratio(self) -> Float[Array, " B"]:
        """The scale that makes patterns as large as the query."""
        on = (self.sizes > 0) & (self.size > 0)
        return jnp.where(on, jnp.sqrt(self.size / jnp.where(on, self.sizes, 1)), 1)


class Softness(NamedTuple):
    """ε and ρ of one-sided plans."""

    epsilon: Float[Array, ""]
    rho: Float[Array, ""] | None


class Moments(NamedTuple):
    """Of a plan of mass m between atoms x and y. Leaves lead with any batch."""

    mass: Float[Array, " *batch"]  # 0 where there is so little that means are none
    to: Float[Array, "*batch d"]  # Σ Px/m
    from_: Float[Array, "*batch d"]  # Σ Py/m
    cross: Float[Array, "*batch d d"]  # Σ P(x − to)(y − from)ᵀ/m
    spread: Float[Array, " *batch"]  # Σ P|x − to|²/m
    own_spread: Float[Array, " *batch"]  # Σ P|y − from|²/m


def problem(query: PointCloud, patterns: PointCloud, feature_scale: Array | None) -> Problem:
    """That of clouds."""
    x = jnp.where(query.weights[:, None] > 0, query.points - query.mean[None], 0)
    y = patterns.points - patterns.mean[:, None]
    y = jnp.where(patterns.weights[..., None] > 0, y, 0)
    other = None
    if query.features is not None and patterns.features is not None and feature_scale is not None:
        gaps = query.features[None, :, None] - patterns.features[:, None]
        other = feature_scale / 2 * jnp.vecdot(gaps, gaps)
    logs = safe_log(patterns.weights)
    return Problem(
        *(x, query.weights, y, logs, other),
        *(query.mean, patterns.mean, variance(query), variance(patterns)),
    )


def explain(held: Problem, soft: Softness, pose: Pose) -> tuple[Moments, Float[Array, "B S"]]:
    """How patterns in S poses each, (B, S), explain the query: the moments of one-sided plans, and
    a number that grows with what is left unexplained.

    The query moves, into the frames of the patterns, so that products are of few large matrices:
    many small ones would take several times as long."""
    many, count, dim = pose.translation.shape
    x, weights, y = held.x, held.x_weights, held.y
    # (c + x − t − sRc')/(sR), the atoms of the query about the centre c' of a pattern.
    shift = held.centre[None, None] - pose.translation
    shift = shift - pose.scale[..., None] * jnp.matvec(pose.rotation, held.centres[:, None])
    frame = pose.rotation / pose.scale[..., None, None]
    seen = (x[None, None] + shift[:, :, None]).reshape(many, count, -1, dim) @ frame
    squares, own_squares = jnp.vecdot(seen, seen), jnp.vecdot(y, y)
    products = seen.reshape(many, -1, dim) @ y.mT
    costs = products.reshape(*seen.shape[:3], -1) - own_squares[:, None, None] / 2
    costs = -(pose.scale**2)[..., None, None] * costs
    costs = costs if held.other is None else costs + held.other[:, None]
    logs = held.log_weights[:, None, None] - costs / soft.epsilon
    top = logs.max(-1)
    masses = jnp.exp(logs - top[..., None])
    values = jnp.concatenate([y, own_squares[..., None], jnp.ones_like(y[..., :1])], -1)
    found = masses.reshape(many, -1, y.shape[1]) @ values
    found = found.reshape(*seen.shape[:3], -1)
    total = found[..., -1]
    costs = (pose.scale**2)[..., None] * squares / 2 - soft.epsilon * (top + jnp.log(total))
    weights = weights[None, None]
    if soft.rho is None:
        score = jnp.vecdot(costs, weights)
        rows = jnp.broadcast_to(weights, costs.shape)
    else:
        reach = soft.rho + soft.epsilon
        least = jnp.where(weights > 0, costs, jnp.inf).min(-1)
        rows = jnp.where(weights > 0, weights * jnp.exp((least[..., None] - costs) / reach), 0)
        score = least - reach * jnp.log(rows.sum(-1))
    places = jnp.concatenate([x, jnp.vecdot(x, x)[:, None], jnp.ones_like(x[:, :1])], -1)
    sums = jnp.einsum("bsnk,ni->bsik", found * (rows / total)[..., None], places)
    mass = sums[..., -1, -1]
    sums = sums / jnp.where(mass > 0, mass, 1)[..., None, None]
    to, from_ = sums[..., :dim, -1], sums[..., -1, :dim]
    moments = Moments(
        mass=mass,
        to=to + held.centre[None, None],
        from_=from_ + held.centres[:, None],
        cross=sums[..., :dim, :dim] - to[..., :, None] * from_[..., None, :],
        spread=sums[..., dim, -1] - jnp.vecdot(to, to),
        own_spread=sums[..., -1, dim] - jnp.vecdot(from_, from_),
    )
    return moments, score


def best_pose(
    group: Group, found: Moments, pose: Pose, ratio: Array, own: Array | None = None
) -> Pose:
    """The pose of least cost for a plan of these moments; where that has no mass, the old one.

    The scale is s = ⟨R, cross⟩/(own_spread − own), where own·s²/2 is what a pattern costs itself;
    or if `own` is None the ratio of the spreads, which blurring does not lower."""
    to, from_, cross = found.to, found.from_, found.cross
    spread, own_spread = found.spread, found.own_spread
    if not group.translations:
        cross = cross + to[..., :, None] * from_[..., None, :]
        spread, own_spread = spread + jnp.vecdot(to, to), own_spread + jnp.vecdot(from_, from_)
    rotation = jnp.broadcast_to(jnp.eye(to.shape[-1], dtype=to.dtype), cross.shape)
    if group.rotations:
        rotation = (polar if group.reflections else nearest_rotation)(cross)
    scale = jnp.ones_like(found.mass)
    if group.scale:
        if own is None:
            scale = safe_sqrt(spread / jnp.where(own_spread > 0, own_spread, 1))
        else:
            left = jnp.maximum(own_spread - own, own_spread / 2)
            scale = (rotation * cross).sum((-2, -1)) / jnp.where(left > 0, left, 1)
        scale = jnp.clip(scale, ratio / FARTHEST, ratio * FARTHEST)
    turned = scale[..., None] * jnp.matvec(rotation, from_)
    shift = to - turned if group.translations else jnp.zeros_like(to)
    some: Bool[Array, " *batch"] = found.mass > float(jnp.finfo(to.dtype).tiny) ** 0.5
    chosen: Pose = choose_rows(some, Pose(rotation, shift, scale), pose)
    return chosen


def moved_by(held: Problem, old: Pose, new: Pose) -> Float[Array, "B W"]:
    """How far atoms move from poses to others, (B, W): those of a pattern at its typical radius."""
    rows = new.scale[..., None, None] * new.rotation - old.scale[..., None, None] * old.rotation
    shift = jnp.matvec(rows, held.centres[:, None]) + new.translation - old.translation
    turned = jnp.square(rows).sum((-2, -1)) * held.sizes[:, None]
    return jnp.sqrt(turned + jnp.vecdot(shift, shift))


def variance(cloud: PointCloud) -> Float[Array, " *batch"]:
    """Σ aⱼ|xⱼ − mean|²."""
    steps = cloud.points - cloud.mean[..., None, :]
    squares = jnp.where(cloud.weights > 0, jnp.vecdot(steps, steps), 0)
    return jnp.vecdot(cloud.weights, squares)


def in_plan(plan: Float[Array, "n m"], query: PointCloud, cloud: PointCloud) -> Moments:
    """The moments of a plan (n, m) between the atoms of two clouds."""
    x = jnp.where(query.weights[:, None] > 0, query.points, 0)
    y = jnp.where(cloud.weights[:, None] > 0, cloud.points, 0)
    mass = plan.sum()
    total = jnp.where(mass > float(jnp.finfo(mass.dtype).tiny) ** 0.5, mass, 1)
    rows, columns = plan.sum(1) / total, plan.sum(0) / total
    to, from_ = rows @ x, columns @ y
    x, y = x - to[None], y - from_[None]
    cross = x.T @ (plan @ y) / total
    return Moments(
        mass,
        to,
        from_,
        cross,
        jnp.vdot(rows, jnp.vecdot(x, x)),
        jnp.vdot(columns, jnp.vecdot(y, y)),
    )


def in_mixture_plan(
    plan: Float[Array, "K L"],
    query: GaussianMixture,
    mixture: GaussianMixture,
    aligned: Float[Array, "K L d r"],
) -> Moments:
    """The same between mixtures, `aligned` being the factors MₗRₖₗ: their products count too."""
    found = in_plan(
        plan, unchecked(query.means, query.weights), unchecked(mixture.means, mixture.weights)
    )
    total = jnp.where(found.mass > 0, found.mass, 1)
    plan = plan / total
    return found._replace(
        cross=found.cross + jnp.einsum("kl,kdr,kler->de", plan, query.factors, aligned),
        spread=found.spread + plan.sum(1) @ squared_norm(query.factors),
        own_spread=found.own_spread + plan.sum(0) @ squared_norm(mixture.factors),
    )
