"""The base class `Measure`, and functions that accept a measure of any kind or a vector.

Axes, sizes, padding and coordinates are derived here from the annotations of a subclass, so that
the other folders need no case for each kind of measure.
"""

import functools
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, TypeAlias, TypeVar, get_args, get_type_hints

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from jdam._core import checks
from jdam._core.compile import float_dtype

#: A `Measure`, an array (…, d) of vectors, or any other pytree of arrays that a geometry accepts.
AnyMeasure: TypeAlias = PyTree
M = TypeVar("M")
Kind = TypeVar("Kind", bound="Measure")


class Measure(eqx.Module):
    """A probability measure, or a batch of them: a frozen pytree.

    A subclass declares the axes of its arrays by jaxtyping annotations, the batch axes first:

        class Uniform(jdam.Measure):
            centre: Float[Array, "*batch d"]
            radius: Float[Array, "*batch"]

    All fields with such an annotation have the same batch axes, and `d` is the dimension of the
    space. `batch_shape`, `dim`, `dtype`, indexing and the repr are derived from the annotations.
    An array whose annotation allows None is optional.

    A subclass whose arrays are constrained overrides `unconstrained` and `constrained`, which
    optimizers use. A subclass in which different arrays represent the same measure overrides
    `gauge`. A subclass whose measures of different sizes can be stored together, as clouds of few
    and of many atoms, sets `padding`, which must not change the measure.
    """

    #: {axis: {array: mode}} for the axes that can be padded; `mode` is one of `numpy.pad`, where
    #: "constant" means zeros.
    padding: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    #: Names of arrays that neither recall nor an optimizer changes; `constrained` copies them from
    #: its `self`.
    constants: ClassVar[tuple[str, ...]] = ()

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of the batch: () for a single measure."""
        name, axes = next(iter(_axes(type(self)).items()))
        array = getattr(self, name)
        return tuple(array.shape[: array.ndim - len(axes)])

    @property
    def dim(self) -> int:
        """The dimension d of the space on which the measure is defined."""
        if "d" not in self.sizes:
            raise AttributeError(f"{type(self).__name__} declares no axis d")
        return self.sizes["d"]

    @property
    def sizes(self) -> dict[str, int]:
        """The lengths of the axes of a single measure, by name."""
        sizes: dict[str, int] = {}
        for name, axes in _axes(type(self)).items():
            if getattr(self, name) is not None:
                shape = getattr(self, name).shape
                sizes |= dict(zip(axes, shape[len(shape) - len(axes) :], strict=True))
        return sizes

    @property
    def dtype(self) -> jnp.dtype:
        """The floating dtype of the arrays."""
        return float_dtype(self)

    def __len__(self) -> int:
        if not self.batch_shape:
            raise TypeError("a single measure has no length; its batch shape is ()")
        return self.batch_shape[0]

    def __getitem__(self: Kind, index: Any) -> Kind:
        """The measures at `index` of the leading batch axis."""
        if not self.batch_shape:
            raise TypeError("a single measure cannot be indexed; its batch shape is ()")
        checks.index(index, len(self), "a batch")
        selected: Kind = jax.tree.map(lambda leaf: leaf[index], self)
        return selected

    def padded(self: Kind, **sizes: int) -> Kind:
        """The same measure, with the named axes padded to at least the given lengths."""
        measure = self
        for axis, size in sizes.items():
            if size > self.sizes[axis]:
                measure = _padded_along(measure, axis, size - self.sizes[axis])
        return measure

    def unconstrained(self: Kind) -> Kind:
        """Unconstrained coordinates of the measure, as an instance of the same class. By default
        these are the arrays themselves."""
        return self

    def constrained(self: Kind, free: Kind) -> Kind:
        """The measure with unconstrained coordinates `free`, the inverse of `unconstrained`; by
        default `free` itself. An override copies padding and `constants` from `self`."""
        return free

    def gauge(self: Kind, tangent: Kind) -> Kind:
        """The projection of `tangent` on the directions that change the arrays but not the measure.
        By default it is zero."""
        zero: Kind = jax.tree.map(jnp.zeros_like, tangent)
        return zero

    def describe(self) -> str:
        """The kind of measure and its sizes, for the repr of a memory."""
        sizes = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
        return f"{type(self).__name__}({sizes})"


@functools.cache
def _axes(kind: type[Measure]) -> dict[str, tuple[str, ...]]:
    """The axis names of each array of a kind of measure, without the batch axes."""
    hints = get_type_hints(kind)
    strings = {x.name: _axes_in(hints[x.name]) for x in fields(kind)}
    axes = {name: tuple(names[1:]) for name, names in strings.items() if names[:1] == ["*batch"]}
    if not axes:
        raise TypeError(
            f"{kind.__name__} must annotate its arrays as jaxtyping.Float[Array, '*batch d …']"
        )
    return axes


def _axes_in(hint: Any) -> list[str]:
    """The axis names in the annotation of an array or of an optional array; [] for others."""
    arrays = [part for part in (hint, *get_args(hint)) if hasattr(part, "dim_str")]
    return arrays[0].dim_str.split() if arrays else []


def _padded_along(measure: Kind, axis: str, missing: int) -> Kind:
    """The measure padded by `missing` entries along `axis`."""
    padded = {}
    for name, axes in _axes(type(measure)).items():
        array = getattr(measure, name)
        if axis in axes and array is not None:
            mode = measure.padding[axis][name]
            widths = [(0, 0)] * array.ndim
            widths[axes.index(axis) - len(axes)] = (0, missing)
            # NumPy pads NumPy arrays, since JAX would compile a program for each shape.
            pad: Any = np.pad if isinstance(array, np.ndarray) else jnp.pad
            padded[name] = pad(array, widths, mode=mode)
    arrays_of = lambda m: [getattr(m, name) for name in padded]  # noqa: E731
    result: Kind = eqx.tree_at(arrays_of, measure, list(padded.values()))
    return result


def unconstrained(measure: AnyMeasure) -> AnyMeasure:
    """Return `measure.unconstrained()`, and vectors and other pytrees as they are."""
    return measure.unconstrained() if isinstance(measure, Measure) else measure


def constrained(like: AnyMeasure, free: AnyMeasure) -> AnyMeasure:
    """Return `like.constrained(free)`, or `free` itself for vectors and other pytrees."""
    return like.constrained(free) if isinstance(like, Measure) else free


def dim_of(measure: AnyMeasure) -> int | None:
    """The dimension of the space of a measure, or of a vector; None for other pytrees."""
    return _sizes(measure).get("d")


def _sizes(measure: AnyMeasure) -> dict[str, int]:
    if isinstance(measure, Measure):
        return measure.sizes
    return {"d": int(measure.shape[-1])} if isinstance(measure, Array | np.ndarray) else {}


def describe(patterns: AnyMeasure) -> str:
    """Return `patterns.describe()`; of vectors the dimension, of other pytrees the class name."""
    if isinstance(patterns, Measure):
        return patterns.describe()
    if isinstance(patterns, Array | np.ndarray):
        return f"vectors(dim={patterns.shape[-1]})"
    return type(patterns).__name__


def check_like(name: str, measure: AnyMeasure, like: AnyMeasure, owner: str) -> None:
    """Raise `TypeError` unless two measures have one kind and one dtype, and `ValueError` unless
    they have the same optional arrays, and the same sizes along all axes that cannot be padded.

    **Arguments:**

    - `name`: the argument `measure`, for the message.
    - `measure`, `like`: measures of any batch shape, or vectors.
    - `owner`: what `like` is of, as "the memory", for the message.
    """
    if _kind(measure) != _kind(like):
        raise TypeError(f"{name} must be a {_kind(like)}, {owner}'s kind; got {_kind(measure)}")
    if float_dtype(measure) != float_dtype(like):
        raise TypeError(
            f"{name} must have {owner}'s dtype {float_dtype(like)}; got {float_dtype(measure)}: "
            "convert one"
        )
    arrays = _axes(type(measure)) if isinstance(measure, Measure) else {}
    for array, axes in arrays.items():
        present, expected = (getattr(m, array) is not None for m in (measure, like))
        if expected and not present:
            shape = ", ".join(axes)
            raise ValueError(f"{name} must have {array} ({shape}) as {owner} has; got none")
        if present and not expected:
            raise ValueError(f"{name} must have no {array}, as {owner} has none; got some")
    for axis, size in _sizes(like).items():
        got = _sizes(measure)[axis]
        if got != size and axis not in getattr(like, "padding", ()):
            what = "dimension" if axis == "d" else "size"
            raise ValueError(f"{name} must have {owner}'s {what} {axis} = {size}; got {got}")


def _kind(measure: AnyMeasure) -> str:
    return "vector" if isinstance(measure, Array | np.ndarray) else type(measure).__name__


def with_leaves(measure: M, *leaves: Array) -> M:
    """A measure of the same kind with the arrays `leaves`, which are not checked."""
    replaced: M = jax.tree.unflatten(jax.tree.structure(measure), leaves)
    return replaced
