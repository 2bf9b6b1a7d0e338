"""Clouds under another ground cost than ½|x−y|²."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest

import jdam
from tests.cases import close
from tests.helpers import check_derivatives, clouds, near

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ott-jax imports packages that announce their end
    from ott.geometry import costs

EPSILON, BETA = 0.4, 3.0


class Saturating(costs.CostFn):
    """One's own, in squared units of distance."""

    def __call__(self, x, y):
        return jnp.sum(1 - jnp.exp(-((x - y) ** 2) / 2))


def power(x, y):
    return (np.abs(x - y) ** 1.5).sum() / 1.5


def cosine(x, y):
    return 1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y)


def saturating(x, y):
    return (1 - np.exp(-((x - y) ** 2) / 2)).sum()


COSTS = {
    "power": (costs.PNormP(1.5), power),
    "cosine": (costs.Cosine(), cosine),
    "own": (Saturating(), saturating),
}


def problem(rng, geometry):
    memory = jdam.store(clouds(rng, 4, 2, n=4), geometry)
    return memory, near(rng, memory[1], 0.3)


def transport(function, first, second):
    """OT_ε by POT."""
    (x, a), (y, b) = ((np.asarray(c.points), np.asarray(c.weights)) for c in (first, second))
    cost = np.array([[function(p, q) for q in y] for p in x])
    plan = ot.sinkhorn(a, b, cost, EPSILON, method="sinkhorn_log", stopThr=1e-11, numItermax=2000)
    density = plan / np.outer(a, b)
    return (plan * (cost + EPSILON * np.log(density))).sum()


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "solver"), [*((name, "stabilised") for name in COSTS), ("own", "ott")]
)
def test_divergences(rng, name, solver):
    cost, function = COSTS[name]
    memory, query = problem(rng, jdam.Sinkhorn(EPSILON, cost=cost, solver=solver))
    own = transport(function, query, query)
    wanted = [
        transport(function, query, p) - own / 2 - transport(function, p, p) / 2 for p in memory
    ]
    # Norms of ott-jax's cosine are larger by 1e-8.
    close(jdam.divergences(memory, query), np.array(wanted), rtol=2e-6, atol=1e-8)
    close(jdam.divergences(memory, memory[2])[2], 0, atol=1e-9)


@pytest.mark.full
@pytest.mark.parametrize("rho", [None, 0.5])
def test_half_the_squared_distance_is_one_of_them(rng, rho):
    memory, query = problem(rng, jdam.Sinkhorn(EPSILON, rho=rho, cost=costs.PNormP(2.0)))
    other = jdam.store(memory[:], jdam.Sinkhorn(EPSILON, rho=rho))
    close(*(jdam.divergences(m, query) for m in (memory, other)), rtol=1e-9, atol=1e-11)
    close(*(jdam.step(m, query, BETA) for m in (memory, other)), rtol=1e-8, atol=1e-9)


@pytest.mark.full
@pytest.mark.parametrize("name", ["cosine", "own"])
def test_derivatives(rng, name):
    """In the points and weights of query and patterns, and in ε."""
    cost, _ = COSTS[name]
    patterns = clouds(rng, 3, 2, n=4)
    query = near(rng, patterns[1], 0.3)

    def energy(points, others, tilt, epsilon):
        held = jdam.store(
            jdam.PointCloud(others, patterns.weights), jdam.Sinkhorn(epsilon, cost=cost)
        )
        weights = jax.nn.softmax(jnp.log(query.weights) + tilt)
        return jdam.energy(held, jdam.PointCloud(points, weights), BETA)

    at = query.points, patterns.points, jnp.zeros(4), jnp.float64(EPSILON)
    check_derivatives(energy, at, rtol=1e-5, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize(("name", "kappa"), [("power", 0.0), ("cosine", 0.2), ("own", 0.2)])
def test_recall_lowers_the_energy(rng, name, kappa):
    geometry = jdam.Sinkhorn(EPSILON / 4, hellinger_scale=kappa, cost=COSTS[name][0])
    memory, _ = problem(rng, geometry)
    queries = near(rng, memory[:], 0.3)
    run = partial(jdam.recall, max_steps=15, save_trace=True)
    many = jax.vmap(run, (None, 0, None))(memory, queries, 30.0)
    start = jax.vmap(jdam.energy, (None, 0, None))(memory, queries, 30.0)
    energies = np.concatenate([start[:, None], many.trace.energy], 1)
    assert (np.diff(energies) < 1e-12).all()
    assert (energies[:, -1] < energies[:, 0]).all()
    assert many.nearest.tolist() == [0, 1, 2, 3]
    one = run(memory, queries[2], 30.0)
    close(one.energy, many.energy[2], rtol=1e-7, atol=1e-9)
    close(one.measure, many.measure[2], rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_in_units_of_the_patterns(rng):
    patterns = jdam.PointCloud(rng.normal(size=(2, 3, 2)))
    between = [
        power(c[i], c[j]) for c in np.asarray(patterns.points) for i in range(3) for j in range(i)
    ]
    found = jdam.Sinkhorn.relative(patterns, 0.1, cost=costs.PNormP(1.5))
    close(found.epsilon, 0.1 * np.median(between), rtol=1e-9)


@pytest.mark.full
def test_what_is_not_known_of_them(rng, tmp_path):
    memory, query = problem(rng, jdam.Sinkhorn(EPSILON, cost=costs.PNormP(1.5)))
    assert repr(memory.geometry) == "Sinkhorn(epsilon=0.4, hellinger_scale=0, cost=PNormP)"
    with pytest.raises(TypeError, match="geometry.cost must be an array, None, .*; got <ott"):
        jdam.save(tmp_path / "memory", memory)
    assert not list(tmp_path.iterdir())
    for function in (jdam.theory.separations, jdam.theory.weight_stiffness):
        with pytest.raises(TypeError, match="memory must have a geometry whose D is at least"):
            function(memory)
    featured = jdam.PointCloud(query.points, query.weights, np.eye(4))
    with pytest.raises(ValueError, match="query must have no features for Sinkhorn.*cost=PNormP"):
        jdam.energy(memory, featured, BETA)
    with pytest.raises(TypeError, match="cost must be None or an ott.geometry.costs.CostFn, c"):
        jdam.Sinkhorn(EPSILON, cost="cosine")
    found = jdam.recall(memory, query, BETA, search=jdam.Certified(2), max_steps=2)
    close(found.energy, jdam.recall(memory, query, BETA, max_steps=2).energy, rtol=1e-6)
