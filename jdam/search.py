"""Which patterns a step looks at."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam import _checks
from jdam.energy import GibbsAverage, gibbs_average
from jdam.geometry.protocol import AnyMeasure
from jdam.memory import Memory
from jdam.separation import Separation


@dataclass(frozen=True)
class Exhaustive:
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
        found = gibbs_average(
            memory,
            query,
            beta,
            separation=separation,
            block_size=self.block_size,
            guess=guess,
        )
        return found, jnp.zeros_like(beta)
