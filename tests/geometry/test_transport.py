"""Exact transport between few points, against POT's network simplex."""

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest

from jdam.geometry._transport import transport
from tests.helpers import check_derivatives

many = jax.jit(jax.vmap(transport))


def problems(rng, kind, count, rows, columns):
    cost = rng.random((count, rows, columns))
    a, b = (rng.dirichlet(np.ones(n), size=count) for n in (rows, columns))
    if kind == "ties":
        cost = np.round(3 * cost) / 3
        a, b = np.full_like(a, 1 / rows), np.full_like(b, 1 / columns)
    if kind == "padding":
        a[:, ::2], b[:, 0] = 0, 0
        a, b = (x / x.sum(1, keepdims=True) for x in (a + 0 * a, b))
    return cost, a, b


@pytest.mark.parametrize("kind", ["generic", "ties", "padding"])
@pytest.mark.parametrize("sizes", [(2, 2), (3, 5), (8, 8), (16, 11)])
def test_it_is_the_linear_program(rng, kind, sizes):
    cost, a, b = problems(rng, kind, 20, *sizes)
    plan = many(cost, a, b)
    wanted = [
        ot.emd2(x, y / y.sum() * x.sum(), np.ascontiguousarray(c))
        for c, x, y in zip(cost, a, b, strict=True)
    ]
    np.testing.assert_allclose(plan.cost, wanted, rtol=1e-12, atol=1e-14)
    assert (plan.mass >= 0).all()
    np.testing.assert_allclose(plan.mass.sum(2), a, atol=1e-14)
    np.testing.assert_allclose(plan.mass.sum(1), b, atol=1e-14)
    assert (plan.gap < 1e-13).all()
    reduced = cost - plan.rows[..., None] - plan.columns[:, None]
    assert (reduced > -1e-13).all()
    assert (np.abs(reduced[np.asarray(plan.mass) > 0]) < 1e-13).all()


def test_one_row_and_no_row_of_weight(rng):
    cost = jnp.asarray(rng.random((1, 4)))
    b = jnp.asarray(rng.dirichlet(np.ones(4)))
    np.testing.assert_allclose(transport(cost, jnp.ones(1), b).mass[0], b, rtol=1e-15)
    twins = transport(jnp.zeros((3, 3)), jnp.full(3, 1 / 3), jnp.full(3, 1 / 3))
    np.testing.assert_allclose(twins.mass.sum(0), 1 / 3, rtol=1e-15)


@pytest.mark.full
def test_single_precision(rng):
    cost, a, b = (x.astype("f4") for x in problems(rng, "generic", 50, 16, 16))
    plan = many(cost, a, b)
    wanted = [ot.emd2(x / x.sum(), y / y.sum(), c) for c, x, y in zip(*(np.asarray(v, float) for v in (cost, a, b)), strict=True)]  # fmt: skip
    np.testing.assert_allclose(plan.cost, wanted, rtol=1e-5)
    assert (plan.gap < 1e-5).all()


@pytest.mark.full
def test_derivatives_along_the_simplex(rng):
    cost, a, b = (jnp.asarray(x[0]) for x in problems(rng, "generic", 1, 4, 5))
    target = jnp.asarray(rng.normal(size=(4, 5)))

    def found(cost, a, b):
        plan = transport(cost, a + 1e-2 * (a - a.mean()), b)
        return plan.cost, jnp.vdot(plan.mass, target) ** 2

    def on_simplex(cost, logits, others):
        return found(cost, jax.nn.softmax(logits), jax.nn.softmax(others))

    check_derivatives(on_simplex, (cost, jnp.log(a), jnp.log(b)), order=2)
