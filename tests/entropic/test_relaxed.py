"""Entropic transport between relaxed marginals against an oracle in extended precision, POT and
ott-jax, and for another cost."""

import warnings
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest

from jdam._entropic.bounds import cost_of_masses, dual_after_half_iteration
from jdam._entropic.cost import Cost
from jdam._entropic.problem import Cloud, Marginals, Pair, Solver
from jdam._entropic.transport import self_transport, solve_pair
from tests.helpers import check_derivatives, relaxed_transport

TIGHT = Solver(1e-13, 5000)


def transport(solver, x, a, y, b, marginals, guess=None):
    pair = Pair(*map(jnp.asarray, (x, a, y, b)), Marginals(*map(jnp.asarray, marginals)))
    return solve_pair(solver, pair, jnp.zeros_like(pair.b) if guess is None else guess)


def transport_to_itself(solver, x, a, marginals):
    return self_transport(solver, Cloud(x, a), Marginals(*map(jnp.asarray, marginals)))


solve = jax.jit(transport, static_argnums=0)
solve_self = jax.jit(transport_to_itself, static_argnums=0)


def draw(rng):
    x, y = rng.normal(size=(8, 2)), 0.5 + rng.normal(size=(6, 2))
    return x, rng.dirichlet(np.ones(8)), y, rng.dirichlet(np.ones(6))


@pytest.mark.full
@pytest.mark.parametrize("ratio", [0.01, 0.1, 1.0, 10.0, 100.0, 1e4, 1e6])
def test_against_extended_precision(rng, ratio):
    x, a, y, b = draw(rng)
    for epsilon in (10.0, 1.0, 0.1) if ratio > 100 else (10.0, 1.0, 0.1, 0.02):
        rho = ratio * epsilon
        cost, f, g, forth = relaxed_transport(x, a, y, b, epsilon, rho)
        share = np.exp(-f / rho)
        for solver in (TIGHT, Solver(1e-13, 20_000, "ott")):
            found = solve(solver, x, a, y, b, (epsilon, rho))
            np.testing.assert_allclose(found.cost, cost, rtol=1e-12)
            np.testing.assert_allclose(np.exp(-found.f / rho), share, atol=1e-10)
            np.testing.assert_allclose(np.exp(-found.g / rho), np.exp(-g / rho), atol=1e-10)
            missed = (x - found.gradient - forth) * share[:, None]
            assert abs(missed).max() < 1e-10
            assert float(found.error) <= 1e-13
        cost, h, _, _ = relaxed_transport(x, a, x, a, epsilon, rho)
        known = solve_self(TIGHT, x, a, (epsilon, rho))
        np.testing.assert_allclose(known.cost, cost, rtol=1e-12)
        np.testing.assert_allclose(np.exp(-known.f / rho), np.exp(-h / rho), atol=1e-12)


@pytest.mark.full
def test_far_strays_and_single_precision(rng):
    x, a, y, b = draw(rng)
    x[:2] += 40
    for ratio in (0.1, 1.0, 10.0, 1e4):
        cost, f, _, _ = relaxed_transport(x, a, y, b, 1.0, ratio)
        found = solve(TIGHT, x, a, y, b, (1.0, ratio))
        np.testing.assert_allclose(found.cost, cost, rtol=1e-12)
        singles = [np.asarray(v, np.float32) for v in (x, a, y, b, 1.0, ratio)]
        found = solve(Solver(1e-5, 2000), *singles[:4], tuple(singles[4:]))
        np.testing.assert_allclose(found.cost, cost, rtol=1e-6)
        np.testing.assert_allclose(np.exp(-found.f / ratio), np.exp(-f / ratio), atol=2e-5)


@pytest.mark.full
def test_iterations_do_not_grow_with_rho(rng):
    """The plain iteration takes ρ/ε of them to move potentials by a constant."""
    x, a, y, b = draw(rng)
    for rho in (1.0, 1e3, 1e6):
        found = solve(Solver(1e-11, 60), x, a, y + 3, b, (1.0, rho))
        assert float(found.error) <= 1e-11


@pytest.mark.full
def test_plan_is_that_of_pot(rng):
    x, a, y, b = draw(rng)
    epsilon, rho = 0.3, 0.5
    found = solve(TIGHT, x, a, y, b, (epsilon, rho))
    cost = ((x[:, None] - y[None]) ** 2).sum(-1) / 2
    plan = np.outer(a, b) * np.exp((found.f[:, None] + found.g[None] - cost) / epsilon)
    expected = ot.unbalanced.sinkhorn_unbalanced(
        a, b, cost, epsilon, rho, reg_type="kl", c=np.outer(a, b), stopThr=1e-14, numItermax=10_000
    )
    np.testing.assert_allclose(plan, expected, atol=1e-10)

    def kl(p, q):
        return (p * np.log(p / q) - p + q).sum()

    primal = (plan * cost).sum() + epsilon * kl(plan, np.outer(a, b))
    primal += rho * (kl(plan.sum(1), a) + kl(plan.sum(0), b))
    np.testing.assert_allclose(found.cost, primal, rtol=1e-12)
    by_mass = 2 * rho + epsilon - (2 * rho + epsilon) * plan.sum()
    np.testing.assert_allclose(found.cost, by_mass, rtol=1e-12)


@pytest.mark.full
def test_potentials_are_those_of_ott(rng):
    with warnings.catch_warnings(action="ignore"):
        from ott.geometry.geometry import Geometry
        from ott.problems.linear.linear_problem import LinearProblem
        from ott.solvers.linear.sinkhorn import Sinkhorn

    x, a, y, b = map(jnp.asarray, draw(rng))
    epsilon, rho = 0.3, 0.5
    tau = rho / (rho + epsilon)
    cost = ((x[:, None] - y[None]) ** 2).sum(-1) / 2
    # Theirs is the entropy of the plan against 1 instead of a⊗b.
    cost = cost - epsilon * jnp.log(a[:, None] * b[None])
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        problem = LinearProblem(Geometry(cost, epsilon=epsilon), a, b, tau_a=tau, tau_b=tau)
        theirs = Sinkhorn(threshold=1e-14, max_iterations=5000)(problem)
    ours = solve(TIGHT, x, a, y, b, (epsilon, rho))
    plan = np.exp((theirs.f[:, None] + theirs.g[None] - cost) / epsilon)
    np.testing.assert_allclose(-rho * np.log(plan.sum(1) / a), ours.f, atol=1e-9)


def test_two_atoms(rng):
    """Of mass 1: the transported mass is e^(−c/(2ρ+ε)), and its bound is exact."""
    for epsilon, rho, distance in ((0.3, 0.5, 1.0), (0.01, 2.0, 0.1), (1.0, 0.01, 3.0)):
        cost, scale = distance**2 / 2, 2 * rho + epsilon
        found = solve(TIGHT, [[0.0]], [1.0], [[distance]], [1.0], (epsilon, rho))
        wanted = scale * (1 - np.exp(-cost / scale))
        np.testing.assert_allclose(found.cost, wanted, rtol=1e-12)
        bound = cost_of_masses(*map(jnp.asarray, (epsilon, rho, cost)))
        np.testing.assert_allclose(bound, wanted, rtol=1e-12)
        np.testing.assert_allclose(np.exp(-found.f[0] / rho), np.exp(-cost / scale), rtol=1e-12)


@pytest.mark.full
def test_half_an_iteration_bounds_the_cost(rng):
    x, a, y, b = map(jnp.asarray, draw(rng))
    bound = jax.jit(dual_after_half_iteration, static_argnums=0)
    for rho in (0.01, 1.0, 100.0):
        pair = Pair(x, a, y, b, Marginals(jnp.asarray(0.2), jnp.asarray(rho)))
        best = solve(TIGHT, x, a, y, b, (0.2, rho))
        for guess in (best.g, best.g + 0.1 * rng.normal(size=6), 3 * rng.normal(size=6)):
            assert bound(TIGHT, pair, jnp.asarray(guess)) <= best.cost
        np.testing.assert_allclose(bound(TIGHT, pair, best.g), best.cost, rtol=1e-10)
        # Potentials that are off by a constant cost nothing.
        np.testing.assert_allclose(bound(TIGHT, pair, best.g + 2), best.cost, rtol=1e-10)


@pytest.mark.full
def test_derivatives_by_differences(rng):
    """Of cost, map and potentials, to second order, in everything, along the simplex."""
    x, y = rng.normal(size=(2, 5, 2)), rng.normal(size=(2, 4, 2))
    weigh = np.array([[0.3, 0.3, 0.2, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1, 0]])
    weigh_others = np.array([[0.4, 0.3, 0.2, 0.1], [0.5, 0.3, 0.2, 0]])

    def one(a, b, x, logits, y, other, marginals):
        weights, others = a * jnp.exp(logits), b * jnp.exp(other)
        weights, others = weights / weights.sum(), others / others.sum()
        found = transport(Solver(1e-14, 2000), x, weights, y, others, marginals)
        known = transport_to_itself(Solver(1e-15, 200), x, weights, marginals)
        return found.cost, found.gradient, found.f, known.cost, known.f

    def outputs(*arguments):
        return jax.vmap(one)(jnp.asarray(weigh), jnp.asarray(weigh_others), *arguments)

    marginals = (np.array([0.3, 0.3]), np.array([0.4, 3.0]))
    arguments = x, np.zeros((2, 5)), y, np.zeros((2, 4)), marginals
    check_derivatives(outputs, arguments, order=2)


@dataclass(frozen=True)
class Distance(Cost):
    """√(|x−y|² + 1) − 1."""

    def matrix(self, x, y):
        squares = jnp.sum((x[:, None] - y[None]) ** 2, -1)
        return jnp.sqrt(squares + 1) - 1


@pytest.mark.full
@pytest.mark.parametrize("rho", [None, 0.7])
def test_another_cost(rng, rho):
    x, a, y, b = draw(rng)
    solver = Solver(1e-13, 5000, cost=Distance())

    def outputs(x, y, epsilon):
        marginals = (epsilon,) if rho is None else (epsilon, jnp.asarray(rho))
        found = transport(solver, x, jnp.asarray(a), y, jnp.asarray(b), marginals)
        return found.cost, found.gradient

    cost = np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1) + 1) - 1
    if rho is None:
        plan = ot.sinkhorn(a, b, cost, 0.2, method="sinkhorn_log", stopThr=1e-14)
    else:
        plan = ot.unbalanced.sinkhorn_unbalanced(
            a, b, cost, 0.2, rho, reg_type="kl", c=np.outer(a, b), stopThr=1e-14
        )
    slopes = (x[:, None] - y[None]) / (cost + 1)[..., None]
    wanted = (plan[..., None] * slopes).sum(1) / plan.sum(1)[:, None]
    np.testing.assert_allclose(outputs(jnp.asarray(x), jnp.asarray(y), 0.2)[1], wanted, atol=1e-9)
    check_derivatives(outputs, (x, y, np.array(0.2)))
