"""W₂² between Gaussians and Φ, against POT, 60-digit arithmetic and closed forms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jdam
from tests.helpers import (
    conditioned_factor,
    diagonals,
    gaussians,
    near,
    orthogonal,
    transport_step,
    w2_squared_of,
)


def total(first, second):
    """tr Σ₁ + tr Σ₂ + |Δm|², the size that errors of W₂² are measured by."""
    parts = np.sum(np.square(first.factor)), np.sum(np.square(second.factor))
    return float(sum(parts) + np.sum(np.square(first.mean - second.mean)))


def distance(first, second):
    return float(jdam.divergences(jdam.store(jax.tree.map(lambda x: x[None], first)), second)[0])


PAIRS = ["generic", "identical", "rotated factor", "close", "half rank", "dirac", "two diracs"]


def pair(rng, kind, d, condition, scale, dtype):
    """Two Gaussians of shape (d, d), of a degenerate kind."""
    first = conditioned_factor(rng, d, condition, scale)
    mean = scale * rng.normal(size=d)
    other_mean, second = scale * rng.normal(size=d), conditioned_factor(rng, d, condition, scale)
    if kind in ("identical", "rotated factor"):
        other_mean = mean
        second = first @ orthogonal(rng, d) if kind == "rotated factor" else first
    elif kind == "close":
        a = rng.normal(size=(d, d)) / np.sqrt(d)
        other_mean, second = mean, (np.eye(d) + 0.005 * (a + a.T)) @ first @ orthogonal(rng, d)
    elif kind == "half rank":
        second = second * (np.arange(d) < (d + 1) // 2)
    elif kind in ("dirac", "two diracs"):
        second = np.zeros((d, d))
        first = second if kind == "two diracs" else first
    make = lambda m, f: jdam.Gaussian(m.astype(dtype), f.astype(dtype))  # noqa: E731
    return make(mean, first), make(other_mean, second)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("d", [1, 2, 6])
def test_w2_against_high_precision(rng, kind, d):
    for condition in (1e2, 1e6, 1e12):
        for scale in (1e-6, 1.0, 1e6):
            first, second = pair(rng, kind, d, condition, scale, np.float64)
            error = abs(distance(first, second) - float(w2_squared_of(first, second)))
            assert error <= 1e-13 * total(first, second)


@pytest.mark.full
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("d", [1, 3, 16])
def test_w2_in_float32_is_that_of_float64(rng, kind, d):
    for condition, tolerance in ((1e2, 1e-6), (1e8, 1e-6), (1e12, 1e-6)):
        for scale in (1e-6, 1.0, 1e6):
            first, second = pair(rng, kind, d, condition, scale, np.float32)
            single = distance(first, second)
            double = distance(*jax.tree.map(lambda x: x.astype(np.float64), (first, second)))
            assert single >= 0
            assert abs(single - double) <= tolerance * total(first, second)
            if kind == "close" and condition <= 1e8:
                assert abs(single - double) <= 1e-3 * double


@pytest.mark.full
def test_w2_in_many_dimensions(rng):
    first, second = pair(rng, "close", 128, 1e8, 1.0, np.float32)
    double = distance(*jax.tree.map(lambda x: x.astype(np.float64), (first, second)))
    assert abs(distance(first, second) - double) <= 1e-3 * double


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-8), (np.float32, 2e-4)])
def test_w2_from_covariances(rng, dtype, tolerance):
    for kind in PAIRS:
        for condition in (1e2, 1e8, 1e12):
            first, second = pair(rng, kind, 12, condition, 1.0, np.float64)
            rounded = []
            for g in (first, second):
                covariance = np.asarray(g.covariance).astype(dtype)
                rounded.append(jdam.Gaussian.from_covariance(g.mean.astype(dtype), covariance))
            error = abs(distance(*rounded) - distance(first, second))
            assert error <= tolerance * total(first, second)


@pytest.mark.full
def test_w2_against_pot(rng):
    memory, query = jdam.store(gaussians(rng, 5, 4)), gaussians(rng, 1, 4)[0]
    expected = [
        float(
            ot.gaussian.bures_wasserstein_distance(
                *(np.asarray(x) for x in (query.mean, g.mean, query.covariance, g.covariance))
            )
        )
        ** 2
        for g in memory
    ]
    np.testing.assert_allclose(jdam.divergences(memory, query), expected, rtol=1e-10)


@pytest.mark.full
def test_sample_covariances_of_few_samples(rng):
    samples = rng.normal(size=(2, 5, 9))  # rank 4 in nine dimensions
    first, second = (jdam.Gaussian.from_samples(s) for s in samples)
    from_covariances = [
        jdam.Gaussian.from_covariance(s.mean(0), np.cov(s.T, bias=True)) for s in samples
    ]
    assert first.factor.shape == (9, 5)
    expected = float(w2_squared_of(first, second))
    assert distance(first, second) == pytest.approx(expected, rel=1e-12)
    assert distance(*from_covariances) == pytest.approx(expected, rel=1e-6)


@pytest.mark.full
def test_ranks_are_mixed_by_padding(rng):
    low, high = gaussians(rng, 3, 5, rank=2), gaussians(rng, 1, 5, rank=7)[0]
    there = jdam.divergences(jdam.store(low), high)
    back = [distance(high, low[i]) for i in range(3)]
    np.testing.assert_allclose(there, back, rtol=1e-12)
    moved = jdam.step(jdam.store(low), low[0].pad(1), 1.0)
    assert moved.factor.shape == (5, 2)
    assert jdam.step(jdam.store(low), high, 1.0).factor.shape == (5, 7)


def test_step_is_the_papers_map(rng):
    memory, query = jdam.store(gaussians(rng, 6, 4)), gaussians(rng, 1, 4)[0]
    weights = np.asarray(jdam.gibbs_weights(memory, query, 0.7))
    patterns = memory.patterns
    mean, covariance = transport_step(
        query.mean, np.asarray(query.covariance), weights, patterns.mean, patterns.covariance
    )
    moved = jdam.step(memory, query, 0.7)
    np.testing.assert_allclose(moved.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(moved.covariance, covariance, rtol=1e-9, atol=1e-12)


@pytest.mark.full
def test_damped_step_moves_along_the_geodesic(rng):
    """One pattern: (1−τ)id + τT is the Wasserstein geodesic, so W₂ shrinks to 1−τ of itself."""
    target, query = gaussians(rng, 1, 4)[0], gaussians(rng, 1, 4)[0]
    memory = jdam.store(jax.tree.map(lambda x: x[None], target))
    moved = jdam.step(memory, query, 1.0, 0.25)
    start = distance(target, query)
    assert distance(target, moved) == pytest.approx(0.75**2 * start, rel=1e-10)
    assert distance(query, moved) == pytest.approx(0.25**2 * start, rel=1e-10)


@pytest.mark.full
@pytest.mark.parametrize("rank", [2, 5])
def test_singular_queries_recall_too(rng, rank):
    """A query of lower rank than its pattern has no transport map, but the factors do."""
    memory = jdam.store(gaussians(rng, 3, 5, spread=10.0))
    query = near(rng, memory[1], 0.1)
    query = jdam.Gaussian(query.mean, query.factor[:, :rank] * 0)
    result = jdam.recall(memory, query, 1.0)
    assert int(result.status) == jdam.Status.CONVERGED
    assert distance(memory[1], result.measure) < 1e-20


@pytest.mark.full
def test_commuting_is_euclidean_on_means_and_roots(rng):
    """Diagonal, full-matrix and vector memories of the same commuting Gaussians agree."""
    diagonal, query = diagonals(rng, 7, 4), diagonals(rng, 1, 4)[0]
    axes = orthogonal(rng, 4)

    def full(g):
        covariance = np.einsum("ij,...j,kj->...ik", axes, np.asarray(g.variance), axes)
        return jdam.Gaussian.from_covariance(np.asarray(g.mean) @ axes.T, covariance)

    def stacked(g):
        return jnp.concatenate([g.mean, g.scale], -1)

    memories = [jdam.store(f(diagonal)) for f in (lambda g: g, full, stacked)]
    queries = [query, full(query), stacked(query)]
    results = [jdam.recall(m, q, 0.4) for m, q in zip(memories, queries, strict=True)]
    for result in results[1:]:
        np.testing.assert_allclose(result.energy, results[0].energy, rtol=1e-10)
        np.testing.assert_allclose(result.weight, results[0].weight, rtol=1e-8)
        assert result.status == results[0].status
    np.testing.assert_allclose(stacked(results[0].measure), results[2].measure, rtol=1e-9)
    expected = full(results[0].measure)
    np.testing.assert_allclose(results[1].measure.covariance, expected.covariance, atol=1e-9)


def test_one_dimension(rng):
    """W₂² = (Δμ)² + (Δσ)², whatever the sign of the 1×1 factor."""
    mean, factor = rng.normal(size=(6, 1)), rng.normal(size=(6, 1, 1))
    memory = jdam.store(jdam.Gaussian(mean[1:], factor[1:]))
    query = jdam.Gaussian(mean[0], factor[0])
    expected = (mean[1:, 0] - mean[0]) ** 2 + (np.abs(factor[1:, 0, 0]) - np.abs(factor[0, 0])) ** 2
    np.testing.assert_allclose(jdam.divergences(memory, query), expected, rtol=1e-13)


@pytest.mark.full
@given(seed=st.integers(0, 10**6), d=st.sampled_from([1, 3]), scale=st.floats(1e-3, 1e3))
def test_rigid_motions_and_scaling(seed, d, scale):
    """W₂²(lμ, lν) = l² W₂², invariance under x ↦ Ux + t, and Φ moves along; symmetry."""
    rng = np.random.default_rng(seed)
    patterns, query = gaussians(rng, 3, d), gaussians(rng, 1, d)[0]
    axes, shift = scale * orthogonal(rng, d), rng.normal(size=d)

    def move(g):
        mean = np.einsum("ij,...j->...i", axes, np.asarray(g.mean)) + shift
        return jdam.Gaussian(mean, np.einsum("ij,...jk->...ik", axes, np.asarray(g.factor)))

    before, after = jdam.store(patterns), jdam.store(move(patterns))
    divergences = np.asarray(jdam.divergences(before, query))
    np.testing.assert_allclose(
        jdam.divergences(after, move(query)), scale**2 * divergences, rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(
        [distance(query, g) for g in before], divergences, rtol=1e-9, atol=1e-13
    )
    expected = move(jdam.step(before, query, 0.8))
    got = jdam.step(after, move(query), 0.8 / scale**2)
    np.testing.assert_allclose(got.mean, expected.mean, rtol=1e-7, atol=1e-8 * scale)
    np.testing.assert_allclose(got.covariance, expected.covariance, rtol=1e-6, atol=1e-8 * scale**2)


@pytest.mark.full
@given(seed=st.integers(0, 10**6), beta=st.floats(1e-3, 1e3))
def test_descent_and_one_step_bound(seed, beta):
    """E(ξ) − E(Φ(ξ)) ≥ W₂²(ξ, Φ(ξ)), and W₂(Φ(ξ), Xᵢ) ≤ Σ_{k≠i} wₖ (W₂(ξ, Xₖ) + W₂(ξ, Xᵢ))."""
    rng = np.random.default_rng(seed)
    memory, query = jdam.store(gaussians(rng, 4, 3)), gaussians(rng, 1, 3)[0]
    moved = jdam.step(memory, query, beta)
    fall = float(jdam.energy(memory, query, beta) - jdam.energy(memory, moved, beta))
    assert fall >= distance(query, moved) - 1e-12
    weights = np.asarray(jdam.gibbs_weights(memory, query, beta))
    far = np.sqrt(np.asarray(jdam.divergences(memory, query)))
    after = np.sqrt(np.asarray(jdam.divergences(memory, moved)))
    bounds = weights @ far + far - 2 * weights * far
    assert np.all(after <= bounds + 1e-9)


@pytest.mark.full
def test_low_beta_recalls_the_barycentre(rng):
    """β → 0: the fixed point is the uniform W₂ barycentre, POT's fixed-point iteration's too."""
    memory = jdam.store(gaussians(rng, 4, 3))
    result = jdam.recall(memory, memory[0], 1e-6, max_steps=300)
    mean, covariance = ot.gaussian.bures_wasserstein_barycenter(
        np.asarray(memory.patterns.mean), np.asarray(memory.patterns.covariance), num_iter=2000
    )
    assert int(result.status) == jdam.Status.MIXTURE
    np.testing.assert_allclose(result.measure.mean, mean, atol=1e-5)
    np.testing.assert_allclose(result.measure.covariance, covariance, atol=1e-5)


@pytest.mark.full
def test_fixed_point_is_a_self_consistent_barycentre(rng):
    """Ω = Σ wᵢ (Ω^½ Σᵢ Ω^½)^½ at the fixed point, with the fixed point's own weights."""
    memory = jdam.store(gaussians(rng, 5, 3, spread=0.3))
    result = jdam.recall(memory, memory[2], 1.5, max_steps=500, tol=1e-12)
    omega = np.asarray(result.measure.covariance)
    weights = np.asarray(jdam.gibbs_weights(memory, result.measure, 1.5))

    def root(a):
        values, basis = np.linalg.eigh(a)
        return basis * np.sqrt(np.maximum(values, 0)) @ basis.T

    r = root(omega)
    covariances = np.asarray(memory.patterns.covariance)
    mixed = sum(w * root(r @ c @ r) for w, c in zip(weights, covariances, strict=True))
    np.testing.assert_allclose(mixed, omega, atol=1e-9)
    np.testing.assert_allclose(weights @ memory.patterns.mean, result.measure.mean, atol=1e-9)


def test_overshooting_step_keeps_scales_nonnegative():
    memory = jdam.store(jdam.DiagonalGaussian(np.zeros((1, 2)), np.full((1, 2), 0.1)))
    moved = jdam.step(memory, jdam.DiagonalGaussian(np.zeros(2), np.ones(2)), 1.0, 1.5)
    np.testing.assert_allclose(moved.scale, [0.35, 0.35])  # |1 − 1.5·0.9|


def test_diagonal_memory_never_forms_a_matrix(rng):
    """In 2000 dimensions a d×d float64 matrix a pattern would take 32 MB each."""
    memory, query = jdam.store(diagonals(rng, 64, 2000)), diagonals(rng, 1, 2000)[0]
    compiled = jax.jit(jdam.step).lower(memory, query, 1.0).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 64 * 4000 * 4


@pytest.mark.full
def test_equal_factors_have_gradient_zero_and_finite_hessian(rng):
    """At a pattern, at spherical covariances and at singular ones, where svd's is NaN."""
    factors = [np.eye(3), np.diag([1.0, 1.0, 0.0]), np.zeros((3, 3)), np.diag([2.0, 1.0, 1.0])]
    memory = jdam.store(jdam.Gaussian(np.zeros((4, 3)), np.stack(factors)))
    slope = jax.grad(jdam.energy, argnums=1)
    both = jax.jit(lambda query: (slope(memory, query, 50.0), jax.hessian(jdam.energy, 1)(memory, query, 50.0)))  # fmt: skip
    for pattern in memory:
        chex.assert_tree_all_finite(both(pattern))
    lonely = jdam.store(jax.tree.map(lambda x: x[None], memory[0]))
    gradient = jax.jit(slope)(lonely, memory[0], 50.0)
    np.testing.assert_allclose(gradient.factor, 0, atol=1e-12)


@pytest.mark.full
def test_gradient_of_w2_is_that_of_the_papers(rng):
    """∂W₂²/∂Ω = I − A in the covariance, so by the chain rule 2(I − A)L in the factor."""
    pattern, query = gaussians(rng, 1, 3), gaussians(rng, 1, 3)[0]
    gradient = jax.jit(jax.grad(jdam.energy, argnums=1))(jdam.store(pattern), query, 3.0)
    factor, omega = np.asarray(query.factor), np.asarray(query.covariance)
    _, after = transport_step(
        query.mean, omega, np.ones(1), pattern.mean, np.asarray(pattern.covariance)
    )
    moved = jdam.step(jdam.store(pattern), query, 3.0)
    a = np.asarray(moved.factor) @ np.linalg.inv(factor)
    np.testing.assert_allclose(a, a.T, atol=1e-10)  # an optimal transport map
    np.testing.assert_allclose(a @ omega @ a, after, atol=1e-10)
    np.testing.assert_allclose(gradient.factor, 2 * (np.eye(3) - a) @ factor, atol=1e-9)
    np.testing.assert_allclose(gradient.mean, 2 * (query.mean - pattern.mean[0]), rtol=1e-12)
