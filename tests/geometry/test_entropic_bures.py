"""S_ε between Gaussians and its steps, against explicit roots, 50 digits and a fine grid."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import jdam
from tests.helpers import (
    conditioned_factor,
    diagonals,
    gaussians,
    near,
    orthogonal,
    sinkhorn_divergence,
)
from tests.recall.test_derivatives import inner, points_of


def root(a):
    values, basis = np.linalg.eigh(a)
    return basis * np.sqrt(np.maximum(values, 0)) @ basis.T


def cost(a, b, epsilon):
    """OT_ε(N(0, A), N(0, B)) and K of the barycentric map x ↦ Kx, as in arXiv:2006.02572."""
    r, unit = root(a), np.eye(len(a))
    d = root(4 * r @ b @ r + epsilon**2 * unit)
    logs = epsilon * np.linalg.slogdet(d + epsilon * unit)[1]
    constant = len(a) * epsilon * (1 - np.log(2 * epsilon))
    value = (np.trace(a + b - d) + constant + logs) / 2
    inverse = np.linalg.inv(r)
    return value, inverse @ d @ inverse / 2 - epsilon / 2 * np.linalg.inv(a)


def divergence(query, pattern, epsilon):
    a, b = np.asarray(query.covariance), np.asarray(pattern.covariance)
    shift = np.sum(np.square(query.mean - pattern.mean)) / 2
    itself, other = cost(a, a, epsilon)[0], cost(b, b, epsilon)[0]
    return shift + cost(a, b, epsilon)[0] - itself / 2 - other / 2


def precise(first, second, epsilon, digits=50):
    """S_ε of centred Gaussians, from exact factors of any rank."""
    with mpmath.workdps(digits):
        left, m = (mpmath.matrix(np.asarray(f, np.float64).tolist()) for f in (first, second))
        e = mpmath.mpf(float(epsilon))

        def total(k):
            squares = mpmath.eigsy(k.T * k, eigvals_only=True)
            sizes = [mpmath.sqrt(4 * max(x, 0) + e * e) for x in squares]
            return sum(t - e - e * mpmath.log((t + e) / (2 * e)) for t in sizes)

        return (total(left.T * left) / 2 + total(m.T * m) / 2 - total(m.T * left)) / 2


def distance(first, second, epsilon):
    memory = jdam.store(jax.tree.map(lambda x: x[None], first), jdam.EntropicBures(epsilon))
    return jdam.divergences(memory, second)[0]


@pytest.mark.full
@pytest.mark.parametrize("epsilon", [0.05, 1.0, 30.0])
def test_against_explicit_roots(rng, epsilon):
    memory = jdam.store(gaussians(rng, 4, 3), jdam.EntropicBures(epsilon))
    query = gaussians(rng, 1, 3)[0]
    expected = [divergence(query, pattern, epsilon) for pattern in memory]
    np.testing.assert_allclose(jdam.divergences(memory, query), expected, rtol=1e-9, atol=1e-12)
    a, patterns = np.asarray(query.covariance), memory.patterns
    weights = np.asarray(jdam.gibbs_weights(memory, query, 0.7))
    maps = [cost(a, np.asarray(b), epsilon)[1] for b in patterns.covariance]
    velocity = np.einsum("i,ijk->jk", weights, maps) - cost(a, a, epsilon)[1]
    for step_size in (1.0, 0.4):
        moved = jdam.step(memory, query, 0.7, step_size)
        g = np.eye(3) + step_size * velocity
        mean = query.mean + step_size * (weights @ patterns.mean - query.mean)
        np.testing.assert_allclose(moved.mean, mean, rtol=1e-12)
        np.testing.assert_allclose(moved.covariance, g @ a @ g.T, rtol=1e-8, atol=1e-10)


@pytest.mark.full
def test_on_a_grid():
    """In one dimension, by Sinkhorn's iterations between densities on a grid."""
    x = np.linspace(-8, 8, 121)[:, None]
    density = lambda m, s: np.exp(-((x[:, 0] - m) ** 2) / (2 * s**2))  # noqa: E731
    p, q = density(0.2, 0.6), density(-0.4, 0.9)
    p, q = p / p.sum(), q / q.sum()
    memory = jdam.store(jdam.Gaussian([[-0.4]], [[[0.9]]]), jdam.EntropicBures(0.5))
    query = jdam.Gaussian(jnp.array([0.2]), jnp.array([[0.6]]))
    expected, _, velocity = sinkhorn_divergence(x, p, x, q, 0.5)
    np.testing.assert_allclose(jdam.divergences(memory, query)[0], float(expected), rtol=1e-9)
    moved = jdam.step(memory, query, 1.0)
    stretch = moved.factor[0, 0] / 0.6 - 1
    found = (moved.mean - query.mean)[0] + stretch * (x[50:70, 0] - 0.2)
    np.testing.assert_allclose(found, velocity[50:70, 0].astype(float), atol=1e-8)


CASES = ["generic", "close", "equal", "half rank", "dirac", "more columns"]


def pair(rng, case, d, condition, scale):
    first, second = (conditioned_factor(rng, d, condition, scale) for _ in range(2))
    if case == "close":
        a = rng.normal(size=(d, d)) / np.sqrt(d)
        second = (np.eye(d) + 0.005 * (a + a.T)) @ first @ orthogonal(rng, d)
    elif case == "equal":
        second = first @ orthogonal(rng, d)
    elif case == "half rank":
        second = second[:, : (d + 1) // 2]
    elif case == "dirac":
        second = np.zeros((d, 1))
    elif case == "more columns":
        first = np.concatenate([first, second], axis=1)
    return first, second


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "relative"), [(np.float64, 1e-12), (np.float32, 1e-4)])
def test_accuracy(rng, case, dtype, relative):
    """Relative to D, not to the traces of which it is a difference; and none is negative."""
    for condition in (1e2, 1e6):
        for ratio, scale in ((1e-3, 1e3), (0.1, 1e-3), (1.0, 1e3), (100.0, 1e-3)):
            factors = [f.astype(dtype) for f in pair(rng, case, 5, condition, scale)]
            first, second = (jdam.Gaussian(np.zeros(5, dtype), f) for f in factors)
            trace = float(np.sum(np.square(factors[0])))
            epsilon = jnp.asarray(ratio * trace, dtype)
            expected = float(precise(*factors, epsilon))
            for one, other in ((first, second), (second, first)):
                found = float(distance(one, other, epsilon))
                assert found >= 0
                if case == "equal":
                    assert found <= 1000 * np.finfo(dtype).eps ** 2 * trace
                else:
                    assert abs(found - expected) <= relative * expected


@pytest.mark.full
def test_diagonals_are_full_ones(rng):
    diagonal, query = diagonals(rng, 5, 3), diagonals(rng, 1, 3)[0]
    full = lambda g: jdam.Gaussian(g.mean, np.asarray(g.scale)[..., None] * np.eye(3))  # noqa: E731
    geometry = jdam.EntropicBures(0.3)
    first = jdam.recall(jdam.store(diagonal, geometry), query, 2.0, max_steps=5)
    second = jdam.recall(jdam.store(full(diagonal), geometry), full(query), 2.0, max_steps=5)
    for field in ("energy", "weight", "residual"):
        np.testing.assert_allclose(getattr(first, field), getattr(second, field), rtol=1e-10)
    np.testing.assert_allclose(first.measure.covariance, second.measure.covariance, atol=1e-12)
    moved = jdam.step(jdam.store(diagonal, geometry), query, 2.0, 9.0)
    assert (moved.scale >= 0).all()


@pytest.mark.full
def test_small_epsilon_is_bures(rng):
    patterns, query = gaussians(rng, 4, 3), gaussians(rng, 1, 3)[0]
    memory, bures = jdam.store(patterns, jdam.EntropicBures(1e-9)), jdam.store(patterns)
    half = np.asarray(jdam.divergences(bures, query)) / 2
    np.testing.assert_allclose(jdam.divergences(memory, query), half, rtol=1e-6)
    first, second = jdam.step(memory, query, 2.0), jdam.step(bures, query, 1.0)
    np.testing.assert_allclose(first.mean, second.mean, atol=1e-6)
    np.testing.assert_allclose(first.covariance, second.covariance, atol=1e-6)


@pytest.mark.full
def test_large_epsilon_sees_means_alone(rng):
    memory = jdam.store(gaussians(rng, 4, 3), jdam.EntropicBures(1e9))
    query, means = gaussians(rng, 1, 3)[0], memory.patterns.mean
    halves = np.sum(np.square(means - query.mean[None]), -1) / 2
    np.testing.assert_allclose(jdam.divergences(memory, query), halves, rtol=1e-7)
    moved = jdam.step(memory, query, 1.5)
    expected = jdam.step(jdam.store(means, jdam.Euclidean()), query.mean, 0.75)
    np.testing.assert_allclose(moved.mean, expected, atol=1e-8)
    np.testing.assert_allclose(moved.covariance, query.covariance, atol=1e-7)


@pytest.mark.full
@pytest.mark.parametrize("make", [gaussians, diagonals])
def test_is_a_divergence(rng, make):
    """Symmetric, zero between equals alone, above ½|Δm|², and of degree 2."""
    measures = make(rng, 6, 3)
    table = jax.vmap(jdam.divergences, (None, 0))
    values = table(jdam.store(measures, jdam.EntropicBures(0.4)), measures)
    np.testing.assert_allclose(values, values.T, rtol=1e-11)
    shifts = np.sum(np.square(measures.mean[:, None] - measures.mean[None]), -1) / 2
    assert (values >= shifts).all()
    assert (np.abs(np.diag(values)) < 1e-28).all()
    assert (values + np.eye(6) > 1e-3).all()
    scaled = jax.tree.map(lambda x: 3 * x, measures)
    larger = table(jdam.store(scaled, jdam.EntropicBures(9 * 0.4)), scaled)
    np.testing.assert_allclose(larger, 9 * values, rtol=1e-11, atol=1e-28)


@pytest.mark.full
def test_velocity_is_the_gradient(rng):
    """dD = −⟨v, u⟩ along linear fields u(x) = c + G(x − m), by differences."""
    pattern, query = gaussians(rng, 1, 3), gaussians(rng, 1, 3)[0]
    memory = jdam.store(pattern, jdam.EntropicBures(0.3))
    c, g = rng.normal(size=3), rng.normal(size=(3, 3))
    above, below = (
        jdam.divergences(
            memory, jdam.Gaussian(query.mean + h * c, query.factor + h * g @ query.factor)
        )
        for h in (1e-6, -1e-6)
    )
    moved = jdam.step(memory, query, 1.0)
    expected = c @ (moved.mean - query.mean) + np.sum(
        (moved.factor - query.factor) * (g @ query.factor)
    )
    np.testing.assert_allclose((above - below)[0] / 2e-6, -expected, rtol=1e-7)


@cache
def derivatives(kind):
    """Gradient and Hessian times a tangent of the energy, forward and in reverse, and those of
    the step."""

    def energy(query, patterns, beta, prior, epsilon):
        memory = jdam.store(patterns, jdam.EntropicBures(epsilon), log_prior=prior)
        return jdam.energy(memory, query, beta)

    def step(query, patterns, beta, prior, epsilon):
        memory = jdam.store(patterns, jdam.EntropicBures(epsilon), log_prior=prior)
        moved = jdam.step(memory, query, beta)
        return moved.mean, moved.covariance

    def everything(point, tangent):
        gradient = jax.grad(energy, (0, 1, 2, 3, 4))
        slopes, curved = jax.jvp(gradient, point, tangent)
        _, backward = jax.vjp(gradient, *point)
        value, moved = jax.jvp(step, point, tangent)
        _, pull = jax.vjp(step, *point)
        return (energy(*point), slopes, value), (curved, moved, backward(slopes), pull(moved))

    return jax.jit(everything)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_derivatives_are_finite_and_right(kind):
    """In query, patterns, β, prior and ε, to second order, forward and in reverse."""
    rng, run = np.random.default_rng(3), derivatives(kind)
    for name, query, patterns in points_of(kind):
        for beta, epsilon in ((1.0, 0.3), (1e6, 0.3), (1.0, 1e-6), (1.0, 1e6)):
            values = (query, patterns, beta, np.array([0.1, -0.2, 0.3]), epsilon)
            point = jax.tree.map(jnp.asarray, values)
            tangent = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), point[:4])
            tangent = (*tangent, jnp.asarray(0.5 * epsilon))
            found = run(point, tangent)
            chex.assert_tree_all_finite(found)
            (_, slopes, _), (curved, moved, backward, pulled) = found
            np.testing.assert_allclose(inner(pulled, tangent), inner(moved, moved), rtol=1e-7)
            expected = inner(slopes, curved)
            scale = 1e-12 * inner(slopes, slopes) / epsilon
            np.testing.assert_allclose(inner(backward, tangent), expected, rtol=1e-6, atol=scale)
            if (beta, epsilon) == (1.0, 0.3) and (kind, name) != ("diagonal", "Dirac"):
                (above, _), (below, _) = (
                    run(jax.tree.map(lambda x, d, h=h: x + h * d, point, tangent), tangent)
                    for h in (1e-5, -1e-5)
                )
                slope = jax.tree.map(lambda x, y: (x - y) / 2e-5, above, below)
                exact = inner(slopes, tangent), curved, moved
                for x, y in zip(jax.tree.leaves(slope), jax.tree.leaves(exact), strict=True):
                    bound = 1e-7 * max(1.0, float(jnp.abs(y).max()))
                    np.testing.assert_allclose(x, y, rtol=1e-6, atol=bound, err_msg=name)


@pytest.mark.full
def test_derivative_of_recall(rng):
    """Of the fixed point, in patterns, β and ε; rotations of the factor do not disturb it. That
    unrolled ones are the same is among the tests of adjoints."""
    patterns, query = gaussians(rng, 4, 2, spread=0.3), gaussians(rng, 1, 2, spread=0.3)[0]

    def size(patterns, beta, epsilon):
        memory = jdam.store(patterns, jdam.EntropicBures(epsilon))
        found = jdam.recall(memory, query, beta, max_steps=300, tol=1e-12, adjoint=jdam.Implicit())
        return jnp.sum(found.measure.covariance**2) + jnp.sum(found.measure.mean**2)

    point = jax.tree.map(jnp.asarray, (patterns, 0.5, 0.2))
    tangent = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), point)
    slope = jax.jit(jax.grad(size, (0, 1, 2)))(*point)
    run = jax.jit(size)
    above, below = (
        run(*jax.tree.map(lambda x, d, h=h: x + h * d, point, tangent)) for h in (1e-5, -1e-5)
    )
    np.testing.assert_allclose(inner(slope, tangent), (above - below) / 2e-5, rtol=1e-5)


@jax.jit
def bounds_of_all(memory, queries):
    geometry, patterns = memory.geometry, memory.patterns

    def levels(query):
        view = geometry.view(geometry.match(query, patterns))
        held = jdam.Patterns(patterns, memory.prepared)
        return jnp.stack([bound(view, held) for bound in geometry.bounds(held)])

    return jax.vmap(levels)(queries)


table = jax.jit(jax.vmap(jdam.divergences, (None, 0)))


@pytest.mark.full
@pytest.mark.parametrize(
    ("dtype", "diagonal"), [(np.float32, False), (np.float64, False), (np.float32, True)]
)
def test_bounds_are_below(rng, dtype, diagonal):
    """Also between Gaussians that nearly are the same, or commute."""
    closeness = []
    for d, condition in ((1, 1e2), (4, 1.0), (4, 1e8)):
        factor = [conditioned_factor(rng, d, condition) for _ in range(3)]
        noise = [np.eye(d) + 10.0**-i * rng.normal(size=(d, d)) for i in range(1, 6)]
        factor += [n @ factor[0] @ orthogonal(rng, d) for n in noise]
        factor += [factor[0] @ orthogonal(rng, d), 1.001 * factor[0], 0 * factor[0]]
        axes, sizes, _ = np.linalg.svd(factor[0])
        factor += [axes * sizes * np.exp(0.1 * rng.normal(size=d))]
        factor, mean = np.stack(factor), np.zeros((12, d))
        mean[:2] = rng.normal(size=(2, d))
        kind, shape = jdam.Gaussian, factor
        if diagonal:
            kind, shape = jdam.DiagonalGaussian, np.abs(factor[..., 0])
        patterns = kind(mean.astype(dtype), shape.astype(dtype))
        exact = jax.tree.map(lambda x: x.astype(np.float64), patterns)
        for epsilon in (1e-6, 1e-2, 1.0, 1e3):
            memory = jdam.store(patterns, jdam.EntropicBures(jnp.float32(epsilon)))
            same = jdam.store(exact, jdam.EntropicBures(float(memory.geometry.epsilon)))
            bounds, truth = bounds_of_all(memory, patterns), table(same, exact)[:, None]
            bounds = np.asarray(bounds, np.float64)
            assert (bounds <= truth * (1 + 1e-12)).all()
            assert (table(memory, patterns) >= 0).all()
            closeness.append(np.median((bounds.max(1, keepdims=True) / truth)[truth > 0.1]))
    assert np.median(closeness) > 0.98


@pytest.mark.full
def test_certified_is_exhaustive(rng):
    memory = jdam.store(gaussians(rng, 40, 3), jdam.EntropicBures(0.1))
    queries = near(rng, memory[:6], 0.1)

    def recall(search):
        one = partial(jdam.recall, max_steps=3, search=search)
        return jax.vmap(one, (None, 0, None))(memory, queries, 60.0)

    found, wanted = recall(jdam.Certified(8)), recall(jdam.Exhaustive())
    assert (found.neglected <= 1e-8).sum() >= 4
    np.testing.assert_allclose(found.measure.mean, wanted.measure.mean, atol=1e-6)
    np.testing.assert_allclose(found.measure.covariance, wanted.measure.covariance, atol=1e-6)


def test_one_pattern_is_recalled(rng):
    memory = jdam.store(gaussians(rng, 1, 3), jdam.EntropicBures(0.1))
    result = jdam.recall(memory, gaussians(rng, 1, 3)[0], 1.0, max_steps=500)
    assert int(result.status) == jdam.Status.CONVERGED
    np.testing.assert_allclose(result.measure.mean, memory[0].mean, atol=1e-10)
    np.testing.assert_allclose(result.measure.covariance, memory[0].covariance, atol=1e-9)


@pytest.mark.full
@pytest.mark.parametrize("make", [gaussians, diagonals])
def test_energy_falls_by_the_square_of_the_velocity(rng, make):
    """E(ξ) − E(ξ⁺) ≥ τ(1 − 0.6τ)|v|² at all scales of query, patterns and ε."""

    @jax.jit
    @jax.vmap
    def fall(patterns, query, epsilon, beta, step_size):
        memory = jdam.store(patterns, jdam.EntropicBures(epsilon))
        before, moved = jdam.energy(memory, query, beta), jdam.step(memory, query, beta, step_size)
        moves = jax.tree.leaves(jax.tree.map(jnp.subtract, moved, query))
        promised = (1 / step_size - 0.6) * sum(jnp.sum(x**2) for x in moves)  # v = move/τ
        return before - jdam.energy(memory, moved, beta), promised, jnp.abs(before)

    num = 1000
    patterns, queries = make(rng, 3 * num, 3), make(rng, num, 3)
    scale = lambda x, low, high: x * 10 ** rng.uniform(low, high, (num, *[1] * (x.ndim - 1)))  # noqa: E731
    patterns = jax.tree.map(lambda x: scale(x.reshape(num, 3, *x.shape[1:]), -2, 1), patterns)
    queries = jax.tree.map(lambda x: scale(x, -2, 2), queries)
    numbers = scale(np.ones(num), -4, 3), scale(np.ones(num), -3, 3), rng.uniform(0.1, 1, num)
    fallen, promised, size = fall(patterns, queries, *numbers)
    assert (fallen >= promised - 1e-12 * size).all()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="epsilon must be finite and > 0; got 0"):
        jdam.EntropicBures(0.0)
    with pytest.raises(TypeError, match="epsilon must be a real number; got 'a'"):
        jdam.EntropicBures("a")


def test_store_and_show(rng):
    memory = jdam.store(gaussians(rng, 3, 2, dtype=np.float32), jdam.EntropicBures(0.1))
    assert memory.geometry.epsilon.dtype == jnp.float32
    assert "EntropicBures(epsilon=0.1), float32" in repr(memory)
    assert len(memory.append(memory.patterns).remove([0, 4])) == 4
    with pytest.raises(TypeError, match="patterns must be a jdam.Gaussian or"):
        jdam.store(np.ones((2, 2)), jdam.EntropicBures(0.1))
