"""Solver of one entropic transport problem: scaling iterations, Newton steps and annealing."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, PyTree

from jdam._core.batching import batched_while_loop
from jdam._core.linalg import safe_log
from jdam._core.loops import while_loop
from jdam._entropic.problem import (
    LARGE,
    TIGHT,
    Cloud,
    Marginals,
    Pair,
    SinkhornOutput,
    Solver,
    State,
    pair_batch_size,
    soft_minimum,
)

#: The number of scaling iterations before the first Newton step, and after each.
FIRST_BURST, LATER_BURST = 40, 10
#: The largest number of conjugate gradient iterations of a Newton step.
NEWTON = 100
#: The number of scaling iterations for a lower bound.
SOME = 4
#: The marginal error above which ε is annealed, and the ratio of successive ε.
POOR, DESCENT = 0.01, 2.5
#: The exponent by which mass must exceed the mass that may have underflowed in a kernel.
VISIBLE = 10.0
#: The length of a Newton step, in units of ε, below which a tight solver may stop.
SETTLED = 1e-8


class _Plan(NamedTuple):
    """diag(a u) M diag(v) with exact row sums: u = exp(f/ε) for f = s g^{c,ε}."""

    u: Float[Array, " n"]
    v: Float[Array, " m"]
    sums: Float[Array, " n"]  # M v
    columns: Float[Array, " m"]  # (a u)ᵀ M; the plan's column sums are columns·v
    targets: Float[Array, " m"]  # their targets, b e^(−g/ρ)


def solve(solver: Solver, pair: Pair, guess: Float[Array, " m"]) -> State:
    """Solve a pair in rounds on fresh kernels: scaling iterations first, which often suffice, then
    Newton steps with a few scaling iterations each. If the first round ends far from the solution,
    ε is annealed from larger values. Under `jax.vmap`, pairs form a work queue."""
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
    cond_fun, body_fun = partial(_cond_fun, solver), partial(_step, solver)
    state: State = batched_while_loop(cond_fun, body_fun, start, pair, at_once=pairs, flat=True)
    return state


def some_iterations(solver: Solver, pair: Pair, guess: Float[Array, " m"]) -> Float[Array, " m"]:
    """Improve the guess of g by a few scaling iterations on its kernel."""
    cost = solver.cost.roughly(pair.x, pair.y, pair.marginals.epsilon)
    cost = pair.marginals.payable(cost)
    kernel, g = _kernel(cost, pair, guess)
    plan, _, _ = _scaled(solver, kernel, jnp.ones_like(g), SOME)
    return g + pair.marginals.epsilon * jnp.log(plan.v)


def _cond_fun(solver: Solver, state: State, pair: Pair) -> Bool[Array, ""]:
    """Return whether the marginal error, or a tight solver's Newton step, is still too large."""
    inaccurate = state.error > solver.tol
    if state.newton is not None:
        inaccurate |= state.newton > SETTLED
    # A pair with NaN must not keep others of its batch waiting.
    active = inaccurate & ~jnp.isnan(state.error) & (state.iterations < solver.max_iterations)
    return active | (state.iterations == 0)


@partial(jax.jit, static_argnums=0)
def _step(solver: Solver, previous: State, pair: Pair) -> State:
    """Run one round and choose the ε of the next one."""
    first, marginals = previous.iterations == 0, pair.marginals
    burst = jnp.minimum(solver.max_iterations - previous.iterations, LATER_BURST)
    burst = jnp.where(first, FIRST_BURST, burst)
    newton = jnp.where(first, 0, NEWTON)
    smooth = pair._replace(marginals=marginals._replace(epsilon=previous.ratio * marginals.epsilon))
    state, start_ratio = _round(solver, smooth, previous.g, burst, newton)
    # Mass whose target underflows in the kernel is moved neither by scaling iterations nor by
    # Newton steps, however small the marginal error is.
    slow = state.error > jnp.maximum(solver.tol, previous.error / 2)
    stagnated = slow & ~first & (previous.cooled == POOR)
    smaller = jnp.maximum(previous.ratio / DESCENT, 1)
    larger = jnp.where(first | stagnated, jnp.maximum(start_ratio, 1), previous.ratio)
    ratio = jnp.where(~stagnated & (state.error < previous.cooled), smaller, larger)
    # After stagnation, each ε is solved accurately, up to rounding, before the next.
    threshold = jnp.where(previous.ratio > 1, 1.5 * previous.cooled, previous.cooled)
    threshold = jnp.where(previous.cooled == POOR, POOR, jnp.minimum(threshold, POOR / 2))
    cooled = jnp.where(stagnated, jnp.minimum(state.error / 16, POOR / 2), threshold)
    state = state._replace(
        # The marginal error at a larger ε is no estimate of that at the final ε.
        error=jnp.where(previous.ratio > 1, jnp.inf, state.error),
        iterations=previous.iterations + jnp.maximum(state.iterations, 1),
        ratio=ratio,
        cooled=cooled,
    )
    if state.newton is None or previous.newton is None:
        return state
    # Newton steps that no longer become shorter are rounding errors.
    solved = ~first & (previous.ratio == 1) & (previous.error <= solver.tol)
    worse = solved & (state.error > solver.tol)
    converged = worse | solved & (state.newton > previous.newton / 2)
    step = jnp.where(first, jnp.inf, jnp.where(converged, 0, state.newton))
    restored = previous._replace(iterations=state.iterations)
    result: State = jax.tree.map(partial(jnp.where, worse), restored, state)._replace(newton=step)
    return result


class _Kernel(NamedTuple):
    """M = b exp(g − C − top), whose largest entry in each row is 1; all in units of ε."""

    matrix: Float[Array, "n m"]
    top: Float[Array, " n"]
    a: Float[Array, " n"]
    b: Float[Array, " m"]
    g: Float[Array, " m"]  # 0 where b = 0
    marginals: Marginals

    def translated(self) -> tuple["_Kernel", Float[Array, ""]]:
        """Return the kernel of g + t with the dual shift t, and t. Everything computed from the
        kernel depends on t only by rounding."""
        f = -self.marginals.tau * (jnp.log(self.matrix.sum(1)) + self.top)
        t = self.marginals.dual_shift(f, self.a, self.g, self.b)
        return self._replace(top=self.top + t, g=self.g + t), t

    def plan(self, v: Float[Array, " m"]) -> _Plan:
        """Compute the plan of g + log v."""
        sums = jnp.maximum(self.matrix @ v, _least(v))
        if self.marginals.rho is None:
            u, target = 1 / sums, self.b
        else:
            s = self.marginals.tau
            u = jnp.exp((1 - s) * self.top - s * jnp.log(sums))
            target = self.b * self.marginals.transported_fraction(self.g + jnp.log(v))
        return _Plan(u, v, sums, (self.a * u) @ self.matrix, target)

    def rescaled(self, plan: _Plan) -> Float[Array, " m"]:
        """Compute the v of g = s f^{c,ε}, for the f of the plan."""
        on, least = self.b > 0, _least(plan.v)
        if self.marginals.rho is None:
            columns = jnp.maximum(plan.columns, least)
            return jnp.where(on, self.b / columns, 1)
        # Underflow in the kernel must not look like mass that ρ leaves untransported.
        left_out = plan.u.max() * math.exp(VISIBLE - LARGE)
        columns = jnp.maximum(plan.columns, jnp.maximum(left_out, least**2))
        s, ratio = self.marginals.tau, columns / jnp.where(on, self.b, 1)
        log_v = jnp.where(on, -s * jnp.log(ratio) - (1 - s) * self.g, 0)
        return jnp.exp(jnp.clip(log_v, -LARGE, LARGE))

    def marginal_error(self, plan: _Plan) -> Float[Array, ""]:
        """Return the L1 error of the column sums; for relaxed marginals an upper bound of its
        minimum over constants in g."""
        sums = jnp.where(self.b > 0, plan.columns * plan.v, 0)
        if self.marginals.rho is None:
            return jnp.abs(sums - self.b).sum()
        mass, target = sums.sum(), plan.targets.sum()
        least = _least(mass)
        difference = sums / jnp.maximum(mass, least) - plan.targets / jnp.maximum(target, least)
        return jnp.maximum(mass, target) * jnp.abs(difference).sum()

    def f(self, plan: _Plan) -> Float[Array, " n"]:
        """Compute the potential of the plan's rows."""
        return -self.marginals.tau * (jnp.log(plan.sums) + self.top)


def _least(like: Array) -> float:
    result: float = float(jnp.finfo(like.dtype).tiny) ** 0.5
    return result


def largest(cost: Float[Array, "n m"], pair: Pair) -> Float[Array, ""]:
    """Return the largest cost between atoms of positive weight."""
    occupied = (pair.a[:, None] > 0) & (pair.b[None] > 0)
    return jnp.where(occupied, cost, 0).max()


def _round(
    solver: Solver, pair: Pair, g: Array, burst: Array, newton: Array
) -> tuple[State, Float[Array, ""]]:
    """Run a Newton step, of at most `newton` conjugate gradient iterations, and a burst of scaling
    iterations on a kernel for g. Return the state, and the ratio of the largest annealed ε to ε:
    the largest cost over ε, or ρ/ε if less."""
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
    start_ratio = top if marginals.rho is None else jnp.minimum(top, marginals.rho / epsilon)
    return sharpened(state, cost, pair, top), start_ratio


def sharpened(
    state: State, cost: Float[Array, "n m"], pair: Pair, largest: Float[Array, ""]
) -> State:
    """Return the state after the dual shift, for `cost` in units of ε. If ε exceeds all costs, or
    ρ, logarithms of scalings have no digits, and c-transforms recompute the potentials."""
    _, a, _, b, marginals = pair
    epsilon, unit = marginals.epsilon, marginals.scaled(marginals.epsilon)
    inaccurate = largest < 1
    if marginals.rho is not None:
        inaccurate |= 16 * marginals.rho < epsilon

    def body_fun(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, f, _ = carry
        if marginals.rho is None:
            f = f - jnp.vdot(a, f)  # a constant is free, and may be large
        f = jnp.where(a > 0, f, 0)
        g = unit.tau * soft_minimum(f[None] - cost.T, a[None])
        f = unit.tau * soft_minimum(g[None] - cost, b[None])
        return (count + 1, *with_dual_shift(f, g))

    def with_dual_shift(f: Array, g: Array) -> tuple[Array, Array]:
        t = unit.dual_shift(f, a, jnp.where(b > 0, g, 0), b)
        return f - unit.tau * t, g + t

    def cond_fun(carry: tuple[Array, Array, Array]) -> Array:
        # One iteration removes the rounding error up to a constant.
        return inaccurate & (carry[0] < 2)

    start = (jnp.array(0, jnp.int32), *with_dual_shift(state.f / epsilon, state.g / epsilon))
    _, f, g = while_loop(cond_fun, body_fun, start, cost, pair)
    return state._replace(f=epsilon * f, g=epsilon * g)


def _kernel(cost: Array, pair: Pair, g: Array) -> tuple[_Kernel, Array]:
    """Compute the kernel of g + t with the dual shift t, and g + t."""
    _, a, _, b, marginals = pair
    epsilon = marginals.epsilon
    scaled = g / epsilon
    logits = (scaled + safe_log(b))[None] - cost
    top = logits.max(1)
    depth = logits - top[:, None]
    matrix = jnp.where(depth < -LARGE, 0, jnp.exp(depth))  # denormal numbers are slow
    kernel = _Kernel(matrix, top, a, b, jnp.where(b > 0, scaled, 0), marginals.scaled(epsilon))
    kernel, t = kernel.translated()
    return kernel, g + epsilon * t


def _scaled(
    solver: Solver, kernel: _Kernel, v: Float[Array, " m"], most: Any
) -> tuple[_Plan, Float[Array, ""], Int[Array, ""]]:
    """Run scaling iterations; return the plan of g + log v, its marginal error and their number."""

    def body_fun(carry: tuple[Array, _Plan, Array]) -> tuple[Array, _Plan, Array]:
        count, plan, _ = carry
        plan = kernel.plan(jnp.where(count < 0, v, kernel.rescaled(plan)))
        return count + 1, plan, kernel.marginal_error(plan)

    def cond_fun(carry: tuple[Array, _Plan, Array]) -> Array:
        count, _, error = carry
        result: Array = (error > solver.tol) & (count < most)
        return result

    # The first iteration computes the plan of v.
    empty = _Plan(jnp.ones_like(kernel.a), v, jnp.ones_like(kernel.a), v, v)
    start = (jnp.array(-1, jnp.int32), empty, jnp.full_like(kernel.marginals.epsilon, jnp.inf))
    count, plan, error = while_loop(cond_fun, body_fun, start, kernel)
    return plan, error, count


def _newton_step(
    solver: Solver, kernel: _Kernel, most: Array
) -> tuple[Float[Array, " m"], Float[Array, ""], Array]:
    """Return a damped Newton step δ of g in units of ε, its undamped size and the iterations spent.

        (diag(c + w/ρ) − s Pᵀ diag(1/P1) P) δ = w − c

    is the Newton equation of the semi-dual objective J, for the plan's column sums c and their
    targets w. The damped step increases J."""
    s, rho = kernel.marginals.tau, kernel.marginals.rho
    plan = kernel.plan(jnp.ones_like(kernel.b))
    columns, weight = plan.columns, kernel.a * plan.u / plan.sums  # v = 1
    diagonal = columns if rho is None else columns + plan.targets / rho

    def hessian(d: Array) -> Array:
        return diagonal * d - s * (weight * (kernel.matrix @ d)) @ kernel.matrix

    gradient = jnp.where(kernel.b > 0, plan.targets - columns, 0)
    # This precision suffices for superlinear convergence.
    error = jnp.abs(gradient).sum()
    precision = jnp.minimum(0.1, error)
    if solver.tight:
        # Small errors lie in directions to which the residual is least sensitive.
        precision = jnp.where(error > TIGHT, precision, 1e-9)
    step, iterations = conjugate_gradients(hessian, gradient, diagonal, precision, most)
    # J is self-concordant with respect to this size, so a step of this length increases it.
    if rho is None:
        step = step - step.max()  # a constant is free, and may be large
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
    """Solve a semidefinite system, preconditioned by its diagonal, to a relative L1 residual
    `precision`; return the solution and the number of iterations. Stop at a breakdown."""
    least = _least(right)
    inverse = jnp.where(diagonal > least, 1 / jnp.maximum(diagonal, least), 0)
    goal = precision * jnp.abs(right).sum()

    def cond_fun(carry: tuple[PyTree, ...]) -> Array:
        count, _, residual, _, decrement = carry
        result: Array = (jnp.abs(residual).sum() > goal) & (decrement > 0) & (count < most)
        return result

    def body_fun(carry: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        count, solution, residual, direction, decrement = carry
        image = matvec(direction)
        curvature = jnp.vdot(direction, image)
        convex = curvature > 0
        length = jnp.where(convex, decrement / jnp.where(convex, curvature, 1), 0)
        solution, residual = solution + length * direction, residual - length * image
        scaled = inverse * residual
        new_decrement = jnp.where(convex, jnp.vdot(residual, scaled), 0)
        direction = scaled + new_decrement / decrement * direction
        return count + 1, solution, residual, direction, new_decrement

    scaled = inverse * right
    start = (jnp.array(0, jnp.int32), jnp.zeros_like(right), right, scaled, jnp.vdot(right, scaled))
    count, solution, *_ = while_loop(cond_fun, body_fun, start, diagonal)
    return solution, count


@partial(jax.jit, static_argnums=0)
def solve_self(solver: Solver, cloud: Cloud, marginals: Marginals) -> SinkhornOutput:
    """Solve for the symmetric potential of a cloud by h ← (h + 2h^{c,ε}) s/(2+s). The coupling's
    spectrum lies in [0, 1], so each iteration reduces the error to a third at most. exp(h/ε) stays
    between √min a and 1/√min a, so no kernel overflows or vanishes."""
    (x, a), epsilon = cloud, marginals.epsilon
    cost = marginals.payable(solver.cost.scaled(x, x, epsilon))
    marginals = marginals.scaled(epsilon)
    s = marginals.tau
    kernel = jnp.exp(-cost)

    def marginal_error(u: Array, sums: Array) -> Array:
        return jnp.vdot(a, jnp.abs(u * sums - marginals.transported_fraction(jnp.log(u))))

    def body_fun(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, u, sums = carry
        log_u = (jnp.log(u) - 2 * jnp.log(sums)) * (s / (2 + s))
        u = jnp.where(a > 0, jnp.exp(log_u), 1)
        return count + 1, u, kernel @ (a * u)

    def cond_fun(carry: tuple[Array, Array, Array]) -> Array:
        count, u, sums = carry
        return (marginal_error(u, sums) > solver.tol) & (count < solver.max_iterations)

    start = (jnp.array(0, jnp.int32), jnp.ones_like(a), kernel @ a)
    _, u, sums = while_loop(cond_fun, body_fun, start, kernel)
    error = marginal_error(u, sums)
    # For large ε, log u is all rounding error; its c-transform is exact up to a constant.
    h = jnp.where(a > 0, jnp.log(u), 0)
    transform = s * soft_minimum(h[None] - cost, a[None])
    value = jnp.vdot(a, marginals.dual(h) + marginals.variation(transform))
    potential = transform + jnp.vdot(a, h - transform) * (s / (1 + s))
    plan = a[None] * jnp.exp(jnp.minimum(potential[:, None] + potential[None] - cost, LARGE))
    plan = plan / plan.sum(1, keepdims=True)
    gradient = solver.cost.gradient(plan, x, x)
    return SinkhornOutput(epsilon * value, epsilon * potential, None, gradient, error)
