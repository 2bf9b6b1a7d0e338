"""Entropic transport as a problem: two clouds, how exactly their mass must arrive, and how to solve
it."""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jdam._core.batching import by_platform
from jdam._entropic.cost import Cost, HalfSquaredDistance

#: Exponents of the plan's density that count as infinite: only weights of zero allow them.
LARGE = 80.0
#: In units of ρ or 2ρ+ε, costs at which no mass is transported.
FREE = 100.0
#: A tolerance of the marginal below which a solver is tight.
TIGHT = 1e-9


class Marginals(NamedTuple):
    """What it costs a plan π to have another marginal π1 than α: nothing else than α is allowed if
    ρ is None, and ρ KL(π1|α) is paid otherwise. Of ε and ρ, and of potentials f."""

    epsilon: Float[Array, ""]
    rho: Float[Array, ""] | None = None

    @property
    def tau(self) -> Float[Array, ""] | float:
        """s = ρ/(ρ+ε), by which soft c-transforms are multiplied: 1 for exact marginals."""
        return 1.0 if self.rho is None else 1 / (1 + self.epsilon / self.rho)

    def transported_fraction(self, f: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """e^(−f/ρ), the share of an atom's mass that is transported: 1 for exact marginals. Less
        than e^(−45) is nothing, however far it would go."""
        if self.rho is None:
            return jnp.ones_like(f)
        return jnp.where(f > 45 * self.rho, 0, jnp.exp(-f / self.rho))

    def dual(self, f: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """−ρ(e^(−f/ρ) − 1), what an atom of mass 1 contributes to the dual objective: f for exact
        marginals."""
        return f if self.rho is None else -self.rho * jnp.expm1(-f / self.rho)

    def variation(self, f: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """−(ρ+ε)(e^(−f/ρ) − 1), the first variation of the cost in the atom's mass: f for exact
        marginals."""
        return self.dual(f) / self.tau

    def dual_shift(
        self, f: Float[Array, " n"], a: Float[Array, " n"], g: Float[Array, " m"], b: Array
    ) -> Float[Array, ""]:
        """The t for which g + t has the largest dual value with its own f, which then is f − st:
        there ⟨a, e^(−f/ρ)⟩ = ⟨b, e^(−g/ρ)⟩."""
        if self.rho is None:
            return jnp.zeros_like(self.epsilon)
        least_f = soft_minimum(-f[None] / self.rho, a[None])[0]
        least_g = soft_minimum(-g[None] / self.rho, b[None])[0]
        return self.rho / (1 + self.tau) * (least_f - least_g)

    def payable(self, costs: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Costs c, in units of ε, the largest of which is one at which no mass is transported:
        e^(−c/(2ρ+ε)) = e^(−100) of it would be. Of larger ones potentials would have no digits."""
        if self.rho is None:
            return costs
        return jnp.minimum(costs, FREE * (1 + 2 * self.rho / self.epsilon))

    def scaled(self, factor: Float[Array, ""]) -> "Marginals":
        """In other units of cost."""
        return Marginals(self.epsilon / factor, None if self.rho is None else self.rho / factor)


class Cloud(NamedTuple):
    """μ = Σ aⱼδ(xⱼ). Atoms of weight 0 change nothing."""

    x: Float[Array, "n d"]
    a: Float[Array, " n"]

    def normalised(self) -> "Cloud":
        """Sums of weights may differ by the rounding of another dtype."""
        return self._replace(a=self.a / self.a.sum())


class Pair(NamedTuple):
    """μ = Σ aⱼδ(xⱼ), ν = Σ bₖδ(yₖ), and between what marginals to transport."""

    x: Float[Array, "n d"]
    a: Float[Array, " n"]
    y: Float[Array, "m d"]
    b: Float[Array, " m"]
    marginals: Marginals

    def dual_value(self, f: Float[Array, " n"], g: Float[Array, " m"]) -> Float[Array, ""]:
        """The dual objective at a potential g and the response f to it."""
        marginals, g = self.marginals, jnp.where(self.b > 0, g, 0)
        return jnp.vdot(marginals.variation(f), self.a) + jnp.vdot(marginals.dual(g), self.b)

    def turned(self) -> "Pair":
        """The same the other way round."""
        return Pair(self.y, self.b, self.x, self.a, self.marginals)


@dataclass(frozen=True)
class Solver:
    """For what cost, and when to stop: at an L1 error `tol` of the marginal, or after
    `max_iterations`."""

    tol: float
    max_iterations: int
    method: str = "stabilised"
    cost: Cost = field(default_factory=HalfSquaredDistance)

    @property
    def tight(self) -> bool:
        """Whether potentials are wanted to many digits too: of plans that are nearly permutations,
        marginals say little of them."""
        return self.tol < TIGHT


class State(NamedTuple):
    """How far the solution of two clouds has come."""

    f: Float[Array, " n"]
    g: Float[Array, " m"]
    gradient: Float[Array, "n d"]
    error: Float[Array, ""]
    iterations: Int[Array, ""]
    ratio: Float[Array, ""]  # by how much larger an ε the next round takes
    cooled: Float[Array, ""]  # at what error of the marginal ε becomes smaller
    #: Of a tight solver, the length of the last Newton step in units of ε; ∞ before the first.
    newton: Float[Array, ""] | None = None


class SinkhornOutput(NamedTuple):
    """The solution for two clouds; the plan is right for f in its rows, for g up to `error`."""

    cost: Float[Array, ""]  # OT_ε
    f: Float[Array, " n"]  # potentials: the plan is aⱼbₖ exp((fⱼ+gₖ−Cⱼₖ)/ε)
    g: Float[Array, " m"]
    gradient: Float[Array, "n d"]  # Σₖ Pⱼₖ ∇ₓc(xⱼ, yₖ) / Σₖ Pⱼₖ
    error: Float[Array, ""]  # |Pᵀ1 − b e^(−g/ρ)|₁


class SelfTransport(NamedTuple):
    """The solution for a cloud and itself, with one symmetric potential."""

    cost: Float[Array, ""]
    potential: Float[Array, " n"]
    error: Float[Array, ""]
    gradient: Float[Array, "n d"] | None = None  # as of a `SinkhornOutput`; None where dropped


def soft_minimum(logits: Float[Array, "n m"], weights: Float[Array, "1 m"]) -> Float[Array, " n"]:
    """−log(Σₖ wₖ exp(lⱼₖ) / Σₖ wₖ), with its derivative in weights of zero too, and with all digits
    where logits are small."""
    top = jnp.where(weights > 0, logits, -jnp.inf).max(1, keepdims=True)
    top = jax.lax.stop_gradient(top)
    depth = jnp.minimum(logits - top, LARGE)
    less = jnp.sum(weights * jnp.expm1(depth), axis=1) / weights.sum()
    small = less > -0.5
    total = jnp.sum(weights * jnp.exp(depth), axis=1) / weights.sum()
    near = jnp.log1p(jnp.where(small, less, 0))
    return -(top[:, 0] + jnp.where(small, near, jnp.log(jnp.where(small, 1, total))))


def pair_batch_size(size: int) -> int:
    """Of plans of so many numbers: on a CPU as many as its cache holds; on accelerators as many as
    keep them busy."""
    numbers = by_platform(2**14, 2**24)
    return max(1, numbers // size)
