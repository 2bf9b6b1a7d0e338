"""A geometry written elsewhere, with `check` and `compare` alone, is right through everything."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array, Float, Int

import jdam
from tests.helpers import near
from tests.outside import Cramer, Histogram, SlicedWasserstein, directions, even_clouds, histograms

KINDS = {"sliced": (even_clouds, SlicedWasserstein(directions(2))), "own": (histograms, Cramer())}


@pytest.fixture(params=KINDS)
def held(request, rng):
    make, geometry = KINDS[request.param]
    memory = jdam.store(make(rng, 6, 3), geometry)
    return memory, near(rng, memory[2], 0.1)


@pytest.mark.full
def test_certified_is_exhaustive(held):
    memory, query = held
    first, second = (
        jdam.recall(memory, query, 1e3, search=search)
        for search in (jdam.Exhaustive(), jdam.Certified(2))
    )
    assert int(first.status) == int(second.status) == jdam.Status.CONVERGED
    assert int(first.nearest) == 2
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)


@pytest.mark.full
def test_implicit_is_unrolled_at_convergence(held):
    memory, query = held

    def loss(beta, adjoint):
        measure = jdam.recall(memory, query, beta, max_steps=100, adjoint=adjoint).measure
        return sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(measure))

    slope = jax.jit(jax.grad(loss), static_argnums=1)
    slopes = [slope(2.0, adjoint) for adjoint in (jdam.Unrolled(), jdam.Implicit())]
    np.testing.assert_allclose(*slopes, rtol=1e-6)


@pytest.mark.full
def test_is_learned(rng, held):
    memory, _ = held
    queries = near(rng, memory.patterns, 0.2)
    fit = jdam.fit(memory, 5.0, queries, memory.patterns, optax.adam(0.02), num_steps=20)
    assert fit.losses[-1] < fit.losses[0]
    if isinstance(fit.memory.patterns, Histogram):
        np.testing.assert_allclose(fit.memory.patterns.probabilities.sum(-1), 1)


def test_is_shown_and_grown(held):
    memory, query = held
    assert "× Histogram(n=6), Cramer()" in repr(memory) or "SlicedWasserstein" in repr(memory)
    grown = memory.append(query).remove(0)
    assert len(grown) == 6
    assert int(jdam.divergences(grown, query).argmin()) == 5
    assert "CONVERGED" in repr(jdam.recall(grown, query, 1e4))


class Unfit(Cramer):
    """Pulls that are no measures, without a `move` for them."""

    def compare(self, view, patterns):
        found = super().compare(view, patterns)
        return found._replace(pull=patterns.measures.probabilities)


class Scalar(Cramer):
    """One divergence for all patterns."""

    def compare(self, view, patterns):
        found = super().compare(view, patterns)
        return found._replace(divergence=found.divergence.sum())


class Counted(Cramer):
    """A field that is neither an array of floats nor static."""

    times: int = 3


class Unaxed(jdam.Measure):
    """Without annotated axes."""

    array: jax.Array


def test_mistakes_are_named(rng):
    patterns = histograms(rng, 4, 3)
    with pytest.raises(TypeError, match="pulls of Unfit must be measures like the query"):
        jdam.recall(jdam.store(patterns, Unfit()), patterns[0], 1.0)
    with pytest.raises(ValueError, match="compare of Scalar must return divergences of shape"):
        jdam.energy(jdam.store(patterns, Scalar()), patterns[0], 1.0)
    with pytest.raises(TypeError, match=r"got 3 for Counted.times: declare it with equinox.field"):
        jdam.store(patterns, Counted())
    with pytest.raises(ValueError, match="geometry must be given for measures of type Histogram"):
        jdam.store(patterns)
    with pytest.raises(TypeError, match="Unaxed must annotate its arrays as jaxtyping"):
        _ = Unaxed(jnp.zeros((2, 3))).batch_shape


def test_axes_come_from_the_annotations(rng):
    class Ball(jdam.Measure):
        """The first array tells neither the dimension nor the rank of the others."""

        kind: str = eqx.field(static=True)
        radius: Float[Array, "*batch"]
        centre: Float[Array, "*batch d"]

    balls = Ball("round", jnp.ones(4), jnp.zeros((4, 3)))
    assert (balls.dim, balls.batch_shape, balls.dtype) == (3, (4,), jnp.float64)
    assert balls.describe() == "Ball(d=3)"

    class Labelled(jdam.Measure):
        """Its first array holds no floats."""

        label: Int[Array, "*batch"]
        place: Float[Array, "*batch d"]

    assert Labelled(jnp.arange(4), jnp.zeros((4, 3), jnp.float32)).dtype == jnp.float32
    assert (balls[1].batch_shape, len(balls)) == ((), 4)
