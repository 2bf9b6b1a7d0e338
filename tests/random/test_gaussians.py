"""Gaussians at one distance from δ₀: constraints are exact, laws those stated."""

import jax
import numpy as np
import pytest
from scipy.stats import ks_2samp

import jdam
from tests.cases import only_full

KEY = jax.random.key(2509)


def slice_by_rejection(rng, num, dim):
    """Uniform on {u ∈ [0, 1]ᵈ, Σu = d/2}: the last coordinate follows from the others."""
    points = rng.uniform(size=(40 * num, dim))
    points[:, -1] = dim / 2 - points[:, :-1].sum(1)
    return points[(points[:, -1] >= 0) & (points[:, -1] <= 1)][:num]


@pytest.mark.full
@pytest.mark.parametrize("dim", [2, 3, 6, 7])
def test_spectra_are_uniform_on_their_slice(rng, dim):
    num = 4000
    gaussian = jdam.random.wasserstein_sphere(KEY, num, dim, bounds=(2.0, 5.0), dtype="float64")
    scales = np.linalg.norm(gaussian.factor, axis=1)
    ours, theirs = (scales**2 - 2) / 3, slice_by_rejection(rng, num, dim)
    assert len(theirs) == num
    np.testing.assert_allclose(ours.sum(1), dim / 2, rtol=1e-12)
    weights = np.linspace(1, 2, dim) ** 3  # a direction in general position
    for ours_1d, theirs_1d in (
        (ours[:, 0], theirs[:, 0]),
        (ours[:, -1], theirs[:, -1]),
        (ours.max(1), theirs.max(1)),
        (ours @ weights, theirs @ weights),
    ):
        assert ks_2samp(ours_1d, theirs_1d).pvalue > 1e-3


@pytest.mark.parametrize("dtype", ["float64", *only_full("float32")])
@pytest.mark.parametrize("dim", [1, 2, 9])
@pytest.mark.parametrize(
    ("bounds", "commuting"), [((1, 1.1), True), ((0, 3), False), (None, False)]
)
def test_sphere(dtype, dim, bounds, commuting):
    found = jdam.random.wasserstein_sphere(
        KEY, 50, dim, bounds=bounds, commuting=commuting, dtype=dtype
    )
    assert found.mean.dtype == found.factor.dtype == dtype
    half = dim if bounds is None else dim * sum(bounds) / 2
    mean, factor = np.asarray(found.mean, float), np.asarray(found.factor, float)
    covariance = factor @ factor.swapaxes(1, 2)
    np.testing.assert_allclose((mean**2).sum(1), half, rtol=1e-6)
    np.testing.assert_allclose(np.trace(covariance, axis1=1, axis2=2), half, rtol=1e-6)
    if bounds is not None:
        values = np.linalg.eigvalsh(covariance)
        slack = 1e-6 * max(bounds)
        assert values.min() >= bounds[0] - slack
        assert values.max() <= bounds[1] + slack
    commutator = covariance[0] @ covariance[1] - covariance[1] @ covariance[0]
    if dim > 1:
        assert (np.abs(commutator).max() < 1e-5) == commuting


@pytest.mark.full
def test_sphere_is_deterministic_and_jits():
    def draw(key):
        return jdam.random.wasserstein_sphere(key, 20, 4)

    first, again, other = draw(KEY), jax.jit(draw)(KEY), draw(jax.random.key(1))
    np.testing.assert_allclose(first.factor, again.factor, rtol=1e-6)
    assert np.abs(first.mean - other.mean).max() > 0.1
    batch = jax.vmap(draw)(jax.random.split(KEY, 3))
    assert batch.mean.shape == (3, 20, 4)
    # Means and spectra are independent of the order of patterns.
    assert np.unique(np.asarray(first.mean), axis=0).shape[0] == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num": 0}, "num must be ≥ 1; got 0"),
        ({"bounds": (2, 1)}, "bounds must be 0 ≤ λ_min ≤ λ_max"),
        ({"bounds": (-1, 1)}, "bounds must be"),
        ({"bounds": None}, "bounds must be given where commuting=True"),
    ],
)
def test_sphere_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        jdam.random.wasserstein_sphere(KEY, **{"num": 3, "dim": 2} | arguments)
    with pytest.raises(TypeError, match="dtype must be a floating dtype; got int32"):
        jdam.random.wasserstein_sphere(KEY, 3, 2, dtype="int32")
