"""Programs lower for accelerators, which this machine need not have: without calls back to the
host, and in single precision where they are given it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from tests.cases import problem

pytestmark = pytest.mark.full

PLATFORMS = ["cuda", "tpu"]
CERTIFIED = jdam.Certified(2)


def recalled(memory, query, beta):
    return jdam.recall(memory, query, beta, max_steps=3)


def certified(memory, query, beta):
    return jdam.recall(memory, query, beta, max_steps=3, search=CERTIFIED)


def summed(adjoint):
    def function(memory, query, beta):
        result = jdam.recall(memory, query, beta, max_steps=3, adjoint=adjoint)
        return sum(leaf.sum() for leaf in jax.tree.leaves(result.measure))

    return jax.grad(function, argnums=(1, 2))


FUNCTIONS = {
    "divergences": lambda memory, query, beta: jdam.divergences(memory, query),
    "gibbs_weights": jdam.gibbs_weights,
    "energy": jdam.energy,
    "its gradient": jax.grad(jdam.energy, argnums=(1, 2)),
    "step": jdam.step,
    "recall": recalled,
    "certified": certified,
    "unrolled": summed(jdam.Unrolled()),
    "implicit": summed(jdam.Implicit()),
    "one step": summed(jdam.OneStep()),
    "attend": lambda memory, query, beta: jdam.attend(
        memory, query, beta, jnp.eye(len(memory), dtype=query.dtype)
    ),
    "pairwise": lambda memory, query, beta: jdam.pairwise(memory),
}
FEW = ["its gradient", "certified", "implicit"]
#: Every function of small matrices; of larger ones, decomposed otherwise, and of other kinds few.
CASES = [("gaussian", 3, name) for name in FUNCTIONS]
CASES += [
    (kind, dim, name)
    for kind, dim in (("gaussian", 6), ("entropic", 3), ("mixtures", 3), ("clouds", 3))
    for name in FEW
]
CASES += [(kind, 3, "certified") for kind in ("diagonal", "euclidean")]


def lowered(function, *arguments):
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
    assert exported.platforms == tuple(PLATFORMS)
    return exported.mlir_module()


def check(text):
    assert not re.search(r"\bf64\b|xf64>", text)
    targets = set(re.findall(r"custom_call @([\w$.]+)", text))
    assert not [target for target in targets if "callback" in target or "lapack" in target], targets


@pytest.mark.parametrize(("kind", "dim", "name"), CASES)
def test_lowers(rng, kind, dim, name):
    with jax.enable_x64(False):
        memory, query = problem(rng, kind, num=5, d=dim, dtype=np.float32)
        check(lowered(FUNCTIONS[name], memory, query, jnp.float32(2.0)))


def test_batches_of_accelerators_lower(rng, monkeypatch):
    """Batches are larger there, and chosen before lowering."""
    with jax.enable_x64(False):
        memory, query = problem(rng, "gaussian", num=5, d=3, dtype=np.float32)
        few = memory.geometry.batch_sizes(memory.patterns)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        many = memory.geometry.batch_sizes(memory.patterns)
        assert many.queries * many.patterns >= 32 * few.queries * few.patterns
        queries = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), query)
        for function in (recalled, certified):
            batched = jax.vmap(function, (None, 0, None))
            check(lowered(batched, memory, queries, jnp.float32(2.0)))


def test_the_check_finds_what_it_looks_for():
    double = lowered(lambda x: 2 * x, jnp.ones(2, jnp.float64))
    with pytest.raises(AssertionError):
        check(double)
    called = "stablehlo.custom_call @xla_ffi_python_gpu_callback(%0)"
    with pytest.raises(AssertionError):
        check(called)
