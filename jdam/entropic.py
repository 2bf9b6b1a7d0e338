"""Entropic optimal transport between weighted clouds: potentials, barycentric maps, costs.

    OT_ε(μ, ν) = min over π ∈ Π(μ, ν) of ∫ ½|x−y|² dπ + ε KL(π | μ⊗ν)
               = max over f, g of ⟨f, a⟩ + ⟨g, b⟩ − ε(Σ aⱼbₖ exp((fⱼ+gₖ−Cⱼₖ)/ε) − 1)

for μ = Σ aⱼδ(xⱼ) and ν = Σ bₖδ(yₖ), in the log domain. Atoms of weight 0 change nothing, and get
potentials and maps by extension. First derivatives follow from the envelope theorem, those of
potentials and maps from the implicit function theorem: no iteration is ever differentiated.
"""

import math
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdam._batching import in_chunks

#: Scaling iterations before the first Newton step, and after each.
FIRST_BURST, LATER_BURST = 40, 10
#: An error of the marginal beyond which ε is annealed, and the ratio of its ladder.
POOR, DESCENT = 0.01, 2.5
#: Exponents of the plan's density that count as infinite: only weights of zero allow them.
LARGE = 80.0


@dataclass(frozen=True)
class Solver:
    """When to stop: at an L1 error `tol` of the marginal, or after `max_iterations`."""

    tol: float
    max_iterations: int
    method: str = "stabilised"


class Coupling(NamedTuple):
    """The solution for two clouds; rows of the plan are exact, columns up to `error`."""

    cost: Float[Array, ""]  # OT_ε
    f: Float[Array, " n"]  # potentials: the plan is aⱼbₖ exp((fⱼ+gₖ−Cⱼₖ)/ε)
    g: Float[Array, " m"]
    barycentre: Float[Array, "n d"]  # T(xⱼ) = Σₖ Pⱼₖyₖ / aⱼ
    error: Float[Array, ""]  # |Pᵀ1 − b|₁


class SelfCoupling(NamedTuple):
    """The solution for a cloud and itself, with one symmetric potential."""

    cost: Float[Array, ""]
    potential: Float[Array, " n"]
    error: Float[Array, ""]


def half_squared_distances(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """½|xⱼ − yₖ|² from differences, one dimension after the other: digits that the expanded
    square loses, and no array (n, m, d)."""

    def add(total: Array, coordinates: tuple[Array, Array]) -> tuple[Array, None]:
        p, q = coordinates
        return total + (p[:, None] - q[None]) ** 2, None

    start = jnp.zeros((x.shape[0], y.shape[0]), x.dtype)
    return jax.lax.scan(add, start, (x.T, y.T))[0] / 2


def _log(weights: Float[Array, " n"]) -> Float[Array, " n"]:
    on = weights > 0
    return jnp.where(on, jnp.log(jnp.where(on, weights, 1)), -jnp.inf)


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
        unsolved = partial(_unsolved, solver)
        quick, finish = partial(_first_burst, solver), partial(_finish, solver)
        state = in_chunks(quick, unsolved, finish, pairs, problem)
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


class _Plan(NamedTuple):
    """diag(a u) M diag(v): rows sum to a exactly, since u = 1/(M v)."""

    u: Float[Array, " n"]
    v: Float[Array, " m"]
    columns: Float[Array, " m"]  # Mᵀ(a u), so that the plan's columns sum to columns·v


class _State(NamedTuple):
    f: Float[Array, " n"]
    g: Float[Array, " m"]
    barycentre: Float[Array, "n d"]
    error: Float[Array, ""]
    iterations: Int[Array, ""]


@partial(jax.jit, static_argnums=0)
def _first_burst(solver: Solver, problem: tuple) -> _State:
    """Scaling iterations on the kernel of the guess: enough for most pairs."""
    *clouds, epsilon, guess = problem
    return _round(solver, clouds, epsilon, guess, FIRST_BURST, newton=False)


def _unsolved(solver: Solver, state: _State) -> Bool[Array, ""]:
    return state.error > solver.tol


@partial(jax.jit, static_argnums=0)
def _finish(solver: Solver, problem: tuple, first: _State) -> _State:
    """Rounds of a Newton step and a few scaling iterations, each on a fresh kernel. Where the
    first burst was far off, they come down a ladder of larger ε."""
    x, a, y, b, epsilon, _ = problem
    size = _half_square(x, a).max() + _half_square(y, b).max()
    top = jnp.where(first.error < POOR, 1, jnp.maximum(size / epsilon, 1))

    def pending(carry: tuple[Array, _State]) -> Array:
        level, state = carry
        unsolved = _unsolved(solver, state) | (level > 1)
        return unsolved & (state.iterations < solver.max_iterations)

    def turn(carry: tuple[Array, _State]) -> tuple[Array, _State]:
        level, last = carry
        burst = jnp.minimum(solver.max_iterations - last.iterations, LATER_BURST)
        state = _round(solver, (x, a, y, b), level * epsilon, last.g, burst, newton=True)
        level = jnp.where(state.error < POOR, jnp.maximum(level / DESCENT, 1), level)
        return level, state._replace(iterations=last.iterations + state.iterations)

    level, state = jax.lax.while_loop(pending, turn, (top, first))
    return state._replace(error=jnp.where(level > 1, jnp.inf, state.error))


def _half_square(x: Float[Array, "n d"], weights: Float[Array, " n"]) -> Float[Array, " n"]:
    return jnp.where(weights > 0, jnp.vecdot(x, x) / 2, 0)


def _round(
    solver: Solver, clouds: Any, epsilon: Array, g: Array, burst: Any, *, newton: bool
) -> _State:
    """A kernel whose rows are exact for g, improvements of g on it, and what follows from it."""
    x, a, y, b = clouds
    on, least = b > 0, float(jnp.finfo(b.dtype).tiny) ** 0.5
    g, root = g / epsilon, jnp.sqrt(epsilon)
    logits = (g + _log(b))[None] - half_squared_distances(x / root, y / root)
    top = logits.max(1)
    depth = logits - top[:, None]
    kernel = jnp.where(depth > -LARGE, jnp.exp(depth), 0)  # denormal numbers would be slow

    def complete(v: Array) -> _Plan:
        u = 1 / jnp.maximum(kernel @ v, least)
        return _Plan(u, v, (a * u) @ kernel)

    def missed(plan: _Plan) -> Array:
        return jnp.abs(jnp.where(on, plan.columns * plan.v - b, 0)).sum()

    plan, iterations = complete(jnp.ones_like(b)), jnp.array(0, jnp.int32)
    if newton:
        step, iterations = _newton_direction(kernel, a, b, plan)
        # J is self-concordant with respect to the oscillation: this length always ascends.
        step = step - step.max()  # a constant changes nothing, and may be large
        size = -step.min()
        length = jnp.where(size > 0, jnp.log1p(size) / jnp.where(size > 0, size, 1), 0)
        plan = complete(jnp.exp(length * step))

    def scale(carry: tuple[Array, _Plan, Array]) -> tuple[Array, _Plan, Array]:
        count, plan, _ = carry
        plan = complete(jnp.where(on, b / jnp.maximum(plan.columns, least), 1))
        return count + 1, plan, missed(plan)

    def unfinished(carry: tuple[Array, _Plan, Array]) -> Array:
        count, _, error = carry
        return (error > solver.tol) & (count < burst)

    start = (jnp.array(0, jnp.int32), plan, missed(plan))
    count, plan, error = jax.lax.while_loop(unfinished, scale, start)
    return _State(
        f=epsilon * (jnp.log(plan.u) - top),
        g=epsilon * (g + jnp.log(plan.v)),
        barycentre=plan.u[:, None] * (kernel @ (plan.v[:, None] * y)),
        error=error,
        iterations=iterations + count,
    )


def _newton_direction(kernel: Array, a: Array, b: Array, plan: _Plan) -> tuple[Array, Array]:
    """δ with (diag(c) − Eᵀdiag(a)E) δ = b − c, E the plan's rows and c its columns: the Newton
    direction of the semi-dual objective, in units of ε. The plan must have v = 1."""
    weight = a * plan.u**2

    def hessian(d: Array) -> Array:
        return plan.columns * d - (weight * (kernel @ d)) @ kernel

    gradient = jnp.where(b > 0, b - plan.columns, 0)
    # Precise enough for superlinear convergence, and no more.
    precision = jnp.minimum(0.1, jnp.abs(gradient).sum())
    return _conjugate_gradients(hessian, gradient, plan.columns, precision, 100)


def _conjugate_gradients(
    matvec: Any, right: Array, diagonal: Array, precision: Any, most: int
) -> tuple[Array, Array]:
    """The solution of a semidefinite system, preconditioned by its diagonal, to a relative L1
    residual `precision`, and the number of iterations. Where it breaks down it stops."""
    least = float(jnp.finfo(right.dtype).tiny) ** 0.5
    inverse = jnp.where(diagonal > least, 1 / jnp.maximum(diagonal, least), 0)
    goal = precision * jnp.abs(right).sum()

    def unfinished(carry: tuple) -> Array:
        count, _, residual, _, decrement = carry
        return (jnp.abs(residual).sum() > goal) & (decrement > 0) & (count < most)

    def turn(carry: tuple) -> tuple:
        count, solution, residual, direction, decrement = carry
        image = matvec(direction)
        curvature = jnp.vdot(direction, image)
        convex = curvature > 0
        length = jnp.where(convex, decrement / jnp.where(convex, curvature, 1), 0)
        solution, residual = solution + length * direction, residual - length * image
        scaled = inverse * residual
        following = jnp.where(convex, jnp.vdot(residual, scaled), 0)
        direction = scaled + following / decrement * direction
        return count + 1, solution, residual, direction, following

    scaled = inverse * right
    start = (jnp.array(0, jnp.int32), jnp.zeros_like(right), right, scaled, jnp.vdot(right, scaled))
    count, solution, *_ = jax.lax.while_loop(unfinished, turn, start)
    return solution, count


def _respond(
    x: Array, a: Array, y: Array, b: Array, epsilon: Array, g: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """All that g on the atoms of ν determines: f = g^{c,ε}, g extended to atoms of weight 0,
    the barycentric map, the plan's columns, and its rows E as densities against ν."""
    cost = half_squared_distances(x, y)
    on = b > 0
    f = epsilon * _soft_minimum(jnp.where(on, g, 0)[None] / epsilon - cost / epsilon, b[None])
    extended = epsilon * _soft_minimum((f[:, None] - cost).T / epsilon, a[None])
    g = jnp.where(on, g, extended)
    density = _density(cost, epsilon, f, g)
    barycentre = density @ (b[:, None] * y)
    return f, g, barycentre, b * (a @ density), density


def _soft_minimum(logits: Float[Array, "n m"], weights: Float[Array, "1 m"]) -> Float[Array, " n"]:
    """−log Σₖ wₖ exp(lⱼₖ), with its derivative in weights of zero too."""
    top = jnp.where(weights > 0, logits, -jnp.inf).max(1, keepdims=True)
    top = jax.lax.stop_gradient(top)
    total = jnp.sum(weights * jnp.exp(jnp.minimum(logits - top, LARGE)), axis=1)
    return -(top[:, 0] + jnp.log(total))


def _density(cost: Array, epsilon: Array, f: Array, g: Array) -> Float[Array, "n m"]:
    return jnp.exp(jnp.minimum((f[:, None] + g[None] - cost) / epsilon, LARGE))


def _dual(
    x: Array, a: Array, y: Array, b: Array, epsilon: Array, f: Array, g: Array
) -> Float[Array, ""]:
    """⟨f, a⟩ + ⟨g, b⟩ − ε(Σ aⱼbₖ exp((fⱼ+gₖ−Cⱼₖ)/ε) − 1), of which OT_ε is the maximum."""
    density = _density(half_squared_distances(x, y), epsilon, f, g)
    return jnp.vdot(f, a) + jnp.vdot(g, b) - epsilon * (a @ density @ b - 1)


@couple.defjvp
def _couple_jvp(solver: Solver, primals: tuple, tangents: tuple) -> tuple[Coupling, Coupling]:
    solved = couple(solver, *primals)
    problem, dproblem = primals[:-1], tangents[:-1]  # the guess changes nothing
    x, a, y, b, epsilon = problem
    on = b > 0

    # Columns(problem, g) = b, so that (∂columns/∂g) dg = db − (∂columns/∂problem) dproblem.
    *_, columns, density = _respond(*problem, solved.g)
    dcolumns = jax.jvp(lambda *p: _respond(*p, solved.g)[3], problem, dproblem)[1]

    def hessian(d: Array) -> Array:
        crossed = b * ((a * (density @ (b * d))) @ density)
        return jnp.where(on, columns * d - crossed, 0)

    def solve(matvec: Any, right: Array) -> Array:
        diagonal = jax.lax.stop_gradient(jnp.where(on, columns, 0))
        precision = float(jnp.finfo(right.dtype).eps)
        return _conjugate_gradients(matvec, right, diagonal, precision, 2 * right.size + 50)[0]

    right = epsilon * jnp.where(on, dproblem[3] - dcolumns, 0)
    dg = jax.lax.custom_linear_solve(hessian, right, solve, symmetric=True)
    (f, g, *_), (df, dg, dbarycentre, *_) = jax.jvp(_respond, (*problem, solved.g), (*dproblem, dg))
    dcost = jax.jvp(lambda *p: _dual(*p, f, g), problem, dproblem)[1]
    return solved, Coupling(dcost, df, dg, dbarycentre, jnp.zeros_like(solved.error))


def _solve_by_ott(solver: Solver, problem: tuple) -> _State:
    """The same by ott-jax's Sinkhorn solver, on ½|x−y|² from differences."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ott-jax imports packages that announce their end
        from ott.geometry.geometry import Geometry
        from ott.problems.linear.linear_problem import LinearProblem
        from ott.solvers.linear.sinkhorn import Sinkhorn
    x, a, y, b, epsilon, guess = problem
    costs = Geometry(cost_matrix=half_squared_distances(x, y), epsilon=epsilon)
    sinkhorn = Sinkhorn(threshold=solver.tol, max_iterations=solver.max_iterations)
    found = sinkhorn(LinearProblem(costs, a, b), init=(None, guess + epsilon * _log(b)))
    g = found.g - epsilon * _log(b)  # ott's potentials are of the plan, ours of its density
    f, g, barycentre, columns, _ = _respond(x, a, y, b, epsilon, jnp.where(b > 0, g, 0))
    return _State(f, g, barycentre, jnp.abs(columns - b).sum(), found.n_iters)


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
    return in_chunks(partial(_solve_self, solver), _never, _keep, pairs, (x, a, epsilon))


@partial(jax.jit, static_argnums=0)
def _solve_self(solver: Solver, problem: tuple[Array, Array, Array]) -> SelfCoupling:
    """h ← h/3 + 2/3 h^{c,ε}: the coupling's spectrum lies in [0, 1], so that each iteration
    takes two thirds off the error at least. exp(h/ε) lies between √min a and 1/√min a: no
    kernel on the way overflows or vanishes."""
    x, a, epsilon = problem
    root = jnp.sqrt(epsilon)
    cost = half_squared_distances(x / root, x / root)
    kernel = jnp.exp(-cost)

    def missed(u: Array, sums: Array) -> Array:
        return jnp.vdot(a, jnp.abs(u * sums - 1))

    def average(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, u, sums = carry
        u = jnp.where(a > 0, jnp.exp((jnp.log(u) - 2 * jnp.log(sums)) / 3), 1)
        return count + 1, u, kernel @ (a * u)

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        count, u, sums = carry
        return (missed(u, sums) > solver.tol) & (count < solver.max_iterations)

    start = (jnp.array(0, jnp.int32), jnp.ones_like(a), kernel @ a)
    _, u, sums = jax.lax.while_loop(unfinished, average, start)
    extended = _soft_minimum(jnp.log(u)[None] - cost, a[None])
    h = epsilon * jnp.where(a > 0, jnp.log(u), extended)
    cost = 2 * jnp.vdot(h, a) - epsilon * (jnp.vdot(a, u * sums) - 1)
    return SelfCoupling(cost, h, missed(u, sums))


def self_response(
    x: Float[Array, "n d"], a: Float[Array, " n"], epsilon: Float[Array, ""], h: Float[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, "n d"]]:
    """h^{c,ε}, which is h where h is the symmetric potential, and the barycentric map T(xⱼ)."""
    cost = half_squared_distances(x, x)
    f = epsilon * _soft_minimum((h[None] - cost) / epsilon, a[None])
    return f, _density(cost, epsilon, f, h) @ (a[:, None] * x)


@couple_with_itself.defjvp
def _couple_with_itself_jvp(
    solver: Solver, primals: tuple, tangents: tuple
) -> tuple[SelfCoupling, SelfCoupling]:
    solved = couple_with_itself(solver, *primals)
    problem, dproblem, h = primals[:3], tangents[:3], solved.potential

    # h = h^{c,ε}, so that (I + E) dh = (∂h^{c,ε}/∂problem) dproblem.
    right = jax.jvp(lambda *p: self_response(*p, h)[0], problem, dproblem)[1]

    def plus_plan(d: Array) -> Array:
        return d - jax.jvp(lambda h: self_response(*problem, h)[0], (h,), (d,))[1]

    def solve(matvec: Any, right: Array) -> Array:
        rounds = math.ceil(-math.log(float(jnp.finfo(right.dtype).eps)) / math.log(3))
        return jax.lax.fori_loop(
            0, rounds, lambda _, d: d + (right - matvec(d)) * (2 / 3), jnp.zeros_like(right)
        )

    dh = jax.lax.custom_linear_solve(plus_plan, right, solve, transpose_solve=solve)
    dcost = jax.jvp(lambda x, a, e: _dual(x, a, x, a, e, h, h), problem, dproblem)[1]
    return solved, SelfCoupling(dcost, dh, jnp.zeros_like(solved.error))
