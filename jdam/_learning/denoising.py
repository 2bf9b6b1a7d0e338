"""Choice of the β at which recall denoises best."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, PyTree

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

#: The lowest β of the grid, in units of one over the median gap, the highest, in units of
#: `suggest_beta`, and the number of values for each decade.
LOWEST, HIGHEST, PER_DECADE = 0.1, 10.0, 3
#: The number of evaluations of the golden section search about the best value.
EVALUATIONS = 8


def denoising_beta(memory: Memory, queries: AnyMeasure, truths: AnyMeasure) -> Float[Array, ""]:
    """Return the β of the smallest mean divergence D(recall(ξⱼ), truthⱼ) of recalled measures from
    the truth.

    This β is for denoising, where an average of several patterns is closer to the truth than the
    nearest one; use `suggest_beta` to identify a pattern. Queries and truths should be distributed
    like those to come, and not be among the patterns. The best of a grid, three values for each
    decade from a tenth of one over the median gap D(ξⱼ, Xᵢ) − minₖ D(ξⱼ, Xₖ) > 0 to ten times
    `suggest_beta(memory)`, is refined by golden section search to some per cent. Each of the some
    twenty values takes a recall of all queries.

    **Arguments:**

    - `memory`: the patterns.
    - `queries`, `truths`: measures of the patterns' kind with one batch axis (Q,), or lists.

    **Returns:** a scalar > 0, in inverse units of D.

    **Raises:** as `pairwise`; `ValueError` if the numbers of truths and queries differ or are 0.
    """
    queries, truths = fit_queries(memory, queries), fit_queries(memory, truths)
    num = batch_size(queries)
    if num == 0 or num != batch_size(truths):
        raise ValueError(
            f"truths must be as many as queries, at least one; got {batch_size(truths)} for {num}"
        )
    truth_memory = store(truths, memory.geometry)

    def error(log_beta: float) -> float:
        beta = jnp.asarray(np.exp(log_beta), memory.dtype)
        recalled = recall_batch(memory, queries, beta).measure
        return float(_mean_distance(truth_memory, recalled))

    divergences = np.asarray(pairwise(memory, queries), float)
    gaps = divergences - divergences.min(1, keepdims=True)  # weights depend on these alone
    gaps = gaps[(gaps > 0) & (gaps < np.inf)]
    suggested = float(suggest_beta(memory))
    low = math.log(LOWEST / np.median(gaps) if gaps.size else suggested)
    high = max(low, math.log(HIGHEST * suggested))
    spacing = math.log(10) / PER_DECADE
    log_betas = [low + spacing * i for i in range(math.ceil((high - low) / spacing) + 1)]
    errors = [error(x) for x in log_betas]
    best = int(np.argmin(errors))
    centre = log_betas[best]
    interval = centre - spacing, centre + spacing
    log_beta = _golden_section(error, interval, (errors[best], centre))
    return jnp.asarray(np.exp(log_beta), memory.dtype)


def _golden_section(
    error: Callable[[float], float], interval: tuple[float, float], best: tuple[float, float]
) -> float:
    """Return the minimiser found by golden section search in the interval, or the previous `best`,
    a pair (error, log β), if it is better.
    """
    ratio = (math.sqrt(5) - 1) / 2
    low, high = interval
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    values = {x: error(x) for x in (left, right)}
    for _ in range(EVALUATIONS - 2):
        if values[left] <= values[right]:
            high, right = right, left
            left = high - ratio * (high - low)
            values[left] = error(left)
        else:
            low, left = left, right
            right = low + ratio * (high - low)
            values[right] = error(right)
    x = min(values, key=lambda x: values[x])
    return x if values[x] < best[0] else best[1]


@compiled()
def _mean_distance(truths: Memory, measures: AnyMeasure) -> Float[Array, ""]:
    """Compute the mean of D(measureⱼ, truthⱼ)."""
    geometry = truths.geometry

    def one(row: tuple[AnyMeasure, AnyMeasure, PyTree]) -> Float[Array, ""]:
        measure, *target = row
        truth, prepared = jax.tree.map(lambda leaf: leaf[None], tuple(target))
        patterns = Patterns(truth, prepared, geometry.first_guess(prepared))
        comparison: Comparison = compare(geometry, view_of(geometry, measure), patterns)
        return comparison.divergence[0]

    rows = geometry.match(measures, truths.patterns), truths.patterns, truths.prepared
    return map_in_batches(one, query_batch_size(truths), rows).mean()
