"""Gibbs sums over the neighbourhood of a pattern, and the radii and β that satisfy their bounds.

They are functions of b = βc and of the distance s of a query from the pattern, for `basins.py` and
`certificates.py`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam._core.loops import bisect
from jdam.theory._neighbourhood import Neighbourhood

#: Numbers of bisection steps, and of fixed point iterations.
HALVINGS, DESCENTS = 40, 16


def step_bound(others: Neighbourhood, s: Float[Array, ""], b: Float[Array, ""]) -> Float[Array, ""]:
    """Compute Σₖ oddsₖ dₖ exp(−b dₖ(dₖ − 2s)), b = βc, with the maximum over dₖ for terms that
    increase in dₖ.
    """
    d = jnp.maximum(others.distance, (s + jnp.sqrt(s**2 + 2 / b)) / 2)
    return sum_exp(others.log_odds + finite_log(d) - b * finite_product(d, d - 2 * s))


def stable_radii(
    others: Neighbourhood, b: Float[Array, ""], slack: ArrayLike = 0.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the smallest and the largest s with `step_bound` + slack ≤ s; ∞ and 0 if there is
    none.

    Such s are less than d/2 for the nearest other pattern. There the bound is convex in s, so that
    the inequality holds for all s between the two.
    """

    def bound(s: Array) -> Array:
        return step_bound(others, s, b) + slack

    half = others.distance.min() / 2
    single = half == jnp.inf
    half = jnp.where(single, 1, half)
    slope = jax.grad(bound)
    middle, _ = bisect(lambda s: slope(s) < 1, jnp.zeros_like(half), half, HALVINGS)
    exists = bound(middle) <= middle
    largest, _ = bisect(lambda s: bound(s) <= s, middle, half, HALVINGS)
    _, smallest = bisect(lambda s: bound(s) > s, jnp.zeros_like(half), middle, HALVINGS)
    # Bisection has an absolute error; the fixed point iteration reduces the relative error of an s
    # that is much smaller than d.
    smallest = jax.lax.fori_loop(0, DESCENTS, lambda _, s: jnp.minimum(bound(s), s), smallest)
    smallest, largest = jnp.where(exists, smallest, jnp.inf), jnp.where(exists, largest, 0)
    return jnp.where(single, slack, smallest), jnp.where(single, jnp.inf, largest)


def minimiser_radius(others: Neighbourhood, b: Float[Array, ""]) -> Float[Array, ""]:
    """Return an s close to the smallest one with log(1 + Σₖ oddsₖ exp(−b dₖ(dₖ−2s)))/b ≤ s², which
    it satisfies; ∞ if there is none.
    """

    def squared(s: Array) -> Array:
        logs = others.log_odds - b * finite_product(others.distance, others.distance - 2 * s)
        return jnp.log1p(jnp.exp(jax.nn.logsumexp(logs))) / b

    half = others.distance.min() / 2
    half = jnp.where(half == jnp.inf, jnp.ones_like(half), half)
    # The iteration starts at the smallest radius of a grid that satisfies the inequality. The grid
    # ends at a thousandth of d/2.
    radii = half * jnp.asarray(0.5, half.dtype) ** jnp.arange(0, 10, 0.25, dtype=half.dtype)
    valid = jax.vmap(squared)(radii) <= radii**2
    start = jnp.where(valid, radii, jnp.inf).min()

    def body_fun(_: int, s: Array) -> Array:
        return jnp.minimum(s, jnp.sqrt(squared(s)))

    radius = jax.lax.fori_loop(0, DESCENTS, body_fun, jnp.where(start == jnp.inf, 0, start))
    return jnp.where(start == jnp.inf, jnp.inf, radius)


def least_beta(others: Neighbourhood, condition: Callable[[Array], Array]) -> Float[Array, ""]:
    """Return the smallest b = βc at which a `condition` holds that holds for all larger b too; 0
    without other patterns, and ∞ if there is no such b.
    """
    distance = others.distance.min()
    single, duplicate = distance == jnp.inf, distance == 0
    unit = 1 / jnp.where(single | duplicate, 1, distance) ** 2
    # The upper end of the interval of b d² exceeds the log-odds of the prior.
    most = 1e5 + 2 * jnp.maximum(others.log_odds.max(), 0)
    low, high = jnp.log(jnp.full_like(most, 1e-4)), jnp.log(most)
    _, log_beta = bisect(lambda x: ~condition(unit * jnp.exp(x)), low, high, HALVINGS)
    # The condition is not evaluated at the result: rounding of another program may decide a
    # comparison this close differently.
    exists = (log_beta < high) & ~duplicate
    return jnp.where(single, 0, jnp.where(exists, unit * jnp.exp(log_beta), jnp.inf))


def log_mass(others: Neighbourhood, b: Float[Array, ""]) -> Float[Array, ""]:
    """Compute log Σₖ oddsₖ exp(−b dₖ²)."""
    return jax.nn.logsumexp(others.log_odds - b * finite_product(others.distance, others.distance))


def sum_exp(logs: Float[Array, " K"]) -> Float[Array, ""]:
    """Compute Σ exp(logs), with the derivative 0 instead of NaN at −∞, for patterns that do not
    count.
    """
    off = logs == -jnp.inf
    return jnp.where(off, 0, jnp.exp(jnp.where(off, 0, logs))).sum()


def finite_product(x: Float[Array, " K"], y: Float[Array, " K"]) -> Float[Array, " K"]:
    """Compute x·y, and 0 where x or y is infinite, for patterns that do not count."""
    infinite = jnp.isinf(x) | jnp.isinf(y)
    return jnp.where(infinite, 0, jnp.where(infinite, 0, x) * jnp.where(infinite, 0, y))


def finite_log(d: Float[Array, " K"]) -> Float[Array, " K"]:
    """Compute log d, −∞ at d = 0 and 0 at d = ∞, with finite derivatives."""
    on = (d > 0) & (d < jnp.inf)
    return jnp.where(on, jnp.log(jnp.where(on, d, 1)), jnp.where(d == 0, -jnp.inf, 0))
