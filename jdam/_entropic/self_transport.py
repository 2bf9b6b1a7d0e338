"""Entropic transport of a cloud to itself, with one symmetric potential h = s h^{c,ε}."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

from jdam._core.batching import in_batches
from jdam._core.derivatives import full_precision, jvp
from jdam._core.loops import repeat
from jdam._entropic.c_transform import CTransform, c_transform, c_transform_change
from jdam._entropic.problem import Cloud, Marginals, Pair, SelfTransport, Solver, pair_batch_size
from jdam._entropic.scaling import solve_self
from jdam._entropic.transport import change_by_atoms, change_by_marginals


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def self_transport(
    solver: Solver, cloud: Cloud, marginals: Marginals, known: SelfTransport | None = None
) -> SelfTransport:
    """Compute the optimal coupling of a cloud with itself.

    If the coupling is `known`, it is returned, and only derivatives are computed. Under `jax.vmap`,
    a few clouds are solved at a time."""
    if known is not None:
        return known
    pairs = pair_batch_size(len(cloud.x) ** 2)
    result: SelfTransport = in_batches(
        partial(solve_self, solver), pairs, cloud.normalised(), marginals, flat=True
    )
    return result


@partial(self_transport.defjvp, symbolic_zeros=True)
@full_precision
def _self_transport_jvp(
    solver: Solver, primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> tuple[SelfTransport, SelfTransport]:
    solved = self_transport(solver, *primals)
    problem, h = primals[:2], solved.potential
    cloud, marginals = problem
    dcloud, dmarginals = tangents[:2]

    def transform(cloud: Cloud, marginals: Marginals) -> CTransform:
        return c_transform(solver.cost, h, _with_itself(cloud, marginals))

    # h = s h^{c,ε} implies (I + sP̃) dh = (∂(s h^{c,ε})/∂problem) dproblem.
    response, dresponse = jvp(transform, problem, (dcloud, dmarginals))
    itself = _with_itself(cloud, marginals)
    differential = partial(c_transform_change, solver.cost, response, pair=itself)

    def plus_plan(d: Array) -> Array:
        return d - differential(d)[0]

    def solve(matvec: Any, right: Array) -> Array:
        iterations = math.ceil(-math.log(float(jnp.finfo(right.dtype).eps)) / math.log(3))
        # Richardson iterations of step 2/3: the spectrum of I + sP̃ lies in [1, 2].
        return repeat(
            iterations, lambda d: d + (right - matvec(d)) * (2 / 3), jnp.zeros_like(right), right
        )

    right = dresponse.potential
    dh = jax.lax.custom_linear_solve(plus_plan, right, solve, transpose_solve=solve)
    dcost = 2 * change_by_atoms(marginals, h, cloud.a, response.gradient, dcloud)
    dcost += change_by_marginals(itself, h, response._replace(potential=h), dmarginals)
    dgradient = None if solved.gradient is None else dresponse.gradient + differential(dh)[1]
    return solved, SelfTransport(dcost, dh, jnp.zeros_like(solved.error), dgradient)


def _with_itself(cloud: Cloud, marginals: Marginals) -> Pair:
    return Pair(cloud.x, cloud.a, cloud.x, cloud.a, marginals)
