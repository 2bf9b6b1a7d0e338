"""Gaussians of the papers' experiments, at one W₂ distance from δ₀."""

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
    """Gaussians at W₂ distance R from δ₀, R² = d(λ_min + λ_max): the patterns of
    arXiv:2509.23162, Algorithms 2 and 3.

    Means are uniform on |μ|² = R²/2, spectra uniform on {λ ∈ [λ_min, λ_max]ᵈ, Σλ = R²/2}, and
    eigenvectors a random orthogonal U: one for all if `commuting`, one for each otherwise. The
    spectra are exact samples in a fixed number of operations.

    **Arguments:** `key`, a `jax.random` key; `num` N and `dim` d ≥ 1; `bounds` (λ_min, λ_max) of
    the eigenvalues, 0 ≤ λ_min ≤ λ_max. `bounds=None`, which needs `commuting=False`, are the
    general covariances of the paper's second experiment: Σ ∝ WWᵀ + I/100, W a normal matrix d×d,
    scaled to trace d, with |μ|² = d and so R² = 2d. `dtype`: JAX's default one if None.

    **Returns:** a `Gaussian` of batch shape (N,), with factors U√Λ.

    **Raises:** `TypeError` or `ValueError` for arguments that are not of these kinds.
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
    for_means, for_spectra, for_bases = jax.random.split(key, 3)
    (low, high), dtype = bounds, bounds[0].dtype
    spectra = low + (high - low) * _middle_of_cube(for_spectra, num, dim, dtype)
    shape = (1,) if commuting else (num,)
    bases = orthogonal(for_bases, (*shape, dim), dtype)
    means = jnp.sqrt(dim * (low + high) / 2) * directions(for_means, (num, dim), dtype)
    return Gaussian(means, bases * jnp.sqrt(spectra)[:, None])


@partial(jax.jit, static_argnums=(1, 2, 3))
@full_precision
def _wishart_sphere(key: Array, num: int, dim: int, dtype: jnp.dtype) -> Gaussian:
    for_means, for_factors = jax.random.split(key)
    normal = jax.random.normal(for_factors, (num, dim, dim), dtype)
    factors = cholesky(normal @ normal.mT + jnp.eye(dim, dtype=dtype)[None] / 100)
    factors = factors * jnp.sqrt(dim / squared_norm(factors))[:, None, None]
    return Gaussian(math.sqrt(dim) * directions(for_means, (num, dim), dtype), factors)


def _middle_of_cube(key: Array, num: int, dim: int, dtype: jnp.dtype) -> Float[Array, "N d"]:
    """Points uniform on {u ∈ [0, 1]ᵈ, Σu = d/2}.

    The slice Pₙ(s) = {u ∈ [0, 1]ⁿ, Σu = s} is made of cones from its centre (s/n, …, s/n) over
    its facets, uₖ = 0 and uₖ = 1, which are Pₙ₋₁(s) and Pₙ₋₁(s−1) again, at distances s/n and
    1 − s/n. So a uniform point lies on the segment from the centre to a uniform point of a facet
    chosen by the volumes of the cones, at a share r of it, r^(n−1) uniform on [0, 1].
    """
    lower = jnp.asarray(_chances_of_zero(dim), dtype)
    for_facets, for_shares, for_order = jax.random.split(key, 3)
    choices = jax.random.uniform(for_facets, (dim - 1, num), dtype)
    shares = jax.random.uniform(for_shares, (dim - 1, num), dtype)

    def descend(carry: tuple[Any, ...], level: tuple[Any, ...]) -> tuple[tuple[Any, ...], Array]:
        # A point of the slice reached so far is shift + scale·(point of the slice).
        ones, shift, scale = carry
        size, chances, choice, share = level
        share = share ** (1 / (size - 1))
        centre = (dim / 2 - ones.astype(dtype)) / size
        shift, scale = shift + scale * (1 - share) * centre, scale * share
        one = choice >= chances[ones]
        return (ones + one.astype(jnp.int32), shift, scale), shift + jnp.where(one, scale, 0)

    start = (jnp.zeros(num, jnp.int32), jnp.zeros(num, dtype), jnp.ones(num, dtype))
    sizes = jnp.arange(dim, 1, -1, dtype=dtype)
    (ones, shift, scale), points = jax.lax.scan(descend, start, (sizes, lower, choices, shares))
    last = shift + scale * (dim / 2 - ones.astype(dtype))
    points = jnp.concatenate([points, last[None]]).T
    points = jax.random.permutation(for_order, points, axis=1, independent=True)
    return jnp.clip(points, 0, 1)  # rounding


def _chances_of_zero(dim: int) -> np.ndarray:
    """(d−1, d+1): for n = d, …, 2 and s = d/2 − j, j = 0, …, d, the share of Pₙ(s) in cones over
    facets uₖ = 0. The volumes are those of the B-spline recursion, all of whose terms are ≥ 0:

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
