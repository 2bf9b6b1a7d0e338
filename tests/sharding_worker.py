"""Compares memories in one piece with the same on several devices: a program of its own, because
devices are counted and processes meet when JAX starts.

    python -m tests.sharding_worker folder                        on 4 devices of one process
    python -m tests.sharding_worker folder address count index    one of several processes
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

folder, *address = sys.argv[1:]
devices = 2 if address else 4

import chex
import jax

chex.set_n_cpu_devices(devices)

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
if address:
    jax.distributed.initialize(address[0], int(address[1]), int(address[2]))

import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jdam
from tests.helpers import clouds, diagonals, gaussians, mixtures, near, vectors

NUM, DIM, BETA = 21, 3, 8.0
KINDS = {
    "Gaussians": (gaussians, jdam.Bures()),
    "diagonal": (diagonals, jdam.Bures()),
    "vectors": (vectors, jdam.Euclidean()),
    "inner products": (vectors, jdam.DotProduct()),
    "clouds": (clouds, jdam.Sinkhorn(0.3)),
    "mixtures": (mixtures, jdam.MixtureWasserstein()),
    "unbalanced": (clouds, jdam.Sinkhorn(0.3, rho=0.5)),
}
SEARCHES = (jdam.Exhaustive(), jdam.Certified(2))


def same(first, second, tolerance=1e-8):
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=tolerance)


def examine(memory, query, queries, functions, searches, axis=None):
    """In one program, because each is compiled for all devices."""

    def recall(search):
        def one(query):
            found = jdam.recall(memory, query, BETA, max_steps=3, search=search)
            names = ("measure", "energy", "nearest", "weight", "divergence", "status", "inliers")
            return {name: getattr(found, name) for name in (*names, "neglected")}

        return jax.vmap(one, spmd_axis_name=axis)(queries)

    found = [function(memory, query, BETA) for function in functions]
    return found, [recall(search) for search in searches]


def check(kind, mesh, functions, searches, axes=(None,)):
    make, geometry = KINDS[kind]
    rng = np.random.default_rng(5)
    prior = rng.normal(size=NUM)
    memory = jdam.store(make(rng, NUM, DIM), geometry, log_prior=prior)
    sharded = jdam.shard(memory, mesh, "patterns")
    assert len(sharded) == NUM
    queries = near(rng, jax.tree.map(lambda leaf: leaf[:4], memory.patterns), 0.1)
    query = jax.tree.map(lambda leaf: leaf[0], queries)
    run = jax.jit(examine, static_argnames=("functions", "searches", "axis"))
    wanted = run(memory, query, queries, functions, searches)
    for axis in axes:
        found = run(sharded, query, queries, functions, searches, axis=axis)
        same(wanted[0], found[0])
        same(wanted[1], found[1], 1e-6)
        for recalled in found[1]:
            assert (np.asarray(recalled["neglected"]) <= 1e-8).all()
    return memory, sharded, query


def check_more(memory, sharded, query):
    """Derivatives, other separations, communication, no `jax.jit` around, and that what is fixed
    stays so."""
    for search in SEARCHES:
        recall = jax.jit(lambda m, q, s=search: jdam.recall(m, q, BETA, max_steps=1, search=s))
        program = recall.lower(sharded, query).compile().as_text()
        assert "all-reduce" in program
        assert "all-gather" not in program  # of N numbers

    @jax.jit
    def more(memory, query):
        slope = jax.grad(lambda q: jdam.recall(memory, q, BETA, max_steps=3).energy)(query)
        others = [
            function(memory, query, 0.3, separation=separation)
            for separation in (jdam.Entmax(), jdam.Epanechnikov())
            for function in (jdam.step, jdam.energy)
        ]
        return slope, others

    same(more(memory, query), more(sharded, query))
    same(jdam.energy(memory, query, BETA), jdam.energy(sharded, query, BETA))
    assert "2 shards" in repr(sharded)
    for change in (lambda: sharded.append(query), lambda: sharded.remove(0)):
        with pytest.raises(ValueError, match="a sharded memory is fixed"):
            change()


def check_queries(kind, function, *, more=True):
    """Queries spread over devices, patterns on each: in `shard_map` with its checks, and where the
    mesh is part of the queries' type."""
    make, geometry = KINDS[kind]
    rng = np.random.default_rng(6)
    memory = jdam.store(make(rng, 8, DIM), geometry)
    queries = near(rng, memory.patterns, 0.1)
    mesh = jax.make_mesh((4,), ("queries",), axis_types=(AxisType.Explicit,))
    rows = PartitionSpec("queries")
    spread = jax.device_put(queries, NamedSharding(mesh, rows))

    batch = jax.vmap(partial(function, memory))
    slopes = jax.vmap(partial(jax.value_and_grad(function, argnums=1), memory))
    whole = slopes if more else batch
    wanted = jax.jit(whole)(queries)
    mapped = jax.shard_map(whole, mesh=mesh, in_specs=rows, out_specs=rows)
    pairs = [(wanted, mapped(spread))]
    if more:
        pairs.append((wanted[0], batch(spread)))
    for expected, found in pairs:
        same(expected, found)
        for leaf in jax.tree.leaves(found):
            assert leaf.sharding.spec[0] == "queries"


def check_both(kind):
    """Patterns along one axis of a mesh as `jax.make_mesh` gives it, queries along another, before
    and after a file."""
    make, geometry = KINDS[kind]
    rng = np.random.default_rng(7)
    values = {"label": np.arange(NUM), "place": rng.normal(size=(NUM, 2))}
    memory = jdam.store(make(rng, NUM, DIM), geometry, values=values, capacity=NUM + 3)
    queries = near(rng, jax.tree.map(lambda leaf: leaf[:8], memory.patterns), 0.1)
    mesh = jax.make_mesh((2, jax.device_count() // 2), ("patterns", "queries"))
    rows = NamedSharding(mesh, PartitionSpec("queries"))

    def place(leaf):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, rows, lambda index: leaf[index])

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory"
        jdam.save(path, memory)
        sharded = jdam.load(path, mesh=mesh, axis="patterns")
    other = jdam.shard(memory, mesh, "patterns")
    assert jax.tree.structure(sharded) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(sharded), jax.tree.leaves(other), strict=True):
        assert x.sharding == y.sharding
        for mine, theirs in zip(x.addressable_shards, y.addressable_shards, strict=True):
            np.testing.assert_array_equal(mine.data, theirs.data)

    placed = jax.tree.map(place, queries)
    recall = jax.vmap(partial(jdam.recall, max_steps=3), (None, 0, None))
    wanted = recall(memory, queries, BETA)
    found = recall(sharded, placed, BETA)
    batch = jdam.recall_batch(sharded, placed, BETA, max_steps=3)
    few = jdam.recall_batch(sharded, placed, BETA, max_steps=3, batch_size=2)
    plain = jdam.recall_batch(memory, placed, BETA, max_steps=3, batch_size=3)
    pairs = jdam.pairwise(sharded, placed)
    mapped = jax.shard_map(
        partial(recall, sharded), mesh=mesh, in_specs=(rows.spec, None), out_specs=rows.spec
    )
    with pytest.raises(ValueError, match="a sharded memory cannot be used inside jax.shard_map"):
        mapped(placed, BETA)
    for result, expected in (
        (found.energy, wanted.energy),
        (batch.energy, wanted.energy),
        (few.energy, wanted.energy),
        (plain.energy, wanted.energy),
        (pairs, jdam.pairwise(memory, queries)[:, :NUM]),
    ):
        assert result.sharding.spec[0] == "queries"
        for part in result.addressable_shards:
            same(part.data, np.asarray(expected)[part.index])
    chosen = jdam.suggest_beta(sharded, placed)
    same(chosen, jdam.suggest_beta(memory, queries))
    with jax.set_mesh(mesh):
        again = recall(sharded, placed, BETA)
    for part, other in zip(
        again.energy.addressable_shards, found.energy.addressable_shards, strict=True
    ):
        same(part.data, other.data)
    return memory, sharded


def check_saved(memory, sharded, folder):
    """A sharded memory is written whole, to one file."""
    path = Path(folder) / "memory"
    jdam.save(path, sharded)
    whole = jdam.load(path)
    assert len(whole) == NUM
    same(whole[:], memory[:], 0)
    same(whole.values, jax.tree.map(lambda leaf: leaf[:NUM], memory.values), 0)
    same(*(jdam.attend(held, memory[1], BETA, held.values["place"]) for held in (sharded, whole)))
    same(jdam.pairwise(sharded), jdam.pairwise(whole))
    completed = (jdam.attend(held, memory[1], BETA, held).mean for held in (sharded, whole))
    same(*completed)


def certified(memory, query):
    return jdam.recall(memory, query, BETA, max_steps=3, search=SEARCHES[1]).energy


def divergences(memory, query, beta):
    return jdam.divergences(memory, query)


def cold(memory, query):
    return jdam.energy(memory, query, BETA)


ALL = (jdam.gibbs_weights, jdam.energy, jdam.step, divergences)
if address:
    mesh = jax.make_mesh((2 * int(address[1]),), ("patterns",))
    check("Gaussians", mesh, (jdam.energy,), SEARCHES[1:])
    check_saved(*check_both("Gaussians"), folder)
    jax.distributed.shutdown()
else:
    mesh = jax.make_mesh((2, 2), ("patterns", "queries"))
    check_more(*check("Gaussians", mesh, ALL, SEARCHES, (None, "queries")))
    check("vectors", mesh, ALL, SEARCHES, ("queries",))
    for kind in ("diagonal", "inner products"):
        check(kind, mesh, ALL, SEARCHES[:1])
    check("mixtures", mesh, (jdam.energy,), SEARCHES, ("queries",))
    check("unbalanced", mesh, (jdam.energy,), SEARCHES, ("queries",))
    check_saved(*check_both("Gaussians"), folder)
    check_queries("Gaussians", certified)
    check_queries("clouds", cold, more=False)
print("the same")
