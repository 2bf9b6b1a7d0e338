"""How a recall is differentiated."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from jdam._core.derivatives import full_precision
from jdam._core.gmres import gmres
from jdam._energy.evaluation import Evaluation
from jdam._measures.base import AnyMeasure
from jdam._recall.solver import Problem, Solver, State

#: A linear map of tangents of a measure.
LinearMap: TypeAlias = Callable[[AnyMeasure], AnyMeasure]


class Adjoint(ABC):
    """How to differentiate a recall: a frozen dataclass."""

    @abstractmethod
    def run(self, solver: Solver, query: AnyMeasure, problem: Problem) -> State:
        """The last state of a recall, with derivatives."""


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Differentiate through the steps that were taken, in forward or reverse mode.

    Reverse mode keeps one state a step and computes the rest again; its result is the exact
    derivative of what `recall` returned, converged or not.
    """

    def run(self, solver: Solver, query: AnyMeasure, problem: Problem) -> State:
        return solver.run(query, problem)


@dataclass(frozen=True)
class Implicit(Adjoint):
    """Differentiate the fixed point ξ = Φ(ξ, θ) itself, by the implicit function theorem:

        (I − ∂Φ/∂ξ) dξ = (∂Φ/∂θ) dθ.

    Memory does not depend on the number of steps, and the cost is that of one linear solve, by
    GMRES to a relative accuracy `tol` (eps^0.7 of the dtype if None, 1e-5 in float32 and 1e-11
    in float64). Right where the recall has converged, and as near as it has; `Status.MAX_STEPS`
    says that it has not.

    Where I − ∂Φ/∂ξ is singular, because Φ conserves something of the query (rotations of a
    factor, which are no part of the measure; the weights of a point cloud if κ = 0), that part of
    dξ is the query's own, as it is with `Unrolled`. Entries of the trace have derivative zero.

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
        """dξ with dξ − J dξ = direct, J the contraction: the limit of dξ ← J dξ + direct from a
        start on. The part of it along the gauge stays."""

        _, unravel = ravel_pytree(start)

        def residual(d: AnyMeasure) -> AnyMeasure:
            return jax.tree.map(jnp.subtract, d, contraction(d))

        def regular(flat: Array) -> Array:  # I − J, where it is not zero
            d = unravel(flat)
            return ravel_pytree(jax.tree.map(jnp.add, residual(d), gauge(d)))[0]

        def solve(matvec: Any, right: Array) -> Array:
            eps = float(jnp.finfo(right.dtype).eps)
            return gmres(matvec, right, eps**0.7 if self.tol is None else self.tol)

        # In one array: a leaf that a step leaves as it is would have no derivative to transpose.
        right, _ = ravel_pytree(jax.tree.map(jnp.subtract, direct, residual(start)))
        found = jax.lax.custom_linear_solve(regular, right, solve, transpose_solve=solve)
        return jax.tree.map(jnp.add, start, unravel(found))


@dataclass(frozen=True)
class OneStep(Adjoint):
    """Differentiate the last step alone, as if it had started from a constant.

    The cheapest derivative, dξ = (∂Φ/∂θ) dθ: off by about the contraction factor of Φ, which at
    high β is tiny, and zero in the query (one-step differentiation: Bolte, Pauwels and Vaiter,
    arXiv:2305.13768).
    """

    def run(self, solver: Solver, query: AnyMeasure, problem: Problem) -> State:
        return _at_fixed_point(_directly, solver, query, problem)


def _directly(
    contraction: LinearMap, gauge: LinearMap, direct: AnyMeasure, start: AnyMeasure
) -> AnyMeasure:
    return direct


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _at_fixed_point(
    solve: Callable[..., AnyMeasure], solver: Solver, query: AnyMeasure, problem: Problem
) -> State:
    return solver.descend(solver.start(query, problem), problem)


@_at_fixed_point.defjvp
@full_precision
def _at_fixed_point_jvp(
    solve: Callable[..., AnyMeasure],
    solver: Solver,
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
) -> tuple[State, State]:
    end = _at_fixed_point(solve, solver, *primals)
    (_, problem), (dquery, dproblem) = primals, tangents
    measure = end.measure
    guess = solver.search.settled(problem.memory, end.evaluation.guess)

    def evaluate(measure: AnyMeasure, problem: Problem) -> Evaluation:
        found: Evaluation = solver.evaluate(measure, problem, guess)
        return found

    def step(measure: AnyMeasure, problem: Problem) -> AnyMeasure:
        return solver.move(measure, evaluate(measure, problem), problem)

    _, contraction = jax.linearize(lambda measure: step(measure, problem), measure)
    direct = jax.jvp(partial(step, measure), (problem,), (dproblem,))[1]
    gauge = partial(problem.memory.geometry.gauge, measure)
    dmeasure = solve(contraction, gauge, direct, dquery)

    def settle(measure: AnyMeasure, problem: Problem) -> State:
        found = evaluate(measure, problem)._replace(guess=end.evaluation.guess)
        return end._replace(measure=measure, evaluation=found)

    return end, jax.jvp(settle, (measure, problem), (dmeasure, dproblem))[1]
