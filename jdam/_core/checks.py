"""Argument checks, whose messages name the argument, the requirement and the value."""

import contextlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree


def is_concrete(*arrays: Array | np.ndarray) -> bool:
    """Return whether no array is traced, so that values can be read."""
    return not any(isinstance(x, jax.core.Tracer) for x in arrays)


def kept_concrete(tree: PyTree) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which computations with a concrete `tree` stay concrete, even while
    `jax.jit` or `jax.eval_shape` traces."""
    if is_concrete(*jax.tree.leaves(tree)):
        context: contextlib.AbstractContextManager[Any] = jax.ensure_compile_time_eval()
        return context
    return contextlib.nullcontext()


#: Default advice of `float_array` for lists of arrays of different lengths.
RAGGED = "jdam.PointCloud.from_ragged and jdam.Gaussian.from_ragged_samples take those"


def float_array(name: str, value: ArrayLike, *, ragged: str = RAGGED, cure: str = "") -> Array:
    """Return `value` as a JAX array of floating dtype.

    **Arguments:**

    - `name`: the argument's name, for messages.
    - `value`: an array, or nested lists of numbers.
    - `ragged`: advice in the message for arrays of different shapes.
    - `cure`: advice in the message for other types and dtypes.

    **Raises:** `TypeError` for values that are not arrays of floats."""
    try:
        # Unlike `asarray`, `device_put` compiles nothing.
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
    """Return whether `value` is a list or an object array with entries of different shapes."""
    listed = isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)
    if not listed:
        return False
    try:
        return len({_shape(entry) for entry in value}) > 1
    except ValueError:  # an entry is itself ragged
        return True


def _shape(entry: object) -> tuple[int, ...]:
    return np.shape(entry) if isinstance(entry, list | tuple) else getattr(entry, "shape", ())


def _describe(value: Any) -> str:
    """Return a description of a value that is no array of floats, for messages."""
    if _is_ragged(value):
        return f"{len(value)} arrays of different shapes"
    if hasattr(value, "dtype"):
        return f"dtype {value.dtype}"
    kind = type(value).__name__
    return f"a {kind} of {type(value[0]).__name__}" if isinstance(value, list | tuple) else kind


def same_dtype(**arrays: Array) -> None:
    """Raise `TypeError` unless the arrays, passed as keywords, have one dtype."""
    (first, head), *rest = arrays.items()
    for name, array in rest:
        if array.dtype != head.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first}, {head.dtype}; got {array.dtype}: "
                "convert one of them"
            )


def within_reach(array: Array | np.ndarray) -> tuple[PyTree, PyTree]:
    """Return NumPy and the values if they are in host memory, else `jax.numpy` and the array. NumPy
    avoids one compilation for each new shape."""
    if isinstance(array, Array):
        here = array.is_fully_addressable and all(d.platform == "cpu" for d in array.devices())
        return (np, np.asarray(array)) if here else (jnp, array)
    return np, array


def finite(name: str, array: Array | np.ndarray) -> None:
    """Raise `ValueError` if a concrete array has NaN or infinite entries; traced arrays pass."""
    if is_concrete(array):
        with jax.ensure_compile_time_eval():
            xp, values = within_reach(array)
            bad = int((~xp.isfinite(values)).sum())
        if bad:
            raise ValueError(
                f"{name} must be finite; got {bad} of {array.size} entries NaN or infinite"
            )


def nonnegative(name: str, array: Array) -> None:
    """Raise `ValueError` if a concrete array has negative entries; traced arrays pass."""
    if is_concrete(array) and array.size:
        with jax.ensure_compile_time_eval():
            lowest = float(within_reach(array)[1].min())
        if lowest < 0:
            raise ValueError(f"{name} must be ≥ 0; got {lowest:g}")


def positive(name: str, value: Any, dtype: jnp.dtype, *, or_zero: bool = False) -> Array:
    """Return `value` as a finite, positive 0-d array of `dtype`; a traced value that is not
    positive becomes NaN.

    **Arguments:**

    - `name`: the argument's name, for messages.
    - `value`: a real number.
    - `dtype`: the floating dtype of the result.
    - `or_zero`: whether 0 is allowed.

    **Raises:** `TypeError` for values that are not real numbers; `ValueError` for arrays that are
    not scalar and for numbers out of range."""
    condition = "≥ 0" if or_zero else "> 0"
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
        raise ValueError(f"{name} must be finite and {condition}; got {number:g}")
    if not float(limits.tiny) <= number <= float(limits.max):
        raise ValueError(f"{name} must be within the range of {dtype}; got {number:g}")
    scalar: Array = jax.device_put(np.asarray(number, dtype))  # compiles nothing
    return scalar


def scalar_dtype(value: object) -> jnp.dtype:
    """Return the dtype of a floating array, else JAX's default floating dtype."""
    if isinstance(value, Array) and jnp.issubdtype(value.dtype, jnp.floating):
        return value.dtype
    return jnp.zeros(()).dtype


def index(i: object, size: int, what: str) -> None:
    """Raise `IndexError` if the concrete integer `i` is out of range, because JAX would clamp it;
    other indices pass."""
    if isinstance(i, int | np.integer) and not -size <= i < size:
        raise IndexError(f"index {i} is out of range for {what} of {size}")


def positive_int(name: str, value: object) -> int:
    """Return `value` as an int ≥ 1, or raise `TypeError` or `ValueError`."""
    return int_at_least(1, name, value)


def int_at_least(least: int, name: str, value: object) -> int:
    """Return `value` as an int ≥ `least`, or raise `TypeError` or `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be ≥ {least}; got {value}")
    return int(value)
