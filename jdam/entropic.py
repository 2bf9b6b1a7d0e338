"""Entropic optimal transport between weighted clouds: potentials, barycentric maps, costs.

    OT_ε(μ, ν) = min over π ∈ Π(μ, ν) of ∫ ½|x−y|² dπ + ε KL(π | μ⊗ν)
               = max over f, g of ⟨f, a⟩ + ⟨g, b⟩ − ε(Σ aⱼbₖ exp((fⱼ+gₖ−Cⱼₖ)/ε) − 1)

for μ = Σ aⱼδ(xⱼ) and ν = Σ bₖδ(yₖ), in the log domain. Atoms of weight 0 change nothing, and get
potentials and maps by extension. First derivatives follow from the envelope theorem, those of
potentials and maps from the implicit function theorem: no iteration is ever differentiated.
"""

import math
import warnings
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam._batching import in_chunks
from jdam._scaling import (
    SelfCoupling,
    Solver,
    State,
    conjugate_gradients,
    density_of,
    finish,
    first_burst,
    half_squared_distances,
    log,
    soft_minimum,
    solve_self,
    unsolved,
)


class Coupling(NamedTuple):
    """The solution for two clouds; rows of the plan are exact, columns up to `error`."""

    cost: Float[Array, ""]  # OT_ε
    f: Float[Array, " n"]  # potentials: the plan is aⱼbₖ exp((fⱼ+gₖ−Cⱼₖ)/ε)
    g: Float[Array, " m"]
    barycentre: Float[Array, "n d"]  # T(xⱼ) = Σₖ Pⱼₖyₖ / aⱼ
    error: Float[Array, ""]  # |Pᵀ1 − b|₁


# ------------------------------------------------------------------ two clouds


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def couple(
    solver: Solver,
    x: Float[Array, "n d"],
    a: Float[Array, " n"],
    y: Float[Array, "m d"],
    b: Float[Array, " m"],
    epsilon: Float[Array, ""],
    guess: Float[Array, " m"],
) -> Coupling:
    """The optimal coupling, from a `guess` of g on. Pairs of a vmapped batch are solved a few
    at a time, each to its own convergence."""
    problem = (x, a, y, b, epsilon, guess)
    pairs = _pairs_at_once(x.shape[0] * y.shape[0])
    if solver.method == "ott":
        state = in_chunks(partial(_solve_by_ott, solver), _never, _keep, pairs, problem)
    else:
        start, check, end = (partial(f, solver) for f in (first_burst, unsolved, finish))
        state = in_chunks(start, check, end, pairs, problem)
    cost = jnp.vdot(state.f, a) + jnp.vdot(jnp.where(b > 0, state.g, 0), b)
    return Coupling(cost, state.f, state.g, state.barycentre, state.error)


def _never(found: Any) -> Array:
    return jnp.array(False)


def _keep(args: Any, found: Any) -> Any:
    return found


def _pairs_at_once(size: int) -> int:
    """On a CPU as many pairs as its cache holds; on accelerators as many as keep them busy."""
    numbers = 2**14 if jax.default_backend() == "cpu" else 2**24
    return max(1, numbers // size)


def _respond(
    g: Array, x: Array, a: Array, y: Array, b: Array, epsilon: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """All that g on the atoms of ν determines: f = g^{c,ε}, g extended to atoms of weight 0,
    the barycentric map, the plan's columns, and its rows E as densities against ν."""
    cost = half_squared_distances(x, y)
    on = b > 0
    f = epsilon * soft_minimum(jnp.where(on, g, 0)[None] / epsilon - cost / epsilon, b[None])
    extended = epsilon * soft_minimum((f[:, None] - cost).T / epsilon, a[None])
    g = jnp.where(on, g, extended)
    density = density_of(cost, epsilon, f, g)
    barycentre = density @ (b[:, None] * y)
    return f, g, barycentre, b * (a @ density), density


def _dual(
    f: Array, g: Array, x: Array, a: Array, y: Array, b: Array, epsilon: Array
) -> Float[Array, ""]:
    """⟨f, a⟩ + ⟨g, b⟩ − ε(Σ aⱼbₖ exp((fⱼ+gₖ−Cⱼₖ)/ε) − 1), of which OT_ε is the maximum."""
    density = density_of(half_squared_distances(x, y), epsilon, f, g)
    return jnp.vdot(f, a) + jnp.vdot(g, b) - epsilon * (a @ density @ b - 1)


@couple.defjvp
def _couple_jvp(solver: Solver, primals: tuple, tangents: tuple) -> tuple[Coupling, Coupling]:
    solved = couple(solver, *primals)
    problem, dproblem = primals[:-1], tangents[:-1]  # the guess changes nothing
    _, a, _, b, epsilon = problem
    on = b > 0

    # Columns(problem, g) = b, so that (∂columns/∂g) dg = db − (∂columns/∂problem) dproblem.
    *_, columns, density = _respond(solved.g, *problem)
    dcolumns = jax.jvp(lambda *p: _respond(solved.g, *p)[3], problem, dproblem)[1]

    def hessian(d: Array) -> Array:
        crossed = b * ((a * (density @ (b * d))) @ density)
        return jnp.where(on, columns * d - crossed, 0)

    def solve(matvec: Any, right: Array) -> Array:
        diagonal = jax.lax.stop_gradient(jnp.where(on, columns, 0))
        precision = float(jnp.finfo(right.dtype).eps)
        return conjugate_gradients(matvec, right, diagonal, precision, 2 * right.size + 50)[0]

    right = epsilon * jnp.where(on, dproblem[3] - dcolumns, 0)
    dg = jax.lax.custom_linear_solve(hessian, right, solve, symmetric=True)
    (f, g, *_), (df, dg, dbarycentre, *_) = jax.jvp(_respond, (solved.g, *problem), (dg, *dproblem))
    dcost = jax.jvp(lambda *p: _dual(f, g, *p), problem, dproblem)[1]
    return solved, Coupling(dcost, df, dg, dbarycentre, jnp.zeros_like(solved.error))


def _solve_by_ott(solver: Solver, problem: tuple) -> State:
    """The same by ott-jax's Sinkhorn solver, on ½|x−y|² from differences."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ott-jax imports packages that announce their end
        from ott.geometry.geometry import Geometry
        from ott.problems.linear.linear_problem import LinearProblem
        from ott.solvers.linear.sinkhorn import Sinkhorn
    x, a, y, b, epsilon, _ = problem
    costs = Geometry(cost_matrix=half_squared_distances(x, y), epsilon=epsilon)
    sinkhorn = Sinkhorn(threshold=solver.tol, max_iterations=solver.max_iterations)
    # Users may have set JAX to be stricter than ott-jax is.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        found = sinkhorn(LinearProblem(costs, a, b))
    g = found.g - epsilon * log(b)  # ott's potentials are of the plan, ours of its density
    f, g, barycentre, columns, _ = _respond(jnp.where(b > 0, g, 0), x, a, y, b, epsilon)
    return State(f, g, barycentre, jnp.abs(columns - b).sum(), jnp.asarray(found.n_iters))


# ------------------------------------------------------------------ a cloud and itself


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
    pairs = _pairs_at_once(x.shape[0] ** 2)
    return in_chunks(partial(solve_self, solver), _never, _keep, pairs, (x, a, epsilon))


def self_response(
    h: Float[Array, " n"], x: Float[Array, "n d"], a: Float[Array, " n"], epsilon: Float[Array, ""]
) -> tuple[Float[Array, " n"], Float[Array, "n d"]]:
    """h^{c,ε}, which is h where h is the symmetric potential, and the barycentric map T(xⱼ)."""
    cost = half_squared_distances(x, x)
    f = epsilon * soft_minimum((h[None] - cost) / epsilon, a[None])
    return f, density_of(cost, epsilon, f, h) @ (a[:, None] * x)


@couple_with_itself.defjvp
def _couple_with_itself_jvp(
    solver: Solver, primals: tuple, tangents: tuple
) -> tuple[SelfCoupling, SelfCoupling]:
    solved = couple_with_itself(solver, *primals)
    problem, dproblem, h = primals[:3], tangents[:3], solved.potential

    # h = h^{c,ε}, so that (I + E) dh = (∂h^{c,ε}/∂problem) dproblem.
    right = jax.jvp(lambda *p: self_response(h, *p)[0], problem, dproblem)[1]

    def plus_plan(d: Array) -> Array:
        return d - jax.jvp(lambda h: self_response(h, *problem)[0], (h,), (d,))[1]

    def solve(matvec: Any, right: Array) -> Array:
        rounds = math.ceil(-math.log(float(jnp.finfo(right.dtype).eps)) / math.log(3))
        return jax.lax.fori_loop(
            0, rounds, lambda _, d: d + (right - matvec(d)) * (2 / 3), jnp.zeros_like(right)
        )

    dh = jax.lax.custom_linear_solve(plus_plan, right, solve, transpose_solve=solve)
    dcost = jax.jvp(lambda x, a, e: _dual(h, h, x, a, x, a, e), problem, dproblem)[1]
    return solved, SelfCoupling(dcost, dh, jnp.zeros_like(solved.error))
