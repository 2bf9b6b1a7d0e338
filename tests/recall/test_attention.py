"""Hetero-association."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from tests.cases import every_kind_in_full, problem
from tests.helpers import check_derivatives, clouds, diagonals, gaussians, vectors


@every_kind_in_full
def test_arrays_are_averaged(rng, kind):
    memory, query = problem(rng, kind)
    values = rng.normal(size=(7, 2, 3))
    found = jdam.attend(memory, query, 0.4, values)
    weights = jdam.gibbs_weights(memory, query, 0.4)
    np.testing.assert_allclose(found, np.tensordot(weights, values, 1), rtol=1e-12)


def test_gaussians_become_their_barycentre(rng):
    """m = Σ wᵢμᵢ and Ω = Σ wᵢ (Ω^½ Σᵢ Ω^½)^½, under keys of another kind."""
    memory, query = problem(rng, "euclidean")
    values = gaussians(rng, 7, 5)
    found = jdam.attend(memory, query, 0.2, values, num_steps=60)
    weights = np.asarray(jdam.gibbs_weights(memory, query, 0.2))
    assert weights.max() < 0.6
    np.testing.assert_allclose(found.mean, weights @ values.mean, rtol=1e-12)

    def root(a):
        levels, basis = np.linalg.eigh(a)
        return basis * np.sqrt(np.maximum(levels, 0)) @ basis.T

    half = root(np.asarray(found.covariance))
    mixed = sum(w * root(half @ c @ half) for w, c in zip(weights, values.covariance, strict=True))
    np.testing.assert_allclose(found.covariance, mixed, atol=1e-9)


@pytest.mark.full
def test_diagonal_gaussians_need_one_step(rng):
    memory, query = problem(rng, "gaussian")
    values = diagonals(rng, 7, 2)
    found = jdam.attend(memory, query, 0.2, values, num_steps=1)
    weights = jdam.gibbs_weights(memory, query, 0.2)
    np.testing.assert_allclose(found.mean, weights @ values.mean, rtol=1e-12)
    np.testing.assert_allclose(found.scale, weights @ values.scale, rtol=1e-12)


@pytest.mark.full
def test_clouds_become_a_free_support_barycentre(rng):
    """Stationary: the weighted velocity Σ wᵢTᵢ − T₀ vanishes; by a `Memory` or by its geometry."""
    values = clouds(rng, 5, 2, spread=0.1)
    held = jdam.store(values, jdam.Sinkhorn(0.3))
    keys = vectors(rng, 5, 3)
    weights = jdam.gibbs_weights(jdam.store(keys), keys[0], 0.3)
    start = values[int(weights.argmax())]
    found = jdam.attend(jdam.store(keys), keys[0], 0.3, held, num_steps=200)
    assert found.points.shape == start.points.shape

    def objective(cloud):
        return jnp.vdot(weights, jdam.divergences(held, cloud))

    slope = jax.jit(jax.grad(objective))
    assert objective(found) < objective(start)
    before, after = (float(jnp.abs(slope(cloud).points).max()) for cloud in (start, found))
    assert after < 1e-5 < 1e-2 < before
    own = jdam.attend(held, start, 1e-3, list(values))
    np.testing.assert_allclose(own.points, jdam.attend(held, start, 1e-3, held).points, atol=1e-9)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["gaussian", "clouds"])
def test_derivatives(rng, kind):
    """In query, β and values, arrays and measures."""
    memory, query = problem(rng, kind)
    values, shapes = jnp.asarray(rng.normal(size=(7, 2))), diagonals(rng, 7, 2)

    def outputs(shift, beta, values, shapes):
        if kind == "gaussian":
            moved = jdam.Gaussian(query.mean + shift, query.factor)
        else:
            moved = jdam.PointCloud(query.points + shift[None], query.weights)
        return jdam.attend(memory, moved, beta, values), jdam.attend(memory, moved, beta, shapes)

    arguments = jnp.zeros(5), jnp.float64(0.3), values, shapes
    check_derivatives(outputs, arguments, rtol=1e-6)


@pytest.mark.full
def test_batches_and_separations(rng):
    memory, _ = problem(rng, "diagonal")
    queries, values = diagonals(rng, 4, 5), vectors(rng, 7, 2)
    for separation in (jdam.LogSumExp(), jdam.Entmax(2.0), jdam.Epanechnikov()):

        def one(query, separation=separation):
            return jdam.attend(memory, query, 0.3, values, separation=separation)

        many = jax.vmap(one)(queries)
        np.testing.assert_allclose(many[2], one(queries[2]), rtol=1e-10)
    assert many.shape == (4, 2)


def test_nothing_in_reach(rng):
    memory = jdam.store(vectors(rng, 4, 2))
    far, values = np.array([50.0, 0.0]), gaussians(rng, 4, 3)
    nearest = int(jdam.divergences(memory, far).argmin())
    lost = jdam.Epanechnikov()
    assert (jdam.attend(memory, far, 1.0, values.mean, separation=lost) == 0).all()
    found = jdam.attend(memory, far, 1.0, values, separation=lost)
    np.testing.assert_array_equal(found.mean, values.mean[nearest])


@pytest.mark.full
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_is_kept(rng, dtype):
    memory = jdam.store(jnp.asarray(vectors(rng, 4, 2), dtype))
    assert jdam.attend(memory, memory[0], 1.0, jnp.ones((4, 3), dtype)).dtype == dtype
    values = jdam.DiagonalGaussian(jnp.ones((4, 3), dtype), jnp.ones((4, 3), dtype))
    assert jdam.attend(memory, memory[0], 1.0, values).scale.dtype == dtype


def test_bad_values(rng):
    memory, query = problem(rng, "euclidean")
    message = "values must have one entry for each of the 7 patterns; got 6"
    with pytest.raises(ValueError, match=message):
        jdam.attend(memory, query, 1.0, np.ones((6, 2)))
    with pytest.raises(TypeError, match="values must have the dtype of memory, float64"):
        jdam.attend(memory, query, 1.0, np.ones((7, 2), np.float32))
    cure = r"look labels up by memory.values\[result.nearest\], or average a one-hot array"
    with pytest.raises(TypeError, match=f"values must have a floating dtype; got int64: {cure}"):
        jdam.attend(memory, query, 1.0, np.arange(7))
    for labels, got in (
        (np.array(list("abcdefg")), "dtype <U1"),
        (np.array([None] * 7), "dtype object"),
        (["cat"] * 7, "a list of str"),
    ):
        with pytest.raises(
            TypeError, match=f"values must be an array of floats; got {got}: {cure}"
        ):
            jdam.attend(memory, query, 1.0, labels)
    with pytest.raises(ValueError, match="geometry must be given for point clouds"):
        jdam.attend(memory, query, 1.0, clouds(rng, 7, 2))
    with pytest.raises(ValueError, match="num_steps must be ≥ 1; got 0"):
        jdam.attend(memory, query, 1.0, np.ones((7, 2)), num_steps=0)
