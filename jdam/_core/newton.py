"""Polar factors by scaled Newton iterations, for accelerators.

The iterations need LU factors only, which are computed for whole batches; singular value
decompositions there are computed one matrix after another.
"""

from functools import cache, partial

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jdam._core.batching import masked_cond
from jdam._core.lapack import inverse, svd
from jdam._core.loops import repeat

#: Iterations that bring singular values of any size within reach of a last step without inverse.
ITERATIONS = 10
#: The norm of the matrix that makes K regular, in units of eps·max(|K|_F, 1), for entries ≤ 1.
COMPLETION = 2
#: The largest entry of |RRᵀ − I| that is accepted, in units of n·eps.
ALLOWED = 32


def newton_polar(matrix: Float[Array, "*batch m n"]) -> Float[Array, "*batch m n"]:
    """Compute the orthogonal polar factor R of K = H R, for m ≤ n.

    The iteration is X ← ½(zX + X⁻ᵀ/z) from X = K, with z⁴ = |X⁻¹|₁|X⁻¹|_∞ / (|X|₁|X|_∞) (Higham,
    Functions of Matrices, 2008, 8.6), followed by one step X ← ½X(3I − XᵀX). If R is not orthogonal
    then, a singular value decomposition is computed instead.

    K is padded with zero rows to a square matrix. A matrix of the size of K's rounding error is
    added, which completes R if K is rank-deficient."""
    rows, columns = matrix.shape[-2:]
    largest = jnp.abs(matrix).max((-1, -2), keepdims=True)
    scaled = matrix / jnp.where(largest > 0, largest, 1)
    padding = [(0, 0)] * (matrix.ndim - 2) + [(0, columns - rows), (0, 0)]
    eps = float(jnp.finfo(matrix.dtype).eps)
    square = jnp.pad(scaled, padding)
    completion = jnp.broadcast_to(jnp.asarray(_generic(columns), matrix.dtype), square.shape)
    size = jnp.sqrt((square * square).sum((-1, -2), keepdims=True))
    scale = COMPLETION * eps * jnp.maximum(size, 1)
    completion = scale * completion
    factor = repeat(ITERATIONS, partial(_iterate, 2 * completion), square + completion)
    factor = (3 * factor - factor @ (factor.mT @ factor)) / 2
    factor = factor[..., :rows, :]
    product = factor @ factor.mT
    unit = jnp.broadcast_to(jnp.eye(rows, dtype=matrix.dtype), product.shape)
    defect = jnp.abs(product - unit).max()
    failed = ~(defect <= ALLOWED * columns * eps)
    return masked_cond(failed, _by_svd, factor, scaled, None, at_once=1)


def _iterate(correction: Array, x: Array) -> Array:
    """Return the next iterate; if X happens to be singular, return X − `correction`, which changes
    the sign of the added matrix."""
    inverted = inverse(x)
    ratio = _norms(inverted) / _norms(x)
    z = jnp.sqrt(jnp.sqrt(ratio))
    updated = (z * x + inverted.mT / z) / 2
    regular = jnp.isfinite(inverted).all((-1, -2), keepdims=True)
    return jnp.where(regular, updated, x - correction)


def _norms(x: Array) -> Array:
    """Compute |X|₁|X|_∞, an upper bound of the squared spectral norm."""
    sizes = jnp.abs(x)
    columns, rows = sizes.sum(-2, keepdims=True), sizes.sum(-1, keepdims=True)
    return columns.max(-1, keepdims=True) * rows.max(-2, keepdims=True)


@cache
def _generic(size: int) -> np.ndarray:
    """Return a fixed orthogonal matrix without structure: a Hartley transform with random-like
    signs."""
    angles = 2 * np.pi * np.outer(np.arange(size), np.arange(size)) / size
    hartley = (np.cos(angles) + np.sin(angles)) / np.sqrt(size)
    signs = np.where(np.sin(np.arange(size) ** 2 + 1.0) > 0, 1.0, -1.0)
    result: np.ndarray = hartley * signs
    return result


def _by_svd(matrix: Array, _: None) -> Array:
    left, _, right = svd(matrix)
    factor: Array = left @ right
    return factor
