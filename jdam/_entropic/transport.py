"""Entropic optimal transport between weighted clouds: potentials, barycentric maps, costs.

    OT_ε(μ, ν) = min over π ∈ Π(μ, ν) of ∫ ½|x−y|² dπ + ε KL(π | μ⊗ν)
               = max over f, g of ⟨f, a⟩ + ⟨g, b⟩ − ε(Σ aⱼbₖ exp((fⱼ+gₖ−Cⱼₖ)/ε) − 1)

for μ = Σ aⱼδ(xⱼ) and ν = Σ bₖδ(yₖ), in the log domain. Atoms of weight 0 change nothing, and get
potentials and maps by extension. First derivatives follow from the envelope theorem, those of
potentials and maps from the implicit function theorem: no iteration is ever differentiated.
"""

import warnings
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from jdam._core.batching import compute_where, in_tiles
from jdam._core.derivatives import ITERATED, full_precision, jvp, moves, vdot
from jdam._core.loops import repeat
from jdam._entropic.problem import (
    Coupling,
    Pair,
    Solver,
    State,
    density_of,
    half_squared_distances,
    log,
    pairs_at_once,
    soft_minimum,
)
from jdam._entropic.scaling import conjugate_gradients, finish, first_burst, unsolved


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def couple(solver: Solver, pair: Pair, guess: Float[Array, " m"]) -> Coupling:
    """The optimal coupling, from a `guess` of g on. Pairs of a vmapped batch are solved a few
    at a time, each to its own convergence."""
    # Sums of weights may differ by the rounding of another dtype, more than the tolerance.
    pair = pair._replace(a=pair.a / pair.a.sum(), b=pair.b / pair.b.sum())
    pairs = pairs_at_once(pair.a.size * pair.b.size)
    where = partial(compute_where, at_once=pairs, flat=True)
    if solver.method == "ott":
        state = in_tiles(partial(_solve_by_ott, solver), pairs, pair, flat=True)
    else:
        state = in_tiles(partial(first_burst, solver), pairs, pair, guess, flat=True)
        state = where(unsolved(solver, state), partial(finish, solver), state, state, pair)
    state = where(pair.epsilon > pair.size(), _sharpened, state, state, pair)
    cost = jnp.vdot(state.f, pair.a) + jnp.vdot(jnp.where(pair.b > 0, state.g, 0), pair.b)
    return Coupling(cost, state.f, state.g, state.barycentre, state.error)


class Response(NamedTuple):
    """What a potential on the atoms x of one cloud says of atoms y of another."""

    potential: Float[Array, " m"]  # g = f^{c,ε}
    barycentre: Float[Array, "m d"]  # T(yₖ) = Σⱼ Pⱼₖxⱼ / bₖ
    spent: Float[Array, " m"]  # Σⱼ PⱼₖCⱼₖ / bₖ
    density: Any  # (m, n), of the plan, against the product of weights; None where dropped


def respond(f: Float[Array, " n"], pair: Pair) -> Response:
    """The soft c-transform g = f^{c,ε}, and the plan of f and g, all of whose mass at yₖ is bₖ
    whatever f is."""
    x, a, y, _, epsilon = pair
    cost = half_squared_distances(y, x)
    f = jnp.where(a > 0, f, 0)
    g = epsilon * soft_minimum((f[None] - cost) / epsilon, a[None])
    density = density_of(cost, epsilon, g, f)
    return Response(g, density @ (a[:, None] * x), (density * cost) @ a, density)


@jax.custom_jvp
def respond_in_tiles(f: Float[Array, " n"], pair: Pair) -> Response:
    """`respond` without the density; of a vmapped batch, a few pairs at a time."""
    pairs = pairs_at_once(pair.a.size * len(pair.y))
    return in_tiles(_respond_without_density, pairs, f, pair, flat=True)


def _respond_without_density(f: Array, pair: Pair) -> Response:
    return respond(f, pair)._replace(density=None)


@partial(respond_in_tiles.defjvp, symbolic_zeros=True)
@full_precision
def _respond_in_tiles_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    return jvp(_respond_without_density, primals, tangents)


@partial(couple.defjvp, symbolic_zeros=True)
@full_precision
def _couple_jvp(
    solver: Solver, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Coupling, Coupling]:
    solved = checkpoint_name(couple(solver, *primals), ITERATED)
    (pair, _), (dpair, _) = primals, tangents  # the guess changes nothing

    def answer(g: Array, pair: Pair) -> tuple[Response, Array]:
        x, a, y, b, epsilon = pair
        found = respond(g, Pair(y, b, x, a, epsilon))
        return found, b * (a @ found.density)

    # The columns are b, so that (∂columns/∂g) dg = db − (∂columns/∂pair) dpair.
    a, b, on = pair.a, pair.b, pair.b > 0
    (found, columns), (_, dcolumns) = jvp(partial(answer, solved.g), (pair,), (dpair,))
    density = found.density

    def hessian(d: Array) -> Array:
        # The last term makes it definite: potentials are free up to a constant, mass is conserved.
        crossed = b * ((a * (density @ (b * d))) @ density)
        constant = columns * (jnp.vdot(columns, d) / columns.sum())
        return jnp.where(on, columns * d - crossed + constant, 0)

    def solve(matvec: Any, right: Array) -> Array:
        diagonal = jax.lax.stop_gradient(jnp.where(on, columns, 0))
        precision = float(jnp.finfo(right.dtype).eps)
        return conjugate_gradients(matvec, right, diagonal, precision, 2 * right.size + 50)[0]

    db = dpair.b if moves(dpair.b) else jnp.zeros_like(b)
    right = pair.epsilon * jnp.where(on, db - dcolumns, 0)
    dg = jax.lax.custom_linear_solve(hessian, right, solve, symmetric=True)
    _, (dfound, _) = jvp(answer, (solved.g, pair), (dg, dpair))
    dcost = _dcost(solved, pair, dpair)
    none = jnp.zeros_like(solved.error)
    return solved, Coupling(dcost, dfound.potential, dg, dfound.barycentre, none)


def _dcost(solved: Coupling, pair: Pair, dpair: Pair) -> Float[Array, ""]:
    """dOT_ε = ⟨f, da⟩ + ⟨g, db⟩ + Σ aⱼ⟨xⱼ − T(xⱼ), dxⱼ⟩ + Σ bₖ⟨yₖ − T(yₖ), dyₖ⟩ + KL dε, by the
    envelope theorem; KL(P | a⊗b) = (OT_ε − ⟨P, C⟩)/ε."""
    x, a, y, b, epsilon = pair
    total = vdot(solved.f, dpair.a) + vdot(a[:, None] * (x - solved.barycentre), dpair.x)
    if any(map(moves, (dpair.y, dpair.b, dpair.epsilon))):
        back = respond_in_tiles(solved.f, pair)
        total += vdot(back.potential, dpair.b)
        total += vdot(b[:, None] * (y - back.barycentre), dpair.y)
        total += vdot((solved.cost - jnp.vdot(b, back.spent)) / epsilon, dpair.epsilon)
    return total


def _sharpened(state: State, pair: Pair) -> State:
    """The same with potentials that keep their digits where ε is larger than all costs, so that
    logarithms of scalings have none."""
    x, a, y, b, epsilon = pair
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


def _solve_by_ott(solver: Solver, pair: Pair) -> State:
    """The same by ott-jax's Sinkhorn solver, on ½|x−y|² from differences."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ott-jax imports packages that announce their end
        from ott.geometry.geometry import Geometry
        from ott.problems.linear.linear_problem import LinearProblem
        from ott.solvers.linear.sinkhorn import Sinkhorn
    x, a, y, b, epsilon = pair
    costs = Geometry(cost_matrix=half_squared_distances(x, y), epsilon=epsilon)  # type: ignore[arg-type]
    sinkhorn = Sinkhorn(threshold=solver.tol, max_iterations=solver.max_iterations)
    # Users may have set JAX to be stricter than ott-jax is.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        found = sinkhorn(LinearProblem(costs, a, b))
    g = found.g - epsilon * log(b)  # ott's potentials are of the plan, ours of its density
    answer = respond(g, Pair(y, b, x, a, epsilon))
    error = jnp.abs(b * (a @ answer.density) - b).sum()
    count, none = jnp.asarray(found.n_iters), jnp.zeros_like(error)
    return State(answer.potential, g, answer.barycentre, error, count, none)
