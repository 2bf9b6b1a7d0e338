"""Which atoms of a query belong to which of a pattern."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jdam._core import checks
from jdam._core.batching import in_batches
from jdam._core.compile import compiled
from jdam._energy.average import compare, view_of
from jdam._energy.energy import divergences_of, fit_query, query_batch_size
from jdam._measures.base import AnyMeasure
from jdam._measures.mixture import GaussianMixture
from jdam._memory.memory import Memory, check_memory
from jdam.geometry import Pose
from jdam.geometry.protocol import Geometry, Patterns


class Match(eqx.Module):
    """The result of `jdam.match`, of a query of n atoms and a pattern of m; of mixtures atoms are
    components.

    index:      the pattern.
    divergence: D(ξ, X) to it, a squared distance.
    plan:       (n, m), the mass Pⱼₖ ≥ 0 that the transport plan of D takes from atom j of the query
                to atom k of the pattern.
    targets:    (n, d), Σₖ Pⱼₖyₖ / Σₖ Pⱼₖ, the mean of the atoms, or of the means of components, to
                which atom j belongs; its own place where it belongs to none.
    inliers:    (n,), the shares of `Recall.inliers`, for the query; None where there are none.
    pose:       the `jdam.Pose` that lays the pattern on the query, under `Aligned`; else None.
                `targets` are atoms of the pattern in this pose.
    """

    index: Int[Array, "*batch"]
    divergence: Float[Array, "*batch"]
    plan: Float[Array, "*batch n m"]
    targets: Float[Array, "*batch n d"]
    inliers: Float[Array, "*batch n"] | None = None
    pose: Pose | None = None


def match(memory: Memory, query: AnyMeasure, index: Any = None) -> Match:
    """Which atoms of the query belong to which of a pattern: the transport plan P between them.

    With weights p of the query and b of the pattern, and cost c:

    - `Sinkhorn`: Pⱼₖ = pⱼbₖ exp((fⱼ + gₖ − cⱼₖ)/ε), the entropic plan of the query and the pattern,
      c = ½|x−y|²; its marginals are p and b, and with ρ pⱼ exp(−fⱼ/ρ) and bₖ exp(−gₖ/ρ).
    - `Chamfer`: Pⱼₖ = pⱼ shareⱼ softmaxₖ(log bₖ − cⱼₖ/ε), c the same; its first marginal is
      pⱼ shareⱼ, and the second is free.
    - `MixtureWasserstein`: the exact plan of least cost between components, c = W₂² of Gaussians;
      its marginals are p and b.
    - `Aligned`: that of the geometry it wraps, with the pattern in its pose.

    Unlike a recall it moves nothing: `inliers` tells strays of a cue as they are.

    **Arguments:** a `memory`; one `query` of its patterns' type, dimension and dtype; the `index`
    of a pattern, an int, which may be traced, or None for that of least divergence.
    `jax.vmap(jdam.match, (None, 0))` takes a batch of queries. It is differentiable.

    **Raises:** `TypeError` for a memory of another geometry and for an index that is no int,
    `IndexError` for one that is out of range, and `ValueError` for a sharded memory and for a query
    that does not fit.
    """
    check_memory(memory)
    if type(memory.geometry).plan is Geometry.plan:
        raise TypeError(
            f"memory must have a geometry of transport plans, such as Sinkhorn, Chamfer or "
            f"MixtureWasserstein; got {memory.geometry}"
        )
    if memory.layout is not None:
        raise ValueError("memory must be in one piece; got a sharded one")
    query = fit_query(memory, query)
    if index is not None:
        if not np.issubdtype(getattr(index, "dtype", type(index)), np.integer):
            raise TypeError(f"index must be an int or None; got {index!r}")
        if checks.is_concrete(index) and memory.size_is_known:
            index = int(index)
            checks.index(index, len(memory), "a memory")
            index = np.int32(index % len(memory))
        else:
            index = memory.from_start(index)
    return _match(memory, query, index)


@compiled()
def _match(memory: Memory, query: AnyMeasure, index: Array | None) -> Match:
    return in_batches(_match_one, query_batch_size(memory), memory, query, index)


def _match_one(memory: Memory, query: AnyMeasure, index: Array | None) -> Match:
    geometry, view = memory.geometry, view_of(memory.geometry, query)
    if index is None:
        index = jnp.argmin(divergences_of(memory, query)).astype(jnp.int32)
    held = Patterns(memory.patterns, memory.prepared)
    pattern = jax.tree.map(lambda leaf: leaf[index][None], held)
    found = compare(geometry, view, pattern)
    plan = geometry.plan(view, pattern._replace(guess=found.guess))[0]
    posed = pattern.measures if found.pose is None else found.pose(pattern.measures)
    x, y = places(query), places(posed)[0]
    mass = plan.sum(1)
    # Of so little mass derivatives of a quotient would overflow.
    on = (mass > float(jnp.finfo(mass.dtype).tiny) ** 0.5)[:, None]
    ways = plan @ (y - y[:1]) / jnp.where(on, mass[:, None], 1)
    targets = jnp.where(on, y[:1] + ways, x)
    inliers, pose = jax.tree.map(lambda rows: rows[0], (found.inliers, found.pose))
    return Match(index, found.divergence[0], plan, targets, inliers, pose)


def places(measure: AnyMeasure) -> Float[Array, "*batch n d"]:
    """Where the atoms of a cloud are, or the means of the components of a mixture."""
    found: Array = measure.means if isinstance(measure, GaussianMixture) else measure.points
    return found
