"""Derivatives of the best poses, by the implicit function theorem."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jdam._core.derivatives import full_precision, jvp
from jdam._core.lapack import eigh
from jdam._core.linalg import safe_sqrt
from jdam.geometry._alignment import Group, atoms_of, variance
from jdam.geometry._poses import Pose
from jdam.geometry.protocol import AnyView, Patterns


@jax.custom_jvp
def followed(aligned: Any, view: AnyView, patterns: Patterns, pose: Pose) -> Pose:
    """Poses (B,) at which D of patterns is stationary, which follow what D depends on.

    Of coordinates δ about a pose, ∂D/∂δ = 0 there; so dδ = −(∂²D/∂δ²)⁻¹ d(∂D/∂δ), which costs
    nothing unless it is asked for. Where a motion changes nothing, as a turn of what is
    symmetric, the pose stays. It can be differentiated again."""
    return pose


def _followed_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Pose, Pose]:
    aligned, view, patterns, constant = primals
    pose = followed(aligned, view, patterns, constant)  # for derivatives of this
    atoms = atoms_of(jax.lax.stop_gradient(patterns.measures))
    radius = safe_sqrt(variance(atoms))
    still = jnp.zeros((len(radius), len(directions(aligned.group, atoms.dim))), radius.dtype)

    def near(small: Array) -> Pose:
        centre = pose.translation
        if aligned.group.translations:
            centre = pose(atoms.mean[:, None])[:, 0]
        return retract(aligned.group, pose, small, (centre, radius))

    def slope(small: Array, aligned: Any, view: AnyView, patterns: Patterns) -> Array:
        def height(small: Array) -> Array:
            posed = aligned.posed(patterns, near(small))
            total: Array = aligned.geometry.compare(view, posed).divergence.sum()
            return total

        found: Array = jax.grad(height)(small)
        return found

    def column(direction: Array) -> Array:
        towards = jnp.broadcast_to(direction[None], still.shape)
        given = (lambda small: slope(small, aligned, view, patterns), (still,), (towards,))
        found: Array = jax.jvp(*given)[1]
        return found

    curvature = jnp.moveaxis(jax.vmap(column)(jnp.eye(still.shape[1], dtype=still.dtype)), 0, -1)
    given = (lambda *held: slope(still, *held), (aligned, view, patterns), tangents[:3])
    tangent = -_solved(curvature, jvp(*given)[1])
    return pose, jax.jvp(near, (still,), (tangent,))[1]


followed.defjvp(full_precision(_followed_jvp), symbolic_zeros=True)


def _solved(matrix: Float[Array, "B k k"], right: Float[Array, "B k"]) -> Float[Array, "B k"]:
    """A⁺b of symmetric matrices, by a linear system, so that it can be differentiated again."""
    values, basis = eigh(jax.lax.stop_gradient((matrix + matrix.mT) / 2))
    kept = jnp.abs(values) > float(jnp.finfo(values.dtype).eps) ** 0.5 * jnp.abs(values).max(
        -1, keepdims=True
    )
    reciprocal = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)

    def solve(_: Any, b: Array) -> Array:
        return jnp.matvec(basis, reciprocal * jnp.vecmat(b, basis))

    found: Array = jax.lax.custom_linear_solve(
        lambda x: jnp.matvec((matrix + matrix.mT) / 2, x), right, solve, symmetric=True
    )
    return found


def directions(group: Group, dim: int) -> Float[np.ndarray, "k d_and_1 d_and_1"]:
    """Velocities (A, b) of motions y ↦ Ay + b about a centre, as matrices [A b; 0 0]: turns in
    each plane, shifts along each axis, growth."""
    found = []
    for i in range(dim):
        for j in range(i):
            one = np.zeros((dim + 1, dim + 1))
            one[i, j], one[j, i] = 1, -1
            found += [one] if group.rotations else []
    for i in range(dim):
        one = np.zeros((dim + 1, dim + 1))
        one[i, dim] = 1
        found += [one] if group.translations else []
    if group.scale:
        found.append(np.diag([1.0] * dim + [0.0]))
    return np.stack(found)


def retract(
    group: Group, pose: Pose, small: Float[Array, "B k"], about: tuple[Array, Array]
) -> Pose:
    """Poses after a small motion about centres (B, d), of atoms within radii (B,), to second order
    in lengths `small`."""
    (centre, radius), dim = about, pose.translation.shape[-1]
    if not group.translations:
        centre = jnp.zeros_like(centre)
    velocity = jnp.tensordot(small, jnp.asarray(directions(group, dim), small.dtype), 1)
    turning, shift = velocity[:, :dim, :dim], velocity[:, :dim, dim]
    turning = turning / jnp.where(radius > 0, radius, 1)[:, None, None]
    growth = jnp.trace(turning, axis1=1, axis2=2) / dim
    unit = jnp.eye(dim, dtype=small.dtype)[None]
    turning = turning - growth[:, None, None] * unit
    motion = unit + turning + turning @ turning / 2
    scale = jnp.exp(growth)
    moved = jnp.matvec(motion, pose.translation - centre)
    return Pose(motion @ pose.rotation, centre + shift + scale[:, None] * moved, scale * pose.scale)
