from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdam
from tests.helpers import gaussians, near, vectors


def test_statuses():
    memory = jdam.store(np.array([[-1.0], [1.0]]))
    status = lambda *args, **kwargs: int(jdam.recall(memory, *args, **kwargs).status)  # noqa: E731
    assert status(np.array([0.9]), 10.0) == jdam.Status.CONVERGED
    assert status(np.array([0.9]), 0.1) == jdam.Status.MIXTURE
    assert status(np.array([0.9]), 0.49, max_steps=2, tol=1e-12) == jdam.Status.MAX_STEPS
    assert status(np.array([np.nan]), 1.0) == jdam.Status.NONFINITE
    assert status(np.array([1e200]), 1.0) == jdam.Status.NONFINITE


def test_bad_traced_settings_are_reported(rng):
    memory = jdam.store(vectors(rng, 4, 2))
    query = memory[0] + 0.3
    good, *bad = np.array([0.5, 0.0, -1.0, np.nan])
    for name in ("step_size", "tol"):
        run = jax.vmap(lambda x, name=name: jdam.recall(memory, query, 1.0, **{name: x}))
        result = run(np.array([good, *bad]))
        fine = 2 if name == "tol" else 1  # a tol of 0 takes all steps
        assert (result.status[fine:] == jdam.Status.NONFINITE).all()
        assert (result.status[:fine] != jdam.Status.NONFINITE).all()
        assert (result.num_steps >= 0).all()


def test_beta_beyond_the_dtype_is_refused(rng):
    memory = jdam.store(vectors(rng, 4, 2, np.float32))
    for beta in (1e-45, 1e300):
        with pytest.raises(ValueError, match="beta must be within the range of float32"):
            jdam.energy(memory, memory[0], beta)


def test_a_bad_pattern_inside_jit_is_reported(rng):
    recall = jax.jit(lambda patterns, query: jdam.recall(jdam.store(patterns), query, 1.0))
    patterns = vectors(rng, 4, 2)
    assert int(recall(patterns, patterns[0]).status) != jdam.Status.NONFINITE
    patterns[2, 0] = np.nan
    assert int(recall(patterns, patterns[0]).status) == jdam.Status.NONFINITE


def test_step_size_one_is_step(rng):
    memory = jdam.store(vectors(rng, 4, 2))
    np.testing.assert_allclose(
        jdam.recall(memory, memory[0], 1.0, max_steps=1, step_size=0.4).measure,
        jdam.step(memory, memory[0], 1.0, 0.4),
        rtol=1e-14,
    )


def test_tolerance(rng):
    """A distance, reached; and by default relative to the patterns' size, at any scale."""
    patterns = vectors(rng, 6, 3)
    memory = jdam.store(patterns)
    query = near(rng, patterns[0], 0.3)
    for tol in (1e-2, 1e-6):
        result = jdam.recall(memory, query, 1.0, tol=tol, max_steps=500)
        assert float(result.residual) <= tol
        moved = jdam.step(memory, result.measure, 1.0)
        np.testing.assert_allclose(
            np.linalg.norm(moved - result.measure), result.residual, rtol=1e-6
        )
    steps = [
        int(jdam.recall(jdam.store(s * patterns), s * query, 1.0 / s**2, max_steps=500).num_steps)
        for s in (1e-6, 1.0, 1e6)
    ]
    assert len(set(steps)) == 1


def test_dot_product_is_attention(rng):
    """x⁺ = Σ softmax(β⟨x, yᵢ⟩) yᵢ and the energy of Ramsauer et al., eq. 3."""
    patterns, query = vectors(rng, 6, 3), rng.normal(size=3)
    memory = jdam.store(patterns, jdam.DotProduct())
    logits = 0.7 * patterns @ query
    weights = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(jdam.step(memory, query, 0.7), weights @ patterns, rtol=1e-13)
    energy = query @ query / 2 - np.log(np.exp(logits).sum()) / 0.7
    np.testing.assert_allclose(jdam.energy(memory, query, 0.7), energy, rtol=1e-13)


def test_equal_norms_make_euclidean_a_dot_product(rng):
    """On a sphere the distance memory is Ramsauer's with 2β (commuting Gaussians' oracle)."""
    patterns = vectors(rng, 9, 4)
    patterns /= np.linalg.norm(patterns, axis=1, keepdims=True)
    query = near(rng, patterns[3], 0.2)
    euclidean = jdam.step(jdam.store(patterns), query, 1.3)
    dot = jdam.step(jdam.store(patterns, jdam.DotProduct()), query, 2.6)
    np.testing.assert_allclose(euclidean, dot, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_steps": 0}, ValueError, "max_steps must be ≥ 1; got 0"),
        ({"max_steps": 1.5}, TypeError, "max_steps must be an int; got 1.5"),
        ({"step_size": 0.0}, ValueError, "step_size must be finite and > 0; got 0"),
        ({"step_size": np.ones(2)}, ValueError, r"step_size must be a scalar; got shape \(2,\)"),
        ({"tol": -1.0}, ValueError, "tol must be finite and ≥ 0; got -1"),
        ({"tol": "small"}, TypeError, "tol must be a real number; got 'small'"),
        ({"search": "all"}, TypeError, "search must be one of jdam's, as jdam.Exhaustive"),
        ({"adjoint": None}, TypeError, "adjoint must be one of jdam's, as jdam.Unrolled"),
        ({"save_trace": 1}, TypeError, "save_trace must be a bool; got 1"),
    ],
)
def test_bad_arguments_are_named(rng, arguments, error, message):
    memory = jdam.store(vectors(rng, 3, 2))
    with pytest.raises(error, match=message):
        jdam.recall(memory, memory[0], 1.0, **arguments)


@pytest.mark.parametrize(
    ("beta", "error", "message"),
    [
        (np.ones(2), ValueError, r"beta must be a scalar; got shape \(2,\): use jax.vmap"),
        (True, TypeError, "beta must be a real number; got True"),
        (1j, TypeError, "beta must be a real number"),
        ("hot", TypeError, "beta must be a real number; got 'hot'"),
        (None, TypeError, "beta must be a real number; got None"),
    ],
)
def test_bad_betas_are_named(rng, beta, error, message):
    memory = jdam.store(vectors(rng, 3, 2))
    with pytest.raises(error, match=message):
        jdam.energy(memory, memory[0], beta)


def test_block_size_is_checked():
    with pytest.raises(ValueError, match="block_size must be ≥ 1; got 0"):
        jdam.Exhaustive(block_size=0)
    with pytest.raises(TypeError, match="block_size must be an int"):
        jdam.Exhaustive(block_size=2.0)


def test_repr(rng):
    memory = jdam.store(vectors(rng, 3, 2))
    result = jdam.recall(memory, memory[0], 1e3)
    assert repr(result).startswith("Recall(CONVERGED after 1 steps: nearest=0, weight=1,") or repr(
        result
    ).startswith("Recall(CONVERGED after 0 steps: nearest=0, weight=1,")
    queries = jnp.asarray(memory.patterns).at[1].set(jnp.nan)
    batch = jax.vmap(jdam.recall, (None, 0, None))(memory, queries, 1e3)
    assert repr(batch) == "Recall(batch of (3,): 2 CONVERGED, 1 NONFINITE)"


@pytest.mark.full
def test_memory_of_a_batch_is_bounded_by_tiles(rng):
    """Recalling 512 queries from 1024 Gaussians needs no array of all pairs of matrices."""
    memory = jdam.store(gaussians(rng, 1024, 16, dtype=np.float32))
    queries = gaussians(rng, 512, 16, dtype=np.float32)
    recall = jax.jit(jax.vmap(jdam.recall, (None, 0, None)))
    needed = recall.lower(memory, queries, 1.0).compile().memory_analysis()
    assert needed.temp_size_in_bytes < 512 * 1024 * 16 * 16 * 4 / 10


@pytest.mark.full
def test_the_queries_of_a_batch_stop_for_themselves(rng):
    """One slow query among many fast ones: the looks taken follow the pending ones."""
    looks = []

    class Watched(jdam.Euclidean):
        def compare(self, view, patterns):
            jax.debug.callback(lambda: looks.append(1))
            return super().compare(view, patterns)

        def batch_sizes(self, patterns):
            return jdam.BatchSizes(2, 100, 100)

    patterns = np.concatenate([vectors(rng, 20, 2) * 100, [[0.0, 0.0], [0.0, 1.0]]])
    memory = jdam.store(patterns, Watched())
    queries = np.concatenate([patterns[:11], [[0.0, 0.4]]])
    result = jax.vmap(lambda q: jdam.recall(memory, q, 1.8, tol=1e-6, max_steps=200))(queries)
    jax.effects_barrier()
    steps = np.sort(np.asarray(result.num_steps))
    assert steps[-1] > 20
    assert steps[-2] <= 1
    assert len(looks) <= 2 * (6 + 6 + steps[-1])  # tiles of two, each query of one calls back


def radial_gaussians(rng, num, d):
    """The Gaussian paper's commuting patterns: |μ|² = Σλ = R²/2, R² = d(λ_min + λ_max), with
    λ in [1, 1.1], as vectors (μ, √λ) in the common eigenbasis."""
    low, high = 1.0, 1.1
    target = d * (low + high) / 2
    values = rng.uniform(low, high, (num, d))
    for _ in range(50):  # onto the plane Σλ = R²/2, inside the box
        values = np.clip(values + (target - values.sum(1, keepdims=True)) / d, low, high)
    mean = rng.normal(size=(num, d))
    mean *= np.sqrt(target) / np.linalg.norm(mean, axis=1, keepdims=True)
    return jdam.DiagonalGaussian(mean, np.sqrt(values)), np.sqrt(2 * target)


@pytest.mark.full
@pytest.mark.parametrize(("factor", "published"), [(1, 5.1209), (100, 5.1185)])
def test_published_run_at_low_beta(rng, factor, published):
    """N = 5000, d = 25, β = 0.1: the mean W₂ to the pattern after five steps (arXiv:2509.23162,
    official code), within 1 %: patterns are drawn anew and by another sampler."""
    patterns, size = radial_gaussians(rng, 5000, 25)
    memory = jdam.store(patterns)
    radius = factor / np.sqrt(0.1 * 5000)
    queries = jax.tree.map(lambda x: (1 + radius / size) * x[:1000], patterns)
    recall = jax.vmap(lambda q: jdam.recall(memory, q, 0.1, max_steps=5, tol=1e-12).measure)
    moved = recall(queries)
    gap = jax.tree.map(lambda x, y: x - y[:1000], moved, patterns)
    distances = np.sqrt((gap.mean**2).sum(1) + (gap.scale**2).sum(1))
    assert np.mean(distances) == pytest.approx(published, rel=0.01)


@pytest.mark.full
def test_published_run_at_high_beta(rng):
    """The same at β = 1: patterns come back to 1e-5 in one step."""
    patterns, size = radial_gaussians(rng, 5000, 25)
    memory = jdam.store(patterns)
    queries = jax.tree.map(lambda x: (1 + 1 / np.sqrt(5000) / size) * x[:200], patterns)
    moved = jax.vmap(lambda q: jdam.step(memory, q, 1.0))(queries)
    gap = jax.tree.map(lambda x, y: x - y[:200], moved, patterns)
    assert np.mean(np.sqrt((gap.mean**2).sum(1) + (gap.scale**2).sum(1))) < 2e-5


@pytest.mark.full
def test_full_and_diagonal_published_patterns_agree(rng):
    patterns, _ = radial_gaussians(rng, 300, 25)
    full = jdam.Gaussian(
        patterns.mean, jnp.vectorize(jnp.diag, signature="(d)->(d,d)")(patterns.scale)
    )
    queries = [jax.tree.map(lambda x: 1.02 * x[7], g) for g in (patterns, full)]
    memories = [jdam.store(g) for g in (patterns, full)]
    results = [
        jdam.recall(m, q, 0.1, max_steps=5, tol=1e-12)
        for m, q in zip(memories, queries, strict=True)
    ]
    np.testing.assert_allclose(results[0].energy, results[1].energy, rtol=1e-10)
    np.testing.assert_allclose(
        results[0].measure.covariance, results[1].measure.covariance, atol=1e-10
    )


@pytest.mark.full
def test_batches_after_one_another(rng):
    memory = jdam.store(gaussians(rng, 8, 2))
    queries = near(rng, memory.patterns, 0.05)
    found = jdam.recall_batch(memory, queries, 20.0, batch_size=3, max_steps=4)
    wanted = jax.vmap(lambda query: jdam.recall(memory, query, 20.0, max_steps=4))(queries)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)
    with pytest.raises(ValueError, match="queries must have batch shape"):
        jdam.recall_batch(memory, memory[0], 20.0)
    with pytest.raises(ValueError, match="batch_size must be ≥ 1; got 0"):
        jdam.recall_batch(memory, queries, 20.0, batch_size=0)


class Stubborn(jdam.Euclidean):
    """Steps that go uphill."""

    max_backtracks: ClassVar[int] = 2

    def move(self, view, pull, step_size):
        return view + (view - pull)


def test_no_step_down_is_stalled_not_converged():
    memory = jdam.store(np.array([[0.0, 0.0], [4.0, 0.0]]), Stubborn())
    result = jdam.recall(memory, np.array([1.0, 1.0]), 1.0)
    assert int(result.status) == jdam.Status.STALLED
    assert float(result.residual) > 1
    assert "STALLED" in repr(result)


@pytest.mark.full
@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_converged_means_the_residual_is_within_tol(rng, kappa):
    patterns = jdam.PointCloud(rng.normal(size=(3, 8, 2)).astype(np.float32))
    memory = jdam.store(patterns, jdam.Sinkhorn(0.05, hellinger_scale=kappa))
    for tol in (1e-5, 1e-2):
        run = lambda q, tol=tol: jdam.recall(memory, q, 50.0, max_steps=30, tol=tol)  # noqa: E731
        result = jax.vmap(run)(near(rng, patterns, 0.2))
        at_rest = np.asarray(result.status) <= jdam.Status.MIXTURE
        within = np.asarray(result.residual) <= tol
        assert not (at_rest & ~within).any()
        unclear = np.isin(result.status, [jdam.Status.MAX_STEPS, jdam.Status.STALLED])
        assert not (unclear & within).any()


def test_a_mixture_is_told_whatever_the_status():
    memory = jdam.store(np.array([[-1.0], [0.0], [1.0]]))
    result = jdam.recall(memory, np.array([0.9]), 0.1, max_steps=1, tol=1e-12)
    assert int(result.status) == jdam.Status.MAX_STEPS
    assert bool(result.mixture)
    assert "MAX_STEPS, MIXTURE" in repr(result)
    assert not bool(jdam.recall(memory, np.array([0.9]), 10.0).mixture)


def test_patterns_that_are_all_zero_have_a_tolerance():
    result = jdam.recall(jdam.store(np.zeros((2, 3))), np.ones(3), 1.0)
    assert result.num_steps < 3
    assert result.status == jdam.Status.MIXTURE


def test_tolerance_zero_takes_all_steps(rng):
    memory = jdam.store(vectors(rng, 4, 2))
    for query in (memory[0], memory[0] + 0.1):
        result = jdam.recall(memory, query, 50.0, max_steps=40, tol=0)
        assert int(result.num_steps) == 40
        batch = jdam.recall_batch(memory, query[None], 50.0, max_steps=40, tol=0.0)
        assert batch.num_steps.tolist() == [40]


def test_a_prior_of_nan_inside_jit_is_reported(rng):
    patterns = vectors(rng, 4, 2)
    for search in (jdam.Exhaustive(), jdam.Certified(2)):
        recall = jax.jit(
            lambda prior, search=search: jdam.recall(
                jdam.store(patterns, log_prior=prior), patterns[0], 1.0, search=search
            )
        )
        assert int(recall(np.zeros(4)).status) != jdam.Status.NONFINITE
        for k in range(4):
            assert int(recall(np.where(np.arange(4) == k, np.nan, 0)).status) == 5


def test_no_queries(rng):
    memory = jdam.store(gaussians(rng, 4, 2))
    none = memory[:0]
    result = jdam.recall_batch(memory, none, 1.0)
    assert result.energy.shape == (0,)
    assert result.measure.factor.shape == (0, 2, 2)
    assert len(memory.append(none)) == 4
    with pytest.raises(ValueError, match="queries must hold at least one"):
        jdam.fit(memory, 1.0, none, none, optax.sgd(0.1), num_steps=1)


def test_help_tells_members_and_fields():
    for name in jdam.Status.__members__:
        assert f"{name}:" in jdam.Status.__doc__
    for field in (*jdam.Recall.__dataclass_fields__, "mixture"):
        assert f"{field}:" in jdam.Recall.__doc__


class Flattened(jdam.LogSumExp):
    """The same energy, other weights."""

    def weights(self, divergences, log_prior, beta):
        return super().weights(divergences, log_prior, beta / 4)


def test_a_subclass_of_a_separation_weighs_for_itself(rng):
    memory = jdam.store(vectors(rng, 6, 2))
    query, separation = memory[0] + 0.2, Flattened()
    weights = jdam.gibbs_weights(memory, query, 2.0, separation=separation)
    np.testing.assert_allclose(weights, jdam.gibbs_weights(memory, query, 0.5), rtol=1e-12)
    stepped = jdam.step(memory, query, 2.0, separation=separation)
    np.testing.assert_allclose(stepped, weights @ memory.patterns, rtol=1e-12)
    recalled = jdam.recall(memory, query, 2.0, max_steps=1, separation=separation)
    np.testing.assert_allclose(recalled.measure, stepped, rtol=1e-12)
    with pytest.raises(ValueError, match="needs separation=LogSumExp"):
        jdam.recall(memory, query, 2.0, search=jdam.Certified(), separation=separation)
