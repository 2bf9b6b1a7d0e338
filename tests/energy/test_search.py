"""Certified recall: bounds never exceed what they bound, and what is certified is Exhaustive's."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from jdam._energy import certified
from tests.cases import only_full
from tests.helpers import clouds, diagonals, gaussians, near, orthogonal, vectors

NUM, DIM = 60, 3


def low_rank(rng, num, d, dtype):
    return gaussians(rng, num, d, rank=1, dtype=dtype)


def alike(rng, num, d, dtype):
    """One covariance in many orientations and no means: hard to tell apart."""
    factor = np.stack([orthogonal(rng, d) * np.geomspace(1, 1e-3, d) for _ in range(num)])
    return jdam.Gaussian(np.zeros((num, d), dtype), factor.astype(dtype))


def far_off(rng, num, d, dtype):
    """Neighbourhood a point far from the origin, with Diracs and duplicates among them."""
    found = gaussians(rng, num, d, dtype=np.float64)
    factor = np.array(found.factor)
    factor[::7] = 0
    factor[1::7] = factor[2]
    return jdam.Gaussian((np.asarray(found.mean) + 100).astype(dtype), factor.astype(dtype))


KINDS = {
    "Gaussians": (gaussians, jdam.Bures()),
    "Gaussians of rank 1": (low_rank, jdam.Bures()),
    "Gaussians alike": (alike, jdam.Bures()),
    "Gaussians far off": (far_off, jdam.Bures()),
    "diagonal": (diagonals, jdam.Bures()),
    "vectors": (vectors, jdam.Euclidean()),
    "inner products": (vectors, jdam.DotProduct()),
    "clouds": (partial(clouds, n=5), jdam.Sinkhorn(0.1, hellinger_scale=0.5)),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def problem(kind, rng, dtype=np.float64, num=NUM):
    """A memory, and queries near to some of its patterns, at one and between two."""
    make, geometry = kind
    patterns = make(rng, num, DIM, dtype=dtype)
    memory = jdam.store(patterns, geometry)
    head = jax.tree.map(lambda leaf: leaf[:6], memory.patterns)
    return memory, near(rng, head, 0.1)


def levels_of_bounds(memory, query):
    """(levels, N): lower bounds of all levels."""
    view, patterns = memory.geometry.view(query), jdam.Patterns(memory.patterns, memory.prepared)
    return jnp.stack([bound(view, patterns) for bound in memory.geometry.bounds(patterns)])


@jax.jit
def bounds_of_all(memory, queries):
    return jax.vmap(levels_of_bounds, (None, 0))(memory, queries)


divergences = jax.jit(jax.vmap(jdam.divergences, (None, 0)))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [np.float64, *only_full(np.float32)])
def test_bounds_are_below(kind, rng, dtype):
    memory, queries = problem(kind, rng, dtype)
    bounds = np.asarray(bounds_of_all(memory, queries), np.float64)
    exact = jax.tree.map(lambda leaf: leaf.astype(np.float64), (memory.patterns, queries))
    truth = np.asarray(divergences(jdam.store(exact[0], kind[1]), exact[1]))[:, None]
    excess = (bounds - truth) / (abs(truth) + 1e-2)
    assert excess.max() < 1e-10, np.argwhere(excess > 1e-10)


@pytest.mark.full
def test_bounds_at_coincidence_and_of_nothing(rng):
    # The query is a pattern, so that the bound must not be above 0; Diracs have no covariance.
    factor = np.concatenate([rng.normal(size=(3, DIM, DIM)), np.zeros((2, DIM, DIM))])
    patterns = jdam.Gaussian(np.zeros((5, DIM)), factor)
    bounds = np.asarray(bounds_of_all(jdam.store(patterns), patterns))
    assert np.isfinite(bounds).all()
    assert (bounds[np.arange(5), :, np.arange(5)] < 1e-12).all()
    for i in range(3):
        np.testing.assert_allclose(bounds[3, :, i], np.sum(factor[i] ** 2), rtol=1e-10)


@pytest.mark.full
def test_closer_bounds_are_closer(rng):
    memory, queries = problem(KINDS["Gaussians alike"], rng)
    first, second = np.moveaxis(np.asarray(bounds_of_all(memory, queries)), 1, 0)
    truth = np.asarray(divergences(memory, queries))
    others = truth > 0.1
    ratios = [np.median((bound / truth)[others]) for bound in (first, second)]
    assert ratios[0] < ratios[1]
    assert ratios[1] > 0.5


def test_commuting_covariances_are_bounded_exactly(rng):
    scale = rng.uniform(0.3, 1.2, (NUM, DIM))
    patterns = jdam.Gaussian(rng.normal(size=(NUM, DIM)), scale[..., None] * np.eye(DIM))
    memory = jdam.store(patterns)
    bounds = bounds_of_all(memory, patterns)
    np.testing.assert_allclose(bounds[:, 1], divergences(memory, patterns), atol=1e-12)


@partial(jax.jit, static_argnums=0)
def evaluated(search, memory, queries, beta):
    def at(query):
        return certified._evaluate(search, memory, query, beta, search.first_guess(memory))

    found, candidates = jax.vmap(at)(queries)
    return found, found.neglected, candidates


weigh = jax.jit(jax.vmap(jdam.gibbs_weights, (None, 0, None)))


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "prior"), [(name, True) for name in KINDS] + [("Gaussians", False), ("vectors", False)]
)
def test_neglected_is_above_what_is_left_out(name, rng, prior):
    memory, queries = problem(KINDS[name], rng)
    if prior:
        logits = rng.normal(size=NUM) * 3
        logits[::5] = -np.inf
        memory = jdam.store(memory.patterns, memory.geometry, log_prior=logits)
    search = jdam.Certified(2, max_candidates=6)
    for beta in np.geomspace(0.1, 1e4, 5):
        _, neglected, picked = evaluated(search, memory, queries, jnp.asarray(beta))
        weights = weigh(memory, queries, beta)
        for i, row in enumerate(np.asarray(picked)):
            chosen = row[row >= 0]
            assert len(set(chosen.tolist())) == len(chosen)
            left = np.delete(np.asarray(weights[i]), chosen).sum()
            assert neglected[i] >= left * (1 - 1e-9)
            assert neglected[i] <= 1


@partial(jax.jit, static_argnums=0)
def recall(search, memory, queries, beta):
    one = partial(jdam.recall, max_steps=3, search=search)
    return jax.vmap(one, (None, 0, None))(memory, queries, beta)


@pytest.mark.parametrize(
    "kind",
    [
        "Gaussians",
        "vectors",
        *only_full(*(name for name in KINDS if name not in ("Gaussians", "vectors"))),
    ],
    indirect=True,
)
def test_certified_is_exhaustive(kind, rng):
    memory, queries = problem(kind, rng, num=20 if kind is KINDS["clouds"] else NUM)
    for beta in (0.3, 3.0, 30.0, 300.0):
        wanted = recall(jdam.Exhaustive(), memory, queries, beta)
        found = recall(jdam.Certified(8), memory, queries, beta)
        assert (found.neglected <= 1e-8).all()
        assert (found.status == wanted.status).all()
        assert (wanted.nearest == found.nearest).all()
        for field in ("weight", "energy", "residual"):
            one, other = getattr(wanted, field), getattr(found, field)
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
        for one, other in zip(
            jax.tree.leaves(wanted.measure), jax.tree.leaves(found.measure), strict=True
        ):
            np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "adjoint"),
    [
        ("Gaussians", jdam.Unrolled()),
        ("clouds", jdam.OneStep()),  # the quickest to compile
    ],
)
def test_derivatives(name, adjoint, rng):
    make, geometry = KINDS[name]
    memory = jdam.store(make(rng, 12, DIM), geometry)
    query = near(rng, memory[0], 0.1)

    def height(query, beta, search):
        found = jdam.recall(memory, query, beta, max_steps=4, search=search, adjoint=adjoint)
        moved = jax.tree.map(lambda leaf: jnp.sum(leaf**2), found.measure)
        return found.energy + sum(jax.tree.leaves(moved))

    slope = jax.jit(jax.grad(height, (0, 1)), static_argnums=2)
    certified = jdam.Certified(6, max_candidates=12)
    found, wanted = (slope(query, 2.0, search) for search in (certified, jdam.Exhaustive()))
    chex.assert_trees_all_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.full
def test_diffuse_mass_is_not_certified(rng):
    memory = jdam.store(gaussians(rng, NUM, DIM))
    search = jdam.Certified(4, max_candidates=8)
    found = jdam.recall(memory, memory[0], 1e-3, search=search)
    assert found.status == jdam.Status.UNCERTIFIED
    assert 0.5 < found.neglected < 1
    assert jdam.recall(memory, memory[0], 1e3, search=search).status == jdam.Status.CONVERGED


def test_few_patterns(rng):
    memory = jdam.store(gaussians(rng, 3, DIM))
    found = jdam.recall(memory, memory[1], 5.0, search=jdam.Certified(16))
    assert found.neglected == 0
    assert found.nearest == 1


@pytest.mark.full
def test_one_bad_query_among_many(rng):
    memory, queries = problem(KINDS["Gaussians"], rng)
    spoiled = jax.tree.map(lambda leaf: leaf.at[2].set(jnp.nan), queries)
    search = jdam.Certified(8)
    found, wanted = (recall(search, memory, q, 30.0) for q in (spoiled, queries))
    assert found.status[2] == jdam.Status.NONFINITE
    others = np.arange(6) != 2
    np.testing.assert_array_equal(found.measure.factor[others], wanted.measure.factor[others])


def test_beta_does_not_recompile(rng):
    memory, queries = problem(KINDS["Gaussians"], rng)
    query = jax.tree.map(lambda leaf: leaf[0], queries)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def recalled(memory, query, beta):
        return jdam.recall(memory, query, beta, search=jdam.Certified(4)).measure

    recalled(memory, query, 1.0)
    recalled(memory, query, 50.0)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"num_candidates": 0}, "num_candidates must be ≥ 1; got 0"),
        ({"num_candidates": 4, "max_candidates": 3}, "max_candidates must be ≥ num_candidates"),
        ({"tol": 0.0}, r"tol must be in \(0, 1\); got 0.0"),
        ({"tol": 2}, r"tol must be in \(0, 1\); got 2"),
    ],
)
def test_wrong_arguments(arguments, error):
    with pytest.raises(ValueError, match=error):
        jdam.Certified(**arguments)


def test_other_separations_are_refused(rng):
    memory = jdam.store(vectors(rng, 4, 2))
    with pytest.raises(ValueError, match="needs separation=LogSumExp"):
        jdam.recall(memory, memory[0], 1.0, search=jdam.Certified(), separation=jdam.Entmax())


class Patient(jdam.Euclidean):
    """Bounds that take three levels to be of use."""

    def bounds(self, patterns):
        (whole,) = super().bounds(patterns)

        def a_share(level, view, patterns):
            return jnp.asarray(level / 3, view.dtype) * whole(view, patterns)

        return tuple(partial(a_share, level) for level in range(4))


@pytest.mark.full
def test_any_number_of_levels(rng):
    patterns = vectors(rng, 300, 3)
    query = patterns[0] + 0.1
    found = jdam.recall(jdam.store(patterns, Patient()), query, 30.0, search=jdam.Certified(4))
    wanted = jdam.recall(jdam.store(patterns), query, 30.0)
    assert int(found.status) == int(wanted.status)
    np.testing.assert_allclose(found.measure, wanted.measure, atol=1e-6)
