"""Weighted point clouds: discrete measures."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam._core import checks
from jdam._measures.base import Measure, with_leaves
from jdam._measures.moments import weighted_mean
from jdam._measures.ragged import build, check_ragged, rows_of_groups, with_arrays
from jdam._measures.simplex import free_weights, weighted, weights_of

RAGGED = "jdam.PointCloud.from_ragged takes clouds of different sizes"


class PointCloud(Measure):
    """The discrete measure Σⱼ aⱼ δ(xⱼ) of n weighted points, which may carry features uⱼ.

    Atoms of weight 0 are padding: they change nothing, and stay at weight 0. Atoms may
    coincide, and their order means nothing.

    Features are what an atom is rather than where: a label as a one-hot row, a colour, an
    embedding. A geometry compares them too, with a weight of its own, as `feature_scale` of
    `Sinkhorn`; nothing moves them.

    **Arguments:**

    - `points` x (…, n, d).
    - `weights` a (…, n) on the simplex, ≥ 0 and of sum 1 for each cloud; uniform, 1/n, if None.
    - `features` u (…, n, k), k numbers for each point, or None. Integers and booleans become the
      dtype of the points: `jax.nn.one_hot(labels, k)` makes features of labels (…, n).

    **Raises:** `TypeError` for dtypes that are not floating or differ; `ValueError` for shapes
    that do not fit and, where values are concrete, for NaN, infinity, negative weights and
    weights that do not sum to one.
    """

    points: Float[Array, "*batch n d"]
    weights: Float[Array, "*batch n"]
    features: Float[Array, "*batch n k"] | None = None

    padding: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "n": {"points": "edge", "weights": "constant", "features": "edge"}
    }
    constants: ClassVar[tuple[str, ...]] = ("features",)

    def __init__(
        self,
        points: ArrayLike,
        weights: ArrayLike | None = None,
        features: ArrayLike | None = None,
    ):
        self.points, self.weights = weighted("points", points, weights, RAGGED)
        self.features = None if features is None else _checked_features(features, self.points)

    @property
    def mean(self) -> Float[Array, "*batch d"]:
        """Σ aⱼxⱼ."""
        return weighted_mean(self.points, self.weights)

    @property
    def num_atoms(self) -> int:
        """The number n of atoms, padding included."""
        return self.points.shape[-2]

    def unconstrained(self) -> "PointCloud":
        """Logarithms for weights, with 0 for those of padding."""
        return self.with_atoms(self.points, free_weights(self.weights))

    def constrained(self, free: "PointCloud") -> "PointCloud":
        """The cloud of these logarithms of weights, with the padding and features of this one."""
        return self.with_atoms(free.points, weights_of(free.weights, self.weights))

    def with_atoms(self, points: Array, weights: Array) -> "PointCloud":
        """A cloud of other points and weights, unchecked, with the features of this one."""
        return with_leaves(self, points, weights, *jax.tree.leaves(self.features))

    def describe(self) -> str:
        sizes = {"dim": "d", "num_atoms": "n", "num_features": "k"}
        entries = (f"{name}={self.sizes[x]}" for name, x in sizes.items() if x in self.sizes)
        return f"PointCloud({', '.join(entries)})"

    def pad(self, num_atoms: int) -> "PointCloud":
        """The same cloud with atoms of weight 0 added, copies of its last, up to `num_atoms`."""
        return self.padded(n=num_atoms)

    @classmethod
    def from_ragged(
        cls,
        points: Sequence[ArrayLike],
        weights: Sequence[ArrayLike] | None = None,
        features: Sequence[ArrayLike] | None = None,
    ) -> "PointCloud":
        """A batch (N,) of clouds of different sizes, padded with weight 0 to the largest.

        **Arguments:**

        - `points`, a list of N arrays (nᵢ, d).
        - `weights`, a list of N arrays (nᵢ,) on the simplex, uniform if None.
        - `features`, a list of N arrays (nᵢ, k), or None.

        **Raises:** as `PointCloud`, naming the cloud; `ValueError` for empty or unequal lists
        and for clouds of different dimension.
        """
        rows = check_ragged("points", "cloud", points, weights)
        if features is not None:
            rows = with_arrays("features", "points", "cloud", rows, features)
        return build(cls, "cloud", rows)

    @classmethod
    def from_groups(
        cls,
        points: ArrayLike,
        groups: ArrayLike,
        weights: ArrayLike | None = None,
        features: ArrayLike | None = None,
    ) -> tuple["PointCloud", np.ndarray]:
        """A cloud of each group of rows of a table, padded as by `from_ragged`.

        **Arguments:**

        - `points` x (R, d), a row for each atom.
        - `groups` (R,), the label of the group of each row: integers or strings, in any order.
        - `weights` (R,) ≥ 0, which are divided by their sum over each group; uniform if None.
        - `features` u (R, k), or None.

        **Returns:** the clouds, a batch (N,), and the names (N,) of their groups, a NumPy array in
        rising order. Atoms keep the order of their rows.

        **Raises:** as `PointCloud`; `TypeError` for labels that have no order; `ValueError` for
        shapes that do not go together, missing labels, and groups whose weights sum to 0.
        """
        points = np.asarray(points)
        if points.ndim != 2 or 0 in points.shape:
            raise ValueError(f"points must have shape (R, d), R, d ≥ 1; got {points.shape}")
        names, columns = rows_of_groups(groups, points, weights, features)
        return cls.from_ragged(*columns), names


def _checked_features(features: ArrayLike, points: Array) -> Array:
    """Features that go with the points, in their dtype."""
    array = features if isinstance(features, Array) else np.asarray(features)
    if array.dtype == bool or jnp.issubdtype(array.dtype, jnp.integer):
        array = array.astype(points.dtype)
    array = checks.float_array("features", array, ragged=RAGGED)
    checks.same_dtype(points=points, features=array)
    if array.shape[:-1] != points.shape[:-1] or array.shape[-1] == 0:
        expected = f"(…, n, k) = (*{points.shape[:-1]}, k), k numbers for each of points"
        labels = array.shape == points.shape[:-1]
        cure = ": jax.nn.one_hot(labels, k) makes features of labels" if labels else ""
        raise ValueError(f"features must have shape {expected}; got {array.shape}{cure}")
    checks.finite("features", array)
    return array


def variance(cloud: PointCloud) -> Float[Array, " *batch"]:
    """The trace Σ aⱼ|xⱼ − mean|² of the covariance."""
    centred = cloud.points - cloud.mean[..., None, :]
    squares = jnp.where(cloud.weights > 0, jnp.vecdot(centred, centred), 0)
    return jnp.vecdot(cloud.weights, squares)


def unchecked(points: Array, weights: Array) -> PointCloud:
    """A cloud of values that need no check, without features."""
    cloud: PointCloud = object.__new__(PointCloud)
    for name, value in (("points", points), ("weights", weights), ("features", None)):
        object.__setattr__(cloud, name, value)
    return cloud
