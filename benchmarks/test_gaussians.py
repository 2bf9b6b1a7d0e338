"""Gaussians: one query against N patterns, beside the floor, POT, ott-jax and the paper's own
sequence of operations. Errors are relative errors of W₂² for a 1 % perturbation in the
contender's dtype, covariances of condition 1e4, against float64 Procrustes in NumPy."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import ot
import published
import pytest

import jdam

# POT takes roots of eigenvalues that rounding made negative, and warns.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in sqrt")

DIMENSIONS = [2, 3, 4, 8, 16, 32, 50, 64, 128]


def patterns(rng, d):
    num = int(np.clip(2**19 // d**2, 16, 4096))
    factor = rng.normal(size=(num, d, 2 * d)) / np.sqrt(2 * d)
    factor = np.linalg.cholesky(factor @ np.swapaxes(factor, -1, -2))
    return rng.normal(size=(num, d)).astype(np.float32), factor.astype(np.float32)


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


def covariance(factor):
    return factor @ np.swapaxes(factor, -1, -2)


def close_pair(d):
    rng = np.random.default_rng(1)
    axes = [np.linalg.qr(rng.normal(size=(d, d)))[0] for _ in range(3)]
    first = axes[0] * np.geomspace(1, 1e-2, d) @ axes[1]
    a = rng.normal(size=(d, d)) / np.sqrt(d)
    second = (np.eye(d) + 0.005 * (a + a.T)) @ first @ axes[2]
    return first.astype(np.float32), second.astype(np.float32)


def relative_error(w2_squared, d):
    """Of a function of two float32 factors."""
    first, second = close_pair(d)
    left, _, right = np.linalg.svd(second.T.astype(float) @ first)
    truth = np.sum((first - second.astype(float) @ left @ right) ** 2)
    return abs(float(w2_squared(first, second)) / truth - 1)


def with_jdam(first, second):
    zero = np.zeros(len(first), first.dtype)
    memory = jdam.store(jdam.Gaussian(zero[None], second[None]))
    return jdam.divergences(memory, jdam.Gaussian(zero, first))[0]


def with_pot(first, second):
    zero = np.zeros(len(first), first.dtype)
    return (
        ot.gaussian.bures_wasserstein_distance(zero, zero, *map(covariance, (first, second))) ** 2
    )


def ott_bures(d):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ott.geometry import costs
    return costs.Bures(dimension=d)


def as_ott(mean, factor):
    return np.concatenate([mean, covariance(factor).reshape(*mean.shape[:-1], -1)], -1)


def with_ott(first, second):
    zero = np.zeros(len(first), first.dtype)
    return ott_bures(len(first))(as_ott(zero, first), as_ott(zero, second))


def with_published(first, second):
    zero = np.zeros(len(first))
    return published.w2_squared(zero, covariance(first), zero, covariance(second))


@pytest.mark.parametrize("d", DIMENSIONS)
@pytest.mark.parametrize(
    "contender", ["svd", "step", "energy", "pot distance", "ott distance", "published step"]
)
def test_pairs(measure, rng, d, contender):
    mean, factor = patterns(rng, d)
    memory = jdam.store(jdam.Gaussian(mean, factor))
    query, num = memory[0], len(mean)
    measure = partial(measure, "A Gaussian", f"d = {d}, N = {num}")
    if contender == "svd":
        products = jnp.asarray(np.swapaxes(factor, -1, -2) @ factor[0])
        function = compiled(jnp.linalg.svd, products)
        measure("batched `jnp.linalg.svd`", function, products, pairs=num)
    elif contender in ("step", "energy"):
        function = compiled(getattr(jdam, contender), memory, query, 1.0)
        error = relative_error(with_jdam, d)
        measure(f"`jdam.{contender}`", function, memory, query, 1.0, pairs=num, error=error)
    elif contender == "pot distance":
        few, covariances = min(num, 64), covariance(factor)

        def loop():
            for i in range(few):
                ot.gaussian.bures_wasserstein_distance(
                    mean[0], mean[i], covariances[0], covariances[i]
                )

        measure("POT, distance", loop, pairs=few, rounds=3, error=relative_error(with_pot, d))
    elif contender == "ott distance":
        cost, stacked = ott_bures(d), as_ott(mean, factor)
        function = compiled(jax.vmap(cost, (None, 0)), stacked[0], stacked)
        error = relative_error(with_ott, d)
        measure("ott-jax, distance", function, stacked[0], stacked, pairs=num, error=error)
    else:
        few, covariances = 6, covariance(factor.astype(float))
        arguments = mean[0], covariances[0], mean[:few], covariances[:few], 1.0
        error = relative_error(with_published, d)
        name = "the paper's step, SciPy float64"
        measure(name, published.step, *arguments, pairs=few, rounds=3, error=error)


@pytest.mark.parametrize("contender", ["gemms", "step", "recall, 5 steps"])
def test_diagonal(measure, rng, contender):
    """A step is two matrix products, (Q, 2d)(2d, N) and (Q, N)(N, 2d); 5 steps take 6."""
    queries, num, d = 1024, 65536, 64
    row = f"Q = {queries}, N = {num}, d = {d}"
    mean, scale = rng.normal(size=(num, d)), rng.uniform(0.5, 1.5, (num, d))
    memory = jdam.store(jdam.DiagonalGaussian(mean.astype("f4"), scale.astype("f4")))
    query = jax.tree.map(lambda x: x[:queries] + np.float32(0.1), memory.patterns)
    pairs = queries * num
    if contender == "gemms":
        stored = jnp.concatenate([memory.patterns.mean, memory.patterns.scale], -1)
        function = compiled(lambda x, y: (x @ y.T) @ y, stored[:queries], stored)
        arguments, name = (stored[:queries], stored), "two matrix products, plain"
    else:
        if contender == "step":
            function, name = jdam.step, "`jdam.step`"
        else:
            name = "`jdam.recall`, 5 steps, each"
            pairs *= 5

            def function(memory, query, beta):
                return jdam.recall(memory, query, beta, max_steps=5)

        arguments = memory, query, 0.05  # at which all five steps are taken
        function = compiled(jax.vmap(function, (None, 0, None)), *arguments)
    measure("A diagonal Gaussian", row, name, function, *arguments, pairs=pairs)


@pytest.mark.parametrize("beta", [0.3, 3.0])
def test_recall_of_a_batch(measure, rng, beta):
    """A whole recall of 64 queries, at a β where all converge at once and one where they mix."""
    mean, factor = patterns(rng, 16)
    memory = jdam.store(jdam.Gaussian(mean[:512], factor[:512]))
    query = jax.tree.map(lambda x: np.float32(1.05) * x[:64], memory.patterns)
    function = compiled(jax.vmap(jdam.recall, (None, 0, None)), memory, query, beta)
    steps = float(np.mean(function(memory, query, beta).num_steps))
    question, row = "A recall of 64 Gaussians", "N = 512, d = 16"
    name = f"β = {beta}: {steps:.1f} steps on average"
    settings = {"pairs": 64 * 512, "rounds": 2, "warmup": 1}
    measure(question, row, name, function, memory, query, beta, **settings)
