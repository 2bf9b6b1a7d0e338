import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdam._core.gmres import gmres


def solve(matrix, right, tol):
    return jax.jit(lambda b: gmres(lambda x: matrix @ x, b, tol))(jnp.asarray(right))


@pytest.mark.parametrize("size", [1, 3, 40, 200])
def test_against_numpy(rng, size):
    """In one cycle of fewer dimensions than there are, and in several."""
    matrix = np.eye(size) + 0.5 * rng.normal(size=(size, size)) / np.sqrt(size)
    right = rng.normal(size=size)
    found = solve(matrix, right, 1e-12)
    np.testing.assert_allclose(found, np.linalg.solve(matrix, right), rtol=1e-9, atol=1e-10)


def test_singular_systems():
    """The solution where there is one, and as near as there is where not."""
    matrix = np.diag([1.0, 2.0, 0.0, 0.0])
    np.testing.assert_allclose(solve(matrix, [1.0, 2.0, 0.0, 0.0], 1e-12), [1, 1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(solve(matrix, np.zeros(4), 1e-12), 0)
    near = np.asarray(solve(matrix, np.ones(4), 1e-12))
    np.testing.assert_allclose(matrix @ near, [1, 1, 0, 0], atol=1e-9)
    assert np.isnan(solve(matrix, [1.0, np.nan, 0, 0], 1e-12)).any()


def test_batches(rng):
    rights = jnp.asarray(rng.normal(size=(5, 3)))
    found = jax.vmap(lambda b: gmres(lambda x: 3 * x, b, 1e-12))(rights)
    np.testing.assert_allclose(found, rights / 3, rtol=1e-12)
