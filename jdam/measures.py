"""The measures a memory stores: frozen pytrees whose leading axes are batch axes."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam import _checks
from jdam._compile import compiled, working_dtype
from jdam._moments import covariance_root, moments, weighted_mean
from jdam.linalg import long_sum, safe_sqrt


class Measure(eqx.Module):
    """What all measures share: a mean, batch axes in front, and indexing along them."""

    mean: eqx.AbstractVar[Float[Array, "*batch d"]]
    #: The rank of the first array of a single measure.
    _rank: ClassVar[int] = 1

    @property
    def dim(self) -> int:
        """The dimension d of the space the measure lives on."""
        return jax.tree.leaves(self)[0].shape[-1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of the batch: () for a single measure."""
        return jax.tree.leaves(self)[0].shape[: -self._rank]

    @property
    def dtype(self) -> jnp.dtype:
        return jax.tree.leaves(self)[0].dtype

    def __len__(self) -> int:
        if not self.batch_shape:
            raise TypeError("a single measure has no length; its batch shape is ()")
        return self.batch_shape[0]

    def __getitem__(self, index: Any) -> Self:
        """The measures at `index` of the leading batch axis."""
        if not self.batch_shape:
            raise TypeError("a single measure cannot be indexed; its batch shape is ()")
        _checks.index(index, len(self), "a batch")
        return jax.tree.map(lambda leaf: leaf[index], self)


class Gaussian(Measure):
    """The Gaussian N(m, L Lᵀ), stored as its mean m and a factor L of its covariance.

    Factors keep the digits that covariances lose, and make low rank and singular
    covariances ordinary: L may have any number r ≥ 1 of columns. L and L Q are the same
    Gaussian for every orthogonal Q, so compare covariances or W₂, never factors.

    **Arguments:** `mean` (…, d); `factor` (…, d, r), of the same floating dtype.

    **Raises:** `TypeError` for dtypes that are not floating or differ; `ValueError` for
    shapes that do not fit and, where values are concrete, for NaN or infinity.
    """

    mean: Float[Array, "*batch d"]
    factor: Float[Array, "*batch d r"]

    def __init__(self, mean: ArrayLike, factor: ArrayLike):
        mean, factor = _mean_and("factor", mean, factor)
        if factor.ndim != mean.ndim + 1 or factor.shape[:-1] != mean.shape or factor.shape[-1] == 0:
            raise ValueError(
                f"factor must have shape (…, d, r) with (…, d) = {mean.shape}, the shape of mean, "
                f"and r ≥ 1; got {factor.shape}"
            )
        self.mean, self.factor = mean, factor

    @property
    def covariance(self) -> Float[Array, "*batch d d"]:
        """Σ = L Lᵀ."""
        return _outer(self.factor)

    @property
    def rank(self) -> int:
        """The number r of the factor's columns, an upper bound on the covariance's rank."""
        return self.factor.shape[-1]

    def pad(self, rank: int) -> "Gaussian":
        """The same Gaussian with its factor padded with zero columns to at least `rank`."""
        missing = max(0, rank - self.rank)
        widths = [(0, 0)] * (self.factor.ndim - 1) + [(0, missing)]
        return Gaussian(self.mean, jnp.pad(self.factor, widths)) if missing else self

    @classmethod
    def from_covariance(cls, mean: ArrayLike, covariance: ArrayLike) -> "Gaussian":
        """The Gaussian N(m, Σ), its factor the symmetric root Σ^½; Σ may be singular.

        **Arguments:** `mean` (…, d); `covariance` (…, d, d), symmetric and positive
        semidefinite up to rounding, which is 10·max(d, 10)·eps·|Σ|_F here.

        **Raises:** as `Gaussian`, and `ValueError` for a covariance that is not symmetric
        or not positive semidefinite. Where values are traced, its factor is NaN instead,
        which recall reports as `Status.NONFINITE`.
        """
        mean, covariance = _mean_and("covariance", mean, covariance)
        if covariance.shape != (*mean.shape, mean.shape[-1]):
            raise ValueError(
                f"covariance must have shape (…, d, d) with (…, d) = {mean.shape}, the shape of "
                f"mean; got {covariance.shape}"
            )
        asymmetry, negativity, factor = covariance_root(covariance)
        if _checks.is_concrete(asymmetry):
            if bool((asymmetry > 1).any()):
                raise ValueError(
                    "covariance must be symmetric; got |Σ − Σᵀ| of "
                    f"{float(asymmetry.max()):.1e} times the rounding allowed: if that is noise, "
                    "pass (Σ + Σᵀ)/2"
                )
            if bool((negativity > 1).any()):
                raise ValueError(
                    "covariance must be positive semidefinite; got negative eigenvalues, "
                    f"{float(negativity.max()):.1e} times the rounding allowed"
                )
        return cls(mean, factor)

    @classmethod
    def from_samples(cls, samples: ArrayLike, weights: ArrayLike | None = None) -> "Gaussian":
        """The Gaussian with the samples' mean and covariance Σₖ aₖ (xₖ − m)(xₖ − m)ᵀ.

        The covariance is the maximum-likelihood one (aₖ = 1/n, not 1/(n−1)). It is never
        formed: the factor is the weighted centred samples themselves where n < d, and their
        triangular QR factor otherwise.

        **Arguments:** `samples` (…, n, d); `weights` a (…, n) on the simplex, uniform if None.

        **Raises:** as `Gaussian`; `ValueError` for weights that are negative or do not sum
        to one.
        """
        samples = _checks.float_array("samples", samples)
        if samples.ndim < 2 or 0 in samples.shape[-2:]:
            raise ValueError(f"samples must have shape (…, n, d), n, d ≥ 1; got {samples.shape}")
        _checks.finite("samples", samples)
        if weights is None:
            weights = jnp.full(samples.shape[:-1], 1 / samples.shape[-2], samples.dtype)
        weights = simplex_weights(weights, samples=samples)
        return cls(*moments(samples, weights))


class DiagonalGaussian(Measure):
    """The Gaussian N(m, diag(σ²)) of independent coordinates; nothing d×d is ever formed.

    **Arguments:** `mean` m (…, d); `scale` σ (…, d), the standard deviations, ≥ 0.

    **Raises:** `TypeError` for dtypes that are not floating or differ; `ValueError` for
    shapes that differ and, where values are concrete, for NaN, infinity or a negative scale.
    """

    mean: Float[Array, "*batch d"]
    scale: Float[Array, "*batch d"]

    def __init__(self, mean: ArrayLike, scale: ArrayLike):
        mean, scale = _mean_and("scale", mean, scale)
        if scale.shape != mean.shape:
            raise ValueError(f"scale must have the shape of mean, {mean.shape}; got {scale.shape}")
        _checks.nonnegative("scale", scale)
        self.mean, self.scale = mean, scale

    @property
    def variance(self) -> Float[Array, "*batch d"]:
        """σ²."""
        return self.scale**2

    @property
    def covariance(self) -> Float[Array, "*batch d d"]:
        """diag(σ²), formed on request only."""
        return jnp.vectorize(jnp.diag, signature="(d)->(d,d)")(self.variance)

    @classmethod
    def from_variance(cls, mean: ArrayLike, variance: ArrayLike) -> "DiagonalGaussian":
        """N(m, diag(v)) for variances v ≥ 0 of shape (…, d)."""
        variance = _checks.float_array("variance", variance)
        _checks.finite("variance", variance)
        _checks.nonnegative("variance", variance)
        return cls(mean, safe_sqrt(variance))


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
    _rank: ClassVar[int] = 2

    def __init__(self, points: ArrayLike, weights: ArrayLike | None = None):
        points = _checks.float_array("points", points)
        if points.ndim < 2 or 0 in points.shape[-2:]:
            raise ValueError(f"points must have shape (…, n, d), n, d ≥ 1; got {points.shape}")
        _checks.finite("points", points)
        if weights is None:
            weights = jnp.full(points.shape[:-1], 1 / points.shape[-2], points.dtype)
        self.points, self.weights = points, simplex_weights(weights, points=points)

    @property  # type: ignore[misc]
    def mean(self) -> Float[Array, "*batch d"]:  # type: ignore[override]
        """Σ aⱼxⱼ."""
        return weighted_mean(self.points, self.weights)

    @property
    def num_atoms(self) -> int:
        """The number n of atoms, padding included."""
        return self.points.shape[-2]

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


def _stack(arrays: list) -> Array | np.ndarray:
    traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
    if len({str(array.dtype) for array in arrays}) > 1:
        raise TypeError("clouds must have one dtype; convert them")
    return jnp.stack(arrays) if traced else np.stack(arrays)


def simplex_weights(weights: ArrayLike, **points: Array) -> Array:
    """`weights` checked to be one distribution over the points (…, n, d) of each measure."""
    ((name, array),) = points.items()
    weights = _checks.float_array("weights", weights)
    _checks.same_dtype(**{name: array, "weights": weights})
    if weights.shape != array.shape[:-1]:
        raise ValueError(
            f"weights must have shape (…, n) = {array.shape[:-1]}, one for each of {name}; "
            f"got {weights.shape}"
        )
    _checks.finite("weights", weights)
    _checks.nonnegative("weights", weights)
    if _checks.is_concrete(weights):
        error, allowed = _off_one(weights)
        if not error <= allowed:
            raise ValueError(
                f"weights must sum to one for each measure; got sums off by up to {error:.1e}: "
                "divide by weights.sum(-1, keepdims=True)"
            )
    return weights


def _mean_and(name: str, mean: ArrayLike, other: ArrayLike) -> tuple[Array, Array]:
    mean, other = _checks.float_array("mean", mean), _checks.float_array(name, other)
    _checks.same_dtype(**{"mean": mean, name: other})
    if mean.ndim == 0 or mean.shape[-1] == 0:
        raise ValueError(f"mean must have shape (…, d) with d ≥ 1; got {mean.shape}")
    _checks.finite("mean", mean)
    _checks.finite(name, other)
    return mean, other


def _off_one(weights: Array) -> tuple[float, float]:
    """How far sums of weights are from 1, and how far rounding can take those of good weights:
    that of each weight, and that of the sum they were divided by, which is pairwise in their own
    dtype or in order in one of at least 32 bits."""
    own, size = jnp.finfo(weights.dtype), max(weights.shape[-1], 1)
    inside = jnp.finfo(working_dtype(weights.dtype))
    with jax.ensure_compile_time_eval():
        sums = long_sum(weights.astype(inside.dtype))
        error = float(jnp.abs(sums - 1).max(initial=0))
    allowed = float(own.eps) * (2 + math.log2(size)) + float(inside.eps) * 2 * math.sqrt(size)
    return error, allowed + size * float(own.smallest_subnormal)


@compiled()
def _outer(factor: Float[Array, "*batch d r"]) -> Float[Array, "*batch d d"]:
    return factor @ factor.mT
