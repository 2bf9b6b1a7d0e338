"""What corresponds to what, against plans of POT and of formulas in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest

import jdam
from tests.cases import only_full
from tests.geometry.test_chamfer import explained
from tests.helpers import check_derivatives, gaussians, mixtures

EPSILON, RHO = 0.1, 0.3
GEOMETRIES = {
    "balanced": jdam.Sinkhorn(EPSILON, tol=1e-13),
    "unbalanced": jdam.Sinkhorn(EPSILON, rho=RHO, tol=1e-13),
    "one-sided": jdam.Chamfer(EPSILON, rho=RHO),
}
every_cloud = pytest.mark.parametrize(
    "name", ["one-sided", *only_full(*(name for name in GEOMETRIES if name != "one-sided"))]
)


def problem(rng, geometry, n=5, m=7):
    """Parts of the third pattern and a stray; atoms of weight 0 on either side."""
    points = rng.normal(size=(4, m, 2))
    weights = rng.dirichlet(np.full(m, 5.0), size=4)
    weights[:, -1] = 0
    weights /= weights.sum(1, keepdims=True)
    x = points[2, :n] + 0.1 * rng.normal(size=(n, 2))
    x[-1] = 3.0
    p = np.append(rng.dirichlet(np.full(n, 5.0)), 0)
    memory = jdam.store(jdam.PointCloud(points, weights), geometry)
    return memory, jdam.PointCloud(np.append(x, x[:1], 0), p)


def expected_plan(name, x, p, y, b):
    """Of atoms with mass."""
    cost = ((x[:, None] - y[None]) ** 2).sum(-1) / 2
    if name == "balanced":
        return ot.sinkhorn(p, b, cost, EPSILON, "sinkhorn_log", 100_000, stopThr=1e-15)
    if name == "one-sided":
        share, _, plan = explained(x, y, b, EPSILON, RHO)
        return (p * share)[:, None] * plan
    return ot.sinkhorn_unbalanced(
        p, b, cost, EPSILON, RHO, reg_type="kl", c=np.outer(p, b), numItermax=100_000, stopThr=1e-15
    )


@every_cloud
def test_plans_of_clouds(rng, name):
    """Their marginals are the shares; targets are their barycentric projections."""
    memory, query = problem(rng, GEOMETRIES[name])
    x, p = np.asarray(query.points), np.asarray(query.weights)
    for index in (None, 1):
        found = jdam.match(memory, query, index)
        near = int(np.argmin(jdam.divergences(memory, query))) if index is None else index
        assert int(found.index) == near
        pattern = memory[near]
        y, b = np.asarray(pattern.points), np.asarray(pattern.weights)
        expected = expected_plan(name, x[:-1], p[:-1], y[:-1], b[:-1])
        np.testing.assert_allclose(found.plan[:-1, :-1], expected, rtol=1e-8, atol=1e-13)
        assert (found.plan[-1] == 0).all()
        assert (found.plan[:, -1] == 0).all()
        divergence = jdam.divergences(memory, query)[near]
        np.testing.assert_allclose(found.divergence, divergence, rtol=1e-9, atol=1e-12)
        share = 1.0 if found.inliers is None else found.inliers
        np.testing.assert_allclose(found.plan.sum(1), p * share, rtol=1e-9, atol=1e-15)
        if name == "balanced":
            np.testing.assert_allclose(found.plan.sum(0), b, rtol=1e-9, atol=1e-15)
        mean = expected @ y[:-1] / expected.sum(1, keepdims=True)
        np.testing.assert_allclose(found.targets[:-1], mean, rtol=1e-7)
        np.testing.assert_array_equal(found.targets[-1], x[-1])  # padding belongs to nothing
        assert found.pose is None


@pytest.mark.full
def test_plans_of_mixtures(rng):
    """Between components, those of the linear program."""
    patterns = mixtures(rng, 3, 2)
    query = jdam.GaussianMixture(
        rng.dirichlet(np.ones(3)), patterns.means[1] + 0.3, patterns.factors[1]
    )
    memory = jdam.store(patterns)
    found, pattern = jdam.match(memory, query, 1), patterns[1]
    cost = jdam.pairwise(jdam.store(pattern.components), query.components)
    plan = ot.emd(*(np.asarray(w, float) for w in (query.weights, pattern.weights, cost)))
    np.testing.assert_allclose(found.plan, plan, atol=1e-12)
    mean = plan @ np.asarray(pattern.means) / plan.sum(1, keepdims=True)
    np.testing.assert_allclose(found.targets, mean, rtol=1e-9)
    assert found.inliers is None


@pytest.mark.full
@pytest.mark.parametrize("name", ["one-sided", "balanced"])
def test_a_batch_is_a_loop(rng, name):
    """Inside `jax.jit`, by indices that are traced and by none."""
    memory, query = problem(rng, GEOMETRIES[name])
    queries = jdam.stack([query, jdam.PointCloud(query.points[::-1] + 0.1, query.weights[::-1])])
    for indices, axis in ((jnp.array([0, -1], jnp.int32), 0), (None, None)):
        match = jax.jit(jax.vmap(jdam.match, (None, 0, axis)))
        batch = match(memory, queries, indices)
        for i in range(2):
            one = jdam.match(memory, queries[i], None if indices is None else int(indices[i]))
            for x, y in zip(jax.tree.leaves(batch), jax.tree.leaves(one), strict=True):
                np.testing.assert_allclose(x[i], y, rtol=1e-9, atol=1e-12)


@pytest.mark.full
@pytest.mark.parametrize("name", ["one-sided", "unbalanced"])
def test_derivatives(rng, name):
    """Of everything that is not an index, in both clouds and ε."""
    memory, query = problem(rng, GEOMETRIES[name])

    def matched(x, points, epsilon):
        geometry = jdam.Sinkhorn(epsilon, rho=memory.geometry.rho, tol=1e-13)
        if name == "one-sided":
            geometry = jdam.Chamfer(epsilon, rho=RHO)
        held = jdam.store(jdam.PointCloud(points, memory.patterns.weights), geometry)
        found = jdam.match(held, jdam.PointCloud(x, query.weights), 2)
        return found.divergence, found.plan, found.targets, found.inliers

    arguments = query.points, memory.patterns.points, jnp.float64(EPSILON)
    check_derivatives(matched, arguments, rtol=1e-5, atol=1e-7)


def test_what_is_refused(rng):
    memory, query = problem(rng, GEOMETRIES["one-sided"])
    for other in (jdam.store(np.eye(3)), jdam.store(gaussians(rng, 3, 2))):
        with pytest.raises(TypeError, match=r"memory must have .*; got (Euclidean|Bures)\(\)"):
            jdam.match(other, other[0])
    for index in (4, -5):
        with pytest.raises(IndexError, match=f"index {index} is out of range for a memory of 4"):
            jdam.match(memory, query, index)
    for index in (1.0, True, "1"):
        with pytest.raises(TypeError, match="index must be an int; got"):
            jdam.match(memory, query, index)
    with pytest.raises(TypeError, match=r"memory must be a jdam.Memory"):
        jdam.match(query, query)


def test_room_to_grow(rng):
    """Free places are never the nearest, and no index names one."""
    memory, query = problem(rng, GEOMETRIES["one-sided"])
    roomy, match = memory.reserve(9), jax.jit(partial(jdam.match, index=None))
    assert int(match(roomy, query).index) == int(jdam.match(memory, query).index)
    assert int(jdam.match(roomy, query, -1).index) == 3
    with pytest.raises(IndexError):
        jdam.match(roomy, query, 4)
