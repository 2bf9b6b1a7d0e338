"""Accelerated recalls end where plain ones do, in fewer steps and at no higher energy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from jdam._recall.acceleration import ENOUGH, minimise
from tests.cases import KINDS, alike, every_kind_in_full, problem
from tests.helpers import check_derivatives, gaussians


@pytest.mark.full
@every_kind_in_full
def test_ends_where_plain_steps_end(rng, kind):
    memory, query = problem(rng, kind)
    beta = 3.0
    plain = jdam.recall(memory, query, beta, max_steps=600, tol=1e-6)
    faster = jdam.TrustRegion(16) if kind == "clouds" else jdam.Anderson(2)
    fast = jdam.recall(memory, query, beta, max_steps=600, tol=1e-6, acceleration=faster)
    assert int(fast.status) == int(plain.status)
    assert fast.residual <= 1e-6
    assert int(fast.nearest) == int(plain.nearest)
    assert fast.energy <= plain.energy + 1e-10
    assert fast.num_steps <= plain.num_steps + 2  # where few are needed, none are saved
    alike(fast.measure, plain.measure, atol=3e-3 if kind in ("clouds", "one-sided") else 3e-5)


def near_the_transition(rng, dtype=np.float64):
    """Gaussians at a β at which patterns begin to part, and queries near them."""
    patterns = gaussians(rng, 24, 5, dtype=dtype)
    memory = jdam.store(patterns)
    beta = 0.3 * jdam.suggest_beta(memory)
    off = rng.normal(scale=0.3, size=patterns.mean.shape).astype(dtype)
    return memory, jdam.Gaussian(patterns.mean + off, patterns.factor), beta


@pytest.mark.full
def test_gaussians_near_the_transition(rng):
    memory, queries, beta = near_the_transition(rng)
    plain, fast = (
        jdam.recall_batch(memory, queries, beta, max_steps=400, tol=1e-9, acceleration=acceleration)
        for acceleration in (None, jdam.Anderson())
    )
    assert (fast.status == plain.status).all()
    assert (fast.energy <= plain.energy + 1e-12).all()
    assert plain.num_steps.mean() > 10
    assert fast.num_steps.mean() < 0.5 * plain.num_steps.mean()
    assert (fast.num_steps <= plain.num_steps).all()


@pytest.mark.full
def test_energies_never_rise_and_a_batch_is_its_queries(rng):
    memory, queries, beta = near_the_transition(rng)
    kwargs = {"max_steps": 30, "tol": 1e-9, "acceleration": jdam.Anderson(), "save_trace": True}
    batch = jax.vmap(lambda q: jdam.recall(memory, q, beta, **kwargs))(queries)
    assert (np.diff(batch.trace.energy, axis=1) <= 1e-13).all()
    for i in (0, 7):
        one = jdam.recall(memory, queries[i], beta, **kwargs)
        assert int(one.num_steps) == int(batch.num_steps[i])
        np.testing.assert_allclose(one.energy, batch.energy[i], rtol=1e-12)


@pytest.mark.full
def test_rotating_a_factor_changes_nothing(rng):
    memory, queries, beta = near_the_transition(rng)
    query = queries[3]
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    turned = jdam.Gaussian(query.mean, query.factor @ turn)
    first, second = (
        jdam.recall(memory, q, beta, acceleration=jdam.Anderson()) for q in (query, turned)
    )
    assert int(first.num_steps) == int(second.num_steps)
    alike(first.measure, second.measure, rtol=1e-9, atol=1e-11)


@pytest.mark.full
def test_single_precision(rng):
    memory, queries, beta = near_the_transition(rng, np.float32)
    fast = jdam.recall_batch(memory, queries, beta, max_steps=100, acceleration=jdam.Anderson())
    assert fast.measure.mean.dtype == fast.energy.dtype == jnp.float32
    assert np.isin(fast.status, (jdam.Status.CONVERGED, jdam.Status.MIXTURE)).all()


@pytest.mark.full
def test_derivatives_of_gaussians(rng):
    memory, queries, beta = near_the_transition(rng)

    def loss(beta, adjoint):
        found = jdam.recall(
            memory,
            queries[3],
            beta,
            max_steps=40,
            tol=1e-11,
            acceleration=jdam.Anderson(),
            adjoint=adjoint,
        )
        return jnp.sum(found.measure.mean**2) + jnp.trace(found.measure.covariance)

    slope = jax.jit(jax.grad(loss), static_argnums=1)
    slopes = [slope(beta, adjoint) for adjoint in (jdam.Unrolled(), jdam.Implicit())]
    h = 1e-4 * beta
    numeric = (loss(beta + h, jdam.Unrolled()) - loss(beta - h, jdam.Unrolled())) / (2 * h)
    np.testing.assert_allclose(slopes, numeric, rtol=1e-5)


@pytest.fixture(scope="module")
def stiff():
    """Clouds of which atoms are placed slowly, without and with reweighting."""
    rng = np.random.default_rng(5)
    points = rng.normal(size=(4, 1, 2)) + rng.normal(size=(4, 8, 2))
    queries = jdam.PointCloud(points + rng.normal(scale=0.2, size=points.shape))
    return jdam.PointCloud(points), queries


@pytest.mark.full
@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_clouds(stiff, kappa):
    patterns, queries = stiff
    memory = jdam.store(patterns, jdam.Sinkhorn(0.2, hellinger_scale=kappa))

    def run(acceleration, most):
        return jdam.recall_batch(
            memory, queries, 30.0, tol=1e-6, max_steps=most, acceleration=acceleration
        )

    plain, fast = run(None, 256), run(jdam.TrustRegion(), 200)
    assert (fast.status == jdam.Status.CONVERGED).all()
    assert (fast.nearest == plain.nearest).all()
    assert (fast.energy <= plain.energy + 1e-12).all()
    assert np.median(fast.num_steps) < 0.2 * np.median(plain.num_steps)
    assert (plain.num_steps > 100).any()
    np.testing.assert_allclose(fast.measure.weights.sum(1), 1, rtol=1e-12)
    if kappa == 0:
        np.testing.assert_array_equal(fast.measure.weights, queries.weights)


@pytest.mark.full
def test_derivatives_of_clouds_are_implicit(stiff):
    patterns, queries = stiff

    def loss(epsilon, adjoint):
        changed = jdam.store(patterns, jdam.Sinkhorn(epsilon))
        found = jdam.recall(
            changed,
            queries[0],
            3.0,
            tol=1e-9,
            max_steps=60,
            adjoint=adjoint,
            acceleration=jdam.TrustRegion(8),
        )
        return found.energy

    with pytest.raises(ValueError, match=r"adjoint=jdam\.Implicit\(\)"):
        jax.grad(loss)(0.2, jdam.Unrolled())
    slope = jax.jit(jax.grad(loss), static_argnums=1)(0.2, jdam.OneStep())
    h = 1e-5
    numeric = (loss(0.2 + h, jdam.OneStep()) - loss(0.2 - h, jdam.OneStep())) / (2 * h)
    np.testing.assert_allclose(slope, numeric, rtol=1e-4)  # an envelope: dE/dξ is 0


def test_arguments(rng):
    memory, query = problem(rng, "euclidean")
    for wrong in (3, True, "fast"):
        with pytest.raises(TypeError, match="acceleration must be jdam.Anderson"):
            jdam.recall(memory, query, 1.0, acceleration=wrong)
    with pytest.raises(ValueError, match="needs a geometry with a retraction"):
        jdam.recall(memory, query, 1.0, acceleration=jdam.TrustRegion())
    with pytest.raises(ValueError, match="depth must be ≥ 1"):
        jdam.Anderson(0)
    with pytest.raises(TypeError, match="delay must be an int"):
        jdam.Anderson(3, delay=1.5)
    with pytest.raises(ValueError, match="max_products must be ≥ 1"):
        jdam.TrustRegion(0)


def test_kinds_choose(rng):
    """Newton steps are for clouds; what comes from outside needs no more than it has."""
    retraction = jdam.Geometry.retraction
    smooth = {
        kind for kind, (_, geometry) in KINDS.items() if type(geometry).retraction is not retraction
    }
    assert smooth == {"clouds"}


def quadratic(rng, size, least):
    """The slope and the curvature of a model, and the masses of its norm."""
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    matrix = basis @ np.diag(np.linspace(least, 3.0, size)) @ basis.T
    slope, masses = rng.normal(size=size), rng.uniform(0.5, 2, size)
    return jnp.array(slope), lambda s: matrix @ s, jnp.array(masses)


def value(model, step):
    slope, curvature, _ = model
    return slope @ step + step @ curvature(step) / 2


def length(model, step):
    return np.sqrt(model[2] @ step**2)


def test_convex_within_a_large_radius(rng):
    model = slope, curvature, masses = quadratic(rng, 6, 0.5)
    found = minimise(*model, jnp.array(100.0), 50)
    dual = lambda slope: np.sqrt(np.sum(slope**2 / masses))  # noqa: E731
    assert dual(slope + curvature(found.step)) <= ENOUGH * dual(slope)
    best = value(model, -np.linalg.solve(curvature(np.eye(6)), slope))
    assert value(model, found.step) < 0.98 * best


@pytest.mark.parametrize("least", [0.5, -2.0])
def test_what_is_reported_is_so_and_the_radius_is_kept(rng, least):
    model = quadratic(rng, 6, least)
    for radius in (0.01, 0.3, 1.0, 5.0):
        for most in (1, 2, 6):
            found = minimise(*model, jnp.array(radius), most)
            np.testing.assert_allclose(found.decrease, -value(model, found.step), rtol=1e-9)
            np.testing.assert_allclose(found.length, length(model, found.step), rtol=1e-9)
            assert found.length <= radius * (1 + 1e-9)
            if least < 0 and most == 6:  # a negative curvature is followed to the boundary
                np.testing.assert_allclose(found.length, radius, rtol=1e-9)


def test_no_less_than_the_best_along_the_slope(rng):
    model = slope, _, masses = quadratic(rng, 6, -2.0)
    raised = slope / masses
    for radius in (0.1, 1.0):
        ts = np.linspace(0, radius / length(model, raised), 200)
        cauchy = min(value(model, -t * raised) for t in ts)
        assert -float(minimise(*model, jnp.array(radius), 6).decrease) <= cauchy + 1e-9


def test_massless_coordinates_stay_and_a_zero_slope_takes_no_step(rng):
    slope, curvature, masses = quadratic(rng, 6, 0.5)
    masses = masses.at[:2].set(0)
    found = jax.jit(lambda radius: minimise(slope, curvature, masses, radius, 6))(jnp.array(1.0))
    assert (found.step[:2] == 0).all()
    assert found.decrease > 0
    flat = minimise(jnp.zeros(6), curvature, masses, jnp.array(1.0), 6)
    assert (flat.step == 0).all()
    assert flat.decrease == flat.length == 0


@pytest.mark.full
def test_derivatives_of_clouds_whose_weights_change(rng):
    """The masses in which steps are combined depend on the weights and on κ."""
    points = rng.normal(size=(3, 4, 2))
    cue = jdam.PointCloud(points[0] + 0.1 * rng.normal(size=(4, 2)), np.array([0.1, 0.2, 0.3, 0.4]))
    change = np.array([0.1, -0.1, 0.05, -0.05])

    def energy(amount, kappa):
        memory = jdam.store(
            jdam.PointCloud(points), jdam.Chamfer(0.3, rho=2.0, hellinger_scale=kappa)
        )
        query = jdam.PointCloud(cue.points, cue.weights + amount * change)
        result = jdam.recall(memory, query, 2.0, max_steps=3, acceleration=jdam.Anderson(3))
        return result.energy

    check_derivatives(energy, (jnp.zeros(()), jnp.asarray(0.2)))
