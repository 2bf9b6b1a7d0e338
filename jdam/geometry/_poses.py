"""Rigid motions: poses of point clouds, the best one for a plan, and nets of rotations."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from jdam._core import checks
from jdam._measures.base import AnyMeasure, with_leaves
from jdam._measures.mixture import GaussianMixture
from jdam._measures.point_cloud import PointCloud


class Pose(eqx.Module):
    """A rigid motion, or with a scale a similarity: x ↦ s R x + t.

    `pose(measure)` moves the atoms of a `jdam.PointCloud` or the components of a
    `jdam.GaussianMixture`, and `pose(points)` an array (…, d); a batch of poses moves a batch of
    these. `pose.inverse` undoes it.

    rotation:    R, (d, d), orthogonal; of determinant 1 unless reflections are allowed.
    translation: t, (d,), a length.
    scale:       s > 0, ().
    """

    rotation: Float[Array, "*batch d d"]
    translation: Float[Array, "*batch d"]
    scale: Float[Array, "*batch"]

    def __call__(self, measure: AnyMeasure) -> AnyMeasure:
        if isinstance(measure, PointCloud):
            moved = self._moved(measure.points)
            return eqx.tree_at(lambda cloud: cloud.points, measure, moved)
        if isinstance(measure, GaussianMixture):
            linear = self.scale[..., None, None] * self.rotation
            factors = jnp.matmul(linear[..., None, :, :], measure.factors, precision="highest")
            return with_leaves(measure, measure.weights, self._moved(measure.means), factors)
        return self._moved(checks.float_array("points", measure))

    def _moved(self, points: Float[Array, "*batch_and_more d"]) -> Array:
        flat = points.reshape(*self.scale.shape, -1, points.shape[-1])
        turned = jnp.matmul(flat, self.rotation.mT, precision="highest")
        moved = self.scale[..., None, None] * turned + self.translation[..., None, :]
        return moved.reshape(points.shape)

    @property
    def inverse(self) -> "Pose":
        """y ↦ Rᵀ(y − t)/s."""
        back = Pose(self.rotation.mT, jnp.zeros_like(self.translation), 1 / self.scale)
        shift = back._moved(self.translation[..., None, :])[..., 0, :]
        return Pose(back.rotation, -shift, back.scale)


def rotations(count: int, dim: int) -> Float[np.ndarray, "S d d"]:
    """A fixed net of rotations, the first of which is none."""
    if dim == 1:
        return np.ones((1, 1, 1))
    if dim == 2:
        angles = 2 * np.pi * np.arange(count) / count
        cosine, sine = np.cos(angles), np.sin(angles)
        return np.stack([np.stack([cosine, -sine], -1), np.stack([sine, cosine], -1)], -2)
    if dim == 3:
        net = _from_quaternions(_spiral(count))
    else:
        net = np.linalg.qr(np.random.default_rng(0).normal(size=(count, dim, dim)))[0]
        net[:, :, -1] *= np.linalg.det(net)[:, None]
    turned: np.ndarray = net @ net[0].T
    return turned


def _spiral(count: int) -> Float[np.ndarray, "S 4"]:
    """Super-Fibonacci spirals: unit quaternions that are evenly spread."""
    at = np.arange(count) + 0.5
    inner, outer = np.sqrt(at / count), np.sqrt(1 - at / count)
    alpha, beta = 2 * np.pi * at / math.sqrt(2), 2 * np.pi * at / 1.533751168755204288118041
    waves = inner * np.sin(alpha), inner * np.cos(alpha), outer * np.sin(beta), outer * np.cos(beta)
    return np.stack(waves, -1)


def _from_quaternions(quaternions: Float[np.ndarray, "S 4"]) -> Float[np.ndarray, "S 3 3"]:
    """R v = v + 2u×(u×v + wv) of (u, w)."""
    axis, real = quaternions[:, None, :3], quaternions[:, None, 3:]
    unit = np.eye(3)[None]
    turned = unit + 2 * np.cross(axis, np.cross(axis, unit) + real * unit)
    return np.swapaxes(turned, 1, 2)


def each(pose: Pose, points: Float[Array, "B z"]) -> Float[Array, "B z"]:
    """One point in each pose; coordinates that are features stay."""
    dim = pose.translation.shape[-1]
    return points.at[:, :dim].set(pose(points[:, None, :dim])[:, 0])


def choose_rows(condition: Bool[Array, "*batch"], new: Any, old: Any) -> Any:
    """New rows where a condition holds, old ones elsewhere."""

    def choose(x: Array, y: Array) -> Array:
        return jnp.where(
            condition.reshape(condition.shape + (1,) * (x.ndim - condition.ndim)), x, y
        )

    return jax.tree.map(choose, new, old)
