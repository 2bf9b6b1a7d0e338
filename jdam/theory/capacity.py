"""Capacities: numbers N(d) of random patterns that are recalled with high probability.

They are those of both papers and a general one, and grow exponentially in the dimension d. They are
returned as floats, ∞ on overflow.
"""

import numpy as np
from numpy.typing import ArrayLike


def commuting_capacity(
    dim: ArrayLike, *, bounds: tuple[float, float] = (1.0, 1.1), failure: float = 0.1
) -> np.ndarray:
    """Return the capacity for Gaussians with commuting covariances, by Theorem 1 of
    arXiv:2509.23162: N = √(p/2) exp(dα²/16), α = 1 − 2 log(λ_max/λ_min).

    With probability ≥ 1 − p, N patterns of `jdam.random.wasserstein_sphere` are stored, for
    β > 3α/λ_min and d ≥ d₀ of that theorem (d₀ = 364 for the bounds 1 and 1.1, p = 0.1 and β = 3).

    **Arguments:**

    - `dim`: d ≥ 1, of any shape.
    - `bounds`: the bounds (λ_min, λ_max) of the eigenvalues of the covariances, λ_max/λ_min < √e.
    - `failure`: p in (0, 1).

    **Returns:** N, of the shape of `dim`.

    **Raises:** `ValueError` for arguments outside these ranges.
    """
    low, high = bounds
    if not 0 < low <= high < low * np.exp(0.5):
        raise ValueError(f"bounds must be 0 < λ_min ≤ λ_max < √e·λ_min; got {bounds}")
    alpha = 1 - 2 * np.log(high / low)
    return _exponential(dim, np.sqrt(_fraction("failure", failure) / 2), alpha**2 / 16)


def cloud_capacity(dim: ArrayLike, *, overlap: float = 0.5, failure: float = 0.1) -> np.ndarray:
    """Return the capacity for point clouds, by Theorem 1 and Lemmas 15 and 16 of arXiv:2603.20656:
    N = √(2δ) exp(dη²/4).

    With probability ≥ 1 − δ, all distances between N random means in (a/√d){−1, 1}ᵈ, as those of
    `jdam.random.separated_clouds`, are at least ρ = a√(2(1−η)). Then the `margins` for the radius
    √(2r) are at least ½ρ² − ρ√(2r), and the basins {S_ε ≤ r} are disjoint if ρ > 2√(2r).

    **Arguments:**

    - `dim`: d ≥ 1, of any shape.
    - `overlap`: η in (0, 1), the largest cosine of two means.
    - `failure`: δ in (0, 1).

    **Returns:** N, of the shape of `dim`.

    **Raises:** `ValueError` for arguments outside these ranges.
    """
    rate = _fraction("overlap", overlap) ** 2 / 4
    return _exponential(dim, np.sqrt(2 * _fraction("failure", failure)), rate)


def general_capacity(dim: ArrayLike, *, overlap: float = 0.5, failure: float = 0.1) -> np.ndarray:
    """Return the capacity for Gaussians with arbitrary covariances: N = √(2p) exp(dη²/4).

    With probability ≥ 1 − p, N Gaussians whose means are uniform on a sphere of radius R_m have the
    separations Dᵢ² ≥ 2R_m²(1−η), since the cosine of two means exceeds η with
    probability ≤ exp(−dη²/2), and W₂ ≥ |Δm|. For β ≥ `general_beta` all queries within ζDᵢ of a
    pattern are recalled. The result is not in the papers: Theorem 1 of arXiv:2509.23162 requires
    commuting covariances and λ_max/λ_min < √e.

    **Arguments:** as in `cloud_capacity`, with p for δ.

    **Returns:** N, of the shape of `dim`.

    **Raises:** as `cloud_capacity`.
    """
    return cloud_capacity(dim, overlap=overlap, failure=failure)


def general_beta(
    num: ArrayLike, mean_radius: float, *, overlap: float = 0.5, basin: float = 0.25
) -> np.ndarray:
    """Return the β for which one step maps the ball of radius ζD about each of N patterns into
    itself, if all distances between patterns are at least D, D² = 2R_m²(1−η):

        β = log((N−1)/ζ) / (2R_m²(1−η)(1−2ζ)),

    by `one_step_bound` ≤ (N−1) D exp(−βD²(1−2ζ)) = ζD.

    **Arguments:**

    - `num`: N ≥ 2, of any shape.
    - `mean_radius`: the norm R_m > 0 of the means, a distance.
    - `overlap`: η in (0, 1).
    - `basin`: ζ in (0, ½).

    **Returns:** β, of the shape of `num`; at least the β from which on the bound above is valid.

    **Raises:** `ValueError` for arguments outside these ranges.
    """
    num = np.asarray(num, float)
    if not (num >= 2).all():
        raise ValueError(f"num must be ≥ 2; got {num.min()}")
    if not 0 < mean_radius < np.inf:
        raise ValueError(f"mean_radius must be finite and > 0; got {mean_radius}")
    zeta = _fraction("basin", basin)
    if zeta >= 0.5:
        raise ValueError(f"basin must be in (0, 1/2); got {basin}")
    squared = 2 * mean_radius**2 * (1 - _fraction("overlap", overlap))
    # Where βD² is less than 1/(2(1−ζ)), terms of the step bound increase with the distance, so that
    # distances D are not the worst case.
    return np.maximum(np.log((num - 1) / zeta) / (1 - 2 * zeta), 0.5 / (1 - zeta)) / squared


def _exponential(dim: ArrayLike, factor: float, rate: float) -> np.ndarray:
    """Compute factor·exp(rate·dim), ∞ on overflow."""
    dim = np.asarray(dim, float)
    if not (dim >= 1).all():
        raise ValueError(f"dim must be ≥ 1; got {dim.min()}")
    with np.errstate(over="ignore"):
        return factor * np.exp(rate * dim)


def _fraction(name: str, value: float) -> float:
    """Return `value` as a float, checked to be in (0, 1)."""
    if not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1); got {value}")
    return float(value)
