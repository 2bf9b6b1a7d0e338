"""Prediction sets with a promised coverage, by split conformal prediction."""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from jdam._core import checks
from jdam._core.batching import batch_size, map_in_batches, masked_cond
from jdam._core.compile import compiled
from jdam._core.mesh import all_rows
from jdam._energy.average import compare, view_of
from jdam._energy.branch_and_bound import bounds_of, rows_of
from jdam._energy.certified import Certified, bound_all, choose
from jdam._energy.choosing import owners
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
    """What `jdam.calibrate` learns of n queries whose patterns are known.

    memory:    the memory.
    beta:      the β of the Gibbs weights.
    scores:    (n,), −log w of the pattern (or class) that each query belongs to, in rising order.
    distances: (n,), the least divergence of each query to any pattern, in rising order.
    classes:   (N,), the class of each pattern, where sets are of classes; else None.
    search:    how patterns are found.
    """

    memory: Memory
    beta: Float[Array, ""]
    scores: Float[Array, " n"]
    distances: Float[Array, " n"]
    classes: Int[Array, " N"] | None = None
    search: Search = eqx.field(static=True, default=Exhaustive())

    def prediction_set(self, query: AnyMeasure, alpha: ArrayLike) -> Bool[Array, " N"]:
        """Which patterns the query may belong to: {i : −log wᵢ(ξ) ≤ q}, q being the
        ⌈(n+1)(1−α)⌉-th least score, or ∞ where that is more than n.

        If the query is exchangeable with those of the calibration, the set holds its pattern with
        probability ≥ 1−α, however wrong the memory's weights are (split conformal prediction; Vovk,
        Gammerman and Shafer, Algorithmic Learning in a Random World, 2005). With classes, w is
        summed over a class, and the set holds all patterns of its classes.

        With `Certified` the promise is the same, since the set holds that of `Exhaustive`. Let C be
        the patterns that were compared, lᵢ ≤ D̃ᵢ = Dᵢ − β⁻¹ log πᵢ the bounds on all, equal on C,
        Z_C = Σ_{i∈C} exp(−βD̃ᵢ) and U = Σ_{i∉C} exp(−βlᵢ). As Z_C ≤ Σᵢ exp(−βD̃ᵢ) ≤ Z_C + U,

            log Z_C − log Σ exp(−βlᵢ)  ≤  −log w  ≤  log(Z_C + U) − log Σ exp(−βD̃ᵢ),

        with sums over the pattern or its class on the left, over any part of it on the right.
        Calibration takes the right side over what was compared, the owner or one of its class
        among them, so that q is at least the exhaustive one. A set takes the left side, so that it
        holds every pattern whose score is ≤ q. Where neglected = U/(Z_C + U) ≤ tol, both sides are
        within −log(1 − tol) of the score of a pattern that was compared, and others enter the set
        only if q ≥ log(1/tol − 1).

        **Arguments:** one `query`; `alpha` in (0, 1), a scalar. `jax.vmap` takes batches.

        **Raises:** as `jdam.divergences`; `ValueError` for an `alpha` outside (0, 1).
        """
        query = fit_query(self.memory, query)
        level = jnp.asarray(alpha, self.scores.dtype)
        if checks.is_concrete(level) and not 0 < float(level) < 1:
            raise ValueError(f"alpha must be in (0, 1); got {alpha}")
        scores = _score(self.memory, query, self.beta, self.classes, search=self.search)
        num = len(self.scores)
        # Rounding of 1 − α must not cost a rank.
        wanted = (num + 1) * (1 - level) - 1e-3
        rank = jnp.ceil(wanted).astype(jnp.int32)
        limit = jnp.where(rank > num, jnp.inf, self.scores[jnp.clip(rank - 1, 0, num - 1)])
        members: Array = ~(scores > limit)  # NaN proves nothing
        return members

    def p_value(self, query: AnyMeasure) -> Float[Array, ""]:
        """How unusual the query is as one that belongs to any of the patterns:
        (1 + #{c : minᵢ D(ξ_c, Xᵢ) ≥ minᵢ D(ξ, Xᵢ)})/(n + 1).

        Of queries exchangeable with those of the calibration at most a share α has p ≤ α: small
        values say that the query belongs to none. The least divergence is exact with every search.

        **Raises:** as `jdam.divergences`.
        """
        _, least = nearest(self.memory, query, search=self.search)
        farther = (self.distances >= least[0]).sum()
        return (1 + farther.astype(self.distances.dtype)) / (len(self.distances) + 1)


def calibrate(
    memory: Memory,
    queries: AnyMeasure,
    targets: ArrayLike,
    beta: ArrayLike,
    *,
    pattern_labels: ArrayLike | None = None,
    search: Search | None = None,
) -> Calibration:
    """Scores of queries whose patterns are known, by which later queries get prediction sets and
    p-values that keep their promise.

    The queries must be exchangeable with those that will be asked, and must not have chosen β or
    taught the memory. n of them promise coverages up to n/(n+1).

    **Arguments:**

    - `memory`, `beta` as in `energy`.
    - `queries`: measures with one batch axis (n,), or a list.
    - `targets` (n,): the indices of the patterns that they belong to, or their classes.
    - `pattern_labels` (N,): the class of each pattern, where `targets` are classes.
    - `search`: `Exhaustive()` compares each query with all patterns, `Certified()` with as many as
      it needs to bound what the others weigh: sets then hold those of `Exhaustive`, and keep the
      promise (`Calibration.prediction_set` has the proof). None chooses as `recall` does. A sharded
      memory and a geometry without bounds are searched exhaustively in any case.

    **Returns:** a `Calibration`.

    **Raises:** as `pairwise`; `TypeError`, `ValueError` or `IndexError` for targets that are no
    indices of patterns, or labels of none; `TypeError` for another `search`.
    """
    queries = fit_queries(memory, queries)
    search = _able(search, memory)
    beta = inverse_temperature(memory, beta)
    if batch_size(queries) == 0:
        raise ValueError("queries must hold at least one query; got 0")
    owner, classes = owners(memory, targets, pattern_labels, batch_size(queries))
    scores, distances = _scores(memory, queries, beta, owner, classes, search=search)
    return Calibration(memory, beta, jnp.sort(scores), jnp.sort(distances), classes, search)


def _able(search: Search | None, memory: Memory) -> Search:
    """That search, or an exhaustive one where bounds are not to be had."""
    search = choose(search, memory, LogSumExp())
    if not isinstance(search, Exhaustive | Certified):
        kinds = "jdam.Exhaustive() or jdam.Certified()"
        raise TypeError(f"search must be {kinds}, or None; got {search!r}")
    return search if memory.layout is None and bounds_of(memory) else Exhaustive()


class _Bounded(NamedTuple):
    """Of one query, −log w of every pattern or its class from below; and from above of its own."""

    least: Float[Array, " N"]
    most: Float[Array, ""]


@compiled(static=("search",))
def _scores(
    memory: Memory,
    queries: AnyMeasure,
    beta: Array,
    owner: Int[Array, " n"],
    classes: Int[Array, " N"] | None,
    *,
    search: Search,
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    def one(row: tuple[AnyMeasure, Array]) -> tuple[Array, Array]:
        query, own = row
        if not isinstance(search, Certified):
            divergences = divergences_of(memory, query)
            return _exactly(divergences, memory, beta, classes)[own], divergences.min()
        score = _bounded(search, own, (memory, query, beta, classes)).most
        return score, nearest(memory, query, search=search)[1][0]

    rows = queries, owner
    at_once = search.query_batch_size(memory)
    found: tuple[Array, Array] = map_in_batches(one, at_once, rows)
    return found


def _query_batch_size(memory: Memory, *, search: Search) -> int:
    return search.query_batch_size(memory)


@compiled(static=("search",), batch_size=_query_batch_size)
def _score(
    memory: Memory,
    query: AnyMeasure,
    beta: Array,
    classes: Int[Array, " N"] | None,
    *,
    search: Search,
) -> Float[Array, " N"]:
    if not isinstance(search, Certified):
        return _exactly(divergences_of(memory, query), memory, beta, classes)
    return _bounded(search, jnp.int32(0), (memory, query, beta, classes)).least


def _bounded(
    search: Certified, own: Int[Array, ""], args: tuple[Memory, AnyMeasure, Array, Any]
) -> _Bounded:
    """By the patterns that the search compares, and bounds on the others."""
    memory, query, beta, classes = args
    seen = bound_all(search, memory, query, beta)
    logits = -beta * seen.lower
    inside, outside = -beta * seen.energy, _sum(jnp.where(seen.compared, -jnp.inf, logits))
    # Where its own patterns were not compared, the nearest of them by its bound is.
    owned = (
        jnp.arange(len(logits), dtype=jnp.int32) == own
        if classes is None
        else classes == classes[own]
    )
    other = jnp.where(owned & ~seen.compared, logits, -jnp.inf).argmax().astype(jnp.int32)
    block = rows_of(memory, other[None], jnp.ones(1, bool))
    compared = compare(memory.geometry, view_of(memory.geometry, query), block.patterns)
    exact = -beta * with_prior(compared.divergence, block.log_prior, beta)[0]
    exact = jnp.where((owned & ~seen.compared)[other], exact, -jnp.inf)
    mass = jnp.logaddexp(exact, _sum(jnp.where(owned & seen.compared, logits, -jnp.inf)))
    found = _Bounded(inside - _of_classes(logits, classes), jnp.logaddexp(inside, outside) - mass)
    if not search.falls_back(memory):
        return found
    at_once = memory.geometry.batch_sizes(memory.patterns).queries
    unproved = ~(outside - jnp.logaddexp(inside, outside) <= math.log(search.tol))
    return masked_cond(unproved, _by_all, found, own, args, at_once=at_once)


def _by_all(own: Int[Array, ""], args: tuple[Memory, AnyMeasure, Array, Any]) -> _Bounded:
    """Both bounds as the scores themselves."""
    memory, query, beta, classes = args
    scores = _exactly(divergences_of(memory, query), memory, beta, classes)
    return _Bounded(scores, scores[own])


def _exactly(
    divergences: Float[Array, " N"], memory: Memory, beta: Array, classes: Int[Array, " N"] | None
) -> Float[Array, " N"]:
    """−log w of every pattern, or of its class."""
    logits = -beta * with_prior(divergences, all_rows(memory.log_prior, memory.layout), beta)
    return _sum(logits) - _of_classes(logits, classes)


def _sum(logits: Float[Array, " N"]) -> Float[Array, ""]:
    found: Array = jax.nn.logsumexp(logits)
    return found


def _of_classes(logits: Float[Array, " N"], classes: Int[Array, " N"] | None) -> Float[Array, " N"]:
    """log Σ exp(logits) over the class of each pattern."""
    if classes is None:
        return logits
    tops = jax.ops.segment_max(logits, classes, len(logits))[classes]
    tops = jnp.where(tops == -jnp.inf, 0, tops)
    sums = jax.ops.segment_sum(jnp.exp(logits - tops), classes, len(logits))[classes]
    return tops + jnp.log(sums)
