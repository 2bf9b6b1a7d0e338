"""Gaussian mixtures with means far apart."""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jdam._core import checks
from jdam._core.derivatives import full_precision
from jdam._measures.mixture import GaussianMixture
from jdam._measures.point_cloud import PointCloud
from jdam.random._uniform import orthogonal
from jdam.random.clouds import separated_clouds


def separated_mixtures(
    key: Array,
    num: int,
    num_components: int,
    dim: int,
    *,
    radius: float,
    shape_radius: float,
    margin: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    min_weight: float = 0.0,
    min_separation: float = 0.0,
    dtype: DTypeLike | None = None,
) -> GaussianMixture:
    """Gaussian mixtures with means far apart: `separated_clouds` with a covariance at each atom.

    Weights pₖ and means mₖ of components are the weights and atoms of those clouds, so that
    MW₂ between two mixtures is at least the distance of their means. Covariances are UΛUᵀ, U a
    uniform orthogonal matrix for each component and Λ diagonal, uniform on [λ_min, λ_max]ᵈ.

    **Arguments:** `key`, a `jax.random` key; `num` N, `num_components` K, `dim` d ≥ 1; distances
    `radius` R, `shape_radius` r, `margin` b and `min_separation`, and `min_weight`, as in
    `separated_clouds`; `bounds` (λ_min, λ_max) of the covariances' eigenvalues, which are squared
    lengths, 0 ≤ λ_min ≤ λ_max. `dtype`: JAX's default one if None.

    **Returns:** a `GaussianMixture` of batch shape (N,), with factors U√Λ.

    **Raises:** as `separated_clouds`; `ValueError` for bounds that are not of this kind.
    """
    low, high = bounds
    if not 0 <= low <= high < math.inf:
        raise ValueError(f"bounds must be 0 ≤ λ_min ≤ λ_max, finite; got {bounds}")
    num_components = checks.positive_int("num_components", num_components)
    for_clouds, for_factors = jax.random.split(key)
    clouds = separated_clouds(
        for_clouds,
        num,
        num_components,
        dim,
        radius=radius,
        shape_radius=shape_radius,
        margin=margin,
        min_weight=min_weight,
        min_separation=min_separation,
        dtype=dtype,
    )
    ends = jnp.asarray(low, clouds.dtype), jnp.asarray(high, clouds.dtype)
    return GaussianMixture(clouds.weights, clouds.points, _factors(for_factors, clouds, ends))


@jax.jit
@full_precision
def _factors(key: Array, clouds: PointCloud, bounds: tuple[Array, Array]) -> Array:
    """U√Λ for each atom."""
    for_bases, for_spectra = jax.random.split(key)
    shape, dtype = clouds.points.shape, clouds.dtype
    low, high = bounds
    spectra = jax.random.uniform(for_spectra, shape, dtype, minval=low, maxval=high)
    factors: Array = orthogonal(for_bases, shape, dtype) * jnp.sqrt(spectra)[..., None, :]
    return factors
