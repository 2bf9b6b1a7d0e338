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
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from jdam._batching import compute_if, in_chunks
from jdam._derivatives import ITERATED, full_precision, jvp, moves, vdot
from jdam._loops import repeat
from jdam._scaling import (
    SelfCoupling,
    Solver,
    State,
    conjugate_gradients,
    density_of,
    finish,
    first_burst,
    half_square,
    half_squared_distances,
    log,
    soft_minimum,
    solve_self,
    some_iterations,
    unsolved,
)
from jdam.linalg import rounding


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
    # Sums of weights may differ by the rounding of another dtype, more than the tolerance.
    a, b = a / a.sum(), b / b.sum()
    problem = (x, a, y, b, epsilon, guess)
    pairs = _pairs_at_once(x.shape[0] * y.shape[0])
    if solver.method == "ott":
        state = in_chunks(partial(_solve_by_ott, solver), pairs, problem)
    else:
        start, check, end = (partial(f, solver) for f in (first_burst, unsolved, finish))
        state = in_chunks(start, pairs, problem, unfinished=check, finish=end)
    state = in_chunks(_sharpened, pairs, (problem, state))
    cost = jnp.vdot(state.f, a) + jnp.vdot(jnp.where(b > 0, state.g, 0), b)
    return Coupling(cost, state.f, state.g, state.barycentre, state.error)


# ------------------------------------------------------------------ lower bounds


def dual_after_half_iteration(
    x: Float[Array, "n d"],
    a: Float[Array, " n"],
    y: Float[Array, "m d"],
    b: Float[Array, " m"],
    epsilon: Float[Array, ""],
    guess: Float[Array, " m"],
) -> Float[Array, ""]:
    """A lower bound on OT_ε: ⟨f, a⟩ + ⟨g, b⟩ with f = g^{c,ε}, less its rounding. As any dual
    value is one, costs may come from products, and potentials from a `guess` of g."""
    g, half = jnp.where(b > 0, guess, 0), jnp.vecdot(y, y) / 2
    logits = (y / epsilon) @ x.T + ((g - half) / epsilon + log(b))[:, None]
    top = logits.max(0)
    f = jnp.vecdot(x, x) / 2 - epsilon * (top + jnp.log(jnp.exp(logits - top[None]).sum(0)))
    largest = jnp.vecdot(x, x).max() + jnp.vecdot(y, y).max() + jnp.abs(g).max()
    error = largest * rounding(x.shape[0] + y.shape[0] + x.shape[1], x.dtype)
    return jnp.vdot(f, a) + jnp.vdot(g, b) - error


def dual_after_some_iterations(
    solver: Solver, x: Array, a: Array, y: Array, b: Array, epsilon: Array, guess: Array
) -> Float[Array, ""]:
    """The same from the g that some scaling iterations make of the guess."""
    pairs = 4 * _pairs_at_once(x.shape[0] * y.shape[0])
    iterate = partial(some_iterations, solver)
    g = in_chunks(iterate, pairs, (x, a, y, b, epsilon, guess))
    return dual_after_half_iteration(x, a, y, b, epsilon, g)


def _pairs_at_once(size: int) -> int:
    """On a CPU as many pairs as its cache holds; on accelerators as many as keep them busy."""
    numbers = 2**14 if jax.default_backend() == "cpu" else 2**24
    return max(1, numbers // size)


class Response(NamedTuple):
    """What a potential on the atoms x of one cloud says of atoms y of another."""

    potential: Float[Array, " m"]  # g = f^{c,ε}
    barycentre: Float[Array, "m d"]  # T(yₖ) = Σⱼ Pⱼₖxⱼ / bₖ
    spent: Float[Array, " m"]  # Σⱼ PⱼₖCⱼₖ / bₖ
    density: Float[Array, "m n"]  # of the plan, against the product of weights


def respond(
    f: Float[Array, " n"],
    x: Float[Array, "n d"],
    a: Float[Array, " n"],
    y: Float[Array, "m d"],
    epsilon: Float[Array, ""],
) -> Response:
    """The soft c-transform g = f^{c,ε}, and the plan of f and g, all of whose mass at yₖ is bₖ
    whatever f is."""
    cost = half_squared_distances(y, x)
    f = jnp.where(a > 0, f, 0)
    g = epsilon * soft_minimum((f[None] - cost) / epsilon, a[None])
    density = density_of(cost, epsilon, g, f)
    return Response(g, density @ (a[:, None] * x), (density * cost) @ a, density)


@jax.custom_jvp
def _respond_in_chunks(
    f: Array, x: Array, a: Array, y: Array, epsilon: Array
) -> tuple[Array, Array, Array]:
    """`respond` without the density; of a vmapped batch, a few pairs at a time."""
    pairs = _pairs_at_once(x.shape[0] * y.shape[0])
    return in_chunks(_respond_to, pairs, (f, x, a, y, epsilon))


def _respond_to(args: tuple) -> tuple[Array, Array, Array]:
    answer = respond(*args)
    return answer.potential, answer.barycentre, answer.spent


@partial(_respond_in_chunks.defjvp, symbolic_zeros=True)
@full_precision
def _respond_in_chunks_jvp(primals: tuple, tangents: tuple) -> Any:
    return jvp(lambda *args: _respond_to(args), primals, tangents)


@partial(couple.defjvp, symbolic_zeros=True)
@full_precision
def _couple_jvp(solver: Solver, primals: tuple, tangents: tuple) -> tuple[Coupling, Coupling]:
    solved = checkpoint_name(couple(solver, *primals), ITERATED)
    problem, dproblem = primals[:-1], tangents[:-1]  # the guess changes nothing

    def answer(g: Array, x: Array, a: Array, y: Array, b: Array, epsilon: Array) -> tuple:
        found = respond(g, y, b, x, epsilon)
        return found.potential, found.barycentre, b * (a @ found.density), found.density

    # The columns are b, so that (∂columns/∂g) dg = db − (∂columns/∂problem) dproblem.
    _, a, _, b, epsilon = problem
    on = b > 0
    found, dfound = jvp(partial(answer, solved.g), problem, dproblem)
    columns, density = found[2:]

    def hessian(d: Array) -> Array:
        # The last term makes it definite: potentials are free up to a constant, mass is conserved.
        crossed = b * ((a * (density @ (b * d))) @ density)
        constant = columns * (jnp.vdot(columns, d) / columns.sum())
        return jnp.where(on, columns * d - crossed + constant, 0)

    def solve(matvec: Any, right: Array) -> Array:
        diagonal = jax.lax.stop_gradient(jnp.where(on, columns, 0))
        precision = float(jnp.finfo(right.dtype).eps)
        return conjugate_gradients(matvec, right, diagonal, precision, 2 * right.size + 50)[0]

    db = dproblem[3] if moves(dproblem[3]) else jnp.zeros_like(b)
    right = epsilon * jnp.where(on, db - dfound[2], 0)
    dg = jax.lax.custom_linear_solve(hessian, right, solve, symmetric=True)
    df, dbarycentre, *_ = jvp(answer, (solved.g, *problem), (dg, *dproblem))[1]
    dcost = _dcost(solved.f, solved.barycentre, solved.cost, problem, dproblem)
    return solved, Coupling(dcost, df, dg, dbarycentre, jnp.zeros_like(solved.error))


def _dcost(f: Array, barycentre: Array, cost: Array, problem: tuple, dproblem: tuple) -> Array:
    """dOT_ε = ⟨f, da⟩ + ⟨g, db⟩ + Σ aⱼ⟨xⱼ − T(xⱼ), dxⱼ⟩ + Σ bₖ⟨yₖ − T(yₖ), dyₖ⟩ + KL dε, by the
    envelope theorem; KL(P | a⊗b) = (OT_ε − ⟨P, C⟩)/ε."""
    x, a, y, b, epsilon = problem
    dx, da, dy, db, depsilon = dproblem
    total = vdot(f, da) + vdot(a[:, None] * (x - barycentre), dx)
    if any(map(moves, (dy, db, depsilon))):
        g, counterpart, spent = _respond_in_chunks(f, x, a, y, epsilon)
        total += vdot(g, db) + vdot(b[:, None] * (y - counterpart), dy)
        total += vdot((cost - jnp.vdot(b, spent)) / epsilon, depsilon)
    return total


def _sharpened(args: tuple[tuple, State]) -> State:
    """The same with potentials that keep their digits where ε is larger than all costs, so that
    logarithms of scalings have none."""
    problem, state = args
    x, a, y, b, epsilon, _ = problem
    large = epsilon > half_square(x, a).max() + half_square(y, b).max()

    def answers(state: State, problem: tuple) -> State:
        x, a, y, b, epsilon, _ = problem
        cost = half_squared_distances(x, y) / epsilon
        g = jnp.where(b > 0, state.g, 0)
        g = (g - jnp.vdot(b, g)) / epsilon  # a constant, free to choose, may be large

        def answer(g: Array) -> Array:
            return soft_minimum(g[None] - cost, b[None])

        def turn(g: Array) -> Array:
            return soft_minimum(answer(g)[None] - cost.T, a[None])

        g = repeat(2, turn, g, cost)  # what one turn leaves of the rounding is a constant
        f = answer(g)
        return state._replace(f=epsilon * f, g=epsilon * g)

    return compute_if(large, answers, state, state, problem)


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
    answer = respond(g, y, b, x, epsilon)
    error = jnp.abs(b * (a @ answer.density) - b).sum()
    count, none = jnp.asarray(found.n_iters), jnp.zeros_like(error)
    return State(answer.potential, g, answer.barycentre, error, count, none)


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
    return in_chunks(partial(solve_self, solver), pairs, (x, a / a.sum(), epsilon))


@partial(couple_with_itself.defjvp, symbolic_zeros=True)
@full_precision
def _couple_with_itself_jvp(
    solver: Solver, primals: tuple, tangents: tuple
) -> tuple[SelfCoupling, SelfCoupling]:
    solved = couple_with_itself(solver, *primals)
    problem, h = primals[:3], solved.potential
    x, a, epsilon = problem

    def answer(h: Array, x: Array, a: Array, epsilon: Array) -> Array:
        return respond(h, x, a, x, epsilon).potential

    # h = h^{c,ε}, so that (I + E) dh = (∂h^{c,ε}/∂problem) dproblem.
    right = jvp(partial(answer, h), problem, tangents[:3])[1]

    def plus_plan(d: Array) -> Array:
        return d - jax.jvp(lambda h: answer(h, *problem), (h,), (d,))[1]

    def solve(matvec: Any, right: Array) -> Array:
        rounds = math.ceil(-math.log(float(jnp.finfo(right.dtype).eps)) / math.log(3))
        return repeat(
            rounds, lambda d: d + (right - matvec(d)) * (2 / 3), jnp.zeros_like(right), right
        )

    dh = jax.lax.custom_linear_solve(plus_plan, right, solve, transpose_solve=solve)
    _, barycentre, spent = _respond_in_chunks(h, x, a, x, epsilon)
    dx, da, depsilon = tangents[:3]
    dcost = 2 * vdot(h, da) + 2 * vdot(a[:, None] * (x - barycentre), dx)
    dcost += vdot((solved.cost - jnp.vdot(a, spent)) / epsilon, depsilon)
    return solved, SelfCoupling(dcost, dh, jnp.zeros_like(solved.error))
