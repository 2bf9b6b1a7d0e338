"""Uniformly distributed directions and orthogonal matrices, for all files of this folder."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jdam._core.lapack import qr


def orthogonal(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Draw orthogonal matrices (…, d, d) of the Haar distribution, for `shape` = (…, d). Unlike
    `jax.random.orthogonal` it calls the QR decomposition of `jdam._core.lapack`, which does not
    deadlock."""
    normal = jax.random.normal(key, (*shape, shape[-1]), dtype)
    basis, triangle = qr(normal)
    result: Array = basis * jnp.sign(jnp.diagonal(triangle, axis1=-2, axis2=-1))[..., None, :]
    return result


def directions(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Draw uniformly distributed unit vectors (…, d)."""
    normal = jax.random.normal(key, shape, dtype)
    result: Array = normal / jnp.linalg.norm(normal, axis=-1, keepdims=True)
    return result


def checked_dtype(dtype: DTypeLike | None) -> jnp.dtype:
    """Return `dtype`, checked to be floating; JAX's default floating dtype if None."""
    dtype = jnp.zeros(()).dtype if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating dtype; got {dtype}")
    return dtype
