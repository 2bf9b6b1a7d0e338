"""Memories in cells: bounds hold, results and certificates are those without cells, changes keep
them, files and devices too."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from jdam._energy import branch_and_bound, certified
from jdam._energy.average import view_of
from jdam._memory.cells import _without_strays
from tests.helpers import clouds, diagonals, gaussians, vectors

NUM, DIM, BETA = 300, 3, 30.0


def mixtures(rng, num, d):
    parts = gaussians(rng, 2 * num, d)
    weights = rng.dirichlet(np.ones(2), num)
    factors = np.asarray(parts.factor).reshape(num, 2, d, d)
    return jdam.GaussianMixture(weights, np.asarray(parts.mean).reshape(num, 2, d), factors)


KINDS = {
    "Gaussians": (gaussians, jdam.Bures()),
    "diagonal": (diagonals, jdam.Bures()),
    "vectors": (vectors, jdam.Euclidean()),
    "entropic": (gaussians, jdam.EntropicBures(0.1)),
    "mixtures": (mixtures, jdam.MixtureWasserstein()),
    "clouds": (lambda rng, num, d: clouds(rng, num, d, n=4), jdam.Sinkhorn(0.1)),
}


def spread(measures, rng, scale=2.0):
    """The measures in clusters: each with its mean at one of a few points."""
    points = scale * rng.normal(size=(8, DIM))
    shift = points[rng.integers(8, size=NUM)]

    def move(path, leaf):
        name = jax.tree_util.keystr(path)
        if "factor" in name or "weights" in name or "scale" in name:
            return leaf
        return leaf + shift.reshape(NUM, *[1] * (leaf.ndim - 2), DIM)

    return jax.tree_util.tree_map_with_path(move, measures)


def problem(name, rng, num_cells=30):
    make, geometry = KINDS[name]
    memory = jdam.store(spread(make(rng, NUM, DIM), rng), geometry)
    queries = jax.tree.map(lambda leaf: leaf[:6], memory.patterns)
    return memory, memory.indexed(num_cells), queries


@jax.jit
def divergences(memory, queries):
    return jax.vmap(jdam.divergences, (None, 0))(memory, queries)


def of_members(cells, divergences):
    """(Q, C, B): the divergences of the patterns in each cell, ∞ where there is none."""
    rows = np.asarray(divergences)[:, np.asarray(cells.members)]
    return np.where(np.asarray(cells.members) >= 0, rows, np.inf)


@pytest.mark.parametrize("name", ["Gaussians", pytest.param("mixtures", marks=pytest.mark.full)])
def test_every_pattern_is_in_one_cell_whose_bound_holds(name, rng):
    memory, indexed, queries = problem(name, rng)
    cells = indexed.cells
    members = np.asarray(cells.members)
    assert sorted(members[members >= 0]) == list(range(NUM))
    embedding = jax.vmap(lambda q: memory.geometry.embed(jax.tree.map(lambda x: x[None], q)))(
        queries
    )
    bounds = np.asarray(jax.vmap(cells.lower_bounds)(embedding))
    least = of_members(cells, divergences(memory, queries)).min(-1)
    assert (bounds <= least + 1e-9).all()
    assert (bounds > 0).mean() > 0.5  # they are of use


@pytest.mark.full
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_embeddings_bound_divergences(name, dtype, rng):
    make, geometry = KINDS[name]
    exact = jdam.store(make(rng, 60, DIM), geometry)
    patterns = jax.tree.map(lambda leaf: leaf.astype(dtype), exact.patterns)
    memory = jdam.store(patterns, geometry)
    vectors, errors = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), geometry.embed(memory.patterns, memory.prepared)
    )
    truth = jdam.store(jax.tree.map(lambda leaf: leaf.astype(np.float64), patterns), geometry)
    lengths = np.linalg.norm(vectors[:, None] - vectors, axis=-1) - errors[:, None] - errors
    between = np.asarray(divergences(truth, truth.patterns))
    assert (np.maximum(lengths, 0) ** 2 <= between + 1e-6).all()


@jax.jit
def recalled(memory, queries, beta):
    def one(query):
        return jdam.recall(memory, query, beta, max_steps=3, search=jdam.Certified())

    return jax.vmap(one)(queries)


@pytest.mark.parametrize(
    "name",
    [
        "Gaussians",
        *(pytest.param(k, marks=pytest.mark.full) for k in KINDS if k != "Gaussians"),
    ],
)
def test_recall_and_nearest_are_those_without_cells(name, rng):
    memory, indexed, queries = problem(name, rng)
    for beta in (0.3, BETA):
        wanted, found = recalled(memory, queries, beta), recalled(indexed, queries, beta)
        assert (found.neglected <= 1e-8).all()
        assert (found.nearest == wanted.nearest).all()
        np.testing.assert_allclose(found.energy, wanted.energy, rtol=1e-6, atol=1e-7)
        for one, other in zip(
            jax.tree.leaves(found.measure), jax.tree.leaves(wanted.measure), strict=True
        ):
            np.testing.assert_allclose(one, other, atol=2e-6)
    query = jax.tree.map(lambda leaf: leaf[0], queries)
    index, distances = jdam.nearest(indexed, query, 5)
    np.testing.assert_allclose(distances, np.sort(divergences(memory, queries)[0])[:5], atol=1e-6)
    assert index[0] == 0


@pytest.mark.full
def test_few_cells_are_opened(rng):
    memory, indexed, queries = problem("Gaussians", rng, 60)
    query = jax.tree.map(lambda leaf: leaf[0], queries)
    view = view_of(memory.geometry, query)
    size = branch_and_bound.OPENED
    try:
        branch_and_bound.OPENED = 16
        _, state = certified._search(jdam.Certified(4), indexed, query, view, jnp.asarray(BETA))
    finally:
        branch_and_bound.OPENED = size
    assert int(state.opened.sum()) < len(state.opened) / 2
    assert int(state.result.nearest.pattern) == 0


def same_as_anew(memory, rng, name="Gaussians"):
    """Whether cells hold all patterns of a memory, and searches find what they find without."""
    num = len(memory)
    members = np.asarray(memory.cells.members)
    assert sorted(members[members >= 0]) == list(range(num))
    queries = jax.tree.map(lambda leaf: leaf[np.array([0, num // 2, num - 1])], memory.patterns)
    plain = dataclasses.replace(memory, cells=None)
    wanted, found = recalled(plain, queries, BETA), recalled(memory, queries, BETA)
    assert (found.neglected <= 1e-8).all()
    assert (found.status == wanted.status).all()
    assert (found.nearest == wanted.nearest).all()
    np.testing.assert_allclose(found.energy, wanted.energy, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("capacity", [None, pytest.param(400, marks=pytest.mark.full)])
def test_changes_keep_the_cells(capacity, rng):
    _, indexed, _ = problem("Gaussians", rng)
    if capacity is not None:
        indexed = indexed.reserve(capacity)
    more = gaussians(rng, 20, DIM)
    grown = indexed.append(more)
    same_as_anew(grown, rng)
    changed = grown.replace([3, 3, 310], jax.tree.map(lambda leaf: leaf[:3] + 1, more))
    same_as_anew(changed, rng)
    same_as_anew(changed.remove([0, 5, 311]), rng)


@pytest.mark.full
def test_an_invalid_change_inside_jit_is_seen(rng):
    _, indexed, queries = problem("Gaussians", rng)
    indexed = indexed.reserve(NUM + 1)
    more = gaussians(rng, 2, DIM)
    full = jax.jit(jdam.Memory.append)(indexed, more)
    assert (recalled(full, queries, BETA).status == jdam.Status.NONFINITE).all()


@pytest.mark.full
def test_changed_patterns_are_seen(rng):
    _, indexed, queries = problem("vectors", rng)
    other = eqx.tree_at(lambda m: m.patterns, indexed, indexed.patterns + 1)
    assert (recalled(other, queries, BETA).status == jdam.Status.NONFINITE).all()


def test_files_keep_the_cells(rng, tmp_path):
    _, indexed, _ = problem("vectors", rng)
    jdam.save(tmp_path / "memory", indexed)
    loaded = jdam.load(tmp_path / "memory")
    assert eqx.tree_equal(loaded, indexed)


@pytest.mark.full
def test_shards_have_cells_of_their_own(rng):
    memory, indexed, queries = problem("Gaussians", rng)
    mesh = jax.make_mesh((2,), ("patterns",))
    for sharded in (
        jdam.shard(indexed, mesh, "patterns"),
        jdam.shard(memory, mesh, "patterns").indexed(30),
    ):
        members = np.asarray(sharded.cells.members)
        for part in np.split(members, 2):
            assert sorted(part[part >= 0]) == list(range(NUM // 2))
        found, wanted = recalled(sharded, queries, BETA), recalled(memory, queries, BETA)
        assert (found.nearest == wanted.nearest).all()
        assert (found.neglected <= 1e-8).all()
        np.testing.assert_allclose(found.energy, wanted.energy, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("geometry", "num_cells", "error", "message"),
    [
        (jdam.DotProduct(), 3, TypeError, "cells need a geometry with an embedding"),
        (jdam.Euclidean(), 0, ValueError, "num_cells must be ≥ 1; got 0"),
        (jdam.Euclidean(), 9, ValueError, "num_cells must be at most the number of patterns, 8"),
        (jdam.Euclidean(), 2.0, TypeError, "num_cells must be an int"),
    ],
)
def test_wrong_arguments(geometry, num_cells, error, message, rng):
    memory = jdam.store(vectors(rng, 8, DIM), geometry)
    with pytest.raises(error, match=message):
        memory.indexed(num_cells)


def test_few_patterns_have_cells_too(rng):
    memory = jdam.store(vectors(rng, 3, DIM)).indexed()
    index, _ = jdam.nearest(memory, memory[1])
    assert index[0] == 1


@pytest.mark.full
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_half_precision(scale, rng):
    patterns = scale * vectors(rng, 100, DIM)
    for measures in (patterns, jdam.Gaussian(patterns, scale * gaussians(rng, 100, DIM).factor)):
        memory = jdam.store(jax.tree.map(lambda leaf: leaf.astype(np.float16), measures))
        indexed = memory.indexed(20)
        assert np.isfinite(indexed.cells.radii).all()
        index, _ = jdam.nearest(indexed, memory[7])
        assert index[0] == 7


@pytest.mark.full
def test_invalid_queries_and_patterns_end(rng, monkeypatch):
    monkeypatch.setattr(branch_and_bound, "OPENED", 16)
    jax.clear_caches()
    _, indexed, queries = problem("vectors", rng)
    _, distances = jdam.nearest(indexed, jnp.full(DIM, jnp.nan), 2)
    assert np.isnan(distances).all()
    other = eqx.tree_at(lambda m: m.patterns, indexed, indexed.patterns[::-1])
    index, distances = jdam.nearest(other, other.patterns[5], 1)
    assert index[0] == 5
    assert (recalled(other, queries, BETA).status == jdam.Status.NONFINITE).all()
    jax.clear_caches()


@pytest.mark.full
def test_a_device_of_padding_alone(rng):
    memory = jdam.store(vectors(rng, 1, DIM))
    mesh = jax.make_mesh((2,), ("patterns",))
    index, _ = jdam.nearest(jdam.shard(memory, mesh, "patterns").indexed(), memory[0])
    assert index[0] == 0


def test_not_inside_jit(rng):
    memory = jdam.store(vectors(rng, 8, DIM))
    with pytest.raises(TypeError, match="outside of jax.jit"):
        jax.jit(lambda memory: memory.indexed(2))(memory)


def test_strays_move_to_the_group_whose_ball_they_are_in(rng):
    points = rng.normal(size=(121, 4))
    points[60:120, 0] += 50
    points[60:62] = (50, 0, 0, 0)
    points[120] = 400  # near to no group
    groups = [np.arange(62), np.arange(62, 121)]
    found = _without_strays(points, groups)
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(121))
    assert {60, 61, 120} <= set(found[1])
    assert len(found[0]) == 60
