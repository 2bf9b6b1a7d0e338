"""The search of those who choose none, and `Certified` without an end: right at every β, and quick
where few patterns matter."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from jdam._energy.certified import choose
from tests.cases import alike, only_full
from tests.helpers import diagonals, gaussians, mixtures, near

MEMORIES = {
    "Gaussians": (partial(gaussians, num=600, d=5), None),
    "mixtures": (partial(mixtures, num=600, d=2), None),
}


def problem(rng, name):
    make, geometry = MEMORIES[name]
    memory = jdam.store(make(rng), geometry)
    return memory, near(rng, memory.patterns[:5], 0.1)


@partial(jax.jit, static_argnums=0)
def recalled(search, memory, queries, beta):
    recall = partial(jdam.recall, search=search, max_steps=4)
    return jax.vmap(recall, (None, 0, 0))(memory, queries, beta)


@pytest.mark.full
@pytest.mark.parametrize("name", ["Gaussians", *only_full("mixtures")])
def test_recall_is_that_of_exhaustive(rng, name):
    """In one batch: queries of which few patterns, some, and all matter to."""
    memory, queries = problem(rng, name)
    betas = jnp.array([100.0, 10.0, 1.0, 0.1, 1e-3])
    found = recalled(None, memory, queries, betas)
    wanted = recalled(jdam.Exhaustive(), memory, queries, betas)
    alike(found.measure, wanted.measure, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(found.nearest, wanted.nearest)
    np.testing.assert_array_equal(found.status, wanted.status)
    np.testing.assert_allclose(found.energy, wanted.energy, rtol=1e-9, atol=1e-14)
    assert (found.neglected <= 1e-12).all()
    assert found.neglected[0] > 0  # few were compared
    assert (found.neglected[-2:] == 0).all()  # all were


@pytest.mark.full
def test_derivatives_are_those_of_exhaustive(rng):
    memory, queries = problem(rng, "Gaussians")

    @partial(jax.jit, static_argnums=0)
    @partial(jax.grad, argnums=(1, 2))
    def slope(search, query, beta):
        found = jdam.recall(memory, query, beta, search=search, max_steps=2)
        return found.measure.mean.sum() + jnp.sum(found.measure.covariance**2)

    for beta in (20.0, 0.1):
        found, wanted = (slope(s, queries[0], beta) for s in (None, jdam.Exhaustive()))
        chex.assert_trees_all_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_what_is_chosen(rng):
    def chosen(memory, search=None, separation=None):
        separation = separation or jdam.LogSumExp()
        return type(choose(search, memory, separation)).__name__

    many = jdam.store(gaussians(rng, 600, 2))
    assert chosen(many) == "Certified"
    assert chosen(many, jdam.Exhaustive()) == "Exhaustive"
    assert chosen(many, separation=jdam.Epanechnikov()) == "Exhaustive"
    assert chosen(jdam.store(gaussians(rng, 20, 2))) == "Exhaustive"
    assert chosen(jdam.store(diagonals(rng, 600, 2))) == "Exhaustive"
    assert chosen(jdam.store(gaussians(rng, 20, 2), capacity=600)) == "Certified"
    points = jdam.PointCloud(rng.normal(size=(600, 3, 2)))
    assert chosen(jdam.store(points, jdam.Sinkhorn(0.1))) == "Certified"
    assert chosen(jdam.store(points, jdam.Sinkhorn(0.1, rho=1.0))) == "Exhaustive"


@pytest.mark.full
def test_clouds_keep_potentials(rng):
    """From step to step, and in derivatives, where there is room for them."""
    centres = 3 * rng.normal(size=(24, 1, 2))
    clouds = jdam.PointCloud(centres + rng.normal(size=(24, 8, 2)))
    memory, query = jdam.store(clouds, jdam.Sinkhorn(0.3)), clouds[5].points + 0.2
    few = jdam.Certified(2)
    assert few.first_guess(memory).shape == (24, 8)

    @partial(jax.jit, static_argnums=0)
    def recalled(search, points, beta):
        def height(points):
            found = jdam.recall(memory, jdam.PointCloud(points), beta, search=search, max_steps=4)
            return (found.measure.points**2).sum(), found

        (_, found), slope = jax.value_and_grad(height, has_aux=True)(points)
        return found.measure.points, found.energy, slope

    for beta in (5.0, 0.02):
        found, wanted = (recalled(s, query, beta) for s in (few, jdam.Exhaustive()))
        for x, y in zip(found, wanted, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
