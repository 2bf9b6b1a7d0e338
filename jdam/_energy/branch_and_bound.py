"""Branch and bound: patterns are compared in the order of lower bounds on D, until the bounds prove
that the others do not matter.

A `Goal` says what is computed of the patterns and which of them may be left out: `Certified` leaves
out patterns without Gibbs mass, `nearest` those that are farther than the k nearest. The memory is
searched in windows. A window has the 256 patterns of least bound; if the memory has cells
(`Memory.indexed`), it has the patterns of the cells of least bound. In a window bounds are refined
where they are too coarse, and patterns are compared in the order of their bounds.
"""

from abc import abstractmethod
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, PyTree

from jdam._core.batching import batched_while_loop, by_platform
from jdam._core.loops import while_loop
from jdam._core.mesh import first_index
from jdam._energy.average import compare
from jdam._energy.evaluation import Block
from jdam._measures.base import AnyMeasure
from jdam._measures.batches import as_row
from jdam._memory.memory import Memory
from jdam.geometry.protocol import AnyView, Bound, Comparison, Patterns

#: Patterns in a window, and patterns whose third and later bounds are computed at a time.
WINDOW, REFINED = 256, 64
#: Patterns in a window of a memory with cells, about: their first bounds are cheap.
OPENED = 8192
#: Queries that are searched at the same time, on a CPU and on an accelerator.
QUERIES = 1, 64
#: The number of the bound of patterns that were compared: above that of any bound.
COMPARED = 127


class Goal(eqx.Module):
    """The result of a search over the patterns it compares, and the test of which others it may
    leave out."""

    @abstractmethod
    def start(self, memory: Memory, view: AnyView, block: Block) -> PyTree:
        """Return the result for no patterns; `block` has the shapes of that of a round."""

    @abstractmethod
    def add(self, result: PyTree, comparison: Comparison, block: Block) -> PyTree:
        """Return the result with a block of patterns added."""

    @abstractmethod
    def shifted(self, bounds: Array, log_prior: Array | None) -> Array:
        """Return the bounds with the prior; ∞ for patterns of prior 0."""

    @abstractmethod
    def least(self, bounds: Array) -> Array:
        """Return one bound for all patterns along the last axis."""

    @abstractmethod
    def matters(self, bound: Array, result: PyTree, share: ArrayLike) -> Bool[Array, ""]:
        """Return whether patterns of this `least` bound may contribute more than the fraction
        `share` of the error that the search may make."""

    def refines(self, result: PyTree) -> Bool[Array, ""] | bool:
        """Return whether closer bounds may pay."""
        return True

    def gives_up(self, result: PyTree, rounds: Int[Array, ""]) -> Bool[Array, ""] | bool:
        """Return whether to end the search without proof."""
        return False


class Explored(NamedTuple):
    """State of a search. Its units are patterns, or cells if the memory has some."""

    bounds: Float[Array, " U"]  # of patterns that were not compared; D̃ of those that were
    opened: Bool[Array, " U"]  # whether the unit was in a window
    compared: Bool[Array, " U"]  # whether the unit is a pattern that was compared
    rest: Float[Array, ""]  # `Goal.least` of the units that were not opened
    result: PyTree  # of the patterns compared
    picked: Int[Array, "rounds size"]  # these patterns; −1 where there is none
    rounds: Int[Array, ""]
    windows: Int[Array, ""]
    guess: PyTree  # warm starts for all patterns; None: `Geometry.first_guess`

    @property
    def left(self) -> Float[Array, " U"]:
        """The bounds, ∞ for patterns that were compared."""
        return jnp.where(self.compared, jnp.inf, self.bounds)


class _Window(NamedTuple):
    """Patterns of units that were opened together."""

    units: Int[Array, " K"]  # out of range where there is none
    pattern: Int[Array, " W"]
    bounds: Float[Array, " W"]  # ∞ where there is no pattern
    number: Int[Array, " W"]  # of the bound; COMPARED where it is D̃

    @property
    def left(self) -> Float[Array, " W"]:
        """The bounds, ∞ for patterns that were compared."""
        return jnp.where(self.number == COMPARED, jnp.inf, self.bounds)


def bounds_of(memory: Memory) -> tuple[Bound, ...]:
    """Return the lower bounds of the memory's geometry."""
    return memory.geometry.bounds(Patterns(memory.patterns, memory.prepared))


def num_units(memory: Memory) -> int:
    """Return the number of cells, or of patterns if there are no cells."""
    return memory.capacity if memory.cells is None else len(memory.cells.members)


def branch_and_bound(
    goal: Goal,
    memory: Memory,
    query: AnyMeasure,
    view: AnyView,
    guess: PyTree,
    *,
    size: int,
    rounds: int,
) -> Explored:
    """Compare `size` patterns in each round, until the goal is proved or the rounds are over."""
    bounds = _first_bounds(goal, memory, query, view)
    nothing = jnp.zeros(bounds.shape, bool)
    some = rows_of(memory, jnp.zeros(size, jnp.int32), jnp.ones(size, bool), guess)
    start = Explored(
        bounds=bounds,
        opened=nothing,
        compared=nothing,
        rest=goal.least(bounds),
        result=goal.start(memory, view, some),
        picked=jnp.full((rounds, size), -1, jnp.int32),
        rounds=jnp.array(0, jnp.int32),
        windows=jnp.array(0, jnp.int32),
        guess=guess,
    )
    state: Explored = batched_while_loop(
        partial(_cond_fun, rounds),
        partial(_body_fun, size, rounds),
        start,
        (goal, memory, view),
        at_once=by_platform(*QUERIES),
    )
    return state


def _first_bounds(
    goal: Goal, memory: Memory, query: AnyMeasure, view: AnyView
) -> Float[Array, " U"]:
    """Return the first bound for all patterns, or bounds for all cells."""
    if memory.cells is None:
        first = bounds_of(memory)[0](view, Patterns(memory.patterns, memory.prepared))
        return goal.shifted(first, memory.log_prior)
    embedding = memory.geometry.embed(as_row(query))
    assert embedding is not None  # there are no cells without
    prior = memory.cells.log_prior(memory.log_prior)
    return goal.shifted(memory.cells.lower_bounds(embedding), prior)


def _cond_fun(rounds: int, state: Explored, args: tuple[Goal, Memory, AnyView]) -> Array:
    """Return whether units that were not opened may matter, and more rounds are allowed."""
    goal, *_ = args
    return (state.rounds == 0) | _goes_on(goal, state.rest, state, 0.5, rounds)


def _goes_on(goal: Goal, bound: Array, state: Explored, share: ArrayLike, rounds: int) -> Array:
    ends = jnp.asarray(goal.gives_up(state.result, state.rounds)) | (state.rounds >= rounds)
    return goal.matters(bound, state.result, share) & ~ends


def _body_fun(
    size: int, rounds: int, state: Explored, args: tuple[Goal, Memory, AnyView]
) -> Explored:
    """Open the next window, and compare its patterns until the others of it do not matter."""
    goal, memory, _ = args
    # What is left in all windows together is allowed one half of the error.
    share = 0.5 ** (state.windows + 2).astype(state.bounds.dtype)

    def cond_fun(carry: tuple[_Window, Explored]) -> Array:
        window, state = carry
        goes_on = _goes_on(goal, goal.least(window.left), state, share, rounds)
        return (state.rounds == 0) | goes_on

    def body_fun(carry: tuple[_Window, Explored]) -> tuple[_Window, Explored]:
        window, state = carry
        for number in range(1, len(bounds_of(memory))):
            window = _refined(number, window, state, share, args)
        return _compare(size, window, state, args)

    window, opened = _open(size, state, args)
    window, state = while_loop(cond_fun, body_fun, (window, opened), args)
    bounds, compared = window.bounds, window.number == COMPARED
    if memory.cells is not None:
        bounds = goal.least(window.left.reshape(len(window.units), -1))
        compared = jnp.zeros(bounds.shape, bool)

    def put(leaf: Array, rows: Array) -> Array:
        return leaf.at[window.units].set(rows, mode="drop")

    return state._replace(bounds=put(state.bounds, bounds), compared=put(state.compared, compared))


def _open(
    size: int, state: Explored, args: tuple[Goal, Memory, AnyView]
) -> tuple[_Window, Explored]:
    """Return the patterns of the units of least bound, and the state after these are opened."""
    goal, memory, view = args
    closed = jnp.where(state.opened, jnp.inf, state.bounds)
    num, cells = len(closed), memory.cells
    width = max(WINDOW, size) if cells is None else -(-max(OPENED, size) // cells.members.shape[1])
    width = min(num, width)
    units, on = least(closed, width)
    if cells is None:
        index, bounds = units, closed[units]
    else:
        index = jnp.where(on[:, None], cells.members[units], -1).reshape(-1)
        block = rows_of(memory, jnp.maximum(index, 0), index >= 0, state.guess)
        bounds = goal.shifted(bounds_of(memory)[0](view, block.patterns), block.log_prior)
        index = jnp.maximum(index, 0)
    units = jnp.where(on, units, num)
    window = _Window(units, index, bounds, jnp.zeros(index.shape, jnp.int8))
    state = state._replace(
        opened=state.opened.at[units].set(True, mode="drop"),
        rest=goal.least(closed.at[units].set(jnp.inf, mode="drop")),
        windows=state.windows + 1,
    )
    return window, state


def _refined(
    number: int, window: _Window, state: Explored, share: Array, args: tuple[Goal, Memory, AnyView]
) -> _Window:
    """Return the window with the bound of this number where coarser bounds do not suffice.

    Bound i waits for i rounds of comparisons: the nearer the patterns compared, the fewer others
    need it.
    """
    goal, memory, view = args
    size = min(len(window.pattern), WINDOW if number == 1 else REFINED)

    def coarse(window: _Window) -> Float[Array, " W"]:
        return jnp.where(window.number < number, window.bounds, jnp.inf)

    def cond_fun(window: _Window) -> Array:
        matters = goal.matters(goal.least(coarse(window)), state.result, share / 2)
        return matters & (state.rounds >= number) & jnp.asarray(goal.refines(state.result))

    def body_fun(window: _Window) -> _Window:
        row, _ = least(coarse(window), size)
        block = rows_of(memory, window.pattern[row], jnp.ones_like(row, bool), state.guess)
        closer = goal.shifted(bounds_of(memory)[number](view, block.patterns), block.log_prior)
        return window._replace(
            bounds=window.bounds.at[row].max(closer),
            number=window.number.at[row].max(jnp.int8(number)),
        )

    refined: _Window = while_loop(cond_fun, body_fun, window, state, share, args)
    return refined


def _compare(
    size: int, window: _Window, state: Explored, args: tuple[Goal, Memory, AnyView]
) -> tuple[_Window, Explored]:
    """Compare the patterns of least bound in the window."""
    goal, memory, view = args
    row, on = least(window.left, size)
    index = window.pattern[row]
    block = rows_of(memory, index, on, state.guess)
    comparison = compare(memory.geometry, view, block.patterns)
    exact = goal.shifted(comparison.divergence, block.log_prior)
    guess = state.guess
    if guess is not None:
        slot = jnp.where(on, index, memory.capacity)
        guess = jax.tree.map(
            lambda table, new: table.at[slot].set(new, mode="drop"), guess, comparison.guess
        )
    window = window._replace(
        bounds=window.bounds.at[row].set(jnp.where(on, exact, window.bounds[row])),
        number=window.number.at[row].set(jnp.int8(COMPARED)),
    )
    state = state._replace(
        result=goal.add(state.result, comparison, block),
        picked=state.picked.at[state.rounds].set(jnp.where(on, index, -1)),
        rounds=state.rounds + 1,
        guess=guess,
    )
    return window, state


def least(bounds: Float[Array, " N"], size: int) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """Return the indices of the least entries, and a mask of those that are not ∞."""
    # `top_k` is fast in single precision only, and the order need not be exact, but for NaN, which
    # must reach the result, and ∞, which must not.
    lowest = jnp.where(jnp.isfinite(bounds), bounds, jnp.inf).min()
    shifted = jnp.minimum(bounds - lowest, float(jnp.finfo(jnp.float32).max)).astype(jnp.float32)
    shifted = jnp.where(bounds == jnp.inf, jnp.inf, shifted)
    _, index = jax.lax.top_k(jnp.where(jnp.isnan(bounds), jnp.inf, -shifted), size)
    return index, bounds[index] != jnp.inf


def rows_of(
    memory: Memory, index: Int[Array, " B"], on: Bool[Array, " B"], guess: PyTree = None
) -> Block:
    """Return the patterns at `index` as a block; where `on` is false the prior is 0."""
    rows = (memory.patterns, memory.prepared, memory.log_prior, guess)
    patterns, prepared, log_prior, guess = jax.tree.map(lambda leaf: leaf[index], rows)
    log_prior = jnp.zeros(index.shape, memory.dtype) if log_prior is None else log_prior
    guess = memory.geometry.first_guess(prepared) if guess is None else guess
    selected = Patterns(patterns, prepared, guess)
    first = first_index(memory.capacity, memory.layout)
    return Block(first + index, selected, jnp.where(on, log_prior, -jnp.inf))
