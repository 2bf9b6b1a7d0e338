"""Values of the patterns of a memory: a pytree of arrays (N, …)."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

if TYPE_CHECKING:
    from jdam._memory.memory import Memory

KINDS = (jnp.floating, jnp.integer, jnp.bool_)


def checked_values(values: PyTree, num: int) -> PyTree:
    """Return `values` as a pytree of arrays with `num` entries each."""
    arrays = as_arrays(values)
    if not jax.tree.leaves(arrays):
        raise ValueError(f"values must be an array (N, …), or a pytree of them; got {values!r}")

    def check(path: Any, leaf: Array) -> None:
        if leaf.shape[:1] != (num,):
            expected = f"(N, …), an entry for each of N = {num} patterns"
            raise ValueError(f"{name_of(path)} must have shape {expected}; got {leaf.shape}")

    jax.tree_util.tree_map_with_path(check, arrays)
    return arrays


def values_for(memory: "Memory", values: PyTree, num: int) -> PyTree:
    """Return `values` of `num` patterns as a pytree like the memory's. For a single pattern the
    leading axis may be missing.
    """
    if values is None and memory.values is not None:
        raise ValueError("values must be given, one for each of patterns: the memory has values")
    if values is None:
        return None
    if memory.values is None:
        raise ValueError(
            "values must be None: the memory has none; jdam.store(patterns, values=…) keeps them"
        )
    arrays = as_arrays(values)
    actual: PyTree = jax.tree.structure(arrays)
    structure: PyTree = jax.tree.structure(memory.values)
    if actual != structure:
        raise TypeError(f"values must be a pytree like the memory's, {structure}; got {actual}")

    def fit(path: Any, leaf: Array, stored: Array) -> Array:
        if num == 1 and leaf.shape == stored.shape[1:]:
            leaf = leaf[None]
        shape = (num, *stored.shape[1:])
        if leaf.shape != shape:
            raise ValueError(f"{name_of(path)} must have shape {shape}; got {leaf.shape}")
        if leaf.dtype != stored.dtype:
            raise TypeError(
                f"{name_of(path)} must have the dtype of the memory's, {stored.dtype}; "
                f"got {leaf.dtype}: convert it"
            )
        return leaf

    return jax.tree_util.tree_map_with_path(fit, arrays, memory.values)


def as_arrays(values: PyTree) -> PyTree:
    """Return a pytree of arrays. A list is an array; other containers are pytrees."""
    convert = jax.tree_util.tree_map_with_path
    return convert(_as_array, values, is_leaf=lambda value: isinstance(value, list))


def _as_array(path: Any, value: Any) -> Array:
    name = name_of(path)
    try:
        array: PyTree = value if isinstance(value, Array) else np.asarray(value)
    except ValueError as error:
        got = "a list of arrays of different shapes: a tuple of arrays is a pytree"
        raise TypeError(f"{name} must be an array; got {got}") from error
    if not any(jnp.issubdtype(array.dtype, kind) for kind in KINDS):
        raise TypeError(
            f"{name} must hold numbers or booleans; got dtype {array.dtype}: number labels"
        )
    if isinstance(array, Array):
        return array
    on_device: Array = jax.device_put(array)  # `jnp` would compile
    rounded = jnp.issubdtype(array.dtype, jnp.floating) or on_device.dtype == array.dtype
    if not rounded and (array.astype(on_device.dtype) != array).any():
        raise ValueError(
            f"{name} must be within the range of {on_device.dtype}, unless JAX has "
            "jax.config.update('jax_enable_x64', True)"
        )
    return on_device


def name_of(path: Any) -> str:
    """Return the name of a leaf of values in errors."""
    return "values" + jax.tree_util.keystr(path)
