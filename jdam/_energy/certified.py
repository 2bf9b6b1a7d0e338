"""Comparing with few patterns, and proving that the others do not matter."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdam._core import checks
from jdam._core.batching import batched_while_loop, by_platform, masked_cond
from jdam._core.derivatives import full_precision, jvp
from jdam._core.loops import while_loop
from jdam._core.mesh import Layout, first_index, psum
from jdam._energy.average import (
    Settings,
    compare,
    evaluate,
    relative_prior,
    total_prior,
    view_of,
    zero_comparison,
)
from jdam._energy.evaluation import Block, Evaluation
from jdam._energy.search import Exhaustive, Search
from jdam._energy.separation import LogSumExp, Separation, Sums, mass, with_prior
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory
from jdam.geometry.protocol import AnyView, Bound, Patterns

#: How many patterns to bound more closely at a time, by the second bound and by those after it.
REFINED = 256, 64
#: Fewer patterns are all compared unless told otherwise: the program is smaller.
MANY = 512
#: Over how many patterns mass may be spread, for bounds to be worth their time.
FEW = 8
#: Of all patterns, the share of candidates after which comparing all costs no more.
SHARE = 8
#: How many queries to take turns at a time on a CPU.
QUERIES = 4
#: Above the number of any bound.
COMPARED = 127
#: Of how many numbers a query may keep guesses from step to step.
KEPT = 2**16


@dataclass(frozen=True)
class Certified(Search):
    """Compare a query with few patterns, and prove that the others do not matter.

    Every evaluation bounds D from below for all patterns, by the first of `Geometry.bounds`, which
    is cheap, compares the query with the `num_candidates` of least bound, and so knows how much
    Gibbs mass the others can have at most:

        neglected ≤ Σ_out πᵢ exp(−β boundᵢ) / (Σ_in πᵢ exp(−βDᵢ) + Σ_out πᵢ exp(−β boundᵢ)).

    While that is more than `tol`, patterns that might still matter are bounded more closely
    (by the next of the bounds) and then compared, `num_candidates` at a time in order of their
    bounds, until the proof is there: at worst when all are compared, as they are at once where
    Gaussians' or mixtures' mass is spread over many of the first candidates. So a recall is that of
    `Exhaustive` up to `tol` in every weight; easy queries are cheap, hard ones take as long as they
    need. `Recall.neglected` is the largest bound of all steps. With `max_candidates` the search
    ends there; where `neglected` then is more than `tol`, the status is `UNCERTIFIED`: β is too
    small for few patterns to hold the Gibbs mass, or bounds are too loose. Bounds include their
    rounding; that of the D of the candidates is as in `Exhaustive`. With a geometry that has no
    bounds all patterns are compared.

    **Choosing.** `num_candidates` about the number of patterns that matter to an ordinary query;
    16 is good for most. Derivatives compare as many patterns as the search may: for learning give
    a small `max_candidates`.

    **Raises:** `TypeError` or `ValueError` for counts that are no ints ≥ 1, `max_candidates`
    below `num_candidates`, or a `tol` outside (0, 1). `recall` raises `ValueError` for it with a
    separation other than `LogSumExp`.
    """

    num_candidates: int = 16
    max_candidates: int | None = None
    tol: float = 1e-8

    def __post_init__(self) -> None:
        checks.positive_int("num_candidates", self.num_candidates)
        if self.max_candidates is not None:
            checks.positive_int("max_candidates", self.max_candidates)
            if self.max_candidates < self.num_candidates:
                raise ValueError(
                    f"max_candidates must be ≥ num_candidates = {self.num_candidates}; "
                    f"got {self.max_candidates}"
                )
        if not isinstance(self.tol, int | float) or isinstance(self.tol, bool):
            raise TypeError(f"tol must be a number; got {self.tol!r}")
        if not 0 < self.tol < 1:
            raise ValueError(f"tol must be in (0, 1); got {self.tol}")

    @property
    def tolerance(self) -> float:
        return self.tol

    def query_batch_size(self, memory: Memory) -> int:
        # Bounds of all patterns, a few numbers for each, stay within some tens of megabytes.
        most = by_platform(64, 1024)
        return max(1, min(most, by_platform(2**22, 2**26) // memory.capacity))

    def first_guess(self, memory: Memory) -> Any:
        guess = super().first_guess(memory)
        numbers = sum(leaf.size for leaf in jax.tree.leaves(guess))
        return None if _bounds(memory) and numbers > KEPT else guess

    def settled(self, memory: Memory, guess: Any) -> Any:
        # Only of candidates it is known; where there are others, it has to be found again.
        return guess if _bounds(memory) else super().settled(memory, guess)

    def evaluate(
        self,
        memory: Memory,
        query: AnyMeasure,
        beta: Array,
        guess: Any,
        *,
        separation: Separation,
    ) -> Evaluation:
        if type(separation) is not LogSumExp:
            raise ValueError(f"search={self} needs separation=LogSumExp(); got {separation}")
        if not _bounds(memory):
            return evaluate(Settings(), memory, query, beta, guess)
        found = _evaluate(self, memory, query, beta, guess)[0]
        if not self.falls_back(memory):
            return found
        unproved = ~(found.neglected <= self.tol)
        at_once = memory.geometry.batch_sizes(memory.patterns).queries
        args = (memory, query, beta)
        return masked_cond(unproved, _compare_all, found, guess, args, at_once=at_once)

    def falls_back(self, memory: Memory) -> bool:
        """Whether to compare all at once where it is not soon proved that few will do: where
        a comparison takes no iterations, so that the order of candidates would cost as much."""
        iterated = memory.geometry.first_guess(memory.prepared) is not None
        pays = memory.geometry.bounds_pay and not iterated
        return self.max_candidates is None and pays and memory.layout is None

    def sizes(self, memory: Memory) -> tuple[int, int]:
        """How many patterns to compare at a time, and in how many turns at most."""
        num = memory.capacity
        size = min(num, self.num_candidates)
        most = num if self.max_candidates is None else self.max_candidates
        if self.falls_back(memory):
            most = max(num // SHARE, size)
        return size, most // size if most < num else -(-num // size)


def choose(search: Search | None, memory: Memory, separation: Separation) -> Search:
    """That search, and for None the one that suits the memory."""
    if search is not None:
        return search
    pays = (
        memory.capacity >= MANY
        and memory.layout is None
        and type(separation) is LogSumExp
        and memory.geometry.bounds_pay
        and len(_bounds(memory)) > 1  # else a comparison costs no more than a product
    )
    if not pays:
        return Exhaustive()
    return Certified(tol=1e-12 if memory.dtype == jnp.float64 else 1e-8)


def _compare_all(guess: Any, args: tuple[Memory, AnyMeasure, Array]) -> Evaluation:
    return evaluate(Settings(), *args, guess)


def _bounds(memory: Memory) -> tuple[Bound, ...]:
    return memory.geometry.bounds(Patterns(memory.patterns, memory.prepared))


def _cheapest(memory: Memory, view: AnyView) -> Float[Array, " N"]:
    """The first of the bounds, for all patterns; D itself where the geometry has none."""
    geometry, patterns = memory.geometry, Patterns(memory.patterns, memory.prepared)
    if bounds := _bounds(memory):
        return bounds[0](view, patterns)
    guess = geometry.first_guess(memory.prepared)
    exact: Array = compare(geometry, view, patterns._replace(guess=guess)).divergence
    return exact


class _State(NamedTuple):
    """How far a search has come."""

    lower: Float[Array, " N"]  # lower bounds on D̃ = D − β⁻¹ log π
    bounded: Int[Array, " N"]  # by which of the bounds, from 0; `COMPARED` where lower is D̃ itself
    sums: Sums  # over the candidates
    others: Sums | None  # over the first ones on all devices, of a memory on several
    picked: Int[Array, "turns size"]  # the candidates, −1 where there is none
    turns: Int[Array, ""]
    guess: Any  # to start comparisons from, of all patterns; None for their own


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _evaluate(
    search: Certified, memory: Memory, query: AnyMeasure, beta: Array, guess: Any
) -> tuple[Evaluation, Int[Array, " C"]]:
    """The average over the candidates, with what the others can weigh, and the candidates."""
    view = view_of(memory.geometry, query)
    state = _search(search, memory, view, beta, guess, with_pull=True)
    whole = LogSumExp().merge(state.sums, beta, memory.layout)
    out = psum(_relative_mass(_open(state), whole, beta), memory.layout)
    neglected = jnp.where(out == jnp.inf, 1, out / (1 + out))
    found = LogSumExp().finish(whole, total_prior(memory), beta, view, state.guess)
    return found._replace(neglected=neglected), state.picked.reshape(-1)


def _search(
    search: Certified, memory: Memory, view: AnyView, beta: Array, guess: Any, *, with_pull: bool
) -> _State:
    """Candidates compared until the rest is proved not to matter, or there are enough."""
    num, layout = memory.capacity, memory.layout
    size, turns = search.sizes(memory)
    first = rows_of(memory, jnp.zeros(size, jnp.int32), jnp.ones(size, bool), guess).patterns
    start = _State(
        lower=with_prior(_cheapest(memory, view), memory.log_prior, beta),
        bounded=jnp.zeros(num, jnp.int8),
        sums=LogSumExp().empty(zero_comparison(memory, view, first), with_pull),
        others=None,
        picked=jnp.full((turns, size), -1, jnp.int32),
        turns=jnp.array(0, jnp.int32),
        guess=guess,
    )
    args = (memory, view, beta)
    if layout is not None:  # what all devices know at first is learnt outside of the loop
        start = _compare(search, start, args)
        here = start.sums._replace(pull=None)
        start = start._replace(others=LogSumExp().merge(here, beta, layout))
    unfinished, turn = partial(_unfinished, search), partial(_turn, search)
    state: _State = batched_while_loop(
        unfinished, turn, start, args, at_once=by_platform(QUERIES, 64)
    )
    return state


@partial(_evaluate.defjvp, symbolic_zeros=True)
@full_precision
def _evaluate_jvp(
    search: Certified, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, ...]:
    found, picked = _evaluate(search, *primals)

    def average(memory: Memory, query: AnyMeasure, beta: Array, guess: Any) -> tuple[Any, ...]:
        part = rows_of(memory, picked, picked >= 0, found.guess)
        measures, prepared, guess = part.patterns
        if found.guess is not None:
            guess = memory.geometry.settled(guess)
        few = replace(
            memory,
            patterns=measures,
            log_prior=part.log_prior,
            prepared=prepared,
            fingerprint=None,  # the whole memory's was looked at
        )
        again = evaluate(Settings(), few, query, beta, guess)
        nearest = again.nearest._replace(pattern=found.nearest.pattern)
        again = again._replace(
            nearest=nearest,
            relative=found.relative + again.energy - jax.lax.stop_gradient(again.energy),
            guess=found.guess,
            neglected=found.neglected,
        )
        return again, picked

    return (found, picked), jvp(average, primals, tangents)[1]


def _unfinished(search: Certified, state: _State, args: tuple[Memory, AnyView, Array]) -> Array:
    """Whether what was left out may matter, and there may be more candidates."""
    memory, _, beta = args
    _, most = search.sizes(memory)
    unproved = (_left_out(state, beta) > _goal(search, memory.layout)) & (state.turns < most)
    if search.falls_back(memory):
        unproved &= (state.turns > 1) | (state.sums.mass <= FEW)
    return (state.turns == 0) | unproved


def _turn(search: Certified, state: _State, args: tuple[Memory, AnyView, Array]) -> _State:
    """Bound more closely what may matter, and compare what still may.

    Each bound waits for a turn with candidates of the bound before: the better these, the fewer
    patterns need it."""
    memory, _, beta = args
    goal = _goal(search, memory.layout)
    for number in range(1, len(_bounds(memory))):

        def coarse(state: _State, number: int = number) -> Array:
            matters = _left_out(state, beta, where=state.bounded < number) > goal / 2
            # Bounds are for few patterns that matter, among many that do not.
            return matters & (state.turns >= number) & (state.sums.mass <= FEW)

        def refine(state: _State, number: int = number) -> _State:
            return _refine(number, state, args)

        state = while_loop(coarse, refine, state, args)
    return _compare(search, state, args)


def _goal(search: Certified, layout: Layout | None) -> float:
    """What each device may leave out, so that together it is not more than `tol`."""
    return search.tol / (1 if layout is None else layout.parts)


def _left_out(state: _State, beta: Array, where: Array | None = None) -> Float[Array, ""]:
    """What the rest can weigh at most, relative to the candidates: on this device now, or on all
    at first."""
    lower = _open(state) if where is None else jnp.where(where, state.lower, jnp.inf)
    here = _relative_mass(lower, state.sums, beta)
    if state.others is None:
        return here
    return jnp.minimum(here, _relative_mass(lower, state.others, beta))


def _open(state: _State) -> Float[Array, " N"]:
    """The bounds, ∞ for patterns that were compared."""
    return jnp.where(state.bounded < COMPARED, state.lower, jnp.inf)


def _relative_mass(lower: Array, sums: Sums, beta: Array) -> Float[Array, ""]:
    return mass(lower - sums.lowest, beta).sum() / sums.mass


def _compare(search: Certified, state: _State, args: tuple[Memory, AnyView, Array]) -> _State:
    """One turn: the patterns of least bound are compared."""
    memory, view, beta = args
    size, _ = search.sizes(memory)
    index, on = _least(_open(state), size)
    block = rows_of(memory, index, on, state.guess)
    found = compare(memory.geometry, view, block.patterns)
    exact = with_prior(found.divergence, block.log_prior, beta)
    guess = state.guess
    if guess is not None:
        guess = jax.tree.map(lambda table, row: table.at[index].set(row), guess, found.guess)
    return state._replace(
        lower=state.lower.at[index].set(jnp.where(on, exact, state.lower[index])),
        bounded=state.bounded.at[index].set(jnp.int8(COMPARED)),
        sums=LogSumExp().accumulate(state.sums, found, block, beta),
        picked=state.picked.at[state.turns].set(jnp.where(on, index, -1)),
        turns=state.turns + 1,
        guess=guess,
    )


def _refine(number: int, state: _State, args: tuple[Memory, AnyView, Array]) -> _State:
    """The patterns of least bound get the bound of this number."""
    memory, view, beta = args
    size = min(memory.capacity, REFINED[min(number, len(REFINED)) - 1])
    index, _ = _least(jnp.where(state.bounded < number, state.lower, jnp.inf), size)
    block = rows_of(memory, index, jnp.ones_like(index, bool), state.guess)
    bounds = _bounds(memory)[number](view, block.patterns)
    return state._replace(
        lower=state.lower.at[index].max(with_prior(bounds, block.log_prior, beta)),
        bounded=state.bounded.at[index].max(jnp.int8(number)),
    )


def _least(lower: Float[Array, " N"], size: int) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """The indices of the least entries, and which of them are not ∞."""
    # Selection is fast in single precision only, and order need not be exact.
    shifted = (lower - jnp.where(jnp.isfinite(lower), lower, jnp.inf).min()).astype(jnp.float32)
    _, index = jax.lax.top_k(-shifted, size)
    return index, lower[index] != jnp.inf  # NaN has to be seen


def rows_of(
    memory: Memory, index: Int[Array, " B"], on: Bool[Array, " B"], guess: Any = None
) -> Block:
    """The patterns at some indices, those that are not on switched off by the prior."""
    rows = (memory.patterns, memory.prepared, memory.log_prior, guess)
    patterns, prepared, log_prior, guess = jax.tree.map(lambda leaf: leaf[index], rows)
    prior = relative_prior(memory, log_prior)
    if log_prior is None or prior is None:
        log_prior, prior = jnp.zeros(index.shape, memory.dtype), jnp.ones(index.shape, memory.dtype)
    guess = memory.geometry.first_guess(prepared) if guess is None else guess
    held = Patterns(patterns, prepared, guess)
    first = first_index(memory.capacity, memory.layout)
    log_prior, prior = jnp.where(on, log_prior, -jnp.inf), jnp.where(on, prior, 0)
    return Block(first + index, held, log_prior, prior)


class Bounded(NamedTuple):
    """What a search learns of all patterns, beside their average."""

    nearest: Int[Array, ""]  # the pattern of lowest D̃ = D − β⁻¹ log π
    lowest: Float[Array, ""]  # its D̃
    energy: Float[Array, ""]  # of the candidates: not below that of all patterns
    lower: Float[Array, " N"]  # lower bounds on all D̃, exact where patterns were compared


def bound_all(search: Certified, memory: Memory, query: AnyMeasure, beta: Array) -> Bounded:
    """Lower bounds on all D̃, exact where they matter to exp(−βD̃)."""
    view = view_of(memory.geometry, query)
    state = _search(search, memory, view, beta, None, with_pull=False)
    sums = state.sums
    energy = sums.lowest - jnp.log(sums.mass) / beta
    return Bounded(sums.nearest.pattern, sums.lowest, energy, state.lower)
