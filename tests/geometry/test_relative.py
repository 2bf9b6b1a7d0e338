"""ε, ρ and κ in units of the clouds themselves."""

import jax
import numpy as np
import pytest
from scipy.spatial.distance import pdist

import jdam
from tests.helpers import clouds, gaussians, near


def test_the_median_within_patterns(rng):
    points = rng.normal(size=(4, 9, 3)) + 10 * rng.normal(size=(4, 1, 3))
    unit = np.median(np.concatenate([pdist(x) ** 2 / 2 for x in points]))
    geometry = jdam.Sinkhorn.relative(
        jdam.PointCloud(points), 0.1, rho=0.5, hellinger_scale=2.0, tol=1e-6, max_iterations=50
    )
    np.testing.assert_allclose(geometry.epsilon, 0.1 * unit, rtol=1e-12)
    np.testing.assert_allclose(geometry.rho, 0.5 * unit, rtol=1e-12)
    np.testing.assert_allclose(geometry.hellinger_scale, 2 / unit, rtol=1e-12)
    assert (geometry.tol, geometry.max_iterations) == (1e-6, 50)
    balanced = jdam.Sinkhorn.relative(jdam.PointCloud(points))
    np.testing.assert_allclose(balanced.epsilon, 0.05 * unit, rtol=1e-12)
    assert balanced.rho is None


@pytest.mark.full
def test_weights_count_and_padding_does_not(rng):
    cloud = clouds(rng, 1, 2, n=5)[0]
    one = jdam.Sinkhorn.relative(cloud).epsilon
    np.testing.assert_allclose(jdam.Sinkhorn.relative(cloud.pad(9)).epsilon, one, rtol=1e-12)
    np.testing.assert_allclose(
        jdam.Sinkhorn.relative([cloud, cloud.pad(7)]).epsilon, one, rtol=1e-12
    )
    points = np.array([[0.0], [1.0], [100.0]])
    heavy = jdam.PointCloud(points, np.array([0.495, 0.495, 0.01]))
    np.testing.assert_allclose(jdam.Sinkhorn.relative(heavy, 1.0).epsilon, 0.5)


@pytest.mark.full
def test_it_follows_the_unit_of_length(rng):
    """And so do recalls with it."""
    patterns = clouds(rng, 4, 2)
    query = near(rng, patterns[1], 0.2)

    def recalled(unit):
        scaled = jdam.PointCloud(unit * patterns.points, patterns.weights)
        geometry = jdam.Sinkhorn.relative(scaled, 0.2, hellinger_scale=1.0)
        memory = jdam.store(scaled, geometry)
        cue = jdam.PointCloud(unit * query.points, query.weights)
        found = jdam.recall(memory, cue, jdam.suggest_beta(memory), max_steps=3)
        return found.measure.points / unit, found.measure.weights, found.divergence / unit**2

    for x, y in zip(recalled(1.0), recalled(1e4), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9)


@pytest.mark.full
def test_many_clouds_and_atoms(rng):
    points = rng.normal(size=(60, 1500, 2)).astype("f4")
    unit = jdam.Sinkhorn.relative(jdam.PointCloud(points), 1.0).epsilon
    np.testing.assert_allclose(unit, np.median(pdist(points[0]) ** 2 / 2), rtol=0.05)


def test_inside_jit(rng):
    patterns = clouds(rng, 3, 2)
    geometry = jax.jit(jdam.Sinkhorn.relative)(patterns)
    np.testing.assert_allclose(geometry.epsilon, jdam.Sinkhorn.relative(patterns).epsilon)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda r: jdam.Sinkhorn.relative(gaussians(r, 2, 2)),
            TypeError,
            "patterns must be jdam.Poi",
        ),
        (
            lambda r: jdam.Sinkhorn.relative(clouds(r, 2, 2, n=1)),
            ValueError,
            "patterns must have diff",
        ),
        (lambda r: jdam.Sinkhorn.relative(clouds(r, 2, 2), -1.0), ValueError, "epsilon must be"),
        (lambda r: jdam.Sinkhorn.relative(clouds(r, 2, 2), rho=0.0), ValueError, "rho must be"),
    ],
)
def test_bad_arguments(rng, make, error, message):
    with pytest.raises(error, match=message):
        make(rng)
