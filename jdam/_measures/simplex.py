"""Weights of atoms, components and samples: checks that they are on the simplex, and their
unconstrained coordinates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam._core import checks
from jdam._core.compile import working_dtype
from jdam._core.linalg import safe_log


def weighted(
    name: str, points: ArrayLike, weights: ArrayLike | None, ragged: str
) -> tuple[Array, Array]:
    """Points (…, n, d) and their weights (…, n), uniform if None, as checked arrays.

    **Arguments:**

    - `name`: the name of the points in messages.
    - `points`, `weights`: as above.
    - `ragged`: advice in the message for lists of arrays of different shapes.

    **Raises:** `TypeError` for dtypes that are not floating or differ; `ValueError` for another
    shape and, where values are concrete, for points that are not finite and for weights that are
    not on the simplex.
    """
    array = checks.float_array(name, points, ragged=ragged)
    if array.ndim < 2 or 0 in array.shape[-2:]:
        raise ValueError(f"{name} must have shape (…, n, d), n, d ≥ 1; got {array.shape}")
    checks.finite(name, array)
    weights = uniform_weights(array) if weights is None else weights
    return array, simplex_weights(weights, **{name: array})


def simplex_weights(weights: ArrayLike, **points: Array) -> Array:
    """Return `weights` as an array (…, n), ≥ 0 and with sum one for each measure.

    **Arguments:**

    - `weights`: (…, n).
    - `points`: one keyword argument, the array (…, n, d) of the points under its name in messages.

    **Raises:** `TypeError` for another dtype than that of the points; `ValueError` for another
    shape and, where values are concrete, for weights that are not on the simplex.
    """
    ((name, array),) = points.items()
    weights = checks.float_array("weights", weights)
    checks.same_dtype(**{name: array, "weights": weights})
    if weights.shape != array.shape[:-1]:
        raise ValueError(
            f"weights must have shape (…, n) = {array.shape[:-1]}, one for each of {name}; "
            f"got {weights.shape}"
        )
    checks.finite("weights", weights)
    checks.nonnegative("weights", weights)
    if checks.is_concrete(weights):
        error, allowed = _sum_errors(weights)
        if not error <= allowed:
            raise ValueError(
                f"weights must sum to one for each measure; got sums off by up to {error:.1e}: "
                "divide by weights.sum(-1, keepdims=True)"
            )
    return weights


def uniform_weights(points: Array | np.ndarray) -> np.ndarray:
    """The weights 1/n, (…, n), of points (…, n, d), in host memory: `jnp.full` would compile a
    program for each shape."""
    return np.full(points.shape[:-1], 1 / points.shape[-2], points.dtype)


def free_weights(weights: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """Unconstrained coordinates of weights: log a, and 0 for padding (a = 0)."""
    return jnp.where(weights > 0, safe_log(weights), 0)


def weights_of(
    free: Float[Array, "*batch n"], like: Float[Array, "*batch n"]
) -> Float[Array, "*batch n"]:
    """The weights softmax(`free`), with weight 0 wherever the weights `like` are 0."""
    result: Array = jax.nn.softmax(free, where=like > 0)
    return result


def _sum_errors(weights: Array) -> tuple[float, float]:
    """The largest |Σ a − 1|, and the error that rounding explains.

    The latter is the rounding of each weight, and that of the sum by which the weights were
    normalised: a pairwise sum in their dtype, or a running sum in at least float32.
    """
    stored, size = jnp.finfo(weights.dtype), max(weights.shape[-1], 1)
    working = jnp.finfo(working_dtype(weights.dtype))
    with jax.ensure_compile_time_eval():
        xp, values = checks.within_reach(weights)
        error = float(xp.abs(values.astype(working.dtype).sum(-1) - 1).max(initial=0))
    allowed = float(stored.eps) * (2 + math.log2(size)) + float(working.eps) * 2 * math.sqrt(size)
    return error, allowed + size * float(stored.smallest_subnormal)
