"""Selection of the patterns that an evaluation compares: the interface, and the search over all."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jax import Array
from jaxtyping import Float, PyTree

from jdam._core import checks
from jdam._energy.average import Settings, evaluate
from jdam._energy.evaluation import Evaluation
from jdam._energy.separation import Separation
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory


class Search(ABC):
    """Selection of the patterns of an evaluation. Subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def tolerance(self) -> float:
        """Gibbs mass that an evaluation may neglect; a recall that exceeds it is `UNCERTIFIED`."""

    @abstractmethod
    def query_batch_size(self, memory: Memory) -> int:
        """Return the number of queries of a batch that are evaluated at the same time."""

    @abstractmethod
    def evaluate(
        self,
        memory: Memory,
        query: AnyMeasure,
        beta: Float[Array, ""],
        guess: PyTree,
        *,
        separation: Separation,
    ) -> Evaluation:
        """Return the energy, the average pull, and a bound on the Gibbs mass neglected in both."""

    def first_guess(self, memory: Memory) -> PyTree:
        """Return the warm start of the first evaluation; later ones use `Evaluation.guess`."""
        return memory.geometry.first_guess(memory.prepared)


@dataclass(frozen=True)
class Exhaustive(Search):
    """Comparison with every pattern, `block_size` of them at a time.

    Beside its arguments a recall needs memory for queries × `block_size` comparisons.

    **Arguments:**

    - `block_size`: None leaves the choice to the geometry and the platform: on CPUs 2048 vectors or
      diagonal Gaussians, 2¹⁶/(d·r) Gaussians with factors d×r; more on accelerators.

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
        guess: PyTree,
        *,
        separation: Separation,
    ) -> Evaluation:
        return evaluate(Settings(separation, self.block_size), memory, query, beta, guess)
