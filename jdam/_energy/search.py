"""How a step of recall finds the patterns that matter: all of them, or those of `certified`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from jax import Array
from jaxtyping import Float

from jdam._core import checks
from jdam._energy.average import Settings, evaluate
from jdam._energy.evaluation import Evaluation
from jdam._energy.separation import Separation
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory


class Search(ABC):
    """How a step of recall finds the patterns that matter: a frozen dataclass."""

    @property
    @abstractmethod
    def tolerance(self) -> float:
        """How much Gibbs mass may be left out without a word."""

    @abstractmethod
    def query_batch_size(self, memory: Memory) -> int:
        """How many queries of a batch are evaluated at the same time."""

    @abstractmethod
    def evaluate(
        self,
        memory: Memory,
        query: AnyMeasure,
        beta: Float[Array, ""],
        guess: Any,
        *,
        separation: Separation,
    ) -> Evaluation:
        """The energy, the average of the pulls, and a bound on the Gibbs mass left out of both."""

    def first_guess(self, memory: Memory) -> Any:
        """The guess of a first evaluation; later ones start from those before."""
        return memory.geometry.first_guess(memory.prepared)

    def settled(self, memory: Memory, guess: Any) -> Any:
        """The guess of an evaluation, for derivatives of the same once more."""
        return memory.geometry.settled(guess)


@dataclass(frozen=True)
class Exhaustive(Search):
    """Compare with every pattern, `block_size` of them at a time.

    Beside its arguments a recall then needs memory for queries × block_size comparisons.
    `None` leaves the choice to the geometry and the platform: on CPUs 2048 vectors or diagonal
    Gaussians, 2¹⁶/(d·r) Gaussians with factors d×r; more on accelerators.

    **Raises:** `TypeError` or `ValueError` if `block_size` is neither None nor an int ≥ 1.
    """

    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.block_size is not None:
            checks.positive_int("block_size", self.block_size)

    @property
    def tolerance(self) -> float:
        return 0.0

    def query_batch_size(self, memory: Memory) -> int:
        return memory.geometry.batch_sizes(memory.patterns).queries

    def evaluate(
        self,
        memory: Memory,
        query: AnyMeasure,
        beta: Array,
        guess: Any,
        *,
        separation: Separation,
    ) -> Evaluation:
        return evaluate(Settings(separation, self.block_size), memory, query, beta, guess)
