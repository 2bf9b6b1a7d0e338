"""Correspondence between the atoms of a query and of a pattern."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jdam._core.compile import compiled
from jdam._energy.average import compare, view_of
from jdam._energy.energy import divergences_of, fit_query, query_batch_size
from jdam._measures.base import AnyMeasure
from jdam._measures.mixture import GaussianMixture
from jdam._memory.memory import Memory, check_memory
from jdam._memory.slots import checked_index
from jdam.geometry import Pose
from jdam.geometry.protocol import Geometry, Patterns


class Match(eqx.Module):
    """Result of `jdam.match` for a query of n atoms and a pattern of m; atoms of mixtures are their
    components.

    index:      the index of the pattern.
    divergence: D(ξ, X), a squared distance.
    plan:       (n, m), the mass Pⱼₖ ≥ 0 that the transport plan of D moves from atom j of the query
                to atom k of the pattern.
    targets:    (n, d), Σₖ Pⱼₖyₖ / Σₖ Pⱼₖ, the average target of each atom, with the means of
                components as their positions; for an atom without mass in the plan, its own
                position.
    inliers:    (n,), the transported fraction of each atom of the query, as `Recall.inliers`; None
                where that is None.
    pose:       the `jdam.Pose` that aligns the pattern with the query, for `Aligned`; else None.
                `targets` refer to the pattern in this pose.
    """

    index: Int[Array, "*batch"]
    divergence: Float[Array, "*batch"]
    plan: Float[Array, "*batch n m"]
    targets: Float[Array, "*batch n d"]
    inliers: Float[Array, "*batch n"] | None = None
    pose: Pose | None = None


def match(memory: Memory, query: AnyMeasure, index: Any = None) -> Match:
    """Return the transport plan P between the atoms of a query and those of a pattern.

    With weights p of the query and b of the pattern, and cost c:

    - `Sinkhorn`: Pⱼₖ = pⱼbₖ exp((fⱼ + gₖ − cⱼₖ)/ε), the entropic plan between the query and the
      pattern, c = ½|x−y|². Its marginals are p and b; with ρ they are pⱼ exp(−fⱼ/ρ) and bₖ
      exp(−gₖ/ρ).
    - `Chamfer`: Pⱼₖ = pⱼ aⱼ softmaxₖ(log bₖ − cⱼₖ/ε), the same c, where aⱼ is the transported
      fraction of atom j. Its first marginal is pⱼ aⱼ, and the second is free.
    - `MixtureWasserstein`: the exact plan of least cost between components, c = W₂² of Gaussians.
      Its marginals are p and b.
    - `Aligned`: the plan of the wrapped geometry for the pattern in its pose; for landmarks, the
      identity.

    The query is not moved, unlike in a recall, so that `inliers` identifies the stray atoms of the
    query itself. The result can be differentiated.

    **Arguments:**

    - `memory`: N patterns.
    - `query`: one measure of the patterns' type, dimension and dtype. `jax.vmap(jdam.match, (None,
      0))` takes a batch of queries.
    - `index`: the index of the pattern, an int, which may be traced; None for the pattern of least
      divergence.

    **Returns:** a `Match`.

    **Raises:** `TypeError` for a memory of another geometry and for an index that is no int;
    `IndexError` for one that is out of range; `ValueError` for a sharded memory and for a query
    that does not fit the memory.
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
        index = checked_index(memory, index)
    return _match(memory, query, index)


@compiled(batch_size=query_batch_size)
def _match(memory: Memory, query: AnyMeasure, index: Array | None) -> Match:
    geometry, view = memory.geometry, view_of(memory.geometry, query)
    if index is None:
        index = jnp.argmin(divergences_of(memory, query)).astype(jnp.int32)
    stored = Patterns(memory.patterns, memory.prepared)
    pattern = jax.tree.map(lambda leaf: leaf[index][None], stored)
    comparison = compare(geometry, view, pattern)
    plan = geometry.plan(view, pattern._replace(guess=comparison.guess))[0]
    aligned = pattern.measures if comparison.pose is None else comparison.pose(pattern.measures)
    x, y = positions(query), positions(aligned)[0]
    mass = plan.sum(1)
    # For less mass, derivatives of the quotient would overflow.
    has_mass = (mass > float(jnp.finfo(mass.dtype).tiny) ** 0.5)[:, None]
    displacements = plan @ (y - y[:1]) / jnp.where(has_mass, mass[:, None], 1)
    targets = jnp.where(has_mass, y[:1] + displacements, x)
    inliers, pose = jax.tree.map(lambda rows: rows[0], (comparison.inliers, comparison.pose))
    return Match(index, comparison.divergence[0], plan, targets, inliers, pose)


def positions(measure: AnyMeasure) -> Float[Array, "*batch n d"]:
    """Return the positions of the atoms of a cloud, the means of the components of a mixture, or
    landmarks themselves."""
    if isinstance(measure, Array):
        return measure
    result: Array = measure.means if isinstance(measure, GaussianMixture) else measure.points
    return result
