"""JAX's matrix decompositions, without the deadlock of some versions on CPUs.

The LAPACK calls of jaxlib 0.10.0 to 0.11.1 split a batch among XLA's threads and wait for them on
one of these threads. As many such calls at a time as there are threads, in one program or in
several, wait for ever: on two cores, two. Batches with too little work to be split do not wait, so
batches are cut into pieces of that size. Other versions are called directly.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
from jax import Array
from jaxtyping import PyTree

#: Whether the installed jaxlib has these calls.
WAITS = (0, 10) <= jaxlib.version.__version_info__ < (0, 11, 2)


def _unsplit(work: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator for a function of one or two stacks of matrices.

    Jaxlib splits a call if rows · columns · min(rows, columns), summed over the batch, exceeds
    `work`. The decorated function is called on pieces below this limit, with max in place of
    min."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if not WAITS:
            return function

        def on_cpu(*stacks: Array) -> PyTree:
            *batch, rows, columns = stacks[-1].shape
            count = math.prod(batch)
            piece = max(1, int(work / (rows * columns * max(rows, columns))))
            if count <= piece:
                return function(*stacks)
            flat = [stack.reshape(count, *stack.shape[-2:]) for stack in stacks]
            on_piece = lambda matrices: function(*matrices)  # noqa: E731
            results = jax.lax.map(on_piece, flat, batch_size=piece if piece > 1 else None)
            return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), results)

        @jax.custom_batching.custom_vmap
        def run(*stacks: Array) -> PyTree:
            return jax.lax.platform_dependent(*stacks, cpu=on_cpu, default=function)

        @run.def_vmap
        def run_many(size: int, batched: list[bool], *stacks: Array) -> tuple[PyTree, PyTree]:
            stacks = tuple(
                stack if is_batched else jnp.broadcast_to(stack, (size, *stack.shape))
                for stack, is_batched in zip(stacks, batched, strict=True)
            )
            results = run(*stacks)
            return results, jax.tree.map(lambda _: True, results)

        return functools.wraps(function)(run)

    return decorate


@_unsplit(2e4)
def svd(matrix: Array) -> tuple[Array, Array, Array]:
    """Compute U, s, Vᵀ of M = U diag(s) Vᵀ, in reduced form."""
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    return left, values, right


@_unsplit(2e4)
def full_svd(matrix: Array) -> tuple[Array, Array, Array]:
    """Compute U, s, Vᵀ of M = U diag(s) Vᵀ with square U and V."""
    left, values, right = jnp.linalg.svd(matrix)
    return left, values, right


@_unsplit(2e4)
def singular_values(matrix: Array) -> Array:
    """Compute the singular values, the largest first."""
    return jnp.linalg.svdvals(matrix)


@_unsplit(5e4)
def qr(matrix: Array) -> tuple[Array, Array]:
    """Compute Q, R of M = QR, in reduced form."""
    basis, triangle = jnp.linalg.qr(matrix)
    return basis, triangle


@_unsplit(5e4)
def triangle(matrix: Array) -> Array:
    """Compute R of M = QR."""
    return jnp.linalg.qr(matrix, mode="r")


@_unsplit(4e4)
def eigenvalues(matrix: Array) -> Array:
    """Compute the eigenvalues of a symmetric matrix, the smallest first."""
    result: Array = jnp.linalg.eigvalsh(matrix)
    return result


@_unsplit(4e4)
def eigh(matrix: Array) -> tuple[Array, Array]:
    """Compute eigenvalues, the smallest first, and eigenvectors of a symmetric matrix."""
    values, basis = jnp.linalg.eigh(matrix)
    return values, basis


@_unsplit(6e5)
def cholesky(matrix: Array) -> Array:
    """Compute the lower triangular L of M = LLᵀ."""
    result: Array = jnp.linalg.cholesky(matrix)
    return result


@_unsplit(4e4)
def inverse(matrix: Array) -> Array:
    """Compute M⁻¹ by LU factors."""
    result: Array = jnp.linalg.inv(matrix)
    return result


@_unsplit(4e4)
def determinant(matrix: Array) -> Array:
    """Compute det M by LU factors."""
    result: Array = jnp.linalg.det(matrix)
    return result


@_unsplit(2e5)
def solve_lower(lower: Array, right: Array) -> Array:
    """Compute L⁻¹B for a lower triangular L."""
    return jax.lax.linalg.triangular_solve(lower, right, left_side=True, lower=True)
