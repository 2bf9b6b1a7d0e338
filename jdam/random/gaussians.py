"""Random Gaussians on a Wasserstein sphere, as in the experiments of arXiv:2509.23162."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from jdam._core import checks
from jdam._core.derivatives import full_precision
from jdam._core.lapack import cholesky
from jdam._core.linalg import squared_norm
from jdam._measures.gaussian import Gaussian
from jdam.random._uniform import checked_dtype, directions, orthogonal


def wasserstein_sphere(
    key: Array,
    num: int,
    dim: int,
    *,
    bounds: tuple[float, float] | None = (1.0, 1.1),
    commuting: bool = True,
    dtype: DTypeLike | None = None,
) -> Gaussian:
    """Draw Gaussians at the W₂ distance R from δ₀, R² = d(λ_min + λ_max): the patterns of
    Algorithms 2 and 3 of arXiv:2509.23162.

    The means are uniform on |μ|² = R²/2 and the spectra uniform on
    {λ ∈ [λ_min, λ_max]ᵈ, Σλ = R²/2}, sampled exactly and without rejection.

    **Arguments:**

    - `key`: a `jax.random` key.
    - `num`, `dim`: N and d, both ≥ 1.
    - `bounds`: the bounds (λ_min, λ_max) of the eigenvalues, 0 ≤ λ_min ≤ λ_max and λ_max > 0. None,
      which requires `commuting=False`, gives the covariances of the second experiment of the paper:
      Σ ∝ WWᵀ + I/100 with a d×d matrix W of standard normal entries, scaled to trace d, and
      |μ|² = d, so that R² = 2d.
    - `commuting`: if True all covariances have the same eigenvectors, a random orthogonal U;
      otherwise each has its own U.
    - `dtype`: a floating dtype; JAX's default one if None.

    **Returns:** a `Gaussian` of batch shape (N,). The factors are U√Λ; for `bounds=None`, lower
    triangular.

    **Raises:** `TypeError` or `ValueError` for arguments outside these types and ranges.
    """
    num, dim = checks.positive_int("num", num), checks.positive_int("dim", dim)
    dtype = checked_dtype(dtype)
    if bounds is None:
        if commuting:
            raise ValueError("bounds must be given where commuting=True; got None")
        result: Gaussian = _wishart_sphere(key, num, dim, dtype)
        return result
    low, high = (np.asarray(bound) for bound in bounds)
    if not (0 <= low <= high < math.inf and high > 0):
        raise ValueError(f"bounds must be 0 ≤ λ_min ≤ λ_max, λ_max > 0, finite; got {bounds}")
    ends = jnp.asarray(low, dtype), jnp.asarray(high, dtype)
    sphere: Gaussian = _sphere(key, ends, num, dim, commuting)
    return sphere


@partial(jax.jit, static_argnums=(2, 3, 4))
def _sphere(
    key: Array, bounds: tuple[Array, Array], num: int, dim: int, commuting: bool
) -> Gaussian:
    """Return `wasserstein_sphere` with bounds."""
    mean_key, spectrum_key, basis_key = jax.random.split(key, 3)
    (low, high), dtype = bounds, bounds[0].dtype
    spectra = low + (high - low) * _uniform_on_slice(spectrum_key, num, dim, dtype)
    shape = (1,) if commuting else (num,)
    bases = orthogonal(basis_key, (*shape, dim), dtype)
    means = jnp.sqrt(dim * (low + high) / 2) * directions(mean_key, (num, dim), dtype)
    return Gaussian(means, bases * jnp.sqrt(spectra)[:, None])


@partial(jax.jit, static_argnums=(1, 2, 3))
@full_precision
def _wishart_sphere(key: Array, num: int, dim: int, dtype: jnp.dtype) -> Gaussian:
    """Return `wasserstein_sphere` without bounds."""
    mean_key, factor_key = jax.random.split(key)
    normal = jax.random.normal(factor_key, (num, dim, dim), dtype)
    factors = cholesky(normal @ normal.mT + jnp.eye(dim, dtype=dtype)[None] / 100)
    factors = factors * jnp.sqrt(dim / squared_norm(factors))[:, None, None]
    return Gaussian(math.sqrt(dim) * directions(mean_key, (num, dim), dtype), factors)


def _uniform_on_slice(key: Array, num: int, dim: int, dtype: jnp.dtype) -> Float[Array, "N d"]:
    """Return points uniform on the central slice {u ∈ [0, 1]ᵈ, Σu = d/2} of the unit cube.

    The slice Pₙ(s) = {u ∈ [0, 1]ⁿ, Σu = s} is the union of the cones from its centre (s/n, …, s/n)
    over its facets uₖ = 0 and uₖ = 1. These facets are slices Pₙ₋₁(s) and Pₙ₋₁(s−1), at distances
    proportional to s/n and 1 − s/n from the centre. A uniform point of Pₙ(s) is therefore on the
    segment from the centre to a uniform point of a facet, which is chosen with the probability of
    its cone, at the fraction r of the segment, where r^(n−1) is uniform on [0, 1].
    """
    zero_probabilities = jnp.asarray(_zero_probabilities(dim), dtype)
    facet_key, fraction_key, order_key = jax.random.split(key, 3)
    choices = jax.random.uniform(facet_key, (dim - 1, num), dtype)
    fractions = jax.random.uniform(fraction_key, (dim - 1, num), dtype)

    def body_fun(carry: tuple[Any, ...], level: tuple[Any, ...]) -> tuple[tuple[Any, ...], Array]:
        # A point p of the current facet is the point shift + scale·p of the slice.
        ones, shift, scale = carry
        size, probabilities, choice, fraction = level
        fraction = fraction ** (1 / (size - 1))
        centre = (dim / 2 - ones.astype(dtype)) / size
        shift, scale = shift + scale * (1 - fraction) * centre, scale * fraction
        one = choice >= probabilities[ones]
        return (ones + one.astype(jnp.int32), shift, scale), shift + jnp.where(one, scale, 0)

    start = (jnp.zeros(num, jnp.int32), jnp.zeros(num, dtype), jnp.ones(num, dtype))
    sizes = jnp.arange(dim, 1, -1, dtype=dtype)
    (ones, shift, scale), points = jax.lax.scan(
        body_fun, start, (sizes, zero_probabilities, choices, fractions)
    )
    last = shift + scale * (dim / 2 - ones.astype(dtype))
    points = jnp.concatenate([points, last[None]]).T
    points = jax.random.permutation(order_key, points, axis=1, independent=True)
    return jnp.clip(points, 0, 1)  # rounding errors


def _zero_probabilities(dim: int) -> np.ndarray:
    """Return the probability of a facet uₖ = 0 of Pₙ(s), (d−1, d+1), for n = d, …, 2 and
    s = d/2 − j, j = 0, …, d.

    The volumes follow from the B-spline recursion, whose terms are all ≥ 0:

        fₙ(s) = (s fₙ₋₁(s) + (n−s) fₙ₋₁(s−1)) / (n−1)
    """
    s = dim / 2 - np.arange(dim + 1)
    volume = ((s >= 0) & (s < 1)).astype(float)
    rows = []
    for n in range(2, dim + 1):
        zero, one = s * volume, (n - s) * np.append(volume[1:], 0)
        rows.append(np.divide(zero, zero + one, out=np.zeros_like(s), where=zero + one > 0))
        volume = (zero + one) / (n - 1)
    return np.reshape(rows[::-1], (dim - 1, dim + 1))
