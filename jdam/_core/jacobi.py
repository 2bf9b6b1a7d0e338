"""Singular value decompositions of matrices of at most four columns, without LAPACK.

One-sided Jacobi: pairs of columns are rotated until all are orthogonal (J. Demmel and K. Veselić,
SIAM J. Matrix Anal. Appl. 13, 1204 (1992)), which keeps small columns as accurate as large ones.

The batch is the last axis, so that all of it is elementwise. XLA may then compute a number several
times, each time rounded in another way; so numbers on which a choice depends are carried from one
turn of a loop to the next, where there is one of each.
"""

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

#: The most columns for which this is faster than LAPACK.
SMALL = 4
#: Turns until float64 comes to rest, of so many columns: three make a sweep over all pairs of three
#: or four, of which two are rotated at a time.
_TURNS = {1: 0, 2: 3, 3: 18, 4: 21}
#: The columns that change places where they are not in falling order, one pair after another.
_SORTING: dict[int, tuple[tuple[int, int], ...]] = {
    1: (),
    2: ((0, 1),),
    3: ((0, 1), (1, 2), (0, 1)),
    4: ((0, 1), (2, 3), (0, 2), (1, 3), (1, 2)),
}

#: One column of each of B matrices.
Column = Float[Array, "m B"]


class Rotated(NamedTuple):
    """W = A V with orthogonal columns and V a rotation: W = U diag(s) for A = U diag(s) Vᵀ."""

    columns: list[Float[Array, "m_and_n B"]]  # of W and, below, of V
    squares: list[Float[Array, " B"]]  # |wₖ|²


class _Turn(NamedTuple):
    held: Rotated
    inner: list[Float[Array, " B"]]  # ⟨wᵢ, wⱼ⟩ of the pairs that are next


def rotate(matrices: Float[Array, "B m n"]) -> Rotated:
    """W and V, the columns of W in falling order, each as accurate as A's, relative to its size."""
    many, rows, size = matrices.shape
    half = size // 2
    unit = jnp.broadcast_to(jnp.eye(size, dtype=matrices.dtype)[..., None], (size, size, many))
    stacked = jnp.concatenate([jnp.moveaxis(matrices, (2, 1), (0, 1)), unit], axis=1)

    def measured(columns: list[Column]) -> _Turn:
        tops = [column[:rows] for column in columns]
        squares = [_inner(top, top) for top in tops]
        inner = [_inner(tops[i], tops[half + i]) for i in range(half)]
        return _Turn(Rotated(columns, squares), inner)

    def turn(_: Array, at: _Turn) -> _Turn:
        columns, squares = list(at.held.columns), at.held.squares
        for i in range(half):
            j = half + i
            cosine, sine = _angle(squares[i], squares[j], at.inner[i])
            p, q = columns[i], columns[j]
            columns[i], columns[j] = cosine * p - sine * q, sine * p + cosine * q
        return measured(_next_pairs(columns))

    end: _Turn = jax.lax.fori_loop(0, _TURNS[size], turn, measured(list(stacked)))
    return _sorted(end.held)


def _next_pairs(columns: list[Column]) -> list[Column]:
    """So ordered that in three turns each column of the first half meets all others."""
    if len(columns) == 4:
        a, b, c, d = columns
        return [a, c, d, b]
    return columns[1:] + columns[:1] if len(columns) == 3 else columns


def _angle(p: Array, q: Array, inner: Array) -> tuple[Array, Array]:
    """Cosine and sine, (1, B), of the smaller angle that makes two columns orthogonal, from |p|²,
    |q|² and ⟨p, q⟩."""
    gap, inner = q - p, 2 * inner
    below = jnp.abs(gap) + jnp.sqrt(gap * gap + inner * inner)
    tangent = jnp.where(gap < 0, -inner, inner) / jnp.where(below == 0, 1, below)
    cosine = jax.lax.rsqrt(1 + tangent * tangent)
    return cosine[None], (tangent * cosine)[None]


def _sorted(held: Rotated) -> Rotated:
    columns, squares = list(held.columns), list(held.squares)
    for i, j in _SORTING[len(squares)]:
        rises = squares[j] > squares[i]
        for stack in (squares, columns):
            p, q = stack[i], stack[j]
            stack[i], stack[j] = jnp.where(rises, q, p), jnp.where(rises, p, q)
    return Rotated(columns, squares)


def small_polar(
    matrix: Float[Array, "*batch m n"], *, proper: bool = False
) -> Float[Array, "*batch m n"]:
    """The orthogonal polar factor R = UVᵀ of K = U diag(s) Vᵀ, for m ≤ n ≤ 4, completed where K
    loses rank. If `proper`, for m = n, U diag(1, …, 1, ±1) Vᵀ of determinant 1."""
    rows, size = matrix.shape[-2:]
    flat = matrix.reshape(-1, rows, size)
    flat = jnp.pad(flat, [(0, 0), (0, size - rows), (0, 0)])
    largest = jnp.abs(flat).max((1, 2), keepdims=True)
    found = rotate(flat / jnp.where(largest > 0, largest, 1))
    left = _orthonormal(found, size)
    right = [column[size:] for column in found.columns]
    terms = [u[:, None] * v[None] for u, v in zip(left, right, strict=True)]
    factor = reduce(jnp.add, terms)
    if proper:
        factor = jnp.where(_determinant(factor)[None, None] < 0, factor - 2 * terms[-1], factor)
    return jnp.moveaxis(factor[:rows], -1, 0).reshape(matrix.shape)


def small_principal(matrix: Float[Array, "m n"]) -> tuple[Float[Array, "m n"], Float[Array, "n n"]]:
    """A V = U diag(s) of a single matrix of n ≤ 4 columns, in falling order and 0 beyond the rank
    that A can have, and Vᵀ."""
    rows, size = matrix.shape
    largest = jnp.abs(matrix).max()
    unit = jnp.where(largest > 0, largest, 1)
    found = jnp.stack(rotate((matrix / unit)[None]).columns)[..., 0]
    turned = jnp.where(jnp.arange(size)[None] < rows, unit * found[:, :rows].T, 0)
    return turned, found[:, rows:]


def _determinant(matrices: Float[Array, "n n B"]) -> Float[Array, " B"]:
    """By the first row and its minors."""
    if len(matrices) == 1:
        return matrices[0, 0]
    minors = [jnp.delete(matrices[1:], k, axis=1) for k in range(len(matrices))]
    terms = [(-1) ** k * matrices[0, k] * _determinant(minor) for k, minor in enumerate(minors)]
    result: Array = reduce(jnp.add, terms)
    return result


class _Orthonormal(NamedTuple):
    waiting: list[Column]  # scaled to norm 1, the next one first
    left: list[Column]  # orthonormal, the last one last; 0 for those that are not there yet
    covered: Float[Array, "m B"]  # the squares of what `left` has of each coordinate axis
    own: Float[Array, " B"]  # the square of what of the next column is orthogonal to `left`


def _orthonormal(found: Rotated, rows: int) -> list[Column]:
    """The columns of W scaled to norm 1. Those that are none, or rounding alone, are replaced:
    each by the coordinate axis that lies farthest from the columns before."""
    waiting = []
    for column, square in zip(found.columns, found.squares, strict=True):
        kept = ~(square <= jnp.finfo(square.dtype).tiny ** 0.75)  # NaN stays NaN
        scale = jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, square, 1)), 0)
        waiting.append(scale[None] * column[:rows])
    size, zero = len(waiting), jnp.zeros_like(waiting[0])

    def add(_: Array, at: _Orthonormal) -> _Orthonormal:
        chosen = jnp.where((at.own < 0.5)[None], _first_least(at.covered), at.waiting[0])
        for _again in range(2):  # twice is enough
            chosen = _without(at.left, chosen)
            chosen = chosen * jax.lax.rsqrt(_inner(chosen, chosen))[None]
        left = [*at.left[1:], chosen]
        waiting = at.waiting[1:] + at.waiting[:1]
        rest = _without(left, waiting[0])
        covered = reduce(jnp.add, [u * u for u in left])
        return _Orthonormal(waiting, left, covered, _inner(rest, rest))

    start = _Orthonormal(waiting, [zero] * size, zero, _inner(waiting[0], waiting[0]))
    end: _Orthonormal = jax.lax.fori_loop(0, size, add, start)
    return end.left


def _first_least(x: Float[Array, "m B"]) -> Float[Array, "m B"]:
    """1 at the first of the least entries, 0 elsewhere."""
    least = reduce(jnp.minimum, list(x))
    here = x == least[None]
    before = [jnp.zeros_like(here[0])]
    for k in range(len(x) - 1):
        before.append(before[-1] | here[k])
    first: Array = (here & ~jnp.stack(before)).astype(x.dtype)
    return first


def _inner(x: Column, y: Column) -> Float[Array, " B"]:
    """⟨x, y⟩, term by term: sums over an axis are slower."""
    return reduce(jnp.add, [x[k] * y[k] for k in range(len(x))])


def _without(basis: list[Column], x: Column) -> Column:
    """x less its parts along orthonormal columns."""
    for u in basis:
        x = x - _inner(u, x)[None] * u
    return x
