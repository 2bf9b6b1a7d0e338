"""Helpers for rules of `jax.custom_jvp`: full precision, and no work for symbolic zeros."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jaxtyping import PyTree

#: Checkpoint name of results of iterative solvers: the reverse pass of a scan over blocks stores
#: them instead of solving again.
ITERATED = "iterated"


def full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with matrix products in the full precision of their dtype, which
    accelerators lower by default.

    Rules of a `custom_jvp` or `custom_vmap` need this decorator of their own, since they are traced
    later than the function they belong to, outside of its context."""

    @functools.wraps(function)
    def precise(*args: Any, **kwargs: Any) -> PyTree:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return precise


def jvp(
    function: Callable[..., Any], primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> tuple[PyTree, PyTree]:
    """Compute `jax.jvp` in a rule of a `jax.custom_jvp` with `symbolic_zeros=True`; primals whose
    tangent is a symbolic zero count as constants."""
    leaves, structure = jax.tree.flatten(primals)
    dleaves = jax.tree.leaves(tangents)
    moving = [i for i, dleaf in enumerate(dleaves) if moves(dleaf)]

    def of_moving(*values: Array) -> PyTree:
        moved = list(leaves)
        for i, value in zip(moving, values, strict=True):
            moved[i] = value
        return function(*jax.tree.unflatten(structure, moved))

    return jax.jvp(of_moving, tuple(leaves[i] for i in moving), tuple(dleaves[i] for i in moving))


@jax.custom_jvp
def with_value(value: PyTree, variable: PyTree) -> PyTree:
    """Return `value`, with the derivative of `variable`, whose value is the same but need not be
    computed then."""
    return value


@with_value.defjvp
def _with_value_jvp(
    primals: tuple[PyTree, PyTree], tangents: tuple[PyTree, PyTree]
) -> tuple[PyTree, PyTree]:
    return primals[0], tangents[1]


def moves(tangent: PyTree) -> bool:
    """Return whether the tangent is no symbolic zero."""
    return not isinstance(tangent, SymbolicZero)


def vdot(coefficients: Array, tangent: PyTree) -> Array:
    """Compute ⟨c, dx⟩, at no cost if dx is a symbolic zero."""
    if moves(tangent):
        return jnp.vdot(coefficients, tangent)
    return jnp.zeros((), coefficients.dtype)
