"""A cloud and itself: one symmetric potential h = h^{c,ε}."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam._core.batching import in_tiles
from jdam._core.derivatives import full_precision, jvp, vdot
from jdam._core.loops import repeat
from jdam._entropic.problem import Pair, SelfCoupling, Solver, pairs_at_once
from jdam._entropic.scaling import solve_self
from jdam._entropic.transport import respond, respond_in_tiles


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def couple_with_itself(
    solver: Solver,
    x: Float[Array, "n d"],
    a: Float[Array, " n"],
    epsilon: Float[Array, ""],
    known: SelfCoupling | None = None,
) -> SelfCoupling:
    """The optimal coupling of a cloud with itself, unless it is `known`, in which case only
    derivatives are computed."""
    if known is not None:
        return known
    pairs = pairs_at_once(x.shape[0] ** 2)
    result: SelfCoupling = in_tiles(
        partial(solve_self, solver), pairs, (x, a / a.sum(), epsilon), flat=True
    )
    return result


@partial(couple_with_itself.defjvp, symbolic_zeros=True)
@full_precision
def _couple_with_itself_jvp(
    solver: Solver, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[SelfCoupling, SelfCoupling]:
    solved = couple_with_itself(solver, *primals)
    problem, h = primals[:3], solved.potential
    x, a, epsilon = problem

    def answer(h: Array, x: Array, a: Array, epsilon: Array) -> Array:
        return respond(h, Pair(x, a, x, a, epsilon)).potential

    # h = h^{c,ε}, so that (I + E) dh = (∂h^{c,ε}/∂problem) dproblem.
    right = jvp(partial(answer, h), problem, tangents[:3])[1]

    def plus_plan(d: Array) -> Array:
        result: Array = d - jax.jvp(lambda h: answer(h, *problem), (h,), (d,))[1]
        return result

    def solve(matvec: Any, right: Array) -> Array:
        rounds = math.ceil(-math.log(float(jnp.finfo(right.dtype).eps)) / math.log(3))
        return repeat(
            rounds, lambda d: d + (right - matvec(d)) * (2 / 3), jnp.zeros_like(right), right
        )

    dh = jax.lax.custom_linear_solve(plus_plan, right, solve, transpose_solve=solve)
    back = respond_in_tiles(h, Pair(x, a, x, a, epsilon))
    dx, da, depsilon = tangents[:3]
    dcost = 2 * vdot(h, da) + 2 * vdot(a[:, None] * (x - back.barycentre), dx)
    dcost += vdot((solved.cost - jnp.vdot(a, back.spent)) / epsilon, depsilon)
    return solved, SelfCoupling(dcost, dh, jnp.zeros_like(solved.error))
