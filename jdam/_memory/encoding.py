"""Measures and geometries as JSON and named arrays, and back, without running any code."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import numpy as np
from jax import Array

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

#: What is read without being passed in.
OWN: tuple[type, ...] = (
    *(Gaussian, DiagonalGaussian, PointCloud, GaussianMixture),
    *(Bures, EntropicBures, Sinkhorn, Chamfer, Aligned, MixtureWasserstein),
    *(Euclidean, DotProduct),
)


def name_of(kind: type) -> str:
    """The name of a class in a file: of others' classes the module and name to import."""
    return f"jdam.{kind.__name__}" if kind in OWN else f"{kind.__module__}:{kind.__qualname__}"


def encode(value: Any, name: str, arrays: dict[str, Any]) -> Any:
    """`value` as JSON, its arrays put among `arrays` by names that start with `name`."""
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


def decode(held: Any, array: Callable[[str], Any], classes: Mapping[str, type[eqx.Module]]) -> Any:
    """What `encode` was given, its arrays as `array` reads them, of `classes` alone.

    **Raises:** `ValueError` for a class that is not among these."""
    if not isinstance(held, dict):
        return held
    ((kind, content),) = ((k, v) for k, v in held.items() if k != "fields")
    if kind == "array":
        return array(content)
    if kind == "class":
        if content not in classes:
            raise ValueError(
                f"classes must hold {content}, which is not jdam's and is not imported for you: "
                f"jdam.load(…, classes=({content.rpartition(':')[2]},)); got {sorted(classes)}"
            )
        # As a pytree is unflattened: no constructor runs.
        made = object.__new__(classes[content])
        for field in dataclasses.fields(made):
            # A file of before there was a field has its default.
            given = field.name in held["fields"] or field.default is dataclasses.MISSING
            value = decode(held["fields"][field.name], array, classes) if given else field.default
            object.__setattr__(made, field.name, value)
        return made
    if kind == "dict":
        return {key: decode(x, array, classes) for key, x in content.items()}
    items = [decode(x, array, classes) for x in content]
    return tuple(items) if kind == "tuple" else items
