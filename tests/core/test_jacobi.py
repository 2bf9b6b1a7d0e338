"""Small decompositions beside NumPy's: any condition, any rank, ties, both precisions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from jdam._core.jacobi import small_polar, small_principal

polar = jax.jit(small_polar)


def rotations(rng, num, dim):
    return np.linalg.qr(rng.normal(size=(num, dim, dim)))[0]


def matrices(rng, dim, num=200):
    """Of conditions 1 (all singular values equal) to 10⁸ and ranks 0 to d, some with zero rows and
    columns."""
    found = [rotations(rng, num, dim), np.zeros((1, dim, dim)), np.eye(dim)[None]]
    for condition in (1, 1e2, 1e4, 1e8):
        values = np.geomspace(1, 1 / condition, dim)
        found.append(values * rotations(rng, num, dim) @ rotations(rng, num, dim))
        found.append(rotations(rng, num, dim) @ (values[:, None] * rotations(rng, num, dim)))
    for rank in range(1, dim):
        columns = rng.normal(size=(2, num, dim, rank))
        found.append(columns[0] @ columns[1].swapaxes(1, 2))
        bases = rotations(rng, num, dim)[:, :, :rank]
        found.append(bases @ bases.swapaxes(1, 2))
        found.append(found[-1] * (np.arange(dim) < rank))
    return np.concatenate(found)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("dim", [1, 2, 3, 4])
@pytest.mark.parametrize("missing", [0, 1])
def test_polar_factors(rng, dim, missing, dtype):
    """R Rᵀ = I and ⟨R, K⟩ = |K|_*, which says that R is a polar factor."""
    if missing == dim:
        pytest.skip("no rows")
    given = matrices(rng, dim)[:, missing:].astype(dtype)
    found = np.asarray(polar(given), float)
    given = given.astype(float)
    accuracy = 20 * np.finfo(dtype).eps
    products = found @ found.swapaxes(1, 2)
    np.testing.assert_allclose(
        products, np.broadcast_to(np.eye(dim - missing), products.shape), atol=accuracy
    )
    wanted = np.linalg.svd(given, compute_uv=False).sum(1)
    np.testing.assert_allclose((found * given).sum((1, 2)), wanted, rtol=accuracy)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_units(rng, scale):
    given = rng.normal(size=(20, 3, 3)).astype(np.float32)
    scaled = polar(given * np.float32(scale))
    np.testing.assert_allclose(scaled, polar(given), atol=1e-5)


def test_nan_stays_where_it_is(rng):
    given = rng.normal(size=(5, 3, 3))
    given[2, 1, 1] = np.nan
    found = np.isnan(polar(given))
    assert found[2].any()
    assert not found[[0, 1, 3, 4]].any()


@pytest.mark.parametrize("shape", [(1, 1), (4, 2), (3, 3), (2, 4), (4, 4), (9, 3)])
def test_principal_axes(rng, shape):
    given = rng.normal(size=shape) * np.geomspace(1, 1e-9, shape[1])
    turned, axes = map(np.asarray, jax.jit(small_principal)(given))
    np.testing.assert_allclose(turned @ axes, given, atol=1e-14)
    np.testing.assert_allclose(axes @ axes.T, np.eye(shape[1]), atol=1e-14)
    sizes = np.linalg.norm(turned, axis=0)
    assert (np.diff(sizes) <= 0).all()
    rank = min(shape)
    np.testing.assert_allclose(sizes[:rank], np.linalg.svd(given, compute_uv=False), rtol=1e-7)
    cosines = (turned.T @ turned)[:rank, :rank] / np.outer(sizes[:rank], sizes[:rank])
    np.testing.assert_allclose(cosines, np.eye(rank), atol=1e-13)
    assert (turned[:, rank:] == 0).all()


@pytest.mark.full
@pytest.mark.parametrize("dim", [2, 4])
def test_a_step_needs_no_lapack(rng, dim):
    patterns = jdam.Gaussian(rng.normal(size=(6, dim)), rng.normal(size=(6, dim, dim)))
    memory = jdam.store(patterns)
    program = jax.jit(jdam.step).lower(memory, patterns[0], jnp.array(1.0)).as_text()
    assert "lapack" not in program
    assert "stablehlo.while" in program
