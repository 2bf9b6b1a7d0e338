"""Learning, and descent of the energy by optimizers."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.cluster.vq import kmeans2

import jdam
from tests.cases import problem
from tests.helpers import diagonals, gaussians, vectors


def held_out_error(memory, beta, queries, targets):
    return float(jax.vmap(partial(jdam.recall_error, memory, beta))(queries, targets).mean())


@pytest.mark.full
def test_learned_gaussians_beat_k_means(rng):
    """32 patterns for Gaussians that lie about 40 centres, recalled from noisy queries."""
    centres = gaussians(rng, 40, 2, spread=3.0)

    def sample(num):
        which = rng.integers(40, size=num)
        mean = centres.mean[which] + 0.2 * rng.normal(size=(num, 2))
        factor = centres.factor[which] + 0.1 * rng.normal(size=(num, 2, 2))
        targets = jdam.Gaussian(mean, factor)
        noise = 0.3 * rng.normal(size=(num, 2))
        return jdam.Gaussian(mean + noise, factor + 0.2 * rng.normal(size=(num, 2, 2))), targets

    (queries, targets), held_out = sample(256), sample(256)
    _, labels = kmeans2(np.asarray(targets.mean), 32, seed=1, minit="++")
    kept = [labels == k for k in range(32) if (labels == k).any()]
    start = jdam.Gaussian.from_covariance(
        np.stack([np.asarray(targets.mean)[k].mean(0) for k in kept]),
        np.stack([np.asarray(targets.covariance)[k].mean(0) for k in kept]),
    )
    memory = jdam.store(start)
    found = jdam.fit(
        memory,
        2.0,
        queries,
        targets,
        optax.adam(0.03),
        num_steps=80,
        batch_size=64,
        progress=False,
    )
    before = held_out_error(memory, jnp.float64(2.0), *held_out)
    after = held_out_error(found.memory, found.beta, *held_out)
    assert after < 0.8 * before
    assert found.losses.shape == (80,)
    assert np.mean(found.losses[-20:]) < np.mean(found.losses[:20])


@pytest.mark.full
def test_temperature_is_recovered(rng):
    """Queries recalled with β = 3 tell it, by gradient alone."""
    patterns, queries = gaussians(rng, 5, 2), gaussians(rng, 20, 2)
    memory = jdam.store(patterns)
    targets = jax.vmap(jdam.step, (None, 0, None))(memory, queries, 3.0)
    found = jdam.fit(
        memory, 0.5, queries, targets, optax.adam(0.1), learn=("beta",), num_steps=150,
        progress=False,
    )  # fmt: skip
    np.testing.assert_allclose(found.beta, 3.0, rtol=1e-3)
    for x, y in zip(jax.tree.leaves(found.memory), jax.tree.leaves(memory), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["diagonal", "entropic, low rank"])
def test_measures_stay_measures(rng, kind):
    """However wild the steps."""
    memory, query = problem(rng, kind)
    prior = np.array([0, 0, -np.inf, 0, 0, 0, 0])
    memory = jdam.store(memory.patterns, memory.geometry, log_prior=prior)
    queries = jax.tree.map(lambda x: jnp.stack([x, x]), query)
    learner = jdam.Learner(optax.adam(0.5))
    state = learner.init(memory, 0.5)
    for _ in range(5):
        state, loss = learner.update(state, queries, queries)
    assert np.isfinite(loss)
    learned = state.memory.patterns
    assert type(learned) is type(memory.patterns)
    assert float(state.beta) > 0
    assert float(state.memory.log_prior[2]) == -np.inf
    assert np.isfinite(np.delete(state.memory.log_prior, 2)).all()
    if isinstance(learned, jdam.DiagonalGaussian):
        assert (learned.scale >= 0).all()
    moved = [
        float(jnp.abs(x - y).max())
        for x, y in zip(jax.tree.leaves(learned), jax.tree.leaves(memory.patterns), strict=True)
    ]
    assert min(moved) > 1e-3


@pytest.mark.full
def test_clouds_stay_clouds(rng):
    """And their padding padding, though weights decay."""
    patterns = jdam.PointCloud.from_ragged([rng.normal(size=(n, 2)) for n in (2, 4, 3)])
    prior = np.array([0, -np.inf, 0])
    memory = jdam.store(patterns, jdam.Sinkhorn(0.5), log_prior=prior)
    learner = jdam.Learner(optax.adamw(0.5))
    state = learner.init(memory, 1.0)
    update = jax.jit(learner.update)
    for _ in range(5):
        state, loss = update(state, patterns, patterns)
    assert np.isfinite(loss)
    assert float(state.beta) > 0
    assert float(state.memory.log_prior[1]) == -np.inf
    learned = state.memory.patterns
    weights = np.asarray(learned.weights)
    np.testing.assert_array_equal(weights == 0, np.asarray(patterns.weights) == 0)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)
    assert (weights >= 0).all()
    for x, y in ((learned.points, patterns.points), (weights, patterns.weights)):
        assert float(jnp.abs(x - y).max()) > 1e-3


@pytest.mark.full
def test_batches_are_drawn_by_key(rng):
    memory = jdam.store(vectors(rng, 4, 2))
    queries, targets = vectors(rng, 20, 2), vectors(rng, 20, 2)

    optimizer = optax.sgd(0.1)  # each is another program

    def losses(key, **settings):
        run = partial(jdam.fit, memory, 1.0, queries, targets, optimizer, progress=False)
        return run(num_steps=4, batch_size=5, key=key, **settings).losses

    first, again, other = (losses(jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.full
def test_own_loss_and_targets(rng, capsys, monkeypatch):
    """Labels by attention: a classifier with learned prototypes; and the bar is drawn, on a
    terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    memory = jdam.store(diagonals(rng, 4, 2))
    queries, labels = diagonals(rng, 30, 2), rng.integers(2, size=30)
    values = jnp.asarray(np.eye(2)[[0, 0, 1, 1]])

    def loss(memory, beta, query, label):
        return -jnp.log(jdam.attend(memory, query, beta, values)[label])

    found = jdam.fit(memory, 1.0, queries, labels, optax.adam(0.1), loss=loss, num_steps=30)
    assert found.losses[-1] < found.losses[0]
    assert "30/30" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("kind", ["gaussian", "diagonal", "clouds"])
def test_descend_finds_a_fixed_point(rng, kind):
    memory, query = problem(rng, kind)
    beta = 5.0
    steps = 20 if kind == "clouds" else 400
    result = jdam.descend(memory, query, beta, optax.adam(0.02), num_steps=steps)
    assert float(result.energy) < float(jdam.energy(memory, query, beta))
    np.testing.assert_allclose(result.energy, jdam.energy(memory, result.measure, beta), rtol=1e-9)
    assert int(result.num_steps) == steps
    if kind != "clouds":
        recalled = jdam.recall(memory, query, beta)
        np.testing.assert_allclose(result.energy, recalled.energy, rtol=1e-2, atol=1e-3)
        assert int(result.nearest) == int(recalled.nearest)


def test_descend_reports(rng):
    memory = jdam.store(vectors(rng, 4, 2))
    queries = np.stack([memory[0], memory[1] + 5, np.full(2, np.nan)])
    optimizer = optax.sgd(0.4)
    descend = partial(jdam.descend, optimizer=optimizer, num_steps=60)
    result = jax.vmap(descend, (None, 0, None))(memory, queries, 4.0)
    assert result.status.tolist()[2] == jdam.Status.NONFINITE
    assert result.status.tolist()[0] in (jdam.Status.CONVERGED, jdam.Status.MIXTURE)
    short = jdam.descend(memory, queries[1], 4.0, optimizer, num_steps=1)
    assert int(short.status) == jdam.Status.MAX_STEPS


def test_bad_arguments(rng):
    memory = jdam.store(vectors(rng, 4, 2))
    run = partial(jdam.fit, memory, 1.0, optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"queries must have shape \(N, d\)"):
        run(queries=np.ones(2), targets=np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"targets must lead with \(M,\) = \(3,\), one a query"):
        run(queries=np.ones((3, 2)), targets=np.ones((2, 2)))
    with pytest.raises(ValueError, match="batch_size must be at most the number of queries 3"):
        run(queries=np.ones((3, 2)), targets=np.ones((3, 2)), batch_size=4)
    with pytest.raises(ValueError, match="learn must be a tuple of some of"):
        run(queries=np.ones((3, 2)), targets=np.ones((3, 2)), learn=("geometry",))
