"""The Sinkhorn divergence and SHK recall against oracles that share no code with jdam."""

import warnings
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest

import jdam
from tests.cases import only_full
from tests.helpers import check_derivatives, clouds, near, shk_step, sinkhorn_divergence

TIGHT = 1e-13


def memory_of(points, weights=None, epsilon=0.3, **settings):
    return jdam.store(jdam.PointCloud(points, weights), jdam.Sinkhorn(epsilon, **settings))


def divergence(x, a, y, b, epsilon=0.3, tol=TIGHT):
    """S_ε of one pair, by jdam."""
    memory = memory_of(y[None], b[None], epsilon, tol=tol)
    return float(jdam.divergences(memory, jdam.PointCloud(x, a))[0])


@pytest.fixture
def pair(rng):
    return rng.normal(size=(7, 2)), rng.dirichlet(np.ones(7)), *two(rng)


def two(rng):
    return 1 + rng.normal(size=(7, 2)), rng.dirichlet(np.ones(7))


@pytest.mark.full
@pytest.mark.parametrize("epsilon", [0.3, *only_full(3.0, 0.03)])
def test_against_extended_precision(pair, epsilon):
    expected = float(sinkhorn_divergence(*pair, epsilon)[0])
    np.testing.assert_allclose(divergence(*pair, epsilon), expected, rtol=1e-10)


@pytest.mark.full
def test_against_ott(pair):
    with warnings.catch_warnings(action="ignore"):
        from ott.tools.sinkhorn_divergence import sinkdiv

    x, a, y, b = map(jnp.asarray, pair)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        settings = {"threshold": 1e-13, "max_iterations": 20_000}
        theirs = sinkdiv(x, y, a=a, b=b, epsilon=0.6, solve_kwargs=settings)[0]
    np.testing.assert_allclose(divergence(*pair), theirs / 2, rtol=1e-9)


@pytest.mark.full
def test_solvers_agree(rng):
    patterns, query = clouds(rng, 3, 2), clouds(rng, 1, 2)[0]
    ours, theirs = (
        jdam.store(patterns, jdam.Sinkhorn(0.5, tol=1e-11, max_iterations=5000, solver=solver))
        for solver in ("stabilised", "ott")
    )
    run = jax.jit(lambda memory: (jdam.divergences(memory, query), jdam.step(memory, query, 1.0)))
    (distances, first), (others, second) = run(ours), run(theirs)
    np.testing.assert_allclose(distances, others, rtol=1e-9)
    np.testing.assert_allclose(first.points, second.points, atol=1e-8)


def test_symmetry_positivity_and_zero(pair):
    x, a, y, b = pair
    np.testing.assert_allclose(divergence(*pair), divergence(y, b, x, a), rtol=1e-12)
    assert divergence(*pair) > np.sum((a @ x - b @ y) ** 2) / 2  # the means' share
    assert abs(divergence(x, a, x[::-1], a[::-1])) < 1e-14


@pytest.mark.full
def test_mean_splits_off(pair):
    x, a, y, b = pair
    shift = b @ y - a @ x
    centred = divergence(x + shift, a, y, b)
    np.testing.assert_allclose(divergence(*pair), shift @ shift / 2 + centred, rtol=1e-12)


@pytest.mark.full
def test_scaling_law(pair):
    x, a, y, b = pair
    for scale in (1e-3, 1e3):
        scaled = divergence(scale * x, a, scale * y, b, scale**2 * 0.3)
        np.testing.assert_allclose(scaled, scale**2 * divergence(*pair), rtol=1e-9)


@pytest.mark.full
def test_atoms_may_be_split_permuted_and_padded(pair, rng):
    x, a, y, b = pair
    expected = divergence(*pair)
    order = rng.permutation(7)
    np.testing.assert_allclose(divergence(x[order], a[order], y, b), expected, rtol=1e-12)
    split = np.concatenate([x, x[:1]]), np.concatenate([[a[0] / 3], a[1:], [2 * a[0] / 3]])
    np.testing.assert_allclose(divergence(*split, y, b), expected, rtol=1e-11)
    padded = np.concatenate([y, [[9.0, -9.0]]]), np.append(b, 0)
    np.testing.assert_allclose(divergence(x, a, *padded), expected, rtol=1e-12)


@pytest.mark.full
def test_limits_in_epsilon(pair):
    x, a, y, b = pair
    shift = a @ x - b @ y
    np.testing.assert_allclose(divergence(*pair, 1e4), shift @ shift / 2, rtol=1e-3)
    exact = ot.emd2(a, b, ((x[:, None] - y[None]) ** 2).sum(-1)) / 2
    np.testing.assert_allclose(divergence(*pair, 1e-4, tol=1e-9), exact, atol=5e-4)


@pytest.mark.full
def test_gaussian_closed_form():
    """S_ε of Gaussians on a fine grid in one dimension (Janati et al. 2020)."""

    def transport(a, v, b, w, epsilon):
        root = np.sqrt(4 * v * w + epsilon**2)
        logs = 1 - np.log(2 * epsilon)
        return (a - b) ** 2 / 2 + (v + w - root + epsilon * (logs + np.log(root + epsilon))) / 2

    def discrete(mean, variance):
        grid = np.linspace(-9, 9, 200)
        weights = np.exp(-((grid - mean) ** 2) / (2 * variance))
        return grid[:, None], weights / weights.sum()

    (a, v), (b, w), epsilon = (0.3, 0.6), (-0.4, 1.1), 0.5
    expected = transport(a, v, b, w, epsilon)
    expected -= (transport(a, v, a, v, epsilon) + transport(b, w, b, w, epsilon)) / 2
    found = divergence(*discrete(a, v), *discrete(b, w), epsilon)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.full
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_single_precision_far_from_the_origin(rng, offset):
    patterns = (offset + rng.normal(size=(4, 12, 3))).astype(np.float32)
    query = (patterns[1] + 0.05 * rng.normal(size=(12, 3))).astype(np.float32)
    single = np.asarray(jdam.divergences(memory_of(patterns), jdam.PointCloud(query)))
    patterns, query = patterns.astype(float), query.astype(float)
    double = jdam.divergences(memory_of(patterns, tol=TIGHT), jdam.PointCloud(query))
    assert abs(single - np.asarray(double)).max() < 2e-6


@pytest.mark.full
@pytest.mark.parametrize(("step_size", "kappa"), [(0.5, 0.1), *only_full((1.0, 0.0), (1.0, 0.3))])
def test_step_is_equations_28_and_29(rng, step_size, kappa):
    patterns = clouds(rng, 4, 2, n=6, spread=0.5)
    query = near(rng, patterns[2], 0.2)
    memory = jdam.store(patterns, jdam.Sinkhorn(0.4, hellinger_scale=kappa, tol=TIGHT))
    stored = list(zip(*map(np.asarray, (patterns.points, patterns.weights)), strict=True))
    arguments = np.asarray(query.points), np.asarray(query.weights), stored, 0.4, 3.0
    points, weights = shk_step(*arguments, step_size, kappa)
    stepped = jdam.step(memory, query, 3.0, step_size)
    np.testing.assert_allclose(stepped.points, np.asarray(points, float), rtol=1e-8)
    np.testing.assert_allclose(stepped.weights, np.asarray(weights, float), rtol=1e-8)
    assert (np.asarray(stepped.weights) == np.asarray(query.weights)).all() == (kappa == 0)


@pytest.mark.full
def test_differential_of_the_energy(rng):
    """dE[(u, v)] = Σ uⱼFⱼ + Σ pⱼ⟨∇F(xⱼ), vⱼ⟩ (eq. 16), from the oracle's potentials."""
    patterns, query = clouds(rng, 3, 2), clouds(rng, 1, 2)[0]
    memory = jdam.store(patterns, jdam.Sinkhorn(0.4, tol=TIGHT))
    x, p = np.asarray(query.points), np.asarray(query.weights)
    found = [sinkhorn_divergence(x, p, *map(np.asarray, (y.points, y.weights)), 0.4)
             for y in (patterns[i] for i in range(3))]  # fmt: skip
    weights = np.asarray(jdam.gibbs_weights(memory, query, 2.0))
    variation = np.asarray(sum(w * f for w, (_, f, _) in zip(weights, found, strict=True)), float)
    velocity = np.asarray(sum(w * v for w, (_, _, v) in zip(weights, found, strict=True)), float)
    slope = jax.jit(jax.grad(jdam.energy, argnums=1))(memory, query, 2.0)
    np.testing.assert_allclose(slope.points, -p[:, None] * velocity, rtol=1e-8)
    np.testing.assert_allclose(
        slope.weights - slope.weights.mean(), variation - variation.mean(), rtol=1e-8
    )


@pytest.mark.full
def test_derivatives_of_a_step_in_epsilon_and_kappa(rng):
    patterns, query = clouds(rng, 3, 2), clouds(rng, 1, 2)[0]

    def outputs(epsilon, kappa):
        geometry = jdam.Sinkhorn(epsilon, hellinger_scale=kappa, tol=TIGHT)
        memory = jdam.store(patterns, geometry)
        return jdam.step(memory, query, 2.0, 0.5)

    arguments = jnp.float64(0.5), jnp.float64(0.2)
    check_derivatives(outputs, arguments, rtol=1e-6)


@pytest.mark.full
def test_derivative_in_the_memory_is_that_in_its_patterns(rng):
    """What is computed once at `store` carries no derivative of its own."""
    memory = jdam.store(clouds(rng, 3, 2), jdam.Sinkhorn(0.5))
    query = clouds(rng, 1, 2)[0]
    inside = jax.jit(jax.grad(jdam.energy, allow_int=True))(memory, query, 2.0)
    outside = jax.jit(jax.grad(lambda p: jdam.energy(jdam.store(p, memory.geometry), query, 2.0)))
    np.testing.assert_allclose(
        inside.patterns.points, outside(memory.patterns).points, rtol=1e-8, atol=1e-12
    )
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(inside.prepared))


@pytest.mark.full
def test_single_atoms_are_vectors(rng):
    """S = ½|x − y|², so that the step is that of a distance memory at β/2."""
    points = rng.normal(size=(5, 1, 3))
    memory, vectors = memory_of(points), jdam.store(points[:, 0])
    query = rng.normal(size=3)
    stepped = jdam.step(memory, jdam.PointCloud(query[None]), 2.0)
    np.testing.assert_allclose(stepped.points[0], jdam.step(vectors, query, 1.0), rtol=1e-10)


@pytest.mark.full
def test_small_epsilon_matches_atoms(rng):
    """One pattern, ε → 0: a full step takes each noisy atom to its own."""
    atoms = np.stack(np.meshgrid(np.arange(3.0), np.arange(2.0)), -1).reshape(-1, 2)
    query = jdam.PointCloud(atoms + 0.1 * rng.uniform(-1, 1, size=atoms.shape))
    stepped = jdam.step(memory_of(atoms[None], epsilon=0.005), query, 1.0)
    np.testing.assert_allclose(stepped.points, atoms, atol=1e-8)


@pytest.mark.full
def test_translation_and_rotation(rng):
    patterns, query = clouds(rng, 3, 2), clouds(rng, 1, 2)[0]
    turn = np.linalg.qr(rng.normal(size=(2, 2)))[0]
    shift = rng.normal(size=2)

    def move(cloud):
        return jdam.PointCloud(np.asarray(cloud.points) @ turn + shift, cloud.weights)

    geometry = jdam.Sinkhorn(0.4, hellinger_scale=0.2)
    first = move(jdam.step(jdam.store(patterns, geometry), query, 2.0))
    second = jdam.step(jdam.store(move(patterns), geometry), move(query), 2.0)
    np.testing.assert_allclose(first.points, second.points, atol=1e-8)
    np.testing.assert_allclose(first.weights, second.weights, rtol=1e-7)


@pytest.fixture(scope="module")
def recall_all():
    """A jitted recall of four queries with traces, shared so that it compiles once."""

    def recall(memory, queries, beta):
        result = partial(jdam.recall, max_steps=12, save_trace=True)(memory, queries, beta)
        return result, jdam.energy(memory, queries, beta)

    return jax.jit(jax.vmap(recall, (None, 0, None)))


def planar(rng, strays):
    """Four patterns of 12 atoms, noisy queries, atoms far off added, and the median ½|x−y|²."""
    shapes = rng.normal(size=(4, 2, 2))
    patterns = rng.normal(size=(4, 12, 2)) @ shapes + 2 * rng.normal(size=(4, 1, 2))
    queries = patterns + 0.2 * rng.normal(size=patterns.shape)
    queries = np.concatenate([queries, strays * rng.normal(size=(4, 3, 2))], axis=1)
    costs = ((patterns[:, :, None] - patterns[:, None]) ** 2).sum(-1) / 2
    return patterns, queries, float(np.median(costs))


@pytest.mark.full
@pytest.mark.parametrize("kappa", [0.0, 0.1, 1.0, 10.0])
def test_energy_never_rises(rng, recall_all, kappa):
    patterns, queries, median = planar(rng, strays=3.0)
    for epsilon in (0.02, 0.2):
        memory = memory_of(patterns, epsilon=epsilon * median, hellinger_scale=kappa / median)
        result, start = recall_all(memory, jdam.PointCloud(queries), 10 / median)
        energies = np.concatenate([np.asarray(start)[:, None], result.trace.energy], axis=1)
        assert np.diff(energies, axis=1).max() < 1e-9
        assert (energies[:, -1] < energies[:, 0]).all()
        assert np.isfinite(energies).all()


@pytest.mark.full
def test_stray_atoms_lose_their_mass(rng, recall_all):
    patterns, queries, median = planar(rng, strays=50.0)
    plain, _ = recall_all(
        memory_of(patterns, epsilon=0.1 * median), jdam.PointCloud(queries), 10 / median
    )
    memory = memory_of(patterns, epsilon=0.1 * median, hellinger_scale=1 / median)
    result, _ = recall_all(memory, jdam.PointCloud(queries), 10 / median)
    assert (np.asarray(result.nearest) == np.arange(4)).all()
    assert result.measure.weights[:, 12:].sum(1).max() < 0.01
    np.testing.assert_allclose(result.measure.weights.sum(1), 1, rtol=1e-12)
    assert (np.asarray(plain.nearest) != np.arange(4)).any()
    np.testing.assert_array_equal(plain.measure.weights, np.full((4, 15), 1 / 15))


@pytest.mark.full
def test_experiment_2_of_the_paper(rng):
    """Equal means, N = 5, n = 50, β = 100, ε = 0.1: recalled, and W₂ falls below 0.4 of the
    start; a Hopfield memory of shuffled atoms recalls less than half."""
    turns = np.linalg.qr(rng.normal(size=(5, 2, 2)))[0]
    roots = turns * np.sqrt(rng.uniform(0.15, 1.75, size=(5, 1, 2)))
    patterns = (rng.normal(size=(5, 50, 2)) @ roots.swapaxes(1, 2)).astype(np.float32)
    truth = np.arange(10) % 5
    noise = 0.2 * rng.normal(size=(10, 50, 2))
    queries = (patterns[truth] + noise).astype(np.float32)
    memory = memory_of(patterns, epsilon=0.1)
    recall = jax.jit(jax.vmap(partial(jdam.recall, max_steps=60), (None, 0, None)))
    result = recall(memory, jdam.PointCloud(queries), 100.0)

    def distances(points):
        costs = [((x[:, None] - patterns[i][None]) ** 2).sum(-1) for x, i in zip(points, truth, strict=True)]  # fmt: skip
        return np.array([np.sqrt(ot.emd2([], [], np.asarray(c, float))) for c in costs])

    assert (np.asarray(result.nearest) == truth).all()
    assert distances(np.asarray(result.measure.points)).mean() < 0.4 * distances(queries).mean()
    shuffled = rng.permuted(queries, axis=1).reshape(10, -1)
    hopfield = jdam.store(patterns.reshape(5, -1), jdam.DotProduct())
    found = jax.vmap(jdam.recall, (None, 0, None))(hopfield, shuffled, 100.0)
    assert (np.asarray(found.nearest) == truth).mean() < 0.5


@pytest.mark.full
def test_status_when_the_solver_misses(rng):
    patterns, query = clouds(rng, 3, 2), clouds(rng, 1, 2)[0]
    memory = jdam.store(patterns, jdam.Sinkhorn(0.05, max_iterations=2))
    result = jdam.recall(memory, query, 1.0, max_steps=3)
    assert int(result.status) == jdam.Status.SOLVER


@pytest.mark.full
def test_ragged_batches_without_recompiling(rng):
    sizes = (4, 1)
    points = [rng.normal(size=(n, 2)) for n in sizes]
    ragged = jdam.PointCloud.from_ragged(points)
    queries = jdam.PointCloud.from_ragged([x + 0.1 for x in reversed(points)])

    @jax.jit
    @chex.assert_max_traces(n=1)
    def energies(epsilon, kappa, beta):
        memory = jdam.store(ragged, jdam.Sinkhorn(epsilon, hellinger_scale=kappa))
        return jax.vmap(jdam.energy, (None, 0, None))(memory, queries, beta)

    for epsilon, kappa, beta in ((0.3, 0.0, 1.0), (0.5, 1.0, 7.0)):
        found = energies(epsilon, kappa, beta)
        for i, query in enumerate(reversed(points)):
            pairs = [(query + 0.1, np.full(len(query), 1 / len(query)), x,
                      np.full(len(x), 1 / len(x))) for x in points]  # fmt: skip
            singles = [float(sinkhorn_divergence(*pair, epsilon)[0]) for pair in pairs]
            expected = -np.log(np.exp(-beta * np.array(singles)).sum()) / beta
            np.testing.assert_allclose(found[i], expected, rtol=1e-8)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"epsilon": 0.0}, ValueError, "epsilon must be finite and > 0; got 0"),
        ({"epsilon": -1}, ValueError, "epsilon must be finite and > 0; got -1"),
        ({"epsilon": "small"}, TypeError, "epsilon must be a real number"),
        ({"epsilon": np.ones(2)}, ValueError, "epsilon must be a scalar"),
        ({"hellinger_scale": -0.1}, ValueError, "hellinger_scale must be finite and ≥ 0; got -0.1"),
        ({"tol": 0.0}, ValueError, "tol must be finite and > 0"),
        ({"max_iterations": 0}, ValueError, "max_iterations must be ≥ 1"),
        ({"solver": "magic"}, ValueError, "solver must be 'stabilised' or 'ott'; got 'magic'"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        jdam.Sinkhorn(**{"epsilon": 1.0, **settings})


def test_point_clouds_need_epsilon_and_clouds(rng):
    patterns = clouds(rng, 3, 2)
    with pytest.raises(ValueError, match=r"geometry must be given .* jdam.Sinkhorn\(epsilon"):
        jdam.store(patterns)
    with pytest.raises(TypeError, match="patterns must be a jdam.PointCloud for Sinkhorn"):
        jdam.store(rng.normal(size=(3, 2)), jdam.Sinkhorn(0.1))
    memory = jdam.store(patterns, jdam.Sinkhorn(0.1))
    with pytest.raises(ValueError, match="query must have batch shape"):
        jdam.energy(memory, patterns, 1.0)
    with pytest.raises(ValueError, match="memory's dimension d = 2; got 3"):
        jdam.energy(memory, clouds(rng, 1, 3)[0], 1.0)
    traced = jax.jit(
        lambda e: jdam.energy(jdam.store(patterns, jdam.Sinkhorn(e)), patterns[0], 1.0)
    )
    assert np.isnan(traced(-1.0))


@pytest.mark.full
def test_memory_of_clouds(rng):
    patterns = clouds(rng, 3, 2)
    memory = jdam.store(patterns, jdam.Sinkhorn(0.1, hellinger_scale=2))
    shown = "PointCloud(dim=2, num_atoms=6), Sinkhorn(epsilon=0.1, hellinger_scale=2)"
    assert shown in repr(memory)
    more = memory.append(clouds(rng, 2, 2, n=9))
    assert len(more) == 5
    assert more.patterns.num_atoms == 9
    query = clouds(rng, 1, 2)[0]
    both = jdam.divergences(more, query)
    np.testing.assert_allclose(both[:3], jdam.divergences(memory, query), rtol=1e-9)
