"""MW₂ between mixtures: linear programs over exact Bures costs, recall, bounds, derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from scipy.optimize import linear_sum_assignment

import jdam
from tests.cases import alike, close
from tests.helpers import check_derivatives, gaussians, mixtures, near


def bures_costs(first, second):
    """W₂² between all components, by singular values."""
    first, second = (
        [np.asarray(x, float) for x in jax.tree.leaves(m)[1:]] for m in (first, second)
    )
    costs = np.empty((len(first[0]), len(second[0])))
    for k, (m, left) in enumerate(zip(*first, strict=True)):
        for j, (n, right) in enumerate(zip(*second, strict=True)):
            nuclear = np.linalg.svd(right.T @ left, compute_uv=False).sum()
            costs[k, j] = ((m - n) ** 2).sum() + (left**2).sum() + (right**2).sum() - 2 * nuclear
    return costs


def mw2_squared(first, second):
    a, b = (np.asarray(m.weights, float) for m in (first, second))
    return ot.emd2(a / a.sum(), b / b.sum(), bures_costs(first, second))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    ("first", "second", "d"), [((3, 2), (3, 2), 2), ((2, 3), (5, 1), 3), ((16, 8), (16, 8), 8)]
)
def test_it_is_the_linear_program(rng, dtype, first, second, d):
    memory = jdam.store(mixtures(rng, 4, d, *second, dtype=dtype))
    query = mixtures(rng, 1, d, *first, dtype=dtype)[0]
    wanted = [mw2_squared(query, pattern) for pattern in memory]
    tolerance = 1e-10 if dtype is np.float64 else 1e-5
    np.testing.assert_allclose(jdam.divergences(memory, query), wanted, rtol=tolerance)
    assert isinstance(memory.geometry, jdam.MixtureWasserstein)


@pytest.mark.full
def test_one_component_is_bures_and_points_are_exact_transport(rng):
    ones = gaussians(rng, 5, 3)
    as_mixtures = jdam.GaussianMixture(np.ones((5, 1)), ones.mean[:, None], ones.factor[:, None])
    bures = jdam.pairwise(jdam.store(ones))
    np.testing.assert_allclose(jdam.pairwise(jdam.store(as_mixtures)), bures, atol=1e-12)
    points = mixtures(rng, 3, 2, 6)
    points = jdam.GaussianMixture(points.weights, points.means, 0 * points.factors)
    found = jdam.pairwise(jdam.store(points))
    gaps = points.means[0][:, None] - points.means[1][None]
    cost = np.asarray((gaps**2).sum(-1))
    wanted = ot.emd2(*(np.array(points.weights[i]) for i in (0, 1)), cost)
    np.testing.assert_allclose(found[0, 1], wanted, rtol=1e-12)


@pytest.mark.full
def test_order_padding_and_splitting_change_nothing(rng):
    memory = jdam.store(mixtures(rng, 4, 2))
    query = mixtures(rng, 1, 2)[0]
    wanted = jdam.divergences(memory, query)
    shuffled = jax.tree.map(lambda leaf: leaf[np.array([2, 0, 1])], query)
    for same in (shuffled, query.padded(K=5), query.padded(K=4, r=4)):
        np.testing.assert_allclose(jdam.divergences(memory, same), wanted, rtol=1e-12)
    halves = query.weights[:1] / 2
    split = jdam.GaussianMixture(
        jnp.concatenate([halves, halves, query.weights[1:]]),
        jnp.concatenate([query.means[:1], query.means]),
        jnp.concatenate([query.factors[:1], query.factors]),
    )
    np.testing.assert_allclose(jdam.divergences(memory, split), wanted, rtol=1e-12)
    np.testing.assert_allclose(jdam.divergences(memory, memory[1])[1], 0, atol=1e-13)
    stepped, other = (jdam.step(memory, q, 0.5) for q in (query, query.padded(K=5)))
    np.testing.assert_allclose(other.means[:3], stepped.means, rtol=1e-12)
    np.testing.assert_array_equal(other.means[3:], query.means[jnp.array([2, 2])])


@pytest.mark.full
def test_perturbed_shuffled_mixtures_are_recalled(rng):
    memory = jdam.store(mixtures(rng, 20, 2, spread=3.0))
    beta = jdam.suggest_beta(memory)
    order = np.array([2, 0, 1])
    cues = near(
        rng,
        jax.tree.map(lambda leaf: leaf[:, order] if leaf.ndim > 1 else leaf, memory.patterns),
        0.2,
    )
    found = jax.vmap(partial(jdam.recall, max_steps=30), (None, 0, None))(memory, cues, beta)
    right = np.asarray(found.nearest) == np.arange(20)
    assert right.mean() >= 0.95
    start = np.sqrt(np.diag(jdam.pairwise(memory, cues)))
    end = np.sqrt(np.maximum(np.asarray(found.divergence), 0))
    assert (end <= 0.05 * start)[right].all()


@pytest.mark.full
@pytest.mark.parametrize("components", [1, 5])
def test_the_energy_never_rises(rng, components):
    """Where plans split and tie as well."""
    memory = jdam.store(mixtures(rng, 6, 2))
    queries = mixtures(rng, 8, 2, components)
    for beta in (0.05, 1.0, 50.0):
        run = partial(jdam.recall, max_steps=12, tol=0.0, save_trace=True)
        trace = jax.vmap(run, (None, 0, None))(memory, queries, beta).trace
        start = jax.vmap(jdam.energy, (None, 0, None))(memory, queries, beta)
        energies = np.concatenate([np.asarray(start)[:, None], trace.energy], axis=1)
        assert (np.diff(energies, axis=1) <= 1e-12).all()


@jax.jit
def levels_of_bounds(memory, query):
    held = jdam.Patterns(memory.patterns, memory.prepared)
    view = memory.geometry.view(memory.geometry.match(query, memory.patterns))
    return [bound(view, held) for bound in memory.geometry.bounds(held)]


@pytest.mark.full
def test_bounds_are_bounds(rng):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        for dtype in (np.float32, np.float64):
            memory = jdam.store(mixtures(rng, 12, 3, 4, 2, dtype=dtype, spread=0.5))
            query = near(rng, memory[0], 0.02)
            exact = np.array([mw2_squared(query, pattern) for pattern in memory])
            levels = levels_of_bounds(memory, query)
            for level in levels:
                assert (np.asarray(level) <= exact * (1 + 1e-12)).all()
            assert np.median(np.asarray(levels[-1]) / exact) > 0.8


@pytest.mark.full
def test_certified_is_exhaustive(rng):
    memory = jdam.store(mixtures(rng, 60, 3, spread=3.0))
    queries = near(rng, jax.tree.map(lambda leaf: leaf[:6], memory.patterns), 0.3)
    recall = lambda search: jax.vmap(  # noqa: E731
        partial(jdam.recall, max_steps=5, search=search), (None, 0, None)
    )(memory, queries, 5.0)
    found, wanted = recall(jdam.Certified(4)), recall(jdam.Exhaustive())
    close(found.energy, wanted.energy, atol=1e-8)
    alike(found.measure, wanted.measure, atol=1e-7)
    assert (np.asarray(found.neglected) <= 1e-8).all()


@pytest.mark.full
def test_derivatives_along_the_simplex(rng):
    """In weights, means and factors of query and patterns, twice for the energy."""
    patterns, query = mixtures(rng, 3, 2, 2), mixtures(rng, 1, 2, 3)[0]

    def parts(query, patterns):
        query = jdam.GaussianMixture(jax.nn.softmax(query[0]), *query[1:])
        return query, jdam.store(jdam.GaussianMixture(jax.nn.softmax(patterns[0]), *patterns[1:]))

    def energy(query, patterns):
        query, memory = parts(query, patterns)
        return jdam.energy(memory, query, 0.3)

    def step(query, patterns):
        query, memory = parts(query, patterns)
        moved = jdam.step(memory, query, 0.3)
        return moved.means, moved.components.covariance

    point = tuple((jnp.log(m.weights), m.means, m.factors) for m in (query, patterns))
    check_derivatives(energy, point, order=2, rtol=1e-4)
    check_derivatives(step, point, rtol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("adjoint", [jdam.Unrolled(), jdam.Implicit()])
def test_derivatives_of_recall(rng, adjoint):
    memory = jdam.store(mixtures(rng, 3, 2, 2, spread=2.0))
    query = near(rng, memory[0], 0.1)

    def found(means):
        held = jdam.store(
            jdam.GaussianMixture(memory.patterns.weights, means, memory.patterns.factors)
        )
        return jdam.recall(held, query, 3.0, max_steps=40, adjoint=adjoint).measure.means.sum()

    slope = jax.jit(jax.grad(found))(memory.patterns.means)
    h = 1e-5 * rng.normal(size=slope.shape)
    wanted = found(memory.patterns.means + h) - found(memory.patterns.means - h)
    np.testing.assert_allclose(2 * np.vdot(slope, h), wanted, rtol=1e-2)


@pytest.mark.full
def test_theory_of_means(rng):
    memory = jdam.store(mixtures(rng, 6, 2, spread=0.3))
    spread = jdam.GaussianMixture(
        memory.patterns.weights,
        memory.patterns.means + 9 * rng.normal(size=(6, 1, 2)),
        memory.patterns.factors,
    )
    memory = jdam.store(spread)
    gaps = np.asarray(spread.mean)[:, None] - np.asarray(spread.mean)[None]
    wanted = (np.linalg.norm(gaps, axis=-1) + np.diag([np.inf] * 6)).min(1)
    np.testing.assert_allclose(jdam.theory.separations(memory), wanted, rtol=1e-6)
    beta = jdam.theory.minimum_beta(memory, 0.05)
    query = near(rng, memory[2], 0.05)
    proof = jdam.theory.certify(memory, query, beta)
    found = jdam.recall(memory, query, beta)
    assert int(proof.index) == int(found.nearest) == 2
    assert float(np.sqrt(found.divergence)) <= float(proof.error)
    with pytest.raises(TypeError, match="a squared metric"):
        jdam.theory.contraction_bound(memory, 0, 0.1, beta)


@pytest.mark.full
def test_attention_over_mixtures(rng):
    """Barycentres of mixtures as values, and mixtures as keys of arrays."""
    memory = jdam.store(mixtures(rng, 4, 2, spread=3.0))
    values = rng.normal(size=(4, 3))
    near_one = near(rng, memory[1], 0.05)
    np.testing.assert_allclose(jdam.attend(memory, near_one, 50.0, values), values[1], atol=1e-3)
    completed = jdam.attend(memory, near_one, 50.0, memory)
    close(jdam.divergences(memory, completed)[1], 0, atol=1e-8)


@pytest.mark.full
def test_assignment_of_equal_weights(rng):
    """Where all weights are 1/K the plan is a permutation."""
    means = rng.normal(size=(2, 9, 2))
    factors = rng.normal(size=(2, 9, 2, 2))
    both = jdam.GaussianMixture(np.full((2, 9), 1 / 9), means, factors)
    costs = bures_costs(both[0], both[1])
    wanted = costs[linear_sum_assignment(costs)].mean()
    np.testing.assert_allclose(jdam.pairwise(jdam.store(both))[0, 1], wanted, rtol=1e-12)


def test_what_is_no_mixture(rng):
    memory = jdam.store(mixtures(rng, 3, 2))
    with pytest.raises(
        TypeError, match="query must be a jdam.GaussianMixture for .*; got Gaussian"
    ):
        jdam.energy(memory, gaussians(rng, 1, 2)[0], 1.0)
    with pytest.raises(ValueError, match=r"query must have batch shape \(\)"):
        jdam.energy(memory, memory.patterns, 1.0)
