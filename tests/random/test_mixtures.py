"""Mixtures with means far apart: constraints are exact."""

import jax
import numpy as np
import pytest

import jdam

KEY = jax.random.key(2509)
SETTINGS = {"radius": 5.0, "shape_radius": 0.8, "margin": 0.4}


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bounds", [(0.5, 2.0), (0.0, 0.0)])
def test_separated_mixtures(dtype, bounds):
    found = jdam.random.separated_mixtures(
        KEY, 30, 3, 4, **SETTINGS, bounds=bounds, min_weight=0.2, min_separation=0.3, dtype=dtype
    )
    assert found.batch_shape == (30,)
    assert found.means.shape == (30, 3, 4)
    assert found.dtype == dtype
    weights, means = np.asarray(found.weights), np.asarray(found.means)
    assert weights.min() >= 0.2 * (1 - 1e-6)
    np.testing.assert_allclose(np.abs(found.mean), (5 - 2 * 0.8 - 0.4) / 2, rtol=1e-6)
    gaps = np.linalg.norm(means[:, :, None] - means[:, None], axis=-1)
    assert gaps[:, ~np.eye(3, dtype=bool)].min() >= 0.3 * (1 - 1e-6)
    factors = np.asarray(found.factors, float)
    values = np.linalg.eigvalsh(factors @ factors.swapaxes(-1, -2))
    assert values.min() >= bounds[0] - 1e-6
    assert values.max() <= bounds[1] + 1e-6
    if bounds[1]:
        assert values.std() > 0.3  # not all at one end
        assert np.ptp(factors, axis=(0, 1)).min() > 0.5  # each component has its own basis


@pytest.mark.full
def test_they_are_as_far_apart_as_their_means():
    """And recalled, perturbed, with components in another order."""
    patterns = jdam.random.separated_mixtures(KEY, 8, 3, 4, **SETTINGS, min_weight=0.2)
    memory = jdam.store(patterns)
    means = np.asarray(patterns.mean)
    apart = np.linalg.norm(means[:, None] - means[None], axis=-1)
    distances = np.sqrt(np.asarray(jdam.pairwise(memory)))
    assert (distances >= apart - 1e-6).all()
    other = jdam.GaussianMixture(
        patterns.weights[:, ::-1], patterns.means[:, ::-1], patterns.factors[:, ::-1]
    )
    queries = jdam.random.perturb(KEY, other, 0.3)
    beta = jdam.suggest_beta(memory, queries)
    found = jdam.recall_batch(memory, queries, beta)
    rest = np.sqrt(np.diag(jdam.pairwise(memory, found.measure)))
    np.testing.assert_array_equal(found.nearest, np.arange(8))
    assert (rest < 0.05 * 0.3).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bounds": (2.0, 1.0)}, r"bounds must be 0 ≤ λ_min ≤ λ_max, finite; got \(2.0, 1.0\)"),
        ({"bounds": (-1.0, 1.0)}, "bounds must be 0 ≤ λ_min"),
        ({"radius": 2.0}, r"radius must be more than 2·shape_radius \+ margin"),
        ({"num_components": 0}, "num_components must be"),
    ],
)
def test_mixtures_refuse(arguments, message):
    settings = {"num": 2, "num_components": 3, "dim": 2} | SETTINGS | arguments
    with pytest.raises(ValueError, match=message):
        jdam.random.separated_mixtures(KEY, **settings)
