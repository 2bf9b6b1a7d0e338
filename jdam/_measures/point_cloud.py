"""Weighted point clouds: discrete measures."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam._core import checks
from jdam._measures.base import Measure, with_leaves
from jdam._measures.moments import weighted_mean
from jdam._measures.ragged import build, check_ragged
from jdam._measures.simplex import free_weights, simplex_weights, weights_of

RAGGED = "jdam.PointCloud.from_ragged takes clouds of different sizes"


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

    padding: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "n": {"points": "edge", "weights": "constant"}
    }

    def __init__(self, points: ArrayLike, weights: ArrayLike | None = None):
        points = checks.float_array("points", points, ragged=RAGGED)
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
        return with_leaves(self, self.points, free_weights(self.weights))

    def from_free(self, free: "PointCloud") -> "PointCloud":
        """The cloud of these logarithms of weights, with the padding of this one."""
        return with_leaves(self, free.points, weights_of(free.weights, self.weights))

    def describe(self) -> str:
        return f"PointCloud(dim={self.dim}, num_atoms={self.num_atoms})"

    def pad(self, num_atoms: int) -> "PointCloud":
        """The same cloud with atoms of weight 0 added, copies of its last, up to `num_atoms`."""
        return self.padded(n=num_atoms)

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
        return build(cls, "cloud", check_ragged("points", "cloud", points, weights))
