"""Random measures at an exact distance from given ones."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

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
    """A random measure at W₂ distance exactly `radius`, with cost |x−y|², from each of a batch.

    * `"mean"`: a translation in a uniform direction.
    * `"covariance"`: the image under x ↦ x + S(x − m), S symmetric with a uniform basis and
      normal eigenvalues, scaled to ∫|S(x−m)|² = radius². Signs are turned where I + S would not
      be ⪰ 0, which does not change that integral; so the map is the gradient of a convex
      function, it is optimal, and the radius is exact however large. For `DiagonalGaussian`
      S is diagonal; a Gaussian that is one point becomes one of a random covariance.
    * `"both"`: half of radius² each.
    * `"atoms"`, clouds only: each atom by `radius` in a direction of its own. Exact as long as
      none moves more than half the distance between two atoms, which is required.

    Each component of a `GaussianMixture` is perturbed by `radius`, which then is MW₂ as long as
    all stay nearer to their own than to other components.

    **Arguments:** `key`, one for the whole batch; `measure`, a Gaussian, a mixture, a cloud or an
    array (…, d) of vectors (which only have a mean), of any batch shape; `radius` ≥ 0, W₂ distances
    (not squared), a scalar or of the batch shape.

    **Raises:** `TypeError` or `ValueError` for arguments that are not of these kinds, and for
    radii that cannot be had: `"atoms"` beyond half the separation, `"covariance"` of a cloud that
    is one point. Under a trace, those give NaN.
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
    found = _perturb(key, measure, jnp.broadcast_to(radius, batch), where)
    first = jax.tree.leaves(found)[0]
    wanted = {
        "atoms": "at most half the distance between two atoms",
        "covariance": "0 for a cloud that is one point",
    }.get(where)
    if wanted and checks.is_concrete(first) and bool(jnp.isnan(first).any()):
        raise ValueError(f"radius must be {wanted} with where={where!r}; got {radius}")
    return found


@partial(jax.jit, static_argnums=3)
@full_precision
def _perturb(key: Array, measure: AnyMeasure, radius: Array, where: str) -> AnyMeasure:
    for_mean, for_shape = jax.random.split(key)
    if not isinstance(measure, Measure):
        return measure + radius[..., None] * directions(for_mean, measure.shape, measure.dtype)
    if isinstance(measure, GaussianMixture):
        each = jnp.broadcast_to(radius[..., None], measure.weights.shape)
        moved = _perturb(key, measure.components, each, where)
        return with_leaves(measure, measure.weights, moved.mean, moved.factor)
    if isinstance(measure, PointCloud) and where == "atoms":
        return _move_atoms(for_shape, measure, radius)
    share = {"mean": (1.0, 0.0), "covariance": (0.0, 1.0), "both": (0.5, 0.5)}[where]
    by_mean, by_shape = (math.sqrt(s) * radius for s in share)
    if isinstance(measure, PointCloud) and where == "both":
        # One point has no shape to change.
        point = _variance(measure) == 0
        by_mean, by_shape = jnp.where(point, radius, by_mean), jnp.where(point, 0, by_shape)
    measure = measure if where == "mean" else _reshape(for_shape, measure, by_shape)
    if where == "covariance":
        return measure
    shift = by_mean[..., None] * directions(for_mean, measure.mean.shape, measure.dtype)
    if isinstance(measure, PointCloud):
        return measure.with_atoms(measure.points + shift[..., None, :], measure.weights)
    mean, *shape = jax.tree.leaves(measure)
    return with_leaves(measure, mean + shift, *shape)


def _reshape(key: Array, measure: Measure, radius: Float[Array, " *batch"]) -> Measure:
    """The image under x ↦ x + S(x − m), at distance `radius`."""
    if isinstance(measure, DiagonalGaussian):
        change = radius[..., None] * directions(key, measure.scale.shape, measure.dtype)
        change = jnp.where(measure.scale + change < 0, -change, change)
        return with_leaves(measure, measure.mean, measure.scale + change)
    for_basis, for_values, for_point = jax.random.split(key, 3)
    batch, dim, dtype = measure.batch_shape, measure.dim, measure.dtype
    basis = orthogonal(for_basis, (*batch, dim), dtype)
    values = jax.random.normal(for_values, (*batch, dim), dtype)
    if isinstance(measure, PointCloud):
        centred = measure.points - measure.mean[..., None, :]
        spread = (jnp.sqrt(measure.weights)[..., None] * centred).mT
    else:
        assert isinstance(measure, Gaussian)
        spread = measure.factor
    size = jnp.sqrt(squared_norm(values[..., None] * (basis.mT @ spread)))
    values = values * (radius / jnp.where(size > 0, size, 1))[..., None]
    values = jnp.where(values < -1, -values, values)
    if isinstance(measure, PointCloud):
        moved = measure.points + ((centred @ basis) * values[..., None, :]) @ basis.mT
        impossible = (size == 0) & (radius > 0)
        moved = jnp.where(impossible[..., None, None], jnp.nan, moved)
        return measure.with_atoms(moved, measure.weights)
    moved = spread + basis @ (values[..., None] * (basis.mT @ spread))
    flat = (*batch, dim * spread.shape[-1])
    point = radius[..., None, None] * directions(for_point, flat, dtype).reshape(spread.shape)
    return with_leaves(measure, measure.mean, jnp.where((size > 0)[..., None, None], moved, point))


def _move_atoms(key: Array, cloud: PointCloud, radius: Float[Array, " *batch"]) -> PointCloud:
    on = cloud.weights > 0
    gaps = cloud.points[..., :, None, :] - cloud.points[..., None, :, :]
    pairs = on[..., :, None] & on[..., None, :]
    pairs &= jnp.broadcast_to(~jnp.eye(cloud.num_atoms, dtype=bool), pairs.shape)
    separation = jnp.where(pairs, jnp.sqrt(jnp.vecdot(gaps, gaps)), jnp.inf).min((-1, -2))
    length = jnp.where(radius <= separation / 2, radius, jnp.nan)[..., None, None]
    shift = length * directions(key, cloud.points.shape, cloud.dtype)
    return cloud.with_atoms(cloud.points + shift, cloud.weights)


def _variance(cloud: PointCloud) -> Float[Array, " *batch"]:
    centred = cloud.points - cloud.mean[..., None, :]
    return jnp.vecdot(cloud.weights, jnp.vecdot(centred, centred))
