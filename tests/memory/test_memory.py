import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from tests.helpers import diagonals, gaussians, vectors


@pytest.fixture
def memory(rng):
    return jdam.store(gaussians(rng, 5, 3))


def test_length_indexing_iteration(memory):
    assert len(memory) == 5
    assert memory[1].batch_shape == ()
    assert memory[-1].mean.shape == (3,)
    assert memory[1:3].batch_shape == (2,)
    assert len(list(memory)) == 5
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"index {index} is out of range"):
            memory[index]


def test_geometry_follows_the_measures(rng):
    assert isinstance(jdam.store(gaussians(rng, 2, 2)).geometry, jdam.Bures)
    assert isinstance(jdam.store(diagonals(rng, 2, 2)).geometry, jdam.Bures)
    assert isinstance(jdam.store(vectors(rng, 2, 2)).geometry, jdam.Euclidean)


def test_repr(rng, memory):
    assert repr(memory) == "Memory(5 × Gaussian(dim=3, rank=3), Bures(), float64)"
    dots = jdam.store(
        vectors(rng, 2, 4, np.float32), jdam.DotProduct(), log_prior=np.zeros(2, "f4")
    )
    assert repr(dots) == "Memory(2 × vectors(dim=4), DotProduct(), float32, log_prior)"
    assert "DiagonalGaussian(dim=2)" in repr(jdam.store(diagonals(rng, 3, 2)))


def test_repr_of_a_transformed_memory(memory):
    assert "Memory" in repr(jax.tree.map(lambda x: x.shape, memory))
    assert "Memory" in repr(jax.tree.map(lambda x: "leaf", memory))


def test_append(rng, memory):
    more = gaussians(rng, 2, 3, rank=5)
    longer = memory.append(more)
    assert (len(memory), len(longer)) == (5, 7)
    assert longer.patterns.rank == 5
    np.testing.assert_allclose(longer[1].covariance, memory[1].covariance, rtol=1e-15)
    np.testing.assert_array_equal(longer[6].covariance, more[1].covariance)
    assert len(memory.append(more[0])) == 6
    assert longer.append(memory.patterns).patterns.rank == 5


def test_append_prior(rng, memory):
    more = gaussians(rng, 2, 3)
    assert memory.append(more).log_prior is None
    prior = memory.append(more, log_prior=np.array([-1.0, -2.0])).log_prior
    np.testing.assert_array_equal(prior, [0, 0, 0, 0, 0, -1, -2])
    with_prior = jdam.store(memory.patterns, log_prior=np.arange(5.0))
    np.testing.assert_array_equal(with_prior.append(more).log_prior, [0, 1, 2, 3, 4, 0, 0])


def test_append_refuses_what_does_not_fit(rng, memory):
    with pytest.raises(ValueError, match="patterns must have the memory's dimension d = 3; got 4"):
        memory.append(gaussians(rng, 2, 4))
    with pytest.raises(TypeError, match="patterns must have the memory's dtype float64"):
        memory.append(gaussians(rng, 2, 3, dtype=np.float32))
    with pytest.raises(TypeError, match="patterns must be a Gaussian, the memory's kind; got Diag"):
        memory.append(diagonals(rng, 2, 3))
    with pytest.raises(TypeError, match="patterns must be a jdam.Gaussian"):
        memory.append(vectors(rng, 2, 3))


def test_remove(memory):
    np.testing.assert_array_equal(
        memory.remove(1).patterns.mean, np.delete(memory.patterns.mean, 1, 0)
    )
    np.testing.assert_array_equal(memory.remove([0, -1]).patterns.mean, memory.patterns.mean[1:4])
    held = jdam.store(memory.patterns, log_prior=np.arange(5.0)).remove([2])
    np.testing.assert_array_equal(held.log_prior, [0, 1, 3, 4])
    assert memory.remove([]) is memory
    switched = jdam.store(memory.patterns, log_prior=[0.0, 0.0, *[-np.inf] * 3])
    with pytest.raises(ValueError, match="log_prior must leave a pattern on"):
        switched.remove([0, 1])
    with pytest.raises(ValueError, match="indices must leave at least one"):
        memory.remove(range(5))
    with pytest.raises(IndexError, match="indices must be in"):
        memory.remove(5)
    with pytest.raises(TypeError, match="indices must be an int"):
        memory.remove([0.5])


@pytest.mark.parametrize(
    ("store", "error", "message"),
    [
        (lambda r: jdam.store(gaussians(r, 0, 2)), ValueError, "patterns must hold at least one"),
        (lambda r: jdam.store(np.zeros((0, 2))), ValueError, "patterns must hold at least one"),
        (
            lambda r: jdam.store(gaussians(r, 2, 2)[0]),
            ValueError,
            r"patterns must have batch shape \(N,\)",
        ),
        (lambda r: jdam.store(np.zeros(3)), ValueError, r"patterns must have shape \(N, d\)"),
        (
            lambda r: jdam.store(np.zeros((2, 3, 4))),
            ValueError,
            r"patterns must have shape \(N, d\)",
        ),
        (
            lambda r: jdam.store(np.zeros((2, 3), int)),
            TypeError,
            "patterns must have a floating dtype",
        ),
        (
            lambda r: jdam.store(np.full((2, 3), np.nan)),
            ValueError,
            "patterns must be finite; got 6 of 6",
        ),
        (
            lambda r: jdam.store(gaussians(r, 2, 2), jdam.Euclidean()),
            TypeError,
            "patterns must be an array",
        ),
        (
            lambda r: jdam.store(vectors(r, 2, 2), jdam.Bures()),
            TypeError,
            "patterns must be a jdam.Gaussian",
        ),
        (
            lambda r: jdam.store(vectors(r, 2, 2), "bures"),
            TypeError,
            "geometry must be a jdam geometry",
        ),
        (
            lambda r: jdam.store(vectors(r, 2, 2), jdam.Euclidean),
            TypeError,
            "geometry must be a jdam geometry",
        ),
        (lambda r: jdam.store(None), TypeError, "patterns must be"),
        (
            lambda r: jdam.store(vectors(r, 2, 2), log_prior=np.zeros(3)),
            ValueError,
            r"log_prior must have shape",
        ),
        (
            lambda r: jdam.store(vectors(r, 2, 2), log_prior=[0, 0]),
            TypeError,
            "log_prior must have a floating",
        ),
        (
            lambda r: jdam.store(vectors(r, 2, 2), log_prior=[np.nan, 0]),
            ValueError,
            "log_prior must be finite or",
        ),
        (
            lambda r: jdam.store(vectors(r, 2, 2), log_prior=[-np.inf] * 2),
            ValueError,
            "log_prior must leave",
        ),
    ],
)
def test_bad_input_is_named(rng, store, error, message):
    with pytest.raises(error, match=message):
        store(rng)


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (
            lambda r: gaussians(r, 2, 3),
            ValueError,
            r"query must have batch shape \(\), one measure: use jax.vmap",
        ),
        (
            lambda r: gaussians(r, 1, 4)[0],
            ValueError,
            "query must have the memory's dimension d = 3; got 4",
        ),
        (
            lambda r: gaussians(r, 1, 3, dtype=np.float32)[0],
            TypeError,
            "query must have the memory's dtype float64",
        ),
        (
            lambda r: diagonals(r, 1, 3)[0],
            TypeError,
            "query must be a Gaussian, the memory's kind; got Diagonal",
        ),
        (lambda r: vectors(r, 1, 3)[0], TypeError, "query must be a jdam.Gaussian"),
        (lambda r: None, TypeError, "query must be a jdam.Gaussian"),
    ],
)
def test_bad_queries_are_named(rng, memory, query, error, message):
    for function in (
        lambda q: jdam.divergences(memory, q),
        lambda q: jdam.energy(memory, q, 1.0),
        lambda q: jdam.gibbs_weights(memory, q, 1.0),
        lambda q: jdam.step(memory, q, 1.0),
        lambda q: jdam.recall(memory, q, 1.0),
    ):
        with pytest.raises(error, match=message):
            function(query(rng))


def test_bad_vector_queries_are_named(rng):
    memory = jdam.store(vectors(rng, 4, 3))
    for query, error, message in (
        (np.zeros((2, 3)), ValueError, r"query must have shape \(d,\)"),
        (np.zeros(2), ValueError, "query must have the memory's dimension"),
        (np.zeros(3, int), TypeError, "query must have a floating dtype"),
        (gaussians(rng, 1, 3)[0], TypeError, "query must be an array"),
    ):
        with pytest.raises(error, match=message):
            jdam.recall(memory, query, 1.0)
    with pytest.raises(TypeError, match=r"memory must be a jdam.Memory"):
        jdam.recall(memory.patterns, memory[0], 1.0)


def test_a_memory_is_a_frozen_pytree(memory):
    with pytest.raises(AttributeError):
        memory.patterns = None
    doubled = jax.tree.map(lambda x: 2 * x, memory)
    np.testing.assert_array_equal(doubled.patterns.mean, 2 * memory.patterns.mean)
    inside = jax.jit(lambda m: jdam.store(m.patterns).append(m.patterns))(memory)
    assert len(inside) == 10
    assert jnp.isfinite(inside.patterns.factor).all()


def test_append_with_one_prior_for_all(rng, memory):
    more = gaussians(rng, 2, 3)
    assert memory.append(more, log_prior=0.0).log_prior.tolist() == [0] * 7
    assert memory.append(more[0], log_prior=-1.0).log_prior.tolist() == [0] * 5 + [-1]


def test_append_names_the_batch_it_wants(rng, memory):
    batch = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), gaussians(rng, 4, 3))
    with pytest.raises(ValueError, match=r"patterns must have batch shape \(N,\); got \(2, 2\)"):
        memory.append(batch)
