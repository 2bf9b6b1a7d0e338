"""A cloud and itself: one symmetric potential h = s h^{c,ε}."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

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
    """The optimal coupling of a cloud with itself, unless it is `known`, in which case only
    derivatives are computed."""
    if known is not None:
        return known
    pairs = pair_batch_size(len(cloud.x) ** 2)
    result: SelfTransport = in_batches(
        partial(solve_self, solver), pairs, cloud.normalised(), marginals, flat=True
    )
    return result


@partial(self_transport.defjvp, symbolic_zeros=True)
@full_precision
def _couple_with_itself_jvp(
    solver: Solver, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[SelfTransport, SelfTransport]:
    solved = self_transport(solver, *primals)
    problem, h = primals[:2], solved.potential
    cloud, marginals = problem
    dcloud, dmarginals = tangents[:2]

    def answer(cloud: Cloud, marginals: Marginals) -> CTransform:
        return c_transform(solver.cost, h, _with_itself(cloud, marginals))

    # h = s h^{c,ε}, so that (I + sP̃) dh = (∂(s h^{c,ε})/∂problem) dproblem.
    found, moved = jvp(answer, problem, (dcloud, dmarginals))
    itself = _with_itself(cloud, marginals)
    follow = partial(c_transform_change, solver.cost, found, pair=itself)

    def plus_plan(d: Array) -> Array:
        return d - follow(d)[0]

    def solve(matvec: Any, right: Array) -> Array:
        rounds = math.ceil(-math.log(float(jnp.finfo(right.dtype).eps)) / math.log(3))
        return repeat(
            rounds, lambda d: d + (right - matvec(d)) * (2 / 3), jnp.zeros_like(right), right
        )

    right = moved.potential
    dh = jax.lax.custom_linear_solve(plus_plan, right, solve, transpose_solve=solve)
    dcost = 2 * change_by_atoms(marginals, h, cloud.a, found.gradient, dcloud)
    dcost += change_by_marginals(itself, h, found._replace(potential=h), dmarginals)
    dgradient = None if solved.gradient is None else moved.gradient + follow(dh)[1]
    return solved, SelfTransport(dcost, dh, jnp.zeros_like(solved.error), dgradient)


def _with_itself(cloud: Cloud, marginals: Marginals) -> Pair:
    return Pair(cloud.x, cloud.a, cloud.x, cloud.a, marginals)
