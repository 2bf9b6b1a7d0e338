"""Weighted points of different numbers, filled up with points of weight 0."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

T = TypeVar("T")
#: How points, weights and what else points have are padded, as modes of `numpy.pad`.
MODES = ("edge", "constant", "edge")


def check_ragged(
    name: str, one: str, points: Sequence[ArrayLike], weights: Sequence[ArrayLike] | None
) -> dict[int, tuple[PyTree, ...]]:
    """The points (nᵢ, d) and weights (nᵢ,) of each measure, uniform where None; shapes checked."""
    points = _listed(name, one, points)
    if len(points) == 0:
        raise ValueError(f"{name} must hold at least one {one}; got an empty list")
    checked = [_as_host_array(f"{name} of {one} {i}", array) for i, array in enumerate(points)]
    for i, array in enumerate(checked):
        if array.ndim != 2 or 0 in array.shape or array.shape[1] != checked[0].shape[1]:
            expected = "(n, d), n, d ≥ 1, with one d for all"
            raise ValueError(f"{name} of {one} {i} must have shape {expected}; got {array.shape}")
    rows = {i: (array,) for i, array in enumerate(checked)}
    if weights is None:
        weights = [np.full(len(array), 1 / len(array), array.dtype) for array in checked]
    return with_arrays("weights", name, one, rows, weights)


def with_arrays(
    label: str, name: str, one: str, rows: Mapping[int, tuple[PyTree, ...]], arrays: PyTree
) -> dict[int, tuple[PyTree, ...]]:
    """The rows with an array more each, which has an entry for each point."""
    arrays = _listed(label, one, arrays)
    if len(arrays) != len(rows):
        raise ValueError(
            f"{label} must hold one array for each of {len(rows)} {one}s; got {len(arrays)}"
        )
    checked = [_as_host_array(f"{label} of {one} {i}", array) for i, array in enumerate(arrays)]
    for i, array in enumerate(checked):
        points, shape = rows[i][0], checked[0].shape[1:]
        if array.shape[:1] != points.shape[:1] or array.shape[1:] != shape:
            expected = f"one for each of {len(points)} {name}"
            raise ValueError(f"{label} of {one} {i} must be {expected}; got shape {array.shape}")
    return {i: (*row, array) for (i, row), array in zip(rows.items(), checked, strict=True)}


def build(make: Callable[..., T], one: str, rows: Mapping[int, tuple[PyTree, ...]]) -> T:
    """Return `make(points, weights, …)` of all rows as one batch, padded with weights of 0 and
    copies of all else. Errors have the number of the row."""
    size = max(len(points) for points, *_ in rows.values())
    try:
        columns = zip(zip(*rows.values(), strict=True), MODES, strict=False)
        return make(
            *(_stack(one, [_padded(x, size, mode) for x in column]) for column, mode in columns)
        )
    except (TypeError, ValueError):
        for i, row in rows.items():
            try:
                make(*row)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{one} {i}: {error}") from error
        raise


def rows_of_groups(
    groups: ArrayLike, points: np.ndarray, weights: ArrayLike | None, features: ArrayLike | None
) -> tuple[np.ndarray, PyTree]:
    """The labels of groups, and lists of the points (nᵢ, d), weights (nᵢ,) of sum 1 and features
    (nᵢ, k) of each, None where there are none."""
    labels = np.asarray(groups)
    if labels.shape != points.shape[:1]:
        expected = f"(R,) = ({len(points)},), a label for each row of points"
        raise ValueError(f"groups must have shape {expected}; got {labels.shape}")
    try:
        names, owner = np.unique(labels, return_inverse=True)
    except TypeError as error:
        raise TypeError(f"groups must be labels of one kind, as integers; got {error}") from error
    if names[-1] != names[-1]:
        raise ValueError(f"groups must have a label for each row; got {names[-1]}")
    order, ends = np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner))[:-1]
    columns: list[Any] = [np.split(points[order], ends), None, None]
    if weights is not None:
        columns[1] = np.split(_shares(weights, owner, names, points)[order], ends)
    if features is not None:
        rows = np.asarray(features)
        if rows.ndim != 2 or len(rows) != len(points):
            expected = f"(R, k) = ({len(points)}, k), k numbers for each row of points"
            raise ValueError(f"features must have shape {expected}; got {rows.shape}")
        columns[2] = np.split(rows[order], ends)
    return names, columns


def _shares(
    weights: ArrayLike, owner: np.ndarray, names: np.ndarray, points: np.ndarray
) -> np.ndarray:
    """The weights of rows, divided by their sums over groups."""
    masses = np.asarray(weights, points.dtype)
    if masses.shape != owner.shape:
        expected = f"(R,) = ({len(owner)},), one for each row of points"
        raise ValueError(f"weights must have shape {expected}; got {masses.shape}")
    if not (masses >= 0).all() or not np.isfinite(masses).all():
        raise ValueError("weights must be ≥ 0 and finite; got some that are not")
    sums = np.bincount(owner, masses)
    if not sums.all():
        raise ValueError(f"weights must not be 0 in a whole group; got {names[sums.argmin()]!r}")
    shares: np.ndarray = masses / sums[owner]
    return shares.astype(points.dtype)


def _listed(name: str, one: str, arrays: PyTree) -> list[Any]:
    try:
        return list(arrays)
    except TypeError as error:
        kind = type(arrays).__name__
        raise TypeError(f"{name} must be a list of an array for each {one}; got {kind}") from error


def _as_host_array(name: str, array: ArrayLike) -> PyTree:
    # On the host where possible: padding each shape by JAX would compile each.
    if isinstance(array, jax.core.Tracer):
        return array
    try:
        return np.asarray(array)
    except ValueError as error:
        raise ValueError(f"{name} must have rows of one length; got some that differ") from error


def _padded(array: PyTree, size: int, mode: PyTree) -> PyTree:
    widths = [(0, size - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
    return (jnp if isinstance(array, jax.core.Tracer) else np).pad(array, widths, mode=mode)


def _stack(one: str, arrays: list[Any]) -> Array | np.ndarray:
    traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
    if len({str(array.dtype) for array in arrays}) > 1:
        raise TypeError(f"{one}s must have one dtype; convert them")
    return jnp.stack(arrays) if traced else np.stack(arrays)
