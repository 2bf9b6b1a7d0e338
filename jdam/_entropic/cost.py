"""What it costs to move mass from one atom to another, and the derivatives of that."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam._core.derivatives import full_precision
from jdam._core.loops import scan


class Cost(ABC):
    """A ground cost c(x, y) ≥ 0: a frozen dataclass with one method, `matrix`. The others have
    defaults, which a cost may replace by what is faster or loses fewer digits."""

    @abstractmethod
    def matrix(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
        """c(xⱼ, yₖ), differentiable."""

    def scaled(
        self, x: Float[Array, "n d"], y: Float[Array, "m d"], epsilon: Float[Array, ""]
    ) -> Float[Array, "n m"]:
        """c(xⱼ, yₖ)/ε."""
        return self.matrix(x, y) / epsilon

    def roughly(
        self, x: Float[Array, "n d"], y: Float[Array, "m d"], epsilon: Float[Array, ""]
    ) -> Float[Array, "n m"]:
        """c(xⱼ, yₖ)/ε with an error of some eps·(c(xⱼ, 0) + c(yₖ, 0))/ε, if that is faster."""
        return self.scaled(x, y, epsilon)

    def gradient(
        self, plan: Float[Array, "n m"], x: Float[Array, "n d"], y: Float[Array, "m d"]
    ) -> Float[Array, "n d"]:
        """Σₖ Pⱼₖ ∇ₓc(xⱼ, yₖ), for plans whose rows sum to 1."""
        result: Array = jax.vjp(partial(self.matrix, y=y), x)[1](plan)[0]
        return result


@dataclass(frozen=True)
class HalfSquaredDistance(Cost):
    """c = ½|x−y|². Its gradient is x − T(x), T the barycentric map of the plan."""

    def matrix(self, x: Array, y: Array) -> Float[Array, "n m"]:
        return _half_squared_distances(x, y)

    def scaled(self, x: Array, y: Array, epsilon: Array) -> Float[Array, "n m"]:
        root = jnp.sqrt(epsilon)  # squares may be out of range where their ratio is not
        return _half_squared_distances(x / root, y / root)

    def roughly(self, x: Array, y: Array, epsilon: Array) -> Float[Array, "n m"]:
        root = jnp.sqrt(epsilon)
        x, y = x / root, y / root
        return jnp.vecdot(x, x)[:, None] / 2 + jnp.vecdot(y, y)[None] / 2 - x @ y.T

    def gradient(self, plan: Array, x: Array, y: Array) -> Float[Array, "n d"]:
        return x - plan @ y


@jax.custom_jvp
def _half_squared_distances(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """½|xⱼ − yₖ|² from differences, one dimension after the other: digits that the expanded
    square loses, and no array (n, m, d). In a loop, since XLA computes sums that it can look into
    again wherever they are used, with other rounding: of large costs that is a large difference."""

    def add(total: Array, coordinates: tuple[Array, Array]) -> tuple[Array, None]:
        p, q = coordinates
        return total + (p[:, None] - q[None]) ** 2, None

    start = jnp.zeros((x.shape[0], y.shape[0]), x.dtype)
    return scan(add, start, (x.T, y.T))[0] / 2


@_half_squared_distances.defjvp
@full_precision
def _half_squared_distances_jvp(
    primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    # ⟨xⱼ − yₖ, dxⱼ − dyₖ⟩ by products: a derivative needs no more digits than coordinates have.
    (x, y), (dx, dy) = primals, tangents
    own = jnp.vecdot(x, dx)[:, None] + jnp.vecdot(y, dy)[None]
    return _half_squared_distances(x, y), own - x @ dy.T - dx @ y.T
