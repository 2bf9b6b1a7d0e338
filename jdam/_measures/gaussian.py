"""Gaussian measures, stored as factors of their covariances."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam._core import checks
from jdam._core.compile import compiled
from jdam._core.linalg import rotation_part, safe_sqrt
from jdam._measures.base import Measure, with_leaves
from jdam._measures.batches import join
from jdam._measures.moments import covariance_root, moments
from jdam._measures.ragged import build, check_ragged
from jdam._measures.simplex import simplex_weights

#: What to do with lists of arrays of different shapes.
RAGGED = "jdam.Gaussian.from_ragged_samples takes different numbers of samples"
RAGGED_FACTORS = "jdam.stack fills up single measures of different sizes"


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

    padding: ClassVar[Mapping[str, Mapping[str, str]]] = {"r": {"factor": "constant"}}

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

    def gauge(self, tangent: "Gaussian") -> "Gaussian":
        """Rotations L Ω of the factor, Ω skew."""
        still = super().gauge(tangent)
        return with_leaves(still, still.mean, rotation_part(self.factor, tangent.factor))

    def describe(self) -> str:
        return f"Gaussian(dim={self.dim}, rank={self.rank})"

    def pad(self, rank: int) -> "Gaussian":
        """The same Gaussian with its factor padded with zero columns to at least `rank`."""
        return self.padded(r=rank)

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
        if checks.is_concrete(asymmetry):
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
        samples = checks.float_array("samples", samples, ragged=RAGGED)
        if samples.ndim < 2 or 0 in samples.shape[-2:]:
            raise ValueError(f"samples must have shape (…, n, d), n, d ≥ 1; got {samples.shape}")
        checks.finite("samples", samples)
        if weights is None:
            weights = jnp.full(samples.shape[:-1], 1 / samples.shape[-2], samples.dtype)
        weights = simplex_weights(weights, samples=samples)
        return cls(*moments(samples, weights))

    @classmethod
    def from_ragged_samples(
        cls, samples: Sequence[ArrayLike], weights: Sequence[ArrayLike] | None = None
    ) -> "Gaussian":
        """A batch (N,) of Gaussians, each with the mean and covariance of its own number of
        samples, as `from_samples`; that of one sample is 0.

        **Arguments:** `samples`, a list of N arrays (nᵢ, d), nᵢ ≥ 1, which may be less than d;
        `weights`, a list of N arrays (nᵢ,) on the simplex, uniform if None.

        **Returns:** (N,), factors with min(d, max nᵢ) columns.

        **Raises:** as `from_samples`, naming the Gaussian; `ValueError` for empty or unequal lists
        and for samples of different dimension.
        """
        given = check_ragged("samples", "Gaussian", samples, weights)
        # Those of like number together: what is filled up is at most as much as is there.
        alike: dict[int, dict[int, tuple[Any, ...]]] = {}
        for i, pair in given.items():
            alike.setdefault((len(pair[0]) - 1).bit_length(), {})[i] = pair
        found = [build(cls.from_samples, "Gaussian", pairs) for pairs in alike.values()]
        order = np.argsort([i for pairs in alike.values() for i in pairs])
        gathered: Gaussian = functools.reduce(join, found)[order]
        return gathered


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
        checks.nonnegative("scale", scale)
        self.mean, self.scale = mean, scale

    def constrained(self, free: "DiagonalGaussian") -> "DiagonalGaussian":
        """Standard deviations of either sign are free."""
        return with_leaves(self, free.mean, jnp.abs(free.scale))

    def describe(self) -> str:
        return f"DiagonalGaussian(dim={self.dim})"

    @property
    def variance(self) -> Float[Array, "*batch d"]:
        """σ²."""
        return self.scale**2

    @property
    def covariance(self) -> Float[Array, "*batch d d"]:
        """diag(σ²), formed on request only."""
        result: Array = jnp.vectorize(jnp.diag, signature="(d)->(d,d)")(self.variance)
        return result

    @classmethod
    def from_variance(cls, mean: ArrayLike, variance: ArrayLike) -> "DiagonalGaussian":
        """N(m, diag(v)) for variances v ≥ 0 of shape (…, d)."""
        variance = checks.float_array("variance", variance)
        checks.finite("variance", variance)
        checks.nonnegative("variance", variance)
        return cls(mean, safe_sqrt(variance))


def _mean_and(name: str, mean: ArrayLike, other: ArrayLike) -> tuple[Array, Array]:
    mean = checks.float_array("mean", mean, ragged=RAGGED_FACTORS)
    other = checks.float_array(name, other, ragged=RAGGED_FACTORS)
    checks.same_dtype(**{"mean": mean, name: other})
    if mean.ndim == 0 or mean.shape[-1] == 0:
        raise ValueError(f"mean must have shape (…, d) with d ≥ 1; got {mean.shape}")
    checks.finite("mean", mean)
    checks.finite(name, other)
    return mean, other


@compiled()
def _outer(factor: Float[Array, "*batch d r"]) -> Float[Array, "*batch d d"]:
    return factor @ factor.mT
