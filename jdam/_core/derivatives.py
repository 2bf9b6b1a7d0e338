"""Forward derivatives in full precision, of which nothing is computed that nobody asked for."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

#: The name of what is kept rather than found again in the reverse of a scan over blocks.
ITERATED = "iterated"


def full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with matrix products as precise as its numbers, where accelerators would take
    fewer digits by default. A rule of a `custom_jvp` or `custom_vmap` needs this of its own: it is
    traced when somebody differentiates or batches, outside of the function it belongs to."""

    @functools.wraps(function)
    def precise(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return precise


def jvp(
    function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    """`jax.jvp`, for the rules of a `jax.custom_jvp` with `symbolic_zeros=True`: what has the
    tangent zero counts as constant."""
    leaves, structure = jax.tree.flatten(primals)
    dleaves = jax.tree.leaves(tangents)
    moving = [i for i, dleaf in enumerate(dleaves) if moves(dleaf)]

    def of_moving(*values: Array) -> Any:
        moved = list(leaves)
        for i, value in zip(moving, values, strict=True):
            moved[i] = value
        return function(*jax.tree.unflatten(structure, moved))

    return jax.jvp(of_moving, tuple(leaves[i] for i in moving), tuple(dleaves[i] for i in moving))


def moves(tangent: Any) -> bool:
    """Whether the tangent is any other than a symbolic zero."""
    return not isinstance(tangent, SymbolicZero)


def vdot(coefficients: Array, tangent: Any) -> Array:
    """⟨c, dx⟩, at no cost where dx is a symbolic zero."""
    if moves(tangent):
        return jnp.vdot(coefficients, tangent)
    return jnp.zeros((), coefficients.dtype)
