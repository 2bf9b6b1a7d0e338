"""Separations: against independent oracles, and what every shape of energy must do."""

from functools import partial
from itertools import cycle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import brentq

import jdam
from tests.cases import alike, problem
from tests.helpers import check_derivatives, near, vectors

SEPARATIONS = [jdam.LogSumExp(), jdam.Entmax(1.5), jdam.Entmax(2.0), jdam.Epanechnikov()]
every_separation = pytest.mark.parametrize("separation", SEPARATIONS, ids=str)


def entmax(z, alpha):
    """Its definition, by a root finder."""
    z = (alpha - 1) * (np.asarray(z) - np.max(z))

    def weights(threshold):
        return np.maximum(z - threshold, 0) ** (1 / (alpha - 1))

    threshold = brentq(lambda t: weights(t).sum() - 1, -1, 0, xtol=1e-15)
    return weights(threshold)


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("beta", [1e-3, 1.0, 30.0])
def test_entmax_is_its_definition(rng, alpha, beta):
    distances, prior = rng.uniform(0, 4, size=9), rng.normal(size=9)
    separation = jdam.Entmax(alpha)
    arguments = jnp.asarray(distances), jnp.asarray(prior), jnp.float64(beta)
    weights, energy = separation.weights(*arguments), separation.energy(*arguments)
    z = prior - beta * distances
    expected = entmax(z, alpha)
    np.testing.assert_allclose(weights, expected, atol=1e-12)
    entropy = np.sum(expected - expected**alpha) / (alpha * (alpha - 1))
    np.testing.assert_allclose(energy, -(expected @ z + entropy) / beta, rtol=1e-10)
    # No other point of the simplex does better.
    for other in rng.dirichlet(np.ones(9), size=50):
        entropy = np.sum(other - other**alpha) / (alpha * (alpha - 1))
        assert -(other @ z + entropy) / beta >= energy - 1e-12


def test_sparsemax_is_the_projection_onto_the_simplex(rng):
    distances = jnp.asarray(rng.uniform(0, 2, size=20))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = optax.projections.projection_simplex(-distances)
    found = jdam.Entmax(2.0).weights(distances, None, jnp.float64(1.0))
    np.testing.assert_allclose(found, expected, atol=1e-14)


@pytest.mark.full
def test_entmax_tends_to_the_log_sum_exp(rng):
    distances = jnp.asarray(rng.uniform(0, 2, size=6))
    limit, near_it = jdam.LogSumExp(), jdam.Entmax(1.0001)
    for name in ("energy", "weights"):
        found = [getattr(s, name)(distances, None, jnp.float64(2.0)) for s in (limit, near_it)]
        np.testing.assert_allclose(*found, atol=1e-3)


def test_epanechnikov_is_its_definition(rng):
    distances, prior = rng.uniform(0, 4, size=9), rng.normal(size=9)
    arguments = jnp.asarray(distances), jnp.asarray(prior), jnp.float64(0.8)
    heights = np.maximum(1 - 0.4 * distances, 0)
    energy = -np.log(np.exp(prior) @ heights) / 0.8
    np.testing.assert_allclose(jdam.Epanechnikov().energy(*arguments), energy, rtol=1e-13)
    weights = np.exp(prior) * (heights > 0)
    np.testing.assert_allclose(
        jdam.Epanechnikov().weights(*arguments), weights / weights.sum(), rtol=1e-13
    )


class Power(jdam.Separation):
    """Not a dataclass: two of them are equal only if they are one object."""

    def __init__(self, power):
        self.power = power

    def energy(self, divergences, log_prior, beta):
        return (divergences**self.power).mean()

    def weights(self, divergences, log_prior, beta):
        slopes = divergences ** (self.power - 1)
        return slopes / slopes.sum()


def test_separations_of_other_parameters_are_other_programs():
    distances = np.array([0.25, 0.25, 4.0])
    memory, query = jdam.store(np.array([[0.0], [1.0], [2.5]])), np.array([0.5])
    for power in (1, 3):
        weights = jdam.gibbs_weights(memory, query, 1.0, separation=Power(power))
        expected = distances ** (power - 1)
        np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-12)


@every_separation
def test_slopes_are_weights(rng, separation):
    """∂E/∂Dᵢ ∝ wᵢ, with factor 1 for `LogSumExp` and `Entmax`; both modes, β and prior too."""
    distances, prior = jnp.asarray(rng.uniform(0, 2, size=7)), jnp.asarray(rng.normal(size=7))
    for beta in (jnp.float64(0.7), jnp.float64(1e6)):
        slopes = jax.grad(separation.energy)(distances, prior, beta)
        weights = separation.weights(distances, prior, beta)
        if float(slopes.sum()) > 0:
            np.testing.assert_allclose(slopes / slopes.sum(), weights, atol=1e-12)
    if isinstance(separation, jdam.LogSumExp | jdam.Entmax):
        np.testing.assert_allclose(slopes.sum(), 1, rtol=1e-12)
    for function in (separation.energy, separation.weights):
        point = distances, prior, jnp.float64(0.9)
        check_derivatives(function, point, order=2, rtol=1e-6, eps=1e-6)


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "separation"),
    [
        ("gaussian", jdam.Entmax(1.5)),
        ("diagonal", jdam.Entmax(2.0)),
        ("euclidean", jdam.Entmax(1.5)),
        ("dot product", jdam.Entmax(2.0)),
    ],
    ids=str,
)
def test_a_margin_makes_recall_exact(rng, kind, separation):
    """Beyond the margin 1/((α−1)β) the nearest pattern has weight 1 and is the result."""
    memory, query = problem(rng, kind, off=0.01)
    distances = np.sort(jdam.divergences(memory, query))
    margin = distances[1] - distances[0]
    beta = 1.0001 / ((separation.alpha - 1) * margin)
    weights = jdam.gibbs_weights(memory, query, beta, separation=separation)
    assert float(weights.max()) == 1.0
    assert int((weights > 0).sum()) == 1
    nearest = int(jdam.divergences(memory, query).argmin())
    alike(jdam.step(memory, query, beta, separation=separation), memory[nearest], atol=1e-12)
    weights = jdam.gibbs_weights(memory, query, 0.9 * beta, separation=separation)
    assert int((weights > 0).sum()) > 1


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "separation"),
    [
        *(("gaussian", separation) for separation in SEPARATIONS[1:]),
        ("diagonal", jdam.Entmax(1.5)),
        ("entropic, low rank", jdam.Entmax(2.0)),
        ("euclidean", jdam.Epanechnikov()),
        ("dot product", jdam.Entmax(1.5)),
        ("clouds", jdam.Epanechnikov()),
    ],
    ids=str,
)
def test_energy_falls_along_recall(rng, kind, separation):
    memory, query = problem(rng, kind, off=1.0)
    beta = 1 / max(1.0, float(np.median(jdam.divergences(memory, query))))
    result = jdam.recall(memory, query, beta, separation=separation, max_steps=20, save_trace=True)
    start = jdam.energy(memory, query, beta, separation=separation)
    energies = np.append(start, result.trace.energy)
    assert np.isfinite(energies).all()
    assert (np.diff(energies) <= 1e-12).all()
    assert energies[-1] < energies[0]
    found = jdam.energy(memory, result.measure, beta, separation=separation)
    np.testing.assert_allclose(result.energy, found, rtol=1e-9)
    weights = jdam.gibbs_weights(memory, result.measure, beta, separation=separation)
    np.testing.assert_allclose(result.weight, weights.max(), rtol=1e-9)
    assert float(weights[int(result.nearest)]) == float(weights.max())


@pytest.mark.full
@pytest.mark.parametrize("separation", SEPARATIONS[1:], ids=str)
def test_blocks_change_nothing(rng, separation):
    memory, query = problem(rng, "gaussian")
    whole, other = (
        jdam.recall(
            memory, query, 0.3, separation=separation, search=jdam.Exhaustive(size), max_steps=5
        )
        for size in (None, 3)
    )
    alike(other.measure, whole.measure, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(other.energy, whole.energy, rtol=1e-12)
    assert int(other.nearest) == int(whole.nearest)


@pytest.mark.full
def test_out_of_reach_is_said(rng):
    """In a batch: one query within reach, one outside, one that holds NaN."""
    memory = jdam.store(vectors(rng, 6, 3))
    far = np.full(3, 100.0)
    queries = jnp.stack([memory[2] + 0.01, jnp.asarray(far), jnp.full(3, jnp.nan)])
    lost = {"separation": jdam.Epanechnikov()}
    recall = jax.vmap(lambda q: jdam.recall(memory, q, 5.0, **lost))
    result = recall(queries)
    expected = [jdam.Status.CONVERGED, jdam.Status.OUT_OF_REACH, jdam.Status.NONFINITE]
    assert result.status.tolist() == expected
    np.testing.assert_array_equal(result.measure[1], far)
    assert float(result.energy[1]) == np.inf
    assert int(result.nearest[1]) == int(jdam.divergences(memory, far).argmin())
    assert float(jdam.gibbs_weights(memory, far, 5.0, **lost).sum()) == 0
    np.testing.assert_array_equal(jdam.step(memory, far, 5.0, **lost), far)
    for function in (jdam.energy, jdam.gibbs_weights, jdam.step):
        slopes = jax.jit(jax.jacrev(partial(function, memory, **lost), argnums=(0, 1)))(far, 5.0)
        chex.assert_tree_all_finite(slopes)


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "separation"),
    list(zip(cycle(("gaussian", "diagonal", "euclidean")), SEPARATIONS[1:], strict=False)),
    ids=str,
)
def test_patterns_are_switched_off(rng, kind, separation):
    prior = np.array([0, -np.inf, 0.5, -1, 0, 0, 0])
    memory, query = problem(rng, kind)
    held = jdam.store(memory.patterns, memory.geometry, log_prior=prior)
    rest = jdam.store(memory.remove(1).patterns, memory.geometry, log_prior=np.delete(prior, 1))

    @jax.jit
    def run(memory):
        slope = jax.grad(jdam.energy, 2)(memory, query, 0.3, separation=separation)
        return jdam.gibbs_weights(memory, query, 0.3, separation=separation), slope

    (weights, slope), (expected, other) = run(held), run(rest)
    assert float(weights[1]) == 0
    np.testing.assert_allclose(np.delete(weights, 1), expected, atol=1e-12)
    np.testing.assert_allclose(slope, other, rtol=1e-9)


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "separation"),
    list(zip(cycle(("dot product", "gaussian", "diagonal")), SEPARATIONS, strict=False)),
    ids=str,
)
def test_transformations(rng, kind, separation):
    """jacfwd, jacrev, hessian, vmap(grad) and jit(grad(vmap)) of the energy agree."""
    memory, query = problem(rng, kind)

    def energy(query):
        return jdam.energy(memory, query, 0.2, separation=separation)

    @jax.jit
    def everything(query, queries):
        summed = jax.grad(lambda many: jax.vmap(energy)(many).sum())(queries)
        mapped = jax.vmap(jax.grad(energy))(queries)
        jacobians = jax.jacfwd(energy)(query), jax.jacrev(energy)(query)
        return *jacobians, jax.hessian(energy)(query), mapped, summed

    queries = jax.tree.map(lambda *x: jnp.stack(x), query, near(rng, query, 0.1))
    forward, reverse, hessian, mapped, summed = everything(query, queries)
    alike_leaves(forward, reverse)
    chex.assert_tree_all_finite(hessian)
    alike_leaves(mapped, summed)
    alike_leaves(jax.tree.map(lambda x: x[0], mapped), reverse)


def alike_leaves(first, second):
    chex.assert_trees_all_close(first, second, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("alpha", [1.0, 1.00001, 0.5, float("nan"), float("inf")])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match=r"alpha must be finite and ≥ 1.0001; got"):
        jdam.Entmax(alpha)


def test_bad_separations(rng):
    memory, query = problem(rng, "euclidean")
    with pytest.raises(TypeError, match="alpha must be a number; got '2'"):
        jdam.Entmax("2")
    for function in (jdam.energy, jdam.gibbs_weights, jdam.step, jdam.recall):
        with pytest.raises(TypeError, match="separation must be one of jdam's"):
            function(memory, query, 1.0, separation="softmax")
