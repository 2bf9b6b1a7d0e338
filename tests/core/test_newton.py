"""Polar factors as accelerators compute them, by name, on this machine."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdam._core.linalg import polar
from jdam._core.newton import newton_polar

run = jax.jit(newton_polar)


def matrices(rng, condition, shape=(8, 6, 6)):
    *batch, rows, columns = shape
    left = np.linalg.qr(rng.normal(size=(*batch, rows, rows)))[0]
    right = np.linalg.qr(rng.normal(size=(*batch, columns, columns)))[0]
    values = np.geomspace(1, 1 / condition, rows)
    return left * values @ right[..., :rows, :], left @ right[..., :rows, :]


def orthogonal(factor, dtype):
    unit = factor @ np.swapaxes(factor, -1, -2)
    return np.abs(unit - np.eye(unit.shape[-1])).max() < 40 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e8])
def test_against_the_decomposition(rng, condition, dtype):
    exact, wanted = matrices(rng, condition)
    matrix = exact.astype(dtype)
    found = np.asarray(run(matrix))
    assert found.dtype == dtype
    assert orthogonal(found, dtype)
    # ⟨R, K⟩ is the sum of singular values, which R maximises: what W₂² is made of.
    nuclear = np.linalg.svd(matrix.astype(float), compute_uv=False).sum(-1)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose((found * matrix.astype(float)).sum((-1, -2)), nuclear, rtol=40 * eps)
    if condition <= 1e2:
        np.testing.assert_allclose(found, wanted, atol=200 * condition * eps)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_rank(rng, dtype):
    for rank in range(6):
        matrix = (rng.normal(size=(8, 6, rank)) @ rng.normal(size=(8, rank, 6))).astype(dtype)
        found = np.asarray(run(matrix))
        assert orthogonal(found, dtype)
        nuclear = np.linalg.svd(matrix.astype(float), compute_uv=False).sum(-1)
        inner = (found * matrix.astype(float)).sum((-1, -2))
        np.testing.assert_allclose(inner, nuclear, rtol=40 * np.finfo(dtype).eps)
    nilpotent = np.eye(6, k=1, dtype=dtype)
    assert orthogonal(np.asarray(run(nilpotent)), dtype)


@pytest.mark.full
@pytest.mark.parametrize("shape", [(3, 5), (8, 2, 7), (2, 3, 5, 6)])
def test_fewer_rows_than_columns(rng, shape):
    matrix = rng.normal(size=shape)
    np.testing.assert_allclose(run(matrix), polar(jnp.asarray(matrix)), atol=1e-12)


def test_units(rng):
    matrix = rng.normal(size=(4, 6, 6)).astype(np.float32)
    for unit in (1e-30, 1e30):
        np.testing.assert_allclose(run((unit * matrix).astype(np.float32)), run(matrix), atol=1e-4)


def test_what_is_not_finite_stays_so(rng):
    matrix = rng.normal(size=(6, 6))
    matrix[2, 3] = np.nan
    assert np.isnan(np.asarray(run(matrix))).any()


@pytest.mark.full
def test_accelerators_take_it_and_decompose_nothing_else(monkeypatch):
    """In the program of polar factors the decomposition is left where orthogonality is not."""
    shape = jax.ShapeDtypeStruct((100, 16, 16), jnp.float32)
    on_cpu = jax.jit(polar).lower(shape).as_text()
    assert "getrf" not in on_cpu
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    again = lambda matrix: polar(matrix)  # noqa: E731 (not the program of before)
    text = jax.export.export(jax.jit(again), platforms=["cuda"])(shape).mlir_module()
    calls = set(re.findall(r"custom_call @(\w+)", text))
    assert any("getrf" in call or "lu" in call.lower() for call in calls), calls
