"""Search that compares few patterns and proves by lower bounds that the others do not matter."""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, PyTree

from jdam._core import checks
from jdam._core.batching import by_platform, masked_cond
from jdam._core.derivatives import full_precision, jvp
from jdam._core.loops import stacked, zeros_of
from jdam._core.mesh import psum
from jdam._energy.average import Settings, compare, evaluate, total_prior, view_of
from jdam._energy.branch_and_bound import (
    Explored,
    Goal,
    bounds_of,
    branch_and_bound,
    num_units,
    rows_of,
)
from jdam._energy.evaluation import Block, Evaluation
from jdam._energy.search import Exhaustive, Search
from jdam._energy.separation import LogSumExp, Separation, Sums, with_prior
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory
from jdam.geometry.protocol import AnyView, Comparison

#: Memories of fewer patterns are searched exhaustively by default: the program is smaller.
MANY = 512
#: Bounds pay only while the mass of the candidates, in units of the heaviest, is at most this.
FEW = 8
#: After a fraction 1/SHARE of the patterns has been compared, all are compared at once. With 8 in
#: place of 2, queries to 2000 Gaussians and to 3000 words took up to twenty times as long; queries
#: for which all patterns have to be compared took three quarters of the time.
SHARE = 2
#: Comparing all patterns is tried after so many comparisons at most.
MOST = 2**18
#: Largest size of the warm starts that a query stores from step to step, in numbers.
KEPT = 2**16


@dataclass(frozen=True)
class Certified(Search):
    """Comparison with few patterns, and a proof that the others do not matter.

    An evaluation bounds D from below for all patterns, by the first of `Geometry.bounds`, which is
    cheap, or for the cells of a memory that has some (`Memory.indexed`). It compares the query with
    the `num_candidates` patterns of least bound. The others then have at most the Gibbs mass

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
        # Bounds are a few numbers for each unit: limit them to some tens of megabytes.
        most, units = by_platform(64, 1024), num_units(memory)
        return max(1, min(most, by_platform(2**23, 2**27) // units))

    def first_guess(self, memory: Memory) -> PyTree:
        guess = super().first_guess(memory)
        numbers = sum(leaf.size for leaf in jax.tree.leaves(guess))
        return None if bounds_of(memory) and numbers > KEPT else guess

    def evaluate(
        self,
        memory: Memory,
        query: AnyMeasure,
        beta: Array,
        guess: PyTree,
        *,
        separation: Separation,
    ) -> Evaluation:
        if type(separation) is not LogSumExp:
            raise ValueError(f"search={self} needs separation=LogSumExp(); got {separation}")
        if not bounds_of(memory):
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
            most = max(min(num // SHARE, MOST), size)
        return size, most // size if most < num else -(-num // size)


def choose(search: Search | None, memory: Memory, separation: Separation) -> Search:
    """Return `search`, checked, or for None the one that suits the memory."""
    if search is not None:
        if not isinstance(search, Search):
            raise TypeError(f"search must be one of jdam's, as jdam.Exhaustive(); got {search!r}")
        return search
    pays = (
        memory.capacity >= MANY
        and memory.layout is None
        and memory.geometry.bounds_pay
        and len(bounds_of(memory)) > 1  # otherwise D is one matrix product
    )
    if type(separation) is not LogSumExp or not (pays or memory.cells is not None):
        return Exhaustive()
    return Certified(tol=1e-12 if memory.dtype == jnp.float64 else 1e-8)


def _compare_all(guess: PyTree, args: tuple[Memory, AnyMeasure, Array]) -> Evaluation:
    return evaluate(Settings(), *args, guess)


class Mass(Goal):
    """The log-sum-exp sums over the patterns compared, up to the Gibbs mass `tol`."""

    beta: Float[Array, ""]
    total_prior: tuple[Array, Array]  # log max πᵢ and Σ πᵢ / max π, over all patterns
    tol: float = eqx.field(static=True)
    with_pull: bool = eqx.field(static=True)
    may_give_up: bool = eqx.field(static=True)
    #: Sharded memory: the sums over the first candidates of all devices.
    others: Sums | None = None

    def sums(self, comparison: Comparison, block: Block) -> Sums:
        """Return the sums over a block of patterns."""
        top, _ = self.total_prior
        return LogSumExp().sums(comparison, block, self.beta, top, self.with_pull)

    def start(self, memory: Memory, view: AnyView, block: Block) -> Sums:
        comparison = zeros_of(compare, memory.geometry, view, block.patterns)
        zero: Sums = zeros_of(self.sums, comparison, block)
        return zero

    def add(self, result: Sums, comparison: Comparison, block: Block) -> Sums:
        return LogSumExp().total(stacked(result, self.sums(comparison, block)), self.beta)

    def shifted(self, bounds: Array, log_prior: Array | None) -> Array:
        return with_prior(bounds, log_prior, self.beta)

    def least(self, bounds: Array) -> Array:
        """Return −β⁻¹ log Σ exp(−β bound), a bound that stands for the mass of all."""
        lowest = jnp.minimum(bounds.min(-1), jnp.finfo(bounds.dtype).max)  # ∞ − ∞ is NaN
        total = jnp.exp(-self.beta * (bounds - lowest[..., None])).sum(-1)
        bound: Array = lowest - jnp.log(total) / self.beta
        return bound

    def matters(self, bound: Array, result: Sums, share: ArrayLike) -> Bool[Array, ""]:
        matters: Array = self.relative_mass(bound, result) > self.tol * share
        return matters

    def relative_mass(self, bound: Array, result: Sums) -> Float[Array, ""]:
        """Return the mass of patterns of this bound relative to that of the patterns compared, by
        this device or first by all devices."""
        here = jnp.exp(-self.beta * (bound - result.lowest)) / result.mass
        if self.others is None:
            return here
        there = jnp.exp(-self.beta * (bound - self.others.lowest)) / self.others.mass
        return jnp.minimum(here, there)

    def refines(self, result: Sums) -> Bool[Array, ""]:
        # If many patterns matter, refining bounds costs more than comparing.
        return result.mass <= FEW

    def gives_up(self, result: Sums, rounds: Int[Array, ""]) -> Bool[Array, ""] | bool:
        return self.may_give_up and (rounds == 1) & (result.mass > FEW)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _evaluate(
    certified: Certified, memory: Memory, query: AnyMeasure, beta: Array, guess: PyTree
) -> tuple[Evaluation, Int[Array, " C"]]:
    """Return the evaluation over the candidates, with a bound on the mass neglected, and their
    indices."""
    view = view_of(memory.geometry, query)
    goal, state = _search(certified, memory, query, view, beta, guess=guess)
    total = LogSumExp().over_shards(state.result, beta, memory.layout)
    here = replace(goal, others=None).relative_mass(goal.least(state.left), total)
    out = psum(here, memory.layout)
    neglected = jnp.where(out == jnp.inf, 1, out / (1 + out))
    if memory.cells is not None:
        neglected = jnp.where(jnp.isnan(memory.cells.radii).any(), jnp.nan, neglected)
    evaluation = LogSumExp().finish(total, goal.total_prior, beta, view, state.guess)
    return evaluation._replace(neglected=neglected), state.picked.reshape(-1)


def _search(
    certified: Certified,
    memory: Memory,
    query: AnyMeasure,
    view: AnyView,
    beta: Array,
    *,
    guess: PyTree = None,
    with_pull: bool = True,
) -> tuple[Mass, Explored]:
    """Return the goal, and the state when it is proved or its limit is reached."""
    layout, (size, rounds) = memory.layout, certified.sizes(memory)
    parts = 1 if layout is None else layout.parts  # each device may neglect an equal part
    # With cells it takes more than many candidates to make comparing all patterns worth while.
    gives_up = certified.falls_back(memory) and memory.cells is None

    def explore(goal: Mass, rounds: int) -> Explored:
        return branch_and_bound(goal, memory, query, view, guess, size=size, rounds=rounds)

    goal = Mass(beta, total_prior(memory), certified.tol / parts, with_pull, gives_up)
    if layout is not None:  # the search has no communication
        first = explore(goal, 1).result
        sums = LogSumExp().over_shards(first._replace(pull=None), beta, layout)
        goal = replace(goal, others=sums)
    return goal, explore(goal, rounds)


@partial(_evaluate.defjvp, symbolic_zeros=True)
@full_precision
def _evaluate_jvp(
    certified: Certified, primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> tuple[PyTree, ...]:
    evaluation, picked = _evaluate(certified, *primals)

    def average(
        memory: Memory, query: AnyMeasure, beta: Array, guess: PyTree
    ) -> tuple[PyTree, ...]:
        block = rows_of(memory, picked, picked >= 0, evaluation.guess)
        measures, prepared, guess = block.patterns
        candidates = replace(
            memory,
            patterns=measures,
            log_prior=block.log_prior,
            prepared=prepared,
            fingerprint=None,  # the memory was validated already
            cells=None,
        )
        result = evaluate(Settings(), candidates, query, beta, guess)
        nearest = result.nearest._replace(pattern=evaluation.nearest.pattern)
        change = result.energy - jax.lax.stop_gradient(result.energy)  # 0, with a derivative
        result = result._replace(
            nearest=nearest,
            shifted_energy=evaluation.shifted_energy + change,
            guess=evaluation.guess,
            neglected=evaluation.neglected,
        )
        return result, picked

    return (evaluation, picked), jvp(average, primals, tangents)[1]


class Bounded(NamedTuple):
    """Result of `bound_all`."""

    nearest: Int[Array, ""]  # the pattern of lowest D̃ = D − β⁻¹ log π
    energy: Float[Array, ""]  # of the candidates alone: an upper bound
    lower: Float[Array, " N"]  # lower bounds on all D̃, exact where patterns were compared
    compared: Bool[Array, " N"]


def bound_all(certified: Certified, memory: Memory, query: AnyMeasure, beta: Array) -> Bounded:
    """Return lower bounds on all D̃, exact for the patterns that matter to exp(−βD̃)."""
    memory = replace(memory, cells=None)
    view = view_of(memory.geometry, query)
    _, state = _search(certified, memory, query, view, beta, with_pull=False)
    sums = state.result
    energy = sums.lowest - jnp.log(sums.mass) / beta
    return Bounded(sums.nearest.pattern, energy, state.bounds, state.compared)
