"""Ground costs between atoms, with their derivatives."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

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


@dataclass(frozen=True)
class GroundCost(Cost):
    """The ground cost c(x, y) of an `ott.geometry.costs.CostFn`."""

    function: Callable[[Array, Array], Array]

    def matrix(self, x: Array, y: Array) -> Float[Array, "n m"]:
        costs: Array = _costs(self.function, x, y)
        return costs


def checked_cost(cost: Any) -> Any:
    """Return the cost if it is None or a `CostFn` of ott-jax, else raise `TypeError`."""
    if cost is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ott-jax imports deprecated packages
        from ott.geometry.costs import CostFn
    if not isinstance(cost, CostFn):
        raise TypeError(
            f"cost must be None or an ott.geometry.costs.CostFn, c(x, y) of two atoms; got {cost!r}"
        )
    return cost


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _costs(
    function: Callable[[Array, Array], Array], x: Float[Array, "n d"], y: Float[Array, "m d"]
) -> Float[Array, "n m"]:
    # ott-jax needs JAX's default promotion rules, which users may have made stricter.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        costs: Array = jax.vmap(lambda p: jax.vmap(partial(function, p))(y))(x)
    return costs.astype(x.dtype)


@_costs.defjvp
@full_precision
def _costs_jvp(function: Any, primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]) -> PyTree:
    # The primal output of `jax.jvp` is not used: for ott-jax's norms it differs at 0.
    _, change = jax.jvp(partial(_costs.fun, function), primals, tangents)
    return _costs(function, *primals), change


def mean_within(
    cost: Cost, points: Float[Array, "N n d"], weights: Float[Array, "N n"]
) -> Float[Array, " N"]:
    """Compute Σⱼₖ aⱼaₖ c(xⱼ, xₖ) of each cloud."""
    costs = jax.vmap(cost.matrix)(points, points)
    return jnp.vecdot(jnp.matvec(costs, weights), weights)
