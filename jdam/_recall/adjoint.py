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

from jdam._core.derivatives import full_precision
from jdam._core.gmres import gmres
from jdam._energy.evaluation import Evaluation
from jdam._measures.base import AnyMeasure
from jdam._recall.solver import Problem, Solver, State, run

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

    Each step that was taken is evaluated once more; steps that were allowed but not taken cost
    nothing. Reverse mode stores the measure and the warm start of each step. The derivative is
    exactly that of the result of `recall`, converged or not.
    """

    def run(self, solver: Solver, query: AnyMeasure, problem: Problem) -> State:
        return run(solver, query, problem)


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
