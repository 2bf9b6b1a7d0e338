"""JAX's loops for programs that may run inside `jax.shard_map`.

There values have a type that tells along which axes of the mesh they differ among devices, and a
loop must end with the types it began with. These begin with what differs wherever the loop's
results may; anywhere else they are JAX's own.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import Array

T = TypeVar("T")
U = TypeVar("U")


def while_loop(
    unfinished: Callable[[T], Array], turn: Callable[[T], T], start: T, *others: Any
) -> T:
    """`jax.lax.while_loop`; `others` are what the functions close over."""
    start = varying(start, *others)
    end: T = jax.lax.while_loop(unfinished, lambda carry: varying(turn(carry), start), start)
    return end


def scan(
    turn: Callable[[T, Any], tuple[T, U]],
    start: T,
    items: Any,
    *others: Any,
    length: int | None = None,
) -> tuple[T, U]:
    """`jax.lax.scan`, likewise."""
    start = varying(start, items, *others)

    def typed(carry: T, item: Any) -> tuple[T, U]:
        carry, found = turn(carry, item)
        return varying(carry, start), found

    end, stacked = jax.lax.scan(typed, start, items, length)
    return end, stacked


def repeat(count: int, turn: Callable[[T], T], start: T, *others: Any) -> T:
    """`turn` so many times."""
    return scan(lambda carry, _: (turn(carry), None), start, None, *others, length=count)[0]


def varying(tree: T, *others: Any) -> T:
    """The tree, each of its leaves varying along the axes that any leaf of all these varies."""
    axes = frozenset().union(*map(_axes, jax.tree.leaves((tree, others))))
    if not axes:
        return tree

    def cast(leaf: Any) -> Any:
        missing = tuple(sorted(axes - _axes(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    cast_tree: T = jax.tree.map(cast, tree)
    return cast_tree


def _axes(leaf: Any) -> frozenset[str]:
    return frozenset(jax.typeof(leaf).mat.varying)
