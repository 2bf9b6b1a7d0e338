"""One-sided clouds, against formulas in NumPy that share no code with jdam."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from tests.helpers import check_derivatives, clouds

SETTINGS = [
    (0.1, 0.3, 0.0),
    (1e-3, 0.2, 20.0),
    (0.5, 5.0, 1.0),
    (0.05, None, 0.0),
    (0.5, None, 3.0),
]


def soft_minima(x, y, b, epsilon):
    """Sⱼ and Pⱼₖ of atoms with mass."""
    logits = np.log(b)[None] - ((x[:, None] - y[None]) ** 2).sum(-1) / (2 * epsilon)
    top = logits.max(1, keepdims=True)
    masses = np.exp(logits - top)
    total = masses.sum(1, keepdims=True)
    return -epsilon * (top + np.log(total))[:, 0], masses / total


def explained(x, y, b, epsilon, rho):
    """shareⱼ, Fⱼ and Pⱼₖ, 0 for padding of the pattern."""
    on = b > 0
    own = b[on] @ soft_minima(y[on], y[on], b[on], epsilon)[0]
    costs, plan = soft_minima(x, y[on], b[on], epsilon)
    full = np.zeros((len(x), len(b)))
    full[:, on] = plan
    excess = costs - own
    if rho is None:
        return np.ones_like(excess), excess, full
    reach = rho + epsilon
    share = np.exp(-excess / reach)
    return share, reach * (1 - share), full


def oracle(x, p, patterns, beta, settings, step_size=1.0):
    """D, E, w, and the step."""
    epsilon, rho, kappa = settings
    found = [explained(x, y, b, epsilon, rho) for y, b in patterns]
    divergences = np.array([p @ variation for _, variation, _ in found])
    least = divergences.min()
    weights = np.exp(-beta * (divergences - least))
    energy = least - np.log(weights.sum()) / beta
    weights /= weights.sum()
    share, variation = (sum(w * f[i] for w, f in zip(weights, found, strict=True)) for i in (0, 1))
    targets = sum(
        w * s[:, None] * (plan @ y)
        for w, (s, _, plan), (y, _) in zip(weights, found, patterns, strict=True)
    )
    points = x + step_size * (targets / share[:, None] - x)
    p = p * np.exp(-step_size * kappa * (variation - variation.min()))
    return divergences, energy, weights, points, p / p.sum()


def geometry_of(settings):
    epsilon, rho, kappa = settings
    return jdam.Chamfer(epsilon, rho=rho, hellinger_scale=kappa)


def draw(rng, num=5, n=6, m=8, d=3):
    """Patterns of which the first has padding, far outside, and a query near parts of the third."""
    points = rng.normal(size=(num, m, d)) + 0.3 * rng.normal(size=(num, 1, d))
    weights = rng.dirichlet(np.full(m, 5.0), size=num)
    points[0, -2:], weights[0, -2:] = [[9.0], [1e200]], 0
    weights /= weights.sum(1, keepdims=True)
    x = points[2, :n] + 0.1 * rng.normal(size=(n, d))
    return jdam.PointCloud(points, weights), jdam.PointCloud(x, rng.dirichlet(np.full(n, 5.0)))


def stored(patterns):
    return list(zip(np.asarray(patterns.points), np.asarray(patterns.weights), strict=True))


@jax.jit
def everything(memory, query, beta, step_size):
    return (
        jdam.divergences(memory, query),
        jdam.energy(memory, query, beta),
        jdam.gibbs_weights(memory, query, beta),
        jdam.step(memory, query, beta, step_size),
    )


divergences = jax.jit(jdam.divergences)


@pytest.mark.parametrize("settings", SETTINGS)
def test_against_the_formulas(rng, settings):
    """Of six atoms and of eight, with padding on either side."""
    patterns, query = draw(rng)
    memory = jdam.store(patterns, geometry_of(settings))
    for step_size in (1.0, 0.4):
        expected = oracle(
            np.asarray(query.points), np.asarray(query.weights), stored(patterns), 3.0, settings,
            step_size,
        )  # fmt: skip
        for cue in (query, query.pad(8)):
            *found, stepped = everything(memory, cue, 3.0, step_size)
            for x, y in zip(found, expected[:3], strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(stepped.points[:6], expected[3], rtol=1e-8)
            np.testing.assert_allclose(stepped.weights[:6], expected[4], rtol=1e-8, atol=1e-300)
            np.testing.assert_array_equal(stepped.points[6:], cue.points[6:])
            assert (stepped.weights[6:] == 0).all()


def derivatives_in_everything(rng, rho, function, **settings):
    """In ε, ρ, κ, in points and weights of patterns and of the query. Those in patterns are also
    those of S⁰, which is computed when they are stored."""
    patterns, query = clouds(rng, 3, 2, n=5), clouds(rng, 1, 2, n=4)[0]

    def outputs(scalars, patterns, query):
        epsilon, rho, kappa = scalars
        geometry = jdam.Chamfer(epsilon, rho=rho, hellinger_scale=kappa)
        return function(jdam.store(patterns, geometry), query, 2.0)

    scalars = (jnp.float64(0.3), None if rho is None else jnp.float64(rho), jnp.float64(0.2))
    check_derivatives(outputs, (scalars, patterns, query), rtol=1e-6, atol=1e-7, **settings)


@pytest.mark.full
def test_second_derivatives(rng):
    derivatives_in_everything(rng, 0.4, jdam.energy, order=2)


@pytest.mark.full
@pytest.mark.parametrize("rho", [0.4, None])
def test_derivatives_of_energies_and_steps(rng, rho):
    def both(*args):
        return jdam.energy(*args), jdam.step(*args, 0.5)

    derivatives_in_everything(rng, rho, both)


def test_derivatives_of_a_memory_that_is_there(rng):
    patterns, query = draw(rng)
    memory = jdam.store(patterns, jdam.Chamfer(0.1, rho=0.3))

    def slope(points):
        held = jdam.PointCloud(points, patterns.weights)
        return jdam.energy(jdam.store(held, memory.geometry), query, 3.0)

    found = jax.jit(jax.grad(jdam.energy))(memory, query, 3.0).patterns.points
    np.testing.assert_allclose(found, jax.jit(jax.grad(slope))(memory.patterns.points), atol=1e-14)


@jax.jit
@partial(jax.vmap, in_axes=(None, 0))
def plain_recalls(memory, queries):
    result = jdam.recall(memory, queries, 3.0, max_steps=30, tol=0, save_trace=True)
    return jdam.energy(memory, queries, 3.0), result.trace.energy


@pytest.mark.full
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_energy_never_rises(rng, settings):
    patterns, _ = draw(rng)
    queries = clouds(rng, 12, 3, n=6)
    start, energies = plain_recalls(jdam.store(patterns, geometry_of(settings)), queries)
    energies = np.concatenate([np.asarray(start)[:, None], energies], axis=1)
    assert np.diff(energies, axis=1).max() <= 1e-13 * np.abs(energies).max()


@pytest.mark.full
def test_recalls_of_overlapping_patterns_end(rng):
    """At fixed points that are true: more steps stay there."""
    points = rng.normal(size=(12, 8, 2)) + 0.3 * rng.normal(size=(12, 1, 2))
    cues = points[:, :6] + 0.1 * rng.normal(size=(12, 6, 2))
    cues[:, 4:] = 3 * rng.normal(size=(12, 2, 2))
    patterns = jdam.PointCloud(points)
    memory = jdam.store(patterns, jdam.Chamfer.relative(patterns))

    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0))
    def recall(memory, cue):
        result = jdam.recall(memory, cue, 30.0, save_trace=True)
        return result, jdam.energy(memory, cue, 30.0)

    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0))
    def go_on(memory, cue):
        return jdam.recall(memory, cue, 30.0, max_steps=256, tol=0).measure

    result, start = recall(memory, jdam.PointCloud(cues))
    assert (np.asarray(result.status) <= jdam.Status.MIXTURE).mean() >= 0.95
    energies = np.concatenate([np.asarray(start)[:, None], result.trace.energy], axis=1)
    assert np.diff(energies, axis=1).max() <= 1e-13
    moved = np.asarray(go_on(memory, result.measure).points - result.measure.points)
    moved = np.sqrt((moved**2).sum(-1).mean(-1) / float(memory.geometry.epsilon))
    assert np.quantile(moved, 0.95) < 0.01


def test_of_itself_of_parts_and_of_all_that_is_far(rng):
    """Nearly 0 for itself and for its parts; ρ+ε at most."""
    points = 2 * rng.normal(size=(1, 8, 2))
    reach = 0.01 + 0.3
    memory = jdam.store(jdam.PointCloud(points), jdam.Chamfer(0.01, rho=0.3))
    exact = jdam.store(jdam.PointCloud(points), jdam.Chamfer(0.01))
    parts = [np.eye(8)[:k].mean(0) for k in (1, 3, 8)]
    for weights in parts:
        assert abs(divergences(memory, jdam.PointCloud(points[0], weights))[0]) < 1e-3
    assert abs(divergences(exact, jdam.PointCloud(points[0], parts[2]))[0]) < 1e-14
    far = jdam.PointCloud(points[0] + 1e3, parts[2])
    np.testing.assert_allclose(divergences(memory, far)[0], reach, rtol=1e-12)


def test_limits(rng):
    """ε → 0 is the one-sided Chamfer distance, ρ → ∞ explains every atom."""
    patterns, query = draw(rng)
    x, p = np.asarray(query.points), np.asarray(query.weights)
    expected = [
        p @ (((x[:, None] - y[None, b > 0]) ** 2).sum(-1).min(1) / 2) for y, b in stored(patterns)
    ]
    sharp = divergences(jdam.store(patterns, jdam.Chamfer(1e-7)), query)
    np.testing.assert_allclose(sharp, expected, atol=1e-5)
    every = divergences(jdam.store(patterns, jdam.Chamfer(0.1)), query)
    most = divergences(jdam.store(patterns, jdam.Chamfer(0.1, rho=1e7)), query)
    np.testing.assert_allclose(most, every, rtol=1e-5)


@pytest.mark.full
def test_scaling_law(rng):
    patterns, query = draw(rng)
    expected = divergences(jdam.store(patterns, jdam.Chamfer(0.1, rho=0.3)), query)
    for scale in (1e-3, 1e3):
        scaled, cue = (
            jdam.PointCloud(scale * cloud.points, cloud.weights) for cloud in (patterns, query)
        )
        memory = jdam.store(scaled, jdam.Chamfer(0.1 * scale**2, rho=0.3 * scale**2))
        np.testing.assert_allclose(divergences(memory, cue), scale**2 * expected, rtol=1e-9)


def test_atoms_may_be_split_permuted_and_padded(rng):
    """Of either side, wherever padding lies."""
    patterns, query = draw(rng)
    geometry = jdam.Chamfer(0.1, rho=0.3)
    expected = divergences(jdam.store(patterns, geometry), query)

    def changed(cloud):
        points, weights = np.asarray(cloud.points), np.array(cloud.weights)
        share = rng.uniform(size=weights[..., :1].shape)
        tail = share * weights[..., :1], np.zeros_like(weights[..., :2])
        away = np.concatenate(
            [points[..., :1, :] + 1e-3, np.full_like(points[..., :1, :], 1e200)], -2
        )
        weights[..., :1] *= 1 - share
        order = rng.permutation(weights.shape[-1] + 3)
        points = np.concatenate([points, points[..., :1, :], away], -2)[..., order, :]
        return jdam.PointCloud(points, np.concatenate([weights, *tail], -1)[..., order])

    found = divergences(jdam.store(changed(patterns), geometry), changed(query))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.full
def test_single_precision_far_from_zero(rng):
    """As near zero, up to the rounding of coordinates."""
    patterns, query = draw(rng)
    patterns = jdam.PointCloud(patterns.points.at[0, -2:].set(0.0), patterns.weights)
    shift, beta = 4096.0, 3.0

    def single(cloud, shift):
        rounded = np.asarray(cloud.points + shift, np.float32)
        return jdam.PointCloud(rounded, np.asarray(cloud.weights, np.float32))

    def double(cloud, shift):
        back = np.asarray(single(cloud, shift).points, float) - shift
        return jdam.PointCloud(back, cloud.weights)

    for settings in SETTINGS[:4]:
        far, near = (
            everything(jdam.store(of(patterns, shift), geometry_of(settings)), of(query, shift), beta, 1.0)
            for of in (single, double)
        )  # fmt: skip
        np.testing.assert_allclose(far[0], near[0], rtol=2e-4, atol=2e-6)
        np.testing.assert_allclose(far[3].points - shift, near[3].points, atol=3e-3)
        np.testing.assert_allclose(far[3].weights, near[3].weights, atol=3e-3)


@pytest.mark.full
def test_strays_in_single_precision(rng):
    """Of share 0, finite in value and derivatives; κ takes their mass."""
    points = rng.normal(size=(4, 6, 2)).astype(np.float32)
    scalars = jnp.float32(1e-3), jnp.float32(0.2), jnp.float32(20.0)

    def energy(cue, points, scalars):
        epsilon, rho, kappa = scalars
        geometry = jdam.Chamfer(epsilon, rho=rho, hellinger_scale=kappa)
        memory = jdam.store(jdam.PointCloud(points), geometry)
        query = jdam.PointCloud(cue)
        result = jdam.recall(memory, query, 100.0, max_steps=3)
        level = jdam.energy(memory, query, 100.0)
        return level + jnp.sum(result.measure.points[:4] ** 2), result

    run = jax.jit(jax.value_and_grad(energy, argnums=(0, 1, 2), has_aux=True))
    for far in (1e3, 1e10, 1e18):
        cue = np.concatenate([points[1, :4], [[far, -far]]]).astype(np.float32)
        (value, result), slopes = run(cue, points, scalars)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, result, slopes)))
        assert int(result.nearest) == 1
        assert result.inliers[4] == 0
        assert (result.inliers[:4] > 0.9).all()
        assert result.measure.weights[4] < 0.01
        np.testing.assert_array_equal(result.measure.points[4], cue[4])


@pytest.mark.full
def test_implicit_is_unrolled(rng):
    patterns = rng.normal(size=(3, 6, 2))
    cue = jdam.PointCloud(patterns[1, :4] + 0.05 * rng.normal(size=(4, 2))).pad(6)

    def loss(scalars, points, adjoint):
        epsilon, rho = scalars
        memory = jdam.store(jdam.PointCloud(points), jdam.Chamfer(epsilon, rho=rho))
        result = jdam.recall(memory, cue, 20.0, adjoint=adjoint, tol=1e-10, max_steps=128)
        return jnp.sum(result.measure.points[:4] ** 3), result

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    scalars = jnp.float64(0.1), jnp.float64(0.3)
    (implicit, result), (unrolled, _) = (
        grad(scalars, jnp.asarray(patterns), adjoint)
        for adjoint in (jdam.Implicit(), jdam.Unrolled())
    )
    assert int(result.status) == jdam.Status.CONVERGED
    for x, y in zip(jax.tree.leaves(implicit), jax.tree.leaves(unrolled), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8)


def test_new_values_compile_nothing(rng):
    patterns, query = draw(rng)
    everything(jdam.store(patterns, jdam.Chamfer(0.1, rho=0.3)), query, 3.0, 1.0)
    before = everything._cache_size()
    for epsilon, rho, kappa in ((0.2, 0.4, 1.0), (np.float32(0.1), 2, jnp.float32(0.0))):
        geometry = jdam.Chamfer(epsilon, rho=rho, hellinger_scale=kappa)
        everything(jdam.store(patterns, geometry), query, 2.0, 0.5)
    assert everything._cache_size() == before


def test_it_follows_the_unit_of_length(rng):
    patterns, _ = draw(rng)
    geometry = jdam.Chamfer.relative(patterns, 0.1, hellinger_scale=2.0)
    unit = float(jdam.Sinkhorn.relative(patterns, 1.0).epsilon)
    np.testing.assert_allclose(geometry.epsilon, 0.1 * unit)
    np.testing.assert_allclose(geometry.rho, 0.1 * unit)
    np.testing.assert_allclose(geometry.hellinger_scale, 2 / unit)
    assert jdam.Chamfer.relative(patterns, rho=None).rho is None


def test_clouds_too_large_for_their_precision(rng):
    """Say so, where costs are rounded to more than ε."""
    points = 300 * rng.normal(size=(2, 6, 2)).astype(np.float32)
    for epsilon, status in ((1e-4, jdam.Status.SOLVER), (10.0, jdam.Status.CONVERGED)):
        memory = jdam.store(jdam.PointCloud(points), jdam.Chamfer(epsilon))
        result = jdam.recall(memory, jdam.PointCloud(points[0, :4]), 1.0, max_steps=8)
        assert int(result.status) == status


def test_what_is_refused(rng):
    patterns, query = draw(rng)
    memory = jdam.store(patterns, jdam.Chamfer(0.1, rho=0.3))
    assert repr(memory.geometry) == "Chamfer(epsilon=0.1, rho=0.3, hellinger_scale=0)"
    assert repr(jdam.Chamfer(0.1)) == "Chamfer(epsilon=0.1, hellinger_scale=0)"
    for certain in (jdam.theory.separations, partial(jdam.theory.certify, query=query, beta=1.0)):
        with pytest.raises(TypeError, match=r"memory must have a geometry .*got Chamfer\(eps"):
            certain(memory)
    for name in ("epsilon", "rho", "hellinger_scale"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            jdam.Chamfer(**{"epsilon": 0.1, name: -1.0})
    with pytest.raises(TypeError, match=r"patterns must be a jdam.PointCloud for Chamfer"):
        jdam.store(np.eye(3), jdam.Chamfer(0.1))
    with pytest.raises(TypeError, match=r"patterns must be jdam.PointClouds; got Gaussian"):
        jdam.Chamfer.relative(jdam.Gaussian(np.zeros((2, 1)), np.ones((2, 1, 1))))
