"""Perturbations: random measures at an exact distance from given measures."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from jdam._core import checks
from jdam._core.derivatives import full_precision
from jdam._core.linalg import squared_norm
from jdam._measures.base import AnyMeasure, Measure, with_leaves
from jdam._measures.gaussian import DiagonalGaussian, Gaussian
from jdam._measures.mixture import GaussianMixture
from jdam._measures.point_cloud import PointCloud
from jdam.random._uniform import directions, orthogonal


def perturb(
    key: Array, measure: AnyMeasure, radius: ArrayLike, *, where: str = "both"
) -> AnyMeasure:
    """Draw a random measure at the W₂ distance `radius` (cost |x−y|²) from each measure of a batch.

    The argument `where` selects the perturbation:

    - `"mean"`: a translation in a uniform direction.
    - `"covariance"`: the image under x ↦ x + S(x − m), with S symmetric, of a uniform eigenbasis
      and normal eigenvalues, scaled to ∫|S(x−m)|² = radius². Signs of eigenvalues are changed where
      I + S would not be ⪰ 0, which leaves the integral as it is. The map then is the gradient of a
      convex function and therefore optimal, so that any radius is exact. For `DiagonalGaussian` S
      is diagonal; a Gaussian that is a point mass gets a random covariance.
    - `"both"`: a translation and a change of covariance, each with half of radius². Vectors and
      clouds that are one point are translated only.
    - `"atoms"`, for clouds: a translation of each atom by `radius` in a direction of its own. The
      distance is exact because `radius` must not exceed half the smallest distance between atoms.

    Each component of a `GaussianMixture` is perturbed by `radius`. This is the MW₂ distance as long
    as all components stay nearer to their original than to the other components.

    **Arguments:**

    - `key`: a `jax.random` key, one for the whole batch.
    - `measure`: a Gaussian, a mixture, a cloud or an array (…, d) of vectors, of any batch shape.
    - `radius`: W₂ distances (not squared) ≥ 0, a scalar or of the batch shape.
    - `where`: one of the above.

    **Returns:** a measure of the type and batch shape of `measure`.

    **Raises:** `TypeError` or `ValueError` for arguments outside these types and ranges, for
    `"atoms"` with a radius above half the smallest distance between atoms, and for `"covariance"`
    of a cloud that is one point. Under a trace the last two give NaN.
    """
    allowed = ["both", "mean"]
    if isinstance(measure, Measure):
        allowed += ["covariance"]
    else:
        measure = checks.float_array("measure", measure)
    if isinstance(measure, PointCloud):
        allowed += ["atoms"]
    if where not in allowed:
        raise ValueError(f"where must be one of {allowed} for this measure; got {where!r}")
    batch = measure.batch_shape if isinstance(measure, Measure) else measure.shape[:-1]
    dtype = jax.tree.leaves(measure)[0].dtype
    radius = jnp.asarray(radius, dtype)
    if radius.shape not in ((), batch):
        raise ValueError(f"radius must be a scalar or of shape {batch}; got {radius.shape}")
    checks.finite("radius", radius)
    checks.nonnegative("radius", radius)
    perturbed = _perturb(key, measure, jnp.broadcast_to(radius, batch), where)
    first = jax.tree.leaves(perturbed)[0]
    condition = {
        "atoms": "at most half the distance between two atoms",
        "covariance": "0 for a cloud that is one point",
    }.get(where)
    if condition and checks.is_concrete(first) and bool(jnp.isnan(first).any()):
        raise ValueError(f"radius must be {condition} with where={where!r}; got {radius}")
    return perturbed


@partial(jax.jit, static_argnums=3)
@full_precision
def _perturb(key: Array, measure: AnyMeasure, radius: Array, where: str) -> AnyMeasure:
    mean_key, shape_key = jax.random.split(key)
    if not isinstance(measure, Measure):
        return measure + radius[..., None] * directions(mean_key, measure.shape, measure.dtype)
    if isinstance(measure, GaussianMixture):
        radii = jnp.broadcast_to(radius[..., None], measure.weights.shape)
        moved = _perturb(key, measure.components, radii, where)
        return with_leaves(measure, measure.weights, moved.mean, moved.factor)
    if isinstance(measure, PointCloud) and where == "atoms":
        return _move_atoms(shape_key, measure, radius)
    fractions = {"mean": (1.0, 0.0), "covariance": (0.0, 1.0), "both": (0.5, 0.5)}[where]
    mean_radius, shape_radius = (math.sqrt(s) * radius for s in fractions)
    if isinstance(measure, PointCloud) and where == "both":
        # A cloud that is one point has no covariance to change, and is translated by all of radius.
        point = _is_point(measure)
        mean_radius, shape_radius = (
            jnp.where(point, radius, mean_radius),
            jnp.where(point, 0, shape_radius),
        )
    measure = measure if where == "mean" else _deform(shape_key, measure, shape_radius)
    if where == "covariance":
        return measure
    shift = mean_radius[..., None] * directions(mean_key, measure.mean.shape, measure.dtype)
    if isinstance(measure, PointCloud):
        return measure.with_atoms(measure.points + shift[..., None, :], measure.weights)
    mean, *shape = jax.tree.leaves(measure)
    return with_leaves(measure, mean + shift, *shape)


def _deform(key: Array, measure: Measure, radius: Float[Array, " *batch"]) -> Measure:
    """Return the image of a measure under a random map x ↦ x + S(x − m), at the distance
    `radius`.
    """
    if isinstance(measure, DiagonalGaussian):
        change = radius[..., None] * directions(key, measure.scale.shape, measure.dtype)
        change = jnp.where(measure.scale + change < 0, -change, change)
        return with_leaves(measure, measure.mean, measure.scale + change)
    basis_key, value_key, point_key = jax.random.split(key, 3)
    batch, dim, dtype = measure.batch_shape, measure.dim, measure.dtype
    basis = orthogonal(basis_key, (*batch, dim), dtype)
    values = jax.random.normal(value_key, (*batch, dim), dtype)
    if isinstance(measure, PointCloud):
        centred = measure.points - measure.mean[..., None, :]
        factor = (jnp.sqrt(measure.weights)[..., None] * centred).mT
    else:
        assert isinstance(measure, Gaussian)
        factor = measure.factor
    size = jnp.sqrt(squared_norm(values[..., None] * (basis.mT @ factor)))
    values = values * (radius / jnp.where(size > 0, size, 1))[..., None]
    values = jnp.where(values < -1, -values, values)
    if isinstance(measure, PointCloud):
        moved = measure.points + ((centred @ basis) * values[..., None, :]) @ basis.mT
        impossible = _is_point(measure) & (radius > 0)
        moved = jnp.where(impossible[..., None, None], jnp.nan, moved)
        return measure.with_atoms(moved, measure.weights)
    moved = factor + basis @ (values[..., None] * (basis.mT @ factor))
    flat = (*batch, dim * factor.shape[-1])
    point = radius[..., None, None] * directions(point_key, flat, dtype).reshape(factor.shape)
    return with_leaves(measure, measure.mean, jnp.where((size > 0)[..., None, None], moved, point))


def _is_point(cloud: PointCloud) -> Bool[Array, " *batch"]:
    """Return whether all atoms of positive weight are at one point."""
    on = (cloud.weights > 0)[..., None]
    low = jnp.where(on, cloud.points, jnp.inf).min(-2)
    high = jnp.where(on, cloud.points, -jnp.inf).max(-2)
    return (low == high).all(-1)


def _move_atoms(key: Array, cloud: PointCloud, radius: Float[Array, " *batch"]) -> PointCloud:
    """Return the cloud with each atom moved by `radius`, NaN above half the separation of the
    atoms.
    """
    on = cloud.weights > 0
    gaps = cloud.points[..., :, None, :] - cloud.points[..., None, :, :]
    pairs = on[..., :, None] & on[..., None, :]
    pairs &= jnp.broadcast_to(~jnp.eye(cloud.num_atoms, dtype=bool), pairs.shape)
    separation = jnp.where(pairs, jnp.sqrt(jnp.vecdot(gaps, gaps)), jnp.inf).min((-1, -2))
    length = jnp.where(radius <= separation / 2, radius, jnp.nan)[..., None, None]
    shift = length * directions(key, cloud.points.shape, cloud.dtype)
    return cloud.with_atoms(cloud.points + shift, cloud.weights)
