"""A memory in a file that is not read: the same results, of few of its patterns."""

import equinox as eqx
import jax
import numpy as np
import pytest

import jdam
from jdam._memory.mapped import MappedMemory
from tests.helpers import gaussians, vectors

NUM, DIM = 400, 3


@pytest.fixture
def stored(rng, tmp_path):
    """A memory of eight clusters, and the same in a file."""
    patterns = gaussians(rng, NUM, DIM)
    shift = 4 * rng.normal(size=(8, DIM))[rng.integers(8, size=NUM)]
    patterns = jdam.Gaussian(np.asarray(patterns.mean) + shift, patterns.factor)
    memory = jdam.store(patterns, values={"label": np.arange(NUM)}).indexed(60)
    jdam.save(tmp_path / "memory", memory)
    return memory, jdam.open(tmp_path / "memory")


def head(memory, num=4):
    return jax.tree.map(lambda leaf: leaf[:num], memory.patterns)


@pytest.mark.parametrize("beta", [pytest.param(0.3, marks=pytest.mark.full), 30.0])
def test_recalls_are_those_of_the_memory(stored, beta):
    memory, opened = stored
    queries = head(memory)
    wanted = jdam.recall_batch(memory, queries, beta, max_steps=4)
    found = jdam.recall_batch(opened, queries, beta, max_steps=4)
    np.testing.assert_array_equal(found.nearest, wanted.nearest)
    np.testing.assert_array_equal(found.status, wanted.status)
    np.testing.assert_array_equal(found.num_steps, wanted.num_steps)
    assert (found.neglected <= 1e-12).all()
    assert found.trace is None
    np.testing.assert_allclose(found.energy, wanted.energy, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(found.measure.mean, wanted.measure.mean, atol=1e-8)


def test_nearest_and_pairwise(stored):
    memory, opened = stored
    index, distances = jdam.nearest(opened, memory[5], 3)
    wanted = jdam.nearest(memory, memory[5], 3)
    np.testing.assert_array_equal(index, wanted[0])
    np.testing.assert_allclose(distances, wanted[1], atol=1e-12)
    found = jdam.pairwise(opened, head(memory))
    np.testing.assert_allclose(found, jdam.pairwise(memory, head(memory)), atol=1e-12)


def test_few_patterns_are_read(stored, monkeypatch):
    memory, opened = stored
    read, rows = [], MappedMemory.rows

    def counted(self, index):
        read.append(len(index))
        return rows(self, index)

    monkeypatch.setattr(MappedMemory, "rows", counted)
    jdam.nearest(opened, memory[5])
    assert max(read) < NUM / 2


def test_what_it_shows(stored):
    memory, opened = stored
    assert len(opened) == NUM
    np.testing.assert_array_equal(opened[7].factor, memory[7].factor)
    assert opened.values["label"][7] == 7
    assert repr(opened).startswith("MappedMemory(400 × Gaussian")


def test_what_needs_all_patterns_is_refused(stored):
    memory, opened = stored
    with pytest.raises(TypeError, match="got MappedMemory: jdam.load reads all of it"):
        jdam.energy(opened, memory[0], 1.0)
    with pytest.raises(ValueError, match="queries must be given for a memory in a file"):
        jdam.pairwise(opened)
    for search in (jdam.Exhaustive(),):
        with pytest.raises(ValueError, match="needs search=Certified"):
            jdam.recall_batch(opened, head(memory), 1.0, search=search)
    with pytest.raises(ValueError, match="k must be at most the number of patterns, 400"):
        jdam.nearest(opened, memory[0], NUM + 1)


def test_cells_are_needed(rng, tmp_path):
    jdam.save(tmp_path / "memory", jdam.store(vectors(rng, 5, DIM)))
    with pytest.raises(ValueError, match=r"has no cells.*jdam.load\(path\).indexed"):
        jdam.open(tmp_path / "memory")


def test_wrong_arguments(stored):
    memory, opened = stored
    wrong = jdam.Gaussian(np.zeros((2, 2)), np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match="queries must have the memory's dimension d = 3; got 2"):
        jdam.recall_batch(opened, wrong, 1.0)
    with pytest.raises(ValueError, match="query must have the memory's dimension d = 3; got 2"):
        jdam.nearest(opened, jdam.Gaussian(np.zeros(2), np.zeros((2, 2))))
    with pytest.raises(ValueError, match="beta must be"):
        jdam.recall_batch(opened, head(memory), 0.0)
    with pytest.raises(ValueError, match="batch_size must be ≥ 1"):
        jdam.recall_batch(opened, head(memory), 1.0, batch_size=0)


@pytest.mark.full
def test_no_queries(stored):
    memory, opened = stored
    assert jdam.recall_batch(opened, head(memory, 0), 1.0).nearest.shape == (0,)


def test_changed_patterns_are_not_saved(rng, tmp_path):
    memory = jdam.store(vectors(rng, 50, DIM)).indexed()
    changed = eqx.tree_at(lambda m: m.patterns, memory, memory.patterns + 1)
    with pytest.raises(ValueError, match="they were changed since"):
        jdam.save(tmp_path / "memory", changed)
