"""What is known of the other patterns, seen from one: distances that they surely have."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jdam._core.batching import map_in_batches
from jdam._core.linalg import rounding
from jdam._energy.certified import Certified, bound_all
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory
from jdam._memory.memory import check_memory as check_is_memory
from jdam.geometry.euclidean import squared_distances

T = TypeVar("T")
#: Few comparisons, for there are as many searches as patterns.
SEARCH = Certified(num_candidates=4, max_candidates=64, tol=1e-3)
#: How many of the nearest patterns to keep one by one, and in how many shells the others.
NEAREST, SHELLS = 32, 224


class Neighbourhood(NamedTuple):
    """Other patterns k, or groups of them, as pattern i sees them."""

    distance: Float[Array, " K"]  # lower bounds on d(Xᵢ, Xₖ); ∞ where there is none
    log_odds: Float[Array, " K"]  # log πₖ/πᵢ, of groups the sum's; −∞ where there is none


def check_memory(memory: Any, *, metric: bool = False) -> None:
    """Raise unless theory knows something of the memory."""
    check_is_memory(memory)
    if memory.geometry.cost_scale is None or (metric and not memory.geometry.is_squared_metric):
        what = "a squared metric" if metric else "at least a multiple of |Δm|²"
        raise TypeError(f"memory must have a geometry whose D is {what}; got {memory.geometry}")
    if memory.layout is not None:
        raise ValueError("memory must be in one piece; got a sharded one")


def cost_scale(memory: Memory) -> float:
    """The c of D ≥ c·d²."""
    assert memory.geometry.cost_scale is not None
    return memory.geometry.cost_scale


def neighbourhood(
    memory: Memory, index: Int[Array, ""], beta: Float[Array, ""], *, triangle: bool = True
) -> Neighbourhood:
    """All patterns as the one at `index` sees them: √(D/c), exact where it matters at β.

    If D is no squared metric and a `triangle` inequality is needed, the distances of means."""
    own = jnp.arange(memory.capacity, dtype=jnp.int32) == index
    measure = memory[index]
    if triangle and not memory.geometry.is_squared_metric:
        distance = distances_of_means(memory, measure)
    else:
        off = own if memory.occupied is None else own | ~memory.occupied
        prior = jnp.zeros(memory.capacity, memory.dtype)
        others = replace(memory, log_prior=jnp.where(off, -jnp.inf, prior))
        measure = memory.geometry.match(measure, memory.patterns)
        floor = bound_all(SEARCH, others, measure, beta).lower
        distance = jnp.sqrt(jnp.maximum(floor, 0) / cost_scale(memory))
    log_odds = jnp.zeros(memory.capacity, memory.dtype)
    if memory.log_prior is not None:
        # To a pattern that is switched off all others are infinitely likely.
        log_odds = memory.log_prior - memory.log_prior[index]
        most = float(jnp.finfo(log_odds.dtype).max) / 4
        log_odds = jnp.where(memory.log_prior[index] == -jnp.inf, most, log_odds)
    off = own | (log_odds == -jnp.inf)
    if memory.occupied is not None:
        off |= ~memory.occupied[index]  # to a free slot there are no others
    return Neighbourhood(jnp.where(off, jnp.inf, distance), jnp.where(off, -jnp.inf, log_odds))


def distances_of_means(memory: Memory, measure: AnyMeasure) -> Float[Array, " N"]:
    """|m − mₖ|, less its rounding."""
    squares = squared_distances(measure.mean, memory.patterns.mean)
    return jnp.sqrt(squares * (1 - rounding(measure.dim, squares.dtype)))


def condensed(patterns: Neighbourhood) -> Neighbourhood:
    """The same with far patterns in groups, as if all of a group were as near as its nearest:
    what falls with distance is bounded by it from above."""
    num = patterns.distance.size
    if num <= NEAREST + SHELLS:
        return patterns
    nearness, index = jax.lax.top_k(-patterns.distance, NEAREST + 1)
    near = Neighbourhood(-nearness[:-1], patterns.log_odds[index[:-1]])
    rest = patterns.log_odds.at[index[:-1]].set(-jnp.inf)
    inner = -nearness[-1]
    finite = jnp.isfinite(patterns.distance)
    outer = jnp.where(finite, patterns.distance, inner).max()
    # Shells of equal width in log d.
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
    learn: Callable[[Neighbourhood], T],
    beta: Float[Array, "*N"] | None = None,
    *,
    triangle: bool = True,
) -> T:
    """`learn` of what is around each pattern, (N, …), at one β or one for each; if None, at one at
    which only the nearest matters."""

    def one(item: tuple[Array, Array]) -> T:
        return learn(neighbourhood(memory, *item, triangle=triangle))

    indices = jnp.arange(memory.capacity, dtype=jnp.int32)
    coldest = math.sqrt(float(jnp.finfo(memory.dtype).max))
    beta = jnp.asarray(coldest, memory.dtype) if beta is None else beta
    betas = jnp.broadcast_to(beta, indices.shape)
    return map_in_batches(one, SEARCH.query_batch_size(memory), (indices, betas))


def reliable_beta(memory: Memory, *, triangle: bool = True) -> Float[Array, " N"]:
    """The β of each pattern at which β times D to the nearest other is log N + 5: where recall is
    reliable, and beyond which few others matter."""
    nearest = over_patterns(memory, lambda others: others.distance.min(), triangle=triangle)
    num = memory.capacity if memory.size is None else memory.size
    wanted = jnp.log(jnp.asarray(num, memory.dtype)) + 5
    known = (nearest > 0) & (nearest < jnp.inf)
    return wanted / (cost_scale(memory) * jnp.where(known, nearest, 1) ** 2)
