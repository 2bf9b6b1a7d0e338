"""Argument checks. Every message names the argument, what it got and what it wants."""

import contextlib
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


def kept_concrete(tree: Any) -> contextlib.AbstractContextManager[Any]:
    """In which what is computed of the tree is concrete if the tree is, even where `jax.jit` or
    `jax.eval_shape` would trace it."""
    if is_concrete(*jax.tree.leaves(tree)):
        kept: contextlib.AbstractContextManager[Any] = jax.ensure_compile_time_eval()
        return kept
    return contextlib.nullcontext()


#: What takes lists of arrays of different lengths, unless a caller knows better.
RAGGED = "jdam.PointCloud.from_ragged and jdam.Gaussian.from_ragged_samples take those"


def float_array(name: str, value: ArrayLike, *, ragged: str = RAGGED, cure: str = "") -> Array:
    """`value` as a JAX array of floating dtype. An error says what to do: with arrays of different
    shapes what `ragged` says, with other dtypes what `cure` does, if anything."""
    try:
        # `device_put` compiles nothing.
        put: Any = jax.device_put if isinstance(value, np.ndarray) else jnp.asarray
        array: Array = put(value)
    except (TypeError, ValueError) as error:
        advice = ragged if _is_ragged(value) else cure
        got = _describe(value) + (f": {advice}" if advice else "")
        raise TypeError(f"{name} must be an array of floats; got {got}") from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        advice = cure or f"convert it explicitly, for example {name}.astype('float32')"
        raise TypeError(f"{name} must have a floating dtype; got {array.dtype}: {advice}")
    return array


def _is_ragged(value: Any) -> bool:
    """Whether it is a list, or an array of objects, of arrays of different shapes."""
    listed = isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)
    if not listed:
        return False
    try:
        return len({_shape(entry) for entry in value}) > 1
    except ValueError:  # a list among them is ragged itself
        return True


def _shape(entry: Any) -> tuple[int, ...]:
    return np.shape(entry) if isinstance(entry, list | tuple) else getattr(entry, "shape", ())


def _describe(value: Any) -> str:
    """What it is, instead of an array of floats."""
    if _is_ragged(value):
        return f"{len(value)} arrays of different shapes"
    if hasattr(value, "dtype"):
        return f"dtype {value.dtype}"
    kind = type(value).__name__
    return f"a {kind} of {type(value[0]).__name__}" if isinstance(value, list | tuple) else kind


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
