"""Recall as a flow: steps down the energy, each followed by an evaluation, until a fixed point."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from jdam._core.batching import advance_while, compute_where
from jdam._core.derivatives import ACCEPTED, full_precision, jvp, recomputed
from jdam._core.loops import scan
from jdam._energy.average import view_of
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
    tol: Float[Array, ""]  # the residual that is small enough
    goal: Float[Array, ""]  # the one at which to stop
    max_steps: Int[Array, ""]
    energy_resolution: Float[Array, ""]  # the smallest change of energy that says anything


class State(NamedTuple):
    """Where a recall has come to."""

    measure: AnyMeasure
    evaluation: Evaluation  # at the measure; its view is what is kept of that
    backtracks: Int[Array, ""]  # with how much caution the last step was taken
    stalled: Bool[Array, ""]  # neither energy nor residual falls any more
    residual: Float[Array, ""]
    num_steps: Int[Array, ""]  # −1 before the first evaluation
    kept: Any = None  # by the acceleration

    @property
    def evaluated(self) -> Bool[Array, ""]:
        """False until the first turn, which moves nothing."""
        return self.num_steps >= 0

    def with_guess(self, guess: Any) -> "State":
        """The state, with another guess to start evaluations from."""
        return self._replace(evaluation=self.evaluation._replace(guess=guess))

    def start_from(self) -> Start:
        """The start of an evaluation close by."""
        kept = self.evaluation.pull, self.evaluation.nearest.inliers
        pull, inliers = jax.tree.map(jnp.zeros_like, kept)
        return Start(pull, inliers, self.evaluation.guess)


class Attempt(NamedTuple):
    """A step that was tried, and the evaluation where it ended."""

    measure: AnyMeasure
    evaluation: Evaluation
    residual: Float[Array, ""]


class Attempts(NamedTuple):
    """Where the attempts at one step have come to."""

    state: State  # before the step, and after it once one is accepted
    waiting: Bool[Array, ""]  # for one that is
    moved: Bool[Array, ""]  # whether it led to something better
    bold: Bool[Array, ""] | None  # whether what the acceleration proposed is to be tried


class End(NamedTuple):
    """The last state of a recall, and the trace of all if it is kept."""

    state: State
    trace: Trace | None


@dataclass(frozen=True)
class Flow:
    """How to recall. Its methods are pure functions that close over nothing traced."""

    search: Search
    separation: Separation
    max_steps: int = 1  # at most: a problem may have fewer
    save_trace: bool = False
    acceleration: Acceleration | None = None

    def problem(self, memory: Memory, beta: Array, step_size: Array) -> Problem:
        """The problem, with tolerances that are never reached."""
        _, resolution = memory.units_of_patterns()
        # By rounding, or by the mass that the search may leave out.
        resolution = jax.lax.stop_gradient(jnp.maximum(resolution, self.search.tolerance / beta))
        most, nothing = jnp.array(self.max_steps, jnp.int32), jnp.zeros_like(beta)
        return Problem(memory, beta, step_size, nothing, nothing, most, resolution)

    def start(self, query: AnyMeasure, problem: Problem) -> State:
        """The state before the first evaluation."""
        memory, nothing = problem.memory, jnp.zeros_like(problem.beta)
        geometry, start = memory.geometry, self.search.start(memory, query)
        zero = jnp.array(0, jnp.int32)
        view = jax.eval_shape(lambda *given: geometry.kept(view_of(*given)), geometry, query)
        return State(
            measure=query,
            evaluation=Evaluation(
                view=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), view),
                energy=nothing,
                relative=nothing,
                pull=start.pull,
                nearest=Nearest(zero, nothing, start.inliers),
                weight=nothing,
                unsolved=nothing,
                neglected=nothing,
                guess=start.guess,
            ),
            backtracks=zero,
            stalled=jnp.array(False),
            residual=jnp.full_like(nothing, jnp.inf),
            num_steps=jnp.array(-1, jnp.int32),
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
            state = state._replace(
                evaluation=_kept(evaluation, problem), num_steps=state.backtracks
            )
            return self.advance(state, problem).measure

        step_size = problem.step_size
        sure = geometry.surely_descends(evaluation.view, evaluation.pull, step_size, moved)
        doubtful = ~sure & (evaluation.weight != 0)
        return compute_where(doubtful, advance, moved, measure, (problem, evaluation))

    @partial(jax.jit, static_argnums=0)
    def advance(self, state: State, problem: Problem) -> State:
        """One step and the evaluation that follows it; on the first turn the evaluation alone."""
        acceleration = self.acceleration
        if acceleration is None and problem.memory.geometry.max_backtracks == 0:
            return self.follow(state, _attempt(self, state, problem, None, False), problem)
        proposal = None if acceleration is None else acceleration.propose(self, state, problem)
        return _accepted(self, jnp.array(True), state, problem, proposal).state

    def follow(
        self,
        state: State,
        attempt: Attempt,
        problem: Problem,
        moved: Any = True,
        learnt: Any = None,
    ) -> State:
        """The state after an attempt, with what the acceleration learnt; where it was not `moved`,
        the attempt has told only that there is no more to gain."""
        found, old = attempt.evaluation, state.evaluation
        # The worst so far.
        found = found._replace(
            neglected=jnp.maximum(old.neglected, found.neglected),
            unsolved=jnp.maximum(old.unsolved, found.unsolved),
        )
        attempt = Attempt(attempt.measure, _kept(found, problem), attempt.residual)
        stalled = state.stalled
        if problem.memory.geometry.max_backtracks > 0:
            gain = old.relative - found.relative
            before = Attempt(state.measure, old, state.residual)
            attempt = jax.tree.map(partial(jnp.where, moved), attempt, before)
            stalled = state.evaluated & ~(gain > _resolution(state, problem))
            stalled &= attempt.residual >= state.residual
        return State(
            *attempt[:2],
            backtracks=state.backtracks,
            stalled=stalled,
            residual=attempt.residual,
            num_steps=state.num_steps + 1,
            kept=jax.tree.map(partial(jnp.where, state.evaluated), learnt, state.kept),
        )

    def settle(self, state: State, measure: AnyMeasure, problem: Problem) -> State:
        """The state, were it evaluated at another measure."""
        evaluation = self.evaluate(measure, problem, state.start_from())
        return state._replace(measure=measure, evaluation=_kept(evaluation, problem))

    def pending(self, state: State, problem: Problem) -> Bool[Array, ""]:
        """Whether a state is not the last."""
        unfinished = (state.residual > problem.goal) & ~state.stalled | (problem.goal == 0)
        # No step can mend NaN.
        unfinished &= state.num_steps < problem.max_steps
        return unfinished & jnp.isfinite(state.evaluation.energy) | ~state.evaluated

    def run(self, state: State, problem: Problem) -> End:
        """All steps of a recall."""

        def turn(state: State, _: None) -> tuple[State, Trace | None]:
            state = self.next(state, problem)
            seen = Trace(state.evaluation.energy, state.residual, state.measure)
            return state, seen if self.save_trace else None

        # The first turn only evaluates: in the same loop, so that it is compiled once.
        state, trace = scan(turn, state, None, problem, length=self.max_steps + 1)
        return End(state, jax.tree.map(lambda leaf: leaf[1:], trace))

    def next(self, state: State, problem: Problem) -> State:
        """The state one step on, if it is not the last."""
        pending = self.pending(state, problem)
        if self.acceleration is not None or problem.memory.geometry.max_backtracks == 0:
            at_once = self.search.queries_at_once(problem.memory)
            return compute_where(pending, self.advance, state, state, problem, at_once=at_once)
        # Queries that take turns at attempts need not take turns at steps too.
        attempts: Attempts = recomputed(partial(_accepted, self))(pending, state, problem, None)
        return attempts.state

    def report(self, end: End, problem: Problem) -> Recall:
        """The `Recall`, with its status, of the last evaluated state."""
        state, found, tol = end.state, end.state.evaluation, problem.tol
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
            energy=found.energy,
            residual=state.residual,
            num_steps=state.num_steps,
            status=_last_true(
                (is_mixture(found.weight), Status.MIXTURE),
                (state.residual > tol, Status.MAX_STEPS),
                ((state.residual > tol) & state.stalled, Status.STALLED),
                (found.unsolved > rounding, Status.SOLVER),
                (found.neglected > self.search.tolerance, Status.UNCERTIFIED),
                (~(finite & valid), Status.NONFINITE),
                (out_of_reach & valid, Status.OUT_OF_REACH),
            ),
            neglected=found.neglected,
            trace=end.trace,
        )


def _resolution(state: State, problem: Problem) -> Float[Array, ""]:
    """What change of energy says anything, the rounding of the sum over patterns included."""
    energy = jax.lax.stop_gradient(state.evaluation.relative)
    rounding = 4 * float(jnp.finfo(energy.dtype).eps) * jnp.abs(energy)
    return problem.energy_resolution + rounding


def _residual(
    evaluation: Evaluation, problem: Problem, backtracks: Int[Array, ""]
) -> Float[Array, ""]:
    geometry = problem.memory.geometry
    residual = geometry.residual_with_caution(evaluation.view, evaluation.pull, backtracks)
    return jax.lax.stop_gradient(jnp.where(evaluation.weight == 0, 0, residual))


def _kept(evaluation: Evaluation, problem: Problem) -> Evaluation:
    """Of an evaluation, what the next step needs."""
    return evaluation._replace(view=problem.memory.geometry.kept(evaluation.view))


def _attempt(
    flow: Flow, state: State, problem: Problem, proposal: Proposal | None, bold: Any
) -> Attempt:
    """What was proposed, if `bold`, or else a step with the caution that the state asks for; and an
    evaluation."""
    moved = flow.move(state.measure, state.evaluation, problem, state.backtracks)
    if proposal is not None:
        moved = jax.tree.map(partial(jnp.where, bold), proposal.measure, moved)
    measure = jax.tree.map(partial(jnp.where, state.evaluated), moved, state.measure)
    found = flow.evaluate(measure, problem, state.start_from())
    return Attempt(measure, found, _residual(found, problem, state.backtracks))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _accepted(
    flow: Flow, pending: Array, state: State, problem: Problem, proposal: Proposal | None
) -> Attempts:
    """The proposal, or the first of ever more cautious attempts, that does not raise the energy.
    Queries of a vmapped batch that still wait for one take turns, a few at a time."""
    # The first attempt may be a little bolder than the last that was good.
    if proposal is None:
        state = state._replace(backtracks=jnp.maximum(state.backtracks - 1, 0))
    bold = None if proposal is None else state.evaluated
    start = Attempts(state, pending, jnp.array(False), bold)
    found: Attempts = advance_while(
        lambda attempts, _: attempts.waiting,
        partial(_try, flow),
        start,
        (problem, proposal),
        at_once=flow.search.queries_at_once(problem.memory),
    )
    return found


@partial(jax.jit, static_argnums=0)
def _try(flow: Flow, last: Attempts, args: tuple[Problem, Proposal | None]) -> Attempts:
    """One attempt."""
    (problem, proposal), state, backtracks = args, last.state, last.state.backtracks
    most = problem.memory.geometry.max_backtracks
    bold = jnp.array(False) if last.bold is None else last.bold
    attempt = _attempt(flow, state, problem, proposal, bold)
    gain = state.evaluation.relative - attempt.evaluation.relative
    resolution = _resolution(state, problem)
    # Where energies are all rounding, residuals still tell.
    nearer = attempt.residual < state.residual
    level, first = gain >= -resolution, ~state.evaluated
    accepted = first | level & (~bold | nearer | (gain > resolution))
    moved = first | (gain >= 0) | level & nearer
    ended = accepted | ~bold & (backtracks >= most)
    learnt = _learnt(flow, proposal, gain + resolution, bold & accepted)
    after = flow.follow(state, attempt, problem, moved, learnt)
    again = state._replace(backtracks=jnp.where(bold, backtracks, backtracks + 1))
    return Attempts(
        state=jax.tree.map(partial(jnp.where, ended), after, again),
        waiting=~ended,
        moved=ended & moved,
        bold=None if last.bold is None else bold & accepted,
    )


def _learnt(flow: Flow, proposal: Proposal | None, gain: Array, accepted: Array) -> Any:
    if flow.acceleration is None or proposal is None:
        return None
    return flow.acceleration.learn(proposal, gain, accepted)


@partial(_accepted.defjvp, symbolic_zeros=True)
@full_precision
def _accepted_jvp(flow: Flow, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    # Which attempt is accepted is piecewise constant, and what it took to compare is kept.
    found = _accepted(flow, *primals)
    taken = found.moved, found.bold, found.state.backtracks, found.state.evaluation.guess
    moved, bold, backtracks, guess = checkpoint_name(taken, ACCEPTED)
    bold = jnp.array(False) if bold is None else bold

    def again(
        pending: Array, state: State, problem: Problem, proposal: Proposal | None
    ) -> Attempts:
        cautious = state._replace(backtracks=backtracks)
        settled = cautious.with_guess(flow.search.settled(problem.memory, guess))
        attempt = _attempt(flow, settled, problem, proposal, bold)
        gain = state.evaluation.relative - attempt.evaluation.relative + _resolution(state, problem)
        learnt = _learnt(flow, proposal, gain, bold)
        after = flow.follow(cautious, attempt, problem, moved, learnt)
        after = jax.tree.map(partial(jnp.where, pending), after, state)
        return found._replace(state=after)

    return found, jvp(again, primals, tangents)[1]


def _last_true(*findings: tuple[Array, Status]) -> Int[Array, ""]:
    """The last status whose finding is true; CONVERGED if none is."""
    status = jnp.array(Status.CONVERGED, jnp.int32)
    for found, code in findings:
        status = jnp.where(found, jnp.int32(code), status)
    return status
