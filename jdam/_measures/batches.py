"""Concatenation of measures of any kind: single measures to a batch, and two batches to one."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdam._core import checks
from jdam._measures.base import AnyMeasure, Measure, check_like


def stack(measures: Sequence[AnyMeasure]) -> AnyMeasure:
    """Stack single measures of one kind, or vectors, to one batch (N,).

    Measures of different sizes are padded where their kind allows it: factors of Gaussians with
    zero columns to the largest rank, clouds with atoms of weight 0 to the largest number of atoms.

    **Arguments:**

    - `measures`: a list of N `jdam.Measure`s without batch axes, or of N arrays (d,).

    **Returns:** a measure of batch shape (N,), or an array (N, d).

    **Raises:** `TypeError` for measures of different kinds or dtypes; `ValueError` for batches, for
    different dimensions and for an empty list. The message names the first element at fault.
    """
    if not isinstance(measures, list | tuple):
        kind = type(measures).__name__
        raise TypeError(f"measures must be a list of single measures; got {kind}")
    if not measures:
        raise ValueError("measures must hold at least one measure; got an empty list")
    single = [_single(f"measures[{i}]", measure) for i, measure in enumerate(measures)]
    for i, measure in enumerate(single[1:], start=1):
        check_like(f"measures[{i}]", measure, single[0], "measures[0]")
    # NumPy stacks concrete values, since JAX would compile a program for each shape.
    if all(checks.is_concrete(*jax.tree.leaves(measure)) for measure in single):
        padded = _padded_to_largest(jax.tree.map(np.asarray, single))
        return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *padded)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *_padded_to_largest(single))


def join(first: AnyMeasure, second: AnyMeasure) -> AnyMeasure:
    """The concatenation (N + M,) of two batches (N,) and (M,) of one kind, padded as by `stack`."""
    check_like("second", second, first, "first")
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), *_padded_to_largest([first, second]))


def as_batch(measures: AnyMeasure) -> AnyMeasure:
    """Return `stack(measures)` for a list of `Measure`s, and anything else as it is."""
    is_list = isinstance(measures, list | tuple) and len(measures) > 0
    return stack(measures) if is_list and isinstance(measures[0], Measure) else measures


def as_row(measure: AnyMeasure) -> AnyMeasure:
    """The batch (1,) of a single measure."""

    def row(leaf: Array | np.ndarray) -> Array | np.ndarray:
        # NumPy indexes concrete values, since JAX would compile a program for each shape.
        return np.asarray(leaf)[None] if checks.is_concrete(leaf) else leaf[None]

    return jax.tree.map(row, measure)


def _single(name: str, measure: AnyMeasure) -> AnyMeasure:
    """Return `measure`, or raise an error if it is not one measure or a vector (d,) of floats."""
    if isinstance(measure, Measure):
        if measure.batch_shape:
            raise ValueError(
                f"{name} must be a single measure, batch shape (); got {measure.batch_shape}"
            )
        return measure
    # NumPy arrays stay on the host, where `stack` may pad them.
    array = measure if isinstance(measure, np.ndarray) else checks.float_array(name, measure)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be a jdam.Measure or an array of floats; got dtype {array.dtype}"
        )
    if array.ndim != 1:
        raise ValueError(f"{name} must be a vector (d,); got shape {array.shape}")
    return array


def _padded_to_largest(measures: Sequence[AnyMeasure]) -> list[AnyMeasure]:
    """The measures, padded along each axis of `padding` to the largest size among them."""
    first = measures[0]
    if not isinstance(first, Measure):
        return list(measures)
    sizes = {axis: max(measure.sizes[axis] for measure in measures) for axis in first.padding}
    return [measure.padded(**sizes) for measure in measures]
