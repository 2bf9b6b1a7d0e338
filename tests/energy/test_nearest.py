"""The nearest patterns are those of a sort of all divergences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from tests.cases import every_kind_in_full, problem
from tests.helpers import clouds, gaussians, near


@every_kind_in_full
@pytest.mark.parametrize("search", [jdam.Exhaustive(), jdam.Certified(2)])
def test_as_a_sort_of_all(rng, kind, search):
    memory, query = problem(rng, kind)
    divergences = np.asarray(jdam.divergences(memory, query))
    indices, found = jdam.nearest(memory, query, 3, search=search)
    assert indices.dtype == jnp.int32
    np.testing.assert_array_equal(indices, np.argsort(divergences, kind="stable")[:3])
    np.testing.assert_allclose(found, np.sort(divergences)[:3], rtol=1e-9, atol=1e-12)


@pytest.mark.full
@pytest.mark.parametrize("make", [gaussians, clouds])
def test_of_many_patterns_few_are_compared(rng, make):
    """With the default search, for a batch, with room to grow; the prior does not matter."""
    patterns = make(rng, 600, 3)
    geometry = jdam.Sinkhorn(0.3) if make is clouds else None
    queries = near(rng, patterns[:4], 0.3)
    prior = rng.normal(size=600)
    memory = jdam.store(patterns, geometry, log_prior=prior, capacity=610)
    indices, found = jax.vmap(lambda query: jdam.nearest(memory, query, 20))(queries)
    divergences = np.asarray(jdam.pairwise(memory, queries))
    np.testing.assert_array_equal(indices, np.argsort(divergences, axis=1)[:, :20])
    np.testing.assert_allclose(found, np.sort(divergences, axis=1)[:, :20], rtol=1e-8, atol=1e-9)


def test_ties_free_places_and_all(rng):
    points = rng.normal(size=(5, 3))
    memory = jdam.store(np.concatenate([points, points]), capacity=12)
    indices, found = jdam.nearest(memory, points[2], 10)
    np.testing.assert_array_equal(indices[:2], [2, 7])
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(np.sort(indices), np.arange(10))


@pytest.mark.parametrize("search", [jdam.Exhaustive(), jdam.Certified(2)])
def test_divergences_have_a_derivative(rng, search):
    memory = jdam.store(gaussians(rng, 8, 2))
    query = near(rng, memory[3], 0.2)

    def total(mean):
        return jdam.nearest(memory, jdam.Gaussian(mean, query.factor), 2, search=search)[1].sum()

    indices, _ = jdam.nearest(memory, query, 2)
    wanted = 2 * (2 * query.mean - memory.patterns.mean[indices].sum(0))
    np.testing.assert_allclose(jax.grad(total)(query.mean), wanted, rtol=1e-9)


def test_a_query_of_nan_ends(rng):
    memory = jdam.store(gaussians(rng, 40, 2))
    query = jax.tree.map(lambda leaf: leaf * jnp.nan, memory[0])
    assert np.isnan(jdam.nearest(memory, query, search=jdam.Certified())[1]).all()


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, "k must be ≥ 1; got 0"),
        (9, ValueError, "k must be at most the number of patterns, 4; got 9"),
        (1.0, TypeError, "k must be an int; got 1.0"),
    ],
)
def test_mistakes_are_named(rng, k, error, message):
    memory = jdam.store(rng.normal(size=(4, 2)))
    with pytest.raises(error, match=message):
        jdam.nearest(memory, rng.normal(size=2), k)
    with pytest.raises(TypeError, match="search must be one of jdam's"):
        jdam.nearest(memory, rng.normal(size=2), search="all")
