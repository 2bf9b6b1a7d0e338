"""Data types of entropic transport: problem, solver settings, solver state and solutions."""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, PyTree

from jdam._core.batching import by_platform
from jdam._entropic.cost import Cost, HalfSquaredDistance

#: The largest exponent of the plan's density, which only atoms of weight 0 may exceed.
LARGE = 80.0
#: The cost, in units of ρ or 2ρ+ε, above which no mass is transported.
FREE = 100.0
#: Solvers with a tolerance of the marginal below this are tight.
TIGHT = 1e-9


class Marginals(NamedTuple):
    """Regularisation ε and marginal penalty ρ of a transport problem.

    If ρ is None, the marginals of a plan π are exact. Else deviations cost ρ KL(π1|α), and likewise
    for the second marginal. The methods are functions of potentials f."""

    epsilon: Float[Array, ""]
    rho: Float[Array, ""] | None = None

    @property
    def tau(self) -> Float[Array, ""] | float:
        """The damping of soft c-transforms, s = ρ/(ρ+ε), ott-jax's tau: 1 for exact marginals."""
        return 1.0 if self.rho is None else 1 / (1 + self.epsilon / self.rho)

    def transported_fraction(self, f: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """Compute e^(−f/ρ), the transported fraction of each atom's mass: 1 for exact marginals,
        and 0 where it is below e^(−45)."""
        if self.rho is None:
            return jnp.ones_like(f)
        return jnp.where(f > 45 * self.rho, 0, jnp.exp(-f / self.rho))

    def dual(self, f: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """Compute −ρ(e^(−f/ρ) − 1), the contribution of an atom of mass 1 to the dual objective: f
        for exact marginals."""
        return f if self.rho is None else -self.rho * jnp.expm1(-f / self.rho)

    def variation(self, f: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """Compute −(ρ+ε)(e^(−f/ρ) − 1), the first variation of the cost in the mass of an atom: f
        for exact marginals."""
        return self.dual(f) / self.tau

    def dual_shift(
        self, f: Float[Array, " n"], a: Float[Array, " n"], g: Float[Array, " m"], b: Array
    ) -> Float[Array, ""]:
        """Compute the dual shift: the t for which the dual value of g + t and its c-transform f −
        st is largest, so that ⟨a, e^(−f/ρ)⟩ = ⟨b, e^(−g/ρ)⟩ at these.

        It is 0 for exact marginals, whose dual objective does not depend on t."""
        if self.rho is None:
            return jnp.zeros_like(self.epsilon)
        least_f = soft_minimum(-f[None] / self.rho, a[None])[0]
        least_g = soft_minimum(-g[None] / self.rho, b[None])[0]
        return self.rho / (1 + self.tau) * (least_f - least_g)

    def payable(self, costs: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Clip costs, in units of ε, at 100(2ρ+ε)/ε, at which a fraction e^(−100) of the mass is
        transported. Potentials for larger costs would lose all digits."""
        if self.rho is None:
            return costs
        return jnp.minimum(costs, FREE * (1 + 2 * self.rho / self.epsilon))

    def scaled(self, factor: Float[Array, ""]) -> "Marginals":
        """Return ε/factor and ρ/factor, for costs in units of `factor`."""
        return Marginals(self.epsilon / factor, None if self.rho is None else self.rho / factor)


class Cloud(NamedTuple):
    """μ = Σ aⱼδ(xⱼ); atoms of weight 0 have no effect."""

    x: Float[Array, "n d"]
    a: Float[Array, " n"]

    def normalised(self) -> "Cloud":
        """Return the cloud with weights that sum to 1, from which they may differ by the rounding
        of another dtype."""
        return self._replace(a=self.a / self.a.sum())


class Pair(NamedTuple):
    """A transport problem between μ = Σ aⱼδ(xⱼ) and ν = Σ bₖδ(yₖ)."""

    x: Float[Array, "n d"]
    a: Float[Array, " n"]
    y: Float[Array, "m d"]
    b: Float[Array, " m"]
    marginals: Marginals

    def dual_value(self, f: Float[Array, " n"], g: Float[Array, " m"]) -> Float[Array, ""]:
        """Compute the dual objective at a potential g and its c-transform f."""
        marginals, g = self.marginals, jnp.where(self.b > 0, g, 0)
        return jnp.vdot(marginals.variation(f), self.a) + jnp.vdot(marginals.dual(g), self.b)

    def turned(self) -> "Pair":
        """Return the problem with μ and ν exchanged."""
        return Pair(self.y, self.b, self.x, self.a, self.marginals)


@dataclass(frozen=True)
class Solver:
    """Settings of a solver: the ground cost, the method ("stabilised" or "ott"), and when to stop,
    at an L1 error `tol` of the marginal or after `max_iterations`."""

    tol: float
    max_iterations: int
    method: str = "stabilised"
    cost: Cost = field(default_factory=HalfSquaredDistance)

    @property
    def tight(self) -> bool:
        """True if potentials must be accurate too: for plans that are nearly permutations, the
        marginal error does not control them."""
        return self.tol < TIGHT


class State(NamedTuple):
    """State of the iterations for one pair."""

    f: Float[Array, " n"]
    g: Float[Array, " m"]
    gradient: Float[Array, "n d"]
    error: Float[Array, ""]
    iterations: Int[Array, ""]
    ratio: Float[Array, ""]  # of the ε of the next round to the final ε
    cooled: Float[Array, ""]  # marginal error below which ε is decreased
    #: For a tight solver, the length of the last Newton step in units of ε; ∞ before the first.
    newton: Float[Array, ""] | None = None


class SinkhornOutput(NamedTuple):
    """Solution for a pair; the plan's row sums are exact for f, the column sums up to `error`.

    For a cloud and itself, f is also the second potential."""

    cost: Float[Array, ""]  # OT_ε
    f: Float[Array, " n"]  # potentials: the plan is aⱼbₖ exp((fⱼ+gₖ−Cⱼₖ)/ε)
    g: PyTree  # (m,); None for a cloud and itself
    gradient: PyTree  # (n, d), Σₖ Pⱼₖ ∇ₓc(xⱼ, yₖ) / Σₖ Pⱼₖ; None if not stored
    error: Float[Array, ""]  # |Pᵀ1 − b e^(−g/ρ)|₁


def soft_minimum(logits: Float[Array, "n m"], weights: Float[Array, "1 m"]) -> Float[Array, " n"]:
    """Compute −log(Σₖ wₖ exp(lⱼₖ) / Σₖ wₖ).

    The derivative in weights of 0 is right too, and small logits keep all their digits."""
    top = jnp.where(weights > 0, logits, -jnp.inf).max(1, keepdims=True)
    top = jax.lax.stop_gradient(top)
    depth = jnp.minimum(logits - top, LARGE)
    excess = jnp.sum(weights * jnp.expm1(depth), axis=1) / weights.sum()
    small = excess > -0.5
    total = jnp.sum(weights * jnp.exp(depth), axis=1) / weights.sum()
    log_small = jnp.log1p(jnp.where(small, excess, 0))
    return -(top[:, 0] + jnp.where(small, log_small, jnp.log(jnp.where(small, 1, total))))


def pair_batch_size(size: int) -> int:
    """Return the number of plans of `size` entries to compute at once: as many as fit the cache of
    a CPU, or occupy an accelerator."""
    numbers = by_platform(2**14, 2**24)
    return max(1, numbers // size)
