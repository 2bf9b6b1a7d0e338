"""The descent of a recall: evaluations of candidates, and steps.

One loop serves all recalls. An iteration evaluates a candidate, accepts it or keeps the measure,
and proposes the next candidate: a more cautious step after a rejection, a full or an accelerated
step otherwise. The query is the first candidate.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, PyTree

from jdam._core.batching import batched_while_loop
from jdam._core.loops import zeros_of
from jdam._energy.evaluation import Evaluation
from jdam._energy.search import Search
from jdam._energy.separation import Separation, is_mixture
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory
from jdam._recall.acceleration import Acceleration
from jdam._recall.result import Recall, Status, Trace

T = TypeVar("T")

#: Value of `tol` for the tolerances of the geometry; None would compile another program.
DEFAULT = -1.0
#: Number of stagnated steps in a row after which a recall ends. With 1, 2 of 24 recalls of outlines
#: with ρ end too early: a single stagnated step may follow a rejected proposal.
PATIENCE = 3


class Problem(NamedTuple):
    """The traced arguments of a recall, all but the query."""

    memory: Memory
    beta: Float[Array, ""]
    step_size: Float[Array, ""]
    tol: Float[Array, ""]  # the residual at which to stop
    stagnation_tol: Float[Array, ""]  # the residual that counts as converged after stagnation
    max_steps: Int[Array, ""]
    energy_tolerance: Float[Array, ""]  # the absolute tolerance of the energy


class Record(NamedTuple):
    """The steps of the loop, for the derivative; leaves lead with (T + 1,)."""

    candidate: AnyMeasure  # the measure that was evaluated
    backtracks: Int[Array, " T"]  # of the candidate, as in `State`
    accelerated: Bool[Array, " T"]
    moved: Bool[Array, " T"]  # whether the measure became the candidate
    plain: AnyMeasure  # the plain step from the candidate, to which the acceleration was applied
    guess: PyTree  # warm start of the same evaluation


class State(NamedTuple):
    """The state of a recall."""

    measure: AnyMeasure
    evaluation: Evaluation  # at the measure
    residual: Float[Array, ""]
    stagnated: Int[Array, ""]  # number of steps in a row in which neither energy nor residual fell
    num_steps: Int[Array, ""]  # accepted steps; −1 before the query is evaluated
    candidate: AnyMeasure  # the measure to evaluate next
    backtracks: Int[Array, ""]  # of the candidate: the argument of `Geometry.backtrack`
    accelerated: Bool[Array, ""]  # whether the acceleration proposed the candidate
    history: PyTree = None  # of the acceleration
    trace: Trace | None = None
    record: Record | None = None  # for a derivative


@dataclass(frozen=True)
class Solver:
    """Static settings of a recall. `max_steps` is an upper bound of `Problem.max_steps`."""

    search: Search
    separation: Separation
    max_steps: int = 0
    acceleration: Acceleration | None = None
    save_trace: bool = False

    def problem(
        self,
        memory: Memory,
        query: AnyMeasure,
        beta: Array,
        step_size: Array,
        *,
        tol: ArrayLike = 0,
        max_steps: Array | None = None,
    ) -> Problem:
        """Return the problem of at most `max_steps` steps, None for as many as the settings say.
        `tol` is a tolerance ≥ 0 or `DEFAULT`.
        """
        scale, resolution = memory.magnitudes()
        # Energies have errors from rounding and from the mass that the search may neglect.
        resolution = jnp.maximum(resolution, self.search.tolerance / beta)
        scale = jnp.maximum(scale, float(jnp.finfo(scale.dtype).tiny) ** 0.5)  # tol = 0 never stops
        defaults = memory.geometry.tolerances(query, scale)
        defaults, resolution = jax.lax.stop_gradient((defaults, resolution))
        stagnation_tol, tol = (jnp.where(tol == DEFAULT, default, tol) for default in defaults)
        max_steps = jnp.array(self.max_steps, jnp.int32) if max_steps is None else max_steps
        return Problem(memory, beta, step_size, tol, stagnation_tol, max_steps, resolution)

    def start(self, query: AnyMeasure, problem: Problem, *, record: bool = False) -> State:
        """Return the state before the query is evaluated, with infinite energy."""
        beta, guess = problem.beta, self.search.first_guess(problem.memory)
        evaluation = zeros_of(self.evaluate, query, problem, guess)
        if self._accepts_all(problem):
            evaluation = evaluation._replace(view=None, pull=None)
        infinite, zero, false = jnp.full_like(beta, jnp.inf), jnp.int32(0), jnp.array(False)
        rows = partial(
            jax.tree.map, lambda leaf: jnp.zeros((self.max_steps + 1, *leaf.shape), leaf.dtype)
        )
        return State(
            measure=query,
            evaluation=evaluation._replace(shifted_energy=infinite, guess=guess),
            residual=infinite,
            stagnated=zero,
            num_steps=zero - 1,
            candidate=query,
            backtracks=zero,
            accelerated=false,
            history=None if self.acceleration is None else self.acceleration.start(query, beta),
            trace=rows(Trace(beta, beta, query)) if self.save_trace else None,
            record=rows(Record(query, zero, false, false, query, guess)) if record else None,
        )

    @partial(jax.jit, static_argnums=0)
    def evaluate(self, measure: AnyMeasure, problem: Problem, guess: PyTree) -> Evaluation:
        """Return the energy and the average of the pulls at a measure."""
        memory, beta, separation = problem.memory, problem.beta, self.separation
        return self.search.evaluate(memory, measure, beta, guess, separation=separation)

    def move(
        self, measure: AnyMeasure, evaluation: Evaluation, problem: Problem, backtracks: Any = 0
    ) -> AnyMeasure:
        """Return the measure after a step from an evaluated measure; `backtracks` 0 is the full
        step.
        """
        geometry, view, pull = problem.memory.geometry, evaluation.view, evaluation.pull
        if geometry.max_backtracks == 0:
            moved = geometry.move(view, pull, problem.step_size)
        else:
            moved = geometry.backtrack(view, pull, problem.step_size, backtracks)
        return where(evaluation.weight == 0, measure, moved)  # no pattern has any weight

    def descend(self, state: State, problem: Problem) -> State:
        """Return the last state, without the arrays for another step. It has no derivative."""
        at_once = self.search.query_batch_size(problem.memory)
        end: State = batched_while_loop(
            self.cond_fun, self.body_fun, state, problem, at_once=at_once
        )
        end = end._replace(evaluation=end.evaluation._replace(view=None, pull=None))
        if end.trace is None:
            return end
        taken = jnp.minimum(jnp.arange(1, self.max_steps + 1, dtype=jnp.int32), end.num_steps)
        return end._replace(trace=jax.tree.map(lambda leaf: leaf[taken], end.trace))

    def cond_fun(self, state: State, problem: Problem) -> Bool[Array, ""]:
        """Return whether the recall continues from this state."""
        going = (state.residual > problem.tol) & (state.stagnated < PATIENCE)
        going |= problem.tol == 0
        going &= (state.num_steps < problem.max_steps) & jnp.isfinite(state.evaluation.energy)
        return going | (state.num_steps < 0)

    @partial(jax.jit, static_argnums=0)
    def body_fun(self, state: State, problem: Problem) -> State:
        """Evaluate the candidate, accept it or keep the measure, and propose the next candidate."""
        before, state = state, state._replace(trace=None, record=None)
        evaluation = self.evaluate(state.candidate, problem, state.evaluation.guess)
        residual = _residual(evaluation, problem, state.backtracks)
        if self._accepts_all(problem):
            true, moved = jnp.array(True), self.move(state.candidate, evaluation, problem)
            kept = evaluation._replace(view=None, pull=None)  # no step is repeated
            state = self._update(state, kept, residual, problem)._replace(candidate=moved)
            return self._with_row(before, state, true, (true, moved, evaluation.guess))
        gain = state.evaluation.shifted_energy - evaluation.shifted_energy
        resolution = _resolution(state, problem)
        first, level = state.num_steps < 0, gain >= -resolution
        accelerated = state.accelerated
        closer = residual < state.residual  # decides if changes of energy are only rounding
        accepted = first | level & (~accelerated | closer | (gain > resolution))
        moved = first | (gain >= 0) | level & closer
        most = problem.memory.geometry.max_backtracks
        given_up = ~accelerated & (state.backtracks >= most)
        ended = accepted | given_up
        state = self.update_history(state, gain + resolution, accelerated & accepted)
        state = where(ended, self._update(state, evaluation, residual, problem, moved), state)
        state = self.backtrack(state, problem, ended)
        proposed = where(ended, self.accelerate(state, problem), state)
        return self._with_row(before, proposed, ended, (moved, state.candidate, evaluation.guess))

    def _accepts_all(self, problem: Problem) -> bool:
        """Return whether all candidates are accepted, because no plain step raises the energy."""
        return self.acceleration is None and problem.memory.geometry.max_backtracks == 0

    def update_history(self, state: State, gain: Array, accepted: Array) -> State:
        """Return the state with the history of the acceleration after its proposal was tried."""
        if self.acceleration is None:
            return state
        history = self.acceleration.update(state.history, gain, accepted)
        return state._replace(history=where(state.num_steps >= 0, history, state.history))

    def _update(
        self,
        state: State,
        evaluation: Evaluation,
        residual: Array,
        problem: Problem,
        moved: Bool[Array, ""] | None = None,
    ) -> State:
        """Return the state after a step: at the candidate, or, where it is not `moved`, at the
        measure, with the step counted. None for `moved` is True.
        """
        old, step = state.evaluation, state.num_steps + 1
        evaluation = evaluation._replace(  # the largest of all steps
            neglected=jnp.maximum(old.neglected, evaluation.neglected),
            unsolved=jnp.maximum(old.unsolved, evaluation.unsolved),
        )
        after = state._replace(
            measure=state.candidate, evaluation=evaluation, residual=residual, num_steps=step
        )
        if moved is None:
            return after
        gains = old.shifted_energy - evaluation.shifted_energy > _resolution(state, problem)
        after = where(moved, after, state._replace(num_steps=step))
        still = (step > 0) & ~gains & (after.residual >= state.residual)
        return after._replace(stagnated=jnp.where(still, state.stagnated + 1, 0))

    def _with_row(self, before: State, state: State, ended: Array, results: PyTree) -> State:
        """Return `state` with the trace and the record of `before`, to which this iteration is
        added if it `ended` a step. `results` are the last fields of `Record`.
        """
        row = jnp.where(ended, state.num_steps, self.max_steps + 1)  # rows out of range are dropped
        trace_row = Trace(state.evaluation.energy, state.residual, state.measure)
        record_row = Record(before.candidate, before.backtracks, before.accelerated, *results)

        def add(table: PyTree, new: PyTree) -> PyTree:
            if table is None:
                return None
            write = lambda rows, leaf: rows.at[row].set(leaf, mode="drop")  # noqa: E731
            return jax.tree.map(write, table, new)

        return state._replace(
            trace=add(before.trace, trace_row), record=add(before.record, record_row)
        )

    def backtrack(self, state: State, problem: Problem, ended: Array) -> State:
        """Return the state with the plain step as the candidate. `backtracks` falls by one after a
        plain step, and rises by one after its rejection.
        """
        change = jnp.where(state.accelerated, 0, jnp.where(ended, -1, 1)).astype(jnp.int32)
        backtracks = jnp.maximum(state.backtracks + change, 0)
        plain = self.move(state.measure, state.evaluation, problem, backtracks)
        false = jnp.zeros_like(state.accelerated)
        return state._replace(candidate=plain, backtracks=backtracks, accelerated=false)

    def accelerate(self, state: State, problem: Problem) -> State:
        """Return the state with the proposal of the acceleration in place of the plain step."""
        if self.acceleration is None:
            return state
        candidate, history = self.acceleration.propose(self, state, problem)
        true = jnp.ones_like(state.accelerated)
        return state._replace(candidate=candidate, accelerated=true, history=history)

    def report(self, state: State, problem: Problem) -> Recall:
        """Return the `Recall` of the last state, with its status."""
        evaluation = state.evaluation
        stagnated = state.stagnated >= PATIENCE
        tol = jnp.where(stagnated, problem.stagnation_tol, problem.tol)
        valid = jnp.isfinite(tol) & (problem.step_size > 0) & ~jnp.isnan(evaluation.neglected)
        out_of_reach = (evaluation.weight == 0) & (evaluation.energy == jnp.inf)
        finite = (jnp.isfinite(evaluation.energy) | out_of_reach) & jnp.isfinite(state.residual)
        rounding = float(jnp.finfo(evaluation.energy.dtype).eps) ** 0.5
        return Recall(
            measure=state.measure,
            nearest=evaluation.nearest.pattern,
            weight=evaluation.weight,
            divergence=evaluation.nearest.divergence,
            inliers=evaluation.nearest.inliers,
            pose=evaluation.nearest.pose,
            energy=evaluation.energy,
            residual=state.residual,
            num_steps=state.num_steps,
            status=_last_true(
                (is_mixture(evaluation.weight), Status.MIXTURE),
                (state.residual > tol, Status.MAX_STEPS),
                ((state.residual > tol) & stagnated, Status.STALLED),
                (evaluation.unsolved > rounding, Status.SOLVER),
                (evaluation.neglected > self.search.tolerance, Status.UNCERTIFIED),
                (~(finite & valid), Status.NONFINITE),
                (out_of_reach & valid, Status.OUT_OF_REACH),
            ),
            neglected=evaluation.neglected,
            trace=state.trace,
        )


def _resolution(state: State, problem: Problem) -> Float[Array, ""]:
    """Return the change of energy above which it is more than rounding."""
    energy = jax.lax.stop_gradient(state.evaluation.shifted_energy)
    rounding = 4 * float(jnp.finfo(energy.dtype).eps) * jnp.abs(energy)
    return problem.energy_tolerance + jnp.where(state.num_steps < 0, 0, rounding)


def _residual(
    evaluation: Evaluation, problem: Problem, backtracks: Int[Array, ""]
) -> Float[Array, ""]:
    """Return the residual after so many backtracks; 0 if no pattern has any weight."""
    geometry = problem.memory.geometry
    residual = geometry.cautious_residual(evaluation.view, evaluation.pull, backtracks)
    return jax.lax.stop_gradient(jnp.where(evaluation.weight == 0, 0, residual))


def where(condition: Array, new: T, old: T) -> T:
    """Return `new` where the condition holds, else `old`."""
    chosen: T = jax.tree.map(partial(jnp.where, condition), new, old)
    return chosen


def _last_true(*conditions: tuple[Array, Status]) -> Int[Array, ""]:
    """Return the last status whose condition is true; CONVERGED if none is."""
    status = jnp.array(Status.CONVERGED, jnp.int32)
    for condition, code in conditions:
        status = jnp.where(condition, jnp.int32(code), status)
    return status
