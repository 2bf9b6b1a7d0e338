"""Polar factors by scaled Newton iterations, which take nothing but LU factors of whole batches:
for accelerators, where decompositions of many matrices are taken one after the other."""

from functools import cache, partial

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jdam._core.batching import masked_cond
from jdam._core.lapack import inverse, svd
from jdam._core.loops import repeat

#: Iterations that bring singular values of any size within the reach of a last one without inverse.
ITERATIONS = 10
#: Of how many roundings of its size the matrix is that makes others regular.
COMPLETION = 2
#: By how many roundings of its size a factor may fail to be orthogonal.
ALLOWED = 32


def newton_polar(matrix: Float[Array, "*batch m n"]) -> Float[Array, "*batch m n"]:
    """The orthogonal polar factor R of K = H R, for m ≤ n: X ← ½(zX + X⁻ᵀ/z) from X = K on, with
    z⁴ = |X⁻¹|₁|X⁻¹|_∞ / (|X|₁|X|_∞) (Higham, Functions of Matrices, 2008, 8.6), and a last
    X ← ½X(3I − XᵀX). Where R is not orthogonal, by a singular value decomposition.

    K is made square by rows of zeros, and regular by a matrix of the size of its rounding, which
    completes R where K loses rank."""
    rows, columns = matrix.shape[-2:]
    largest = jnp.abs(matrix).max((-1, -2), keepdims=True)
    scaled = matrix / jnp.where(largest > 0, largest, 1)
    missing = [(0, 0)] * (matrix.ndim - 2) + [(0, columns - rows), (0, 0)]
    eps = float(jnp.finfo(matrix.dtype).eps)
    square = jnp.pad(scaled, missing)
    completion = jnp.broadcast_to(jnp.asarray(_generic(columns), matrix.dtype), square.shape)
    size = jnp.sqrt((square * square).sum((-1, -2), keepdims=True))
    little = COMPLETION * eps * jnp.maximum(size, 1)
    completion = little * completion
    factor = repeat(ITERATIONS, partial(_iterate, 2 * completion), square + completion)
    factor = (3 * factor - factor @ (factor.mT @ factor)) / 2
    factor = factor[..., :rows, :]
    product = factor @ factor.mT
    unit = jnp.broadcast_to(jnp.eye(rows, dtype=matrix.dtype), product.shape)
    defect = jnp.abs(product - unit).max()
    wrong = ~(defect <= ALLOWED * columns * eps)
    return masked_cond(wrong, _by_svd, factor, scaled, None, at_once=1)


def _iterate(otherwise: Array, x: Array) -> Array:
    """One iteration; by chance X may be singular still, and is completed the other way then."""
    inverted = inverse(x)
    ratio = _norms(inverted) / _norms(x)
    z = jnp.sqrt(jnp.sqrt(ratio))
    following = (z * x + inverted.mT / z) / 2
    regular = jnp.isfinite(inverted).all((-1, -2), keepdims=True)
    return jnp.where(regular, following, x - otherwise)


def _norms(x: Array) -> Array:
    """|X|₁|X|_∞, the product of which bounds the square of the spectral norm."""
    sizes = jnp.abs(x)
    columns, rows = sizes.sum(-2, keepdims=True), sizes.sum(-1, keepdims=True)
    return columns.max(-1, keepdims=True) * rows.max(-2, keepdims=True)


@cache
def _generic(size: int) -> np.ndarray:
    """An orthogonal matrix of no particular pattern: reflections of the Hartley transform."""
    angles = 2 * np.pi * np.outer(np.arange(size), np.arange(size)) / size
    hartley = (np.cos(angles) + np.sin(angles)) / np.sqrt(size)
    signs = np.where(np.sin(np.arange(size) ** 2 + 1.0) > 0, 1.0, -1.0)
    result: np.ndarray = hartley * signs
    return result


def _by_svd(matrix: Array, _: None) -> Array:
    left, _, right = svd(matrix)
    factor: Array = left @ right
    return factor
