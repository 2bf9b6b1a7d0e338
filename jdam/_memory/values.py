"""Values that go with the patterns of a memory: a pytree of arrays (N, …)."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

if TYPE_CHECKING:
    from jdam._memory.memory import Memory

KINDS = (jnp.floating, jnp.integer, jnp.bool_)


def checked_values(values: Any, num: int) -> Any:
    """`values` as a pytree of arrays, each with an entry for each of `num` patterns."""
    arrays = as_arrays(values)
    if not jax.tree.leaves(arrays):
        raise ValueError(f"values must be an array (N, …), or a pytree of them; got {values!r}")

    def check(path: Any, leaf: Array) -> None:
        if leaf.shape[:1] != (num,):
            wanted = f"(N, …), an entry for each of N = {num} patterns"
            raise ValueError(f"{name_of(path)} must have shape {wanted}; got {leaf.shape}")

    jax.tree_util.tree_map_with_path(check, arrays)
    return arrays


def values_for(memory: "Memory", values: Any, num: int) -> Any:
    """Values of `num` patterns that are like the memory's. For a single pattern the leading axis
    may be left out."""
    if values is None and memory.values is not None:
        raise ValueError("values must be given, one for each of patterns: the memory has values")
    if values is None:
        return None
    if memory.values is None:
        raise ValueError(
            "values must be None: the memory has none; jdam.store(patterns, values=…) keeps them"
        )
    arrays = as_arrays(values)
    got: Any = jax.tree.structure(arrays)
    structure: Any = jax.tree.structure(memory.values)
    if got != structure:
        raise TypeError(f"values must be a pytree like the memory's, {structure}; got {got}")

    def fit(path: Any, leaf: Array, held: Array) -> Array:
        if num == 1 and leaf.shape == held.shape[1:]:
            leaf = leaf[None]
        wanted = (num, *held.shape[1:])
        if leaf.shape != wanted:
            raise ValueError(f"{name_of(path)} must have shape {wanted}; got {leaf.shape}")
        if leaf.dtype != held.dtype:
            raise TypeError(
                f"{name_of(path)} must have the dtype of the memory's, {held.dtype}; "
                f"got {leaf.dtype}: convert it"
            )
        return leaf

    return jax.tree_util.tree_map_with_path(fit, arrays, memory.values)


def as_arrays(values: Any) -> Any:
    """A pytree of arrays. A list is an array; tuples, dicts and other containers are pytrees."""
    convert = jax.tree_util.tree_map_with_path
    return convert(_as_array, values, is_leaf=lambda value: isinstance(value, list))


def _as_array(path: Any, value: Any) -> Array:
    name = name_of(path)
    try:
        array: Any = value if isinstance(value, Array) else np.asarray(value)
    except ValueError as error:
        got = "a list of arrays of different shapes: a tuple of arrays is a pytree"
        raise TypeError(f"{name} must be an array; got {got}") from error
    if not any(jnp.issubdtype(array.dtype, kind) for kind in KINDS):
        raise TypeError(
            f"{name} must hold numbers or booleans; got dtype {array.dtype}: number labels"
        )
    if isinstance(array, Array):
        return array
    found: Array = jax.device_put(array)  # which compiles nothing
    rounded = jnp.issubdtype(array.dtype, jnp.floating) or found.dtype == array.dtype
    if not rounded and (np.asarray(found) != array).any():
        raise ValueError(
            f"{name} must be within the range of {found.dtype}, unless JAX has "
            "jax.config.update('jax_enable_x64', True)"
        )
    return found


def name_of(path: Any) -> str:
    """What errors call a leaf of values."""
    return "values" + jax.tree_util.keystr(path)
