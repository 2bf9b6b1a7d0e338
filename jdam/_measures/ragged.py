"""Weighted points of different numbers, filled up with points of weight 0."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

T = TypeVar("T")


def check_ragged(
    name: str, one: str, points: Sequence[ArrayLike], weights: Sequence[ArrayLike] | None
) -> dict[int, tuple[Any, Any]]:
    """The points (nᵢ, d) and weights (nᵢ,) of each measure, uniform where None; shapes checked."""
    points = _listed(name, one, points)
    if len(points) == 0:
        raise ValueError(f"{name} must hold at least one {one}; got an empty list")
    weights = None if weights is None else _listed("weights", one, weights)
    if weights is not None and len(weights) != len(points):
        raise ValueError(
            f"weights must hold one array for each of {len(points)} {one}s; got {len(weights)}"
        )
    held = [_held(f"{name} of {one} {i}", array) for i, array in enumerate(points)]
    for i, array in enumerate(held):
        if array.ndim != 2 or 0 in array.shape or array.shape[1] != held[0].shape[1]:
            wanted = "(n, d), n, d ≥ 1, with one d for all"
            raise ValueError(f"{name} of {one} {i} must have shape {wanted}; got {array.shape}")
    if weights is None:
        weights = [np.full(len(array), 1 / len(array), array.dtype) for array in held]
    masses = [_held(f"weights of {one} {i}", array) for i, array in enumerate(weights)]
    for i, (array, mass) in enumerate(zip(held, masses, strict=True)):
        if mass.shape != array.shape[:1]:
            wanted = f"one for each of {len(array)} {name}"
            raise ValueError(f"weights of {one} {i} must be {wanted}; got shape {mass.shape}")
    return dict(enumerate(zip(held, masses, strict=True)))


def build(make: Callable[[Any, Any], T], one: str, pairs: Mapping[int, tuple[Any, Any]]) -> T:
    """`make(points, weights)` of all as one padded batch; errors name the one they are about."""
    size = max(len(points) for points, _ in pairs.values())
    try:
        points = _stack(one, [_padded(points, size, mode="edge") for points, _ in pairs.values()])
        return make(points, _stack(one, [_padded(weights, size) for _, weights in pairs.values()]))
    except (TypeError, ValueError):
        for i, pair in pairs.items():
            try:
                make(*pair)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{one} {i}: {error}") from error
        raise


def _listed(name: str, one: str, arrays: Any) -> list[Any]:
    try:
        return list(arrays)
    except TypeError as error:
        kind = type(arrays).__name__
        raise TypeError(f"{name} must be a list of an array for each {one}; got {kind}") from error


def _held(name: str, array: ArrayLike) -> Any:
    # On the host where possible: padding each shape by JAX would compile each.
    if isinstance(array, jax.core.Tracer):
        return array
    try:
        return np.asarray(array)
    except ValueError as error:
        raise ValueError(f"{name} must have rows of one length; got some that differ") from error


def _padded(array: Any, size: int, **mode: Any) -> Any:
    widths = [(0, size - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
    return (jnp if isinstance(array, jax.core.Tracer) else np).pad(array, widths, **mode)


def _stack(one: str, arrays: list[Any]) -> Array | np.ndarray:
    traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
    if len({str(array.dtype) for array in arrays}) > 1:
        raise TypeError(f"{one}s must have one dtype; convert them")
    return jnp.stack(arrays) if traced else np.stack(arrays)
