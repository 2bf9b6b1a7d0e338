"""Prediction sets with a promised coverage, by split conformal prediction."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from jdam._core import checks
from jdam._core.batching import batch_size, in_batches, map_in_batches
from jdam._core.compile import compiled
from jdam._core.mesh import all_rows
from jdam._energy.choosing import owners
from jdam._energy.energy import (
    divergences_of,
    fit_queries,
    fit_query,
    inverse_temperature,
    query_batch_size,
)
from jdam._energy.separation import with_prior
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory


class Calibration(eqx.Module):
    """What `jdam.calibrate` learns of n queries whose patterns are known.

    memory:    the memory.
    beta:      the β of the Gibbs weights.
    scores:    (n,), −log w of the pattern (or class) that each query belongs to, in rising order.
    distances: (n,), the least divergence of each query to any pattern, in rising order.
    classes:   (N,), the class of each pattern, where sets are of classes; else None.
    """

    memory: Memory
    beta: Float[Array, ""]
    scores: Float[Array, " n"]
    distances: Float[Array, " n"]
    classes: Int[Array, " N"] | None = None

    def prediction_set(self, query: AnyMeasure, alpha: ArrayLike) -> Bool[Array, " N"]:
        """Which patterns the query may belong to: {i : −log wᵢ(ξ) ≤ q}, q being the
        ⌈(n+1)(1−α)⌉-th least score, or ∞ where that is more than n.

        If the query is exchangeable with those of the calibration, the set holds its pattern with
        probability ≥ 1−α, however wrong the memory's weights are (split conformal prediction; Vovk,
        Gammerman and Shafer, Algorithmic Learning in a Random World, 2005). With classes, w is
        summed over a class, and the set holds all patterns of its classes.

        **Arguments:** one `query`; `alpha` in (0, 1), a scalar. `jax.vmap` takes batches.

        **Raises:** as `jdam.divergences`; `ValueError` for an `alpha` outside (0, 1).
        """
        query = fit_query(self.memory, query)
        level = jnp.asarray(alpha, self.scores.dtype)
        if checks.is_concrete(level) and not 0 < float(level) < 1:
            raise ValueError(f"alpha must be in (0, 1); got {alpha}")
        scores, _ = _score(self.memory, query, self.beta, self.classes)
        num = len(self.scores)
        # Rounding of 1 − α must not cost a rank.
        wanted = (num + 1) * (1 - level) - 1e-3
        rank = jnp.ceil(wanted).astype(jnp.int32)
        limit = jnp.where(rank > num, jnp.inf, self.scores[jnp.clip(rank - 1, 0, num - 1)])
        members: Array = scores <= limit
        return members

    def p_value(self, query: AnyMeasure) -> Float[Array, ""]:
        """How unusual the query is as one that belongs to any of the patterns:
        (1 + #{c : minᵢ D(ξ_c, Xᵢ) ≥ minᵢ D(ξ, Xᵢ)})/(n + 1).

        Of queries exchangeable with those of the calibration at most a share α has p ≤ α: small
        values say that the query belongs to none.

        **Raises:** as `jdam.divergences`.
        """
        query = fit_query(self.memory, query)
        _, distance = _score(self.memory, query, self.beta, self.classes)
        farther = (self.distances >= distance).sum()
        return (1 + farther.astype(self.distances.dtype)) / (len(self.distances) + 1)


def calibrate(
    memory: Memory,
    queries: AnyMeasure,
    targets: ArrayLike,
    beta: ArrayLike,
    *,
    pattern_labels: ArrayLike | None = None,
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

    **Returns:** a `Calibration`.

    **Raises:** as `pairwise`; `TypeError`, `ValueError` or `IndexError` for targets that are no
    indices of patterns, or labels of none.
    """
    queries = fit_queries(memory, queries)
    beta = inverse_temperature(memory, beta)
    if batch_size(queries) == 0:
        raise ValueError("queries must hold at least one query; got 0")
    owner, classes = owners(memory, targets, pattern_labels, batch_size(queries))
    scores, distances = _scores(memory, queries, beta, owner, classes)
    return Calibration(memory, beta, jnp.sort(scores), jnp.sort(distances), classes)


@compiled()
def _scores(
    memory: Memory,
    queries: AnyMeasure,
    beta: Array,
    owner: Int[Array, " n"],
    classes: Int[Array, " N"] | None,
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    def one(row: tuple[AnyMeasure, Array]) -> tuple[Array, Array]:
        query, own = row
        scores, distance = _score_of(memory, query, beta, classes)
        return scores[own], distance

    rows = queries, owner
    found: tuple[Array, Array] = map_in_batches(one, query_batch_size(memory), rows)
    return found


@compiled()
def _score(
    memory: Memory, query: AnyMeasure, beta: Array, classes: Int[Array, " N"] | None
) -> tuple[Float[Array, " N"], Float[Array, ""]]:
    return in_batches(_score_of, query_batch_size(memory), memory, query, beta, classes)


def _score_of(
    memory: Memory, query: AnyMeasure, beta: Array, classes: Int[Array, " N"] | None
) -> tuple[Float[Array, " N"], Float[Array, ""]]:
    """−log w of every pattern, or of its class, and the least divergence."""
    divergences = divergences_of(memory, query)
    prior = all_rows(memory.log_prior, memory.layout)
    logits = -beta * with_prior(divergences, prior, beta)
    if classes is None:
        return jax.nn.logsumexp(logits) - logits, divergences.min()
    tops = jax.ops.segment_max(logits, classes, len(logits))[classes]
    tops = jnp.where(tops == -jnp.inf, 0, tops)
    sums = jax.ops.segment_sum(jnp.exp(logits - tops), classes, len(logits))[classes]
    return jax.nn.logsumexp(logits) - (tops + jnp.log(sums)), divergences.min()
