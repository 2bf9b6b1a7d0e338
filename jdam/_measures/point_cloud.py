"""Weighted point clouds: discrete measures."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam._core import checks
from jdam._measures.base import Measure, with_leaves
from jdam._measures.moments import weighted_mean
from jdam._measures.simplex import simplex_weights


class PointCloud(Measure):
    """The discrete measure Σⱼ aⱼ δ(xⱼ) of n weighted points.

    Atoms of weight 0 are padding: they change nothing, and stay at weight 0. Atoms may
    coincide, and their order means nothing.

    **Arguments:** `points` x (…, n, d); `weights` a (…, n) on the simplex, ≥ 0 and of sum 1 for
    each cloud; uniform, 1/n, if None.

    **Raises:** `TypeError` for dtypes that are not floating or differ; `ValueError` for shapes
    that do not fit and, where values are concrete, for NaN, infinity, negative weights and
    weights that do not sum to one.
    """

    points: Float[Array, "*batch n d"]
    weights: Float[Array, "*batch n"]

    def __init__(self, points: ArrayLike, weights: ArrayLike | None = None):
        points = checks.float_array("points", points)
        if points.ndim < 2 or 0 in points.shape[-2:]:
            raise ValueError(f"points must have shape (…, n, d), n, d ≥ 1; got {points.shape}")
        checks.finite("points", points)
        if weights is None:
            weights = jnp.full(points.shape[:-1], 1 / points.shape[-2], points.dtype)
        self.points, self.weights = points, simplex_weights(weights, points=points)

    @property
    def mean(self) -> Float[Array, "*batch d"]:
        """Σ aⱼxⱼ."""
        return weighted_mean(self.points, self.weights)

    @property
    def num_atoms(self) -> int:
        """The number n of atoms, padding included."""
        return self.points.shape[-2]

    def to_free(self) -> "PointCloud":
        """Logarithms for weights, with 0 for those of padding."""
        on = self.weights > 0
        logits = jnp.where(on, jnp.log(jnp.where(on, self.weights, 1)), 0)
        return with_leaves(self, self.points, logits)

    def from_free(self, free: "PointCloud") -> "PointCloud":
        """The cloud of these logarithms of weights, with the padding of this one."""
        weights = jax.nn.softmax(free.weights, where=self.weights > 0)
        return with_leaves(self, free.points, weights)

    def describe(self) -> str:
        return f"PointCloud(dim={self.dim}, num_atoms={self.num_atoms})"

    def pad(self, num_atoms: int) -> "PointCloud":
        """The same cloud with atoms of weight 0 added, copies of its last, up to `num_atoms`."""
        batch = [(0, 0)] * len(self.batch_shape)
        missing = (0, max(0, num_atoms - self.num_atoms))
        return PointCloud(
            jnp.pad(self.points, [*batch, missing, (0, 0)], mode="edge"),
            jnp.pad(self.weights, [*batch, missing]),
        )

    @classmethod
    def from_ragged(
        cls, points: Sequence[ArrayLike], weights: Sequence[ArrayLike] | None = None
    ) -> "PointCloud":
        """A batch (N,) of clouds of different sizes, padded with weight 0 to the largest.

        **Arguments:** `points`, a list of N arrays (nᵢ, d); `weights`, a list of N arrays (nᵢ,)
        on the simplex, uniform if None.

        **Raises:** as `PointCloud`, naming the cloud; `ValueError` for empty or unequal lists
        and for clouds of different dimension.
        """
        if len(points) == 0:
            raise ValueError("points must hold at least one cloud; got an empty list")
        if weights is not None and len(weights) != len(points):
            raise ValueError(
                f"weights must hold one array for each of {len(points)} clouds; got {len(weights)}"
            )
        sizes = [np.shape(cloud) for cloud in points]
        for i, shape in enumerate(sizes):
            if len(shape) != 2 or 0 in shape or shape[1] != sizes[0][1]:
                wanted = "(n, d), n, d ≥ 1, with one d for all"
                raise ValueError(f"points of cloud {i} must have shape {wanted}; got {shape}")
        if weights is None:
            weights = [
                np.full(n, 1 / n, _dtype(x)) for x, (n, _) in zip(points, sizes, strict=True)
            ]
        try:
            atoms = max(n for n, _ in sizes)
            padded = [_padded(x, atoms, mode="edge") for x in points]
            return cls(_stack(padded), _stack([_padded(a, atoms) for a in weights]))
        except (TypeError, ValueError):
            for i, (x, a) in enumerate(zip(points, weights, strict=True)):
                try:
                    cls(x, a)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"cloud {i}: {error}") from error
            raise


def _dtype(points: ArrayLike) -> Any:
    return points.dtype if hasattr(points, "dtype") else jnp.zeros(()).dtype


def _padded(array: Any, atoms: int, **mode: Any) -> Array | np.ndarray:
    # On the host where possible: padding each shape by JAX would compile each.
    traced = isinstance(array, jax.core.Tracer)
    array = array if traced else np.asarray(array)
    widths = [(0, atoms - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, widths, **mode) if traced else np.pad(array, widths, **mode)


def _stack(arrays: list[Any]) -> Array | np.ndarray:
    traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
    if len({str(array.dtype) for array in arrays}) > 1:
        raise TypeError("clouds must have one dtype; convert them")
    return jnp.stack(arrays) if traced else np.stack(arrays)
