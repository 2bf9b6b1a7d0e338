"""Numbers that a person plays with: step limits, tolerances, small β, plain steps."""

import logging

import jax
import numpy as np
import pytest

import jdam
from tests.helpers import shk_step


def test_step_limits_and_tolerances_share_a_program(caplog):
    """`max_steps` up to the same power of two, and any `tol`."""
    memory, query = jdam.store(np.eye(3)), np.eye(3)[0] + 0.3

    def compiled(max_steps, tol):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            found = jdam.recall(memory, query, 2.0, max_steps=max_steps, tol=tol)
        assert int(found.num_steps) <= max_steps
        return sum("Compiling jit(_recall)" in record.getMessage() for record in caplog.records)

    assert compiled(50, None) == 1
    assert [compiled(*given) for given in ((51, None), (64, 0.01), (33, 0.5))] == [0, 0, 0]
    assert compiled(20, 0.5) == 1


@pytest.mark.full
def test_a_step_limit_that_is_no_power_of_two_cuts_the_trace(rng):
    memory = jdam.store(rng.normal(size=(4, 3)))
    query = rng.normal(size=3)
    short, long = (
        jdam.recall(memory, query, 0.5, max_steps=most, tol=0, save_trace=True) for most in (5, 8)
    )
    assert short.trace.measure.shape == (5, 3)
    assert int(short.num_steps) == 5
    np.testing.assert_array_equal(short.trace.energy, long.trace.energy[:5])
    np.testing.assert_array_equal(short.measure, long.trace.measure[4])


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "prior"), [("f4", True), ("f8", False)])
def test_barycentres_of_clouds_as_beta_vanishes(rng, dtype, prior):
    """The limit is the π-weighted barycentre, which steps with fixed weights reach: 400 of the
    paper's, with divergences and maps of independent code, would take minutes; the energy at a
    β at which it has all digits in float64 takes its place."""
    points = rng.normal(size=(3, 6, 2)) + 2 * rng.normal(size=(3, 1, 2))
    log_prior = np.log([0.5, 1.0, 2.0]) if prior else np.zeros(3)
    cue = rng.normal(size=(6, 2))

    def mean_divergence(dtype, beta):
        memory = jdam.store(
            jdam.PointCloud(points.astype(dtype)),
            jdam.Sinkhorn(0.3),
            log_prior=log_prior.astype(dtype),
        )
        found = jdam.recall(memory, jdam.PointCloud(cue.astype(dtype)), beta, max_steps=256)
        assert int(found.status) in (jdam.Status.CONVERGED, jdam.Status.MIXTURE)
        exact = jdam.store(jdam.PointCloud(points), jdam.Sinkhorn(0.3))
        measure = jax.tree.map(lambda leaf: np.asarray(leaf, "f8"), found.measure)
        measure = jdam.PointCloud(measure.points, measure.weights / measure.weights.sum())
        weights = np.exp(log_prior) / np.exp(log_prior).sum()
        return weights @ np.asarray(jdam.divergences(exact, measure))

    expected = mean_divergence("f8", 1e-4)
    for beta in (1e-4, 1e-9) if dtype == "f4" else (1e-12,):
        np.testing.assert_allclose(mean_divergence(dtype, beta), expected, rtol=2e-4)


@pytest.mark.full
def test_energies_keep_their_digits_as_beta_vanishes(rng):
    """E + β⁻¹ log Σπ is the mean of the divergences, up to β/2 of their variance."""
    points = rng.normal(size=(5, 3))
    memory = jdam.store(points, log_prior=rng.normal(size=5))
    query, beta = rng.normal(size=3), 1e-10
    from jdam._energy.average import Settings, evaluate

    found = evaluate(Settings(), memory, query, jax.numpy.asarray(beta))
    prior = np.exp(memory.log_prior)
    mean = prior @ np.square(points - query).sum(1) / prior.sum()
    np.testing.assert_allclose(found.shifted_energy, mean, rtol=1e-9)
    np.testing.assert_allclose(found.energy, mean - np.log(prior.sum()) / beta, rtol=1e-12)


@pytest.mark.full
def test_plain_steps_of_the_paper(rng):
    """Twenty steps of Algorithm 1 of arXiv:2603.20656, whether or not the energy rises."""
    epsilon, beta, kappa, num = 0.1, 20.0, 1.0, 6
    points = rng.normal(size=(3, num, 2)) + 2 * rng.normal(size=(3, 1, 2))
    x, p = points[1] + 0.3 * rng.normal(size=(num, 2)), np.full(num, 1 / num)
    geometry = jdam.Sinkhorn(epsilon, hellinger_scale=kappa, tol=1e-12, safeguard=False)
    memory, cue = jdam.store(jdam.PointCloud(points), geometry), jdam.PointCloud(x, p)
    stored = [(y, np.full(num, 1 / num)) for y in points]
    stepped = cue
    for _ in range(4):
        x, p = (
            np.asarray(part, float) for part in shk_step(x, p, stored, epsilon, beta, 1.0, kappa)
        )
        stepped = jdam.step(memory, stepped, beta)
        np.testing.assert_allclose(stepped.points, x, rtol=1e-7, atol=1e-8)
        np.testing.assert_allclose(stepped.weights, p, rtol=1e-7, atol=1e-8)
    recalled = jdam.recall(memory, cue, beta, max_steps=4, tol=0)
    np.testing.assert_allclose(recalled.measure.points, x, rtol=1e-7, atol=1e-8)
    assert "safeguard=False" in repr(geometry)
    with pytest.raises(TypeError, match="safeguard must be a bool; got 1"):
        jdam.Sinkhorn(0.1, safeguard=1)
