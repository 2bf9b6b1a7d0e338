"""Argument checks. Every message names the argument, what it got and what it wants."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


def is_concrete(*arrays: Array | np.ndarray) -> bool:
    """Whether the values can be looked at, which is not so under jit, vmap or grad."""
    return not any(isinstance(x, jax.core.Tracer) for x in arrays)


def float_array(name: str, value: ArrayLike) -> Array:
    """`value` as a JAX array of floating dtype."""
    try:
        # `device_put` compiles nothing.
        put: Any = jax.device_put if isinstance(value, np.ndarray) else jnp.asarray
        array: Array = put(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array of floats; got {type(value).__name__}") from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{name} must have a floating dtype; got {array.dtype}: convert it explicitly, "
            f"for example {name}.astype('float32')"
        )
    return array


def same_dtype(**arrays: Array) -> None:
    """Raise unless the arrays, passed by their names, have one dtype."""
    (first, head), *rest = arrays.items()
    for name, array in rest:
        if array.dtype != head.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first}, {head.dtype}; got {array.dtype}: "
                "convert one of them"
            )


def _within_reach(array: Array | np.ndarray) -> tuple[Any, Any]:
    """NumPy and the values where they are in the host's memory, for every new shape of a JAX array
    is compiled; else JAX and the array."""
    if isinstance(array, Array):
        here = array.is_fully_addressable and all(d.platform == "cpu" for d in array.devices())
        return (np, np.asarray(array)) if here else (jnp, array)
    return np, array


def finite(name: str, array: Array | np.ndarray) -> None:
    """Raise if a concrete array holds NaN or infinity; traced values pass."""
    if is_concrete(array):
        with jax.ensure_compile_time_eval():
            xp, values = _within_reach(array)
            bad = int((~xp.isfinite(values)).sum())
        if bad:
            raise ValueError(
                f"{name} must be finite; got {bad} of {array.size} entries NaN or infinite"
            )


def nonnegative(name: str, array: Array) -> None:
    """Raise if a concrete array holds a negative entry; traced values pass."""
    if is_concrete(array) and array.size:
        with jax.ensure_compile_time_eval():
            lowest = float(_within_reach(array)[1].min())
        if lowest < 0:
            raise ValueError(f"{name} must be ≥ 0; got {lowest:g}")


def positive(name: str, value: Any, dtype: jnp.dtype, *, or_zero: bool = False) -> Array:
    """`value` as a 0-d array of `dtype`, finite and > 0; NaN where a traced value is not > 0. Or
    ≥ 0 likewise."""
    wanted = "≥ 0" if or_zero else "> 0"
    array = value if isinstance(value, Array) else np.asarray(value)
    real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    if not real:
        raise TypeError(f"{name} must be a real number; got {value!r}")
    if array.ndim != 0:
        raise ValueError(
            f"{name} must be a scalar; got shape {array.shape}: use jax.vmap over {name}"
        )
    if isinstance(array, jax.core.Tracer):
        array = array.astype(dtype)
        return jnp.where(array >= 0 if or_zero else array > 0, array, jnp.nan)
    number, limits = float(array), jnp.finfo(dtype)
    if or_zero and number == 0:
        return jnp.zeros((), dtype)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be finite and {wanted}; got {number:g}")
    if not float(limits.tiny) <= number <= float(limits.max):
        raise ValueError(f"{name} must be within the range of {dtype}; got {number:g}")
    scalar: Array = jax.device_put(np.asarray(number, dtype))  # which compiles nothing
    return scalar


def nonnegative_scalar(name: str, value: Any, dtype: jnp.dtype) -> Array:
    """As `positive`, with 0 allowed."""
    return positive(name, value, dtype, or_zero=True)


def scalar_dtype(value: Any) -> jnp.dtype:
    """The floating dtype of an array, and JAX's default one for other numbers."""
    if isinstance(value, Array) and jnp.issubdtype(value.dtype, jnp.floating):
        return value.dtype
    return jnp.zeros(()).dtype


def index(i: Any, size: int, what: str) -> None:
    """Raise if the integer `i` is out of range, which JAX would clamp; other indices pass."""
    if isinstance(i, int | np.integer) and not -size <= i < size:
        raise IndexError(f"index {i} is out of range for {what} of {size}")


def positive_int(name: str, value: Any) -> int:
    """`value` as an int ≥ 1."""
    return int_at_least(1, name, value)


def int_at_least(least: int, name: str, value: Any) -> int:
    """`value` as an int ≥ `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be ≥ {least}; got {value}")
    return int(value)
