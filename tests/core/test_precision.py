"""Products in full precision in every program: by default accelerators take TF32 or bfloat16."""

from functools import partial

import jax
import optax
import pytest

import jdam
from tests.cases import KINDS, every_kind, problem

pytestmark = pytest.mark.full


def of_lower_precision(function, *args):
    """The products in a lowered program that are not in full precision."""
    lines = jax.jit(function).lower(*args).as_text().splitlines()
    products = [line for line in lines if "stablehlo.dot_general" in line]
    assert products
    return [line for line in products if line.count("HIGHEST") != 2]


def total(tree):
    return sum(leaf.sum() for leaf in jax.tree.leaves(tree))


def energy_and_step(memory, query):
    return jdam.energy(memory, query, 2.0) + total(jdam.step(memory, query, 2.0))


def recalled(**settings):
    def function(memory, query):
        return total(jdam.recall(memory, query, 2.0, max_steps=2, **settings).measure)

    return function


FUNCTIONS = {
    "weights": lambda memory, query: jdam.gibbs_weights(memory, query, 2.0)[0],
    "unrolled": recalled(),
    "implicit": recalled(adjoint=jdam.Implicit()),
    "certified": recalled(search=jdam.Certified(2)),
}


def slopes_of(function, geometry):
    """By reverse mode, of a batch, with the patterns stored inside."""

    def loss(patterns, query):
        held = jdam.store(patterns, geometry)
        queries = jax.tree.map(lambda leaf: leaf[None], query)
        return jax.vmap(function, (None, 0))(held, queries).sum()

    return jax.value_and_grad(loss, argnums=(0, 1))


@every_kind
def test_first_and_second_derivatives(rng, kind):
    """In one program, of which nothing may be left out."""
    memory, query = problem(rng, kind)
    slopes = slopes_of(energy_and_step, KINDS[kind][1])
    curvature = partial(jax.jvp, slopes)
    point = memory.patterns, query
    assert not of_lower_precision(curvature, point, point)


@pytest.mark.parametrize(
    ("kind", "name"), [*(("gaussian", name) for name in FUNCTIONS), ("clouds", "implicit")]
)
def test_first_derivatives(rng, kind, name):
    memory, query = problem(rng, kind)
    slopes = slopes_of(FUNCTIONS[name], memory.geometry)
    assert not of_lower_precision(slopes, memory.patterns, query)


def test_certified_clouds(rng):
    memory, query = problem(rng, "clouds")
    assert not of_lower_precision(FUNCTIONS["certified"], memory, query)


def test_learning(rng):
    memory, _ = problem(rng, "gaussian")
    learner = jdam.Learner(optax.sgd(0.1))
    state, patterns = learner.init(memory, 2.0), memory.patterns
    assert not of_lower_precision(learner.update, state, patterns, patterns)


def test_moments_and_random_measures(rng):
    samples = rng.normal(size=(3, 8, 2))

    def curvature(samples):
        return jax.grad(lambda x: total(jdam.Gaussian.from_samples(x)))(samples)

    assert not of_lower_precision(curvature, samples)
    key = jax.random.key(0)
    for measure in (jdam.Gaussian.from_samples(samples), jdam.PointCloud(samples)):
        for where in ("both", "covariance"):
            run = lambda key, where=where, measure=measure: jdam.random.perturb(  # noqa: E731
                key, measure, 0.1, where=where
            )
            assert not of_lower_precision(run, key)
    assert not of_lower_precision(
        lambda key: jdam.random.wasserstein_sphere(key, 3, 2, bounds=None, commuting=False), key
    )
