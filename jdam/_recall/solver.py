"""The descent of a recall: the only place where a measure moves.

One loop serves all recalls. Each turn evaluates a candidate, accepts it or keeps the measure, and
proposes the next candidate: after a rejection a more cautious step, else a full or an accelerated
one. The query is the first candidate.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdam._core.batching import batched_while_loop
from jdam._core.derivatives import full_precision, jvp
from jdam._core.loops import scan
from jdam._energy.evaluation import Evaluation
from jdam._energy.search import Search
from jdam._energy.separation import Separation
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory
from jdam._recall.acceleration import Acceleration
from jdam._recall.result import Recall, Status, Trace, is_mixture


class Problem(NamedTuple):
    """All that a recall depends on but the query; traced."""

    memory: Memory
    beta: Float[Array, ""]
    step_size: Float[Array, ""]
    tol: Float[Array, ""]  # the residual that counts as converged where the energy stagnates
    goal: Float[Array, ""]  # the residual at which to stop
    max_steps: Int[Array, ""]
    energy_tolerance: Float[Array, ""]  # changes of energy below this are rounding


class Attempt(NamedTuple):
    """Which candidate it was."""

    caution: Int[Array, "*T"]
    bold: Bool[Array, "*T"]  # whether the acceleration made it


class Record(NamedTuple):
    """How each step was taken, for its derivative; leaves lead with (T + 1,)."""

    attempt: Attempt
    moved: Bool[Array, " T"]
    guess: Any


class State(NamedTuple):
    """The state of a recall."""

    measure: AnyMeasure
    evaluation: Evaluation  # at the measure
    residual: Float[Array, ""]
    stagnated: Bool[Array, ""]  # neither energy nor residual falls any more
    num_steps: Int[Array, ""]  # accepted steps; −1 before the query is evaluated
    candidate: AnyMeasure  # the measure to evaluate next
    attempt: Attempt
    history: Any = None  # of the acceleration
    trace: Trace | None = None
    record: Record | None = None  # if a derivative will be asked for


@dataclass(frozen=True)
class Solver:
    """How to recall; static. `max_steps` is the most that any problem may ask for."""

    search: Search
    separation: Separation
    max_steps: int = 0
    acceleration: Acceleration | None = None
    save_trace: bool = False

    def problem(self, memory: Memory, beta: Array, step_size: Array) -> Problem:
        """The problem of `max_steps` steps, whatever the residual."""
        _, resolution = memory.magnitudes()
        # Of rounding, or of the mass that the search may leave out.
        resolution = jax.lax.stop_gradient(jnp.maximum(resolution, self.search.tolerance / beta))
        most, zero = jnp.array(self.max_steps, jnp.int32), jnp.zeros_like(beta)
        return Problem(memory, beta, step_size, zero, zero, most, resolution)

    def start(self, query: AnyMeasure, problem: Problem, *, record: bool = False) -> State:
        """The state before the query is evaluated: its energy counts as infinite."""
        beta, guess = problem.beta, self.search.first_guess(problem.memory)
        evaluation = _zeros(jax.eval_shape(self.evaluate, query, problem, guess))
        infinite, zero, no = jnp.full_like(beta, jnp.inf), jnp.array(0, jnp.int32), jnp.array(False)
        rows = partial(
            jax.tree.map, lambda leaf: jnp.zeros((self.max_steps + 1, *leaf.shape), leaf.dtype)
        )
        return State(
            measure=query,
            evaluation=evaluation._replace(relative=infinite, guess=guess),
            residual=infinite,
            stagnated=no,
            num_steps=zero - 1,
            candidate=query,
            attempt=Attempt(zero, no),
            history=None if self.acceleration is None else self.acceleration.start(query, beta),
            trace=rows(Trace(beta, beta, query)) if self.save_trace else None,
            record=rows(Record(Attempt(zero, no), no, guess)) if record else None,
        )

    @partial(jax.jit, static_argnums=0)
    def evaluate(self, measure: AnyMeasure, problem: Problem, guess: Any) -> Evaluation:
        """The energy and the average target at a measure."""
        memory, beta, separation = problem.memory, problem.beta, self.separation
        return self.search.evaluate(memory, measure, beta, guess, separation=separation)

    def move(
        self, measure: AnyMeasure, evaluation: Evaluation, problem: Problem, caution: Any = 0
    ) -> AnyMeasure:
        """The step from an evaluated measure: the full one, or a more cautious one."""
        geometry, view, pull = problem.memory.geometry, evaluation.view, evaluation.pull
        if geometry.max_backtracks == 0:
            moved = geometry.move(view, pull, problem.step_size)
        else:
            moved = geometry.backtrack(view, pull, problem.step_size, caution)
        return _where(evaluation.weight == 0, measure, moved)  # no pattern is within reach

    def run(self, query: AnyMeasure, problem: Problem) -> State:
        """The last state, with the derivative of the steps taken; what only the loop needs is left
        out."""
        return _run(self, query, problem)

    def descend(self, state: State, problem: Problem) -> State:
        """The last state. It has no derivative."""
        at_once = self.search.query_batch_size(problem.memory)
        end: State = batched_while_loop(self.unfinished, self.turn, state, problem, at_once=at_once)
        if end.trace is None:
            return end
        taken = jnp.minimum(jnp.arange(1, self.max_steps + 1, dtype=jnp.int32), end.num_steps)
        return end._replace(trace=jax.tree.map(lambda leaf: leaf[taken], end.trace))

    def unfinished(self, state: State, problem: Problem) -> Bool[Array, ""]:
        """Whether a state is not the last."""
        going = (state.residual > problem.goal) & ~state.stagnated | (problem.goal == 0)
        going &= (state.num_steps < problem.max_steps) & jnp.isfinite(state.evaluation.energy)
        return going | (state.num_steps < 0)

    @partial(jax.jit, static_argnums=0)
    def turn(self, state: State, problem: Problem) -> State:
        """Evaluate the candidate, accept it or keep the measure, and propose the next one."""
        before, state = state, state._replace(trace=None, record=None)
        found = self.evaluate(state.candidate, problem, state.evaluation.guess)
        residual = _residual(found, problem, state.attempt.caution)
        if self._accepts_all(problem):
            yes = jnp.array(True)
            state = self._update(state, found, residual, problem)
            state = state._replace(candidate=self.move(state.measure, found, problem))
            return self._written(before, state, found, yes, yes)
        gain, resolution = state.evaluation.relative - found.relative, _resolution(state, problem)
        first, level, bold = state.num_steps < 0, gain >= -resolution, state.attempt.bold
        nearer = residual < state.residual  # which tells where energies are all rounding
        accepted = first | level & (~bold | nearer | (gain > resolution))
        moved = first | (gain >= 0) | level & nearer
        most = problem.memory.geometry.max_backtracks
        given_up = ~bold & (state.attempt.caution >= most)
        ended = accepted | given_up
        state = self._update_history(state, gain + resolution, bold & accepted)
        state = _where(ended, self._update(state, found, residual, problem, moved), state)
        proposed = self._propose(state, problem, ended)
        return self._written(before, proposed, found, ended, moved)

    def _accepts_all(self, problem: Problem) -> bool:
        """Whether it is proved that no step raises the energy, or nobody asks."""
        return self.acceleration is None and problem.memory.geometry.max_backtracks == 0

    def _update_history(self, state: State, gain: Array, accepted: Array) -> State:
        """What the acceleration makes of the fate of its proposal."""
        if self.acceleration is None:
            return state
        learnt = self.acceleration.update(state.history, gain, accepted)
        return state._replace(history=_where(state.num_steps >= 0, learnt, state.history))

    def _update(
        self,
        state: State,
        found: Evaluation,
        residual: Array,
        problem: Problem,
        moved: Bool[Array, ""] | None = None,
    ) -> State:
        """The state after a step to the candidate, or where it is not `moved` after the proof that
        there is nothing to gain; None: it surely is."""
        old, step = state.evaluation, state.num_steps + 1
        found = found._replace(  # the worst so far
            neglected=jnp.maximum(old.neglected, found.neglected),
            unsolved=jnp.maximum(old.unsolved, found.unsolved),
        )
        after = state._replace(
            measure=state.candidate, evaluation=found, residual=residual, num_steps=step
        )
        if moved is not None:
            gains = old.relative - found.relative > _resolution(state, problem)
            kept = state._replace(num_steps=step)
            after = _where(moved, after, kept)
            stagnated = (step > 0) & ~gains & (after.residual >= state.residual)
            after = after._replace(stagnated=stagnated)
        return after

    def _written(
        self, before: State, state: State, found: Evaluation, ended: Array, moved: Array
    ) -> State:
        """The state with the trace and the record from before, and what a turn adds to them."""
        row = jnp.where(ended, state.num_steps, self.max_steps + 1)  # out of range: dropped
        seen = Trace(state.evaluation.energy, state.residual, state.measure)
        taken = Record(before.attempt, moved, found.guess)

        def add(table: Any, new: Any) -> Any:
            if table is None:
                return None
            write = lambda rows, leaf: rows.at[row].set(leaf, mode="drop")  # noqa: E731
            return jax.tree.map(write, table, new)

        return state._replace(trace=add(before.trace, seen), record=add(before.record, taken))

    def _propose(self, state: State, problem: Problem, ended: Array) -> State:
        """The next candidate: after a step a little bolder than that, after a rejection more
        cautious."""
        caution, bold = state.attempt
        change = jnp.where(bold, 0, jnp.where(ended, -1, 1)).astype(jnp.int32)
        caution, no = jnp.maximum(caution + change, 0), jnp.zeros_like(bold)
        plain = self.move(state.measure, state.evaluation, problem, caution)
        state = state._replace(candidate=plain, attempt=Attempt(caution, no))
        if self.acceleration is None:
            return state
        candidate, history = self.acceleration.propose(self, state, problem)
        faster = state._replace(candidate=candidate, history=history, attempt=Attempt(caution, ~no))
        proposed: State = _where(ended, faster, state)
        return proposed

    def retrace(self, record: Record | None, query: AnyMeasure, problem: Problem) -> State:
        """The steps that were taken once more, in a form that has a derivative. Without a record
        all steps are full ones."""

        def step(state: State, now: Record | None, following: Attempt | None) -> State:
            guess = None if now is None else now.guess
            found = self.evaluate(state.candidate, problem, guess)
            residual = _residual(found, problem, state.attempt.caution)
            if now is not None:
                gain = state.evaluation.relative - found.relative + _resolution(state, problem)
                state = self._update_history(state, gain, now.attempt.bold)
            state = self._update(state, found, residual, problem)
            if following is None:
                state = state._replace(candidate=self.move(state.measure, found, problem))
            else:
                state = self._propose(state, problem, jnp.array(True))
                plain = self.move(state.measure, found, problem, following.caution)
                candidate = _where(following.bold, state.candidate, plain)
                state = state._replace(candidate=candidate, attempt=following)
            return _stripped(state)

        def turn(state: State, rows: Any) -> tuple[State, Trace | None]:
            on = self.unfinished(state, problem) if rows[0] is None else rows[0].moved
            state = _where(on, step(state, *rows), state)
            seen = Trace(state.evaluation.energy, state.residual, state.measure)
            return state, seen if self.save_trace else None

        start = _stripped(self.start(query, problem))._replace(trace=None)
        following = None
        if record is not None:
            following = jax.tree.map(lambda leaf: jnp.roll(leaf, -1, 0), record.attempt)
        once_more: Any = jax.checkpoint(turn, prevent_cse=False)
        rows, length = (record, following), self.max_steps + 1
        end, trace = scan(once_more, start, rows, problem, length=length)
        last: State = end._replace(trace=jax.tree.map(lambda leaf: leaf[1:], trace))
        return last

    def report(self, state: State, problem: Problem) -> Recall:
        """The `Recall`, with its status, of the last state."""
        found = state.evaluation
        tol = jnp.where(state.stagnated, problem.tol, problem.goal)
        valid = jnp.isfinite(tol) & (problem.step_size > 0) & ~jnp.isnan(found.neglected)
        out_of_reach = (found.weight == 0) & (found.energy == jnp.inf)
        finite = (jnp.isfinite(found.energy) | out_of_reach) & jnp.isfinite(state.residual)
        rounding = float(jnp.finfo(found.energy.dtype).eps) ** 0.5
        return Recall(
            measure=state.measure,
            nearest=found.nearest.pattern,
            weight=found.weight,
            divergence=found.nearest.divergence,
            inliers=found.nearest.inliers,
            pose=found.nearest.pose,
            energy=found.energy,
            residual=state.residual,
            num_steps=state.num_steps,
            status=_last_true(
                (is_mixture(found.weight), Status.MIXTURE),
                (state.residual > tol, Status.MAX_STEPS),
                ((state.residual > tol) & state.stagnated, Status.STALLED),
                (found.unsolved > rounding, Status.SOLVER),
                (found.neglected > self.search.tolerance, Status.UNCERTIFIED),
                (~(finite & valid), Status.NONFINITE),
                (out_of_reach & valid, Status.OUT_OF_REACH),
            ),
            neglected=found.neglected,
            trace=state.trace,
        )


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(solver: Solver, query: AnyMeasure, problem: Problem) -> State:
    end = solver.descend(solver.start(query, problem), problem)
    return _stripped(end)


@partial(_run.defjvp, symbolic_zeros=True)
@full_precision
def _run_jvp(
    solver: Solver, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[State, State]:
    query, problem = primals
    if solver._accepts_all(problem) and solver.search.first_guess(problem.memory) is None:
        found: tuple[State, State] = jvp(partial(solver.retrace, None), primals, tangents)
        return found
    # Which attempts are accepted is piecewise constant.
    end = solver.descend(solver.start(query, problem, record=True), problem)
    _, tangent = jvp(partial(solver.retrace, end.record), primals, tangents)
    return _stripped(end), tangent


def _stripped(state: State) -> State:
    """The state without what only the next turn of the loop needs."""
    evaluation = state.evaluation._replace(view=None, pull=None, guess=None)
    return state._replace(evaluation=evaluation, record=None)


def _resolution(state: State, problem: Problem) -> Float[Array, ""]:
    """Which change of energy is more than rounding, that of the sum over patterns included."""
    energy = jax.lax.stop_gradient(state.evaluation.relative)
    rounding = 4 * float(jnp.finfo(energy.dtype).eps) * jnp.abs(energy)
    return problem.energy_tolerance + jnp.where(state.num_steps < 0, 0, rounding)


def _residual(found: Evaluation, problem: Problem, caution: Int[Array, ""]) -> Float[Array, ""]:
    geometry = problem.memory.geometry
    residual = geometry.cautious_residual(found.view, found.pull, caution)
    return jax.lax.stop_gradient(jnp.where(found.weight == 0, 0, residual))


def _where(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(partial(jnp.where, condition), new, old)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _last_true(*findings: tuple[Array, Status]) -> Int[Array, ""]:
    """The last status whose finding is true; CONVERGED if none is."""
    status = jnp.array(Status.CONVERGED, jnp.int32)
    for found, code in findings:
        status = jnp.where(found, jnp.int32(code), status)
    return status
