"""What all measures share."""

import functools
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, TypeAlias, TypeVar, get_args, get_type_hints

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdam._core import checks
from jdam._core.compile import float_dtype

#: A `Measure`, an array (…, d) that is a vector, or whatever pytree of arrays a geometry takes.
AnyMeasure: TypeAlias = Any
M = TypeVar("M")
Kind = TypeVar("Kind", bound="Measure")


class Measure(eqx.Module):
    """A probability measure, or a batch of them: a frozen pytree.

    A kind of measure declares the axes of its arrays by jaxtyping annotations, the batch first:

        class Uniform(jdam.Measure):
            centre: Float[Array, "*batch d"]
            radius: Float[Array, "*batch"]

    Every field so annotated leads with the same batch axes, and `d` is the dimension of the
    space. `batch_shape`, `dim`, `dtype`, indexing and the repr follow from that. An array whose
    annotation allows None may be missing.

    To let an optimizer move a measure, override `unconstrained` and `constrained` where arrays are
    constrained, and `gauge` where different arrays are the same measure. Where measures of
    different sizes may be stored together, as clouds of few and of many atoms, `padding` says how
    arrays are filled up without changing the measure.
    """

    #: For each axis that may be longer than a measure needs, how each array that has it is filled
    #: up: a mode of `numpy.pad`, of which "constant" means zeros.
    padding: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    #: Arrays that neither recall nor an optimizer moves; `constrained` takes those of its `self`.
    constants: ClassVar[tuple[str, ...]] = ()

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of the batch: () for a single measure."""
        name, axes = next(iter(_axes(type(self)).items()))
        array = getattr(self, name)
        return tuple(array.shape[: array.ndim - len(axes)])

    @property
    def dim(self) -> int:
        """The dimension d of the space the measure lives on."""
        if "d" not in self.sizes:
            raise AttributeError(f"{type(self).__name__} declares no axis d")
        return self.sizes["d"]

    @property
    def sizes(self) -> dict[str, int]:
        """The lengths of the axes of a single measure, by name."""
        found: dict[str, int] = {}
        for name, axes in _axes(type(self)).items():
            if getattr(self, name) is not None:
                shape = getattr(self, name).shape
                found |= dict(zip(axes, shape[len(shape) - len(axes) :], strict=True))
        return found

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
        picked: Kind = jax.tree.map(lambda leaf: leaf[index], self)
        return picked

    def padded(self: Kind, **sizes: int) -> Kind:
        """The same measure with axes of these names filled up to at least these lengths."""
        measure = self
        for axis, size in sizes.items():
            if size > self.sizes[axis]:
                measure = _filled_up(measure, axis, size - self.sizes[axis])
        return measure

    def unconstrained(self: Kind) -> Kind:
        """Coordinates without constraints, in the same arrays: by default the arrays themselves."""
        return self

    def constrained(self: Kind, free: Kind) -> Kind:
        """The measure at some free coordinates; of this one only what is not free stays."""
        return free

    def gauge(self: Kind, tangent: Kind) -> Kind:
        """Of a tangent, the part along which the arrays move and the measure does not, by a
        projection: by default none."""
        none: Kind = jax.tree.map(jnp.zeros_like, tangent)
        return none

    def describe(self) -> str:
        """The kind of measure and its sizes, for a memory's repr."""
        sizes = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
        return f"{type(self).__name__}({sizes})"


@functools.cache
def _axes(kind: type[Measure]) -> dict[str, tuple[str, ...]]:
    """The names of the axes after the batch of each array of a kind of measure."""
    hints = get_type_hints(kind)
    strings = {x.name: _axes_in(hints[x.name]) for x in fields(kind)}
    axes = {name: tuple(names[1:]) for name, names in strings.items() if names[:1] == ["*batch"]}
    if not axes:
        raise TypeError(
            f"{kind.__name__} must annotate its arrays as jaxtyping.Float[Array, '*batch d …']"
        )
    return axes


def _axes_in(hint: Any) -> list[str]:
    """The names of all axes of an array, which may also be None."""
    arrays = [part for part in (hint, *get_args(hint)) if hasattr(part, "dim_str")]
    return arrays[0].dim_str.split() if arrays else []


def _filled_up(measure: Kind, axis: str, missing: int) -> Kind:
    """The measure with `missing` more entries along an axis."""
    filled = {}
    for name, axes in _axes(type(measure)).items():
        array = getattr(measure, name)
        if axis in axes and array is not None:
            mode = measure.padding[axis][name]
            widths = [(0, 0)] * array.ndim
            widths[axes.index(axis) - len(axes)] = (0, missing)
            # On the host where arrays are there: JAX would compile every shape.
            pad: Any = np.pad if isinstance(array, np.ndarray) else jnp.pad
            filled[name] = pad(array, widths, mode=mode)
    picked = lambda m: [getattr(m, name) for name in filled]  # noqa: E731
    longer: Kind = eqx.tree_at(picked, measure, list(filled.values()))
    return longer


def unconstrained(measure: AnyMeasure) -> AnyMeasure:
    """`Measure.unconstrained`; vectors are free."""
    return measure.unconstrained() if isinstance(measure, Measure) else measure


def constrained(like: AnyMeasure, free: AnyMeasure) -> AnyMeasure:
    """`Measure.constrained`."""
    return like.constrained(free) if isinstance(like, Measure) else free


def dim_of(measure: AnyMeasure) -> int | None:
    """The dimension of the space on which a measure lives, or of a vector; None of others."""
    if isinstance(measure, Measure):
        return measure.sizes.get("d")
    return int(measure.shape[-1]) if isinstance(measure, Array | np.ndarray) else None


def describe(patterns: AnyMeasure) -> str:
    """`Measure.describe`; a name of others."""
    if isinstance(patterns, Measure):
        return patterns.describe()
    if isinstance(patterns, Array | np.ndarray):
        return f"vectors(dim={patterns.shape[-1]})"
    return type(patterns).__name__


def check_same_arrays(name: str, measure: AnyMeasure, like: AnyMeasure, have: str) -> None:
    """Raise where one of two measures has an array that the other lacks, or one of another size but
    for what may be padded. `have` says whose arrays those of `like` are."""
    if not isinstance(measure, Measure):
        return
    for array, axes in _axes(type(measure)).items():
        there, wanted = (getattr(m, array) is not None for m in (measure, like))
        if wanted and not there:
            shape = ", ".join(axes)
            raise ValueError(f"{name} must have {array} ({shape}) as {have}; got none")
        if there and not wanted:
            raise ValueError(f"{name} must have no {array}, as {have} none; got some")
    for axis, size in like.sizes.items():
        if axis not in like.padding and measure.sizes[axis] != size:
            got = measure.sizes[axis]
            raise ValueError(f"{name} must have {axis} = {size} as {have}; got {axis} = {got}")


def any_of(measures: AnyMeasure) -> AnyMeasure:
    """A single measure of the shape of those of a batch, which may be empty, for checks of it."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:], leaf.dtype), measures)


def with_leaves(measure: M, *leaves: Array) -> M:
    """A measure like `measure` of other arrays, unchecked: for values that need no check."""
    changed: M = jax.tree.unflatten(jax.tree.structure(measure), leaves)
    return changed
