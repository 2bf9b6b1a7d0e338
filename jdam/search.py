"""Which patterns a step looks at, and what is proved of those it does not."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdam import _checks
from jdam._average import (
    Block,
    GibbsAverage,
    Running,
    absorb,
    conclude,
    gibbs_average,
    merge,
    nothing_yet,
)
from jdam._batching import advance_where
from jdam._derivatives import full_precision, jvp
from jdam._layout import Layout, first_index, total
from jdam._loops import while_loop
from jdam.geometry.protocol import AnyMeasure, AnyView
from jdam.memory import Memory
from jdam.separation import LogSumExp, Separation, levels, mass

#: How many patterns to bound more closely at a time, by level, and at all levels beyond.
SHARPENED = 256, 64
#: A level above all.
COMPARED = 127


class Search(ABC):
    """How a step of recall finds the patterns that matter."""

    @property
    @abstractmethod
    def tolerance(self) -> float:
        """How much Gibbs mass may be left out without a word."""

    @abstractmethod
    def queries_at_once(self, memory: Memory) -> int:
        """How many queries of a batch look at the same time."""

    @abstractmethod
    def look(
        self,
        memory: Memory,
        query: AnyMeasure,
        beta: Float[Array, ""],
        guess: Any = None,
        *,
        separation: Separation,
    ) -> tuple[GibbsAverage, Float[Array, ""]]:
        """The Gibbs average at the query, and a bound on the Gibbs mass left out of it.

        `guess` is that of an earlier look from nearby."""


@dataclass(frozen=True)
class Exhaustive(Search):
    """Look at every pattern, `block_size` of them at a time.

    Beside its arguments a recall then needs memory for queries × block_size comparisons.
    `None` leaves the choice to the geometry: 2048 vectors or diagonal Gaussians, 2¹⁶/(d·r)
    Gaussians with factors d×r.

    **Raises:** `TypeError` or `ValueError` if `block_size` is neither None nor an int ≥ 1.
    """

    block_size: int | None = None

    def __post_init__(self):
        if self.block_size is not None:
            _checks.positive_int("block_size", self.block_size)

    @property
    def tolerance(self):
        return 0.0

    def queries_at_once(self, memory):
        return memory.geometry.tile(memory.patterns)[0]

    def look(self, memory, query, beta, guess=None, *, separation):
        found = gibbs_average(
            memory,
            query,
            beta,
            separation=separation,
            block_size=self.block_size,
            guess=guess,
        )
        return found, jnp.zeros_like(beta)


@dataclass(frozen=True)
class Certified(Search):
    """Compare a query with few patterns, and prove that the others do not matter.

    Every look bounds D from below for all patterns, which is cheap (`Geometry.bound`), compares
    the query with the `num_candidates` of least bound, and so knows how much Gibbs mass the
    others can have at most:

        neglected ≤ Σ_out πᵢ exp(−β boundᵢ) / (Σ_in πᵢ exp(−βDᵢ) + Σ_out πᵢ exp(−β boundᵢ)).

    While that is more than `tol`, patterns that might still matter are bounded more closely
    (`Geometry.sharpen`) and then compared, `num_candidates` at a time in order of their bounds,
    at most `max_candidates` in all: 32 times `num_candidates` unless given. Easy queries are
    cheap, hard ones take as long as they need. `Recall.neglected` is the largest bound of all
    steps; where it is more than `tol`, the status is `UNCERTIFIED`: β is too small for few
    patterns to hold the Gibbs mass, or bounds are too loose. Otherwise a recall is that of
    `Exhaustive` up to `tol` in every weight. Bounds include their rounding; that of the D of the
    candidates is as in `Exhaustive`.

    **Choosing.** `num_candidates` about the number of patterns that matter to an ordinary query;
    16 is good for most. Time grows with it, and derivatives compare `max_candidates` patterns in
    any case, so that for learning it should be small.

    **Raises:** `TypeError` or `ValueError` for counts that are no ints ≥ 1, `max_candidates`
    below `num_candidates`, or a `tol` outside (0, 1). `recall` raises `ValueError` for it with a
    separation other than `LogSumExp`.
    """

    num_candidates: int = 16
    max_candidates: int | None = None
    tol: float = 1e-8

    def __post_init__(self):
        _checks.positive_int("num_candidates", self.num_candidates)
        if self.max_candidates is not None:
            _checks.positive_int("max_candidates", self.max_candidates)
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
    def tolerance(self):
        return self.tol

    def queries_at_once(self, memory):
        # Bounds of all patterns, a few numbers for each, stay within some tens of megabytes.
        most = 64 if jax.default_backend() == "cpu" else 1024
        return max(1, min(most, 2**22 // len(memory)))

    def look(self, memory, query, beta, guess=None, *, separation):
        if type(separation) is not LogSumExp:
            raise ValueError(f"search={self} needs separation=LogSumExp(); got {separation}")
        found, neglected, _ = _look(self, memory, query, beta)
        return found, neglected

    def sizes(self, num: int) -> tuple[int, int]:
        """How many of N patterns to compare at a time, and in how many turns at most."""
        size = min(num, self.num_candidates)
        most = 32 * size if self.max_candidates is None else self.max_candidates
        return size, most // size if most < num else -(-num // size)


class _Hunt(NamedTuple):
    """How far a search has come."""

    floor: Float[Array, " N"]  # lower bounds on levels D − log π/β
    level: Int[Array, " N"]  # of the bounds; `COMPARED` where they are the levels themselves
    running: Running  # over the candidates
    others: Running | None  # over the first ones on all devices, of a memory on several
    picked: Int[Array, "turns size"]  # the candidates, −1 where there is none
    turns: Int[Array, ""]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _look(
    search: Certified, memory: Memory, query: AnyMeasure, beta: Array
) -> tuple[GibbsAverage, Float[Array, ""], Int[Array, " C"]]:
    """The average over the candidates, what the others can weigh, and the candidates."""
    view, hunt = _hunt(search, memory, query, beta)
    whole = merge(hunt.running, beta, memory.layout)
    out = total(_relative_mass(_open(hunt), whole, beta), memory.layout)
    neglected = jnp.where(out == jnp.inf, 1, out / (1 + out))
    return conclude(view, whole, beta, None), neglected, hunt.picked.reshape(-1)


def _hunt(
    search: Certified, memory: Memory, query: AnyMeasure, beta: Array
) -> tuple[AnyView, _Hunt]:
    """Candidates compared until the rest is proved not to matter, or there are enough."""
    geometry, num = memory.geometry, len(memory)
    size, turns = search.sizes(num)
    view = geometry.view(query)
    bounds = geometry.bound(view, memory.patterns, memory.prepared)
    start = _Hunt(
        floor=levels(bounds, memory.log_prior, beta),
        level=jnp.zeros(num, jnp.int8),
        running=nothing_yet(memory, view),
        others=None,
        picked=jnp.full((turns, size), -1, jnp.int32),
        turns=jnp.array(0, jnp.int32),
    )
    args, layout = (memory, view, beta), memory.layout
    first = _compare(search, start, args)
    if layout is not None:
        first = first._replace(others=merge(first.running._replace(pull=None), beta, layout))
    at_once = 1 if jax.default_backend() == "cpu" else 64
    again = _left_out(first, beta) > _goal(search, layout)
    return view, advance_where(partial(_go_on, search), at_once, again, first, args)


@partial(_look.defjvp, symbolic_zeros=True)
@full_precision
def _look_jvp(search: Certified, primals: tuple, tangents: tuple) -> Any:
    found, neglected, picked = _look(search, *primals)

    def average(memory: Memory, query: AnyMeasure, beta: Array) -> tuple:
        part = _take(memory, picked, picked >= 0)
        candidates = replace(
            memory, patterns=part.patterns, log_prior=part.log_prior, prepared=part.prepared
        )
        found = gibbs_average(candidates, query, beta)._replace(guess=None)
        return found, neglected, picked

    return (found, neglected, picked), jvp(average, primals, tangents)[1]


def _go_on(search: Certified, hunt: _Hunt, args: tuple[Memory, AnyView, Array]) -> _Hunt:
    """Bound more closely what may matter, and compare what still may, to the end.

    Each level waits for a turn with candidates of the level before: the better these, the fewer
    patterns need it."""
    memory, _, beta = args
    _, most = search.sizes(len(memory))
    goal = _goal(search, memory.layout)

    def turn(hunt: _Hunt) -> _Hunt:
        for level in range(1, memory.geometry.sharpenings(memory.patterns) + 1):

            def blunt(hunt: _Hunt, level: int = level) -> Array:
                matters = _left_out(hunt, beta, where=hunt.level < level) > goal / 2
                return matters & (hunt.turns >= level)

            def sharpen(hunt: _Hunt, level: int = level) -> _Hunt:
                return _sharpen(search, level, hunt, args)

            hunt = while_loop(blunt, sharpen, hunt, args)
        return _compare(search, hunt, args)

    def unproved(hunt: _Hunt) -> Array:
        return (_left_out(hunt, beta) > goal) & (hunt.turns < most)

    return while_loop(unproved, turn, hunt, args)


def _goal(search: Certified, layout: Layout | None) -> float:
    """What each device may leave out, so that together it is not more than `tol`."""
    return search.tol / (1 if layout is None else layout.parts)


def _left_out(hunt: _Hunt, beta: Array, where: Array | None = None) -> Float[Array, ""]:
    """What the rest can weigh at most, relative to the candidates: on this device now, or on all
    at first."""
    floor = _open(hunt) if where is None else jnp.where(where, hunt.floor, jnp.inf)
    here = _relative_mass(floor, hunt.running, beta)
    if hunt.others is None:
        return here
    return jnp.minimum(here, _relative_mass(floor, hunt.others, beta))


def _open(hunt: _Hunt) -> Float[Array, " N"]:
    """The bounds, ∞ for patterns that were compared."""
    return jnp.where(hunt.level < COMPARED, hunt.floor, jnp.inf)


def _relative_mass(floor: Array, running: Running, beta: Array) -> Float[Array, ""]:
    return mass(floor - running.lowest, beta).sum() / running.mass


def _compare(search: Certified, hunt: _Hunt, args: tuple[Memory, AnyView, Array]) -> _Hunt:
    """One turn: the patterns of least bound are compared."""
    memory, view, beta = args
    size, _ = search.sizes(len(memory))
    index, on = _least(_open(hunt), size)
    block = _take(memory, index, on)
    found = memory.geometry.compare(view, block.patterns, block.prepared, block.guess, True)
    exact = levels(found.divergence, block.log_prior, beta)
    return hunt._replace(
        floor=hunt.floor.at[index].set(jnp.where(on, exact, hunt.floor[index])),
        level=hunt.level.at[index].set(jnp.int8(COMPARED)),
        running=absorb(hunt.running, found, block, beta),
        picked=hunt.picked.at[hunt.turns].set(jnp.where(on, index, -1)),
        turns=hunt.turns + 1,
    )


def _sharpen(
    search: Certified, level: int, hunt: _Hunt, args: tuple[Memory, AnyView, Array]
) -> _Hunt:
    """The patterns of least bound below a level are bounded at that level."""
    memory, view, beta = args
    size = min(len(memory), SHARPENED[min(level, len(SHARPENED)) - 1])
    index, _ = _least(jnp.where(hunt.level < level, hunt.floor, jnp.inf), size)
    block = _take(memory, index, jnp.ones_like(index, bool))
    bounds = memory.geometry.sharpen(view, block.patterns, block.prepared, level)
    return hunt._replace(
        floor=hunt.floor.at[index].max(levels(bounds, block.log_prior, beta)),
        level=hunt.level.at[index].max(jnp.int8(level)),
    )


def _least(floor: Float[Array, " N"], size: int) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """The indices of the least entries, and which of them are finite."""
    # Selection is fast in single precision only, and order need not be exact.
    shifted = (floor - jnp.where(jnp.isfinite(floor), floor, jnp.inf).min()).astype(jnp.float32)
    _, index = jax.lax.top_k(-shifted, size)
    return index, floor[index] < jnp.inf


def _take(memory: Memory, index: Int[Array, " B"], on: Bool[Array, " B"]) -> Block:
    """The patterns at some indices, those that are not on switched off by the prior."""
    rows = (memory.patterns, memory.prepared, memory.log_prior)
    patterns, prepared, prior = jax.tree.map(lambda leaf: leaf[index], rows)
    prior = jnp.zeros(index.shape, memory.dtype) if prior is None else prior
    guess = memory.geometry.first_guess(prepared)
    first = first_index(len(memory), memory.layout)
    return Block(first + index, patterns, jnp.where(on, prior, -jnp.inf), prepared, guess)


class Explored(NamedTuple):
    """What a search learns of all patterns, beside their average."""

    nearest: Int[Array, ""]  # the pattern of lowest level
    level: Float[Array, ""]  # its level, D − log π/β
    energy: Float[Array, ""]  # of the candidates: not below that of all patterns
    floor: Float[Array, " N"]  # lower bounds on the levels, exact where patterns were compared


def explore(search: Certified, memory: Memory, query: AnyMeasure, beta: Array) -> Explored:
    """Lower bounds on all levels, exact where they matter to exp(−β·level)."""
    _, hunt = _hunt(search, memory, query, beta)
    running = hunt.running
    energy = running.lowest - jnp.log(running.mass) / beta
    return Explored(running.nearest, running.lowest, energy, hunt.floor)
