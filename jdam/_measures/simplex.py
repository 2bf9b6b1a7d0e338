"""Weights of points: distributions, and how exactly they can be."""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam._core import checks
from jdam._core.compile import working_dtype
from jdam._core.linalg import long_sum, safe_log


def simplex_weights(weights: ArrayLike, **points: Array) -> Array:
    """`weights` checked to be one distribution over the points (…, n, d) of each measure."""
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
        error, allowed = _off_one(weights)
        if not error <= allowed:
            raise ValueError(
                f"weights must sum to one for each measure; got sums off by up to {error:.1e}: "
                "divide by weights.sum(-1, keepdims=True)"
            )
    return weights


def free_weights(weights: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """Coordinates without constraints: logarithms, 0 for padding."""
    return jnp.where(weights > 0, safe_log(weights), 0)


def weights_of(
    free: Float[Array, "*batch n"], like: Float[Array, "*batch n"]
) -> Float[Array, "*batch n"]:
    """The weights at free coordinates, with the padding of others."""
    result: Array = jax.nn.softmax(free, where=like > 0)
    return result


def _off_one(weights: Array) -> tuple[float, float]:
    """How far sums of weights are from 1, and how far rounding can take those of good weights:
    that of each weight, and that of the sum they were divided by, which is pairwise in their own
    dtype or in order in one of at least 32 bits."""
    own, size = jnp.finfo(weights.dtype), max(weights.shape[-1], 1)
    inside = jnp.finfo(working_dtype(weights.dtype))
    with jax.ensure_compile_time_eval():
        sums = long_sum(weights.astype(inside.dtype))
        error = float(jnp.abs(sums - 1).max(initial=0))
    allowed = float(own.eps) * (2 + math.log2(size)) + float(inside.eps) * 2 * math.sqrt(size)
    return error, allowed + size * float(own.smallest_subnormal)
