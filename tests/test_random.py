"""Samplers: their constraints are exact, their laws are those stated."""

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from scipy.stats import ks_2samp

import jdam
from tests.helpers import clouds, diagonals, gaussians, mixtures, w2_squared_of

KEY = jax.random.key(2509)


def slice_by_rejection(rng, num, dim):
    """Uniform on {u ∈ [0, 1]ᵈ, Σu = d/2}: the last coordinate follows from the others."""
    points = rng.uniform(size=(40 * num, dim))
    points[:, -1] = dim / 2 - points[:, :-1].sum(1)
    return points[(points[:, -1] >= 0) & (points[:, -1] <= 1)][:num]


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


@pytest.mark.parametrize("dtype", ["float32", "float64"])
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


def test_float32_radii(rng):
    before = jdam.random.wasserstein_sphere(KEY, 5, 20, dtype="float32")
    after = jdam.random.perturb(KEY, before, 0.7)
    assert after.factor.dtype == jnp.float32
    for i in range(5):
        distance = float(w2_squared_of(before[i], after[i])) ** 0.5
        np.testing.assert_allclose(distance, 0.7, rtol=1e-6)


def test_components_are_perturbed(rng):
    """By the radius each, which is MW₂ while none comes near another."""
    patterns = mixtures(rng, 3, 2, spread=4.0)
    memory = jdam.store(patterns)
    for where in ("mean", "covariance", "both"):
        moved = jdam.random.perturb(jax.random.key(0), patterns, 0.05, where=where)
        distances = np.sqrt(np.diag(jdam.pairwise(memory, moved)))
        np.testing.assert_allclose(distances, 0.05, rtol=1e-6)
        np.testing.assert_array_equal(moved.weights, patterns.weights)
