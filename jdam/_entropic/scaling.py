"""Solvers of one entropic transport problem: scaling iterations, Newton steps, annealing."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdam._core.batching import batched_while_loop
from jdam._core.linalg import safe_log
from jdam._core.loops import while_loop
from jdam._entropic.problem import (
    LARGE,
    TIGHT,
    Cloud,
    Marginals,
    Pair,
    SelfTransport,
    Solver,
    State,
    pair_batch_size,
    soft_minimum,
)

#: Scaling iterations before the first Newton step, and after each.
FIRST_BURST, LATER_BURST = 40, 10
#: Conjugate gradients for a Newton step, at most.
NEWTON = 100
#: Scaling iterations for a bound.
SOME = 4
#: An error of the marginal beyond which ε is annealed, and the ratio of its ladder.
POOR, DESCENT = 0.01, 2.5
#: By how much, as an exponent, mass must exceed what a kernel may have left out.
VISIBLE = 10.0
#: A Newton step of so many ε, after which a tight solver may end.
SETTLED = 1e-8


class _Plan(NamedTuple):
    """diag(a u) M diag(v), right in its rows: u = exp(f/ε) of f = s g^{c,ε}."""

    u: Float[Array, " n"]
    v: Float[Array, " m"]
    sums: Float[Array, " n"]  # M v
    columns: Float[Array, " m"]  # (a u)ᵀ M, so that the plan's columns sum to columns·v
    wanted: Float[Array, " m"]  # what they should be: b e^(−g/ρ)


def solve(solver: Solver, pair: Pair, guess: Float[Array, " m"]) -> State:
    """Rounds on a fresh kernel each: scaling iterations, which are enough for most pairs, and then
    Newton steps with a few of these after. Where the first round was far off, the next come down a
    ladder of larger ε. Pairs of a vmapped batch take turns, a few at a time."""
    zero = jnp.zeros_like(pair.marginals.epsilon)
    start = State(
        f=jnp.zeros_like(pair.a),
        g=guess,
        gradient=jnp.zeros_like(pair.x),
        error=zero + jnp.inf,
        iterations=jnp.array(0, jnp.int32),
        ratio=zero + 1,
        cooled=zero + POOR,
        newton=zero + jnp.inf if solver.tight else None,
    )
    pairs = pair_batch_size(pair.a.size * pair.b.size)
    unfinished, turn = partial(_unfinished, solver), partial(_turn, solver)
    state: State = batched_while_loop(unfinished, turn, start, pair, at_once=pairs, flat=True)
    return state


def some_iterations(solver: Solver, pair: Pair, guess: Float[Array, " m"]) -> Float[Array, " m"]:
    """A better g, by some scaling iterations on the kernel of the guess."""
    cost = solver.cost.roughly(pair.x, pair.y, pair.marginals.epsilon)
    cost = pair.marginals.payable(cost)
    kernel, g = _kernel(cost, pair, guess)
    plan, _, _ = _scaled(solver, kernel, jnp.ones_like(g), SOME)
    return g + pair.marginals.epsilon * jnp.log(plan.v)


def _unfinished(solver: Solver, state: State, pair: Pair) -> Bool[Array, ""]:
    """Whether the marginal is wrong, or the potentials of a tight solver may be."""
    wrong = state.error > solver.tol
    if state.newton is not None:
        wrong |= state.newton > SETTLED
    # Pairs that hold NaN may come along with others.
    more = wrong & ~jnp.isnan(state.error) & (state.iterations < solver.max_iterations)
    return more | (state.iterations == 0)


@partial(jax.jit, static_argnums=0)
def _turn(solver: Solver, last: State, pair: Pair) -> State:
    first, marginals = last.iterations == 0, pair.marginals
    burst = jnp.minimum(solver.max_iterations - last.iterations, LATER_BURST)
    burst = jnp.where(first, FIRST_BURST, burst)
    newton = jnp.where(first, 0, NEWTON)
    warmer = pair._replace(marginals=marginals._replace(epsilon=last.ratio * marginals.epsilon))
    state, hardness = _round(solver, warmer, last.g, burst, newton)
    # Mass that has to go where the kernel has underflowed moves neither by scaling nor by Newton
    # steps, however little of the marginal it is.
    slow = state.error > jnp.maximum(solver.tol, last.error / 2)
    stuck = slow & ~first & (last.cooled == POOR)
    cooler = jnp.maximum(last.ratio / DESCENT, 1)
    hotter = jnp.where(first | stuck, jnp.maximum(hardness, 1), last.ratio)
    ratio = jnp.where(~stuck & (state.error < last.cooled), cooler, hotter)
    # Then every ε is solved well, as far as its rounding allows, before the next.
    relaxed = jnp.where(last.ratio > 1, 1.5 * last.cooled, last.cooled)
    relaxed = jnp.where(last.cooled == POOR, POOR, jnp.minimum(relaxed, POOR / 2))
    cooled = jnp.where(stuck, jnp.minimum(state.error / 16, POOR / 2), relaxed)
    state = state._replace(
        # The marginal of a larger ε says nothing of that of the ε asked for.
        error=jnp.where(last.ratio > 1, jnp.inf, state.error),
        iterations=last.iterations + jnp.maximum(state.iterations, 1),
        ratio=ratio,
        cooled=cooled,
    )
    if state.newton is None or last.newton is None:
        return state
    # Steps that no longer become shorter are all rounding.
    solved = ~first & (last.ratio == 1) & (last.error <= solver.tol)
    worse = solved & (state.error > solver.tol)
    ended = worse | solved & (state.newton > last.newton / 2)
    step = jnp.where(first, jnp.inf, jnp.where(ended, 0, state.newton))
    kept = last._replace(iterations=state.iterations)
    result: State = jax.tree.map(partial(jnp.where, worse), kept, state)._replace(newton=step)
    return result


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
        f = -self.marginals.tau * (jnp.log(self.matrix.sum(1)) + self.top)
        t = self.marginals.dual_shift(f, self.a, self.g, self.b)
        return self._replace(top=self.top + t, g=self.g + t), t

    def plan(self, v: Float[Array, " m"]) -> _Plan:
        """The plan of g + log v."""
        sums = jnp.maximum(self.matrix @ v, _least(v))
        if self.marginals.rho is None:
            u, wanted = 1 / sums, self.b
        else:
            s = self.marginals.tau
            u = jnp.exp((1 - s) * self.top - s * jnp.log(sums))
            wanted = self.b * self.marginals.transported_fraction(self.g + jnp.log(v))
        return _Plan(u, v, sums, (self.a * u) @ self.matrix, wanted)

    def rescaled(self, plan: _Plan) -> Float[Array, " m"]:
        """The v of g = s f^{c,ε}, which is right in its columns for the f that is."""
        on, least = self.b > 0, _least(plan.v)
        if self.marginals.rho is None:
            columns = jnp.maximum(plan.columns, least)
            return jnp.where(on, self.b / columns, 1)
        # Mass that finds no partner is given up: what the kernel left out must not look like it.
        left_out = plan.u.max() * math.exp(VISIBLE - LARGE)
        columns = jnp.maximum(plan.columns, jnp.maximum(left_out, least**2))
        s, ratio = self.marginals.tau, columns / jnp.where(on, self.b, 1)
        log_v = jnp.where(on, -s * jnp.log(ratio) - (1 - s) * self.g, 0)
        return jnp.exp(jnp.clip(log_v, -LARGE, LARGE))

    def marginal_error(self, plan: _Plan) -> Float[Array, ""]:
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
        return -self.marginals.tau * (jnp.log(plan.sums) + self.top)


def _least(like: Array) -> float:
    result: float = float(jnp.finfo(like.dtype).tiny) ** 0.5
    return result


def largest(cost: Float[Array, "n m"], pair: Pair) -> Float[Array, ""]:
    """Of the costs between atoms with mass."""
    held = (pair.a[:, None] > 0) & (pair.b[None] > 0)
    return jnp.where(held, cost, 0).max()


def _round(
    solver: Solver, pair: Pair, g: Array, burst: Array, newton: Array
) -> tuple[State, Float[Array, ""]]:
    """A kernel whose rows are right for g, a Newton step by at most `newton` conjugate gradients, a
    burst of scaling iterations on it, and what follows. And how far above ε annealing would have to
    start: at the largest cost, or at ρ, beyond which costs are not paid."""
    marginals, epsilon = pair.marginals, pair.marginals.epsilon
    cost = marginals.payable(solver.cost.scaled(pair.x, pair.y, epsilon))
    kernel, g = _kernel(cost, pair, g)
    step, size, iterations = _newton_step(solver, kernel, newton)
    plan, error, count = _scaled(solver, kernel, jnp.exp(step), burst)
    rows = kernel.matrix * plan.v[None] / plan.sums[:, None]
    state = State(
        f=epsilon * kernel.f(plan),
        g=g + epsilon * jnp.log(plan.v),
        gradient=solver.cost.gradient(rows, pair.x, pair.y),
        error=error,
        iterations=iterations + count,
        ratio=jnp.ones_like(size),
        cooled=jnp.full_like(size, POOR),
        newton=size if solver.tight else None,
    )
    top = largest(cost, pair)
    hardness = top if marginals.rho is None else jnp.minimum(top, marginals.rho / epsilon)
    return sharpened(state, cost, pair, top), hardness


def sharpened(
    state: State, cost: Float[Array, "n m"], pair: Pair, largest: Float[Array, ""]
) -> State:
    """The same with the best constant in its potentials, `cost` being in units of ε; and, where ε
    is larger than all costs, or than ρ, so that logarithms of scalings have no digits, with
    potentials that do."""
    _, a, _, b, marginals = pair
    epsilon, inside = marginals.epsilon, marginals.scaled(marginals.epsilon)
    blurred = largest < 1
    if marginals.rho is not None:
        blurred |= 16 * marginals.rho < epsilon

    def turn(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, f, _ = carry
        if marginals.rho is None:
            f = f - jnp.vdot(a, f)  # a constant, free to choose, may be large
        f = jnp.where(a > 0, f, 0)
        g = inside.tau * soft_minimum(f[None] - cost.T, a[None])
        f = inside.tau * soft_minimum(g[None] - cost, b[None])
        return (count + 1, *best(f, g))

    def best(f: Array, g: Array) -> tuple[Array, Array]:
        t = inside.dual_shift(f, a, jnp.where(b > 0, g, 0), b)
        return f - inside.tau * t, g + t

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        # What one turn leaves of the rounding is a constant.
        return blurred & (carry[0] < 2)

    start = (jnp.array(0, jnp.int32), *best(state.f / epsilon, state.g / epsilon))
    _, f, g = while_loop(unfinished, turn, start, cost, pair)
    return state._replace(f=epsilon * f, g=epsilon * g)


def _kernel(cost: Array, pair: Pair, g: Array) -> tuple[_Kernel, Array]:
    """The kernel of g + t, t the best constant, and g + t."""
    _, a, _, b, marginals = pair
    epsilon = marginals.epsilon
    scaled = g / epsilon
    logits = (scaled + safe_log(b))[None] - cost
    top = logits.max(1)
    depth = logits - top[:, None]
    matrix = jnp.where(depth < -LARGE, 0, jnp.exp(depth))  # denormal numbers would be slow
    kernel = _Kernel(matrix, top, a, b, jnp.where(b > 0, scaled, 0), marginals.scaled(epsilon))
    kernel, t = kernel.translated()
    return kernel, g + epsilon * t


def _scaled(
    solver: Solver, kernel: _Kernel, v: Float[Array, " m"], most: Any
) -> tuple[_Plan, Float[Array, ""], Int[Array, ""]]:
    """The plan of g + log v after scaling iterations, its error, and how many there were."""

    def rescale(carry: tuple[Array, _Plan, Array]) -> tuple[Array, _Plan, Array]:
        count, plan, _ = carry
        plan = kernel.plan(jnp.where(count < 0, v, kernel.rescaled(plan)))
        return count + 1, plan, kernel.marginal_error(plan)

    def unfinished(carry: tuple[Array, _Plan, Array]) -> Array:
        count, _, error = carry
        result: Array = (error > solver.tol) & (count < most)
        return result

    # The first turn makes the plan.
    nothing = _Plan(jnp.ones_like(kernel.a), v, jnp.ones_like(kernel.a), v, v)
    start = (jnp.array(-1, jnp.int32), nothing, jnp.full_like(kernel.marginals.epsilon, jnp.inf))
    count, plan, error = while_loop(unfinished, rescale, start, kernel)
    return plan, error, count


def _newton_step(
    solver: Solver, kernel: _Kernel, most: Array
) -> tuple[Float[Array, " m"], Float[Array, ""], Array]:
    """A step δ of g along the Newton direction of the semi-dual objective J, in units of ε,

        (diag(c + w/ρ) − s Pᵀ diag(1/P1) P) δ = w − c,

    c the plan's columns and w what they should be, as long as it surely ascends; the length of
    the direction; and the number of iterations that it took."""
    s, rho = kernel.marginals.tau, kernel.marginals.rho
    plan = kernel.plan(jnp.ones_like(kernel.b))
    columns, weight = plan.columns, kernel.a * plan.u / plan.sums  # v = 1
    diagonal = columns if rho is None else columns + plan.wanted / rho

    def hessian(d: Array) -> Array:
        return diagonal * d - s * (weight * (kernel.matrix @ d)) @ kernel.matrix

    gradient = jnp.where(kernel.b > 0, plan.wanted - columns, 0)
    # Precise enough for superlinear convergence, and no more.
    error = jnp.abs(gradient).sum()
    precision = jnp.minimum(0.1, error)
    if solver.tight:
        # Where little is left to mend it is left in the directions that residuals show least.
        precision = jnp.where(error > TIGHT, precision, 1e-9)
    step, iterations = conjugate_gradients(hessian, gradient, diagonal, precision, most)
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
    matvec: Any, right: Array, diagonal: Array, precision: Any, most: Any
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
def solve_self(solver: Solver, cloud: Cloud, marginals: Marginals) -> SelfTransport:
    """h ← (h + 2h^{c,ε}) s/(2+s): the coupling's spectrum lies in [0, 1], so that each iteration
    takes two thirds off the error at least. exp(h/ε) lies between √min a and 1/√min a: no
    kernel on the way overflows or vanishes."""
    (x, a), epsilon = cloud, marginals.epsilon
    cost = marginals.payable(solver.cost.scaled(x, x, epsilon))
    marginals = marginals.scaled(epsilon)
    s = marginals.tau
    kernel = jnp.exp(-cost)

    def marginal_error(u: Array, sums: Array) -> Array:
        return jnp.vdot(a, jnp.abs(u * sums - marginals.transported_fraction(jnp.log(u))))

    def average(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, u, sums = carry
        log_u = (jnp.log(u) - 2 * jnp.log(sums)) * (s / (2 + s))
        u = jnp.where(a > 0, jnp.exp(log_u), 1)
        return count + 1, u, kernel @ (a * u)

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        count, u, sums = carry
        return (marginal_error(u, sums) > solver.tol) & (count < solver.max_iterations)

    start = (jnp.array(0, jnp.int32), jnp.ones_like(a), kernel @ a)
    _, u, sums = while_loop(unfinished, average, start, kernel)
    error = marginal_error(u, sums)
    # Where ε is large log u is all rounding, but not the answer to it, up to a constant.
    h = jnp.where(a > 0, jnp.log(u), 0)
    answer = s * soft_minimum(h[None] - cost, a[None])
    value = jnp.vdot(a, marginals.dual(h) + marginals.variation(answer))
    potential = answer + jnp.vdot(a, h - answer) * (s / (1 + s))
    plan = a[None] * jnp.exp(jnp.minimum(potential[:, None] + potential[None] - cost, LARGE))
    plan = plan / plan.sum(1, keepdims=True)
    gradient = solver.cost.gradient(plan, x, x)
    return SelfTransport(epsilon * value, epsilon * potential, error, gradient)
