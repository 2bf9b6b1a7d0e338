"""Rigid motions: poses of measures, and grids of rotations."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, PyTree

from jdam._core import checks
from jdam._measures.base import AnyMeasure, with_leaves
from jdam._measures.mixture import GaussianMixture
from jdam._measures.point_cloud import PointCloud


class Pose(eqx.Module):
    """Rigid motion or, with a scale, similarity: x ↦ s R x + t.

    `pose(measure)` moves the atoms of a `jdam.PointCloud` or the components of a
    `jdam.GaussianMixture`, and `pose(points)` an array (…, d). A batch of poses moves a batch of
    these. `pose.inverse` is the inverse motion.

    rotation:    R, (d, d), orthogonal; of determinant 1 unless reflections are allowed.
    translation: t, (d,), a length.
    scale:       s > 0, ().
    """

    rotation: Float[Array, "*batch d d"]
    translation: Float[Array, "*batch d"]
    scale: Float[Array, "*batch"]

    def __call__(self, measure: AnyMeasure) -> AnyMeasure:
        if isinstance(measure, PointCloud):
            moved = self._transform(measure.points)
            return eqx.tree_at(lambda cloud: cloud.points, measure, moved)
        if isinstance(measure, GaussianMixture):
            linear = self.scale[..., None, None] * self.rotation
            factors = jnp.matmul(linear[..., None, :, :], measure.factors, precision="highest")
            return with_leaves(measure, measure.weights, self._transform(measure.means), factors)
        return self._transform(checks.float_array("points", measure))

    def _transform(self, points: Float[Array, "*batch_and_more d"]) -> Array:
        flat = points.reshape(*self.scale.shape, -1, points.shape[-1])
        rotated = jnp.matmul(flat, self.rotation.mT, precision="highest")
        moved = self.scale[..., None, None] * rotated + self.translation[..., None, :]
        return moved.reshape(points.shape)

    @property
    def inverse(self) -> "Pose":
        """The inverse motion, y ↦ Rᵀ(y − t)/s."""
        inverse_linear = Pose(self.rotation.mT, jnp.zeros_like(self.translation), 1 / self.scale)
        shift = inverse_linear._transform(self.translation[..., None, :])[..., 0, :]
        return Pose(inverse_linear.rotation, -shift, inverse_linear.scale)


def rotations(count: int, dim: int) -> Float[np.ndarray, "S d d"]:
    """Return a fixed grid of rotations, the first of which is the identity."""
    if dim == 1:
        return np.ones((1, 1, 1))
    if dim == 2:
        angles = 2 * np.pi * np.arange(count) / count
        cosine, sine = np.cos(angles), np.sin(angles)
        return np.stack([np.stack([cosine, -sine], -1), np.stack([sine, cosine], -1)], -2)
    if dim == 3:
        grid = _from_quaternions(_super_fibonacci(count))
    else:
        grid = np.linalg.qr(np.random.default_rng(0).normal(size=(count, dim, dim)))[0]
        grid[:, :, -1] *= np.linalg.det(grid)[:, None]
    relative: np.ndarray = grid @ grid[0].T
    return relative


def _super_fibonacci(count: int) -> Float[np.ndarray, "S 4"]:
    """Return evenly distributed unit quaternions, on super-Fibonacci spirals."""
    s = np.arange(count) + 0.5
    inner, outer = np.sqrt(s / count), np.sqrt(1 - s / count)
    alpha, beta = 2 * np.pi * s / math.sqrt(2), 2 * np.pi * s / 1.533751168755204288118041
    parts = inner * np.sin(alpha), inner * np.cos(alpha), outer * np.sin(beta), outer * np.cos(beta)
    return np.stack(parts, -1)


def _from_quaternions(quaternions: Float[np.ndarray, "S 4"]) -> Float[np.ndarray, "S 3 3"]:
    """Return the rotations v ↦ v + 2u×(u×v + wv) of unit quaternions (u, w)."""
    axis, real = quaternions[:, None, :3], quaternions[:, None, 3:]
    identity = np.eye(3)[None]
    columns = identity + 2 * np.cross(axis, np.cross(axis, identity) + real * identity)
    return np.swapaxes(columns, 1, 2)


def transform_points(pose: Pose, points: Float[Array, "B z"]) -> Float[Array, "B z"]:
    """Apply each pose to one point, leaving coordinates of features unchanged."""
    dim = pose.translation.shape[-1]
    return points.at[:, :dim].set(pose(points[:, None, :dim])[:, 0])


def where_rows(condition: Bool[Array, "*batch"], new: PyTree, old: PyTree) -> PyTree:
    """Return the new rows where the condition holds, and the old ones elsewhere."""

    def where(x: Array, y: Array) -> Array:
        return jnp.where(
            condition.reshape(condition.shape + (1,) * (x.ndim - condition.ndim)), x, y
        )

    return jax.tree.map(where, new, old)
