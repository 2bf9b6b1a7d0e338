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
from jdam._memory.memory import Memory, check_memory, length_or_capacity, store
from jdam._memory.values import name_of
from jdam._recall.recall import recall

#: What to do with values that cannot be averaged.
LABELS = "look labels up by memory.values[result.nearest], or average a one-hot array"


def attend(
    memory: Memory,
    query: AnyMeasure,
    beta: ArrayLike,
    values: Any = None,
    *,
    separation: Separation = LogSumExp(),
    num_steps: int = 10,
) -> AnyMeasure:
    """What the memory associates with a query: its values averaged with the Gibbs weights wᵢ(ξ).

    **Arguments:** `memory`, `query`, `beta`, `separation` as in `energy`; the memory's patterns
    are the keys. `values`, one for each key; the memory's own, `memory.values`, if None:

    - an array (N, …) of floats: the result is Σ wᵢ valuesᵢ, of shape (…); or a tuple, a dict or
      another pytree of such. For a memory with room to grow there may be a value for each place, so
      that shapes stay; those of free slots weigh nothing;
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
    number than there are keys, or another dtype than the memory's; `TypeError` for integers and
    booleans, as labels are, which have no mean, and for no values where the memory has none.
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
    held = values.patterns if isinstance(values, Memory) else values
    for leaf in jax.tree.leaves(held):
        checks.same_dtype(memory=weights, values=leaf)
    if isinstance(values, Memory):
        weights = _for_values(memory, values, weights)
        return _barycentre(values, weights, nearest, num_steps)

    def mean(leaf: Array) -> Array:
        return _mean(leaf, _for_values(memory, leaf, weights), memory.size)

    return jax.tree.map(mean, values)


def _floats(values: Any) -> Any:
    """A pytree of arrays of floats (N, …); a list is an array."""

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
    """The weights, of which there is one for each place, for as many values."""
    patterns = length_or_capacity(memory)
    if isinstance(values, Memory):
        places, count = values.capacity, length_or_capacity(values)
    else:
        places = count = len(values)
    # Of a sharded memory the last parts are filled up, and its own values with them.
    if count not in {patterns, memory.capacity, batch_size(memory.patterns)}:
        or_places = f", or of its {memory.capacity} places" if memory.size is not None else ""
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
    if size is not None:  # what is at free slots may be anything
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
