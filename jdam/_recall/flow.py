"""Recall as a flow: steps down the energy, each followed by an evaluation, until a fixed point."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from jdam._core.batching import compute_where
from jdam._core.derivatives import ACCEPTED, full_precision, jvp
from jdam._core.loops import scan, while_loop
from jdam._energy.evaluation import Evaluation, Nearest, Start
from jdam._energy.search import Search
from jdam._energy.separation import Separation
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory
from jdam._recall.acceleration import Acceleration, Proposal
from jdam._recall.result import Recall, Status, Trace, is_mixture


class Problem(NamedTuple):
    """All that a recall depends on but where it is; traced."""

    memory: Memory
    beta: Float[Array, ""]
    step_size: Float[Array, ""]
    tol: Float[Array, ""]  # of the residual
    energy_resolution: Float[Array, ""]  # the smallest change of energy that says anything


class State(NamedTuple):
    """Where a recall has come to."""

    measure: AnyMeasure
    evaluation: Evaluation  # at the measure
    evaluated: Bool[Array, ""]  # False until the first turn, which moves nothing
    backtracks: Int[Array, ""]  # with how much caution to try the next step first
    stalled: Bool[Array, ""]  # neither energy nor residual falls any more
    residual: Float[Array, ""]
    num_steps: Int[Array, ""]
    neglected: Float[Array, ""]  # the worst so far
    unsolved: Float[Array, ""]  # likewise
    kept: Any = None  # by the acceleration

    def settled(self, problem: Problem, guess: Any) -> "State":
        """The state, with a guess from which to compare where that has been done."""
        settled = problem.memory.geometry.settled(guess)
        return self._replace(evaluation=self.evaluation._replace(guess=settled))

    def start_from(self) -> Start:
        """The start of an evaluation close by."""
        kept = self.evaluation.pull, self.evaluation.nearest.inliers
        pull, inliers = jax.tree.map(jnp.zeros_like, kept)
        return Start(pull, inliers, self.evaluation.guess)


class Attempt(NamedTuple):
    """A step that was tried, and the evaluation where it ended."""

    measure: AnyMeasure
    evaluation: Evaluation
    backtracks: Int[Array, ""]
    bold: Bool[Array, ""]  # whether it is what the acceleration proposed


class End(NamedTuple):
    """The last state of a recall, and the trace of all if it is kept."""

    state: State
    trace: Trace | None


@dataclass(frozen=True)
class Flow:
    """How to recall. Its methods are pure functions that close over nothing traced."""

    search: Search
    separation: Separation
    max_steps: int = 1
    save_trace: bool = False
    acceleration: Acceleration | None = None

    def problem(
        self, memory: Memory, beta: Array, step_size: Array, tol: Array | None = None
    ) -> Problem:
        """The problem, with a tolerance that is never reached if none is given."""
        _, resolution = memory.units_of_patterns()
        # By rounding, or by the mass that the search may leave out.
        resolution = jnp.maximum(resolution, self.search.tolerance / beta)
        tol = jnp.zeros_like(beta) if tol is None else tol
        return Problem(memory, beta, step_size, tol, jax.lax.stop_gradient(resolution))

    def start(self, query: AnyMeasure, problem: Problem) -> State:
        """The state before the first evaluation."""
        memory, nothing = problem.memory, jnp.zeros_like(problem.beta)
        view = jax.eval_shape(memory.geometry.view, query)
        start, zero = self.search.start(memory, query), jnp.array(0, jnp.int32)
        return State(
            measure=query,
            evaluation=Evaluation(
                view=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), view),
                energy=nothing,
                pull=start.pull,
                nearest=Nearest(zero, nothing, start.inliers),
                weight=nothing,
                unsolved=nothing,
                neglected=nothing,
                guess=start.guess,
            ),
            evaluated=jnp.array(False),
            backtracks=zero,
            stalled=jnp.array(False),
            residual=jnp.full_like(nothing, jnp.inf),
            num_steps=jnp.array(-1, jnp.int32),
            neglected=nothing,
            unsolved=nothing,
            kept=None if self.acceleration is None else self.acceleration.start(query, nothing),
        )

    def evaluate(self, measure: AnyMeasure, problem: Problem, start: Start) -> Evaluation:
        """The energy and the average of the pulls at a measure."""
        separation, search = self.separation, self.search
        return search.evaluate(problem.memory, measure, problem.beta, start, separation=separation)

    def move(
        self, measure: AnyMeasure, evaluation: Evaluation, problem: Problem, backtracks: Any = 0
    ) -> AnyMeasure:
        """ξ⁺ = move(ξ, Σ wᵢ·pullᵢ, τ), or more cautiously; ξ where no pattern is within reach."""
        geometry, view, pull = problem.memory.geometry, evaluation.view, evaluation.pull
        if geometry.max_backtracks == 0:
            moved = geometry.move(view, pull, problem.step_size)
        else:
            moved = geometry.backtrack(view, pull, problem.step_size, backtracks)
        out_of_reach = evaluation.weight == 0
        return jax.tree.map(lambda new, old: jnp.where(out_of_reach, old, new), moved, measure)

    def step(self, measure: AnyMeasure, problem: Problem) -> AnyMeasure:
        """Φ(ξ), the full step, whether or not it lowers the energy."""
        evaluation = self.evaluate(measure, problem, self.search.start(problem.memory, measure))
        return self.move(measure, evaluation, problem)

    def descend(self, measure: AnyMeasure, problem: Problem) -> AnyMeasure:
        """The full step if it surely lowers the energy, else one that was seen not to raise it."""
        geometry = problem.memory.geometry
        evaluation = self.evaluate(measure, problem, self.search.start(problem.memory, measure))
        moved = self.move(measure, evaluation, problem)
        if geometry.max_backtracks == 0:
            return moved

        def advance(measure: AnyMeasure, others: tuple[Problem, Evaluation]) -> AnyMeasure:
            problem, evaluation = others
            state = self.start(measure, problem)
            state = state._replace(evaluation=evaluation, evaluated=jnp.array(True))
            return self.advance(state, problem).measure

        step_size = problem.step_size
        sure = geometry.surely_descends(evaluation.view, evaluation.pull, step_size, moved)
        doubtful = ~sure & (evaluation.weight != 0)
        return compute_where(doubtful, advance, moved, measure, (problem, evaluation))

    def advance(self, state: State, problem: Problem) -> State:
        """One step and the evaluation that follows it; on the first turn the evaluation alone."""
        backtracking = problem.memory.geometry.max_backtracks > 0
        acceleration = self.acceleration
        bold = None if acceleration is None else acceleration.propose(self, state, problem)
        trying = backtracking or bold is not None
        attempt = (_first_accepted if trying else _attempt)(self, state, problem, bold)
        residual = _residual(attempt.evaluation, problem)
        gain = state.evaluation.energy - attempt.evaluation.energy
        resolution = _resolution(state, problem)
        kept, stuck = None, jnp.array(False)
        if acceleration is not None and bold is not None:
            learnt = acceleration.learn(bold, gain + resolution, attempt.bold)
            kept = jax.tree.map(partial(jnp.where, state.evaluated), learnt, state.kept)
        if backtracking:
            # Where energies are all rounding, residuals still tell.
            better = (gain >= 0) | (gain >= -resolution) & (residual < state.residual)
            keep = state.evaluated & ~better
            old = (
                attempt._replace(measure=state.measure, evaluation=state.evaluation),
                state.residual,
            )
            attempt, residual = jax.tree.map(
                lambda x, y: jnp.where(keep, x, y), old, (attempt, residual)
            )
            stuck = state.evaluated & ~(gain > resolution)
        return State(
            measure=attempt.measure,
            evaluation=attempt.evaluation,
            evaluated=jnp.array(True),
            # The next attempt may be a little bolder than the last that was good.
            backtracks=jnp.maximum(attempt.backtracks - 1, 0),
            stalled=stuck & (residual >= state.residual),
            residual=residual,
            num_steps=state.num_steps + 1,
            neglected=jnp.maximum(state.neglected, attempt.evaluation.neglected),
            unsolved=jnp.maximum(state.unsolved, attempt.evaluation.unsolved),
            kept=kept,
        )

    def settle(self, state: State, measure: AnyMeasure, problem: Problem) -> State:
        """The state, were it evaluated at another measure."""
        evaluation = self.evaluate(measure, problem, state.start_from())
        return state._replace(measure=measure, evaluation=evaluation)

    def pending(self, state: State, problem: Problem) -> Bool[Array, ""]:
        """Whether a state is not the last."""
        unfinished = (state.residual > problem.tol) & ~state.stalled | (problem.tol == 0)
        # No step can mend NaN.
        return unfinished & jnp.isfinite(state.evaluation.energy) | ~state.evaluated

    def run(self, state: State, problem: Problem) -> End:
        """All steps of a recall."""
        at_once = self.search.queries_at_once(problem.memory)

        def turn(state: State, _: None) -> tuple[State, Trace | None]:
            pending = self.pending(state, problem)
            state = compute_where(pending, self.advance, state, state, problem, at_once=at_once)
            seen = Trace(state.evaluation.energy, state.residual, state.measure)
            return state, seen if self.save_trace else None

        # The first turn only evaluates: in the same loop, so that it is compiled once.
        state, trace = scan(turn, state, None, problem, length=self.max_steps + 1)
        return End(state, jax.tree.map(lambda leaf: leaf[1:], trace))

    def report(self, end: End, problem: Problem) -> Recall:
        """The `Recall`, with its status, of the last evaluated state."""
        state, found, tol = end.state, end.state.evaluation, problem.tol
        valid = jnp.isfinite(tol) & (problem.step_size > 0) & ~jnp.isnan(state.neglected)
        out_of_reach = (found.weight == 0) & (found.energy == jnp.inf)
        finite = (jnp.isfinite(found.energy) | out_of_reach) & jnp.isfinite(state.residual)
        rounding = float(jnp.finfo(found.energy.dtype).eps) ** 0.5
        return Recall(
            measure=state.measure,
            nearest=found.nearest.pattern,
            weight=found.weight,
            divergence=found.nearest.divergence,
            inliers=found.nearest.inliers,
            energy=found.energy,
            residual=state.residual,
            num_steps=state.num_steps,
            status=_last_true(
                (is_mixture(found.weight), Status.MIXTURE),
                (state.residual > tol, Status.MAX_STEPS),
                ((state.residual > tol) & state.stalled, Status.STALLED),
                (state.unsolved > rounding, Status.SOLVER),
                (state.neglected > self.search.tolerance, Status.UNCERTIFIED),
                (~(finite & valid), Status.NONFINITE),
                (out_of_reach & valid, Status.OUT_OF_REACH),
            ),
            neglected=state.neglected,
            trace=end.trace,
        )


def _resolution(state: State, problem: Problem) -> Float[Array, ""]:
    """What change of energy says anything, the rounding of the sum over patterns included."""
    energy = jax.lax.stop_gradient(state.evaluation.energy)
    rounding = 4 * float(jnp.finfo(energy.dtype).eps) * jnp.abs(energy)
    return problem.energy_resolution + rounding


def _residual(evaluation: Evaluation, problem: Problem) -> Float[Array, ""]:
    residual = problem.memory.geometry.residual(evaluation.view, evaluation.pull)
    return jax.lax.stop_gradient(jnp.where(evaluation.weight == 0, 0, residual))


def _attempt(
    flow: Flow, state: State, problem: Problem, proposal: Proposal | None, bold: Any = False
) -> Attempt:
    """What was proposed, if `bold`, or else a step with the caution that the state asks for; and an
    evaluation."""
    moved = flow.move(state.measure, state.evaluation, problem, state.backtracks)
    if proposal is not None:
        moved = jax.tree.map(partial(jnp.where, bold), proposal.measure, moved)
    measure = jax.tree.map(partial(jnp.where, state.evaluated), moved, state.measure)
    found = flow.evaluate(measure, problem, state.start_from())
    return Attempt(measure, found, state.backtracks, jnp.asarray(bold))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _first_accepted(
    flow: Flow, state: State, problem: Problem, proposal: Proposal | None
) -> Attempt:
    """The proposal, or the first of ever more cautious attempts, that does not raise the energy."""
    most = problem.memory.geometry.max_backtracks

    def turn(carry: tuple[Array, Array, Attempt]) -> tuple[Array, Array, Attempt]:
        backtracks, _, last = carry
        bold = last.bold & state.evaluated
        attempt = _attempt(flow, state._replace(backtracks=backtracks), problem, proposal, bold)
        gain, resolution = (
            state.evaluation.energy - attempt.evaluation.energy,
            _resolution(state, problem),
        )
        # Where energies are all rounding, residuals still tell.
        nearer = _residual(attempt.evaluation, problem) < state.residual
        accepted = ~state.evaluated | (gain >= -resolution) & (~bold | nearer | (gain > resolution))
        following = jnp.where(bold, backtracks, backtracks + 1)
        found = attempt._replace(bold=bold & accepted)
        return following, accepted, found

    def unfinished(carry: tuple[Array, Array, Attempt]) -> Array:
        backtracks, accepted, _ = carry
        return ~accepted & (backtracks <= most)

    first = jnp.array(proposal is not None)
    start = Attempt(state.measure, state.evaluation, state.backtracks, first)
    end = (state.backtracks, jnp.array(False), start)
    return while_loop(unfinished, turn, end, state, problem, proposal)[2]


@partial(_first_accepted.defjvp, symbolic_zeros=True)
@full_precision
def _first_accepted_jvp(flow: Flow, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    # Which attempt is accepted is piecewise constant, and what it took to compare is kept.
    found = _first_accepted(flow, *primals)
    kept = found.backtracks, found.bold, found.evaluation.guess
    backtracks, bold, guess = checkpoint_name(kept, ACCEPTED)

    def accepted(state: State, problem: Problem, proposal: Proposal | None) -> Attempt:
        cautious = state._replace(backtracks=backtracks).settled(problem, guess)
        return _attempt(flow, cautious, problem, proposal, bold)

    return jvp(accepted, primals, tangents)


def _last_true(*findings: tuple[Array, Status]) -> Int[Array, ""]:
    """The last status whose finding is true; CONVERGED if none is."""
    status = jnp.array(Status.CONVERGED, jnp.int32)
    for found, code in findings:
        status = jnp.where(found, jnp.int32(code), status)
    return status
