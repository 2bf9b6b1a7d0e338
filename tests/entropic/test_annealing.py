"""Small problems with unequal weights at small ε against logarithmic iterations in NumPy: where a
solver takes a larger ε on the way, its result has to be that of the ε asked for."""

import jax
import numpy as np
import pytest

import jdam

pytestmark = pytest.mark.full


def log_sum_exp(x, axis):
    top = x.max(axis, keepdims=True)
    return np.squeeze(top, axis) + np.log(np.exp(x - top).sum(axis))


def transport(x, a, y, b, epsilon, rho):
    """OT of a batch of pairs in float64: logarithmic iterations along a ladder of ε, and Newton
    steps of the semi-dual objective at its end."""
    cost = ((x[:, :, None] - y[:, None]) ** 2).sum(-1) / 2
    log_a, log_b = np.log(a)[:, :, None], np.log(b)[:, None]
    g, size = np.zeros_like(b), b.shape[1]

    def answer(g, e, s):
        return -s * e * log_sum_exp(log_b + (g[:, None] - cost) / e, 2)

    ladder = [epsilon * 1.6**k for k in range(7, 0, -1)] + [epsilon]
    for e in ladder:
        s = 1 if rho is None else rho / (rho + e)
        for _ in range(60):
            f = answer(g, e, s)
            g = -s * e * log_sum_exp(log_a + (f[:, :, None] - cost) / e, 1)
    for _ in range(40):
        f = answer(g, epsilon, s)
        plan = np.exp(log_a + log_b + (f[:, :, None] + g[:, None] - cost) / epsilon)
        wanted = b if rho is None else b * np.exp(-g / rho)
        slope = wanted - plan.sum(1)
        crossed = np.einsum("bij,bi,bik->bjk", plan, 1 / plan.sum(2), plan)
        diagonal = plan.sum(1) + (0 if rho is None else epsilon * wanted / rho)
        hessian = (np.eye(size) * diagonal[:, None] - s * crossed) / epsilon
        step = (np.linalg.pinv(hessian, rcond=1e-15, hermitian=True) @ slope[..., None])[..., 0]
        length = np.abs(step).max(1, keepdims=True) / epsilon + 1e-300
        g = g + step * np.log1p(length) / length
    f = answer(g, epsilon, s)
    if rho is None:
        value = (f * a).sum(1) + (g * b).sum(1)
    else:
        value = -(rho + epsilon) * (a * np.expm1(-f / rho)).sum(1)
        value -= rho * (b * np.expm1(-g / rho)).sum(1)
    return np.where(np.abs(slope).sum(1) < 1e-13, value, np.nan)  # NaN where not solved


@pytest.mark.parametrize(
    ("dtype", "rho", "tol", "relative"),
    [("f4", None, None, 1e-3), ("f4", 0.2, None, 1e-3), ("f8", None, 1e-6, 1e-4)],
)
def test_divergences_are_of_the_epsilon_asked_for(rng, dtype, rho, tol, relative):
    """1000 pairs of 4 atoms each."""
    num, n, epsilon = 1000, 4, 0.02

    @jax.jit
    @jax.vmap
    def divergence(x, a, y, b):
        geometry = jdam.Sinkhorn(epsilon, rho=rho, tol=tol)
        memory = jdam.store(jdam.PointCloud(y[None], b[None]), geometry)
        return jdam.divergences(memory, jdam.PointCloud(x, a))[0]

    clouds = [rng.uniform(size=(num, n, 2)) for _ in range(2)]
    weights = [np.maximum(rng.dirichlet(np.full(n, 0.7), num), 1e-3) for _ in range(2)]
    weights = [w / w.sum(1, keepdims=True) for w in weights]
    given = [part.astype(dtype) for pair in zip(clouds, weights, strict=True) for part in pair]
    x, a, y, b = (part.astype("f8") for part in given)
    a, b = a / a.sum(1, keepdims=True), b / b.sum(1, keepdims=True)
    expected = transport(x, a, y, b, epsilon, rho)
    expected -= transport(x, a, x, a, epsilon, rho) / 2
    expected -= transport(y, b, y, b, epsilon, rho) / 2
    found, solved = np.asarray(divergence(*given), float), np.isfinite(expected)
    assert solved.mean() > 0.98
    np.testing.assert_allclose(found[solved], expected[solved], rtol=relative, atol=relative * 1e-3)


def test_little_mass_between_far_atoms(rng):
    """Four atoms 200 ε apart, whose weights differ by t: exact transport costs 2t."""
    corners = np.array([[-1.0, -1], [-1, 1], [1, -1], [1, 1]])
    weights = np.array([0.2, 0.3, 0.25, 0.25])
    memory = jdam.store(jdam.PointCloud(corners[None], weights[None]), jdam.Sinkhorn(0.003))
    t = rng.uniform(1e-3, 0.03, 64)
    moved = weights + t[:, None] * np.array([1, -1, 0, 0])
    queries = jdam.PointCloud(np.broadcast_to(corners, (64, 4, 2)), moved)
    found = np.asarray(jdam.pairwise(memory, queries))[:, 0]
    np.testing.assert_allclose(found, 2 * t, rtol=0.02)


def test_a_tolerance_for_speed_in_many_atoms(rng):
    """128 equal weights in R³ at ε = 0.05 of the unit: tol = 1e-3 costs digits, not the answer."""
    frames = np.linalg.qr(rng.normal(size=(24, 3, 3)))[0] * rng.uniform(0.3, 1.2, (24, 1, 3))
    points = rng.normal(size=(24, 1, 3)) + rng.normal(size=(24, 128, 3)) @ frames
    clouds = jdam.PointCloud(points.astype("f4"))
    queries = jdam.PointCloud((points[:2] + 0.1 * rng.normal(size=(2, 128, 3))).astype("f4"))
    loose, tight = (
        np.asarray(
            jdam.pairwise(jdam.store(clouds, jdam.Sinkhorn.relative(clouds, tol=t)), queries)
        )
        for t in (1e-3, 1e-6)
    )
    np.testing.assert_allclose(loose, tight, rtol=2e-3, atol=2e-3 * np.median(tight))
