"""Instructions of optimised HLO of first calls, on which the time to compile them depends.

    python -m tests.hlo_lines

prints the table for tests/test_hlo_lines.py.
"""

import tests.conftest  # noqa: F401, I001 (its settings, before jdam is imported)

from functools import partial

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

import jdam
from tests.helpers import clouds, gaussians, near, vectors


def count(function, *arguments):
    # Programs that are read from the compilation cache print fewer lines.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        program = jax.jit(function).lower(*arguments).compile().as_text()
        return sum(" = " in line for line in program.splitlines())  # not the tables of sources
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def problem(make, geometry=None):
    """A memory, queries and β, in single precision."""
    rng = np.random.default_rng(0)
    memory = jdam.store(make(rng, 20, 3, dtype=np.float32), geometry)
    return memory, near(rng, memory.patterns, 0.05), np.float32(20.0)


def first_calls():
    """The name of each call, and a function and its arguments."""
    certified = partial(jdam.recall, search=jdam.Certified())
    kinds = {
        "vectors": problem(vectors),
        "Gaussians": problem(gaussians),
        "clouds": problem(clouds, jdam.Sinkhorn(0.1)),
    }
    for kind, (memory, queries, beta) in kinds.items():
        one = memory, jax.tree.map(lambda leaf: leaf[0], queries), beta
        yield f"recall of {kind}", jdam.recall, one
        yield f"step of {kind}", jdam.step, one
    memory, queries, beta = kinds["Gaussians"]
    one = memory, jax.tree.map(lambda leaf: leaf[0], queries), beta
    slope = jax.grad(lambda *given: jdam.recall(*given).energy, argnums=1)
    yield "recalls of a batch", jax.vmap(jdam.recall, (None, 0, None)), (memory, queries, beta)
    yield "recall with Certified", certified, one
    yield "gradient of a recall", slope, one
    yield "suggest_beta", jdam.suggest_beta, (memory,)


def table():
    return {name: count(function, *arguments) for name, function, arguments in first_calls()}


if __name__ == "__main__":
    for name, lines in table().items():
        print(f'    "{name}": {lines},')
