"""Clusters of weighted points by k-means, from k-means++ starts."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jdam._core.linalg import safe_log
from jdam._core.loops import repeat

#: Number of Lloyd iterations.
LLOYD = 10


@partial(jax.jit, static_argnames="num")
def k_means(
    key: Array, points: Float[Array, "n d"], weights: Float[Array, " n"], *, num: int
) -> Float[Array, "K d"]:
    """The centres of `num` clusters. Initial centres are points, each drawn with probability
    proportional to its weight times its squared distance from the centres before it."""
    keys = jax.random.split(key, num)
    first = points[jax.random.categorical(keys[0], safe_log(weights))]

    def add_centre(i: Int[Array, ""], centres: Float[Array, "K d"]) -> Float[Array, "K d"]:
        is_set = jnp.arange(num, dtype=jnp.int32) < i
        squares = jnp.where(is_set[None], _squared_distances(points, centres), jnp.inf).min(1)
        # With fewer distinct points than clusters all distances vanish at some point.
        odds = jnp.where((weights * squares).sum() > 0, weights * squares, weights)
        return centres.at[i].set(points[jax.random.categorical(keys[i], safe_log(odds))])

    def lloyd_step(centres: Float[Array, "K d"]) -> Float[Array, "K d"]:
        masses = assigned_masses(points, weights, centres)
        total = masses.sum(0)[:, None]
        return jnp.where(total > 0, masses.T @ points / jnp.where(total > 0, total, 1), centres)

    start = jnp.broadcast_to(first, (num, first.size))
    centres = jax.lax.fori_loop(1, num, add_centre, start)
    result: Array = repeat(LLOYD, lloyd_step, centres, points, weights)
    return result


def assigned_masses(
    points: Float[Array, "n d"], weights: Float[Array, " n"], centres: Float[Array, "K d"]
) -> Float[Array, "n K"]:
    """The weight of each point in the column of its nearest centre, 0 in the others."""
    nearest = _squared_distances(points, centres).argmin(1)
    return weights[:, None] * jax.nn.one_hot(nearest, len(centres), dtype=centres.dtype)


def _squared_distances(
    points: Float[Array, "n d"], centres: Float[Array, "K d"]
) -> Float[Array, "n K"]:
    gaps = points[:, None] - centres[None]
    return jnp.vecdot(gaps, gaps)
