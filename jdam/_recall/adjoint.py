"""Adjoints: rules that differentiate a recall."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from jdam._core.batching import masked_cond
from jdam._core.derivatives import full_precision, jvp, with_value
from jdam._core.gmres import gmres
from jdam._core.loops import scan
from jdam._energy.evaluation import Evaluation
from jdam._measures.base import AnyMeasure
from jdam._recall.result import Trace
from jdam._recall.solver import Problem, Record, Solver, State, where

#: A linear map of tangents of a measure.
LinearMap: TypeAlias = Callable[[AnyMeasure], AnyMeasure]


class Adjoint(ABC):
    """Rule that differentiates a recall. Subclasses are frozen dataclasses."""

    @abstractmethod
    def run(self, solver: Solver, query: AnyMeasure, problem: Problem) -> State:
        """Return the last state of a recall, with derivatives."""


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Derivative of the steps that were taken, in forward or reverse mode.

    Each step that was taken is evaluated once more. A step that was allowed but not taken costs one
    iteration of an idle loop. Reverse mode stores the measure, the plain step and the warm start of
    each step. The derivative is exactly that of the result of `recall`, converged or not.
    """

    def run(self, solver: Solver, query: AnyMeasure, problem: Problem) -> State:
        return _unrolled(solver, query, problem)


@dataclass(frozen=True)
class Implicit(Adjoint):
    """Derivative of the fixed point ξ = Φ(ξ, θ), by the implicit function theorem:

        (I − ∂Φ/∂ξ) dξ = (∂Φ/∂θ) dθ.

    The memory needed does not depend on the number of steps, and the cost is one linear solve, by
    GMRES. The derivative is as accurate as the recall is converged; `Status.MAX_STEPS` means that
    it is not.

    Where I − ∂Φ/∂ξ is singular, the part of dξ along the gauge is that of the query's tangent. The
    gauge contains rotations of a factor, which leave the measure unchanged, the weights of a point
    cloud if κ = 0, which steps leave unchanged, and under `Aligned` rigid motions of the measure.
    The pose in which a recall under `Aligned` ends depends on the steps to it: for a loss that
    depends on this pose, use `Unrolled`. Entries of the trace have derivative zero.

    **Arguments:**

    - `tol`: the relative accuracy of the linear solve; None for eps^0.7 of the dtype, 1e-5 in
      float32 and 1e-11 in float64.

    **Raises:** `TypeError` or `ValueError` unless `tol` is None or a number > 0.
    """

    tol: float | None = None

    def __post_init__(self) -> None:
        if self.tol is not None and (isinstance(self.tol, bool) or not self.tol > 0):
            raise ValueError(f"tol must be None or > 0; got {self.tol!r}")

    def run(self, solver: Solver, query: AnyMeasure, problem: Problem) -> State:
        return _at_fixed_point(self._solve, solver, query, problem)

    def _solve(
        self, contraction: LinearMap, gauge: LinearMap, direct: AnyMeasure, start: AnyMeasure
    ) -> AnyMeasure:
        """Return dξ with dξ − J dξ = direct, J the contraction: the limit of dξ ← J dξ + direct
        from `start`. The part of `start` along the gauge is unchanged.
        """

        _, unravel = ravel_pytree(start)

        def residual(d: AnyMeasure) -> AnyMeasure:
            return jax.tree.map(jnp.subtract, d, contraction(d))

        def regular(flat: Array) -> Array:  # I − J, made regular along the gauge
            d = unravel(flat)
            return ravel_pytree(jax.tree.map(jnp.add, residual(d), gauge(d)))[0]

        def solve(matvec: Any, right: Array) -> Array:
            eps = float(jnp.finfo(right.dtype).eps)
            return gmres(matvec, right, eps**0.7 if self.tol is None else self.tol)

        # One flat array: a leaf that a step does not change would have no derivative to transpose.
        right, _ = ravel_pytree(jax.tree.map(jnp.subtract, direct, residual(start)))
        solution = jax.lax.custom_linear_solve(regular, right, solve, transpose_solve=solve)
        return jax.tree.map(jnp.add, start, unravel(solution))


@dataclass(frozen=True)
class OneStep(Adjoint):
    """Derivative of the last step alone, as if its start were constant.

    This is the cheapest derivative, dξ = (∂Φ/∂θ) dθ, with zero derivative in the query. Its error
    is about the contraction factor of Φ, which is tiny at high β (one-step differentiation: Bolte,
    Pauwels and Vaiter, arXiv:2305.13768).
    """

    def run(self, solver: Solver, query: AnyMeasure, problem: Problem) -> State:
        return _at_fixed_point(_directly, solver, query, problem)


def _directly(
    contraction: LinearMap, gauge: LinearMap, direct: AnyMeasure, start: AnyMeasure
) -> AnyMeasure:
    """Return `direct`: the derivative of `OneStep`."""
    return direct


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _unrolled(solver: Solver, query: AnyMeasure, problem: Problem) -> State:
    """Return the last state of a recall, with the derivative of the steps taken."""
    return _stripped(solver.descend(solver.start(query, problem), problem))


@partial(_unrolled.defjvp, symbolic_zeros=True)
@full_precision
def _unrolled_jvp(
    solver: Solver, primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> tuple[State, State]:
    # Which candidates are accepted is a piecewise constant function of the arguments.
    end = solver.descend(solver.start(*primals, record=True), primals[1])
    assert end.record is not None
    _, tangent = jvp(partial(_retraced, solver, end.record), primals, tangents)
    return _stripped(end), tangent


def _retraced(solver: Solver, record: Record, query: AnyMeasure, problem: Problem) -> State:
    """Return the last state from a repetition of the recorded steps, in a form that has a
    derivative.

    Its values are not used. Measures have those of the record, so that one step can be
    differentiated without those before it.
    """

    def step(state: State, rows: tuple[Record, Record]) -> State:
        current, following = rows
        measure = with_value(current.candidate, state.candidate)
        evaluation = solver.evaluate(measure, problem, current.guess)
        state = solver.update_history(state, state.residual, current.accelerated)
        state = state._replace(
            measure=measure, evaluation=evaluation, num_steps=state.num_steps + 1
        )
        state = solver.backtrack(state, problem, jnp.array(True))
        state = state._replace(candidate=with_value(current.plain, state.candidate))
        proposed = solver.accelerate(state, problem)
        plain = solver.move(measure, evaluation, problem, following.backtracks)
        candidate = where(following.accelerated, proposed.candidate, plain)
        backtracks, accelerated = following.backtracks, following.accelerated
        return _stripped(
            proposed._replace(candidate=candidate, backtracks=backtracks, accelerated=accelerated)
        )

    def body_fun(state: State, rows: tuple[Record, Record]) -> tuple[State, Trace | None]:
        state = masked_cond(rows[0].moved, step, state, state, rows)
        trace_row = Trace(state.evaluation.energy, state.residual, state.measure)
        return state, trace_row if solver.save_trace else None

    # Steps in which the measure did not move are left out; the last other one fills their place.
    place = jnp.arange(solver.max_steps + 1, dtype=jnp.int32)
    moves = jnp.cumsum(record.moved, dtype=jnp.int32)
    order = jnp.argsort(~record.moved)[jnp.minimum(place, moves[-1] - 1)]
    current = jax.tree.map(lambda leaf: leaf[order], record)._replace(moved=place < moves[-1])
    following = jax.tree.map(lambda leaf: jnp.roll(leaf, -1, 0), current)
    start = _stripped(solver.start(query, problem))._replace(trace=None)
    remat_body_fun: Any = jax.checkpoint(body_fun, prevent_cse=False)
    end, trace = scan(remat_body_fun, start, (current, following), problem)
    last: State = end._replace(trace=jax.tree.map(lambda leaf: leaf[moves[1:] - 1], trace))
    return last


def _stripped(state: State) -> State:
    """Return the state without arrays that only the next iteration needs."""
    evaluation = state.evaluation._replace(view=None, pull=None, guess=None)
    return state._replace(evaluation=evaluation, record=None)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _at_fixed_point(
    solve: Callable[..., AnyMeasure], solver: Solver, query: AnyMeasure, problem: Problem
) -> State:
    """Return the last state of a recall; `solve` turns partial derivatives into dξ."""
    return solver.descend(solver.start(query, problem), problem)


@_at_fixed_point.defjvp
@full_precision
def _at_fixed_point_jvp(
    solve: Callable[..., AnyMeasure],
    solver: Solver,
    primals: tuple[PyTree, ...],
    tangents: tuple[PyTree, ...],
) -> tuple[State, State]:
    end = _at_fixed_point(solve, solver, *primals)
    (_, problem), (dquery, dproblem) = primals, tangents
    measure = end.measure
    guess = end.evaluation.guess

    def evaluate(measure: AnyMeasure, problem: Problem) -> Evaluation:
        evaluation: Evaluation = solver.evaluate(measure, problem, guess)
        return evaluation

    def step(measure: AnyMeasure, problem: Problem) -> AnyMeasure:
        return solver.move(measure, evaluate(measure, problem), problem)

    _, contraction = jax.linearize(lambda measure: step(measure, problem), measure)
    direct = jax.jvp(partial(step, measure), (problem,), (dproblem,))[1]
    gauge = partial(problem.memory.geometry.gauge, measure)
    dmeasure = solve(contraction, gauge, direct, dquery)

    def settle(measure: AnyMeasure, problem: Problem) -> State:
        evaluation = evaluate(measure, problem)._replace(view=None, pull=None, guess=guess)
        return end._replace(measure=measure, evaluation=evaluation)

    return end, jax.jvp(settle, (measure, problem), (dmeasure, dproblem))[1]
