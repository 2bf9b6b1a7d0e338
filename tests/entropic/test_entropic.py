"""Entropic transport against an oracle in extended precision, POT and ott-jax."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from scipy.special import logsumexp

from jdam._entropic.problem import Cloud, Marginals, Pair, Solver
from jdam._entropic.transport import self_transport, solve_pair
from tests.helpers import check_derivatives, entropic_transport

TIGHT = Solver(1e-13, 5000)


def transport(solver, x, a, y, b, epsilon, guess):
    pair = Pair(*map(jnp.asarray, (x, a, y, b)), Marginals(jnp.asarray(epsilon, x.dtype)))
    return solve_pair(solver, pair, guess)


def barycentre(found, x):
    """Where the mass of each atom goes to on average."""
    return np.asarray(x) - found.gradient


def transport_to_itself(solver, x, a, epsilon):
    return self_transport(solver, Cloud(x, a), Marginals(jnp.asarray(epsilon)))


solve = jax.jit(transport, static_argnums=0)
solve_self = jax.jit(transport_to_itself, static_argnums=0)


def uniform(n):
    return np.full(n, 1 / n)


def problems(rng):
    """Pairs of clouds of 8 and 6 atoms in the plane, easy and degenerate, with ε."""
    x, y = rng.normal(size=(8, 2)), 0.5 + rng.normal(size=(6, 2))
    a, b = rng.dirichlet(np.ones(8)), rng.dirichlet(np.ones(6))
    for epsilon in (10.0, 1.0, 0.1, 0.02, 0.005):
        yield f"epsilon {epsilon}", x, a, y, b, epsilon
    zero = np.array([0.3, 0, 0.2, 0.5, 0, 0])
    yield "zero weights", x, np.append(zero, [0, 0]), y, zero, 0.1
    tiny = np.array([1e-12, 1e-6, 1e-3, 0.5, 0.4, 0.1])
    yield "tiny weights", x, a, y, tiny / tiny.sum(), 0.1
    yield "duplicates", x[[0, 0, 1, 1, 2, 2, 3, 3]], a, y[[0, 0, 0, 1, 1, 2]], b, 0.1
    yield "all atoms equal", np.ones((8, 2)), a, np.ones((6, 2)), b, 0.1
    yield "one atom carries all", x, np.eye(8)[3], y, np.eye(6)[1], 0.1
    grid = np.stack(np.meshgrid(np.arange(4.0), np.arange(2.0)), -1).reshape(-1, 2)
    yield "ties", grid, uniform(8), grid[:6] + 0.5, uniform(6), 0.1
    yield "noisy copy", np.concatenate([y, y[:2]]) + 1e-3, uniform(8), y, uniform(6), 0.05
    yield "small scale", 1e-3 * x, a, 1e-3 * y, b, 1e-7
    yield "large scale", 1e3 * x, a, 1e3 * y, b, 1e5
    far = x.copy()
    far[:2] += 40
    yield "far strays", far - far.mean(0), uniform(8), y - y.mean(0), uniform(6), 0.1
    clusters = np.where(np.arange(8) < 3, -50.0, 50.0)[:, None]
    yield "mass between clusters", x + clusters, uniform(8), y + clusters[1:7], uniform(6), 0.5


NAMES = [name for name, *_ in problems(np.random.default_rng(0))]


@pytest.fixture(params=NAMES)
def problem(request, rng):
    return next(rest for name, *rest in problems(rng) if name == request.param)


def up_to_a_constant(f):
    return np.asarray(f - np.asarray(f).mean(), float)


def test_against_extended_precision(problem):
    cost, f, g, wanted = entropic_transport(*problem)
    x, _, y, b, epsilon = problem
    found = solve(TIGHT, *problem, np.zeros(6))
    np.testing.assert_allclose(found.cost, float(cost), rtol=1e-10, atol=1e-12 * epsilon)
    scale = float(abs(y).max())
    np.testing.assert_allclose(
        barycentre(found, x), np.asarray(wanted, float), rtol=1e-8, atol=1e-8 * scale
    )
    size = max(epsilon, float(np.ptp(f)))
    np.testing.assert_allclose(up_to_a_constant(found.f), up_to_a_constant(f), atol=1e-8 * size)
    on = b > 0
    np.testing.assert_allclose(
        up_to_a_constant(found.g[on]), up_to_a_constant(g[on]), atol=1e-8 * size
    )
    assert float(found.error) <= 1e-13


@pytest.mark.full
def test_single_precision(problem):
    x, _, y, _, epsilon = problem
    cost = float(entropic_transport(*problem)[0])
    single = [np.asarray(part, np.float32) for part in (*problem, np.zeros(6))]
    found = solve(Solver(1e-5, 2000), *single)
    # A few roundings of the largest ½|x−y|², or of ε.
    rounding = 1e-6 * max(epsilon, float(((x[:, None] - y[None]) ** 2).sum(-1).max()))
    assert abs(float(found.cost) - cost) < 1e-4 * abs(cost) + rounding


@pytest.mark.full
def test_plan_is_that_of_pot(rng):
    x, a, y, b, epsilon = next(rest for name, *rest in problems(rng) if name == "epsilon 0.1")
    found = solve(TIGHT, x, a, y, b, epsilon, np.zeros(6))
    cost = ((x[:, None] - y[None]) ** 2).sum(-1) / 2
    plan = a[:, None] * b[None] * np.exp((found.f[:, None] + found.g[None] - cost) / epsilon)
    expected = ot.sinkhorn(a, b, cost, epsilon, method="sinkhorn_log", stopThr=1e-14)
    np.testing.assert_allclose(plan, expected, atol=1e-12)
    primal = (plan * cost).sum() + epsilon * (plan * np.log(plan / np.outer(a, b))).sum()
    np.testing.assert_allclose(found.cost, primal, rtol=1e-12)


@pytest.mark.full
def test_ott_finds_the_same(rng):
    for name, *problem in problems(rng):
        if name in ("epsilon 1.0", "epsilon 0.1", "zero weights", "duplicates"):
            ours = solve(TIGHT, *problem, np.zeros(6))
            theirs = solve(Solver(1e-11, 5000, "ott"), *problem, np.zeros(6))
            np.testing.assert_allclose(theirs.cost, ours.cost, rtol=1e-10)
            np.testing.assert_allclose(theirs.gradient, ours.gradient, atol=1e-8)
            np.testing.assert_allclose(
                up_to_a_constant(theirs.f), up_to_a_constant(ours.f), atol=1e-8
            )


@pytest.mark.full
@pytest.mark.parametrize("epsilon", [10.0, 0.3, 0.01, 1e-3])
def test_a_cloud_and_itself(rng, epsilon):
    x, a = rng.normal(size=(8, 2)), np.append(rng.dirichlet(np.ones(6)), [0, 0])
    cost, f, g, _ = entropic_transport(x, a, x, a, epsilon)
    found = solve_self(Solver(1e-14, 100), x, a, epsilon)
    np.testing.assert_allclose(found.cost, float(cost), rtol=1e-12)
    # Up to a constant (f − c, g + c), which the symmetric potential has not.
    h = np.asarray(f + g, float) / 2
    np.testing.assert_allclose(found.f[:6], h[:6], atol=1e-12)
    cost = ((x[6:, None] - x[None, :6]) ** 2).sum(-1) / 2
    extended = -epsilon * logsumexp((h[:6] - cost) / epsilon, b=a[:6], axis=1)
    np.testing.assert_allclose(found.f[6:], extended, atol=1e-12)


@pytest.mark.full
def test_the_guess_changes_nothing(rng):
    x, a, y, b, epsilon = next(problems(rng))[1:]
    first = solve(TIGHT, x, a, y, b, epsilon, np.zeros(6))
    for guess in (np.asarray(first.g), 100 * rng.normal(size=6)):
        again = solve(TIGHT, x, a, y, b, epsilon, guess)
        np.testing.assert_allclose(again.cost, first.cost, rtol=1e-12)
        np.testing.assert_allclose(again.gradient, first.gradient, rtol=1e-11, atol=1e-12)


@pytest.mark.full
def test_a_missed_tolerance_is_reported(rng):
    x, a, y, b, _ = next(problems(rng))[1:]
    found = solve(Solver(1e-13, 3), x, a, y, b, 0.005, np.zeros(6))
    assert float(found.error) > 1e-13
    exact = float(entropic_transport(x, a, y, b, 0.005)[0])
    assert float(found.cost) < exact  # one marginal is exact: a lower bound


@pytest.mark.full
def test_each_pair_of_a_batch_is_solved_alone(rng):
    """Nested batches, with one hard, one broken and many easy pairs."""
    xs, ys = rng.normal(size=(4, 8, 2)), rng.normal(size=(5, 6, 2))
    xs[1, :2] += 30
    a, b, epsilon = uniform(8), uniform(6), 0.1
    one = partial(transport, Solver(1e-9, 2000))
    inner = jax.vmap(one, (None, None, 0, None, None, None))
    both = jax.jit(jax.vmap(inner, (0, None, None, None, None, None)))
    found = both(xs, a, ys, b, epsilon, np.zeros(6))
    assert (found.error <= 1e-9).all()
    for i in range(4):
        for j in range(5):
            cost = entropic_transport(xs[i], a, ys[j], b, epsilon)[0]
            np.testing.assert_allclose(found.cost[i, j], float(cost), rtol=1e-9)
    broken = xs.copy()
    broken[2, 0] = np.nan
    spoiled = both(broken, a, ys, b, epsilon, np.zeros(6))
    assert np.isnan(spoiled.cost[2]).all()
    for new, old in zip(spoiled, found, strict=True):
        np.testing.assert_array_equal(np.delete(new, 2, 0), np.delete(old, 2, 0))


@pytest.mark.full
def test_derivatives_by_differences(rng):
    """Of cost, map and potential differences, to second order, along the simplex: of two problems,
    in the second of which atoms weigh nothing."""
    x, y = rng.normal(size=(2, 5, 2)), rng.normal(size=(2, 4, 2))
    weigh = np.array([[0.3, 0.3, 0.2, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1, 0]])
    weigh_others = np.array([[0.4, 0.3, 0.2, 0.1], [0.5, 0.3, 0.2, 0]])

    def one(a, b, x, logits, y, other, epsilon):
        weights, others = a * jnp.exp(logits), b * jnp.exp(other)
        weights, others = weights / weights.sum(), others / others.sum()
        found = transport(Solver(1e-14, 2000), x, weights, y, others, epsilon, jnp.zeros(4))
        known = transport_to_itself(Solver(1e-15, 200), x, weights, epsilon)
        return found.cost, found.gradient, jnp.diff(found.f), known.cost, known.f

    def outputs(*arguments):
        return jax.vmap(one)(jnp.asarray(weigh), jnp.asarray(weigh_others), *arguments)

    arguments = x, np.zeros((2, 5)), y, np.zeros((2, 4)), np.array([0.3, 0.3])
    check_derivatives(outputs, arguments, order=2)


@pytest.mark.full
def test_derivatives_in_weights_of_zero(rng):
    """One-sided: mass put on an atom of weight 0, taken from the others in proportion."""
    x, y = rng.normal(size=(5, 2)), rng.normal(size=(4, 2))

    def cost(s, t):
        a = jnp.array([0.4, 0.3, 0.2, 0.1, 0]) * (1 - s) + s * jnp.array([0, 0, 0, 0, 1.0])
        b = jnp.array([0.5, 0.3, 0.2, 0]) * (1 - t) + t * jnp.array([0, 0, 0, 1.0])
        return transport(Solver(1e-14, 2000), x, a, y, b, 0.3, jnp.zeros(4)).cost

    cost = jax.jit(cost)
    slopes = jax.jit(jax.grad(cost, (0, 1)))(0.0, 0.0)
    h = 1e-5
    differences = (
        (4 * cost(h, 0.0) - cost(2 * h, 0.0) - 3 * cost(0.0, 0.0)) / (2 * h),
        (4 * cost(0.0, h) - cost(0.0, 2 * h) - 3 * cost(0.0, 0.0)) / (2 * h),
    )
    np.testing.assert_allclose(slopes, differences, rtol=1e-5)


@pytest.mark.full
def test_weights_that_sum_to_one_in_single_precision_only(rng):
    x, y = rng.normal(size=(2, 5, 3))
    a, b = rng.dirichlet(np.full(5, 5.0), size=2).astype(np.float32).astype(np.float64)
    assert abs(a.sum() - b.sum()) > 1e-10
    solver = Solver(1e-11, 2000)
    found = transport(solver, x, a, y, b, jnp.asarray(0.1), jnp.zeros(5))
    assert found.error <= 1e-11
    wanted = transport(solver, x, a / a.sum(), y, b / b.sum(), jnp.asarray(0.1), jnp.zeros(5))
    np.testing.assert_allclose(found.gradient, wanted.gradient, atol=1e-10)
