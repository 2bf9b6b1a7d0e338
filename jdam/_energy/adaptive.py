"""The search of those who choose none: `Certified` where it pays, and right in any case."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool

from jdam._core.batching import compute_where
from jdam._energy.average import Settings, evaluate, start
from jdam._energy.certified import Certified, has_sharper_bounds
from jdam._energy.evaluation import Evaluation, Start
from jdam._energy.search import Exhaustive, Search
from jdam._energy.separation import LogSumExp, Separation, Sums
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory

#: Fewer patterns are all compared: the program is smaller.
MANY = 512
#: Over how many of the first candidates the mass may be spread, for it to be worth going on.
FEW = 8


@dataclass(frozen=True)
class Adaptive(Certified):
    """Few patterns, if it is soon proved that the others do not matter; all of them, if not.

    Recall is that of `Exhaustive` up to `tol` in every weight. The search gives up where mass is
    spread over its first candidates."""

    def goes_on(self, first: Sums) -> Bool[Array, ""]:
        return first.mass <= FEW

    def evaluate(
        self,
        memory: Memory,
        query: AnyMeasure,
        beta: Array,
        start: Start,
        *,
        separation: Separation,
    ) -> Evaluation:
        found = super().evaluate(memory, query, beta, start, separation=separation)
        unproved = ~(found.neglected <= self.tol)
        at_once = Exhaustive().queries_at_once(memory)
        args = (memory, query, beta)
        return compute_where(unproved, _compare_all, found, start, args, at_once=at_once)


def _compare_all(wanted: Start, args: tuple[Memory, AnyMeasure, Array]) -> Evaluation:
    memory, query, beta = args
    wanted = wanted._replace(guess=start(memory, query).guess)
    found = evaluate(Settings(LogSumExp()), memory, query, beta, wanted)
    return found._replace(guess=None)


def choose(search: Search | None, memory: Memory, separation: Separation) -> Search:
    """That search, and for None the one that suits the memory."""
    if search is not None:
        return search
    pays = (
        memory.capacity >= MANY
        and memory.layout is None
        and type(separation) is LogSumExp
        and memory.geometry.bounds_pay
        and has_sharper_bounds(memory)
    )
    if not pays:
        return Exhaustive()
    tol = 1e-12 if memory.dtype == jnp.float64 else 1e-8
    return Adaptive(max_candidates=memory.capacity // 8, tol=tol)
