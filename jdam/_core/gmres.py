"""GMRES, for the linear systems of the implicit function theorem.

JAX's own does not compile inside `jax.shard_map`, and lineax's matrix products are not in full
precision.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree

from jdam._core.lapack import svd
from jdam._core.linalg import safe_sqrt
from jdam._core.loops import while_loop

#: The dimension of a Krylov space, and the largest number of restarts.
DIMENSIONS, CYCLES = 32, 32


def gmres(
    matvec: Callable[[Array], Array], b: Float[Array, " n"], tol: float
) -> Float[Array, " n"]:
    """Solve A x = b by restarted GMRES (Saad and Schultz, SIAM J. Sci. Stat. Comput. 7, 1986).

    The iteration stops at a residual |b − A x| ≤ tol·|b|, after `CYCLES` restarts, or after a
    restart that does not halve the residual."""
    goal = tol * _norm(b)

    def cond_fun(carry: tuple[PyTree, ...]) -> Array:
        count, _, residual, previous = carry
        result: Array = (
            (_norm(residual) > goal) & (_norm(residual) < previous / 2) & (count < CYCLES)
        )
        return result

    def body_fun(carry: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        count, x, residual, _ = carry
        x = x + _cycle(matvec, residual, goal)
        return count + 1, x, b - matvec(x), _norm(residual)

    infinite = jnp.full((), jnp.inf, b.dtype)
    start = (jnp.array(0, jnp.int32), jnp.zeros_like(b), b, infinite)
    x = while_loop(cond_fun, body_fun, start, matvec(b))[1]
    return x + 0 * _norm(b)  # NaN if b contains NaN, for which the loop does not start


def _cycle(
    matvec: Callable[[Array], Array], residual: Float[Array, " n"], goal: Array
) -> Float[Array, " n"]:
    """Return the x of the Krylov space of r that minimises |r − A x|; the space grows until the
    residual is at most `goal`.

    With A Vⱼ = Vⱼ₊₁H and γᵀH = 0, γ₀ = 1, the least residual is |r|/|γ|."""
    size = min(DIMENSIONS, residual.size)
    least = float(jnp.finfo(residual.dtype).eps)
    whole = _norm(residual)
    bases = jnp.zeros((size + 1, residual.size), residual.dtype)
    bases = bases.at[0].set(residual / jnp.where(whole > 0, whole, 1))
    hessenberg = jnp.zeros((size + 1, size), residual.dtype)
    null = jnp.zeros(size + 1, residual.dtype).at[0].set(1)

    def cond_fun(carry: tuple[PyTree, ...]) -> Array:
        count, _, _, null, independent = carry
        result: Array = (whole > goal * _norm(null)) & independent & (count < size)
        return result

    def body_fun(carry: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        count, bases, hessenberg, null, _ = carry
        image = matvec(bases[count])
        length = _norm(image)
        along = bases @ image
        image = image - along @ bases
        correction = bases @ image  # reorthogonalisation
        image, along = image - correction @ bases, along + correction
        remainder = _norm(image)
        independent = remainder > least * length
        divisor = jnp.where(independent, remainder, 1)
        next_basis = jnp.where(independent, image / divisor, 0)
        column = along.at[count + 1].add(jnp.where(independent, remainder, 0))
        return (
            count + 1,
            bases.at[count + 1].set(next_basis),
            hessenberg.at[:, count].set(column),
            null.at[count + 1].set(-jnp.vdot(null, along) / divisor),
            independent,
        )

    start = (jnp.array(0, jnp.int32), bases, hessenberg, null, jnp.array(True))
    _, bases, hessenberg, *_ = while_loop(cond_fun, body_fun, start, residual, goal)
    left, values, right = svd(hessenberg)
    regular = values > size * least * values[0]
    inverse = jnp.where(regular, 1 / jnp.where(regular, values, 1), 0)
    result: Array = whole * (right.T @ (inverse * left[0])) @ bases[:-1]
    return result


def _norm(x: Float[Array, " n"]) -> Float[Array, ""]:
    return safe_sqrt(jnp.vdot(x, x))
