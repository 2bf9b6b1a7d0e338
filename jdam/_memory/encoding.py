"""Measures and geometries as JSON and named arrays, decoded without running any code."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import numpy as np
from jax import Array
from jaxtyping import PyTree

from jdam._measures.base import Measure
from jdam._measures.gaussian import DiagonalGaussian, Gaussian
from jdam._measures.mixture import GaussianMixture
from jdam._measures.point_cloud import PointCloud
from jdam.geometry import (
    Aligned,
    Bures,
    Chamfer,
    DotProduct,
    EntropicBures,
    Euclidean,
    Geometry,
    MixtureWasserstein,
    Sinkhorn,
)
from jdam.geometry.euclidean import Landmarks

#: Classes that can be decoded without being passed as `classes`.
OWN: tuple[type, ...] = (
    *(Gaussian, DiagonalGaussian, PointCloud, GaussianMixture),
    *(Bures, EntropicBures, Sinkhorn, Chamfer, Aligned, MixtureWasserstein),
    *(Euclidean, Landmarks, DotProduct),
)


def name_of(kind: type) -> str:
    """Return the name of a class in a file; for classes outside of jdam it is module:class."""
    return f"jdam.{kind.__name__}" if kind in OWN else f"{kind.__module__}:{kind.__qualname__}"


def encode(value: Any, name: str, arrays: dict[str, Any]) -> PyTree:
    """Return `value` as JSON; its arrays are added to `arrays`, under names that start with
    `name`.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Array | np.ndarray):
        arrays[name] = value
        return {"array": name}
    if isinstance(value, Measure | Geometry):
        fields = {
            field.name: encode(getattr(value, field.name), f"{name}.{field.name}", arrays)
            for field in dataclasses.fields(value)
        }
        return {"class": name_of(type(value)), "fields": fields}
    if type(value) in (tuple, list):
        return {
            type(value).__name__: [encode(x, f"{name}.{i}", arrays) for i, x in enumerate(value)]
        }
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(x, f"{name}.{key}", arrays) for key, x in value.items()}}
    raise TypeError(
        f"{name} must be an array, None, a bool, int, float or string, or a tuple, list or dict of "
        f"these, to be saved; got {value!r}"
    )


def decode(
    encoded: PyTree, array: Callable[[str], PyTree], classes: Mapping[str, type[eqx.Module]]
) -> PyTree:
    """Return the value that `encode` was given; `array` reads arrays by name, `classes` has classes
    by name.

    **Raises:** `ValueError` for a class that is not in `classes`.
    """
    if not isinstance(encoded, dict):
        return encoded
    ((kind, content),) = ((k, v) for k, v in encoded.items() if k != "fields")
    if kind == "array":
        return array(content)
    if kind == "class":
        if content not in classes:
            raise ValueError(
                f"classes must hold {content}, which is not jdam's and is not imported for you: "
                f"jdam.load(…, classes=({content.rpartition(':')[2]},)); got {sorted(classes)}"
            )
        # No constructor runs, as when a pytree is unflattened.
        instance = object.__new__(classes[content])
        for field in dataclasses.fields(instance):
            # A field that is newer than the file has its default.
            stored = field.name in encoded["fields"] or field.default is dataclasses.MISSING
            value = (
                decode(encoded["fields"][field.name], array, classes) if stored else field.default
            )
            object.__setattr__(instance, field.name, value)
        return instance
    if kind == "dict":
        return {key: decode(x, array, classes) for key, x in content.items()}
    items = [decode(x, array, classes) for x in content]
    return tuple(items) if kind == "tuple" else items
