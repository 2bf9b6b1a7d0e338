"""Clouds with means far apart: constraints are exact, laws those stated."""

import jax
import numpy as np
import pytest
from scipy.stats import ks_2samp

import jdam

KEY = jax.random.key(2509)


SETTINGS = {"radius": 5.0, "shape_radius": 0.8, "margin": 0.4}


@pytest.mark.parametrize("dim", [2, 30])
def test_separated_clouds(dim):
    found = jdam.random.separated_clouds(
        KEY, 60, 5, dim, **SETTINGS, min_weight=0.1, min_separation=0.3, dtype="float64"
    )
    points, weights = np.asarray(found.points), np.asarray(found.weights)
    assert points.shape == (60, 5, dim)
    length = 5 - 2 * 0.8 - 0.4
    means = np.einsum("ij,ijd->id", weights, points)
    np.testing.assert_allclose(np.abs(means), length / np.sqrt(dim), rtol=1e-12)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)
    assert weights.min() >= 0.1
    assert np.linalg.norm(points, axis=-1).max() <= 5 - 0.4
    gaps = np.linalg.norm(points[:, :, None] - points[:, None], axis=-1)
    assert gaps[:, ~np.eye(5, dtype=bool)].min() >= 0.3
    signs, counts = np.unique(np.sign(means[:, :2]), axis=0, return_counts=True)
    assert len(signs) == 4  # all corners occur
    assert counts.min() > 3


def test_weights_are_uniform_on_their_simplex(rng):
    found = jdam.random.separated_clouds(KEY, 3000, 4, 1, **SETTINGS, min_weight=0.1)
    theirs = 0.1 + 0.6 * rng.dirichlet(np.ones(4), 3000)
    assert ks_2samp(found.weights[:, 2], theirs[:, 2]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": 2.0}, r"radius must be more than 2·shape_radius \+ margin = 2"),
        ({"margin": -1}, "margin must be finite and ≥ 0; got -1"),
        ({"min_weight": 0.3}, r"min_weight must be in \[0, 1/num_atoms\]; got 0.3"),
        ({"min_separation": 1.5}, "min_separation must leave room for 6 atoms"),
    ],
)
def test_clouds_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        jdam.random.separated_clouds(KEY, 2, 6, 1, **SETTINGS | arguments)
