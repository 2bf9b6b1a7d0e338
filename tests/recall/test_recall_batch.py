"""Many recalls: part by part the same as in one program, watched and stopped."""

import os
import signal
import threading

import jax
import numpy as np
import pytest

import jdam
from jdam._recall import recall as module
from tests.cases import close, gaussians_and_clouds, problem
from tests.helpers import near, vectors


@pytest.mark.full
@gaussians_and_clouds
def test_parts_are_one_program(rng, monkeypatch, capsys, kind):
    memory, _ = problem(rng, kind)
    queries = near(rng, memory.patterns, 0.05)
    settings = {"batch_size": 3, "max_steps": 3, "save_trace": True}
    single = jax.jit(lambda m, q, beta: jdam.recall_batch(m, q, beta, **settings))
    wanted = single(memory, queries, 20.0)
    monkeypatch.setattr(module, "_recall_batch_size", lambda memory, batch_size: 2)
    found = jdam.recall_batch(memory, queries, 20.0, progress=True, **settings)
    # The inner solver of clouds stops at 1e-11, of which every step makes more.
    close(found, wanted, rtol=1e-7, atol=2e-9)
    assert "recall_batch: 100%|██████████| 4/4" in capsys.readouterr().err
    jdam.recall_batch(memory, queries, 20.0, **settings)
    assert capsys.readouterr().err == ""


def test_how_many_at_once(rng):
    """A batch, or some of them that are quick."""
    few, many = jdam.store(vectors(rng, 1000, 2)), jdam.store(np.zeros((300_000, 1)))
    assert module._recall_batch_size(few, 256) % 256 == 0
    assert module._recall_batch_size(few, 256) > 256
    assert module._recall_batch_size(many, 256) == 256
    assert module._recall_batch_size(many, 5) == 10


@pytest.mark.full
def test_derivatives_are_of_one_program(rng, monkeypatch):
    memory = jdam.store(vectors(rng, 6, 2))
    queries = near(rng, memory.patterns, 0.1)

    def total(queries):
        return jdam.recall_batch(memory, queries, 2.0, max_steps=3, batch_size=2).energy.sum()

    wanted = jax.grad(total)(queries)
    monkeypatch.setattr(module, "_recall_batch_size", lambda memory, batch_size: 2)
    found = jax.grad(total)(queries)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert np.abs(wanted).max() > 0


@pytest.mark.full
def test_it_can_be_stopped(rng, monkeypatch, interruptible):
    memory = jdam.store(vectors(rng, 10, 2))
    monkeypatch.setattr(module, "_recall_batch_size", lambda memory, batch_size: 1)
    queries = np.zeros((2_000_000, 2))  # one after another, for many minutes
    timer = threading.Timer(5.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        jdam.recall_batch(memory, queries, 1.0, max_steps=2)
    timer.join()


def test_progress_is_checked(rng):
    memory = jdam.store(vectors(rng, 4, 2))
    with pytest.raises(TypeError, match="progress must be True, False or None; got 'yes'"):
        jdam.recall_batch(memory, memory.patterns, 1.0, progress="yes")
