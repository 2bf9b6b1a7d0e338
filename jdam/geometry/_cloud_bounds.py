"""Lower bounds on S_ε between a query and clouds, rounding included, for `Certified` search."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam._core.batching import map_in_batches
from jdam._core.linalg import rounding, safe_sqrt
from jdam._entropic.bounds import cost_of_masses
from jdam._entropic.problem import Marginals, Pair
from jdam._measures.point_cloud import PointCloud
from jdam.geometry._clouds import View, radius_of, relative_coordinates, relative_to
from jdam.geometry.protocol import Patterns


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
    lift: Callable[[PointCloud], PointCloud],
    marginals: Marginals,
    view: View,
    patterns: Patterns,
) -> Float[Array, " B"]:
    """Compute ½|m_q − m_X|² plus S_ε of the centred clouds, with a dual value in place of OT_ε; for
    relaxed marginals, of the clouds where they are.

    **Arguments:**

    - `dual_value`: pair, warm start ↦ a lower bound on OT_ε.
    - `lift`: makes features coordinates.
    - `marginals`, `view`, `patterns`: the problem."""
    prepared, clouds = patterns.prepared, lift(patterns.measures)
    centred = relative_to(prepared.centre, clouds, marginals.epsilon)
    _, means, atoms = relative_coordinates(
        marginals, view, prepared.centre, centred, clouds.weights
    )

    def dual(cloud: tuple[Array, Array, Array]) -> Array:
        points, weights, potential = cloud
        query = view.centred, view.query.weights
        return dual_value(Pair(*query, points, weights, marginals), potential)

    at_once = max(1, 2**20 // (view.query.num_atoms * clouds.num_atoms))
    guess = prepared.self_transport.potential if patterns.guess is None else patterns.guess
    duals = map_in_batches(dual, at_once, (atoms, clouds.weights, guess))
    selves = (view.self_transport.cost + prepared.self_transport.cost) / 2
    error = rounding(clouds.num_atoms, duals.dtype) * (selves + jnp.abs(means))
    result: Array = means + duals - selves - error
    return result
