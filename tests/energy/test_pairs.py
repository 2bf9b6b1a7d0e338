"""All divergences at once are those of one query after another."""

import jax
import numpy as np
import pytest

import jdam
from tests.cases import METRIC, every_kind, problem
from tests.helpers import gaussians, near


@every_kind
def test_pairs_are_single_calls(rng, kind):
    memory, query = problem(rng, kind)
    queries = jdam.stack([memory[1], query, memory[4]])
    found = jdam.pairwise(memory, queries)
    wanted = [jdam.divergences(memory, q) for q in (memory[1], query, memory[4])]
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    among = np.asarray(jdam.pairwise(memory))
    np.testing.assert_allclose(among[[1, 4]], found[::2], rtol=1e-9, atol=1e-12)
    assert among.shape == (7, 7)


@pytest.mark.parametrize("kind", METRIC)
def test_patterns_among_themselves(rng, kind):
    memory, _ = problem(rng, kind)
    found = np.asarray(jdam.pairwise(memory))
    np.testing.assert_allclose(found, found.T, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(np.diag(found), 0, atol=1e-12)


def test_lists_batches_of_nothing_and_free_places(rng):
    memory = jdam.store(gaussians(rng, 3, 2), capacity=5)
    singles = [memory[0], jdam.Gaussian(memory[1].mean, memory[1].factor[:, :1])]
    assert jdam.pairwise(memory, singles).shape == (2, 5)
    assert jdam.pairwise(memory, gaussians(rng, 0, 2)).shape == (0, 5)
    found = np.asarray(jdam.pairwise(memory))
    assert np.isinf(found[3:]).all()
    assert np.isinf(found[:, 3:]).all()
    assert np.isfinite(found[:3, :3]).all()
    with pytest.raises(ValueError, match=r"queries must have batch shape \(N,\)"):
        jdam.pairwise(memory, memory[0])
    with pytest.raises(ValueError, match="queries must have the memory's dimension d = 2; got 3"):
        jdam.pairwise(memory, gaussians(rng, 2, 3))
    with pytest.raises(TypeError, match="memory must be a jdam.Memory"):
        jdam.pairwise(memory.patterns)


def test_thin_factors_stay_thin(rng):
    """The Fréchet distance of few samples in many dimensions, without a covariance."""
    samples = [rng.normal(size=(n, 300)) + rng.normal(size=300) for n in (6, 9, 4)]
    memory = jdam.store(jdam.Gaussian.from_ragged_samples(samples))
    program = jax.jit(jdam.pairwise).lower(memory).as_text()
    assert "300x9" in program
    assert "300x300" not in program
    found = jdam.pairwise(memory)
    for i, x in enumerate(samples):
        for j, y in enumerate(samples):
            a, b = ((z - z.mean(0)) / np.sqrt(len(z)) for z in (x, y))
            nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum()
            wanted = (
                ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * nuclear
            )
            np.testing.assert_allclose(found[i, j], wanted, rtol=1e-10, atol=1e-9)


def test_gradient_of_pairs(rng):
    memory = jdam.store(gaussians(rng, 3, 2))
    queries = near(rng, memory.patterns, 0.1)
    slope = jax.grad(lambda q: jdam.pairwise(memory, q).sum())(queries)
    alone = jax.grad(lambda q: jdam.divergences(memory, q).sum())(queries[1])
    np.testing.assert_allclose(slope.mean[1], alone.mean, rtol=1e-10)
