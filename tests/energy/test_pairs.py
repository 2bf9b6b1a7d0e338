"""All divergences at once are those of one query after another."""

import dataclasses
import os
import signal
import threading
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from jdam._energy import pairs
from jdam.geometry.protocol import BatchSizes
from tests.cases import METRIC, every_kind_in_full, problem
from tests.helpers import gaussians, near, vectors


@every_kind_in_full
def test_pairs_are_single_calls(rng, kind):
    memory, query = problem(rng, kind)
    queries = jdam.stack([memory[1], query, memory[4]])
    found = jdam.pairwise(memory, queries)
    wanted = [jdam.divergences(memory, q) for q in (memory[1], query, memory[4])]
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    among = np.asarray(jdam.pairwise(memory))
    np.testing.assert_allclose(among[[1, 4]], found[::2], rtol=1e-9, atol=1e-12)
    assert among.shape == (7, 7)


@pytest.mark.full
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


@pytest.mark.full
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


@pytest.mark.full
def test_gradient_of_pairs(rng):
    memory = jdam.store(gaussians(rng, 3, 2))
    queries = near(rng, memory.patterns, 0.1)
    slope = jax.jit(jax.grad(lambda q: jdam.pairwise(memory, q).sum()))(queries)
    alone = jax.jit(jax.grad(lambda q: jdam.divergences(memory, q).sum()))(queries[1])
    np.testing.assert_allclose(slope.mean[1], alone.mean, rtol=1e-10)


def small_parts(monkeypatch, geometry):
    """Tiles of 1 query and 1 pattern, and parts of 4 of them."""
    monkeypatch.setattr(pairs, "PRODUCTS", 4)
    sizes = BatchSizes(1, 1, 1)
    monkeypatch.setattr(type(geometry), "batch_sizes", lambda self, patterns: sizes)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["gaussian", "clouds", "one-sided"])
def test_parts_are_one_program(rng, monkeypatch, capsys, kind):
    memory, query = problem(rng, kind)
    small_parts(monkeypatch, memory.geometry)
    queries = jdam.stack([memory[1], query, memory[4]])
    for args, parts in (((queries,), 6), ((), 14)):
        wanted = jax.jit(jdam.pairwise)(memory, *args)
        found = jdam.pairwise(memory, *args, progress=True)
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
        assert f"pairwise: 100%|██████████| {parts}/{parts}" in capsys.readouterr().err
    if kind == "clouds":  # what was prepared is of other patterns
        moved = eqx.tree_at(lambda m: m.patterns.points, memory, 2 * memory.patterns.points)
        assert np.isnan(jdam.pairwise(moved)).all()
    jdam.pairwise(memory, progress=False)
    jdam.pairwise(memory)  # not a terminal
    assert capsys.readouterr().err == ""


@pytest.mark.full
def test_parts_of_many_queries_have_all_patterns(rng, monkeypatch, capsys):
    memory = jdam.store(vectors(rng, 5, 3))
    sizes = BatchSizes(2, 3, 1)
    monkeypatch.setattr(pairs, "PRODUCTS", 4)
    monkeypatch.setattr(jdam.Euclidean, "batch_sizes", lambda self, patterns: sizes)
    queries = vectors(rng, 11, 3)
    wanted = ((np.asarray(queries)[:, None] - np.asarray(memory.patterns)) ** 2).sum(-1)
    found = jdam.pairwise(memory, queries, progress=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("own", [True, False])
def test_parts_of_memories_with_room_or_spoiled(rng, monkeypatch, own):
    memory = jdam.store(gaussians(rng, 6, 2), log_prior=np.zeros(6), capacity=11)
    args = () if own else (gaussians(rng, 3, 2),)
    moved = eqx.tree_at(lambda m: m.patterns.mean, memory, 2 * memory.patterns.mean)
    overfull = dataclasses.replace(memory, size=jnp.int32(-1))
    single = jax.jit(jdam.pairwise)
    held = (memory, moved, overfull)
    wanted = [np.asarray(single(m, *args)) for m in held]
    assert np.isfinite(wanted[0][:3, :6]).all()
    assert np.isinf(wanted[0][:, 6:]).all()
    if not own:
        assert np.isnan(wanted[2]).all()
    small_parts(monkeypatch, memory.geometry)
    for m, expected in zip(held, wanted, strict=True):
        np.testing.assert_allclose(jdam.pairwise(m, *args), expected, rtol=1e-12, atol=1e-12)


def test_how_many_at_once(rng):
    """Tiles of products are small work."""
    memory = jdam.store(gaussians(rng, 7, 2))
    tile = memory.geometry.batch_sizes(memory.patterns)
    assert pairs._pairs_at_once(memory) == (4 * tile.patterns // 7 * tile.queries, 7)
    memory = jdam.store(np.zeros((300_000, 1)))
    tile = memory.geometry.batch_sizes(memory.patterns)
    assert pairs._pairs_at_once(memory) == (tile.queries, 64 * tile.patterns)


@pytest.mark.full
def test_only_known_values_are_cut(rng, monkeypatch):
    memory = jdam.store(vectors(rng, 9, 2))
    small_parts(monkeypatch, memory.geometry)

    def fail(*args):
        raise AssertionError("parts inside of a program")

    wanted = jdam.pairwise(memory, memory.patterns)
    monkeypatch.setattr(pairs, "in_parts", fail)
    np.testing.assert_allclose(jax.jit(lambda: jdam.pairwise(memory))(), wanted, atol=1e-12)
    jax.grad(lambda q: jdam.pairwise(memory, q).sum())(memory.patterns)
    jax.vmap(lambda q: jdam.pairwise(memory, q[None]))(memory.patterns)
    with pytest.raises(AssertionError, match="parts inside"):
        jdam.pairwise(memory)


@pytest.mark.full
def test_it_can_be_stopped(rng, monkeypatch, interruptible):
    memory = jdam.store(vectors(rng, 4000, 2))
    small_parts(monkeypatch, memory.geometry)
    # All 4 million parts would take an hour.
    timer = threading.Timer(5.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        jdam.pairwise(memory)
    timer.join()
    began = time.monotonic()
    assert jdam.pairwise(memory, memory.patterns[:1]).shape == (1, 4000)
    assert time.monotonic() - began < 60


def test_progress_is_checked(rng):
    memory = jdam.store(vectors(rng, 4, 2))
    for call in (jdam.pairwise, jdam.suggest_beta):
        with pytest.raises(TypeError, match="progress must be True, False or None; got 1"):
            call(memory, progress=1)
