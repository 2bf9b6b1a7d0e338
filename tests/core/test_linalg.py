import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jdam._core.linalg import (
    long_products,
    long_sum,
    long_vecdot,
    polar,
    psd_root,
    safe_sqrt,
    shrink,
    shrunk_polar,
)
from tests.helpers import check_derivatives, orthogonal


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (2, 4), (5, 5)])
def test_polar_against_scipy(rng, shape):
    matrix = rng.normal(size=shape)
    expected, _ = scipy.linalg.polar(matrix, side="left")
    np.testing.assert_allclose(polar(jnp.asarray(matrix)), expected, atol=1e-12)


@pytest.mark.full
@pytest.mark.parametrize("shape", [(3, 3), (2, 4)])
def test_polar_derivatives(rng, shape):
    matrix = jnp.asarray(rng.normal(size=shape))
    check_derivatives(polar, (matrix,), order=2, rtol=1e-4, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("values", [[1, 1, 1], [2, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
def test_derivatives_at_repeated_and_vanishing_singular_values(rng, values):
    matrix = jnp.asarray(orthogonal(rng, 3) * np.array(values, float) @ orthogonal(rng, 3))
    if min(values) > 0:
        check_derivatives(polar, (matrix,), order=2, rtol=1e-4, atol=1e-4)
    semidefinite = matrix @ matrix.T
    for function, at in ((polar, matrix), (psd_root, semidefinite)):
        first = jax.jit(jax.jacrev(function))(at)
        second = jax.jit(jax.jacfwd(jax.jacrev(function)))(at)
        assert np.isfinite(first).all()
        assert np.isfinite(second).all()


def shrunk_factor(matrix):
    return shrunk_polar(matrix).factor


@pytest.mark.full
@pytest.mark.parametrize(("shape", "scale"), [((1, 1), 0.1), ((3, 3), 1.0), ((2, 4), 30.0)])
def test_shrunk_polar(rng, shape, scale):
    """(H + I) R = 2K with H = (4KKᵀ + I)^½; it tends to the polar factor, and near 0 to K."""
    matrix = jnp.asarray(rng.normal(size=shape))
    root = scipy.linalg.sqrtm(4 * matrix @ matrix.T + np.eye(shape[0]))
    expected = np.linalg.solve(root + np.eye(shape[0]), 2 * matrix)
    np.testing.assert_allclose(shrunk_factor(matrix), expected, atol=1e-12)
    np.testing.assert_allclose(shrunk_factor(1e8 * matrix), polar(matrix), atol=1e-6)
    np.testing.assert_allclose(shrunk_factor(1e-5 * matrix), 1e-5 * matrix, rtol=1e-8)
    check_derivatives(shrunk_factor, (scale * matrix,), order=2, rtol=1e-4, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize(
    ("values", "columns"),
    [([1, 1, 1], 3), ([1, 1, 0], 5), ([1, 0, 0], 3), ([0, 0, 0], 3), ([0, 0, 0], 5)],
)
def test_derivatives_of_shrunk_polar_at_repeated_singular_values(rng, values, columns):
    right = orthogonal(rng, columns)[:3]
    matrix = jnp.asarray(orthogonal(rng, 3) * np.array(values, float) @ right)
    check_derivatives(shrunk_factor, (matrix,), order=2, rtol=1e-4, atol=1e-4)


def test_shrink():
    values = jnp.array([0.0, 1e-300, 0.3, 7.0, 1e200])
    shrunk = shrink(values)
    np.testing.assert_allclose(shrunk[:4], values[:4] * (1 - shrunk[:4] ** 2), rtol=1e-12)
    assert shrunk[4] == 1
    check_derivatives(shrink, (values[2:4],), order=3)
    assert float(jax.grad(shrink)(0.0)) == 1.0


def test_root(rng):
    a = rng.normal(size=(2, 4, 4))
    a = a @ np.swapaxes(a, -1, -2)
    root = psd_root(jnp.asarray(a))
    np.testing.assert_allclose(root @ root, a, atol=1e-12)
    np.testing.assert_allclose(root[0], scipy.linalg.sqrtm(a[0]), atol=1e-10)

    def symmetric_root(x):
        return psd_root((x + x.mT) / 2)

    check_derivatives(symmetric_root, (jnp.asarray(a),), order=2, rtol=1e-4)


def test_safe_sqrt():
    np.testing.assert_array_equal(safe_sqrt(jnp.array([0.0, 4.0])), [0.0, 2.0])
    assert float(jax.grad(safe_sqrt)(0.0)) == 0.0
    assert np.isnan(safe_sqrt(jnp.array(-1.0)))


@pytest.mark.full
@pytest.mark.parametrize("num", [7, 600, 70_000, 600_000])
def test_long_sums_keep_their_digits(rng, num):
    """As those of NumPy, which are pairwise, of numbers whose sum does not cancel."""
    x, y = (rng.random((3, num)).astype(np.float32) for _ in range(2))
    exact_x, exact_y = x.astype(np.float64), y.astype(np.float64)
    rtol = 2e-6
    np.testing.assert_allclose(jax.jit(long_sum)(x), exact_x.sum(-1), rtol=rtol)
    products = np.einsum("bn,bn->b", exact_x, exact_y)
    np.testing.assert_allclose(jax.jit(long_vecdot)(x, y), products, rtol=rtol)
    products = exact_x @ exact_y.T
    np.testing.assert_allclose(jax.jit(long_products)(x[0], y), products[0], rtol=rtol)
    many = jax.jit(jax.vmap(long_products, (0, None)))(x, y)
    np.testing.assert_allclose(many, products, rtol=rtol)
