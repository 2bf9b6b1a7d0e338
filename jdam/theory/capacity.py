"""How many random patterns a memory holds: the capacities of both papers, and a general one.

All are numbers of patterns N(d) that grow exponentially in the dimension; as floats, ∞ where they
are too many for one.
"""

import numpy as np
from numpy.typing import ArrayLike


def commuting_capacity(
    dim: ArrayLike, *, bounds: tuple[float, float] = (1.0, 1.1), failure: float = 0.1
) -> np.ndarray:
    """N = √(p/2) exp(dα²/16), α = 1 − 2 log(λ_max/λ_min): Theorem 1 of arXiv:2509.23162.

    So many patterns of `jdam.random.wasserstein_sphere` with commuting covariances are stored with
    probability ≥ 1 − p, for β > 3α/λ_min and d large enough (that theorem's d₀, 364 for the bounds
    1 and 1.1, p = 0.1 and β = 3).

    **Arguments:** `dim` d, of any shape; `bounds` λ_min, λ_max with λ_max/λ_min < √e;
    `failure` p in (0, 1).

    **Raises:** `ValueError` for arguments outside these.
    """
    low, high = bounds
    if not 0 < low <= high < low * np.exp(0.5):
        raise ValueError(f"bounds must be 0 < λ_min ≤ λ_max < √e·λ_min; got {bounds}")
    alpha = 1 - 2 * np.log(high / low)
    return _exponential(dim, np.sqrt(_fraction("failure", failure) / 2), alpha**2 / 16)


def cloud_capacity(dim: ArrayLike, *, overlap: float = 0.5, failure: float = 0.1) -> np.ndarray:
    """N = √(2δ) exp(dη²/4): Theorem 1, Lemmas 15 and 16 of arXiv:2603.20656.

    So many means (a/√d){−1, 1}ᵈ, as of `jdam.random.separated_clouds`, are all at distances of at
    least ρ = a√(2(1−η)) with probability ≥ 1 − δ. `margins` of radius √(2r) are then at least
    ½ρ² − ρ√(2r): the basins {S_ε ≤ r} are disjoint where ρ > 2√(2r).

    **Arguments:** `dim` d, of any shape; `overlap` η and `failure` δ in (0, 1).

    **Raises:** `ValueError` for arguments outside these.
    """
    rate = _fraction("overlap", overlap) ** 2 / 4
    return _exponential(dim, np.sqrt(2 * _fraction("failure", failure)), rate)


def general_capacity(dim: ArrayLike, *, overlap: float = 0.5, failure: float = 0.1) -> np.ndarray:
    """N = √(2p) exp(dη²/4), for Gaussians with any covariances, commuting or not.

    So many means uniform on a sphere of radius R_m have Dᵢ² ≥ 2R_m²(1−η) for all i with
    probability ≥ 1 − p, since the cosine of two exceeds η with probability ≤ exp(−dη²/2) and
    W₂ ≥ |Δm|. With β ≥ `general_beta` every query within a share ζ of the separation is recalled.
    No counterpart in the papers: Theorem 1 of arXiv:2509.23162 needs commuting covariances and
    λ_max/λ_min < √e.

    **Arguments** and **raises:** as `cloud_capacity`.
    """
    return cloud_capacity(dim, overlap=overlap, failure=failure)


def general_beta(
    num: ArrayLike, mean_radius: float, *, overlap: float = 0.5, basin: float = 0.25
) -> np.ndarray:
    """β = log((N−1)/ζ) / (2R_m²(1−η)(1−2ζ)): of N patterns whose distances are all at least D,
    D² = 2R_m²(1−η), one step maps the ball of radius ζD about each into itself, by
    `one_step_bound` ≤ (N−1) D exp(−βD²(1−2ζ)) = ζD.

    **Arguments:** `num` N ≥ 2, of any shape; `mean_radius` R_m > 0, the norm of the means;
    `overlap` η in (0, 1); `basin` ζ in (0, ½).

    **Raises:** `ValueError` for arguments outside these.
    """
    num = np.asarray(num, float)
    if not (num >= 2).all():
        raise ValueError(f"num must be ≥ 2; got {num.min()}")
    if not 0 < mean_radius < np.inf:
        raise ValueError(f"mean_radius must be finite and > 0; got {mean_radius}")
    share = _fraction("basin", basin)
    if share >= 0.5:
        raise ValueError(f"basin must be in (0, 1/2); got {basin}")
    squared = 2 * mean_radius**2 * (1 - _fraction("overlap", overlap))
    # Where β D² is small the largest term of the step bound is not that of the nearest patterns.
    return np.maximum(np.log((num - 1) / share) / (1 - 2 * share), 0.5 / (1 - share)) / squared


def _exponential(dim: ArrayLike, factor: float, rate: float) -> np.ndarray:
    dim = np.asarray(dim, float)
    if not (dim >= 1).all():
        raise ValueError(f"dim must be ≥ 1; got {dim.min()}")
    with np.errstate(over="ignore"):
        return factor * np.exp(rate * dim)


def _fraction(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1); got {value}")
    return float(value)
