"""How recall is differentiated."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from tests.cases import KINDS
from tests.helpers import check_derivatives, clouds, gaussians, near, vectors

ADJOINTS = [jdam.Unrolled(), jdam.Implicit(), jdam.OneStep()]
#: One of each way to move: what they do is told apart by their steps alone.
some_kinds = pytest.mark.parametrize("kind", ["gaussian", "entropic, low rank", "dot product"])


def functional(measure):
    """A number that depends on the measure, not on the factor that represents it."""
    if isinstance(measure, jdam.Gaussian):
        return jnp.sum(measure.covariance**2) + jnp.sum(measure.mean**3)
    if isinstance(measure, jdam.PointCloud):
        return jnp.vdot(measure.weights, jnp.sum(jnp.sin(measure.points), 1))
    return sum(jnp.sum(x**3) for x in jax.tree.leaves(measure))


def loss(adjoint, geometry, query, patterns, beta, log_prior, **settings):
    memory = jdam.store(patterns, geometry, log_prior=log_prior)
    result = jdam.recall(memory, query, beta, adjoint=adjoint, **settings)
    return functional(result.measure) + result.weight + result.energy, result


def gradients(adjoint, geometry, arguments, **settings):
    differentiate = jax.grad(
        partial(loss, adjoint, geometry, **settings), (0, 1, 2, 3), has_aux=True
    )
    return jax.jit(differentiate)(*arguments)


def leaves(tree):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.full
@some_kinds
def test_implicit_is_unrolled_at_convergence(rng, kind):
    make, geometry = KINDS[kind]
    patterns = make(rng, 5, 5)
    query = near(rng, jax.tree.map(lambda x: x[2], patterns), 0.3)
    arguments = query, patterns, 1.3, jnp.asarray(rng.normal(size=5))
    found = {}
    for adjoint in ADJOINTS:
        found[adjoint], result = gradients(adjoint, geometry, arguments, max_steps=200, tol=1e-12)
        assert int(result.status) <= jdam.Status.MIXTURE
    unrolled, implicit, one_step = (leaves(found[adjoint]) for adjoint in ADJOINTS)
    scale = float(abs(unrolled).max())
    np.testing.assert_allclose(implicit, unrolled, atol=1e-8 * scale)
    assert float(abs(one_step - unrolled).max()) > 1e-4 * scale  # β is low: it must differ
    assert float(abs(leaves(found[ADJOINTS[1]][0])).max()) < 1e-8  # the query is forgotten


@pytest.mark.full
@pytest.mark.parametrize("kind", ["gaussian", "dot product"])
def test_one_step_is_right_at_high_beta(rng, kind):
    make, geometry = KINDS[kind]
    patterns = make(rng, 5, 5)
    if kind == "dot product":
        patterns = patterns / np.linalg.norm(patterns, axis=1, keepdims=True)
    query = near(rng, jax.tree.map(lambda x: x[2], patterns), 0.01)
    arguments = query, patterns, 200.0, jnp.zeros(5)
    unrolled, one_step = (
        leaves(gradients(adjoint, geometry, arguments, max_steps=20)[0][1:])
        for adjoint in (ADJOINTS[0], ADJOINTS[2])
    )
    np.testing.assert_allclose(one_step, unrolled, atol=1e-6 * float(abs(unrolled).max()))


@pytest.mark.full
def test_clouds(rng):
    """In points of patterns and β; and in the query's weights, which with κ = 0 recall conserves,
    so that their derivative comes from the query."""
    patterns = clouds(rng, 4, 2, n=4)
    points = near(rng, patterns[2], 0.1).points
    logits, slopes = jnp.log(patterns.weights[2]), rng.normal(size=4)

    def outputs(adjoint, points_of, beta, logits):
        memory = jdam.store(
            jdam.PointCloud(points_of, patterns.weights), jdam.Sinkhorn(0.2, tol=1e-13)
        )
        query = jdam.PointCloud(points, jax.nn.softmax(logits))
        result = jdam.recall(memory, query, beta, adjoint=adjoint, max_steps=300, tol=1e-30)
        return functional(result.measure) + result.measure.weights @ slopes, result

    found = [
        jax.jit(jax.grad(partial(outputs, adjoint), (0, 1, 2), has_aux=True))(
            patterns.points, 0.8, logits
        )
        for adjoint in ADJOINTS[:2]
    ]
    (unrolled, result), (implicit, _) = found
    assert int(result.status) == jdam.Status.STALLED  # as near as rounding lets it
    for x, y in zip(implicit, unrolled, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6 * float(abs(leaves(unrolled)).max()))


@pytest.mark.full
def test_implicit_by_differences(rng):
    """To first order in both modes, and under vmap."""
    patterns, queries = gaussians(rng, 4, 5), gaussians(rng, 3, 5)

    def outputs(patterns, beta):
        memory = jdam.store(patterns)
        recall = partial(jdam.recall, adjoint=jdam.Implicit(), max_steps=300, tol=1e-12)
        result = jax.vmap(recall, (None, 0, None))(memory, queries, beta)
        return jax.vmap(functional)(result.measure), result.energy

    arguments = jax.tree.map(jnp.asarray, patterns), jnp.float64(0.8)
    check_derivatives(outputs, arguments)


@pytest.mark.full
def test_second_derivative_of_implicit(rng):
    """For vectors, where differences of the gradient can tell."""
    patterns, query = jnp.asarray(vectors(rng, 4, 2)), vectors(rng, 1, 2)[0]

    def outputs(patterns):
        memory = jdam.store(patterns)
        recall = partial(jdam.recall, adjoint=jdam.Implicit(), max_steps=300, tol=1e-13)
        return functional(recall(memory, query, 0.5).measure)

    check_derivatives(outputs, (patterns,), order=2, rtol=1e-4, atol=1e-4)


def temporary(adjoint, steps, memory, query):
    def outputs(query, memory):
        recall = partial(jdam.recall, max_steps=steps, adjoint=adjoint)
        return functional(recall(memory, query, 1.0).measure)

    compiled = jax.jit(jax.grad(outputs, (0, 1), allow_int=True)).lower(query, memory).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.full
@pytest.mark.parametrize("adjoint", ADJOINTS[1:], ids=str)
def test_memory_does_not_grow_with_steps(rng, adjoint):
    memory = jdam.store(gaussians(rng, 20, 8))
    few, many = (temporary(adjoint, steps, memory, memory[0]) for steps in (10, 1000))
    assert many <= few
    if adjoint == jdam.OneStep():
        assert temporary(jdam.Unrolled(), 1000, memory, memory[0]) > 10 * many


@pytest.mark.full
def test_memory_of_unrolled_clouds_is_that_of_their_states(rng):
    """Not of the inner solver's iterations: a few copies of measure, pull and potentials a step."""
    patterns = clouds(rng, 6, 2, n=10)
    memory = jdam.store(patterns, jdam.Sinkhorn(0.1))
    assert temporary(jdam.Unrolled(), 1000, memory, patterns[0]) / 1000 < 8 * 8 * (10 * 3 + 6 * 10)


def test_unconverged_is_said(rng):
    memory = jdam.store(gaussians(rng, 4, 3))
    result = jdam.recall(memory, memory[0], 0.1, max_steps=1, adjoint=jdam.Implicit())
    assert int(result.status) == jdam.Status.MAX_STEPS


def test_bad_adjoints(rng):
    memory = jdam.store(vectors(rng, 4, 2))
    with pytest.raises(TypeError, match=r"adjoint must be one of jdam's, as jdam.Unrolled\(\)"):
        jdam.recall(memory, memory[0], 1.0, adjoint="implicit")
    with pytest.raises(ValueError, match="tol must be None or > 0; got 0"):
        jdam.Implicit(tol=0)


class Marked(jdam.Euclidean):
    """Vectors with a label that steps leave as it is."""

    def check(self, name, measure, batch_ndim):
        return measure

    def compare(self, view, patterns):
        points, labels = patterns.measures["x"], patterns.measures["label"]
        found = super().compare(view["x"], jdam.Patterns(points))
        return found._replace(pull={"x": found.pull, "label": 0 * labels})

    def move(self, view, pull, step_size):
        return {"x": super().move(view["x"], pull["x"], step_size), "label": view["label"]}

    def residual(self, view, pull):
        return super().residual(view["x"], pull["x"])

    def gauge(self, measure, tangent):
        return {"x": jnp.zeros_like(tangent["x"]), "label": tangent["label"]}


@pytest.mark.full
def test_implicit_where_a_step_leaves_a_leaf_as_it_is(rng):
    points = rng.normal(size=(4, 2))

    def recalled(points, adjoint):
        memory = jdam.store({"x": points, "label": np.arange(4.0)[:, None]}, Marked())
        query = {"x": points[0] + 0.1, "label": np.ones(1)}
        return jdam.recall(memory, query, 1.0, max_steps=200, adjoint=adjoint).measure["x"].sum()

    slope = jax.jit(jax.grad(recalled), static_argnums=1)
    found = [slope(points, adjoint) for adjoint in ADJOINTS[:2]]
    np.testing.assert_allclose(found[1], found[0], atol=1e-9)


@pytest.mark.full
def test_implicit_in_any_pose(rng):
    """Distances between atoms have the derivative of the steps; motions that are free have none."""
    points = rng.normal(size=(3, 4, 2))
    cue = jdam.PointCloud(points[0] + 0.1 * rng.normal(size=(4, 2)))
    geometry = jdam.Aligned(jdam.Chamfer(0.03, rho=0.5))
    change = rng.normal(size=points.shape)

    def recalled(amount, adjoint):
        memory = jdam.store(jdam.PointCloud(points + amount * change), geometry)
        settings = {"max_steps": 64, "tol": 1e-12, "adjoint": adjoint}
        return jdam.recall(memory, cue, 20.0, **settings).measure.points

    def apart(points):
        return jnp.square(points[:, None] - points[None]).sum(-1)

    ends, tangents = zip(
        *(
            jax.jvp(partial(recalled, adjoint=adjoint), (0.0,), (1.0,))
            for adjoint in (jdam.Unrolled(), jdam.Implicit())
        ),
        strict=True,
    )
    found, expected = (
        jax.jvp(apart, (end,), (tangent,))[1] for end, tangent in zip(ends, tangents, strict=True)
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(tangents[1].sum(0), 0, atol=1e-8)
    centred = np.asarray(ends[1]) - np.asarray(ends[1]).mean(0)
    torque = centred[:, 0] @ tangents[1][:, 1] - centred[:, 1] @ tangents[1][:, 0]
    np.testing.assert_allclose(torque, 0, atol=1e-8)


CALLS: list[int] = []


def counted(x):
    CALLS.append(1)
    return np.zeros_like(x)


class Counted(jdam.Euclidean):
    """Vectors whose comparisons are counted, if their results are used."""

    def compare(self, view, patterns):
        fixed = jax.lax.stop_gradient(view)
        shape = jax.ShapeDtypeStruct(fixed.shape, fixed.dtype)
        zero = jax.pure_callback(counted, shape, fixed, vmap_method="broadcast_all")
        return super().compare(view + zero, patterns)


def calls(function, *args):
    compiled = jax.jit(function).lower(*args).compile()
    CALLS.clear()
    jax.block_until_ready(compiled(*args))
    return len(CALLS)


def test_a_derivative_repeats_each_step_once(rng):
    """However many steps are allowed: those that were not taken cost nothing, in batches too."""
    memory = jdam.store(jnp.asarray(vectors(rng, 4, 3)), Counted())
    queries = jnp.asarray(near(rng, memory.patterns, 0.5))
    recall = partial(jdam.recall, memory, beta=3.0, max_steps=64)
    slope = jax.grad(lambda query: recall(query).measure.sum())
    taken = jax.vmap(recall)(queries).num_steps
    one, most = int(taken[0]), int(taken.max())
    assert one > 1
    assert most < 32
    assert calls(recall, queries[0]) == one + 1
    assert calls(slope, queries[0]) == 2 * (one + 1)
    assert calls(jax.vmap(slope), queries) == 2 * (most + 1)
