"""Attention whose keys are measures: hetero-association."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jdam._core import checks
from jdam._core.batching import batch_size
from jdam._core.compile import compiled
from jdam._energy.energy import weigh
from jdam._energy.separation import LogSumExp, Separation
from jdam._measures.base import AnyMeasure, Measure
from jdam._measures.batches import as_batch
from jdam._memory.memory import Memory, length_or_capacity, store
from jdam._recall.recall import recall

#: What to do with values that cannot be averaged.
LABELS = "look labels up by labels[result.nearest], or pass a one-hot array"


def attend(
    memory: Memory,
    query: AnyMeasure,
    beta: ArrayLike,
    values: AnyMeasure | Memory,
    *,
    separation: Separation = LogSumExp(),
    num_steps: int = 10,
) -> AnyMeasure:
    """What the memory associates with a query: its values averaged with the Gibbs weights wᵢ(ξ).

    **Arguments:** `memory`, `query`, `beta`, `separation` as in `energy`; the memory's patterns
    are the keys. `values`, one for each key:

    - an array (N, …): the result is Σ wᵢ valuesᵢ, of shape (…). For a memory with room to grow
      there may be a value for each place, so that shapes stay; those of free places weigh nothing;
    - measures with one batch axis (N,), or a list of single ones, of any type: the result is their
      barycentre, the minimiser of Σ wᵢ D(·, valuesᵢ), by at most `num_steps` fixed-point steps from
      the heaviest value. D is that of the memory's geometry where it takes such measures, else
      that which `store` chooses;
    - a `Memory` of measures: the same in its own geometry, whose self terms are not computed
      again. With the memory itself, `attend(memory, cue, beta, values=memory)`, a partial cue is
      completed: addressed by what is there, answered by the whole pattern, whatever its size.

    Differentiable in everything, the values included. Where a `separation` gives no pattern any
    weight, the result is 0 for arrays, and the value of the nearest key for measures.

    **Raises:** as `energy`; `TypeError` or `ValueError` for values of other kinds, another
    number than there are keys, or another dtype than the memory's.
    """
    num_steps = checks.positive_int("num_steps", num_steps)
    values = as_batch(values)
    if isinstance(values, Measure):
        values = _store_values(memory, values)
    elif not isinstance(values, Memory):
        values = checks.float_array("values", values, cure=LABELS)
        if values.ndim == 0:
            raise ValueError("values must have shape (N, …); got ()")
    weights, nearest = weigh(memory, query, beta, separation)
    held = values.patterns if isinstance(values, Memory) else values
    weights = _for_values(memory, values, weights)
    checks.same_dtype(memory=weights, values=jax.tree.leaves(held)[0])
    if isinstance(values, Memory):
        return _barycentre(values, weights, nearest, num_steps)
    return _mean(values, weights, memory.size)


def _for_values(
    memory: Memory, values: Array | Memory, weights: Float[Array, " N"]
) -> Float[Array, " V"]:
    """The weights, of which there is one for each place, for as many values."""
    patterns = length_or_capacity(memory)
    if isinstance(values, Memory):
        places, count, wanted = values.capacity, length_or_capacity(values), {patterns}
    else:
        places = count = len(values)
        wanted = {patterns, memory.capacity}
    if count not in wanted:
        or_places = f", or of its {memory.capacity} places" if len(wanted) > 1 else ""
        raise ValueError(
            f"values must have one entry for each of the {patterns} patterns{or_places}; "
            f"got {count}"
        )
    if places == len(weights):
        return weights
    return jnp.pad(weights, (0, max(0, places - len(weights))))[:places]


def _store_values(memory: Memory, values: Measure) -> Memory:
    try:
        memory.geometry.check("values", values, 1)
    except TypeError:
        return store(values)
    return store(values, memory.geometry)


@compiled()
def _mean(values: Array, weights: Float[Array, " N"], size: Int[Array, ""] | None) -> Array:
    if size is not None:  # what is at free places may be anything
        free = jnp.arange(len(values), dtype=jnp.int32) >= size
        values = jnp.where(free.reshape(-1, *[1] * (values.ndim - 1)), 0, values)
    return jnp.tensordot(weights, values, 1)


def _barycentre(
    values: Memory, weights: Float[Array, " N"], heaviest: Int[Array, ""], num_steps: int
) -> AnyMeasure:
    """The fixed point of recall, were the weights not to change."""
    start = jax.tree.map(lambda leaf: leaf[heaviest], values.patterns)
    on = weights != 0
    log_prior = jnp.where(on, jnp.log(jnp.where(on, weights, 1)), -jnp.inf)
    missing = batch_size(values.patterns) - len(log_prior)  # parts are filled up
    log_prior = jnp.pad(log_prior, (0, missing), constant_values=-jnp.inf)
    held = replace(values, log_prior=log_prior)
    return recall(held, start, 1.0, max_steps=num_steps, tol=0, separation=_Given()).measure


@dataclass(frozen=True)
class _Given(Separation):
    """E = Σ πᵢDᵢ and w = π: weights that do not depend on where the query is."""

    def energy(self, divergences: Array, log_prior: Any, beta: Array) -> Array:
        return jnp.vdot(self.weights(divergences, log_prior, beta), divergences)

    def weights(self, divergences: Array, log_prior: Any, beta: Array) -> Array:
        on = log_prior != -jnp.inf
        return jnp.where(on, jnp.exp(jnp.where(on, log_prior, 0)), 0)
