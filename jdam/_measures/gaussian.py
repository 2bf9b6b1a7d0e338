"""Gaussian measures: full covariances, stored as factors, and diagonal ones."""

import functools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, PyTree

from jdam._core import checks
from jdam._core.compile import compiled
from jdam._core.linalg import rotation_part, safe_sqrt
from jdam._measures.base import Measure, with_leaves
from jdam._measures.batches import join
from jdam._measures.moments import covariance_root, moments
from jdam._measures.ragged import build, check_ragged
from jdam._measures.simplex import weighted

#: Advice in error messages about lists of arrays of different shapes.
RAGGED = "jdam.Gaussian.from_ragged_samples takes different numbers of samples"
RAGGED_FACTORS = "jdam.stack fills up single measures of different sizes"


class Gaussian(Measure):
    """The Gaussian N(m, L Lᵀ), stored as its mean m and a factor L of its covariance.

    A factor resolves small standard deviations that are lost in the rounding of a covariance, and
    represents covariances of low rank directly: L may have any number r ≥ 1 of columns. L and L Q
    represent the same Gaussian for every orthogonal Q, so compare covariances or W₂, not factors.

    **Arguments:**

    - `mean`: m, (…, d).
    - `factor`: L, (…, d, r), of the same floating dtype.

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
        """The number r of columns of the factor, an upper bound on the rank of the covariance."""
        return self.factor.shape[-1]

    def gauge(self, tangent: "Gaussian") -> "Gaussian":
        """The projection of `tangent` on rotations L Ω of the factor, Ω skew-symmetric."""
        zero = super().gauge(tangent)
        return with_leaves(zero, zero.mean, rotation_part(self.factor, tangent.factor))

    def describe(self) -> str:
        return f"Gaussian(dim={self.dim}, rank={self.rank})"

    def pad(self, rank: int) -> "Gaussian":
        """The same Gaussian with its factor padded with zero columns to at least `rank`."""
        return self.padded(r=rank)

    @classmethod
    def from_covariance(cls, mean: ArrayLike, covariance: ArrayLike) -> "Gaussian":
        """The Gaussian N(m, Σ) with the symmetric root Σ^½ as its factor; Σ may be singular.

        **Arguments:**

        - `mean`: m, (…, d).
        - `covariance`: Σ, (…, d, d), symmetric and positive semidefinite up to an error of
          10·max(d, 10)·eps·|Σ|_F.

        **Raises:** as `Gaussian`; `ValueError` for a covariance that is not symmetric or not
        positive semidefinite. Under a trace the factor of such a covariance is NaN, which recall
        reports as `Status.NONFINITE`.
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

        The covariance is the maximum-likelihood estimate (aₖ = 1/n, not 1/(n−1)). The d×d matrix
        is not formed: the factor consists of the weighted centred samples where n < d, and is
        their triangular QR factor otherwise.

        **Arguments:**

        - `samples`: x, (…, n, d).
        - `weights`: a, (…, n) on the simplex; uniform if None.

        **Raises:** as `Gaussian`; `ValueError` for weights that are negative or do not sum to
        one.
        """
        return cls(*moments(*weighted("samples", samples, weights, RAGGED)))

    @classmethod
    def from_ragged_samples(
        cls, samples: Sequence[ArrayLike], weights: Sequence[ArrayLike] | None = None
    ) -> "Gaussian":
        """Fit N Gaussians to sets of different numbers of samples, as `from_samples` does. The
        covariance of a single sample is 0.

        **Arguments:**

        - `samples`: a list of N arrays (nᵢ, d), nᵢ ≥ 1; nᵢ < d is allowed.
        - `weights`: a list of N arrays (nᵢ,) on the simplex; uniform if None.

        **Returns:** a `Gaussian` of batch shape (N,) whose factors have min(d, max nᵢ) columns.

        **Raises:** as `from_samples`, with the number of the Gaussian in the message; `ValueError`
        for an empty list, for lists of different lengths and for samples of different dimension.
        """
        rows = check_ragged("samples", "Gaussian", samples, weights)
        # Only sets whose sizes differ by less than a factor of two are padded together, so that
        # padding at most doubles the work.
        groups: dict[int, dict[int, tuple[PyTree, ...]]] = {}
        for i, pair in rows.items():
            groups.setdefault((len(pair[0]) - 1).bit_length(), {})[i] = pair
        batches = [build(cls.from_samples, "Gaussian", pairs) for pairs in groups.values()]
        order = np.argsort([i for pairs in groups.values() for i in pairs])
        result: Gaussian = functools.reduce(join, batches)[order]
        return result


class DiagonalGaussian(Measure):
    """The Gaussian N(m, diag(σ²)), stored and computed with as vectors m and σ.

    **Arguments:**

    - `mean`: m, (…, d).
    - `scale`: σ, (…, d), the standard deviations, ≥ 0.

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
        """The measure with scales |`free.scale`|, so that scales of either sign are allowed."""
        return with_leaves(self, free.mean, jnp.abs(free.scale))

    def describe(self) -> str:
        return f"DiagonalGaussian(dim={self.dim})"

    @property
    def variance(self) -> Float[Array, "*batch d"]:
        """σ²."""
        return self.scale**2

    @property
    def covariance(self) -> Float[Array, "*batch d d"]:
        """diag(σ²), computed at each access."""
        result: Array = jnp.vectorize(jnp.diag, signature="(d)->(d,d)")(self.variance)
        return result

    @classmethod
    def from_variance(cls, mean: ArrayLike, variance: ArrayLike) -> "DiagonalGaussian":
        """The Gaussian N(m, diag(v)).

        **Arguments:**

        - `mean`: m, (…, d).
        - `variance`: v, (…, d), ≥ 0.

        **Raises:** as `DiagonalGaussian`.
        """
        variance = checks.float_array("variance", variance)
        checks.finite("variance", variance)
        checks.nonnegative("variance", variance)
        return cls(mean, safe_sqrt(variance))


def _mean_and(name: str, mean: ArrayLike, other: ArrayLike) -> tuple[Array, Array]:
    """The mean and another array as finite arrays of one floating dtype; their shapes are compared
    by the caller."""
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
