"""JAX's matrix decompositions, without the deadlock of some versions on CPUs.

The LAPACK calls of jaxlib 0.10.0 to 0.11.1 split a batch among XLA's threads and wait for them on
one of these threads. As many such calls at a time as there are threads, in one program or in
several, wait for ever: on two cores, two. Batches with too little work to be split do not wait, so
batches are cut into pieces of that size. Other versions are called directly.
"""

import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
from jax import Array
from jaxtyping import PyTree

from jdam._core.batching import map_in_batches, with_leading_axes

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

        def in_pieces(*stacks: Array) -> PyTree:
            *batch, rows, columns = stacks[-1].shape
            count = math.prod(batch)
            piece = max(1, int(work / (rows * columns * max(rows, columns))))
            if count <= piece:
                return function(*stacks)

            def on_cpu(*stacks: Array) -> PyTree:
                flat = [stack.reshape(count, *stack.shape[-2:]) for stack in stacks]
                results = map_in_batches(lambda matrices: function(*matrices), piece, flat)
                return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), results)

            return jax.lax.platform_dependent(*stacks, cpu=on_cpu, default=function)

        return wraps(function)(with_leading_axes(in_pieces))

    return decorate


#: U, s, Vᵀ of M = U diag(s) Vᵀ, in reduced form; then with square U and V; then s alone. The
#: largest singular values come first.
svd = _unsplit(2e4)(partial(jnp.linalg.svd, full_matrices=False))
full_svd = _unsplit(2e4)(jnp.linalg.svd)
singular_values = _unsplit(2e4)(jnp.linalg.svdvals)
#: Q, R of M = QR, in reduced form; then R alone.
qr = _unsplit(5e4)(jnp.linalg.qr)
triangle = _unsplit(5e4)(partial(jnp.linalg.qr, mode="r"))
#: Eigenvalues, the smallest first, and eigenvectors of a symmetric matrix; then eigenvalues alone.
eigh = _unsplit(4e4)(jnp.linalg.eigh)
eigenvalues = _unsplit(4e4)(jnp.linalg.eigvalsh)
#: The lower triangular L of M = LLᵀ.
cholesky = _unsplit(6e5)(jnp.linalg.cholesky)
#: M⁻¹ and det M, by LU factors.
inverse = _unsplit(4e4)(jnp.linalg.inv)
determinant = _unsplit(4e4)(jnp.linalg.det)
#: L⁻¹B for a lower triangular L and B.
solve_lower = _unsplit(2e5)(partial(jax.lax.linalg.triangular_solve, left_side=True, lower=True))
