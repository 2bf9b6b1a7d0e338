"""Ground costs between atoms, with their derivatives."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree

from jdam._core.derivatives import full_precision
from jdam._core.loops import scan


class Cost(ABC):
    """A ground cost c(x, y) ≥ 0.

    A cost is a frozen dataclass with a method `matrix`. The other methods have defaults, to
    override where a formula is faster or more accurate."""

    @abstractmethod
    def matrix(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
        """Compute c(xⱼ, yₖ), differentiable."""

    def scaled(
        self, x: Float[Array, "n d"], y: Float[Array, "m d"], epsilon: Float[Array, ""]
    ) -> Float[Array, "n m"]:
        """Compute c(xⱼ, yₖ)/ε."""
        return self.matrix(x, y) / epsilon

    def roughly(
        self, x: Float[Array, "n d"], y: Float[Array, "m d"], epsilon: Float[Array, ""]
    ) -> Float[Array, "n m"]:
        """Compute c(xⱼ, yₖ)/ε up to a few eps·(c(xⱼ, 0) + c(yₖ, 0))/ε, if that is faster."""
        return self.scaled(x, y, epsilon)

    def gradient(
        self, plan: Float[Array, "n m"], x: Float[Array, "n d"], y: Float[Array, "m d"]
    ) -> Float[Array, "n d"]:
        """Compute Σₖ Pⱼₖ ∇ₓc(xⱼ, yₖ) for plans P whose rows sum to 1."""
        result: Array = jax.vjp(partial(self.matrix, y=y), x)[1](plan)[0]
        return result


@dataclass(frozen=True)
class HalfSquaredDistance(Cost):
    """c = ½|x−y|², whose `gradient` is x − T(x) for the plan's barycentric map T."""

    def matrix(self, x: Array, y: Array) -> Float[Array, "n m"]:
        return _half_squared_distances(x, y)

    def scaled(self, x: Array, y: Array, epsilon: Array) -> Float[Array, "n m"]:
        root = jnp.sqrt(epsilon)  # x² and ε may be out of range where x²/ε is not
        return _half_squared_distances(x / root, y / root)

    def roughly(self, x: Array, y: Array, epsilon: Array) -> Float[Array, "n m"]:
        root = jnp.sqrt(epsilon)
        x, y = x / root, y / root
        return jnp.vecdot(x, x)[:, None] / 2 + jnp.vecdot(y, y)[None] / 2 - x @ y.T

    def gradient(self, plan: Array, x: Array, y: Array) -> Float[Array, "n d"]:
        return x - plan @ y


@jax.custom_jvp
def _half_squared_distances(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Compute ½|xⱼ − yₖ|² from differences, one coordinate after another.

    Differences keep digits that the expanded square loses, and no array (n, m, d) is needed. In a
    loop, because XLA may recompute an unrolled sum in each of its uses, with rounding errors that
    differ; for large costs the differences matter."""

    def add(total: Array, coordinates: tuple[Array, Array]) -> tuple[Array, None]:
        p, q = coordinates
        return total + (p[:, None] - q[None]) ** 2, None

    start = jnp.zeros((x.shape[0], y.shape[0]), x.dtype)
    return scan(add, start, (x.T, y.T))[0] / 2


@_half_squared_distances.defjvp
@full_precision
def _half_squared_distances_jvp(
    primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> tuple[Array, Array]:
    # ⟨xⱼ − yₖ, dxⱼ − dyₖ⟩ expanded: derivatives need no more digits than the coordinates have.
    (x, y), (dx, dy) = primals, tangents
    own = jnp.vecdot(x, dx)[:, None] + jnp.vecdot(y, dy)[None]
    return _half_squared_distances(x, y), own - x @ dy.T - dx @ y.T
