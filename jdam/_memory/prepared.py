"""The arrays that a geometry computes once from patterns, and fingerprints of these patterns, by
which later changes of them are detected.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, PyTree, UInt

from jdam._core import checks
from jdam._core.batching import batch_size
from jdam._core.compile import compiled, float_dtype, working_dtype
from jdam._core.progress import in_parts, is_here, rows_from
from jdam._measures.base import AnyMeasure
from jdam.geometry import Geometry

#: How many of the first and of the last numbers of each pattern a fingerprint reads. An update
#: changes all numbers, and reading all would double the time of a query.
DIGESTED = 4
#: Number of blocks, of `Geometry.batch_sizes`, that one program on the device prepares.
BLOCKS = 32


def in_dtype(geometry: Geometry, dtype: jnp.dtype) -> Geometry:
    """Return the geometry with its floats as arrays of this dtype."""

    def cast(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, float):
            return jnp.asarray(leaf, dtype)
        if not isinstance(leaf, Array | np.ndarray):
            raise TypeError(
                f"geometry must have fields that are arrays of floats, or static; got {leaf!r} for "
                f"{type(geometry).__name__}{jax.tree_util.keystr(path)}: declare it with "
                "equinox.field(static=True)"
            )
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    result: Geometry = jax.tree_util.tree_map_with_path(cast, geometry)
    return result


def checked_prior(
    patterns: AnyMeasure, log_prior: ArrayLike, *, some_on: bool = True
) -> Float[Array, " N"]:
    """Return `log_prior` as an array (N,) of the patterns' dtype. Concrete values must be finite or
    −inf and, with `some_on`, not all −inf.
    """
    num = batch_size(patterns)
    if np.ndim(log_prior) == 0 and not isinstance(log_prior, str):
        log_prior = jnp.full(num, log_prior, float_dtype(patterns))
    prior = checks.float_array("log_prior", log_prior)
    checks.same_dtype(patterns=jax.tree.leaves(patterns)[0], log_prior=prior)
    if prior.shape != (num,):
        raise ValueError(f"log_prior must have shape (N,) = ({num},); got {prior.shape}")
    if checks.is_concrete(prior):
        values = np.asarray(prior)
        if np.isnan(values).any() or (values == np.inf).any():
            raise ValueError("log_prior must be finite or −inf; got NaN or +inf")
        if some_on and num and (values == -np.inf).all():
            raise ValueError("log_prior must leave a pattern on; got −inf for all of them")
    return prior


@compiled(rounded=False)
def units(
    patterns: AnyMeasure, geometry: Geometry, occupied: Bool[Array, " N"] | None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return `Geometry.typical_norm` and `energy_tolerance` of the patterns at occupied slots."""
    weights = None
    if occupied is not None:
        weights = occupied.astype(float_dtype(patterns))
        weights = weights / weights.sum()
    return geometry.typical_norm(patterns, weights), geometry.energy_tolerance(patterns, weights)


def prepare(
    patterns: AnyMeasure, geometry: Geometry, progress: bool | None = None
) -> tuple[PyTree, Array | None]:
    """Return `Geometry.prepare` of the patterns, and their fingerprints; many patterns are prepared
    part by part, with a progress bar as in `in_parts`.
    """
    num, at_once = batch_size(patterns), BLOCKS * geometry.batch_sizes(patterns).patterns
    if num <= at_once or not is_here(patterns, geometry):
        return _prepare(patterns, geometry)
    part = partial(_prepare_some, patterns, geometry)
    prepared: tuple[PyTree, Array | None] = in_parts(part, (num,), (at_once,), "store", progress)
    return prepared


@partial(jax.jit, static_argnames="widths")
def _prepare_some(
    patterns: AnyMeasure, geometry: Geometry, start: Any, *, widths: tuple[int]
) -> tuple[PyTree, Array | None]:
    return _prepare(rows_from(patterns, start, width=widths[0]), geometry)


@compiled(rounded=False)
def _prepare(patterns: AnyMeasure, geometry: Geometry) -> tuple[PyTree, Array | None]:
    prepared = geometry.prepare(patterns)
    return prepared, None if prepared is None else fingerprint(patterns, geometry)


def fingerprint(patterns: AnyMeasure, geometry: Geometry) -> Float[Array, " N"]:
    """Return a hash of 23 bits, in [1, 2), of some numbers of each pattern and of the geometry's
    parameters.
    """
    read = [value for name, value in vars(geometry).items() if name not in geometry.unprepared]
    parameters = jax.tree.leaves(eqx.filter(read, eqx.is_inexact_array))
    num, mixed = batch_size(patterns), jnp.zeros((), jnp.uint32)
    rows = [leaf.reshape(num, -1) for leaf in jax.tree.leaves(patterns)]
    ends = [end for row in rows for end in (row[:, :DIGESTED], row[:, -DIGESTED:])]
    for numbers in ends + [leaf.reshape(1, -1) for leaf in parameters]:
        mixed = mixed * jnp.uint32(0x9E3779B1) + _digest(numbers)
    fraction = (mixed >> 9).astype(jnp.float32) * jnp.float32(2**-23)
    result: Array = (1 + fraction).astype(working_dtype(float_dtype(patterns)))
    return result


def _digest(numbers: Float[Array, "N k"]) -> UInt[Array, " N"]:
    """Return a hash of the bits of each row; −0 counts as 0, because they are equal numbers."""
    numbers = numbers.astype(working_dtype(numbers.dtype))  # as memories are computed with
    values = jnp.where(numbers == 0, 0, jax.lax.stop_gradient(numbers))
    words = jax.lax.bitcast_convert_type(values, jnp.uint32).reshape(len(numbers), -1)
    words = (words ^ (words >> 15)) * jnp.uint32(0x85EBCA6B)
    odd = 2 * jnp.arange(words.shape[1], dtype=jnp.uint32) + jnp.uint32(0x9E3779B1)
    return jnp.sum((words ^ (words >> 13)) * odd[None], axis=1, dtype=jnp.uint32)
