"""Perturbations have exactly their radius."""

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest

import jdam
from tests.helpers import clouds, diagonals, gaussians, mixtures, w2_squared_of

KEY = jax.random.key(2509)


@pytest.mark.parametrize("where", ["mean", "covariance", "both"])
@pytest.mark.parametrize("kind", ["full", "low rank", "point", "diagonal"])
def test_gaussians_move_by_exactly_the_radius(rng, kind, where):
    makers = {
        "full": lambda: gaussians(rng, 3, 4),
        "low rank": lambda: gaussians(rng, 3, 4, rank=2),
        "point": lambda: jdam.Gaussian(rng.normal(size=(3, 4)), np.zeros((3, 4, 2))),
        "diagonal": lambda: diagonals(rng, 3, 4),
    }
    before = makers[kind]()
    radius = np.array([1e-3, 0.5, 30.0])
    after = jdam.random.perturb(KEY, before, radius, where=where)
    for i in range(3):
        first, second = (
            g if isinstance(g, jdam.Gaussian) else jdam.Gaussian(g.mean, jnp.diag(g.scale))
            for g in (before[i], after[i])
        )
        np.testing.assert_allclose(float(w2_squared_of(first, second)) ** 0.5, radius[i], rtol=1e-9)
    share = {"mean": 1, "covariance": 0, "both": 0.5}[where]
    moved = np.linalg.norm(after.mean - before.mean, axis=-1)
    np.testing.assert_allclose(moved, np.sqrt(share) * radius, rtol=1e-9, atol=1e-15)


def exact_w2(first, second):
    cost = ot.dist(np.asarray(first.points), np.asarray(second.points))
    return ot.emd2(np.asarray(first.weights), np.asarray(second.weights), cost) ** 0.5


@pytest.mark.parametrize("where", ["mean", "covariance", "both", "atoms"])
def test_clouds_move_by_exactly_the_radius(rng, where):
    before = clouds(rng, 3, 3, n=7)
    before = jdam.PointCloud(before.points, before.weights).pad(9)
    gaps = np.linalg.norm(before.points[:, :7, None] - before.points[:, None, :7], axis=-1)
    limit = gaps[:, ~np.eye(7, dtype=bool)].min(1) / 2
    radius = 0.999 * limit if where == "atoms" else np.array([1e-2, 1.0, 20.0])
    after = jdam.random.perturb(KEY, before, radius, where=where)
    for i in range(3):
        np.testing.assert_allclose(exact_w2(before[i], after[i]), radius[i], rtol=1e-7)
    np.testing.assert_array_equal(after.weights, before.weights)
    if where == "atoms":
        with pytest.raises(ValueError, match="at most half the distance between two atoms"):
            jdam.random.perturb(KEY, before, 1.01 * limit, where=where)


def test_a_point_moves_as_a_whole(rng):
    point = jdam.PointCloud(np.ones((2, 1, 3)))
    moved = jdam.random.perturb(KEY, point, 2.0)
    np.testing.assert_allclose(np.linalg.norm(moved.points - 1, axis=-1), 2, rtol=1e-12)
    with pytest.raises(ValueError, match="0 for a cloud that is one point"):
        jdam.random.perturb(KEY, point, 2.0, where="covariance")


def test_a_point_of_several_atoms_whose_mean_is_rounded():
    point = jdam.PointCloud(np.full((2, 5, 3), 0.1, np.float32))
    moved = jdam.random.perturb(KEY, point, np.float32(2.0))
    shifts = np.linalg.norm(moved.points - np.float32(0.1), axis=-1)
    np.testing.assert_allclose(shifts, 2, rtol=1e-6)
    with pytest.raises(ValueError, match="0 for a cloud that is one point"):
        jdam.random.perturb(KEY, point, np.float32(2.0), where="covariance")


def test_vectors_and_batches(rng):
    vectors = rng.normal(size=(5, 2, 3))
    moved = jdam.random.perturb(KEY, vectors, 0.25)
    np.testing.assert_allclose(np.linalg.norm(moved - vectors, axis=-1), 0.25, rtol=1e-12)
    assert np.unique(np.round(moved - vectors, 12).reshape(10, 3), axis=0).shape[0] == 10
    single = jax.vmap(jdam.random.perturb, (0, None, None))(
        jax.random.split(KEY, 4), gaussians(rng, 1, 3)[0], 0.5
    )
    assert single.factor.shape == (4, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": -1.0}, "radius must be ≥ 0; got -1"),
        ({"radius": np.nan}, "radius must be finite"),
        ({"radius": np.ones(2)}, r"radius must be a scalar or of shape \(3,\); got \(2,\)"),
        ({"where": "atoms"}, "where must be one of"),
    ],
)
def test_perturb_refuses(rng, arguments, message):
    with pytest.raises(ValueError, match=message):
        jdam.random.perturb(KEY, gaussians(rng, 3, 2), **{"radius": 1.0} | arguments)


@pytest.mark.full
def test_float32_radii(rng):
    before = jdam.random.wasserstein_sphere(KEY, 5, 20, dtype="float32")
    after = jdam.random.perturb(KEY, before, 0.7)
    assert after.factor.dtype == jnp.float32
    for i in range(5):
        distance = float(w2_squared_of(before[i], after[i])) ** 0.5
        np.testing.assert_allclose(distance, 0.7, rtol=1e-6)


@pytest.mark.full
def test_components_are_perturbed(rng):
    """By the radius each, which is MW₂ while none comes near another."""
    patterns = mixtures(rng, 3, 2, spread=4.0)
    memory = jdam.store(patterns)
    for where in ("mean", "covariance", "both"):
        moved = jdam.random.perturb(jax.random.key(0), patterns, 0.05, where=where)
        distances = np.sqrt(np.diag(jdam.pairwise(memory, moved)))
        np.testing.assert_allclose(distances, 0.05, rtol=1e-6)
        np.testing.assert_array_equal(moved.weights, patterns.weights)
