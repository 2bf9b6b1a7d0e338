"""Compares memories in one piece with the same on several devices: a program of its own, because
devices are counted and processes meet when JAX starts.

    python -m tests.sharding_worker                        on 8 devices of one process
    python -m tests.sharding_worker address count index    one of several processes
"""

import os
import sys
from functools import partial

address = sys.argv[1:]
devices = 2 if address else 8
flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
if address:
    jax.distributed.initialize(address[0], int(address[1]), int(address[2]))

import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jdam
from tests.helpers import clouds, diagonals, gaussians, near, vectors

NUM, DIM, BETA = 21, 3, 8.0
KINDS = {
    "Gaussians": (gaussians, jdam.Bures()),
    "diagonal": (diagonals, jdam.Bures()),
    "vectors": (vectors, jdam.Euclidean()),
    "inner products": (vectors, jdam.DotProduct()),
    "clouds": (clouds, jdam.Sinkhorn(0.3)),
}
SEARCHES = (jdam.Exhaustive(), jdam.Certified(2))


def same(first, second, tolerance=1e-8):
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=tolerance)


def check(kind, mesh, searches):
    make, geometry = KINDS[kind]
    rng = np.random.default_rng(5)
    prior = rng.normal(size=NUM)
    memory = jdam.store(make(rng, NUM, DIM), geometry, log_prior=prior)
    sharded = jdam.shard(memory, mesh, "patterns")
    assert len(sharded) == NUM
    queries = near(rng, jax.tree.map(lambda leaf: leaf[:4], memory.patterns), 0.1)
    query = jax.tree.map(lambda leaf: leaf[0], queries)
    for function in (jdam.gibbs_weights, jdam.energy, jdam.step):
        same(function(memory, query, BETA), function(sharded, query, BETA))
    same(jdam.divergences(memory, query), jdam.divergences(sharded, query))
    for search in searches:

        def recall(memory, query, search=search):
            return jdam.recall(memory, query, BETA, max_steps=3, search=search)

        wanted = jax.vmap(recall, (None, 0))(memory, queries)
        for axis in [None, *mesh.axis_names[1:]]:
            found = jax.vmap(recall, (None, 0), spmd_axis_name=axis)(sharded, queries)
            for name in ("measure", "energy", "nearest", "weight", "status"):
                same(getattr(wanted, name), getattr(found, name), 1e-6)
            assert (np.asarray(found.neglected) <= 1e-8).all()
    return memory, sharded, query


def check_more(memory, sharded, query):
    """Derivatives, other separations, communication, and that what is fixed stays so."""
    for search in SEARCHES:
        recall = jax.jit(lambda m, q, s=search: jdam.recall(m, q, BETA, max_steps=1, search=s))
        program = recall.lower(sharded, query).compile().as_text()
        assert "all-reduce" in program
        assert "all-gather" not in program  # of N numbers
    slopes = [jax.grad(lambda q, m=m: jdam.recall(m, q, BETA, max_steps=3).energy)(query)
              for m in (memory, sharded)]  # fmt: skip
    same(*slopes)
    for separation in (jdam.Entmax(), jdam.Epanechnikov()):
        same(*(jdam.step(m, query, 0.3, separation=separation) for m in (memory, sharded)))
        same(*(jdam.energy(m, query, 0.3, separation=separation) for m in (memory, sharded)))
    assert "4 shards" in repr(sharded)
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
    mesh = jax.make_mesh((8,), ("queries",), axis_types=(AxisType.Explicit,))
    rows = PartitionSpec("queries")
    spread = jax.device_put(queries, NamedSharding(mesh, rows))

    def check(function, everywhere):
        batch = jax.vmap(partial(function, memory))
        wanted = batch(queries)
        mapped = jax.shard_map(batch, mesh=mesh, in_specs=rows, out_specs=rows)
        for run in [mapped, batch] if everywhere else [mapped]:
            found = run(spread)
            same(wanted, found)
            for leaf in jax.tree.leaves(found):
                assert leaf.sharding.spec[0] == "queries"

    check(function, more)
    if more:
        check(jax.grad(function, argnums=1), False)


def certified(memory, query):
    return jdam.recall(memory, query, BETA, max_steps=3, search=SEARCHES[1]).energy


def cold(memory, query):
    return jdam.energy(memory, query, BETA)


if address:
    mesh = jax.make_mesh((2 * int(address[1]),), ("patterns",))
    for kind in ("Gaussians", "vectors", "clouds"):
        check(kind, mesh, SEARCHES if kind == "Gaussians" else SEARCHES[:1])
    jax.distributed.shutdown()
else:
    mesh = jax.make_mesh((4, 2), ("patterns", "queries"))
    for kind in KINDS:
        held = check(
            kind, mesh, SEARCHES[:1] if kind in ("diagonal", "inner products") else SEARCHES
        )
        if kind == "Gaussians":
            check_more(*held)
    check_queries("Gaussians", certified)
    check_queries("clouds", cold, more=False)
print("the same")
