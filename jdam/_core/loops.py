"""JAX's loops, for programs that may run inside `jax.shard_map`.

There the type of a value records the mesh axes along which it differs among devices, and the carry
of a loop must keep its type. These loops cast the initial carry to vary along all axes along which
the result may vary. Outside of `jax.shard_map` they are JAX's own.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

T = TypeVar("T")
U = TypeVar("U")


def while_loop(
    cond_fun: Callable[[T], Array], body_fun: Callable[[T], T], start: T, *others: Any
) -> T:
    """Run `jax.lax.while_loop`; `others` are the values that the functions close over."""
    start = varying(start, *others)
    end: T = jax.lax.while_loop(cond_fun, lambda carry: varying(body_fun(carry), start), start)
    return end


def scan(
    body_fun: Callable[[T, PyTree], tuple[T, U]],
    start: T,
    items: PyTree,
    *others: Any,
    length: int | None = None,
) -> tuple[T, U]:
    """Run `jax.lax.scan`; `others` are the values that the function closes over."""
    start = varying(start, items, *others)

    def typed(carry: T, item: PyTree) -> tuple[T, U]:
        carry, output = body_fun(carry, item)
        return varying(carry, start), output

    end, stacked = jax.lax.scan(typed, start, items, length)
    return end, stacked


def cond(
    condition: Array, function: Callable[[T], T], other: Callable[[T], T], start: T, *others: Any
) -> T:
    """Run `jax.lax.cond`; `others` are the values that the functions close over."""
    start = varying(start, *others)
    branches = [lambda carry, f=f: varying(f(carry), start) for f in (function, other)]
    end: T = jax.lax.cond(condition, *branches, start)
    return end


def repeat(count: int, body_fun: Callable[[T], T], start: T, *others: Any) -> T:
    """Apply `body_fun` to the carry `count` times."""
    return scan(lambda carry, _: (body_fun(carry), None), start, None, *others, length=count)[0]


def bisect(
    holds: Callable[[Array], Array], low: Array, high: Array, count: int, *others: Any
) -> tuple[Array, Array]:
    """Return the ends of the interval in which a condition that `holds` at `low` ceases to hold,
    after `count` bisections of [`low`, `high`]."""

    def halve(ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        here = holds(middle)
        return jnp.where(here, middle, low), jnp.where(here, high, middle)

    return repeat(count, halve, (low, high), *others)


def zeros_of(function: Callable[..., Any], *args: Any) -> PyTree:
    """Return zeros in the shapes of `function(*args)`, which is not computed."""
    return jax.tree.map(jnp.zeros_like, jax.eval_shape(function, *args))


def stacked(*trees: PyTree) -> PyTree:
    """Return the trees along a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def varying(tree: T, *others: Any) -> T:
    """Cast each leaf of the tree to vary along the union of the axes of all leaves and `others`."""
    axes = frozenset().union(*map(_axes, jax.tree.leaves((tree, others))))
    if not axes:
        return tree

    def cast(leaf: Array) -> Array:
        missing = tuple(sorted(axes - _axes(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    cast_tree: T = jax.tree.map(cast, tree)
    return cast_tree


def _axes(leaf: Array) -> frozenset[str]:
    return frozenset(jax.typeof(leaf).mat.varying)
