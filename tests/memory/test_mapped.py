"""A memory in a file that is not read: the same results, of few of its patterns."""

import equinox as eqx
import jax
import numpy as np
import pytest

import jdam
from jdam._memory.mapped import MappedMemory
from tests.helpers import clouds, gaussians, vectors

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


def in_two_files(memory, folder):
    """The first 150 patterns in one file, the others in another with room for more."""
    rows = memory.patterns, memory.values
    for name, part in (("a", slice(150)), ("b", slice(150, None))):
        patterns, values = jax.tree.map(lambda leaf, part=part: leaf[part], rows)
        some = jdam.store(patterns, values=values, capacity=260 if name == "b" else None)
        jdam.save(folder / name, some.indexed())
    return jdam.open([folder / "a", folder / "b"])


def test_several_files_are_one_memory(stored, tmp_path):
    memory, opened = stored
    parts = in_two_files(memory, tmp_path)
    assert len(parts) == NUM
    assert repr(parts).startswith("MappedMemory(400 × Gaussian")
    assert repr(parts).endswith(f"'{tmp_path / 'a'}', '{tmp_path / 'b'}')")
    for i in (0, 149, 150, -1):
        np.testing.assert_array_equal(parts[i].factor, memory[i].factor)
    for unit, expected in zip(parts.units, opened.units, strict=True):
        np.testing.assert_allclose(unit, expected, rtol=1e-12)
    members = np.asarray(parts.cells.members)
    np.testing.assert_array_equal(np.sort(members[members >= 0]), np.arange(NUM))
    queries = jax.tree.map(lambda leaf: leaf[148:152], memory.patterns)
    np.testing.assert_array_equal(jdam.nearest(parts, memory[203], 1)[0], [203])
    found = jdam.recall_batch(parts, queries, 30.0, max_steps=2)
    wanted = jdam.recall_batch(memory, queries, 30.0, max_steps=2)
    np.testing.assert_array_equal(found.nearest, wanted.nearest)
    np.testing.assert_allclose(found.energy, wanted.energy, rtol=1e-9, atol=1e-10)
    distances = jdam.pairwise(parts, queries)
    np.testing.assert_allclose(distances, jdam.pairwise(memory, queries), atol=1e-12)


def test_rows_of_several_files(stored, tmp_path):
    memory, _ = stored
    labels, expected = in_two_files(memory, tmp_path).values["label"], np.arange(NUM)
    assert (labels.shape, labels.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(labels, expected)
    indices = (3, -1, slice(140, 160, 3), slice(None, None, -1), np.array([[151, 2], [-1, 150]]))
    for index in (*indices, expected % 7 == 0, np.zeros(0, int)):
        np.testing.assert_array_equal(labels[index], expected[index])
    for index in (NUM, -NUM - 1, np.array([0, NUM]), (1, 2)):
        with pytest.raises(IndexError, match="out of range|take one index"):
            labels[index]


def test_files_that_are_no_memory_together(stored, rng, tmp_path):
    memory, _ = stored
    patterns, values = head(memory, 40), {"label": np.arange(40)}
    points = clouds(rng, 40, DIM)
    others = {
        "values": jdam.store(patterns),
        "dimension": jdam.store(gaussians(rng, 40, DIM + 1), values=values),
        "clouds": jdam.store(points, jdam.Sinkhorn(0.3), values=values),
        "epsilon": jdam.store(points, jdam.Sinkhorn(0.4), values=values),
    }
    for name, other in others.items():
        jdam.save(tmp_path / name, other.indexed())
    pairs = [("memory", name) for name in ("values", "dimension", "clouds")]
    for pair in [*pairs, ("clouds", "epsilon")]:
        with pytest.raises(ValueError, match="files must hold memories of one geometry"):
            jdam.open([tmp_path / name for name in pair])
    with pytest.raises(ValueError, match="a file or a list of files; got none"):
        jdam.open([])


@pytest.mark.full
def test_free_slots_are_no_patterns(stored, tmp_path):
    memory, _ = stored
    jdam.save(tmp_path / "room", jdam.store(head(memory, 40), capacity=50).indexed())
    opened = jdam.open(tmp_path / "room")
    np.testing.assert_array_equal(opened[-1].mean, memory[39].mean)
    with pytest.raises(IndexError):
        opened[40]
