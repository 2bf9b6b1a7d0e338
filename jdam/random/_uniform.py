"""Uniform directions and rotations."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jdam._core.lapack import qr


def orthogonal(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Orthogonal matrices (…, d, d), uniform: `jax.random.orthogonal`, but safe among threads."""
    normal = jax.random.normal(key, (*shape, shape[-1]), dtype)
    basis, triangle = qr(normal)
    result: Array = basis * jnp.sign(jnp.diagonal(triangle, axis1=-2, axis2=-1))[..., None, :]
    return result


def directions(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Unit vectors (…, d), uniform."""
    normal = jax.random.normal(key, shape, dtype)
    result: Array = normal / jnp.linalg.norm(normal, axis=-1, keepdims=True)
    return result


def checked_dtype(dtype: DTypeLike | None) -> jnp.dtype:
    """That floating dtype, JAX's default one if None."""
    dtype = jnp.zeros(()).dtype if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating dtype; got {dtype}")
    return dtype
