"""Random problems, and oracles that share no code with jdam."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np

import jdam
from tests.outside import Histogram


def orthogonal(rng, d):
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


def conditioned_factor(rng, d, condition, scale=1.0):
    """A factor whose covariance has the given condition number and largest eigenvalue scale²."""
    return scale * orthogonal(rng, d) * np.geomspace(1, condition**-0.5, d) @ orthogonal(rng, d)


def gaussians(rng, num, d, rank=None, dtype=np.float64, spread=1.0):
    mean = spread * rng.normal(size=(num, d))
    factor = rng.normal(size=(num, d, rank or d)) / np.sqrt(d)
    return jdam.Gaussian(mean.astype(dtype), factor.astype(dtype))


def diagonals(rng, num, d, dtype=np.float64):
    scale = rng.uniform(0.3, 1.2, size=(num, d))
    return jdam.DiagonalGaussian(rng.normal(size=(num, d)).astype(dtype), scale.astype(dtype))


def vectors(rng, num, d, dtype=np.float64):
    return rng.normal(size=(num, d)).astype(dtype)


def clouds(rng, num, d, n=6, dtype=np.float64, spread=1.0):
    points = rng.normal(size=(num, n, d)) + spread * rng.normal(size=(num, 1, d))
    weights = rng.dirichlet(np.full(n, 5.0), size=num)
    return jdam.PointCloud(points.astype(dtype), weights.astype(dtype))


def mixtures(rng, num, d, components=3, rank=None, dtype=np.float64, spread=1.0):
    weights = rng.dirichlet(np.full(components, 5.0), size=num)
    means = spread * rng.normal(size=(num, components, d)) + rng.normal(size=(num, 1, d))
    factors = 0.5 * rng.normal(size=(num, components, d, rank or d)) / np.sqrt(d)
    return jdam.GaussianMixture(*(x.astype(dtype) for x in (weights, means, factors)))


def near(rng, measure, amount):
    """A measure a little off: every array plus noise, scales kept positive and weights as
    they are."""

    def shift(leaf):
        leaf = np.asarray(leaf)
        return (leaf + amount * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    if isinstance(measure, jdam.PointCloud):
        return jdam.PointCloud(shift(measure.points), measure.weights, measure.features)
    if isinstance(measure, jdam.GaussianMixture):
        return jdam.GaussianMixture(measure.weights, shift(measure.means), shift(measure.factors))
    if isinstance(measure, Histogram):
        return measure.constrained(
            Histogram(jnp.asarray(shift(measure.unconstrained().probabilities)))
        )
    moved = jax.tree.map(shift, measure)
    if isinstance(moved, jdam.DiagonalGaussian):
        return jdam.DiagonalGaussian(moved.mean, np.abs(moved.scale))
    return jax.tree.map(jnp.asarray, moved)


def w2_squared(m, cov, n, other, digits=60):
    """|m − n|² + tr Σ + tr Ω − 2 tr (Σ^½ Ω Σ^½)^½ from exact inputs, in high precision.

    The trace of the root is the sum of roots of the eigenvalues of Cᵀ Ω C, Σ = C Cᵀ.
    """
    with mpmath.workdps(digits):
        cov, other = mpmath.matrix(cov.tolist()), mpmath.matrix(other.tolist())
        values, vectors = mpmath.eigsy(cov)
        root = vectors * mpmath.diag([mpmath.sqrt(max(v, 0)) for v in values])
        inner = root.T * other * root
        crossed = mpmath.eigsy((inner + inner.T) / 2, eigvals_only=True)
        trace = sum(cov[i, i] + other[i, i] for i in range(cov.rows))
        m, n = (mpmath.matrix(np.asarray(x, np.float64).tolist()) for x in (m, n))
        shift = sum((a - b) ** 2 for a, b in zip(m, n, strict=True))
        return shift + trace - 2 * sum(mpmath.sqrt(max(v, 0)) for v in crossed)


def w2_squared_of(first, second, digits=60):
    """The same for two `jdam.Gaussian`, their covariances formed exactly from their factors."""
    with mpmath.workdps(digits):
        covs = []
        for g in (first, second):
            factor = mpmath.matrix(np.asarray(g.factor, np.float64).tolist())
            covs.append(factor * factor.T)
        return w2_squared(np.asarray(first.mean), covs[0], np.asarray(second.mean), covs[1], digits)


def transport_step(m, omega, weights, means, covs):
    """Φ as the paper states it: m⁺ = Σ wᵢμᵢ and Ω⁺ = Ā Ω Ā, Ā = Σ wᵢ Ω^-½(Ω^½ΣᵢΩ^½)^½Ω^-½."""

    def power(a, p):
        values, basis = np.linalg.eigh(a)
        return basis * np.maximum(values, 0) ** p @ basis.T

    root, inverse = power(omega, 0.5), power(omega, -0.5)
    maps = [inverse @ power(root @ c @ root, 0.5) @ inverse for c in covs]
    mixed = np.einsum("i,ijk->jk", weights, maps)
    return weights @ means, mixed @ omega @ mixed


def log_sum_exp_energy(divergences, beta, log_prior=0.0):
    """−β⁻¹ log Σ exp(log π − βD) and the weights, in 60 digits."""
    with mpmath.workdps(60):
        prior = np.broadcast_to(log_prior, len(divergences))
        b = mpmath.mpf(float(beta))
        terms = [
            mpmath.exp(mpmath.mpf(float(p)) - b * d) if p > -np.inf else mpmath.mpf(0)
            for d, p in zip(divergences, prior, strict=True)
        ]
        total = sum(terms)
        return float(-mpmath.log(total) / b), np.array([float(t / total) for t in terms])


# --------------------------------------------------------------- entropic transport, 80 bits


def _soft_transform(potential, cost, weights, epsilon):
    """−ε log Σ wₖ exp((gₖ − Cⱼₖ)/ε), row by row."""
    on = weights > 0
    logits = (potential[on][None] - cost[:, on]) / epsilon + np.log(weights[on])[None]
    top = logits.max(1)
    return -epsilon * (top + np.log(np.exp(logits - top[:, None]).sum(1)))


def entropic_transport(x, a, y, b, epsilon):
    """OT_ε, f, g, and the barycentric map in extended precision: on a ladder of ε, Sinkhorn's
    iterations and Newton's, whose directions in double precision suffice."""
    x, a, y, b = (np.asarray(v, np.longdouble) for v in (x, a, y, b))
    a, b, epsilon = a / a.sum(), b / b.sum(), np.longdouble(epsilon)
    cost = ((x[:, None] - y[None]) ** 2).sum(-1) / 2
    g, level, on = np.zeros(len(b), np.longdouble), max(cost.max(), epsilon), b > 0
    while True:
        last = level == epsilon
        for _ in range(100 if last else 10):
            g = _soft_transform(_soft_transform(g, cost, b, level), cost.T, a, level)
        errors = []
        while True:
            f = _soft_transform(g, cost, b, level)
            rows = b[None, on] * np.exp((f[:, None] + g[None, on] - cost[:, on]) / level)
            columns = a @ rows
            errors.append(abs(columns - b[on]).sum())
            stuck = len(errors) > 30 and min(errors[-20:]) >= min(errors[:-20])
            if stuck or errors[-1] < (1e-18 if last else 1e-3):
                break
            root = np.sqrt(columns)
            scaled = (np.diag(columns) - (rows.T * a) @ rows) / root / root[:, None]
            right = ((b[on] - columns) / root).astype(float)
            step = np.linalg.lstsq(scaled.astype(float), right, rcond=1e-15)[0] / root
            size = max(np.ptp(step), 1e-300)
            g[on] = g[on] + level * step * np.log1p(size) / size
        if last:
            break
        level = max(level / 2, epsilon)
    assert errors[-1] < 1e-14, f"the oracle did not converge: {errors[-1]}"
    g = np.where(on, g, _soft_transform(f, cost.T, a, epsilon))
    return f @ a + g @ b, f, g, rows @ y[on]


def sinkhorn_divergence(x, a, y, b, epsilon):
    """S_ε, its first variation in μ at each xⱼ up to a constant, and −its gradient there."""
    cost, f, _, forth = entropic_transport(x, a, y, b, epsilon)
    first, h, k, itself = entropic_transport(x, a, x, a, epsilon)
    second = entropic_transport(y, b, y, b, epsilon)[0]
    return cost - first / 2 - second / 2, f - (h + k) / 2, forth - itself


def relaxed_transport(x, a, y, b, epsilon, rho):
    """OT_{ε,ρ}, f, g and the barycentric map in extended precision, by the translation-invariant
    iteration of Séjourné, Vialard and Peyré (2022)."""
    x, a, y, b = (np.asarray(v, np.longdouble) for v in (x, a, y, b))
    a, b, epsilon, rho = a / a.sum(), b / b.sum(), np.longdouble(epsilon), np.longdouble(rho)
    cost = ((x[:, None] - y[None]) ** 2).sum(-1) / 2
    f, g = np.zeros(len(a), np.longdouble), np.zeros(len(b), np.longdouble)

    def least(f, weights):
        return -rho * np.log(weights @ np.exp(-f / rho))

    def answer(g, f, cost, b, a):
        f = (rho * _soft_transform(g, cost, b, epsilon) - epsilon / 2 * least(g, b)) / (
            rho + epsilon
        )
        return f + epsilon / (epsilon + 2 * rho) * least(f, a)

    for _ in range(100_000):
        old = g
        g = answer(f, g, cost.T, a, b)
        f = answer(g, f, cost, b, a)
        if abs(g - old).max() < 1e-17 * max(abs(g).max(), epsilon):
            break
    t = (least(g, b) - least(f, a)) / 2
    f, g = f + t, g - t
    plan = a[:, None] * b[None] * np.exp((f[:, None] + g[None] - cost) / epsilon)
    missed = abs(plan.sum(0) - b * np.exp(-g / rho)).sum()
    missed += abs(plan.sum(1) - a * np.exp(-f / rho)).sum()
    assert missed < 1e-13, f"the oracle did not converge: {missed}"
    value = -rho * (np.expm1(-f / rho) @ a + np.expm1(-g / rho) @ b) - epsilon * (plan.sum() - 1)
    rows = b[None] * np.exp((g[None] - cost + f[:, None] * (1 + epsilon / rho)) / epsilon)
    return tuple(np.asarray(found, float) for found in (value, f, g, rows @ y))


def unbalanced_divergence(x, a, y, b, epsilon, rho):
    """S_{ε,ρ}, its first variation in μ at each xⱼ, and −its gradient there."""
    cost, f, _, forth = relaxed_transport(x, a, y, b, epsilon, rho)
    first, h, _, itself = relaxed_transport(x, a, x, a, epsilon, rho)
    second = relaxed_transport(y, b, y, b, epsilon, rho)[0]
    share, own = np.exp(-f / rho), np.exp(-h / rho)
    velocity = share[:, None] * (forth - x) - own[:, None] * (itself - x)
    return cost - first / 2 - second / 2, (rho + epsilon) * (own - share), velocity


def shk_step(x, p, clouds, epsilon, beta, step_size, kappa, divergence=sinkhorn_divergence):
    """Equations (28) and (29) as written."""
    found = [divergence(x, p, y, b, epsilon) for y, b in clouds]
    levels = np.array([s for s, _, _ in found])
    weights = np.exp(-beta * (levels - levels.min()))
    weights /= weights.sum()
    variation = sum(w * f for w, (_, f, _) in zip(weights, found, strict=True))
    velocity = sum(w * v for w, (_, _, v) in zip(weights, found, strict=True))
    p = np.asarray(p, np.longdouble) * np.exp(-step_size * kappa * (variation - p @ variation))
    return x + step_size * velocity, p / p.sum()


# ------------------------------------------------------------------------ derivatives


def check_derivatives(function, point, *, order=1, rtol=1e-5, atol=1e-5, eps=1e-5):
    """In all arguments at once, forward and reverse, by central differences along a random
    direction: in one program, where `jax.test_util.check_grads` compiles one for each."""
    rng = np.random.default_rng(0)
    point = jax.tree.map(jnp.asarray, tuple(point))

    def draw(tree):
        return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)

    def differentiated(function):
        """The value, its derivative along a tangent, and the cotangents that a cotangent gives."""
        tangent, cotangent = draw(point), draw(jax.eval_shape(function, *point))

        def derived(*point):
            value, forward = jax.jvp(function, point, tangent)
            return value, forward, jax.vjp(function, *point)[1](cotangent)

        return derived, tangent, cotangent

    levels = []
    for _ in range(order):
        function, *directions = differentiated(function)
        levels.append(directions)
    run = jax.jit(function)

    def at(h):
        return run(*jax.tree.map(lambda x, d: x + h * d, point, tangent))

    def inner(x, y):
        return sum(map(np.vdot, jax.tree.leaves(x), jax.tree.leaves(y)))

    found = run(*point)
    while levels:
        tangent, cotangent = levels.pop()
        above, below = at(eps), at(-eps)
        for _ in range(order - len(levels) - 1):
            above, below = above[0], below[0]
        value, forward, reverse = found
        slope = jax.tree.map(lambda x, y: (x - y) / (2 * eps), above[0], below[0])
        for x, y in zip(jax.tree.leaves(forward), jax.tree.leaves(slope), strict=True):
            np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)
        pulled, pushed = inner(reverse, tangent), inner(cotangent, slope)
        np.testing.assert_allclose(pulled, pushed, rtol=rtol, atol=atol)
        found = value
