"""Search that compares few patterns and proves by lower bounds that the others do not matter."""

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

#: Number of patterns per refinement, by the second bound and by later ones.
REFINED = 256, 64
#: Memories of fewer patterns are searched exhaustively by default: the program is smaller.
MANY = 512
#: Bounds pay only while the mass of the candidates, in units of the heaviest, is at most this.
FEW = 8
#: After a fraction 1/SHARE of the patterns has been compared, comparing all costs no more.
SHARE = 8
#: Number of queries of the work queue that advance together on a CPU.
QUERIES = 4
#: Level of patterns that were compared: above the index of any bound.
COMPARED = 127
#: Largest size of the warm starts that a query stores from step to step, in numbers.
KEPT = 2**16


@dataclass(frozen=True)
class Certified(Search):
    """Comparison with few patterns, and a proof that the others do not matter.

    An evaluation bounds D from below for all patterns, by the first of `Geometry.bounds`, which is
    cheap, and compares the query with the `num_candidates` patterns of least bound. The other
    patterns then have at most the Gibbs mass

        neglected ≤ Σ_out πᵢ exp(−β boundᵢ) / (Σ_in πᵢ exp(−βDᵢ) + Σ_out πᵢ exp(−β boundᵢ)).

    While that is more than `tol`, the patterns that may still matter are bounded more closely, by
    the next of the bounds, and then compared, `num_candidates` at a time in the order of their
    bounds, if necessary until all are compared. Gaussians and mixtures are all compared at once if
    their mass is spread over many of the first candidates. A recall is that of `Exhaustive` up to
    `tol` in every weight; `Recall.neglected` is the largest bound of all steps. Bounds include
    their rounding; the rounding of the divergences is as in `Exhaustive`. With a geometry that has
    no bounds all patterns are compared.

    **Arguments:**

    - `num_candidates`: about the number of patterns that matter to an ordinary query; 16 is good
      for most.
    - `max_candidates`: the number of comparisons after which the search ends; None for no limit. If
      `neglected` is more than `tol` then, because β is too small for few patterns to have the Gibbs
      mass or bounds are too loose, the status is `UNCERTIFIED`. Derivatives compare as many
      patterns as the search may: for learning give a small number.
    - `tol`: the bound on the Gibbs mass of the patterns that are not compared.

    **Raises:** `TypeError` or `ValueError` for counts that are no ints ≥ 1, `max_candidates` below
    `num_candidates`, or a `tol` outside (0, 1). `recall` raises `ValueError` for it with a
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
        # Bounds are a few numbers for each pattern: limit them to some tens of megabytes.
        most = by_platform(64, 1024)
        return max(1, min(most, by_platform(2**22, 2**26) // memory.capacity))

    def first_guess(self, memory: Memory) -> Any:
        guess = super().first_guess(memory)
        numbers = sum(leaf.size for leaf in jax.tree.leaves(guess))
        return None if _bounds(memory) and numbers > KEPT else guess

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
        evaluation = _evaluate(self, memory, query, beta, guess)[0]
        if not self.falls_back(memory):
            return evaluation
        uncertified = ~(evaluation.neglected <= self.tol)
        at_once = memory.geometry.batch_sizes(memory.patterns).queries
        args = (memory, query, beta)
        return masked_cond(uncertified, _compare_all, evaluation, guess, args, at_once=at_once)

    def falls_back(self, memory: Memory) -> bool:
        """Return whether to compare all patterns at once if few do not soon suffice. That pays
        where a comparison takes no iterations: rounds of candidates would then cost as much."""
        iterated = memory.geometry.first_guess(memory.prepared) is not None
        pays = memory.geometry.bounds_pay and not iterated
        return self.max_candidates is None and pays and memory.layout is None

    def sizes(self, memory: Memory) -> tuple[int, int]:
        """Return the number of patterns that a round compares, and of rounds at most."""
        num = memory.capacity
        size = min(num, self.num_candidates)
        most = num if self.max_candidates is None else self.max_candidates
        if self.falls_back(memory):
            most = max(num // SHARE, size)
        return size, most // size if most < num else -(-num // size)


def choose(search: Search | None, memory: Memory, separation: Separation) -> Search:
    """Return `search`, or for None the one that suits the memory."""
    if search is not None:
        return search
    pays = (
        memory.capacity >= MANY
        and memory.layout is None
        and type(separation) is LogSumExp
        and memory.geometry.bounds_pay
        and len(_bounds(memory)) > 1  # otherwise D is one matrix product
    )
    if not pays:
        return Exhaustive()
    return Certified(tol=1e-12 if memory.dtype == jnp.float64 else 1e-8)


def _compare_all(guess: Any, args: tuple[Memory, AnyMeasure, Array]) -> Evaluation:
    return evaluate(Settings(), *args, guess)


def _bounds(memory: Memory) -> tuple[Bound, ...]:
    return memory.geometry.bounds(Patterns(memory.patterns, memory.prepared))


def _cheapest(memory: Memory, view: AnyView) -> Float[Array, " N"]:
    """Return the first of the bounds for all patterns; D itself if the geometry has none."""
    geometry, patterns = memory.geometry, Patterns(memory.patterns, memory.prepared)
    if bounds := _bounds(memory):
        return bounds[0](view, patterns)
    guess = geometry.first_guess(memory.prepared)
    exact: Array = compare(geometry, view, patterns._replace(guess=guess)).divergence
    return exact


class _State(NamedTuple):
    """State of a search."""

    lower: Float[Array, " N"]  # lower bounds on D̃ = D − β⁻¹ log π
    bounded: Int[Array, " N"]  # index of the bound in `lower`; `COMPARED` where it is D̃
    sums: Sums  # over the candidates
    others: Sums | None  # sharded memory: over the first candidates of all devices
    picked: Int[Array, "turns size"]  # the candidates, −1 where there is none
    turns: Int[Array, ""]
    guess: Any  # warm starts for all patterns; None: `Geometry.first_guess`


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _evaluate(
    search: Certified, memory: Memory, query: AnyMeasure, beta: Array, guess: Any
) -> tuple[Evaluation, Int[Array, " C"]]:
    """Return the evaluation over the candidates, with a bound on the mass neglected, and their
    indices."""
    view = view_of(memory.geometry, query)
    state = _search(search, memory, view, beta, guess, with_pull=True)
    total = LogSumExp().merge(state.sums, beta, memory.layout)
    out = psum(_relative_mass(_uncompared(state), total, beta), memory.layout)
    neglected = jnp.where(out == jnp.inf, 1, out / (1 + out))
    evaluation = LogSumExp().finish(total, total_prior(memory), beta, view, state.guess)
    return evaluation._replace(neglected=neglected), state.picked.reshape(-1)


def _search(
    search: Certified, memory: Memory, view: AnyView, beta: Array, guess: Any, *, with_pull: bool
) -> _State:
    """Return the state after rounds of comparisons, until the proof or the limit is reached."""
    num, layout = memory.capacity, memory.layout
    size, rounds = search.sizes(memory)
    first = rows_of(memory, jnp.zeros(size, jnp.int32), jnp.ones(size, bool), guess).patterns
    start = _State(
        lower=with_prior(_cheapest(memory, view), memory.log_prior, beta),
        bounded=jnp.zeros(num, jnp.int8),
        sums=LogSumExp().empty(zero_comparison(memory, view, first), with_pull),
        others=None,
        picked=jnp.full((rounds, size), -1, jnp.int32),
        turns=jnp.array(0, jnp.int32),
        guess=guess,
    )
    args = (memory, view, beta)
    if layout is not None:  # the loop has no communication
        start = _compare(search, start, args)
        sums = start.sums._replace(pull=None)
        start = start._replace(others=LogSumExp().merge(sums, beta, layout))
    cond_fun, body_fun = partial(_cond_fun, search), partial(_body_fun, search)
    state: _State = batched_while_loop(
        cond_fun, body_fun, start, args, at_once=by_platform(QUERIES, 64)
    )
    return state


@partial(_evaluate.defjvp, symbolic_zeros=True)
@full_precision
def _evaluate_jvp(
    search: Certified, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, ...]:
    evaluation, picked = _evaluate(search, *primals)

    def average(memory: Memory, query: AnyMeasure, beta: Array, guess: Any) -> tuple[Any, ...]:
        block = rows_of(memory, picked, picked >= 0, evaluation.guess)
        measures, prepared, guess = block.patterns
        candidates = replace(
            memory,
            patterns=measures,
            log_prior=block.log_prior,
            prepared=prepared,
            fingerprint=None,  # the memory was validated already
        )
        result = evaluate(Settings(), candidates, query, beta, guess)
        nearest = result.nearest._replace(pattern=evaluation.nearest.pattern)
        result = result._replace(
            nearest=nearest,
            relative=evaluation.relative + result.energy - jax.lax.stop_gradient(result.energy),
            guess=evaluation.guess,
            neglected=evaluation.neglected,
        )
        return result, picked

    return (evaluation, picked), jvp(average, primals, tangents)[1]


def _cond_fun(search: Certified, state: _State, args: tuple[Memory, AnyView, Array]) -> Array:
    """Return whether other patterns may matter and more candidates are allowed."""
    memory, _, beta = args
    _, most = search.sizes(memory)
    uncertified = (_neglected(state, beta) > _goal(search, memory.layout)) & (state.turns < most)
    if search.falls_back(memory):
        uncertified &= (state.turns > 1) | (state.sums.mass <= FEW)
    return (state.turns == 0) | uncertified


def _body_fun(search: Certified, state: _State, args: tuple[Memory, AnyView, Array]) -> _State:
    """Refine the bounds of patterns that may matter, then compare those that still may.

    Bound i waits for i rounds of candidates: the better these, the fewer patterns need it.
    """
    memory, _, beta = args
    goal = _goal(search, memory.layout)
    for number in range(1, len(_bounds(memory))):

        def too_coarse(state: _State, number: int = number) -> Array:
            matters = _neglected(state, beta, where=state.bounded < number) > goal / 2
            # If many patterns matter, refining costs more than comparing.
            return matters & (state.turns >= number) & (state.sums.mass <= FEW)

        def refine(state: _State, number: int = number) -> _State:
            return _refine(number, state, args)

        state = while_loop(too_coarse, refine, state, args)
    return _compare(search, state, args)


def _goal(search: Certified, layout: Layout | None) -> float:
    """Return the relative mass that each device may neglect, so that the total is at most `tol`."""
    return search.tol / (1 if layout is None else layout.parts)


def _neglected(state: _State, beta: Array, where: Array | None = None) -> Float[Array, ""]:
    """Return a bound on the mass of the other patterns relative to the candidates: those of this
    device so far, or the first ones of all devices."""
    lower = _uncompared(state) if where is None else jnp.where(where, state.lower, jnp.inf)
    here = _relative_mass(lower, state.sums, beta)
    if state.others is None:
        return here
    return jnp.minimum(here, _relative_mass(lower, state.others, beta))


def _uncompared(state: _State) -> Float[Array, " N"]:
    """Return the bounds, ∞ for patterns that were compared."""
    return jnp.where(state.bounded < COMPARED, state.lower, jnp.inf)


def _relative_mass(lower: Array, sums: Sums, beta: Array) -> Float[Array, ""]:
    return mass(lower - sums.lowest, beta).sum() / sums.mass


def _compare(search: Certified, state: _State, args: tuple[Memory, AnyView, Array]) -> _State:
    """Compare the patterns of least bound."""
    memory, view, beta = args
    size, _ = search.sizes(memory)
    index, on = _least(_uncompared(state), size)
    block = rows_of(memory, index, on, state.guess)
    comparison = compare(memory.geometry, view, block.patterns)
    exact = with_prior(comparison.divergence, block.log_prior, beta)
    guess = state.guess
    if guess is not None:
        guess = jax.tree.map(lambda table, row: table.at[index].set(row), guess, comparison.guess)
    return state._replace(
        lower=state.lower.at[index].set(jnp.where(on, exact, state.lower[index])),
        bounded=state.bounded.at[index].set(jnp.int8(COMPARED)),
        sums=LogSumExp().accumulate(state.sums, comparison, block, beta),
        picked=state.picked.at[state.turns].set(jnp.where(on, index, -1)),
        turns=state.turns + 1,
        guess=guess,
    )


def _refine(number: int, state: _State, args: tuple[Memory, AnyView, Array]) -> _State:
    """Compute the bound of this number for the patterns of least bound."""
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
    """Return the indices of the least entries, and a mask of those that are not ∞."""
    # `top_k` is fast in single precision only, and the order need not be exact.
    shifted = (lower - jnp.where(jnp.isfinite(lower), lower, jnp.inf).min()).astype(jnp.float32)
    _, index = jax.lax.top_k(-shifted, size)
    return index, lower[index] != jnp.inf  # NaN must reach the result


def rows_of(
    memory: Memory, index: Int[Array, " B"], on: Bool[Array, " B"], guess: Any = None
) -> Block:
    """Return the patterns at `index` as a block; where `on` is false the prior is 0."""
    rows = (memory.patterns, memory.prepared, memory.log_prior, guess)
    patterns, prepared, log_prior, guess = jax.tree.map(lambda leaf: leaf[index], rows)
    prior = relative_prior(memory, log_prior)
    if log_prior is None or prior is None:
        log_prior, prior = jnp.zeros(index.shape, memory.dtype), jnp.ones(index.shape, memory.dtype)
    guess = memory.geometry.first_guess(prepared) if guess is None else guess
    selected = Patterns(patterns, prepared, guess)
    first = first_index(memory.capacity, memory.layout)
    log_prior, prior = jnp.where(on, log_prior, -jnp.inf), jnp.where(on, prior, 0)
    return Block(first + index, selected, log_prior, prior)


class Bounded(NamedTuple):
    """Result of `bound_all`."""

    nearest: Int[Array, ""]  # the pattern of lowest D̃ = D − β⁻¹ log π
    lowest: Float[Array, ""]  # its D̃
    energy: Float[Array, ""]  # of the candidates alone: an upper bound
    lower: Float[Array, " N"]  # lower bounds on all D̃, exact where patterns were compared
    compared: Bool[Array, " N"]


def bound_all(search: Certified, memory: Memory, query: AnyMeasure, beta: Array) -> Bounded:
    """Return lower bounds on all D̃, exact for the patterns that matter to exp(−βD̃)."""
    state = _search(search, memory, view_of(memory.geometry, query), beta, None, with_pull=False)
    sums = state.sums
    energy = sums.lowest - jnp.log(sums.mass) / beta
    compared = state.bounded == COMPARED
    return Bounded(sums.nearest.pattern, sums.lowest, energy, state.lower, compared)
