"""Products in full precision in every program: by default accelerators take TF32 or bfloat16."""

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


FUNCTIONS = {
    "energy": lambda memory, query: jdam.energy(memory, query, 2.0),
    "weights": lambda memory, query: jdam.gibbs_weights(memory, query, 2.0)[0],
    "step": lambda memory, query: total(jdam.step(memory, query, 2.0)),
    "unrolled": lambda memory, query: total(jdam.recall(memory, query, 2.0, max_steps=2).measure),
    "implicit": lambda memory, query: total(
        jdam.recall(memory, query, 2.0, max_steps=2, adjoint=jdam.Implicit()).measure
    ),
    "certified": lambda memory, query: total(
        jdam.recall(memory, query, 2.0, max_steps=2, search=jdam.Certified(2)).measure
    ),
}


#: Of all kinds what they do themselves, of some what is done with it.
CASES = [(kind, name) for kind in KINDS for name in ("energy", "step")] + [
    (kind, name)
    for kind in ("gaussian", "entropic, diagonal")
    for name in ("weights", "unrolled", "implicit", "certified")
]
CASES.append(("clouds", "implicit"))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_first_derivatives(rng, kind, name):
    """By reverse mode, of a batch, with the patterns stored inside."""
    memory, query = problem(rng, kind)

    def loss(patterns, query):
        held = jdam.store(patterns, KINDS[kind][1])
        queries = jax.tree.map(lambda leaf: leaf[None], query)
        return jax.vmap(FUNCTIONS[name], (None, 0))(held, queries).sum()

    slopes = jax.value_and_grad(loss, argnums=(0, 1))
    assert not of_lower_precision(slopes, memory.patterns, query)


def test_certified_clouds(rng):
    memory, query = problem(rng, "clouds")
    assert not of_lower_precision(FUNCTIONS["certified"], memory, query)


@every_kind
@pytest.mark.parametrize("name", ["energy", "step"])
def test_second_derivatives(rng, kind, name):
    memory, query = problem(rng, kind)
    function = FUNCTIONS[name]

    def curvature(query, direction):
        slope = jax.grad(function, argnums=1)
        return jax.jvp(lambda q: slope(memory, q), (query,), (direction,))[1]

    assert not of_lower_precision(curvature, query, query)


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
