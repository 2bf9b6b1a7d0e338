"""A memory over several devices and processes is the same memory."""

import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import jdam
from tests.helpers import gaussians, near

ROOT = Path(__file__).parents[2]


def start(*arguments):
    command = [sys.executable, "-W", "error", "-m", "tests.sharding_worker", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    assert printed.endswith("the same\n")


@pytest.mark.full
def test_four_devices(tmp_path):
    finish(start(str(tmp_path)))


@pytest.mark.full
def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [start(str(tmp_path), f"localhost:{port}", "2", str(index)) for index in range(2)]
    for process in processes:
        finish(process)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_two_devices(rng):
    memory = jdam.store(gaussians(rng, 5, 2), log_prior=rng.normal(size=5))
    sharded = jdam.shard(memory, jax.make_mesh((2,), ("patterns",)), "patterns")
    query = near(rng, memory[1], 0.1)
    recall = jax.jit(lambda held: jdam.recall(held, query, 3.0))
    found, wanted = recall(sharded), recall(memory)
    assert found.status == wanted.status
    assert found.nearest == wanted.nearest
    for name in ("measure", "energy", "weight", "divergence"):
        parts = getattr(found, name), getattr(wanted, name)
        chex.assert_trees_all_close(*parts, rtol=1e-9, atol=1e-9)


def collectives(jaxpr, depth=0):
    """Yield the communications of a program, with the number of loops around each."""
    for equation in jaxpr.eqns:
        if "axes" in equation.params and equation.primitive.name in ("psum", "pmin", "pmax"):
            yield equation.primitive.name, depth
        for part in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(part):
                inner = depth + (equation.primitive.name in ("while", "scan"))
                yield from collectives(getattr(part, "jaxpr", part), inner)


def is_jaxpr(part):
    return hasattr(part, "eqns")


def test_devices_do_not_wait_for_each_other_while_they_search(rng):
    """Each takes as many rounds as its own patterns need: communication there might hang."""
    memory = jdam.store(gaussians(rng, 5, 2), log_prior=rng.normal(size=5))
    sharded = jdam.shard(memory, jax.make_mesh((1,), ("patterns",)), "patterns")
    recall = partial(jdam.recall, search=jdam.Certified(2), max_steps=2)
    found = set(collectives(jax.make_jaxpr(recall)(sharded, memory[1], 3.0).jaxpr))
    # In the loop of steps, which is the same on all devices, but not in that of the search.
    assert found == {("psum", 1), ("pmin", 1)}


def test_one_device(rng):
    memory = jdam.store(gaussians(rng, 5, 2))
    mesh = jax.make_mesh((1,), ("patterns",))
    sharded = jdam.shard(memory, mesh, "patterns")
    assert jdam.energy(sharded, memory[1], 3.0) == jdam.energy(memory, memory[1], 3.0)
    with pytest.raises(ValueError, match="axis must be one of the mesh's .*; got 'rows'"):
        jdam.shard(memory, mesh, "rows")
    with pytest.raises(ValueError, match="memory must not be sharded already"):
        jdam.shard(sharded, mesh, "patterns")
    with pytest.raises(TypeError, match="mesh must be a jax.sharding.Mesh; got list"):
        jdam.shard(memory, [mesh], "patterns")
    with pytest.raises(TypeError, match="memory must be a jdam.Memory; got Gaussian"):
        jdam.shard(memory.patterns, mesh, "patterns")


def test_indexing_does_not_show_the_filling(rng):
    memory = jdam.store(gaussians(rng, 5, 2))
    mesh = jax.make_mesh((1,), ("patterns",))
    sharded = jdam.shard(memory, mesh, "patterns")
    filled = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:1]]), sharded.patterns)
    sharded = eqx.tree_at(lambda m: m.patterns, sharded, filled)
    assert len(sharded[:]) == len(list(sharded)) == len(sharded) == 5
