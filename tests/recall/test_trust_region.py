import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdam._recall.trust_region import ENOUGH, Quadratic, minimise


def quadratic(rng, size, least):
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    curvature = basis @ np.diag(np.linspace(least, 3.0, size)) @ basis.T
    slope, masses = rng.normal(size=size), rng.uniform(0.5, 2, size)
    return Quadratic(jnp.array(slope), lambda s: curvature @ s, jnp.array(masses)), curvature


def value(model, step):
    return model.slope @ step + step @ model.curvature(step) / 2


def length(model, step):
    return np.sqrt(model.masses @ step**2)


def test_convex_within_a_large_radius(rng):
    model, curvature = quadratic(rng, 6, 0.5)
    found = minimise(model, jnp.array(100.0), 50)
    rest = model.slope + curvature @ found.step
    dual = lambda slope: np.sqrt(np.sum(slope**2 / model.masses))  # noqa: E731
    assert dual(rest) <= ENOUGH * dual(model.slope)
    best = value(model, -np.linalg.solve(curvature, model.slope))
    assert value(model, found.step) < 0.98 * best


@pytest.mark.parametrize("least", [0.5, -2.0])
def test_what_is_reported_is_so_and_the_radius_is_kept(rng, least):
    model, _ = quadratic(rng, 6, least)
    for radius in (0.01, 0.3, 1.0, 5.0):
        for most in (1, 2, 6):
            found = minimise(model, jnp.array(radius), most)
            np.testing.assert_allclose(found.decrease, -value(model, found.step), rtol=1e-9)
            np.testing.assert_allclose(found.length, length(model, found.step), rtol=1e-9)
            assert found.length <= radius * (1 + 1e-9)
            if least < 0 and most == 6:  # a negative curvature is followed to the boundary
                np.testing.assert_allclose(found.length, radius, rtol=1e-9)


def test_no_less_than_the_best_along_the_slope(rng):
    model, _ = quadratic(rng, 6, -2.0)
    raised = model.slope / model.masses
    for radius in (0.1, 1.0):
        ts = np.linspace(0, radius / length(model, raised), 200)
        cauchy = min(value(model, -t * raised) for t in ts)
        assert -float(minimise(model, jnp.array(radius), 6).decrease) <= cauchy + 1e-9


def test_massless_coordinates_stay_and_a_zero_slope_takes_no_step(rng):
    model, _ = quadratic(rng, 6, 0.5)
    massless = model._replace(masses=jnp.array(model.masses).at[:2].set(0))
    found = jax.jit(lambda radius: minimise(massless, radius, 6))(jnp.array(1.0))
    assert (found.step[:2] == 0).all()
    assert found.decrease > 0
    flat = minimise(model._replace(slope=jnp.zeros(6)), jnp.array(1.0), 6)
    assert (flat.step == 0).all()
    assert flat.decrease == flat.length == 0
