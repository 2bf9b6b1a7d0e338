"""One step of recall as the Gaussian paper states it, in plain NumPy and SciPy: for every pair
Wasserstein distance and transport map from matrix square roots and an inverse."""

import numpy as np
from scipy.linalg import inv, sqrtm


def w2_squared(m, cov, mean, covariance):
    root = sqrtm(cov).real
    crossed = sqrtm(root @ covariance @ root).real
    return np.sum((m - mean) ** 2) + np.trace(cov + covariance - 2 * crossed)


def transport_matrix(cov, covariance):
    """A = Σ^½ (Σ^½ Ω Σ^½)^-½ Σ^½, with T(x) = μ + A(x − m)."""
    root = sqrtm(covariance).real
    middle = inv(sqrtm(root @ cov @ root).real)
    return root @ middle @ root


def step(m, cov, means, covariances, beta):
    divergences = np.array(
        [w2_squared(m, cov, *pattern) for pattern in zip(means, covariances, strict=True)]
    )
    weights = np.exp(-beta * (divergences - divergences.min()))
    weights /= weights.sum()
    maps = np.array([transport_matrix(cov, covariance) for covariance in covariances])
    mixed = np.einsum("i,ijk->jk", weights, maps)
    return weights @ means, mixed @ cov @ mixed
