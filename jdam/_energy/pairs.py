"""All divergences between two batches of measures."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam._core.batching import in_tiles
from jdam._core.compile import compiled
from jdam._core.mesh import all_rows
from jdam._energy.energy import divergences_of, fit_queries, queries_at_once
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory, check_memory


def pairwise(memory: Memory, queries: AnyMeasure | None = None) -> Float[Array, "Q N"]:
    """D(ξⱼ, Xᵢ) of every query to every pattern, or of the patterns to each other.

    The units are those of `divergences`: W₂² (cost |x−y|²) for `Bures`, S_ε (cost ½|x−y|²) for
    `Sinkhorn`. Computed in tiles: beside the result some tens of megabytes are needed. For
    Gaussians of n samples in d > n dimensions, as features of images for the Fréchet distance,
    `jdam.Gaussian.from_samples` has factors d×n, and nothing d×d is formed.

    **Arguments:** a `memory`, which may be sharded; `queries`: measures of its patterns' kind with
    one batch axis (Q,), or a list of single ones; if None, the patterns themselves.

    **Returns:** (Q, N), or (N, N); ∞ for the free places of a memory with room to grow.

    **Raises:** as `divergences`.
    """
    check_memory(memory)
    if queries is not None:
        queries = fit_queries(memory, queries)
    return _pairwise(memory, queries)


@compiled()
def _pairwise(memory: Memory, queries: AnyMeasure | None) -> Float[Array, "Q N"]:
    among = queries is None
    if queries is None:
        every = partial(all_rows, layout=memory.layout)
        queries = memory.geometry.match(jax.tree.map(every, memory.patterns), memory.patterns)

    def one(query: AnyMeasure) -> Float[Array, " N"]:
        return in_tiles(divergences_of, queries_at_once(memory), memory, query)

    found = jax.vmap(one)(queries)
    if among and memory.occupied is not None:
        return jnp.where(memory.occupied[:, None], found, jnp.inf)
    return found
