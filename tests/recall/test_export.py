"""Programs for any number of queries, as `jax.export` makes them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jdam
from tests.cases import KINDS, close
from tests.helpers import near, vectors

pytestmark = pytest.mark.full


def exported(function, like):
    """`function` of batches of any size, of what is like a batch."""
    (size,) = export.symbolic_shape("b")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), like)
    return export.export(jax.jit(function))(shapes).call


def at(batch, index):
    return jax.tree.map(lambda leaf: leaf[index], batch)


@pytest.mark.parametrize("kind", ["euclidean", "gaussian", "clouds"])
def test_batches_of_any_size(rng, kind):
    """As of each query by itself; 19 are more than are computed at once."""
    make, geometry = KINDS[kind]
    memory = jdam.store(make(rng, 5, 2), geometry)
    queries = near(rng, at(memory.patterns, np.arange(19) % 5), 0.1)

    def one(query):
        found = jdam.recall(memory, query, 3.0, max_steps=3)
        return found.measure, found.nearest, jdam.energy(memory, query, 3.0)

    run, alone = exported(jax.vmap(one), queries), jax.jit(one)
    for count in (1, 19):
        found = run(at(queries, slice(count)))
        for row in (0, count - 1):
            close(at(found, row), alone(at(queries, row)), rtol=1e-9, atol=1e-9)


def test_derivatives_of_batches_of_any_size(rng):
    memory, queries = jdam.store(vectors(rng, 5, 2)), jnp.asarray(vectors(rng, 19, 2))

    def slope(query):
        recalled = partial(jdam.recall, memory, beta=1.0, adjoint=jdam.OneStep())
        return jax.grad(lambda query: recalled(query).measure.sum())(query)

    run, wanted = exported(jax.vmap(slope), queries), jax.vmap(slope)(queries)
    close(run(queries), wanted, rtol=1e-9, atol=1e-9)


def test_a_memory_of_any_size_raises(rng):
    patterns = vectors(rng, 5, 2)
    with pytest.raises(ValueError, match="must have a known length; got the symbol b: export it"):
        exported(lambda patterns: jdam.divergences(jdam.store(patterns), patterns[0]), patterns)
