"""First and second derivatives of everything, where a user can stand: finite, and right by
differences wherever the function is smooth."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import jdam
from tests.helpers import clouds, diagonals, gaussians, near, orthogonal, vectors, w2_squared

BETAS = (1e-2, 1.0, 1e6)


def points_of(kind):
    """Named (query, patterns), all of one shape for each kind: three patterns, d = 3."""
    rng = np.random.default_rng(7)
    make = {"full": gaussians, "diagonal": diagonals, "vectors": vectors, "clouds": clouds}[kind]
    patterns = make(rng, 3, 3)
    generic = near(rng, jax.tree.map(lambda x: x[1], patterns), 0.2)
    yield "generic", generic, patterns
    yield "query equal to a pattern", jax.tree.map(lambda x: x[1], patterns), patterns
    yield (
        "all equal",
        jax.tree.map(lambda x: x[1], patterns),
        jax.tree.map(lambda x: np.stack([x[1]] * 3), patterns),
    )
    if kind == "full":
        mean, factor = patterns.mean, np.array(patterns.factor)
        spheres = np.eye(3) * np.array([1.0, 0.5, 2.0])[:, None, None]
        yield "spherical", jdam.Gaussian(mean[0], np.eye(3)), jdam.Gaussian(mean, spheres)
        yield "spherical query", jdam.Gaussian(mean[0], np.eye(3)), patterns
        turn = orthogonal(rng, 3)
        repeated = turn * np.array([2.0, 2.0, 0.5]) @ turn.T
        yield (
            "repeated eigenvalues",
            jdam.Gaussian(mean[0], repeated),
            jdam.Gaussian(mean, np.stack([repeated, 2 * repeated, np.eye(3)])),
        )
        flat = factor.copy()
        flat[:, :, 1:] = 0
        yield "singular patterns", generic, jdam.Gaussian(mean, flat)
        yield "singular query", jdam.Gaussian(mean[0], flat[0]), patterns
        yield "singular and equal", jdam.Gaussian(mean[0], flat[0]), jdam.Gaussian(mean, flat)
        yield "Dirac query", jdam.Gaussian(mean[0], 0 * factor[0]), patterns
        yield "all Dirac", jdam.Gaussian(mean[0], 0 * factor[0]), jdam.Gaussian(mean, 0 * factor)
    if kind == "diagonal":
        nothing = np.zeros((3, 3))
        yield (
            "Dirac",
            jdam.DiagonalGaussian(patterns.mean[0], nothing[0]),
            jdam.DiagonalGaussian(patterns.mean, nothing),
        )
    if kind == "clouds":
        points, weights = np.array(patterns.points), np.array(patterns.weights)
        doubled = points.copy()
        doubled[:, 3:] = doubled[:, :3]
        yield (
            "coincident atoms",
            jdam.PointCloud(doubled[0], weights[0]),
            jdam.PointCloud(doubled, weights),
        )
        some = weights.copy()
        some[:, 4:] = 0
        some /= some.sum(1, keepdims=True)
        yield "zero weights", jdam.PointCloud(points[0], some[0]), jdam.PointCloud(points, some)
        one = jdam.PointCloud(0 * points + points[:, :1], weights)
        yield "one place", one[0], one


CASES = [
    pytest.param(
        kind, name, id=f"{kind}, {name}", marks=[] if name == "generic" else pytest.mark.full
    )
    for kind in ("full", "diagonal", "vectors", "clouds")
    for name, *_ in points_of(kind)
]
GEOMETRIES = {"clouds": jdam.Sinkhorn(0.5, hellinger_scale=0.2, tol=1e-13)}


@cache
def derivatives(kind):
    """One program a kind: value, gradient and Hessian times a tangent of the energy, and
    forward and reverse derivatives of divergences, weights and step."""
    geometry = GEOMETRIES.get(kind)

    def energy(query, patterns, beta, log_prior):
        memory = jdam.store(patterns, geometry, log_prior=log_prior)
        return jdam.energy(memory, query, beta)

    def others(query, patterns, beta, log_prior):
        memory = jdam.store(patterns, geometry, log_prior=log_prior)
        stepped = jdam.step(memory, query, beta)
        if isinstance(stepped, jdam.Gaussian):
            stepped = stepped.mean, stepped.covariance
        divergences = jdam.divergences(memory, query)
        return divergences, jdam.gibbs_weights(memory, query, beta), stepped

    def everything(point, tangent):
        gradient = jax.grad(energy, (0, 1, 2, 3))
        slopes, curved = jax.jvp(gradient, point, tangent)
        value, forward = jax.jvp(others, point, tangent)
        _, pull = jax.vjp(others, *point)
        return energy(*point), slopes, curved, value, forward, pull(forward)

    return jax.jit(everything)


def inner(x, y):
    return sum(float(jnp.vdot(a, b)) for a, b in zip(*map(jax.tree.leaves, (x, y)), strict=True))


def tangent_at(point):
    """A direction in which weights keep their sum, and stay 0 where they are 0."""
    rng = np.random.default_rng(3)

    def tangent(leaf):
        return jnp.asarray(rng.normal(size=np.shape(leaf)))

    def conserve(measure, moved):
        if not isinstance(measure, jdam.PointCloud):
            return moved
        weights = jnp.asarray(measure.weights)
        change = weights * moved.weights
        change = change - weights * change.sum(-1, keepdims=True)
        return jax.tree.unflatten(jax.tree.structure(measure), [moved.points, change])

    query, patterns, beta, prior = point
    moved = jax.tree.map(tangent, (query, patterns))
    beta_too = jnp.asarray(0.3 * beta)
    return conserve(query, moved[0]), conserve(patterns, moved[1]), beta_too, tangent(prior)


#: Where differences converge.
SMOOTH = ("generic", "query equal to a pattern", "zero weights", "repeated eigenvalues")


def parts(tree):
    """The leaves; derivatives in weights, which sum to 1, up to a constant."""

    def fixed(part):
        if isinstance(part, jdam.PointCloud):
            return part.points, part.weights - part.weights.mean(-1, keepdims=True)
        return part

    return jax.tree.leaves(
        jax.tree.map(fixed, tree, is_leaf=lambda part: isinstance(part, jdam.PointCloud))
    )


@pytest.mark.full
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_derivatives_are_finite_and_right(kind, name):
    query, patterns = next(rest for found, *rest in points_of(kind) if found == name)
    run = derivatives(kind)
    for beta in BETAS:
        point = jax.tree.map(jnp.asarray, (query, patterns, beta, np.array([0.1, -0.2, 0.3])))
        tangent = tangent_at(point)
        found = run(point, tangent)
        chex.assert_tree_all_finite(found)
        _, slopes, _, _, forward, backward = found
        # ⟨forward, forward⟩ = ⟨tangent, transpose of forward⟩.
        square = inner(forward, forward)
        np.testing.assert_allclose(inner(tangent, backward), square, rtol=1e-6, atol=1e-9)
        if name in SMOOTH and beta < 10:
            above, below = (
                run(jax.tree.map(lambda x, d, h=h: x + h * d, point, tangent), tangent)
                for h in (1e-5, -1e-5)
            )
            for index, exact in ((0, inner(slopes, tangent)), (1, found[2]), (3, forward)):
                slope = jax.tree.map(lambda x, y: (x - y) / 2e-5, above[index], below[index])
                for x, y in zip(parts(slope), parts(exact), strict=True):
                    scale = max(1.0, float(jnp.abs(y).max()))
                    np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7 * scale)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_single_precision(kind):
    """Gradients in float32 follow those in float64."""
    run = derivatives(kind)
    for name, query, patterns in points_of(kind):
        if name != "generic":
            continue
        point = jax.tree.map(jnp.asarray, (query, patterns, 1.0, np.array([0.1, -0.2, 0.3])))
        tangent = tangent_at(point)
        low = jax.tree.map(lambda x: x.astype(jnp.float32), (point, tangent))
        single, double = run(*low), run(point, tangent)
        for x, y in zip(jax.tree.leaves(single), jax.tree.leaves(double), strict=True):
            assert x.dtype == jnp.float32
            np.testing.assert_allclose(x, y, atol=1e-3 * max(1e-2, float(jnp.abs(y).max())))


@pytest.mark.full
def test_one_pattern(rng):
    """Alone, a pattern has weight 1, whose derivative is 0, and the energy is D."""
    for kind in ("full", "vectors"):
        _, query, patterns = next(points_of(kind))
        memory = jdam.store(jax.tree.map(lambda x: x[:1], patterns))
        slope = jax.jit(jax.grad(jdam.energy, 1))(memory, query, 3.0)
        expected = jax.jit(jax.grad(lambda q, m=memory: jdam.divergences(m, q)[0]))(query)
        chex.assert_trees_all_close(slope, expected, rtol=1e-12)
        weights = jax.jit(jax.jacrev(jdam.gibbs_weights, 1))(memory, query, 3.0)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(weights))


@pytest.mark.full
@pytest.mark.parametrize("kind", ["full", "vectors"])
def test_transformations_of_step(kind):
    """jacfwd, jacrev, vmap(grad) and grad(vmap) agree."""
    _, query, patterns = next(points_of(kind))
    memory = jdam.store(patterns)
    step = partial(jdam.step, memory, beta=1.0)

    def number(query):
        return sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(step(query)))

    @jax.jit
    def everything(query, queries):
        summed = jax.grad(lambda many: jax.vmap(number)(many).sum())(queries)
        mapped = jax.vmap(jax.grad(number))(queries)
        return jax.jacfwd(step)(query), jax.jacrev(step)(query), mapped, summed

    queries = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), query)
    forward, reverse, mapped, summed = everything(query, queries)
    chex.assert_trees_all_close(forward, reverse, rtol=1e-7, atol=1e-12)
    chex.assert_trees_all_close(mapped, summed, rtol=1e-9, atol=1e-11)


@pytest.mark.full
@pytest.mark.parametrize("name", ["generic", "query equal to a pattern", "repeated eigenvalues"])
def test_gradient_in_high_precision(name):
    """Of the energy of full Gaussians along a direction, by differences in 80 digits."""
    query, patterns = next(rest for found, *rest in points_of("full") if found == name)
    rng = np.random.default_rng(5)
    direction = jax.tree.map(lambda x: rng.normal(size=np.shape(x)), query)
    slope = jax.jit(jax.grad(jdam.energy, 1))(jdam.store(patterns), query, 0.7)

    def exact_energy(h):
        factor = mpmath.matrix(np.asarray(query.factor).tolist())
        factor += h * mpmath.matrix(direction.factor.tolist())
        total = mpmath.mpf(0)
        for mean, root in zip(patterns.mean, patterns.factor, strict=True):
            root = mpmath.matrix(np.asarray(root).tolist())
            bures = w2_squared(
                np.zeros(3), root * root.T, np.zeros(3), factor * factor.T, digits=80
            )
            pairs = zip(np.asarray(query.mean), direction.mean, np.asarray(mean), strict=True)
            shift = sum(
                (mpmath.mpf(m) + h * mpmath.mpf(d) - mpmath.mpf(n)) ** 2 for m, d, n in pairs
            )
            total += mpmath.exp(-mpmath.mpf(0.7) * (bures + shift))
        return -mpmath.log(total) / mpmath.mpf(0.7)

    with mpmath.workdps(80):
        h = mpmath.mpf(10) ** -20
        expected = float((exact_energy(h) - exact_energy(-h)) / (2 * h))
    np.testing.assert_allclose(inner(slope, direction), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("prior", [None, np.log([1.0, 4.0, 2.0, 1.0])])
def test_the_weight_is_that_of_the_gibbs_weights(rng, prior):
    """Its derivatives too: the reference of the masses is a constant, and the weight is not."""
    memory = jdam.store(vectors(rng, 4, 3), log_prior=prior)
    query = near(rng, memory[0], 0.4)

    def recalled(query, beta):
        return jdam.recall(memory, query, beta, max_steps=1).weight

    def stepped(query, beta):
        return jdam.gibbs_weights(memory, jdam.step(memory, query, beta), beta).max()

    found, expected = (
        jax.value_and_grad(function, argnums=(0, 1))(query, 0.4) for function in (recalled, stepped)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-10)
    assert np.abs(expected[1][0]).max() > 1e-3
