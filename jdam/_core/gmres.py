"""Linear systems of the implicit function theorem, by GMRES.

JAX's and lineax's leave what `jdam` promises of every program: inside `jax.shard_map` the one does
not compile, and the products of the other are not in full precision.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam._core.lapack import svd
from jdam._core.linalg import safe_sqrt
from jdam._core.loops import while_loop

#: Dimensions of a Krylov space, and how many are tried after one another.
DIMENSIONS, CYCLES = 32, 32


def gmres(
    matvec: Callable[[Array], Array], b: Float[Array, " n"], tol: float
) -> Float[Array, " n"]:
    """x with A x = b, to a residual |b − A x| ≤ tol·|b|, or as near as cycles come of which each
    halves the residual at least (Saad and Schultz, SIAM J. Sci. Stat. Comput. 7, 1986)."""
    goal = tol * _norm(b)

    def unfinished(carry: tuple[Any, ...]) -> Array:
        count, _, residual, last = carry
        result: Array = (_norm(residual) > goal) & (_norm(residual) < last / 2) & (count < CYCLES)
        return result

    def turn(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        count, x, residual, _ = carry
        x = x + _cycle(matvec, residual, goal)
        return count + 1, x, b - matvec(x), _norm(residual)

    infinite = jnp.full((), jnp.inf, b.dtype)
    start = (jnp.array(0, jnp.int32), jnp.zeros_like(b), b, infinite)
    x = while_loop(unfinished, turn, start, matvec(b))[1]
    return x + 0 * _norm(b)  # NaN where the system is


def _cycle(
    matvec: Callable[[Array], Array], residual: Float[Array, " n"], goal: Array
) -> Float[Array, " n"]:
    """The x of the Krylov space of r that minimises |r − A x|, or the first that is good enough.

    With A Vⱼ = Vⱼ₊₁H and γᵀH = 0, γ₀ = 1, the least residual is |r|/|γ|."""
    size = min(DIMENSIONS, residual.size)
    least = float(jnp.finfo(residual.dtype).eps)
    whole = _norm(residual)
    bases = jnp.zeros((size + 1, residual.size), residual.dtype)
    bases = bases.at[0].set(residual / jnp.where(whole > 0, whole, 1))
    hessenberg = jnp.zeros((size + 1, size), residual.dtype)
    null = jnp.zeros(size + 1, residual.dtype).at[0].set(1)

    def unfinished(carry: tuple[Any, ...]) -> Array:
        count, _, _, null, independent = carry
        result: Array = (whole > goal * _norm(null)) & independent & (count < size)
        return result

    def turn(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        count, bases, hessenberg, null, _ = carry
        image = matvec(bases[count])
        length = _norm(image)
        along = bases @ image
        image = image - along @ bases
        again = bases @ image  # once more, for what rounding left
        image, along = image - again @ bases, along + again
        rest = _norm(image)
        independent = rest > least * length
        divisor = jnp.where(independent, rest, 1)
        following = jnp.where(independent, image / divisor, 0)
        column = along.at[count + 1].add(jnp.where(independent, rest, 0))
        return (
            count + 1,
            bases.at[count + 1].set(following),
            hessenberg.at[:, count].set(column),
            null.at[count + 1].set(-jnp.vdot(null, along) / divisor),
            independent,
        )

    start = (jnp.array(0, jnp.int32), bases, hessenberg, null, jnp.array(True))
    _, bases, hessenberg, *_ = while_loop(unfinished, turn, start, residual, goal)
    left, values, right = svd(hessenberg)
    kept = values > size * least * values[0]
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    result: Array = whole * (right.T @ (inverse * left[0])) @ bases[:-1]
    return result


def _norm(x: Float[Array, " n"]) -> Float[Array, ""]:
    return safe_sqrt(jnp.vdot(x, x))
