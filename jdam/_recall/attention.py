"""Attention with measures as keys: hetero-association."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int, PyTree

from jdam._core import checks
from jdam._core.batching import batch_size
from jdam._core.compile import compiled
from jdam._energy.energy import weigh
from jdam._energy.separation import LogSumExp, Separation
from jdam._measures.base import AnyMeasure, Measure
from jdam._measures.batches import as_batch
from jdam._memory.memory import Memory, check_memory, store
from jdam._memory.values import name_of
from jdam._recall.recall import recall

#: Advice in errors for values that have no mean.
LABELS = "look labels up by memory.values[result.nearest], or average a one-hot array"


def attend(
    memory: Memory,
    query: AnyMeasure,
    beta: ArrayLike,
    values: PyTree = None,
    *,
    separation: Separation = LogSumExp(),
    num_steps: int = 10,
) -> AnyMeasure:
    """Return the values of the memory, averaged with the Gibbs weights wᵢ(ξ) of the query.

    The patterns of the memory are the keys. The result can be differentiated in everything, the
    values included. If a `separation` gives no pattern any weight, the result is 0 for arrays, and
    the value of the nearest key for measures.

    **Arguments:**

    - `memory`, `query`, `beta`, `separation` as in `energy`.
    - `values`: one for each key: arrays, measures or a memory, as below; None for `memory.values`.
    - `num_steps`: the largest number of fixed-point steps for a barycentre, from the heaviest
      value.

    **Values** may be

    - arrays: a float array (N, …), or a tuple, a dict or another pytree of such. The result is Σ wᵢ
      valuesᵢ, (…). A memory with capacity may have a value for each slot; the weights of free slots
      are 0.
    - measures of any type with one batch axis (N,), or a list of single ones. The result is their
      barycentre, the minimiser of Σ wᵢ D(·, valuesᵢ). D is that of the memory's geometry if it
      takes such measures, else that of the geometry which `store` chooses.
    - a `Memory` of measures. The result is their barycentre in its geometry, with the self terms
      stored there. `attend(memory, cue, beta, values=memory)` completes a partial cue: the weights
      come from the cue, the result from whole patterns of any size.

    **Returns:** arrays of shape (…), or a measure of the values' type.

    **Raises:** as `energy`; `TypeError` or `ValueError` for values of other kinds, another number
    than there are keys, or another dtype than the memory's; `TypeError` for integers and booleans,
    such as labels, which have no mean, and for no values where the memory has none.
    """
    num_steps = checks.positive_int("num_steps", num_steps)
    check_memory(memory)
    if values is None and memory.values is None:
        raise TypeError("values must be given for a memory that was stored without; got None")
    values = as_batch(memory.values if values is None else values)
    if isinstance(values, Measure):
        values = _store_values(memory, values)
    elif not isinstance(values, Memory):
        values = _floats(values)
    weights, nearest = weigh(memory, query, beta, separation)
    arrays = values.patterns if isinstance(values, Memory) else values
    for leaf in jax.tree.leaves(arrays):
        checks.same_dtype(memory=weights, values=leaf)
    if isinstance(values, Memory):
        weights = _for_values(memory, values, weights)
        return _barycentre(values, weights, nearest, num_steps)

    def mean(leaf: Array) -> Array:
        return _mean(leaf, _for_values(memory, leaf, weights), memory.size)

    return jax.tree.map(mean, values)


def _floats(values: PyTree) -> PyTree:
    """Return a pytree of float arrays (N, …); a list is converted to an array."""

    def check(path: Any, leaf: Any) -> Array:
        name = name_of(path)
        array = checks.float_array(name, leaf, cure=LABELS)
        if array.ndim == 0:
            raise ValueError(f"{name} must have shape (N, …); got ()")
        return array

    return jax.tree_util.tree_map_with_path(
        check, values, is_leaf=lambda value: isinstance(value, list)
    )


def _for_values(
    memory: Memory, values: Array | Memory, weights: Float[Array, " N"]
) -> Float[Array, " V"]:
    """Return the weights, (slots of the memory,), padded or cut to the slots of the values."""
    patterns = memory.length_or_capacity
    if isinstance(values, Memory):
        num_slots, count = values.capacity, values.length_or_capacity
    else:
        num_slots = count = len(values)
    # The last parts of a sharded memory are padded, and its values with them.
    if count not in {patterns, memory.capacity, batch_size(memory.patterns)}:
        or_places = f", or of its {memory.capacity} places" if memory.size is not None else ""
        raise ValueError(
            f"values must have one entry for each of the {patterns} patterns{or_places}; "
            f"got {count}"
        )
    if num_slots == len(weights):
        return weights
    return jnp.pad(weights, (0, max(0, num_slots - len(weights))))[:num_slots]


def _store_values(memory: Memory, values: Measure) -> Memory:
    """Return a memory of `values` in the geometry of `memory`, if that takes such measures."""
    try:
        memory.geometry.check("values", values, 1)
    except TypeError:
        return store(values)
    return store(values, memory.geometry)


@compiled()
def _mean(values: Array, weights: Float[Array, " N"], size: Int[Array, ""] | None) -> Array:
    if size is not None:  # NaN at a free slot times weight 0 would be NaN
        free = jnp.arange(len(values), dtype=jnp.int32) >= size
        values = jnp.where(free.reshape(-1, *[1] * (values.ndim - 1)), 0, values)
    return jnp.tensordot(weights, values, 1)


def _barycentre(
    values: Memory, weights: Float[Array, " N"], heaviest: Int[Array, ""], num_steps: int
) -> AnyMeasure:
    """Return the fixed point of a recall of `values` in which the weights are constant."""
    start = jax.tree.map(lambda leaf: leaf[heaviest], values.patterns)
    on = weights != 0
    log_prior = jnp.where(on, jnp.log(jnp.where(on, weights, 1)), -jnp.inf)
    missing = batch_size(values.patterns) - len(
        log_prior
    )  # the last parts of a sharded memory are padded
    log_prior = jnp.pad(log_prior, (0, missing), constant_values=-jnp.inf)
    weighted = replace(values, log_prior=log_prior)
    return recall(
        weighted, start, 1.0, max_steps=num_steps, tol=0, separation=_FixedWeights()
    ).measure


@dataclass(frozen=True)
class _FixedWeights(Separation):
    """E = Σ πᵢDᵢ and w = π: weights that do not depend on the query."""

    def energy(self, divergences: Array, log_prior: Any, beta: Array) -> Array:
        return jnp.vdot(self.weights(divergences, log_prior, beta), divergences)

    def weights(self, divergences: Array, log_prior: Any, beta: Array) -> Array:
        on = log_prior != -jnp.inf
        return jnp.where(on, jnp.exp(jnp.where(on, log_prior, 0)), 0)
