"""Recall of clouds with the advised settings ends at fixed points, and says so truly."""

from functools import partial

import jax
import numpy as np
import pytest

import jdam

pytestmark = pytest.mark.full

NUM = 8


def outlines():
    """Closed curves of three harmonics, 24 atoms each."""
    t = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    shapes = []
    for seed in range(NUM):
        c = np.random.default_rng(seed).normal(size=(4, 3)) / np.arange(1, 4)
        waves = [np.stack([np.cos(k * t), np.sin(k * t)]) for k in (1, 2, 3)]
        first = sum(c[:2, k] @ wave for k, wave in enumerate(waves))
        second = sum(c[2:, k] @ wave for k, wave in enumerate(waves))
        shapes.append(np.stack([first, second], 1))
    return np.stack(shapes)


@pytest.mark.parametrize(("rho", "kappa"), [(None, 0.0), (0.1, 1.0)])
def test_as_advised(rng, rho, kappa):
    """200 plain steps more lower the energy by at most 2e-3 ε and move the atoms that belong to
    the pattern by at most a tenth of √ε in the root mean square."""
    shapes = outlines()
    patterns = jdam.PointCloud(shapes.astype("f4"))
    geometry = jdam.Sinkhorn.relative(patterns, 0.05, rho=rho, hellinger_scale=kappa)
    memory = jdam.store(patterns, geometry)
    beta = jdam.suggest_beta(memory)
    if rho is None:
        cues = shapes + 0.1 * rng.normal(size=shapes.shape)
    else:
        parts = shapes[:, :16] + 0.02 * rng.normal(size=(NUM, 16, 2))
        cues = np.concatenate([parts, rng.uniform(-2, 2, size=(NUM, 3, 2))], 1)
    recall = jax.jit(lambda queries: jax.vmap(lambda q: jdam.recall(memory, q, beta))(queries))
    plain = partial(jdam.recall, max_steps=200, tol=0, acceleration=None)
    more = jax.jit(lambda queries: jax.vmap(lambda q: plain(memory, q, beta))(queries))
    found = recall(jdam.PointCloud(cues.astype("f4")))
    ended = np.isin(found.status, (jdam.Status.CONVERGED, jdam.Status.MIXTURE))
    assert ended.mean() >= 7 / 8
    np.testing.assert_array_equal(found.nearest, np.arange(NUM))
    later, epsilon = more(found.measure), float(geometry.epsilon)
    fallen = np.asarray(found.energy - later.energy) / epsilon
    belongs = np.ones(cues.shape[:2], bool) if rho is None else np.asarray(found.inliers) > 0.5
    squares = np.square(np.asarray(later.measure.points - found.measure.points)).sum(-1)
    moved = np.sqrt((belongs * squares).sum(1) / belongs.sum(1) / epsilon)
    assert np.mean(((fallen <= 2e-3) & (moved <= 0.1))[ended]) >= 7 / 8


def test_a_far_pattern_loosens_no_tolerance():
    """A stored cloud far away changes no recall of the others."""
    shapes = outlines()[:3]
    far = np.concatenate([shapes[:2], shapes[2:] + 1e5])
    ends = []
    for points in (shapes, far):
        memory = jdam.store(jdam.PointCloud(points), jdam.Sinkhorn(0.05, rho=0.5))
        cue = jdam.PointCloud(shapes[0] + 0.05)
        ends.append(jdam.recall(memory, cue, 50.0, max_steps=20))
    first, second = ends
    np.testing.assert_allclose(first.measure.points, second.measure.points, atol=1e-3)
