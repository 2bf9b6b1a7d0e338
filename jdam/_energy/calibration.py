"""Prediction sets of guaranteed coverage, by split conformal prediction."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, PyTree

from jdam._core import checks
from jdam._core.batching import batch_size, map_in_batches, masked_cond
from jdam._core.compile import compiled, working_dtype
from jdam._core.mesh import all_rows
from jdam._energy.average import compare, view_of
from jdam._energy.branch_and_bound import bounds_of, rows_of
from jdam._energy.certified import Certified, bound_all, choose
from jdam._energy.choosing import resolve_targets
from jdam._energy.energy import (
    divergences_of,
    fit_queries,
    fit_query,
    inverse_temperature,
)
from jdam._energy.nearest import nearest
from jdam._energy.search import Exhaustive, Search
from jdam._energy.separation import LogSumExp, with_prior
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory


class Calibration(eqx.Module):
    """Scores of n queries whose patterns are known; the result of `jdam.calibrate`.

    memory:    the memory.
    beta:      the β of the Gibbs weights.
    scores:    (n,), −log w of the pattern (or class) that each query belongs to, in ascending
               order.
    distances: (n,), the least divergence of each query to any pattern, in ascending order.
    classes:   (N,), the class of each pattern if prediction sets consist of classes; else None.
    search:    the search for patterns.
    """

    memory: Memory
    beta: Float[Array, ""]
    scores: Float[Array, " n"]
    distances: Float[Array, " n"]
    classes: Int[Array, " N"] | None = None
    search: Search = eqx.field(static=True, default=Exhaustive())

    def prediction_set(self, query: AnyMeasure, alpha: ArrayLike) -> Bool[Array, " N"]:
        """Return the set of patterns that the query may belong to: {i : −log wᵢ(ξ) ≤ q}, where q is
        the ⌈(n+1)(1−α)⌉-th smallest score, or ∞ if this rank exceeds n.

        If the query is exchangeable with those of the calibration, the set contains its pattern
        with probability ≥ 1−α, however wrong the weights are (split conformal prediction; Vovk,
        Gammerman and Shafer, Algorithmic Learning in a Random World, 2005). With classes, w is
        summed over a class, and the set contains all patterns of its classes.

        `Certified` has the same coverage, because its set contains that of `Exhaustive`. Let C be
        the patterns that were compared, lᵢ ≤ D̃ᵢ = Dᵢ − β⁻¹ log πᵢ the lower bounds for all
        patterns, which are equalities on C, Z_C = Σ_{i∈C} exp(−βD̃ᵢ) and U = Σ_{i∉C} exp(−βlᵢ). As
        Z_C ≤ Σᵢ exp(−βD̃ᵢ) ≤ Z_C + U,

            log Z_C − log Σ exp(−βlᵢ)  ≤  −log w  ≤  log(Z_C + U) − log Σ exp(−βD̃ᵢ),

        where the sum on the left is over the pattern or its class, and the sum on the right over
        any part of it. The calibration uses the right side for patterns that were compared,
        including the target or one of its class, so that q is at least the exhaustive one. The set
        uses the left side, so that it contains every pattern whose score is ≤ q. If
        neglected = U/(Z_C + U) ≤ tol, both sides are within −log(1 − tol) of the score of a pattern
        that was compared, and other patterns are in the set only if q ≥ log(1/tol − 1).

        **Arguments:**

        - `query`: one measure; `jax.vmap` takes batches.
        - `alpha`: a scalar in (0, 1), the allowed probability of missing the pattern.

        **Returns:** (N,), bool.

        **Raises:** as `jdam.divergences`; `ValueError` for an `alpha` outside (0, 1).
        """
        query = fit_query(self.memory, query)
        level = jnp.asarray(alpha, working_dtype(self.scores.dtype))
        if checks.is_concrete(level) and not 0 < float(level) < 1:
            raise ValueError(f"alpha must be in (0, 1); got {alpha}")
        scores = _score(self.memory, query, self.beta, self.classes, search=self.search)
        num = len(self.scores)
        # The margin keeps the rounding of 1 − α from raising the rank.
        rank = jnp.ceil((num + 1) * (1 - level) - 1e-3).astype(jnp.int32)
        limit = jnp.where(rank > num, jnp.inf, self.scores[jnp.clip(rank - 1, 0, num - 1)])
        members: Array = ~(scores > limit)  # NaN proves nothing
        return members

    def p_value(self, query: AnyMeasure) -> Float[Array, ""]:
        """Return the p-value of the hypothesis that the query belongs to one of the patterns:

            (1 + #{c : minᵢ D(ξ_c, Xᵢ) ≥ minᵢ D(ξ, Xᵢ)})/(n + 1).

        Among queries that are exchangeable with those of the calibration, a fraction of at most α
        has p ≤ α, so that a small value is evidence that the query belongs to no pattern. The least
        divergence is exact for every search.

        **Arguments:**

        - `query`: one measure; `jax.vmap` takes batches.

        **Returns:** a scalar in (0, 1].

        **Raises:** as `jdam.divergences`.
        """
        _, least = nearest(self.memory, query, search=self.search)
        num_farther = (self.distances >= least[0]).sum()
        num_farther = num_farther.astype(working_dtype(self.distances.dtype))
        return (1 + num_farther) / (len(self.distances) + 1)


def calibrate(
    memory: Memory,
    queries: AnyMeasure,
    targets: ArrayLike,
    beta: ArrayLike,
    *,
    pattern_labels: ArrayLike | None = None,
    search: Search | None = None,
) -> Calibration:
    """Compute scores of queries whose patterns are known, from which later queries get prediction
    sets and p-values of guaranteed coverage.

    The queries must be exchangeable with later ones, and must not have been used to choose β or to
    learn the memory. n queries suffice for coverages up to n/(n+1).

    **Arguments:**

    - `memory`, `beta`: as in `energy`.
    - `queries`: measures with one batch axis (n,), or a list.
    - `targets`: (n,), the indices of the patterns that the queries belong to, or their classes.
    - `pattern_labels`: (N,), the class of each pattern, if `targets` are classes.
    - `search`: `Exhaustive()` compares each query with all patterns; `Certified()` compares as many
      as it needs to bound the weight of the others, and its sets contain those of `Exhaustive`
      (`Calibration.prediction_set` has the proof). None chooses as `recall` does. Sharded memories
      and geometries without bounds are always searched exhaustively.

    **Returns:** a `Calibration`.

    **Raises:** as `pairwise`; `TypeError`, `ValueError` or `IndexError` for targets that are no
    indices of patterns, or labels that no pattern has; `TypeError` for another `search`.
    """
    queries = fit_queries(memory, queries)
    search = choose(search, memory, LogSumExp())
    if memory.layout is not None or not bounds_of(memory):
        search = Exhaustive()
    beta = inverse_temperature(memory, beta)
    if batch_size(queries) == 0:
        raise ValueError("queries must hold at least one query; got 0")
    target_indices, classes = resolve_targets(memory, targets, pattern_labels, batch_size(queries))
    scores, distances = _scores(memory, queries, beta, target_indices, classes, search=search)
    return Calibration(memory, beta, jnp.sort(scores), jnp.sort(distances), classes, search)


@compiled(static=("search",))
def _scores(
    memory: Memory,
    queries: AnyMeasure,
    beta: Array,
    target_indices: Int[Array, " n"],
    classes: Int[Array, " N"] | None,
    *,
    search: Search,
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    def one(row: tuple[AnyMeasure, Array]) -> tuple[Array, Array]:
        query, target = row
        if not isinstance(search, Certified):
            divergences = divergences_of(memory, query)
            return _exact_scores(divergences, memory, beta, classes)[target], divergences.min()
        _, score = _score_bounds(search, target, (memory, query, beta, classes))
        return score, nearest(memory, query, search=search)[1][0]

    rows = queries, target_indices
    at_once = search.query_batch_size(memory)
    result: tuple[Array, Array] = map_in_batches(one, at_once, rows)
    return result


@compiled(static=("search",), batch_size=lambda memory, search: search.query_batch_size(memory))
def _score(
    memory: Memory,
    query: AnyMeasure,
    beta: Array,
    classes: Int[Array, " N"] | None,
    *,
    search: Search,
) -> Float[Array, " N"]:
    if not isinstance(search, Certified):
        return _exact_scores(divergences_of(memory, query), memory, beta, classes)
    return _score_bounds(search, jnp.int32(0), (memory, query, beta, classes))[0]


def _score_bounds(
    search: Certified, target: Int[Array, ""], args: tuple[Memory, AnyMeasure, Array, PyTree]
) -> tuple[Float[Array, " N"], Float[Array, ""]]:
    """Return lower bounds on the scores −log w of each pattern or its class, and an upper bound on
    that of the target or its class, from the patterns that the search compares, and lower bounds on
    D for the others.
    """
    memory, query, beta, classes = args
    bounded = bound_all(search, memory, query, beta)
    logits = -beta * bounded.lower
    log_compared = -beta * bounded.energy
    log_neglected = jax.nn.logsumexp(jnp.where(bounded.compared, -jnp.inf, logits))
    # If the class of the target has patterns that were not compared, the one of the lowest bound is
    # compared too.
    in_class = (
        jnp.arange(len(logits), dtype=jnp.int32) == target
        if classes is None
        else classes == classes[target]
    )
    nearest_other = (
        jnp.where(in_class & ~bounded.compared, logits, -jnp.inf).argmax().astype(jnp.int32)
    )
    block = rows_of(memory, nearest_other[None], jnp.ones(1, bool))
    comparison = compare(memory.geometry, view_of(memory.geometry, query), block.patterns)
    logit = -beta * with_prior(comparison.divergence, block.log_prior, beta)[0]
    logit = jnp.where((in_class & ~bounded.compared)[nearest_other], logit, -jnp.inf)
    log_class_mass = jnp.logaddexp(
        logit, jax.nn.logsumexp(jnp.where(in_class & bounded.compared, logits, -jnp.inf))
    )
    log_all = jnp.logaddexp(log_compared, log_neglected)
    bounds = log_compared - _by_class(logits, classes), log_all - log_class_mass
    if not search.falls_back(memory):
        return bounds
    at_once = memory.geometry.batch_sizes(memory.patterns).queries
    unproved = ~(log_neglected - log_all <= math.log(search.tol))
    return masked_cond(unproved, _exact_bounds, bounds, target, args, at_once=at_once)


def _exact_bounds(
    target: Int[Array, ""], args: tuple[Memory, AnyMeasure, Array, PyTree]
) -> tuple[Float[Array, " N"], Float[Array, ""]]:
    """Return the exact scores in place of both bounds."""
    memory, query, beta, classes = args
    scores = _exact_scores(divergences_of(memory, query), memory, beta, classes)
    return scores, scores[target]


def _exact_scores(
    divergences: Float[Array, " N"], memory: Memory, beta: Array, classes: Int[Array, " N"] | None
) -> Float[Array, " N"]:
    """Return −log w of each pattern, or of its class."""
    logits = -beta * with_prior(divergences, all_rows(memory.log_prior, memory.layout), beta)
    return jax.nn.logsumexp(logits) - _by_class(logits, classes)


def _by_class(logits: Float[Array, " N"], classes: Int[Array, " N"] | None) -> Float[Array, " N"]:
    """Return log Σ exp(logits) over the class of each pattern."""
    if classes is None:
        return logits
    maxima = jax.ops.segment_max(logits, classes, len(logits))[classes]
    maxima = jnp.where(maxima == -jnp.inf, 0, maxima)
    sums = jax.ops.segment_sum(jnp.exp(logits - maxima), classes, len(logits))[classes]
    return maxima + jnp.log(sums)
