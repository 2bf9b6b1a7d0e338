"""A memory inside a model of somebody else's, trained by somebody else's loop."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdam
from tests.cases import KINDS
from tests.helpers import clouds


class Classifier(eqx.Module):
    """Prototype clouds: the loss stores them, so that nothing of older ones is left."""

    points: jax.Array
    logits: jax.Array
    values: jax.Array

    def __call__(self, query):
        patterns = jdam.PointCloud(self.points, jax.nn.softmax(self.logits))
        memory = jdam.store(patterns, jdam.Sinkhorn(0.3))
        return jdam.attend(memory, query, 3.0, self.values)


@pytest.mark.full
def test_store_inside_the_loss(rng):
    labels = np.arange(12) % 2
    shapes = np.array([[1.0, 0.2], [0.2, 1.0]])[labels]
    queries = jdam.PointCloud(rng.normal(size=(12, 4, 2)) * shapes[:, None])
    start = rng.normal(size=(2, 4, 2))
    model = Classifier(
        jnp.asarray(start), jnp.zeros((2, 4)), 0.1 * jnp.asarray(rng.normal(size=(2, 2)))
    )
    optimizer = optax.adam(0.05)

    def loss(model):
        logits = jax.vmap(model)(queries)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @eqx.filter_jit
    def train(model, state):
        value, slope = eqx.filter_value_and_grad(loss)(model)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            change, state = optimizer.update(slope, state)
        return eqx.apply_updates(model, change), state, value

    state, losses = optimizer.init(model), []
    for _ in range(25):
        model, state, value = train(model, state)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    weights = jax.nn.softmax(model.logits)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-12)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["clouds", "entropic, low rank"])
def test_nothing_stale_is_used(rng, kind):
    """What was computed of other patterns, or of another ε, gives no numbers at all."""
    make, geometry = KINDS[kind]
    memory = jdam.store(make(rng, 4, 2), geometry)
    query = memory[1]

    def status(memory):
        return int(jdam.recall(memory, query, 2.0, max_steps=2).status)

    assert status(memory) != jdam.Status.NONFINITE
    patterns = jax.tree.map(lambda leaf: leaf + 1e-9, memory.patterns)
    moved = eqx.tree_at(lambda m: m.patterns, memory, patterns)
    assert status(moved) == jdam.Status.NONFINITE
    assert np.isnan(jdam.energy(moved, query, 2.0))
    epsilon = memory.geometry.epsilon * (1 + 1e-9)
    warmer = eqx.tree_at(lambda m: m.geometry.epsilon, memory, epsilon)
    assert status(warmer) == jdam.Status.NONFINITE
    again = jdam.store(patterns, warmer.geometry)
    assert np.isfinite(jdam.energy(again, query, 2.0))


@pytest.mark.full
def test_only_what_is_stale_is_refused(rng):
    """Not what nothing was computed of: κ; and Gaussians, of which only bounds were."""
    memory = jdam.store(clouds(rng, 3, 2), jdam.Sinkhorn(0.3))
    faster = eqx.tree_at(lambda m: m.geometry.hellinger_scale, memory, jnp.asarray(2.0))
    assert jdam.energy(faster, memory[0], 2.0) == jdam.energy(memory, memory[0], 2.0)
    make, geometry = KINDS["gaussian"]
    memory = jdam.store(make(rng, 40, 2), geometry)
    moved = eqx.tree_at(lambda m: m.patterns.mean, memory, memory.patterns.mean + 0.1)
    again = jdam.store(moved.patterns)
    assert jdam.energy(moved, memory[0], 2.0) == jdam.energy(again, memory[0], 2.0)
    search = jdam.Certified(2, max_candidates=8)
    refused = jdam.recall(moved, memory[0], 20.0, search=search)
    assert int(refused.status) == jdam.Status.NONFINITE
    assert int(jdam.recall(again, memory[0], 20.0, search=search).status) == jdam.Status.CONVERGED
