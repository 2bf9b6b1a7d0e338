"""Clouds where float32 or float64 nearly end: units, padding, ε, far atoms."""

from functools import partial

import jax
import numpy as np
import ot
import pytest

import jdam
from tests.helpers import entropic_transport, sinkhorn_divergence

pytestmark = pytest.mark.full


@jax.jit
def compare(memory, query):
    geometry = memory.geometry
    guess = geometry.first_guess(memory.prepared)
    patterns = jdam.Patterns(memory.patterns, memory.prepared, guess)
    return geometry.compare(geometry.view(query), patterns)


def compared(x, a, y, b, geometry):
    """S_ε, the first variation F − F̄ at each atom, and whether the solver missed."""
    memory = jdam.store(jdam.PointCloud(y[None], b[None]), geometry)
    found = compare(memory, jdam.PointCloud(x, a))
    variation = np.asarray(found.pull.variation[0], np.float64)
    return float(found.divergence[0]), variation - a @ variation, bool(found.not_converged[0])


def uniform(n, dtype=np.float64):
    return np.full(n, 1 / n, dtype)


def test_padding_may_lie_anywhere(rng):
    """Of a query and of patterns, at any distance, with both solvers."""
    x = rng.normal(size=(6, 3)).astype(np.float32)
    y = (rng.normal(size=(2, 5, 3)) + 0.3).astype(np.float32)
    recall = partial(jdam.recall, beta=5.0, max_steps=4)
    wanted = None
    for solver in ("stabilised", "ott"):
        geometry = jdam.Sinkhorn(0.1, hellinger_scale=0.5, solver=solver)
        wanted = wanted or recall(jdam.store(jdam.PointCloud(y), geometry), jdam.PointCloud(x))
        for distance in (0.0, 1e4, 1e20):
            far = distance * np.ones((2, 3), np.float32)
            none = np.zeros(2, np.float32)
            query = jdam.PointCloud(np.r_[x, far], np.r_[uniform(6, np.float32), none])
            rows = [np.concatenate([cloud, -far]) for cloud in y]
            weights = [np.r_[uniform(5, np.float32), none]] * 2
            patterns = jdam.PointCloud(np.stack(rows), np.stack(weights))
            found = recall(jdam.store(patterns, geometry), query)
            np.testing.assert_allclose(found.energy, wanted.energy, rtol=1e-4)
            np.testing.assert_allclose(found.measure.points[:6], wanted.measure.points, atol=2e-3)
            assert (found.measure.weights[6:] == 0).all()
            assert int(found.status) != jdam.Status.NONFINITE


@jax.jit
def recall_in_units(clouds, cue, unit, kappa):
    geometry = jdam.Sinkhorn(0.1 * unit**2, hellinger_scale=kappa / unit**2)
    memory, query = jdam.store(jdam.PointCloud(clouds), geometry), jdam.PointCloud(cue)
    recalled = jdam.recall(memory, query, 20 / unit**2, max_steps=10)
    return recalled, jdam.divergences(memory, query) / unit**2


@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_recall_does_not_depend_on_the_unit(rng, kappa):
    clouds = rng.normal(size=(3, 8, 2)) + 2 * rng.normal(size=(3, 1, 2))
    cue = np.concatenate([clouds[1], 9 * np.ones((2, 2))])
    wanted, distances = recall_in_units(clouds, cue, np.float64(1.0), np.float64(kappa))
    for unit in (1e-12, 1e-8, 1.0, 1e8, 3e9, 1e12):
        clouds_of, cue_of = ((unit * v).astype(np.float32) for v in (clouds, cue))
        found, scaled = recall_in_units(clouds_of, cue_of, np.float32(unit), np.float32(kappa))
        assert int(found.status) != jdam.Status.NONFINITE
        np.testing.assert_allclose(scaled, distances, rtol=1e-4)
        assert int(found.nearest) == int(wanted.nearest)
        strays = found.measure.weights[8:].sum(), wanted.measure.weights[8:].sum()
        np.testing.assert_allclose(*strays, atol=1e-4)
        np.testing.assert_allclose(
            found.measure.points[:8] / unit, wanted.measure.points[:8], atol=0.1
        )


def test_far_atoms_are_right_or_reported(rng):
    """Beyond the digits of float32 by linear programming, to which S_ε is close at this ε."""
    x, y, weights = 3 * rng.random((4, 2)), 20 * rng.random((4, 2)), uniform(4)
    for far in (1e2, 1e4, 1e6, 1e8):
        x[3], y[3] = [0.5, far], [2.8, far]
        clouds = x.astype(np.float32), y.astype(np.float32)
        exact = [cloud.astype(np.float64) for cloud in clouds]
        cost = ((exact[0][:, None] - exact[1][None]) ** 2).sum(-1) / 2
        single = weights.astype(np.float32)
        found, _, missed = compared(clouds[0], single, clouds[1], single, jdam.Sinkhorn(0.1))
        wanted = ot.emd2(weights, weights, cost)
        assert missed or abs(found - wanted) < 0.02 * wanted
        assert missed == (far > 1e3)


@pytest.mark.parametrize("solver", ["stabilised", "ott"])
def test_large_epsilon_in_single_precision(rng, solver):
    x, y = rng.normal(size=(7, 3)), 0.3 + 0.7 * rng.normal(size=(5, 3))
    problem = [v.astype(np.float32) for v in (x, rng.dirichlet(3 * np.ones(7)), y, uniform(5))]
    for epsilon in (1.0, 1e2, 1e4, 1e6):
        value, variation, _ = sinkhorn_divergence(*problem, epsilon)
        found, at_atoms, missed = compared(*problem, jdam.Sinkhorn(epsilon, solver=solver))
        assert not missed
        np.testing.assert_allclose(found, float(value), atol=2e-6)
        variation = np.asarray(variation - problem[1] @ variation, np.float64)
        np.testing.assert_allclose(at_atoms, variation, atol=3e-5)


def test_variation_at_small_epsilon_is_as_good_as_float64_lets_it(rng):
    """The rounding of marginals, over 1 − σ₂² of the plan, by which potentials follow them."""
    checked = 0
    for seed in range(2):
        rng = np.random.default_rng(seed)
        x, a = rng.normal(size=(10, 2)), uniform(10)
        for y in (x + 0.05 * rng.normal(size=x.shape), rng.normal(size=x.shape)):
            for epsilon in (0.1, 0.05):
                geometry = jdam.Sinkhorn(epsilon, tol=1e-13)
                _, at_atoms, _ = compared(x, a, y, a, geometry)
                try:
                    _, variation, _ = sinkhorn_divergence(x, a, y, a, epsilon)
                except AssertionError:  # the oracle's
                    continue
                gap = 1 - coupling_correlation(x, y, a, epsilon) ** 2
                limit = 100 * epsilon * 1e-16 / max(gap, 1e-16) + 1e-13
                if limit > 1e-6:
                    continue
                checked += 1
                variation = np.asarray(variation - a @ variation, np.float64)
                np.testing.assert_allclose(at_atoms, variation, atol=limit)
    assert checked > 6


def coupling_correlation(x, y, a, epsilon):
    """The second singular value of P/√(ab)."""
    cost = ((x[:, None] - y[None]) ** 2).sum(-1) / 2
    _, f, g, _ = entropic_transport(x, a, y, a, epsilon)
    logs = np.asarray(f[:, None] + g[None] - cost, np.float64) / epsilon
    return np.linalg.svd(np.exp(logs) * np.sqrt(a[:, None] * a[None]))[1][1]


def test_a_cloud_and_itself(rng):
    """F = 0, in any order of the atoms."""
    x, a = rng.normal(size=(10, 2)), uniform(10)
    for epsilon in (0.3, 0.03, 0.003):
        geometry = jdam.Sinkhorn(epsilon, tol=1e-13)
        for y in (x, x[rng.permutation(10)]):
            found, variation, _ = compared(x, a, y, a, geometry)
            assert abs(found) < 1e-14
            assert abs(variation).max() < 1e-9
