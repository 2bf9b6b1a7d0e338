"""Random Gaussian mixtures with separated means."""

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
    """Draw Gaussian mixtures with separated means: `separated_clouds` with a random covariance at
    each atom.

    The weights and means of the components are the weights and atoms of the clouds. MW₂ between two
    mixtures is at least the distance between their means. The covariances are UΛUᵀ with a uniform
    orthogonal matrix U for each component and Λ diagonal, uniform on [λ_min, λ_max]ᵈ.

    **Arguments:**

    - `key`: a `jax.random` key.
    - `num`, `num_components`, `dim`: N, K and d, all ≥ 1.
    - `radius`, `shape_radius`, `margin`, `min_weight`, `min_separation`: as in `separated_clouds`.
    - `bounds`: the bounds (λ_min, λ_max) of the eigenvalues of the covariances, in squared units of
      distance, 0 ≤ λ_min ≤ λ_max.
    - `dtype`: a floating dtype; JAX's default one if None.

    **Returns:** a `GaussianMixture` of batch shape (N,) with factors U√Λ.

    **Raises:** as `separated_clouds`; `ValueError` for bounds outside this range.
    """
    low, high = bounds
    if not 0 <= low <= high < math.inf:
        raise ValueError(f"bounds must be 0 ≤ λ_min ≤ λ_max, finite; got {bounds}")
    num_components = checks.positive_int("num_components", num_components)
    cloud_key, factor_key = jax.random.split(key)
    clouds = separated_clouds(
        cloud_key,
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
    return GaussianMixture(clouds.weights, clouds.points, _factors(factor_key, clouds, ends))


@jax.jit
@full_precision
def _factors(key: Array, clouds: PointCloud, bounds: tuple[Array, Array]) -> Array:
    """Return the random factors U√Λ, one for each atom."""
    basis_key, spectrum_key = jax.random.split(key)
    shape, dtype = clouds.points.shape, clouds.dtype
    low, high = bounds
    spectra = jax.random.uniform(spectrum_key, shape, dtype, minval=low, maxval=high)
    factors: Array = orthogonal(basis_key, shape, dtype) * jnp.sqrt(spectra)[..., None, :]
    return factors
