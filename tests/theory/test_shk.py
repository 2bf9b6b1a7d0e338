"""Constants of the SHK flow, against differences and random cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from jdam import theory
from tests.helpers import clouds, gaussians

KAPPA, EPSILON = 0.3, 0.2


@pytest.fixture(scope="module")
def memory():
    rng = np.random.default_rng(5)
    return jdam.store(
        clouds(rng, 3, 2, n=5), jdam.Sinkhorn(EPSILON, hellinger_scale=KAPPA, tol=1e-12)
    )


@pytest.mark.full
def test_stiffness_is_the_curvature_in_weights(memory):
    """εσ/(1−σ²), from the plan, is the largest eigenvalue of the Hessian in weights."""
    cloud = memory[1]
    target = jdam.store(memory.patterns[1:2], memory.geometry)
    root = jnp.sqrt(cloud.weights)

    def divergence(tilt):
        weights = cloud.weights + root * (tilt - root * jnp.vdot(root, tilt))
        return jdam.divergences(target, jdam.PointCloud(cloud.points, weights))[0]

    hessian = jax.jit(jax.hessian(divergence))(jnp.zeros(5))
    most = np.linalg.eigvalsh(hessian).max()
    np.testing.assert_allclose(theory.weight_stiffness(memory)[1], most, rtol=1e-5)


@pytest.mark.full
def test_constants(memory):
    found = theory.shk_constants(memory, 1, step_size=0.5)
    points = np.asarray(memory.patterns.points).reshape(-1, 2)
    spread = np.linalg.norm(points[:, None] - points[None], axis=-1).max()
    assert spread <= found.diameter <= 1.5 * spread
    expected = found.diameter * np.sqrt(1 + KAPPA * found.diameter**2 / 4)
    np.testing.assert_allclose(found.gradient, expected)
    assert found.retraction >= 1
    assert 0 < found.curvature < found.smoothness
    assert found.smoothness >= KAPPA * theory.weight_stiffness(memory)[1] * (1 - 1e-6)
    assert 0 < found.safe_step <= 1 / found.smoothness
    still = jdam.store(memory.patterns, jdam.Sinkhorn(EPSILON, tol=1e-12))
    without = theory.shk_constants(still, 1)
    assert float(without.retraction) == 1
    # The position block: between 1 and 1.5 at patterns of all shapes seen.
    assert 0.9 < without.smoothness < 1.6


@pytest.mark.full
def test_gradients_are_bounded(memory):
    """|grad S_ε| ≤ G for clouds of atoms within the ball."""
    rng = np.random.default_rng(0)
    points = np.asarray(memory.patterns.points)
    mixed = rng.dirichlet(np.ones(15), size=(40, 5)) @ points.reshape(-1, 2)
    queries = jdam.PointCloud(mixed, rng.dirichlet(np.ones(5), size=40))
    one = jdam.store(memory.patterns[0:1], memory.geometry)
    ends = jax.vmap(lambda q: jdam.recall(one, q, 1.0, max_steps=1, step_size=1e-9))(queries)
    bound = theory.shk_constants(memory, 0).gradient
    assert (ends.residual <= bound).all()
    assert ends.residual.max() > 0.05 * bound


@pytest.mark.full
def test_patterns_drift_no_farther(memory):
    """Theorem 3 (2): SHK lengths of a step from a pattern, by what the step is made of."""
    beta = 8.0
    for index in (0, 2):
        bound = theory.shk_drift_bound(memory, index, beta, step_size=0.1)
        moved = jdam.step(memory, memory[index], beta, 0.1)
        p, q = memory[index].weights, moved.weights
        shift = moved.points - memory[index].points
        # The straight way is no shorter in this metric's flat coordinates.
        fisher = 4 / KAPPA * jnp.arccos(jnp.clip(jnp.sum(jnp.sqrt(p * q)), 0, 1)) ** 2
        length = jnp.sqrt(jnp.sum(jnp.minimum(p, q) * jnp.sum(shift**2, -1)) + fisher)
        assert length <= bound
    roomy = jdam.store(memory.patterns, memory.geometry, capacity=8)
    bounds = [theory.shk_drift_bound(m, i, beta) for m, i in ((memory, 2), (roomy, 2), (roomy, -1))]
    np.testing.assert_allclose(bounds, bounds[0], rtol=1e-9)
    assert bounds[0] > 0


@pytest.mark.full
def test_iterations(memory):
    found = theory.shk_constants(memory, 1, step_size=0.1)
    counts = [theory.shk_iterations(found, 0.1, 0.01, error) for error in (1e-2, 1e-4, 1e-6)]
    assert counts[0] < counts[1] < counts[2]
    rate = np.sqrt(1 - found.curvature * 0.1)
    np.testing.assert_allclose((counts[2] - counts[1]) * -np.log(rate), np.log(100), rtol=1e-6)
    one = jdam.store(memory.patterns[1:2], memory.geometry)
    query = jdam.PointCloud(memory[1].points + 0.01, memory[1].weights)
    gap = jdam.divergences(one, query)[0]
    # Of one pattern the fixed point is itself, the energy S_ε: the proof's rate is kept.
    trace = jdam.recall(one, query, 1.0, step_size=0.1, max_steps=60, save_trace=True).trace
    steps = np.arange(1, 61)
    start = found.gradient * found.retraction * np.sqrt(2 * 0.1 * gap) / (1 - rate)
    assert (trace.energy <= start * rate**steps).all()
    assert trace.energy.max() <= gap + theory.shk_travel_bound(found, gap)


@pytest.mark.full
def test_certified_clouds():
    rng = np.random.default_rng(1)
    patterns = clouds(rng, 6, 3, n=4, spread=3.0)
    memory = jdam.store(patterns, jdam.Sinkhorn(0.3))
    beta = 6.0
    queries = jdam.random.perturb(jax.random.key(0), patterns, 0.5, where="both")
    ends = jax.vmap(jdam.recall, (None, 0, None))(memory, queries, beta)
    certify = jax.jit(jax.vmap(theory.certify, (None, 0, None)))
    for start, least in ((queries, 0.5), (ends.measure, 0.8)):
        found = certify(memory, start, beta)
        proved = np.asarray(found.index) >= 0
        assert proved.mean() >= least
        final = jax.vmap(jdam.divergences, (None, 0))(memory, ends.measure)
        distance = np.sqrt(2 * np.maximum(np.asarray(final), 0))[np.arange(6), found.index]
        assert (distance[proved] <= found.error[proved]).all()
    assert (found.error[proved] < 0.05).all()
    reweighting = jdam.store(patterns, jdam.Sinkhorn(0.3, hellinger_scale=0.1))
    assert (certify(reweighting, queries, beta).index == -1).all()


def test_refusals(memory):
    other = jdam.store(gaussians(np.random.default_rng(0), 2, 2))
    for call in (theory.weight_stiffness, lambda m: theory.shk_constants(m, 0)):
        with pytest.raises(TypeError, match="memory must be one of point clouds"):
            call(other)
    with pytest.raises(ValueError, match="step_size must be finite and > 0; got 0"):
        theory.shk_constants(memory, 0, step_size=0.0)
    with pytest.raises(IndexError, match="index 3 is out of range"):
        theory.shk_constants(memory, 3)
    with pytest.raises(TypeError, match=r"index must be an int; got 1\.5"):
        theory.shk_constants(memory, 1.5)
