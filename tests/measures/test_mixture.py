"""Mixtures: their moments, samples, densities, and how EM finds them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture as Reference

import jdam
from tests.helpers import mixtures


def samples_of_three(rng, num=400):
    parts = [
        rng.normal(size=(num // 2, 2)),
        0.3 * rng.normal(size=(num // 4, 2)) + 5,
        rng.normal(size=(num // 4, 2)) * [2, 0.1] - 6,
    ]
    return np.concatenate(parts)


@pytest.mark.full
def test_moments(rng):
    batch = mixtures(rng, 3, 2, 4, 3)
    p, m, f = (np.asarray(x) for x in (batch.weights, batch.means, batch.factors))
    mean = np.einsum("bk,bkd->bd", p, m)
    gaps = m - mean[:, None]
    covariance = np.einsum("bk,bkdr,bker->bde", p, f, f) + np.einsum(
        "bk,bkd,bke->bde", p, gaps, gaps
    )
    np.testing.assert_allclose(batch.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(batch.covariance, covariance, rtol=1e-12)
    np.testing.assert_allclose(batch.moments.covariance, covariance, rtol=1e-12)
    assert batch.moments.factor.shape == (3, 2, 2)
    padded = batch.padded(K=6, r=5)
    np.testing.assert_allclose(padded.covariance, covariance, rtol=1e-12)
    assert (batch.num_components, batch.rank, batch.dim, batch.batch_shape) == (4, 3, 2, (3,))
    one = mixtures(rng, 1, 3, 1, 1)[0]
    np.testing.assert_allclose(one.moments.covariance, one.components.covariance[0], atol=1e-15)
    slope = jax.grad(lambda mixture: mixture.moments.covariance.sum())(batch)
    chex.assert_tree_all_finite(slope)


def test_density_and_samples(rng):
    mixture = mixtures(rng, 1, 2)[0].padded(K=5)
    x = rng.normal(size=(7, 3, 2))
    wanted = sum(
        float(p) * multivariate_normal(m, f @ f.T).pdf(x)
        for p, m, f in zip(*map(np.asarray, jax.tree.leaves(mixture)), strict=True)
        if p > 0
    )
    np.testing.assert_allclose(mixture.log_density(x), np.log(wanted), rtol=1e-10)
    drawn = mixture.sample(jax.random.key(0), 20_000)
    np.testing.assert_allclose(drawn.mean(0), mixture.mean, atol=0.05)
    np.testing.assert_allclose(np.cov(np.asarray(drawn).T), mixture.covariance, atol=0.08)
    batch = mixtures(rng, 4, 2, rank=1)
    assert batch.sample(jax.random.key(1), 6).shape == (4, 6, 2)
    with pytest.raises(ValueError, match=r"a batch \(4,\) of mixtures needs jax.vmap"):
        batch.log_density(x)
    with pytest.raises(ValueError, match=r"x must have shape \(…, d\), d = 2; got \(3,\)"):
        mixture.log_density(np.zeros(3))
    with pytest.raises(ValueError, match="num must be ≥ 1"):
        mixture.sample(jax.random.key(0), 0)


@pytest.mark.full
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_em_is_as_likely_as_scikit_learns(rng, offset):
    samples = samples_of_three(rng) + offset
    for components in (1, 3, 5):
        found = jdam.GaussianMixture.from_samples(samples, components, key=jax.random.key(0))
        likelihood = float(found.log_density(samples).mean())
        wanted = Reference(components, random_state=0, n_init=3).fit(samples).score(samples)
        assert likelihood > wanted - 0.1
        np.testing.assert_allclose(found.mean, samples.mean(0), rtol=1e-8, atol=1e-8)
    single = jdam.GaussianMixture.from_samples(samples, 1, key=jax.random.key(0))
    covariance = np.cov(samples.T, bias=True)
    np.testing.assert_allclose(single.components.covariance[0], covariance, rtol=1e-4, atol=1e-4)


@pytest.mark.full
def test_em_of_batches_weights_and_single_precision(rng):
    samples = np.stack([samples_of_three(rng, 80) for _ in range(3)]).astype("f4")
    weights = np.ones((3, 80), "f4") / 60
    weights[:, 60:] = 0
    found = jdam.GaussianMixture.from_samples(samples, 2, key=jax.random.key(0), weights=weights)
    assert (found.batch_shape, found.dtype, found.factors.shape) == (
        (3,),
        jnp.float32,
        (3, 2, 2, 2),
    )
    np.testing.assert_allclose(found.weights.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(found.mean, samples[:, :60].mean(1), rtol=1e-4, atol=1e-4)
    again = jdam.GaussianMixture.from_samples(samples, 2, key=jax.random.key(0), weights=weights)
    np.testing.assert_array_equal(again.means, found.means)


@pytest.mark.full
def test_em_of_a_line_in_single_precision(rng):
    """A component longer than the floor by more than float32 has digits is no NaN."""
    line = rng.normal(size=6) * rng.normal(size=(4, 30, 1))
    samples = np.concatenate([1e-3 * rng.normal(size=(4, 270, 6)), line], 1).astype(np.float32)
    found = jdam.GaussianMixture.from_samples(samples, 4, key=jax.random.key(0))
    assert np.isfinite(jax.vmap(lambda g, x: g.log_density(x))(found, samples)).all()


@pytest.mark.full
def test_em_of_few_and_equal_samples(rng):
    """No component is a point of infinite density, whatever the unit."""
    for unit in (1e-6, 1e6):
        few = unit * rng.normal(size=(3, 2))
        found = jdam.GaussianMixture.from_samples(few, 3, key=jax.random.key(1))
        assert np.isfinite(found.log_density(few)).all()
        assert np.isfinite(jax.tree.leaves(found)[2]).all()
    same = jdam.GaussianMixture.from_samples(np.ones((5, 2)), 2, key=jax.random.key(1))
    np.testing.assert_allclose(same.mean, [1, 1], rtol=1e-12)
    assert np.isfinite(same.factors).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jdam.GaussianMixture(np.ones(2), np.zeros((2, 2)), np.zeros((2, 2, 1))), ValueError, "weights must sum to one"),
        (lambda: jdam.GaussianMixture(np.ones(1), np.zeros(2), np.zeros((2, 1))), ValueError, "mean must have shape"),
        (lambda: jdam.GaussianMixture(np.ones(3) / 3, np.zeros((2, 2)), np.zeros((2, 2, 1))), ValueError, "weights must have shape"),
        (lambda: jdam.GaussianMixture(np.ones(1), np.full((1, 2), np.nan), np.zeros((1, 2, 1))), ValueError, "mean must be finite"),
        (lambda: jdam.GaussianMixture.from_samples(np.zeros((2, 2)), 3, key=jax.random.key(0)), ValueError, "num_components must be at most n = 2"),
        (lambda: jdam.GaussianMixture.from_samples(np.zeros(2), 1, key=jax.random.key(0)), ValueError, "samples must have shape"),
    ],
)  # fmt: skip
def test_bad_mixtures(make, error, message):
    with pytest.raises(error, match=message):
        make()
