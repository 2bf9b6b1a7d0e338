"""One move of recall and the look that follows it: moves that do not raise the energy."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdam._average import GibbsAverage
from jdam._derivatives import full_precision, jvp
from jdam._loops import while_loop
from jdam.geometry.protocol import AnyMeasure
from jdam.memory import Memory


class Place(NamedTuple):
    """A measure, and all that one look at the patterns from it tells."""

    measure: AnyMeasure
    found: GibbsAverage
    neglected: Float[Array, ""]


class Walk(NamedTuple):
    """Where a descent has come to."""

    place: Place
    looked: Bool[Array, ""]  # False until the first look, which moves nothing
    attempt: Int[Array, ""]  # with how much caution to try the next move first
    ended: Bool[Array, ""]  # no move lowers the energy by more than the geometry resolves


#: (memory, query, β, guess) ↦ what the query learns from the patterns, and the mass left out.
Look: TypeAlias = Callable[..., tuple[GibbsAverage, Float[Array, ""]]]


def start(look: Look, memory: Memory, measure: AnyMeasure, beta: Float[Array, ""]) -> Walk:
    """A walk that has not looked yet."""
    found, neglected = jax.eval_shape(look, memory, measure, beta)
    found, neglected = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (found, neglected)
    )
    if found.guess is not None:
        found = found._replace(guess=memory.geometry.first_guess(memory.prepared))
    no = jnp.array(False)
    return Walk(Place(measure, found, neglected), no, jnp.array(0, jnp.int32), no)


def go_on(look: Look, walk: Walk, args: tuple[Memory, Array, Array, Array]) -> Walk:
    """Move, except on the first turn, and look: the first of ever more cautious attempts that
    does not raise the energy. `args` are memory, β, step size and the smallest change of energy
    that says anything."""
    *rest, resolution = args
    geometry, yes = args[0].geometry, jnp.array(True)
    if geometry.attempts == 1:
        place = _move_and_look(look, walk.attempt, (walk, rest))
        return walk._replace(place=place, looked=yes)
    attempt, place = _first_accepted(look, (walk, rest, resolution))
    gain = walk.place.found.energy - place.found.energy
    keep = walk.looked & ~(gain >= 0)
    place = jax.tree.map(lambda new, old: jnp.where(keep, old, new), place, walk.place)
    # The next attempt may be a little bolder than the last that was good.
    return Walk(place, yes, jnp.maximum(attempt - 1, 0), walk.looked & ~(gain > resolution))


def _move_and_look(look: Look, attempt: Any, args: tuple) -> Place:
    walk, (memory, beta, step_size) = args
    measure, found, _ = walk.place
    moved = move(memory, measure, found, step_size, attempt)
    measure = jax.tree.map(lambda new, old: jnp.where(walk.looked, new, old), moved, measure)
    return Place(measure, *look(memory, measure, beta, found.guess))


def move(
    memory: Memory,
    measure: AnyMeasure,
    found: GibbsAverage,
    step_size: Float[Array, ""],
    attempt: Any = 0,
) -> AnyMeasure:
    """One move of `Geometry.move`; none where no pattern is within reach."""
    moved = memory.geometry.move(found.view, found.pull, step_size, attempt)
    return jax.tree.map(lambda new, old: jnp.where(found.weight == 0, old, new), moved, measure)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _first_accepted(look: Look, args: tuple) -> tuple[Int[Array, ""], Place]:
    walk, rest, resolution = args
    most = rest[0].geometry.attempts

    def turn(carry: tuple) -> tuple:
        attempt, _, _ = carry
        place = _move_and_look(look, attempt, (walk, rest))
        rise = place.found.energy - walk.place.found.energy
        return attempt + 1, ~walk.looked | (rise <= resolution), place

    def unfinished(carry: tuple) -> Array:
        attempt, accepted, _ = carry
        return ~accepted & (attempt < most)

    start = (walk.attempt, jnp.array(False), walk.place)
    attempt, _, place = while_loop(unfinished, turn, start, args)
    return attempt - 1, place


@partial(_first_accepted.defjvp, symbolic_zeros=True)
@full_precision
def _first_accepted_jvp(look: Look, primals: tuple, tangents: tuple) -> Any:
    # Which attempt is accepted is piecewise constant.
    (args,), (dargs,) = primals, tangents
    attempt, _ = _first_accepted(look, args)

    def accepted(args: tuple) -> tuple[Array, Place]:
        return attempt, _move_and_look(look, attempt, args)

    return jvp(accepted, (args[:2],), (dargs[:2],))
