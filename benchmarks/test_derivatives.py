"""What derivatives cost: gradients of the energy beside the energy, and gradients through recall
by its three adjoints beside recall."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam


def gaussians(rng, num, d):
    mean = rng.normal(size=(num, d)).astype(np.float32)
    return jdam.Gaussian(mean, (rng.normal(size=(num, d, d)) / np.sqrt(d)).astype(np.float32))


def clouds(rng, num, n):
    points = rng.normal(size=(num, n, 3)) + rng.normal(size=(num, 1, 3))
    weights = rng.dirichlet(np.full(n, 5.0), size=num)
    return jdam.PointCloud(points.astype(np.float32), weights.astype(np.float32))


def problem(rng, kind):
    if kind == "Bures, d = 32, N = 512":
        memory = jdam.store(gaussians(rng, 512, 32))
        return memory, gaussians(rng, 1, 32)[0], 1.0
    memory = jdam.store(clouds(rng, 32, 64), jdam.Sinkhorn(0.1))
    return memory, clouds(rng, 1, 64)[0], 3.0


def energy_in(patterns, memory, query, beta):
    return jdam.energy(jdam.store(patterns, memory.geometry), query, beta)


CONTENDERS = {
    "`jdam.energy`": lambda memory, query, beta: jdam.energy(memory, query, beta),
    "its gradient in the query": lambda memory, query, beta: jax.grad(jdam.energy, 1)(
        memory, query, beta
    ),
    "in the patterns": lambda memory, query, beta: jax.grad(energy_in)(
        memory.patterns, memory, query, beta
    ),
    "its Hessian times a vector": lambda memory, query, beta: jax.jvp(
        lambda q: jax.grad(jdam.energy, 1)(memory, q, beta), (query,), (query,)
    )[1],
}


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("kind", ["Bures, d = 32, N = 512", "Sinkhorn, n = m = 64, N = 32"])
def test_energy(rng, measure, kind, name):
    memory, query, beta = problem(rng, kind)
    function = jax.jit(CONTENDERS[name]).lower(memory, query, beta).compile()
    temporary = function.memory_analysis().temp_size_in_bytes / 2**20
    measure(
        "Derivatives of an energy", kind, name, function, memory, query, beta,
        pairs=len(memory), temporary=temporary,
    )  # fmt: skip


ADJOINTS = {
    "`jdam.recall`": None,
    "its gradient, `Unrolled()`": jdam.Unrolled(),
    "its gradient, `Implicit()`": jdam.Implicit(),
    "its gradient, `OneStep()`": jdam.OneStep(),
}


@pytest.mark.parametrize("name", ADJOINTS)
@pytest.mark.parametrize("steps", [10, 1000])
def test_recall(rng, measure, steps, name):
    """From the same query, which converges in some twenty steps."""
    memory = jdam.store(gaussians(rng, 64, 8))
    query, adjoint = gaussians(rng, 1, 8)[0], ADJOINTS[name]

    def outcome(patterns, adjoint):
        held = jdam.store(patterns)
        result = jdam.recall(held, query, 1.0, max_steps=steps, adjoint=adjoint)
        return jnp.sum(result.measure.covariance**2)

    function = outcome if adjoint is None else jax.grad(outcome)
    function = partial(function, adjoint=adjoint or jdam.Unrolled())
    function = jax.jit(function).lower(memory.patterns).compile()
    temporary = function.memory_analysis().temp_size_in_bytes / 2**20
    question, row = "Derivatives of a recall", f"Gaussians, d = 8, N = 64, at most {steps} steps"
    measure(question, row, name, function, memory.patterns, temporary=temporary)
