"""Clouds under the unbalanced divergence, against oracles that share no code with jdam."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from tests.cases import only_full
from tests.helpers import (
    check_derivatives,
    clouds,
    near,
    relaxed_transport,
    shk_step,
    unbalanced_divergence,
)

TIGHT = 1e-13


def memory_of(points, weights=None, epsilon=0.3, rho=0.5, **settings):
    return jdam.store(jdam.PointCloud(points, weights), jdam.Sinkhorn(epsilon, rho=rho, **settings))


def divergence(x, a, y, b, epsilon=0.3, rho=0.5, tol=TIGHT):
    memory = memory_of(y[None], b[None], epsilon, rho, tol=tol)
    return float(jdam.divergences(memory, jdam.PointCloud(x, a))[0])


def draw(rng, n=7, m=5, d=2):
    x, y = rng.normal(size=(n, d)), 0.7 + rng.normal(size=(m, d))
    return x, rng.dirichlet(np.ones(n)), y, rng.dirichlet(np.ones(m))


@pytest.mark.full
@pytest.mark.parametrize(
    ("epsilon", "rho"), [(0.3, 0.3), *only_full((0.03, 3.0), (1.0, 0.1), (0.1, 0.2))]
)
def test_against_extended_precision(rng, epsilon, rho):
    pair = draw(rng)
    expected = float(unbalanced_divergence(*pair, epsilon, rho)[0])
    np.testing.assert_allclose(divergence(*pair, epsilon, rho), expected, rtol=1e-9)


@pytest.mark.full
def test_two_atoms_and_saturation():
    """(2ρ+ε)(1 − e^(−c/(2ρ+ε))): at most 2ρ+ε, however far."""
    for distance in (0.1, 1.0, 30.0, 1e6):
        found = divergence(*(np.array(v) for v in ([[0.0]], [1.0], [[distance]], [1.0])))
        np.testing.assert_allclose(found, -1.3 * np.expm1(-(distance**2) / 2 / 1.3), rtol=1e-12)


@pytest.mark.full
def test_symmetry_positivity_and_zero(rng):
    x, a, y, b = draw(rng, 6, 6)
    np.testing.assert_allclose(divergence(x, a, y, b), divergence(y, b, x, a), rtol=1e-12)
    assert divergence(x, a, y, b) > 0
    assert abs(divergence(x, a, x[::-1], a[::-1])) < 1e-14


@pytest.mark.full
def test_limits_in_rho(rng):
    """ρ → ∞ is the balanced divergence, to its first order in 1/ρ; small ρ saturates."""
    pair = draw(rng)
    x, a, y, b = pair
    balanced = jdam.store(jdam.PointCloud(y[None], b[None]), jdam.Sinkhorn(0.3, tol=TIGHT))
    query = jdam.PointCloud(x, a)
    expected = float(jdam.divergences(balanced, query)[0])
    errors = [expected - divergence(*pair, rho=rho) for rho in (1e2, 1e4, 1e6, 1e8)]
    assert all(error > 0 for error in errors)
    np.testing.assert_allclose(np.divide(errors[:2], errors[1:3]), 100, rtol=0.05)
    assert errors[3] < 1e-7
    wide = memory_of(y[None], b[None], rho=1e8, tol=TIGHT)
    stepped, expected = jdam.step(wide, query, 1.0), jdam.step(balanced, query, 1.0)
    np.testing.assert_allclose(stepped.points, expected.points, atol=1e-7)


@pytest.mark.full
def test_scaling_law(rng):
    x, a, y, b = draw(rng)
    for scale in (1e-3, 1e3):
        units = scale**2
        scaled = divergence(scale * x, a, scale * y, b, 0.3 * units, 0.5 * units)
        np.testing.assert_allclose(scaled, units * divergence(x, a, y, b), rtol=1e-9)


@pytest.mark.full
def test_atoms_may_be_split_permuted_and_padded(rng):
    x, a, y, b = draw(rng)
    expected = divergence(x, a, y, b)
    order = rng.permutation(7)
    np.testing.assert_allclose(divergence(x[order], a[order], y, b), expected, rtol=1e-12)
    split = np.concatenate([x, x[:1]]), np.concatenate([[a[0] / 3], a[1:], [2 * a[0] / 3]])
    np.testing.assert_allclose(divergence(*split, y, b), expected, rtol=1e-11)
    for far in (9.0, 1e200):
        padded = np.concatenate([y, [[far, -far]]]), np.append(b, 0)
        np.testing.assert_allclose(divergence(x, a, *padded), expected, rtol=1e-12)


@pytest.mark.full
def test_far_from_the_origin(rng):
    x, a, y, b = draw(rng)
    moved = divergence(x + 1e6, a, y + 1e6, b)
    np.testing.assert_allclose(moved, divergence(x, a, y, b), rtol=1e-8)


@pytest.mark.full
def test_gaussian_closed_form():
    """On a fine grid in one dimension (Janati et al. 2020)."""

    def transport(a, v, b, w, epsilon, rho):
        power, width = rho / (epsilon + rho), v + w + epsilon + rho
        p, q = (rho * (1 - (epsilon + rho) / (s + epsilon + rho)) for s in (v, w))
        c = np.sqrt(p * q / power + epsilon**2 / 4) - epsilon / 2
        mass = epsilon ** (epsilon / (2 * (2 * rho + epsilon)))
        mass *= (c * np.sqrt((p * q) ** power / (v * w))) ** (1 / (power + 1))
        mass *= np.exp(-((a - b) ** 2) / width / (2 * (power + 1))) / np.sqrt(c - p * q / rho)
        return 2 * rho + epsilon - (2 * rho + epsilon) * mass

    def discrete(mean, variance):
        grid = np.linspace(-9, 9, 200)
        weights = np.exp(-((grid - mean) ** 2) / (2 * variance))
        return grid[:, None], weights / weights.sum()

    (a, v), (b, w), settings = (0.3, 0.6), (-0.4, 1.1), (0.5, 0.8)
    expected = transport(a, v, b, w, *settings)
    expected -= (transport(a, v, a, v, *settings) + transport(b, w, b, w, *settings)) / 2
    found = divergence(*discrete(a, v), *discrete(b, w), *settings)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.full
@pytest.mark.parametrize(("step_size", "kappa"), [(0.5, 2.0), *only_full((1.0, 0.0))])
def test_step_and_inliers(rng, step_size, kappa):
    """Equations 28 and 29 with the unbalanced first variation, and the share of each atom."""
    patterns = clouds(rng, 4, 2, n=6, spread=0.5)
    query = near(rng, patterns[2], 0.2)
    geometry = jdam.Sinkhorn(0.2, rho=0.3, hellinger_scale=kappa, tol=TIGHT)
    memory = jdam.store(patterns, geometry)
    stored = list(zip(*map(np.asarray, (patterns.points, patterns.weights)), strict=True))
    oracle = partial(unbalanced_divergence, rho=0.3)
    arguments = np.asarray(query.points), np.asarray(query.weights), stored, 0.2, 3.0
    points, weights = shk_step(*arguments, step_size, kappa, divergence=oracle)
    stepped = jdam.step(memory, query, 3.0, step_size)
    np.testing.assert_allclose(stepped.points, np.asarray(points, float), rtol=1e-8)
    np.testing.assert_allclose(stepped.weights, np.asarray(weights, float), rtol=1e-8)


@pytest.mark.full
def test_derivatives_in_everything(rng):
    patterns, query = clouds(rng, 3, 2), clouds(rng, 1, 2)[0]

    def outputs(epsilon, rho, kappa, points, query_points):
        geometry = jdam.Sinkhorn(epsilon, rho=rho, hellinger_scale=kappa, tol=TIGHT)
        memory = jdam.store(jdam.PointCloud(points, patterns.weights), geometry)
        asked = jdam.PointCloud(query_points, query.weights)
        return jdam.energy(memory, asked, 2.0), jdam.step(memory, asked, 2.0, 0.5)

    scalars = jnp.float64(0.5), jnp.float64(0.4), jnp.float64(0.2)
    check_derivatives(outputs, (*scalars, patterns.points, query.points), rtol=1e-6)


@pytest.fixture(scope="module")
def recall_all():
    def recall(memory, queries, beta):
        result = jdam.recall(memory, queries, beta, max_steps=20, save_trace=True)
        return result, jdam.energy(memory, queries, beta)

    return jax.jit(jax.vmap(recall, (None, 0, None)))


def planar(rng):
    """Six patterns of 12 atoms, cues of 8 of them with noise, and 3 strays."""
    patterns = rng.normal(size=(6, 12, 2))
    cues = patterns[:, :8] + 0.05 * rng.normal(size=(6, 8, 2))
    strays = 4 + rng.normal(size=(6, 3, 2))
    return patterns, np.concatenate([cues, strays], axis=1)


@pytest.mark.full
@pytest.mark.parametrize("kappa", [0.0, 1.0, 20.0])
def test_partial_and_cluttered_cues(rng, recall_all, kappa):
    """Energy never rises; the right pattern; strays are seen, and lose their mass."""
    patterns, cues = planar(rng)
    result, start = recall_all(
        memory_of(patterns, epsilon=0.05, rho=0.1, hellinger_scale=kappa),
        jdam.PointCloud(cues),
        100.0,
    )
    energies = np.concatenate([np.asarray(start)[:, None], result.trace.energy], axis=1)
    assert np.diff(energies, axis=1).max() < 1e-9
    np.testing.assert_array_equal(result.nearest, np.arange(6))
    assert result.inliers[:, :8].min() > 0.5
    assert result.inliers[:, 8:].max() < 0.05
    if kappa == 20:
        assert result.measure.weights[:, 8:].sum(1).max() < 0.01
    single = jdam.store(memory_of(patterns).patterns, jdam.Sinkhorn(0.05, rho=0.1, tol=TIGHT))
    stayed = jax.tree.map(lambda leaf: leaf[2], result.measure)
    np.testing.assert_allclose(
        result.divergence[2], jdam.divergences(single, stayed)[2], rtol=1e-6, atol=1e-10
    )


@pytest.mark.full
def test_completing_a_partial_cue(rng):
    """Addressed by the unbalanced memory, read by `attend`: also from cues of another size."""
    points = [rng.normal(size=(n, 2)) for n in (12, 9, 7, 10)]
    memory = jdam.store(jdam.PointCloud.from_ragged(points), jdam.Sinkhorn(0.05, rho=0.1))
    for i, whole in enumerate(points):
        cue = jdam.PointCloud(whole[: len(whole) // 2 + 1]).pad(7)
        completed = jdam.attend(memory, cue, 200.0, values=memory)
        np.testing.assert_allclose(completed.points[: len(whole)], whole, atol=1e-4)
        np.testing.assert_allclose(completed.weights[: len(whole)], 1 / len(whole), rtol=1e-6)
        assert int(jdam.recall(memory, cue, 200.0, max_steps=1).nearest) == i


@pytest.mark.full
def test_certified_is_exhaustive(rng):
    """Bounds hold, and decide on separated clouds."""
    patterns = rng.normal(size=(40, 1, 2)) * 4 + rng.normal(size=(40, 8, 2))
    queries = jdam.PointCloud(patterns[:10, :6] + 0.1 * rng.normal(size=(10, 6, 2)))
    memory = memory_of(patterns, epsilon=0.05, rho=0.2)
    geometry, held = memory.geometry, (memory.patterns, memory.prepared)

    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0))
    def check(memory, query):
        view = geometry.view(query)
        bounds = geometry.bounds(jdam.Patterns(*held))
        exact = jdam.recall(memory, query, 100.0, max_steps=3)
        proved = jdam.recall(memory, query, 100.0, max_steps=3, search=jdam.Certified(4, 20))
        seen = [bound(view, jdam.Patterns(*held)) for bound in bounds]
        return jdam.divergences(memory, query), seen, exact, proved

    exact, bounds, all_of, some = check(memory, queries)
    for bound in bounds:
        assert (bound <= exact).all()
    shares = [float((np.asarray(bound) > 0.9 * exact).mean()) for bound in bounds]
    assert shares[0] > 0.4
    assert shares[1] > 0.75
    assert shares[2] > 0.95
    assert (np.asarray(some.status) != jdam.Status.UNCERTIFIED).mean() >= 0.9
    np.testing.assert_array_equal(some.nearest, all_of.nearest)
    np.testing.assert_allclose(some.measure.points, all_of.measure.points, atol=1e-6)
    np.testing.assert_allclose(some.inliers, all_of.inliers, atol=1e-6)


@pytest.mark.full
def test_implicit_is_unrolled(rng):
    patterns = rng.normal(size=(3, 6, 2))
    query = jdam.PointCloud(patterns[1, :4] + 0.05 * rng.normal(size=(4, 2)))

    def loss(rho, adjoint):
        memory = memory_of(jnp.asarray(patterns), epsilon=0.05, rho=rho, tol=TIGHT)
        result = jdam.recall(memory, query, 3.0, adjoint=adjoint, max_steps=300, tol=1e-9)
        return jnp.sum(result.measure.points**3), result

    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (implicit, result), (unrolled, _) = (
        grad(0.5, adjoint) for adjoint in (jdam.Implicit(), jdam.Unrolled())
    )
    assert float(result.residual) <= 1e-9
    np.testing.assert_allclose(implicit, unrolled, rtol=1e-5)


@pytest.mark.full
def test_far_clouds_are_solved(rng):
    """Costs of hundreds of ε: a kernel that leaves atoms out must not give their mass up."""
    for shift in (3.0, 5.0, 12.0):
        x, a, y, b = draw(rng, 6, 8)
        expected = float(unbalanced_divergence(x, a, y + shift, b, 0.05, 1.0)[0])
        np.testing.assert_allclose(divergence(x, a, y + shift, b, 0.05, 1.0), expected, rtol=1e-9)


@pytest.mark.full
def test_single_precision_follows_double(rng):
    patterns, cues = planar(rng)
    double = jdam.divergences(memory_of(patterns, tol=TIGHT), jdam.PointCloud(cues[0]))
    low = jdam.PointCloud(cues[0].astype(np.float32))
    single = jdam.divergences(memory_of(patterns.astype(np.float32)), low)
    np.testing.assert_allclose(single, double, atol=1e-6)


@pytest.mark.full
def test_rho_is_traced_and_checked(rng):
    patterns, query = clouds(rng, 3, 2), clouds(rng, 1, 2)[0]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def energy(rho):
        return jdam.energy(jdam.store(patterns, jdam.Sinkhorn(0.5, rho=rho)), query, 1.0)

    assert energy(0.1) < energy(0.5) < energy(3.0)
    assert "rho=0.5" in repr(jdam.Sinkhorn(0.1, rho=0.5))
    for rho, error in ((0.0, ValueError), (-1.0, ValueError), ("much", TypeError)):
        with pytest.raises(error, match="rho must be"):
            jdam.Sinkhorn(0.1, rho=rho)
    with pytest.raises(TypeError, match="memory must have a geometry whose D is"):
        jdam.theory.separations(jdam.store(patterns, jdam.Sinkhorn(0.5, rho=1.0)))


@pytest.mark.full
def test_far_clouds_cost_no_more_than_being_given_up(rng):
    """D is that of clouds without a partner, ρ(m_α + m_β) less self terms, at any distance; alone
    and in a batch; and one far pattern spoils no energy."""
    epsilon, rho = 0.05, 0.5
    x = rng.normal(size=(6, 2)).astype("f4")
    powers = 1e3, 1e5, 1e8, 1e15
    points = np.stack([x + 0.05, *(x * 0 + far + x[0] for far in powers)]).astype("f4")
    memory = memory_of(points, epsilon=epsilon, rho=rho)
    query, beta = jdam.PointCloud(x), 50.0

    @jax.jit
    def everything(memory, query):
        energy, slope = jax.value_and_grad(jdam.energy, argnums=1)(memory, query, beta)
        return jdam.divergences(memory, query), energy, slope, jdam.recall(memory, query, beta)

    found, energy, slope, recalled = everything(memory, query)
    uniform, origin = np.full(6, 1 / 6), np.zeros((6, 2))
    x = x.astype(float)
    selves = sum(
        float(relaxed_transport(y, uniform, y, uniform, epsilon, rho)[0]) for y in (x, origin)
    )
    given_up = 2 * rho + epsilon - selves / 2
    assert given_up <= 2 * rho + epsilon
    np.testing.assert_allclose(found[1:], given_up, rtol=1e-5)
    batch = jdam.PointCloud(np.stack([query.points] * 2))
    batched = jax.vmap(jdam.divergences, (None, 0))(memory, batch)
    np.testing.assert_allclose(batched[1], found, rtol=1e-5)
    alone = memory_of(points[:1], epsilon=epsilon, rho=rho)
    np.testing.assert_allclose(energy, jdam.energy(alone, query, beta), atol=1e-5)
    assert np.isfinite(slope.points).all()
    assert int(recalled.status) == jdam.Status.CONVERGED
    shifted = np.asarray(recalled.measure.points) - points[0]
    assert np.abs(shifted).max() < 0.02


@pytest.mark.full
def test_light_atoms_stay_among_cue_and_pattern(rng):
    """The average plan may take many times its own mass from a light atom, which then must not
    move as many times as far."""
    num = 12
    cues = rng.normal(size=(8, num, 2)).astype("f4")
    patterns = (rng.normal(size=(8, 15, 2)) + 0.5).astype("f4")

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, None))
    def recall(cue, pattern, weights):
        memory = jdam.store(jdam.PointCloud(pattern[None]), jdam.Sinkhorn(0.05, rho=0.5))
        return jdam.recall(memory, jdam.PointCloud(cue, weights), 5.0, save_trace=True)

    reach = np.maximum(np.abs(cues).max((1, 2)), np.abs(patterns).max((1, 2)))
    for light in (1e-3, 1e-6, 1e-8):
        weights = np.full(num, light, "f4")
        weights[0] = 1 - (num - 1) * light
        found = recall(cues, patterns, weights)
        farthest = np.abs(np.asarray(found.trace.measure.points)).max((1, 2, 3))
        assert (farthest <= 1.01 * reach).all()
        assert (np.diff(found.trace.energy, axis=1) <= 1e-6).all()
