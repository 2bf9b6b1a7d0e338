"""Solvers of one entropic transport problem: scaling iterations, Newton steps, annealing."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jdam._core.loops import while_loop
from jdam._entropic.problem import (
    LARGE,
    Pair,
    SelfCoupling,
    Solver,
    State,
    half_squared_distances,
    half_squared_distances_by_products,
    log,
    soft_minimum,
)

#: Scaling iterations before the first Newton step, and after each.
FIRST_BURST, LATER_BURST = 40, 10
#: Scaling iterations for a bound.
SOME = 4
#: An error of the marginal beyond which ε is annealed, and the ratio of its ladder.
POOR, DESCENT = 0.01, 2.5
#: A tolerance of the marginal below which potentials are wanted to many digits too: up to a
#: Newton step of so many ε.
TIGHT, SETTLED = 1e-9, 1e-8


class _Plan(NamedTuple):
    """diag(a u) M diag(v): rows sum to a exactly, since u = 1/(M v)."""

    u: Float[Array, " n"]
    v: Float[Array, " m"]
    columns: Float[Array, " m"]  # Mᵀ(a u), so that the plan's columns sum to columns·v


@partial(jax.jit, static_argnums=0)
def first_burst(solver: Solver, pair: Pair, guess: Float[Array, " m"]) -> State:
    """Scaling iterations on the kernel of the guess of g: enough for most pairs."""
    return _round(solver, pair, guess, FIRST_BURST, newton=False)


def some_iterations(solver: Solver, pair: Pair, guess: Float[Array, " m"]) -> Float[Array, " m"]:
    """A better g, by some scaling iterations on the kernel of the guess."""
    cost = half_squared_distances_by_products
    return _round(solver, pair, guess, SOME, newton=False, cost=cost).g


def unsolved(solver: Solver, state: State) -> Bool[Array, ""]:
    """Whether the marginal is wrong, or, where it is to be right to many digits, the potentials
    may be: of plans that are nearly permutations, marginals say little of potentials."""
    wrong = state.error > solver.tol
    return wrong | (state.newton > SETTLED) if solver.tol < TIGHT else wrong


@partial(jax.jit, static_argnums=0)
def finish(solver: Solver, first: State, pair: Pair) -> State:
    """Rounds of a Newton step and a few scaling iterations, each on a fresh kernel. Where the
    first burst was far off, they come down a ladder of larger ε."""
    top = jnp.where(first.error < POOR, 1, jnp.maximum(pair.size() / pair.epsilon, 1))

    def pending(carry: tuple[Array, State]) -> Array:
        ratio, state = carry
        more = unsolved(solver, state) | (ratio > 1)
        # Pairs that hold NaN may come along with others.
        return more & ~jnp.isnan(state.error) & (state.iterations < solver.max_iterations)

    def turn(carry: tuple[Array, State]) -> tuple[Array, State]:
        ratio, last = carry
        burst = jnp.minimum(solver.max_iterations - last.iterations, LATER_BURST)
        warmer = pair._replace(epsilon=ratio * pair.epsilon)
        state = _round(solver, warmer, last.g, burst, newton=True)
        # Steps that no longer become shorter are all rounding.
        solved = (ratio == 1) & (last.error <= solver.tol)
        rounding = solved & (state.newton > last.newton / 2)
        worse = solved & (state.error > solver.tol)
        ratio = jnp.where(state.error < POOR, jnp.maximum(ratio / DESCENT, 1), ratio)
        iterations = last.iterations + jnp.maximum(state.iterations, 1)
        state = jax.tree.map(lambda new, old: jnp.where(worse, old, new), state, last)
        newton = jnp.where(rounding | worse, 0, state.newton)
        return ratio, state._replace(iterations=iterations, newton=newton)

    ratio, state = while_loop(pending, turn, (top, first), pair)
    return state._replace(error=jnp.where(ratio > 1, jnp.inf, state.error))


def _round(
    solver: Solver,
    pair: Pair,
    g: Array,
    burst: Any,
    *,
    newton: bool,
    cost: Callable[[Array, Array], Array] = half_squared_distances,
) -> State:
    """A kernel whose rows are exact for g, improvements of g on it, and what follows from it."""
    x, a, y, b, epsilon = pair
    on, least = b > 0, float(jnp.finfo(b.dtype).tiny) ** 0.5
    g, root = g / epsilon, jnp.sqrt(epsilon)
    logits = (g + log(b))[None] - cost(x / root, y / root)
    top = logits.max(1)
    depth = logits - top[:, None]
    kernel = jnp.where(depth < -LARGE, 0, jnp.exp(depth))  # denormal numbers would be slow

    def complete(v: Array) -> _Plan:
        u = 1 / jnp.maximum(kernel @ v, least)
        return _Plan(u, v, (a * u) @ kernel)

    def missed(plan: _Plan) -> Array:
        return jnp.abs(jnp.where(on, plan.columns * plan.v - b, 0)).sum()

    plan, iterations = complete(jnp.ones_like(b)), jnp.array(0, jnp.int32)
    size = jnp.full_like(epsilon, jnp.inf)
    if newton:
        step, iterations = _newton_direction(solver, kernel, a, b, plan)
        # J is self-concordant with respect to the oscillation: this length always ascends.
        step = step - step.max()  # a constant changes nothing, and may be large
        size = -step.min()
        length = jnp.where(size > 0, jnp.log1p(size) / jnp.where(size > 0, size, 1), 0)
        plan = complete(jnp.exp(length * step))

    def rescale(carry: tuple[Array, _Plan, Array]) -> tuple[Array, _Plan, Array]:
        count, plan, _ = carry
        plan = complete(jnp.where(on, b / jnp.maximum(plan.columns, least), 1))
        return count + 1, plan, missed(plan)

    def unfinished(carry: tuple[Array, _Plan, Array]) -> Array:
        count, _, error = carry
        result: Array = (error > solver.tol) & (count < burst)
        return result

    start = (jnp.array(0, jnp.int32), plan, missed(plan))
    count, plan, error = while_loop(unfinished, rescale, start, kernel, a, b)
    return State(
        f=epsilon * (jnp.log(plan.u) - top),
        g=epsilon * (g + jnp.log(plan.v)),
        barycentre=plan.u[:, None] * (kernel @ (plan.v[:, None] * y)),
        error=error,
        iterations=iterations + count,
        newton=size,
    )


def _newton_direction(
    solver: Solver, kernel: Array, a: Array, b: Array, plan: _Plan
) -> tuple[Array, Array]:
    """δ with (diag(c) − Eᵀdiag(a)E) δ = b − c, E the plan's rows and c its columns: the Newton
    direction of the semi-dual objective, in units of ε. The plan must have v = 1."""
    weight = a * plan.u**2

    def hessian(d: Array) -> Array:
        return plan.columns * d - (weight * (kernel @ d)) @ kernel

    gradient = jnp.where(b > 0, b - plan.columns, 0)
    # Precise enough for superlinear convergence, and no more.
    error = jnp.abs(gradient).sum()
    precision = jnp.minimum(0.1, error)
    if solver.tol < TIGHT:
        # Where little is left to mend it is left in the directions that residuals show least.
        precision = jnp.where(error > TIGHT, precision, 1e-9)
    return conjugate_gradients(hessian, gradient, plan.columns, precision, 100)


def conjugate_gradients(
    matvec: Any, right: Array, diagonal: Array, precision: Any, most: int
) -> tuple[Array, Array]:
    """The solution of a semidefinite system, preconditioned by its diagonal, to a relative L1
    residual `precision`, and the number of iterations. Where it breaks down it stops."""
    least = float(jnp.finfo(right.dtype).tiny) ** 0.5
    inverse = jnp.where(diagonal > least, 1 / jnp.maximum(diagonal, least), 0)
    goal = precision * jnp.abs(right).sum()

    def unfinished(carry: tuple[Any, ...]) -> Array:
        count, _, residual, _, decrement = carry
        result: Array = (jnp.abs(residual).sum() > goal) & (decrement > 0) & (count < most)
        return result

    def turn(carry: tuple[Any, ...]) -> tuple[Any, ...]:
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
    count, solution, *_ = while_loop(unfinished, turn, start, diagonal)
    return solution, count


@partial(jax.jit, static_argnums=0)
def solve_self(solver: Solver, problem: tuple[Array, Array, Array]) -> SelfCoupling:
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
    _, u, sums = while_loop(unfinished, average, start, kernel)
    error = missed(u, sums)
    # Where ε is large log u is all rounding, but not the answer to it, up to a constant.
    h = jnp.where(a > 0, jnp.log(u), 0)
    answer = soft_minimum(h[None] - cost, a[None])
    value = jnp.vdot(a, h + answer)
    return SelfCoupling(epsilon * value, epsilon * (answer + jnp.vdot(a, h - answer) / 2), error)
