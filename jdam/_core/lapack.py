"""JAX's decompositions of many matrices, made safe on CPUs.

The LAPACK calls of jaxlib 0.10.0 to 0.11.1 split a batch among the threads of XLA and wait for
them, on one of these threads. As soon as there are as many such calls at a time as threads, in one
program or in several, they wait for ever: on two cores, two. A batch of so little work that it is
not split does not wait, so batches are cut into pieces of that size. Versions before and after
take them one matrix after another too, and are left alone.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
from jax import Array

WAITS = (0, 10) <= jaxlib.version.__version_info__ < (0, 11, 2)


def _unsplit(work: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For a function of one or two stacks of matrices that is split where the product of rows,
    columns and the smaller of them, summed over the batch, exceeds `work`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if not WAITS:
            return function

        def on_cpu(*stacks: Array) -> Any:
            *batch, rows, columns = stacks[-1].shape
            many = math.prod(batch)
            few = max(1, int(work / (rows * columns * max(rows, columns))))
            if many <= few:
                return function(*stacks)
            flat = [stack.reshape(many, *stack.shape[-2:]) for stack in stacks]
            call = lambda matrices: function(*matrices)  # noqa: E731
            found = jax.lax.map(call, flat, batch_size=few if few > 1 else None)
            return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), found)

        @jax.custom_batching.custom_vmap
        def run(*stacks: Array) -> Any:
            return jax.lax.platform_dependent(*stacks, cpu=on_cpu, default=function)

        @run.def_vmap
        def run_many(size: int, batched: list[bool], *stacks: Array) -> tuple[Any, Any]:
            stacks = tuple(
                stack if is_batched else jnp.broadcast_to(stack, (size, *stack.shape))
                for stack, is_batched in zip(stacks, batched, strict=True)
            )
            found = run(*stacks)
            return found, jax.tree.map(lambda _: True, found)

        return functools.wraps(function)(run)

    return decorate


@_unsplit(2e4)
def svd(matrix: Array) -> tuple[Array, Array, Array]:
    """U, s, Vᵀ of M = U diag(s) Vᵀ, U and V with as many columns as s."""
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    return left, values, right


@_unsplit(2e4)
def full_svd(matrix: Array) -> tuple[Array, Array, Array]:
    """The same with square U and V."""
    left, values, right = jnp.linalg.svd(matrix)
    return left, values, right


@_unsplit(2e4)
def singular_values(matrix: Array) -> Array:
    """The largest first."""
    return jnp.linalg.svdvals(matrix)


@_unsplit(5e4)
def qr(matrix: Array) -> tuple[Array, Array]:
    """Q, R of M = QR, Q with as many columns as R has rows."""
    basis, triangle = jnp.linalg.qr(matrix)
    return basis, triangle


@_unsplit(5e4)
def triangle(matrix: Array) -> Array:
    """R of M = QR alone."""
    return jnp.linalg.qr(matrix, mode="r")


@_unsplit(4e4)
def eigenvalues(matrix: Array) -> Array:
    """Of a symmetric matrix, the smallest first."""
    result: Array = jnp.linalg.eigvalsh(matrix)
    return result


@_unsplit(4e4)
def eigh(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, the smallest first, and eigenvectors."""
    values, basis = jnp.linalg.eigh(matrix)
    return values, basis


@_unsplit(6e5)
def cholesky(matrix: Array) -> Array:
    """L of M = LLᵀ, lower triangular."""
    result: Array = jnp.linalg.cholesky(matrix)
    return result


@_unsplit(4e4)
def inverse(matrix: Array) -> Array:
    """M⁻¹, by LU factors."""
    result: Array = jnp.linalg.inv(matrix)
    return result


@_unsplit(4e4)
def determinant(matrix: Array) -> Array:
    """By LU factors."""
    result: Array = jnp.linalg.det(matrix)
    return result


@_unsplit(2e5)
def solve_lower(lower: Array, right: Array) -> Array:
    """L⁻¹B."""
    return jax.lax.linalg.triangular_solve(lower, right, left_side=True, lower=True)
