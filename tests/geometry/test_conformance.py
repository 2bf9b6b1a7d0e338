"""What every geometry must do, run over every kind of memory."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from tests.cases import (
    KINDS,
    alike,
    all_of,
    close,
    every_kind,
    gaussians_and_clouds,
    metric_kinds,
    only_full,
    problem,
    quick_kinds,
    some_and_clouds,
)
from tests.helpers import (
    check_derivatives,
    log_sum_exp_energy,
    near,
    vectors,
)


@every_kind
def test_energy_and_weights_are_the_log_sum_exp(rng, kind):
    memory, query = problem(rng, kind)
    prior = np.array([0, -1, 0.5, -np.inf, 2, 0, 0.0])
    divergences = [float(x) for x in jdam.divergences(memory, query)]
    for log_prior in (None, prior) if kind != "clouds" else (prior,):
        held = jdam.store(memory.patterns, memory.geometry, log_prior=log_prior)
        for beta in (1e-6, 1e-2, 1.0, 30.0, 1e6):
            energy, weights = log_sum_exp_energy(
                divergences, beta, 0.0 if log_prior is None else log_prior
            )
            np.testing.assert_allclose(jdam.energy(held, query, beta), energy, rtol=1e-9)
            np.testing.assert_allclose(
                jdam.gibbs_weights(held, query, beta), weights, rtol=1e-9, atol=1e-300
            )


@pytest.mark.full
@gaussians_and_clouds
@pytest.mark.parametrize("beta", [1e-6, 1.0, 1e6])
def test_duplicated_patterns_share_their_weight(rng, kind, beta):
    memory, query = problem(rng, kind)
    doubled = memory.append(memory.patterns)
    (_, _, once, stepped), (_, _, twice, other) = (
        all_of(m, query, beta) for m in (memory, doubled)
    )
    np.testing.assert_allclose(twice[:7], once / 2, rtol=1e-9)
    np.testing.assert_allclose(twice[7:], once / 2, rtol=1e-9)
    alike(other, stepped, rtol=1e-9, atol=1e-12)


@metric_kinds
def test_one_pattern_is_recalled_in_one_step(rng, kind):
    make, geometry = KINDS[kind]
    memory = jdam.store(make(rng, 1, 5), geometry)
    query = make(rng, 1, 5)[0]
    result = jdam.recall(memory, query, 0.1)
    assert int(result.num_steps) == 1
    assert int(result.status) == jdam.Status.CONVERGED
    assert float(result.weight) == 1.0
    alike(result.measure, memory[0], atol=1e-12)


@metric_kinds
def test_far_query_is_recalled(rng, kind):
    """At distance 1e4 with β = 1e4, βD ≈ 1e12: the softmax must not overflow."""
    memory, _ = problem(rng, kind)
    query = jax.tree.map(lambda x: 1e4 + x, memory[2])
    result = jdam.recall(memory, query, 1e4)
    assert int(result.status) == jdam.Status.CONVERGED
    far = np.asarray(jdam.divergences(memory, query))
    alike(jdam.step(memory, query, 1e4), memory[int(far.argmin())], atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("gaussian", np.float32), ("gaussian", np.float64), ("euclidean", np.float32)],
)
def test_softmax_of_huge_logits(rng, kind, dtype):
    """βD up to 1e20: the top must weigh 1 exactly, whatever the rounding of βD."""
    make, geometry = KINDS[kind]
    memory = jdam.store(make(rng, 50, 4, dtype=dtype), geometry)
    offsets = np.array([1e2, 1e4, 1e6], dtype)
    queries = jax.tree.map(
        lambda x: (offsets.reshape(3, *[1] * (x.ndim - 1)) + x[:3]).astype(dtype), memory.patterns
    )

    def everything(memory, query, beta):
        slope = jax.grad(jdam.energy, argnums=1)(memory, query, beta)
        return *all_of(memory, query, beta), slope, jdam.recall(memory, query, beta).status

    run = jax.jit(jax.vmap(everything, (None, 0, None)))
    for beta in (1e3, 1e6):
        found = run(memory, queries, beta)
        chex.assert_tree_all_finite(found)
        distances, energies, weights, _, _, status = found
        assert (weights <= 1).all()
        np.testing.assert_allclose(energies, distances.min(1), rtol=1e-5)
        assert (status <= jdam.Status.MIXTURE).all()


@pytest.mark.full
@pytest.mark.parametrize("kind", ["diagonal", "euclidean"])
def test_distant_clusters_in_single_precision(rng, kind):
    """Two clusters 2000 apart and 0.1 wide: |x|² + |y|² − 2xy has no digits left for them."""
    make, geometry = KINDS[kind]
    patterns = jax.tree.map(lambda x: np.float32(0.1) * x, make(rng, 400, 4, dtype=np.float32))
    shift = np.where(np.arange(400) < 200, 0.0, 2000.0).astype(np.float32)[:, None]
    patterns = (
        patterns + shift
        if kind == "euclidean"
        else jdam.DiagonalGaussian(patterns.mean + shift, patterns.scale)
    )
    memory = jdam.store(patterns, geometry)
    result = jax.vmap(jdam.recall, (None, 0, None))(memory, patterns, 1e4)
    np.testing.assert_array_equal(result.nearest, np.arange(400))
    query = jax.tree.map(lambda x: x[7], patterns)
    exact = jnp.asarray(jdam.divergences(memory, query), jnp.float64)
    expected = -jax.scipy.special.logsumexp(-10.0 * exact) / 10.0
    np.testing.assert_allclose(jdam.energy(memory, query, 10.0), expected, rtol=1e-5)


@pytest.mark.full
@gaussians_and_clouds
def test_constants_inside_jit(rng, kind):
    """Concrete arrays closed over by a traced function are checked as usual."""
    memory, query = problem(rng, kind)
    patterns, geometry = jax.tree.map(jnp.asarray, (memory.patterns, memory.geometry))

    @jax.jit
    def energy(beta):
        return jdam.energy(jdam.store(patterns, geometry, log_prior=jnp.zeros(7)), query, beta)

    np.testing.assert_allclose(energy(1.0), jdam.energy(memory, query, 1.0), rtol=1e-12)


@every_kind
def test_batch_of_no_queries(rng, kind):
    memory, _ = problem(rng, kind)
    nobody = jax.tree.map(lambda x: x[:0], memory.patterns)
    assert jax.vmap(jdam.recall, (None, 0, None))(memory, nobody, 1.0).status.shape == (0,)


@every_kind
def test_recall_reports_on_what_it_returns(rng, kind):
    memory, query = problem(rng, kind)
    result = jdam.recall(memory, query, 2.0, max_steps=3, save_trace=True)
    _, energy, weights, _ = all_of(memory, result.measure, 2.0)
    assert int(result.nearest) == int(weights.argmax())
    np.testing.assert_allclose(result.weight, weights.max(), rtol=1e-9)
    np.testing.assert_allclose(result.energy, energy, rtol=1e-9)
    stepped = query
    for t in range(3):
        stepped = all_of(memory, stepped, 2.0)[3]
        if t < int(result.num_steps):
            alike(jax.tree.map(lambda x, t=t: x[t], result.trace.measure), stepped, atol=1e-9)
            expected = all_of(memory, stepped, 2.0)[1]
            np.testing.assert_allclose(result.trace.energy[t], expected, rtol=1e-9, atol=1e-12)
    assert result.trace.energy[-1] == result.energy
    assert result.trace.residual[-1] == result.residual
    assert float(result.neglected) == 0.0


@every_kind
def test_energy_falls_along_recall(rng, kind):
    memory, query = problem(rng, kind, off=1.0)
    for step_size in (0.3, 1.0):
        result = jdam.recall(memory, query, 0.7, step_size=step_size, save_trace=True)
        energies = np.append(all_of(memory, query, 0.7)[1], result.trace.energy)
        assert (np.diff(energies) <= 1e-12).all()


def plainly(recall, kind):
    """Recall of clouds by plain steps: accelerated ones stop where the inner solver's error, which
    depends on what it starts from, is magnified some 50 times."""
    return partial(recall, acceleration=None) if kind == "clouds" else recall


@pytest.mark.full
@some_and_clouds
def test_vmap_over_queries_and_betas_is_a_loop(rng, kind):
    make, _ = KINDS[kind]
    memory, _ = problem(rng, kind)
    queries = make(rng, 3, 5)
    betas = np.array([0.2, 5.0])
    recall = plainly(jdam.recall, kind)
    over_queries = jax.vmap(recall, (None, 0, None))
    grid = jax.jit(jax.vmap(over_queries, (None, None, 0)))(memory, queries, betas)
    for b, beta in enumerate(betas):
        for q in range(3):
            one = recall(memory, jax.tree.map(lambda x, q=q: x[q], queries), beta)
            batched = jax.tree.map(lambda x, b=b, q=q: x[b, q], grid)
            assert int(batched.status) == int(one.status)
            assert int(batched.num_steps) == int(one.num_steps)
            assert int(batched.nearest) == int(one.nearest)
            close(batched.energy, one.energy, rtol=1e-9, atol=1e-11)
            alike(batched.measure, one.measure, rtol=1e-8, atol=1e-10)
    many = jax.vmap(all_of, (None, 0, None))(memory, queries, 0.7)
    one = all_of(memory, jax.tree.map(lambda x: x[2], queries), 0.7)
    for x, y in zip(jax.tree.map(lambda x: x[2], many), one, strict=True):
        alike(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.full
@gaussians_and_clouds
def test_vmap_over_memories(rng, kind):
    make, geometry = KINDS[kind]
    patterns = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), make(rng, 8, 5))
    query = make(rng, 1, 5)[0]
    recall = plainly(jdam.recall, kind)
    energies = jax.vmap(lambda p: recall(jdam.store(p, geometry), query, 1.0).energy)(patterns)
    for i in range(2):
        memory = jdam.store(jax.tree.map(lambda x, i=i: x[i], patterns), geometry)
        np.testing.assert_allclose(energies[i], recall(memory, query, 1.0).energy, rtol=1e-9)


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "num", "steps"), [("gaussian", 1000, 50), ("clouds", 40, 3), ("one-sided", 40, 50)]
)
def test_one_bad_query_among_many(rng, kind, num, steps):
    make, _ = KINDS[kind]
    memory, _ = problem(rng, kind)
    queries, bad_one = make(rng, num, 5), num - 7
    spoiled = jax.tree.map(lambda x: jnp.asarray(x).at[bad_one].set(jnp.nan), queries)
    recall = jax.jit(jax.vmap(partial(jdam.recall, max_steps=steps), (None, 0, None)))
    good, bad = recall(memory, queries, 2.0), recall(memory, spoiled, 2.0)
    status = np.asarray(bad.status)
    assert np.flatnonzero(status == jdam.Status.NONFINITE).tolist() == [bad_one]
    keep = np.arange(num) != bad_one
    close(
        jax.tree.map(lambda x: x[keep], bad), jax.tree.map(lambda x: x[keep], good), rtol=0, atol=0
    )


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "sizes"), [("gaussian", (1, 3, 100)), ("clouds", (3,)), ("one-sided", (3,))]
)
def test_block_size_changes_nothing(rng, kind, sizes):
    memory, query = problem(rng, kind, num=7)
    results = [
        jdam.recall(memory, query, 0.8, search=jdam.Exhaustive(block_size=b))
        for b in (None, *sizes)
    ]
    for other in results[1:]:
        assert int(other.nearest) == int(results[0].nearest)
        np.testing.assert_allclose(other.energy, results[0].energy, rtol=1e-12)
        alike(other.measure, results[0].measure, rtol=1e-9, atol=1e-10)


#: Whose second derivatives the tests of their geometries do not compare with differences.
TWICE = [(kind, 2) for kind in ("low rank", "entropic, low rank", "dot product")]


@pytest.mark.parametrize(
    ("kind", "order"), [*((kind, 1) for kind in quick_kinds.args[1]), *only_full(*TWICE)]
)
def test_gradient_of_energy_by_differences(rng, kind, order):
    """In query, patterns, β and prior, forward and reverse."""
    make, geometry = KINDS[kind]
    patterns, query = make(rng, 5, 5), near(rng, make(rng, 1, 5)[0], 0.1)
    arguments = (query, patterns, 0.8, rng.normal(size=5))
    arguments = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arguments)

    def energy(query, patterns, beta, log_prior):
        return jdam.energy(jdam.store(patterns, geometry, log_prior=log_prior), query, beta)

    check_derivatives(energy, arguments, order=order)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["gaussian", "euclidean"])
def test_gradient_of_recall_by_differences(rng, kind):
    """Of a loss of the measure recalled, through steps not yet converged, in query and β."""
    memory, query = problem(rng, kind, off=0.5)
    query = jax.tree.map(jnp.asarray, query)

    def loss(query, beta):
        result = jdam.recall(memory, query, beta, max_steps=3, tol=1e-30)
        measure = result.measure
        if isinstance(measure, jdam.Gaussian):
            return jnp.sum(measure.covariance**2) + jnp.sum(measure.mean**3)
        return sum(jnp.sum(x**3) for x in jax.tree.leaves(measure))

    check_derivatives(loss, (query, jnp.float64(0.5)), rtol=1e-6, eps=1e-6)
    batch = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), query)
    summed = jax.grad(lambda qs: jax.vmap(loss, (0, None))(qs, 0.5).sum())
    single = jax.jit(jax.grad(loss))(jax.tree.map(lambda x: x[1], batch), 0.5)
    close(jax.tree.map(lambda x: x[1], jax.jit(summed)(batch)), single, rtol=1e-8, atol=1e-10)


class Counting(jdam.Euclidean):
    """Counts how often it is traced."""

    def compare(self, view, patterns):
        COUNT.append(1)
        return super().compare(view, patterns)


COUNT: list[int] = []


def test_new_values_do_not_recompile(rng):
    """β, step size, tolerance, prior and data of the same shape are traced, floats or arrays."""
    patterns = vectors(rng, 6, 3)

    def everything(beta, step_size, tol, shift):
        memory = jdam.store(patterns + shift, Counting(), log_prior=shift * np.arange(6.0))
        query = patterns[0] + 2 * shift
        jdam.energy(memory, query, beta)
        jdam.gibbs_weights(memory, query, beta)
        jdam.step(memory, query, beta, step_size)
        jdam.recall(memory, query, beta, step_size=step_size, tol=tol)

    everything(1.0, 1.0, 1e-3, 0.1)
    traced = len(COUNT)
    assert traced > 0
    everything(2, 0.5, 1e-5, 0.2)
    everything(np.float32(3), np.float64(0.7), jnp.float32(1e-2), 0.3)
    everything(jnp.float64(4), jnp.asarray(0.2), 1e-1, 0.4)
    assert len(COUNT) == traced


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("gaussian", jnp.float32),
        ("gaussian", jnp.bfloat16),
        ("entropic, low rank", jnp.bfloat16),
        ("euclidean", jnp.float16),
    ],
)
def test_dtype_is_kept(rng, kind, dtype):
    memory, query = problem(rng, kind)
    cast = partial(jax.tree.map, lambda x: jnp.asarray(x).astype(dtype))
    memory, query = jdam.store(cast(memory.patterns), memory.geometry), cast(query)
    result = jdam.recall(memory, query, 3.0, save_trace=True)
    outputs = (
        jdam.divergences(memory, query),
        jdam.energy(memory, query, 3.0),
        jdam.gibbs_weights(memory, query, 3),
        jdam.step(memory, query, np.float64(3.0)),
        result,
    )
    for leaf in jax.tree.leaves(outputs):
        assert leaf.dtype in (dtype, jnp.int32)
    assert result.status in (jdam.Status.CONVERGED, jdam.Status.MIXTURE)


@pytest.mark.full
@quick_kinds
def test_single_precision_follows_double(rng, kind):
    memory, query = problem(rng, kind)
    cast = partial(jax.tree.map, lambda x: jnp.asarray(x).astype(jnp.float32))
    low = jdam.store(cast(memory.patterns), memory.geometry)
    singles, doubles = all_of(low, cast(query), 1.5), all_of(memory, query, 1.5)
    for single, double in zip(singles[1:], doubles[1:], strict=True):
        alike(single, double, rtol=2e-4, atol=2e-5)


@some_and_clouds
@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_beta(rng, kind, beta):
    memory, query = problem(rng, kind)
    for function in (jdam.energy, jdam.gibbs_weights, jdam.step, jdam.recall):
        with pytest.raises(ValueError, match=r"beta must be finite and > 0; got"):
            function(memory, query, beta)
    traced = jax.jit(jdam.recall)(memory, query, beta)
    if beta != float("inf"):
        assert int(traced.status) == jdam.Status.NONFINITE
