"""Derivatives of the best poses, by the implicit function theorem."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, PyTree

from jdam._core.derivatives import full_precision, jvp
from jdam._core.linalg import pseudo_solve, safe_sqrt
from jdam.geometry._alignment import Group, atoms_of, variance
from jdam.geometry._poses import Pose
from jdam.geometry.protocol import AnyView, Patterns


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
    return np.stack(result)


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
