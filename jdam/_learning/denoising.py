"""The β at which recall denoises best."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jdam._core.batching import batch_size, map_in_batches
from jdam._core.compile import compiled
from jdam._energy.average import compare, view_of
from jdam._energy.choosing import suggest_beta
from jdam._energy.energy import fit_queries, query_batch_size
from jdam._energy.pairs import pairwise
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory, store
from jdam._recall.recall import recall_batch
from jdam.geometry.protocol import Comparison, Patterns

#: The least β to try, in units of one over the median divergence, and the largest, in units of
#: `suggest_beta`; and how many to try a decade.
LEAST, MOST, PARTS = 0.1, 10.0, 3
#: How often to shorten the interval about the best of these by the golden section.
SECTIONS = 8


def denoising_beta(memory: Memory, queries: AnyMeasure, truths: AnyMeasure) -> Float[Array, ""]:
    """The β at which recalled measures are nearest to the truth on average: the least mean of
    D(recall(ξⱼ), truthⱼ).

    A β for denoising, where several patterns together say more than the nearest one; to name a
    pattern use `suggest_beta`. Queries and truths should be as those to come, and not among the
    patterns. Of three values a decade, from a tenth of one over the median divergence of queries
    and patterns to ten times `suggest_beta(memory)`, the best is refined by golden sections to some
    per cent. Each value costs a recall of all queries, in all some twenty.

    **Arguments:** `queries` and `truths`: measures of the patterns' kind with one batch axis (Q,),
    or lists.

    **Returns:** a scalar > 0.

    **Raises:** as `pairwise`; `ValueError` for another number of truths than of queries.
    """
    queries, truths = fit_queries(memory, queries), fit_queries(memory, truths)
    num = batch_size(queries)
    if num == 0 or num != batch_size(truths):
        raise ValueError(
            f"truths must be as many as queries, at least one; got {batch_size(truths)} for {num}"
        )
    goal = store(truths, memory.geometry)

    def error(log_beta: float) -> float:
        beta = jnp.asarray(np.exp(log_beta), memory.dtype)
        recalled = recall_batch(memory, queries, beta).measure
        return float(_mean_distance(goal, recalled))

    distances = np.asarray(pairwise(memory, queries))
    low = math.log(LEAST / np.median(distances[distances < np.inf]))
    high = max(low, math.log(MOST * float(suggest_beta(memory))))
    part = math.log(10) / PARTS
    places = [low + part * i for i in range(math.ceil((high - low) / part) + 1)]
    errors = [error(place) for place in places]
    best = int(np.argmin(errors))
    found = _golden(error, (places[best] - part, places[best] + part), (errors[best], places[best]))
    return jnp.asarray(np.exp(found), memory.dtype)


def _golden(
    error: Callable[[float], float], ends: tuple[float, float], best: tuple[float, float]
) -> float:
    """The place of the least value seen by golden sections, or of the best so far."""
    ratio = (math.sqrt(5) - 1) / 2
    low, high = ends
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    values = {place: error(place) for place in (left, right)}
    for _ in range(SECTIONS - 2):
        if values[left] <= values[right]:
            high, right = right, left
            left = high - ratio * (high - low)
            values[left] = error(left)
        else:
            low, left = left, right
            right = low + ratio * (high - low)
            values[right] = error(right)
    place = min(values, key=lambda place: values[place])
    return place if values[place] < best[0] else best[1]


@compiled()
def _mean_distance(truths: Memory, measures: AnyMeasure) -> Float[Array, ""]:
    """The mean of D(measureⱼ, truthⱼ)."""
    geometry = truths.geometry

    def one(row: tuple[AnyMeasure, AnyMeasure, Any]) -> Float[Array, ""]:
        measure, *own = row
        truth, prepared = jax.tree.map(lambda leaf: leaf[None], tuple(own))
        patterns = Patterns(truth, prepared, geometry.first_guess(prepared))
        found: Comparison = compare(geometry, view_of(geometry, measure), patterns)
        return found.divergence[0]

    rows = geometry.match(measures, truths.patterns), truths.patterns, truths.prepared
    return map_in_batches(one, query_batch_size(truths), rows).mean()
