"""Capacities: the events they promise happen, and the formulas are the papers'."""

import jax
import numpy as np
import pytest

import jdam
from jdam import theory


def test_formulas():
    np.testing.assert_allclose(
        theory.commuting_capacity([364, 500], bounds=(1.0, 1.1), failure=0.1),
        np.sqrt(0.05) * np.exp(np.array([364, 500]) * (1 - 2 * np.log(1.1)) ** 2 / 16),
    )
    rate = np.log(theory.commuting_capacity(201) / theory.commuting_capacity(200))
    np.testing.assert_allclose(rate, 0.0409, atol=5e-5)  # as published
    np.testing.assert_allclose(
        theory.cloud_capacity(128, overlap=0.5, failure=0.1), np.sqrt(0.2) * np.exp(8)
    )
    assert theory.general_capacity(1e6) == np.inf


@pytest.mark.full
def test_separated_means():
    """All pairs of that many means are at their distances, in 1 − δ of the draws."""
    dim, overlap = 64, 0.5
    num = int(theory.cloud_capacity(dim, overlap=overlap, failure=0.1))

    def nearest(key):
        found = jdam.random.separated_clouds(
            key, num, 1, dim, radius=1.0, shape_radius=0.0, margin=0.0
        )
        return theory.separations(jdam.store(found.points[:, 0])).min()

    closest = jax.vmap(nearest)(jax.random.split(jax.random.key(3), 20))
    assert (closest >= np.sqrt(2 * (1 - overlap)) - 1e-6).mean() >= 0.9


@pytest.mark.full
def test_general_capacity_and_beta():
    """Gaussians that do not commute: so many are kept apart, and their basins are as promised."""
    dim, overlap, basin = 40, 0.6, 0.2
    num = int(theory.general_capacity(dim, overlap=overlap, failure=0.1))
    assert num == 16
    patterns = jdam.random.wasserstein_sphere(
        jax.random.key(0), num, dim, bounds=(0.2, 3.0), commuting=False, dtype="float64"
    )
    mean_radius = float(np.linalg.norm(patterns.mean[0]))
    least = np.sqrt(2 * (1 - overlap)) * mean_radius
    memory = jdam.store(patterns)
    assert theory.separations(memory).min() >= least
    beta = theory.general_beta(num, mean_radius, overlap=overlap, basin=basin)
    assert (theory.basin_radius(memory, beta) >= basin * least).all()
    queries = jdam.random.perturb(jax.random.key(1), patterns, basin * least)
    certificates = jax.vmap(theory.certify, (None, 0, None))(memory, queries, beta)
    np.testing.assert_array_equal(certificates.index, np.arange(num))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.commuting_capacity(5, bounds=(1.0, 1.7)), "bounds must be 0 < λ_min"),
        (lambda: theory.commuting_capacity(0), "dim must be ≥ 1; got 0"),
        (lambda: theory.commuting_capacity(5, failure=1.0), r"failure must be in \(0, 1\); got 1"),
        (lambda: theory.cloud_capacity(5, overlap=0), r"overlap must be in \(0, 1\); got 0"),
        (lambda: theory.general_beta(1, 1.0), "num must be ≥ 2; got 1"),
        (lambda: theory.general_beta(5, 0.0), "mean_radius must be finite and > 0"),
        (lambda: theory.general_beta(5, 1.0, basin=0.5), r"basin must be in \(0, 1/2\); got 0.5"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
