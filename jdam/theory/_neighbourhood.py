"""Distances from one pattern to all others, as lower bounds from the certified search, and Gibbs
sums over them, with the radii and β that satisfy their bounds.

All bounds of `basins.py` and `certificates.py` decrease with these distances, so that lower bounds
may take their place, and few exact comparisons are needed. The sums are functions of b = βc and of
the distance s of a query from the pattern.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int, PyTree

from jdam._core.batching import map_in_batches
from jdam._core.linalg import rounding, squared_distances
from jdam._core.loops import bisect
from jdam._energy.certified import Certified, bound_all
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory
from jdam._memory.memory import check_memory as check_is_memory

T = TypeVar("T")
#: The search makes few comparisons, since it runs once for each pattern.
SEARCH = Certified(num_candidates=4, max_candidates=64, tol=1e-3)
#: Number of nearest patterns that `condensed` keeps as they are, and number of its groups.
NEAREST, SHELLS = 32, 224
#: Numbers of bisection steps, and of fixed point iterations.
HALVINGS, DESCENTS = 40, 16


class Neighbourhood(NamedTuple):
    """The other patterns k of a pattern i, or groups of them."""

    #: Lower bounds on d(Xᵢ, Xₖ) = √(D/c); ∞ for entries that do not count: pattern i itself,
    #: patterns of prior 0, free slots and empty groups.
    distance: Float[Array, " K"]
    #: log πₖ/πᵢ, of a group the logarithm of the sum; −∞ where the distance is ∞.
    log_odds: Float[Array, " K"]


def check_memory(memory: PyTree, *, metric: bool = False) -> None:
    """Raise `TypeError` unless D of the memory's geometry is at least c|Δm|², or with `metric` c
    times a squared metric; raise `ValueError` for a sharded memory."""
    check_is_memory(memory)
    if memory.geometry.cost_scale is None or (metric and not memory.geometry.is_squared_metric):
        condition = "a squared metric" if metric else "at least a multiple of |Δm|²"
        raise TypeError(
            f"memory must have a geometry whose D is {condition}; got {memory.geometry}"
        )
    if memory.layout is not None:
        raise ValueError("memory must be in one piece; got a sharded one")


def cost_scale(memory: Memory) -> float:
    """Return the constant c in D ≥ c·d²."""
    assert memory.geometry.cost_scale is not None
    return memory.geometry.cost_scale


def neighbourhood(
    memory: Memory, index: Int[Array, ""], beta: Float[Array, ""], *, triangle: bool = True
) -> Neighbourhood:
    """Return the other patterns of the pattern at `index`: distances √(D/c), exact where they
    matter to Gibbs sums at β, and otherwise bounded from below.

    If `triangle` is True and D is not a squared metric, the distances are those of the means, for
    which the triangle inequality holds.
    """
    is_self = jnp.arange(memory.capacity, dtype=jnp.int32) == index
    measure = memory[index]
    if triangle and not memory.geometry.is_squared_metric:
        distance = distances_of_means(memory, measure)
    else:
        off = is_self if memory.occupied is None else is_self | ~memory.occupied
        prior = jnp.zeros(memory.capacity, memory.dtype)
        others = replace(memory, log_prior=jnp.where(off, -jnp.inf, prior))
        measure = memory.geometry.match(measure, memory.patterns)
        floor = bound_all(SEARCH, others, measure, beta).lower
        distance = jnp.sqrt(jnp.maximum(floor, 0) / cost_scale(memory))
    log_odds = jnp.zeros(memory.capacity, memory.dtype)
    if memory.log_prior is not None:
        # For a pattern of prior 0 the odds of the others are infinite: the largest finite number
        # stands for them.
        log_odds = memory.log_prior - memory.log_prior[index]
        largest = float(jnp.finfo(log_odds.dtype).max) / 4
        log_odds = jnp.where(memory.log_prior[index] == -jnp.inf, largest, log_odds)
    off = is_self | (log_odds == -jnp.inf)
    if memory.occupied is not None:
        off |= ~memory.occupied[index]  # a free slot has no neighbours
    return Neighbourhood(jnp.where(off, jnp.inf, distance), jnp.where(off, -jnp.inf, log_odds))


def distances_of_means(memory: Memory, measure: AnyMeasure) -> Float[Array, " N"]:
    """Compute |m − mₖ| minus its rounding error, for the means mₖ of all patterns."""
    squares = squared_distances(measure.mean, memory.patterns.mean)
    return jnp.sqrt(squares * (1 - rounding(measure.dim, squares.dtype)))


def condensed(patterns: Neighbourhood) -> Neighbourhood:
    """Return the neighbourhood with all but the `NEAREST` patterns in `SHELLS` groups. Each group
    has the distance of its nearest pattern, so that sums of decreasing functions of the distance
    are bounded from above.
    """
    num = patterns.distance.size
    if num <= NEAREST + SHELLS:
        return patterns
    nearness, index = jax.lax.top_k(-patterns.distance, NEAREST + 1)
    near = Neighbourhood(-nearness[:-1], patterns.log_odds[index[:-1]])
    rest = patterns.log_odds.at[index[:-1]].set(-jnp.inf)
    inner = -nearness[-1]
    finite = jnp.isfinite(patterns.distance)
    outer = jnp.where(finite, patterns.distance, inner).max()
    # The shells have equal width in log d.
    positive = jnp.where(inner > 0, inner, 1)
    width = jnp.log(jnp.where(inner > 0, outer / positive, 1)) / SHELLS
    depth = jnp.log(jnp.where(finite & (inner > 0), patterns.distance, positive) / positive)
    shell = jnp.floor(depth / jnp.where(width > 0, width, 1)).astype(jnp.int32)
    shell = jnp.clip(shell, 0, SHELLS - 1)
    top = jnp.where(rest > -jnp.inf, rest, jnp.finfo(rest.dtype).min).max()
    masses = jnp.zeros(SHELLS, rest.dtype).at[shell].add(jnp.exp(rest - top))
    nearest = jnp.full(SHELLS, jnp.inf, rest.dtype)
    nearest = nearest.at[shell].min(jnp.where(rest > -jnp.inf, patterns.distance, jnp.inf))
    log_odds = jnp.where(masses > 0, jnp.log(jnp.where(masses > 0, masses, 1)) + top, -jnp.inf)
    return Neighbourhood(
        *(jnp.concatenate(pair) for pair in zip(near, (nearest, log_odds), strict=True))
    )


def over_patterns(
    memory: Memory,
    function: Callable[[Neighbourhood], T],
    beta: Float[Array, "*N"] | None = None,
    *,
    triangle: bool = True,
) -> T:
    """Return the values (N, …) of `function` at the neighbourhood of each pattern.

    `beta` is a scalar or (N,). If None it is so large that only the nearest pattern matters.
    """

    def of_pattern(item: tuple[Array, Array]) -> T:
        return function(neighbourhood(memory, *item, triangle=triangle))

    indices = jnp.arange(memory.capacity, dtype=jnp.int32)
    coldest = math.sqrt(float(jnp.finfo(memory.dtype).max))
    beta = jnp.asarray(coldest, memory.dtype) if beta is None else beta
    betas = jnp.broadcast_to(beta, indices.shape)
    return map_in_batches(of_pattern, SEARCH.query_batch_size(memory), (indices, betas))


def reliable_beta(memory: Memory, *, triangle: bool = True) -> Float[Array, " N"]:
    """Return the β of each pattern at which β times D to the nearest other pattern is log N + 5.
    Recall is reliable there, and few other patterns matter to Gibbs sums.
    """
    nearest = over_patterns(memory, lambda others: others.distance.min(), triangle=triangle)
    num = memory.capacity if memory.size is None else memory.size
    target = jnp.log(jnp.asarray(num, memory.dtype)) + 5
    positive = (nearest > 0) & (nearest < jnp.inf)
    return target / (cost_scale(memory) * jnp.where(positive, nearest, 1) ** 2)


# ------------------------------------------------------------------ Gibbs sums


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
