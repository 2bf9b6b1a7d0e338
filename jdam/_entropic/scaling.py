"""Solvers of one entropic transport problem: scaling iterations, Newton steps, annealing."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jdam._core.linalg import safe_log
from jdam._core.loops import while_loop
from jdam._entropic.problem import (
    LARGE,
    Cloud,
    Marginals,
    Pair,
    SelfCoupling,
    Solver,
    State,
    soft_minimum,
)

#: Scaling iterations before the first Newton step, and after each.
FIRST_BURST, LATER_BURST = 40, 10
#: Scaling iterations for a bound.
SOME = 4
#: An error of the marginal beyond which ε is annealed, and the ratio of its ladder.
POOR, DESCENT = 0.01, 2.5
#: By how much, as an exponent, mass must exceed what a kernel may have left out.
VISIBLE = 10.0
#: A tolerance of the marginal below which potentials are wanted to many digits too: up to a
#: Newton step of so many ε.
TIGHT, SETTLED = 1e-9, 1e-8


class _Plan(NamedTuple):
    """diag(a u) M diag(v), right in its rows: u = exp(f/ε) of f = s g^{c,ε}."""

    u: Float[Array, " n"]
    v: Float[Array, " m"]
    sums: Float[Array, " n"]  # M v
    columns: Float[Array, " m"]  # (a u)ᵀ M, so that the plan's columns sum to columns·v
    wanted: Float[Array, " m"]  # what they should: b e^(−g/ρ)


@partial(jax.jit, static_argnums=0)
def first_burst(solver: Solver, pair: Pair, guess: Float[Array, " m"]) -> State:
    """Scaling iterations on the kernel of the guess of g: enough for most pairs."""
    return _round(solver, pair, guess, FIRST_BURST, newton=False)


def some_iterations(solver: Solver, pair: Pair, guess: Float[Array, " m"]) -> Float[Array, " m"]:
    """A better g, by some scaling iterations on the kernel of the guess."""
    return _round(solver, pair, guess, SOME, newton=False, roughly=True).g


def unsolved(solver: Solver, state: State) -> Bool[Array, ""]:
    """Whether the marginal is wrong, or, where it is to be right to many digits, the potentials
    may be: of plans that are nearly permutations, marginals say little of potentials."""
    wrong = state.error > solver.tol
    return wrong | (state.newton > SETTLED) if solver.tol < TIGHT else wrong


@partial(jax.jit, static_argnums=0)
def finish(solver: Solver, first: State, pair: Pair) -> State:
    """Rounds of a Newton step and a few scaling iterations, each on a fresh kernel. Where the
    first burst was far off, they come down a ladder of larger ε."""
    marginals = pair.marginals
    top = jnp.where(first.error < POOR, 1, jnp.maximum(_hardness(first, marginals), 1))

    def pending(carry: tuple[Array, State]) -> Array:
        ratio, state = carry
        more = unsolved(solver, state) | (ratio > 1)
        # Pairs that hold NaN may come along with others.
        return more & ~jnp.isnan(state.error) & (state.iterations < solver.max_iterations)

    def turn(carry: tuple[Array, State]) -> tuple[Array, State]:
        ratio, last = carry
        burst = jnp.minimum(solver.max_iterations - last.iterations, LATER_BURST)
        epsilon = ratio * marginals.epsilon
        warmer = pair._replace(marginals=marginals._replace(epsilon=epsilon))
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


class _Kernel(NamedTuple):
    """M = b exp(g − C − top), the largest entry of each row 1; all in units of ε."""

    matrix: Float[Array, "n m"]
    top: Float[Array, " n"]
    a: Float[Array, " n"]
    b: Float[Array, " m"]
    g: Float[Array, " m"]  # 0 where b is
    marginals: Marginals

    def translated(self) -> tuple["_Kernel", Float[Array, ""]]:
        """The kernel of g + t, and t, with which its dual value is largest. All that follows does
        not depend on t but for its rounding: plans change by constants, their shape does not."""
        f = -self.marginals.damping * (jnp.log(self.matrix.sum(1)) + self.top)
        t = self.marginals.translation(f, self.a, self.g, self.b)
        return self._replace(top=self.top + t, g=self.g + t), t

    def complete(self, v: Float[Array, " m"], wanted: Float[Array, " m"]) -> _Plan:
        """The plan of g + log v."""
        sums = jnp.maximum(self.matrix @ v, _least(v))
        if self.marginals.rho is None:
            u = 1 / sums
        else:
            s = self.marginals.damping
            u = jnp.exp((1 - s) * self.top - s * jnp.log(sums))
        return _Plan(u, v, sums, (self.a * u) @ self.matrix, wanted)

    def rise(self, step: Float[Array, " m"]) -> _Plan:
        """The plan of g + step."""
        return self.complete(jnp.exp(step), self.b * self.marginals.share(self.g + step))

    def rescale(self, plan: _Plan) -> _Plan:
        """The plan of g = s f^{c,ε}, which is right in its columns for the f that is."""
        on, least = self.b > 0, _least(plan.v)
        if self.marginals.rho is None:
            columns = jnp.maximum(plan.columns, least)
            return self.complete(jnp.where(on, self.b / columns, 1), self.b)
        # Mass that finds no partner is given up: what the kernel left out must not look like it.
        left_out = plan.u.max() * math.exp(VISIBLE - LARGE)
        columns = jnp.maximum(plan.columns, jnp.maximum(left_out, least**2))
        s, ratio = self.marginals.damping, columns / jnp.where(on, self.b, 1)
        log_v = jnp.where(on, -s * jnp.log(ratio) - (1 - s) * self.g, 0)
        return self.rise(jnp.clip(log_v, -LARGE, LARGE))

    def missed(self, plan: _Plan) -> Float[Array, ""]:
        """The L1 error of the columns; of plans between relaxed marginals, for the constant that is
        best, at most."""
        found = jnp.where(self.b > 0, plan.columns * plan.v, 0)
        if self.marginals.rho is None:
            return jnp.abs(found - self.b).sum()
        mass, wanted = found.sum(), plan.wanted.sum()
        least = _least(mass)
        shapes = found / jnp.maximum(mass, least) - plan.wanted / jnp.maximum(wanted, least)
        return jnp.maximum(mass, wanted) * jnp.abs(shapes).sum()

    def f(self, plan: _Plan) -> Float[Array, " n"]:
        """The potential of the plan's rows."""
        return -self.marginals.damping * (jnp.log(plan.sums) + self.top)


def _least(like: Array) -> float:
    result: float = float(jnp.finfo(like.dtype).tiny) ** 0.5
    return result


def _hardness(state: State, marginals: Marginals) -> Float[Array, ""]:
    """How far above ε annealing has to start: at the largest cost, or at ρ, beyond which costs are
    not paid."""
    if marginals.rho is None:
        return state.largest
    return jnp.minimum(state.largest, marginals.rho / marginals.epsilon)


def _round(
    solver: Solver, pair: Pair, g: Array, burst: Any, *, newton: bool, roughly: bool = False
) -> State:
    """A kernel whose rows are right for g, improvements of g on it, and what follows from it."""
    x, a, y, b, marginals = pair
    epsilon, on = marginals.epsilon, b > 0
    cost = (solver.cost.roughly if roughly else solver.cost.scaled)(x, y, epsilon)
    g = g / epsilon
    logits = (g + safe_log(b))[None] - cost
    top = logits.max(1)
    depth = logits - top[:, None]
    matrix = jnp.where(depth < -LARGE, 0, jnp.exp(depth))  # denormal numbers would be slow
    kernel = _Kernel(matrix, top, a, b, jnp.where(on, g, 0), marginals.scaled(epsilon))
    kernel, t = kernel.translated()
    plan, iterations = kernel.rise(jnp.zeros_like(b)), jnp.array(0, jnp.int32)
    size = jnp.full_like(epsilon, jnp.inf)
    if newton:
        step, size, iterations = _newton_step(solver, kernel, plan)
        plan = kernel.rise(step)

    def rescale(carry: tuple[Array, _Plan, Array]) -> tuple[Array, _Plan, Array]:
        count, plan, _ = carry
        plan = kernel.rescale(plan)
        return count + 1, plan, kernel.missed(plan)

    def unfinished(carry: tuple[Array, _Plan, Array]) -> Array:
        count, _, error = carry
        result: Array = (error > solver.tol) & (count < burst)
        return result

    start = (jnp.array(0, jnp.int32), plan, kernel.missed(plan))
    count, plan, error = while_loop(unfinished, rescale, start, kernel)
    rows = kernel.matrix * plan.v[None] / plan.sums[:, None]
    f, rise = kernel.f(plan), jnp.log(plan.v)
    best = kernel.marginals.translation(f, a, kernel.g + jnp.where(on, rise, 0), b)
    return State(
        f=epsilon * (f - kernel.marginals.damping * best),
        g=epsilon * (g + t + rise + best),
        gradient=solver.cost.gradient(rows, x, y),
        error=error,
        iterations=iterations + count,
        newton=size,
        largest=jnp.where((a[:, None] > 0) & on[None], cost, 0).max(),
    )


def _newton_step(
    solver: Solver, kernel: _Kernel, plan: _Plan
) -> tuple[Float[Array, " m"], Float[Array, ""], Array]:
    """A step δ of g along the Newton direction of the semi-dual objective J, in units of ε,

        (diag(c + w/ρ) − s Pᵀ diag(1/P1) P) δ = w − c,

    c the plan's columns and w what they should be, as long as it surely ascends; the length of
    the direction; and the number of iterations that it took."""
    s, rho = kernel.marginals.damping, kernel.marginals.rho
    columns, weight = plan.columns, kernel.a * plan.u / plan.sums  # v = 1
    diagonal = columns if rho is None else columns + plan.wanted / rho

    def hessian(d: Array) -> Array:
        return diagonal * d - s * (weight * (kernel.matrix @ d)) @ kernel.matrix

    gradient = jnp.where(kernel.b > 0, plan.wanted - columns, 0)
    # Precise enough for superlinear convergence, and no more.
    error = jnp.abs(gradient).sum()
    precision = jnp.minimum(0.1, error)
    if solver.tol < TIGHT:
        # Where little is left to mend it is left in the directions that residuals show least.
        precision = jnp.where(error > TIGHT, precision, 1e-9)
    step, iterations = conjugate_gradients(hessian, gradient, diagonal, precision, 100)
    # J is self-concordant with respect to this size: a step of this length always ascends.
    if rho is None:
        step = step - step.max()  # a constant changes nothing, and may be large
        size = -step.min()
    else:
        largest = jnp.abs(step).max()
        oscillation = step.max() - step.min()
        size = jnp.maximum(oscillation + 3 * (1 - s) * largest, largest / rho)
    length = jnp.where(size > 0, jnp.log1p(size) / jnp.where(size > 0, size, 1), 0)
    return length * step, size, iterations


def conjugate_gradients(
    matvec: Any, right: Array, diagonal: Array, precision: Any, most: int
) -> tuple[Array, Array]:
    """The solution of a semidefinite system, preconditioned by its diagonal, to a relative L1
    residual `precision`, and the number of iterations. Where it breaks down it stops."""
    least = _least(right)
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
def solve_self(solver: Solver, cloud: Cloud, marginals: Marginals) -> SelfCoupling:
    """h ← (h + 2h^{c,ε}) s/(2+s): the coupling's spectrum lies in [0, 1], so that each iteration
    takes two thirds off the error at least. exp(h/ε) lies between √min a and 1/√min a: no
    kernel on the way overflows or vanishes."""
    (x, a), epsilon = cloud, marginals.epsilon
    marginals = marginals.scaled(epsilon)
    s = marginals.damping
    cost = solver.cost.scaled(x, x, epsilon)
    kernel = jnp.exp(-cost)

    def missed(u: Array, sums: Array) -> Array:
        return jnp.vdot(a, jnp.abs(u * sums - marginals.share(jnp.log(u))))

    def average(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, u, sums = carry
        log_u = (jnp.log(u) - 2 * jnp.log(sums)) * (s / (2 + s))
        u = jnp.where(a > 0, jnp.exp(log_u), 1)
        return count + 1, u, kernel @ (a * u)

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        count, u, sums = carry
        return (missed(u, sums) > solver.tol) & (count < solver.max_iterations)

    start = (jnp.array(0, jnp.int32), jnp.ones_like(a), kernel @ a)
    _, u, sums = while_loop(unfinished, average, start, kernel)
    error = missed(u, sums)
    # Where ε is large log u is all rounding, but not the answer to it, up to a constant.
    h = jnp.where(a > 0, jnp.log(u), 0)
    answer = s * soft_minimum(h[None] - cost, a[None])
    value = jnp.vdot(a, marginals.dual(h) + marginals.variation(answer))
    potential = answer + jnp.vdot(a, h - answer) * (s / (1 + s))
    return SelfCoupling(epsilon * value, epsilon * potential, error)
