"""Ground costs given as an `ott.geometry.costs.CostFn`."""

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree

from jdam._core.derivatives import full_precision
from jdam._entropic.cost import Cost


@dataclasses.dataclass(frozen=True)
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
