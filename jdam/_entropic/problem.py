"""Entropic transport as a problem: two clouds, the cost of their atoms, and how to solve it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jdam._core.derivatives import full_precision
from jdam._core.loops import scan

#: Exponents of the plan's density that count as infinite: only weights of zero allow them.
LARGE = 80.0


class Pair(NamedTuple):
    """μ = Σ aⱼδ(xⱼ), ν = Σ bₖδ(yₖ), and ε. Atoms of weight 0 change nothing."""

    x: Float[Array, "n d"]
    a: Float[Array, " n"]
    y: Float[Array, "m d"]
    b: Float[Array, " m"]
    epsilon: Float[Array, ""]

    def size(self) -> Float[Array, ""]:
        """The costs of clouds about 0 are not more than twice this."""
        return _half_square(self.x, self.a).max() + _half_square(self.y, self.b).max()


def _half_square(x: Float[Array, "n d"], weights: Float[Array, " n"]) -> Float[Array, " n"]:
    return jnp.where(weights > 0, jnp.vecdot(x, x) / 2, 0)


@dataclass(frozen=True)
class Solver:
    """When to stop: at an L1 error `tol` of the marginal, or after `max_iterations`."""

    tol: float
    max_iterations: int
    method: str = "stabilised"


class State(NamedTuple):
    """How far the solution of two clouds has come."""

    f: Float[Array, " n"]
    g: Float[Array, " m"]
    barycentre: Float[Array, "n d"]
    error: Float[Array, ""]
    iterations: Int[Array, ""]
    newton: Float[Array, ""]  # the length of the last Newton step in units of ε; ∞ before the first


class Coupling(NamedTuple):
    """The solution for two clouds; rows of the plan are exact, columns up to `error`."""

    cost: Float[Array, ""]  # OT_ε
    f: Float[Array, " n"]  # potentials: the plan is aⱼbₖ exp((fⱼ+gₖ−Cⱼₖ)/ε)
    g: Float[Array, " m"]
    barycentre: Float[Array, "n d"]  # T(xⱼ) = Σₖ Pⱼₖyₖ / aⱼ
    error: Float[Array, ""]  # |Pᵀ1 − b|₁


class SelfCoupling(NamedTuple):
    """The solution for a cloud and itself, with one symmetric potential."""

    cost: Float[Array, ""]
    potential: Float[Array, " n"]
    error: Float[Array, ""]


@jax.custom_jvp
def half_squared_distances(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """½|xⱼ − yₖ|² from differences, one dimension after the other: digits that the expanded
    square loses, and no array (n, m, d)."""

    def add(total: Array, coordinates: tuple[Array, Array]) -> tuple[Array, None]:
        p, q = coordinates
        return total + (p[:, None] - q[None]) ** 2, None

    start = jnp.zeros((x.shape[0], y.shape[0]), x.dtype)
    return scan(add, start, (x.T, y.T))[0] / 2


@half_squared_distances.defjvp
@full_precision
def _half_squared_distances_jvp(
    primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    # ⟨xⱼ − yₖ, dxⱼ − dyₖ⟩ by products: a derivative needs no more digits than coordinates have.
    (x, y), (dx, dy) = primals, tangents
    own = jnp.vecdot(x, dx)[:, None] + jnp.vecdot(y, dy)[None]
    return half_squared_distances(x, y), own - x @ dy.T - dx @ y.T


def half_squared_distances_by_products(
    x: Float[Array, "n d"], y: Float[Array, "m d"]
) -> Float[Array, "n m"]:
    """The same in a fraction of the time, with an error of some eps·(|xⱼ|² + |yₖ|²)."""
    return jnp.vecdot(x, x)[:, None] / 2 + jnp.vecdot(y, y)[None] / 2 - x @ y.T


def log(weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """log wⱼ, −∞ where a weight is 0, with derivative 0 there."""
    on = weights > 0
    return jnp.where(on, jnp.log(jnp.where(on, weights, 1)), -jnp.inf)


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


def density_of(cost: Array, epsilon: Array, f: Array, g: Array) -> Float[Array, "n m"]:
    """exp((fⱼ + gₖ − Cⱼₖ)/ε), of the plan against the product of weights."""
    return jnp.exp(jnp.minimum((f[:, None] + g[None] - cost) / epsilon, LARGE))


def pairs_at_once(size: int) -> int:
    """Of plans of so many numbers: on a CPU as many as its cache holds; on accelerators as many as
    keep them busy."""
    numbers = 2**14 if jax.default_backend() == "cpu" else 2**24
    return max(1, numbers // size)
