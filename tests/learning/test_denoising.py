"""The β of denoising is as good as the best of a grid, on other cues too."""

import jax
import numpy as np
import pytest

import jdam
from tests.helpers import gaussians


@pytest.mark.full
def test_as_good_as_a_grid(rng):
    """Where every class has several patterns, its mean is nearer to the truth than any."""
    centres = 3 * rng.normal(size=(5, 3))
    noisy = lambda x: x + rng.normal(scale=0.5, size=x.shape)  # noqa: E731
    memory = jdam.store(noisy(np.repeat(centres, 12, 0)))
    truths = np.repeat(centres, 8, 0)
    queries, cues = noisy(truths), noisy(truths)
    beta = jdam.denoising_beta(memory, queries, truths)

    def error(beta, cues):
        found = jax.vmap(jdam.recall, (None, 0, None))(memory, cues, beta).measure
        return float(np.square(found - truths).sum(1).mean())

    grid = np.logspace(-3, 3, 30)
    assert error(beta, queries) <= min(error(b, queries) for b in grid) * 1.02
    assert error(beta, cues) <= min(error(b, cues) for b in grid) * 1.05
    assert error(beta, cues) < 0.5 * error(jdam.suggest_beta(memory), cues)


@pytest.mark.full
def test_single_precision_gaussians(rng):
    patterns = gaussians(rng, 6, 2, dtype=np.float32)
    memory = jdam.store(patterns)
    beta = jdam.denoising_beta(memory, patterns[:3], patterns[:3])
    assert beta.dtype == np.float32
    assert beta > 0


def test_mistakes_are_named(rng):
    memory = jdam.store(rng.normal(size=(4, 2)))
    with pytest.raises(ValueError, match="truths must be as many as queries, at least one"):
        jdam.denoising_beta(memory, rng.normal(size=(3, 2)), rng.normal(size=(2, 2)))


@pytest.mark.full
def test_divergences_of_any_sign(rng):
    """Inner products have no zero, and a query may be the only pattern."""
    patterns = rng.normal(size=(3, 4))
    for memory, num in (
        (jdam.store(patterns, jdam.DotProduct()), 3),
        (jdam.store(patterns[:1]), 1),
    ):
        beta = jdam.denoising_beta(memory, 1.01 * patterns[:num], patterns[:num])
        assert np.isfinite(beta)
        assert beta > 0
