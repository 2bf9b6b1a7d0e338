"""Singular value decompositions of batches of matrices with at most four columns, without LAPACK.

One-sided Jacobi rotations of pairs of columns make all columns orthogonal (J. Demmel and K.
Veselić, SIAM J. Matrix Anal. Appl. 13, 1204 (1992)); small columns stay as accurate as large ones.

The batch is the last axis, so that all operations are elementwise. XLA may then compute one number
several times with different rounding. Numbers on which a choice depends are therefore carried
through the loop, where each has one value.
"""

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

#: The largest number of columns for which this is faster than LAPACK.
SMALL = 4
#: Iterations until float64 converges, by the number of columns. Three iterations make a sweep over
#: all pairs of three or four columns; with four, two pairs are rotated in each.
_TURNS = {1: 0, 2: 3, 3: 18, 4: 21}
#: Sorting networks: the pairs of columns to compare and swap, one after another.
_SORTING: dict[int, tuple[tuple[int, int], ...]] = {
    1: (),
    2: ((0, 1),),
    3: ((0, 1), (1, 2), (0, 1)),
    4: ((0, 1), (2, 3), (0, 2), (1, 3), (1, 2)),
}

#: One column of each of B matrices.
Column = Float[Array, "m B"]


class Rotated(NamedTuple):
    """W = A V with orthogonal columns and V a rotation; W = U diag(s) for A = U diag(s) Vᵀ."""

    columns: list[Float[Array, "m_and_n B"]]  # of W and, below, of V
    squares: list[Float[Array, " B"]]  # |wₖ|²


def rotate(matrices: Float[Array, "B m n"]) -> Rotated:
    """Return W and V with the columns of W in falling order of norm, each as accurate relative to
    its norm as the columns of A."""
    many, rows, size = matrices.shape
    half = size // 2
    unit = jnp.broadcast_to(jnp.eye(size, dtype=matrices.dtype)[..., None], (size, size, many))
    stacked = jnp.concatenate([jnp.moveaxis(matrices, (2, 1), (0, 1)), unit], axis=1)

    def with_products(columns: list[Column]) -> tuple[Rotated, list[Float[Array, " B"]]]:
        """Return the columns, |wₖ|², and ⟨wᵢ, wⱼ⟩ of the pairs to rotate next."""
        tops = [column[:rows] for column in columns]
        squares = list(map(_inner, tops, tops))
        inner = list(map(_inner, tops[:half], tops[half:]))
        return Rotated(columns, squares), inner

    def body_fun(_: Array, carry: tuple[Rotated, list[Array]]) -> tuple[Rotated, list[Array]]:
        (columns, squares), inner = carry
        columns = list(columns)
        for i in range(half):
            j = half + i
            cosine, sine = _angle(squares[i], squares[j], inner[i])
            p, q = columns[i], columns[j]
            columns[i], columns[j] = cosine * p - sine * q, sine * p + cosine * q
        return with_products(_next_pairs(columns))

    end, _ = jax.lax.fori_loop(0, _TURNS[size], body_fun, with_products(list(stacked)))
    return _sorted(end)


def _next_pairs(columns: list[Column]) -> list[Column]:
    """Return the columns reordered for the next iteration: in three iterations each pair is rotated
    once."""
    if len(columns) == 4:
        a, b, c, d = columns
        return [a, c, d, b]
    return columns[1:] + columns[:1] if len(columns) == 3 else columns


def _angle(p: Array, q: Array, inner: Array) -> tuple[Array, Array]:
    """Return cosine and sine, (1, B), of the smaller angle that makes two columns orthogonal, from
    |p|², |q|² and ⟨p, q⟩."""
    gap, inner = q - p, 2 * inner
    below = jnp.abs(gap) + jnp.sqrt(gap * gap + inner * inner)
    tangent = jnp.where(gap < 0, -inner, inner) / jnp.where(below == 0, 1, below)
    cosine = jax.lax.rsqrt(1 + tangent * tangent)
    return cosine[None], (tangent * cosine)[None]


def _sorted(rotated: Rotated) -> Rotated:
    """Sort the columns by falling norm."""
    columns, squares = list(rotated.columns), list(rotated.squares)
    for i, j in _SORTING[len(squares)]:
        out_of_order = squares[j] > squares[i]
        for stack in (squares, columns):
            p, q = stack[i], stack[j]
            stack[i], stack[j] = jnp.where(out_of_order, q, p), jnp.where(out_of_order, p, q)
    return Rotated(columns, squares)


def small_polar(
    matrix: Float[Array, "*batch m n"], *, proper: bool = False
) -> Float[Array, "*batch m n"]:
    """Compute the orthogonal polar factor R = UVᵀ of K = U diag(s) Vᵀ, for m ≤ n ≤ 4.

    If K is rank-deficient, R is completed to orthonormal rows. If `proper`, for m = n, the result
    is U diag(1, …, 1, ±1) Vᵀ of determinant 1."""
    rows, size = matrix.shape[-2:]
    flat = matrix.reshape(-1, rows, size)
    flat = jnp.pad(flat, [(0, 0), (0, size - rows), (0, 0)])
    largest = jnp.abs(flat).max((1, 2), keepdims=True)
    rotated = rotate(flat / jnp.where(largest > 0, largest, 1))
    left = _orthonormal(rotated, size)
    right = [column[size:] for column in rotated.columns]
    terms = [u[:, None] * v[None] for u, v in zip(left, right, strict=True)]
    factor = reduce(jnp.add, terms)
    if proper:
        factor = jnp.where(_determinant(factor)[None, None] < 0, factor - 2 * terms[-1], factor)
    return jnp.moveaxis(factor[:rows], -1, 0).reshape(matrix.shape)


def small_principal(matrix: Float[Array, "m n"]) -> tuple[Float[Array, "m n"], Float[Array, "n n"]]:
    """Return A V = U diag(s) and Vᵀ of one matrix A of n ≤ 4 columns, in falling order of s;
    columns of A V beyond the m-th are 0."""
    rows, size = matrix.shape
    largest = jnp.abs(matrix).max()
    unit = jnp.where(largest > 0, largest, 1)
    columns = jnp.stack(rotate((matrix / unit)[None]).columns)[..., 0]
    principal = jnp.where(jnp.arange(size)[None] < rows, unit * columns[:, :rows].T, 0)
    return principal, columns[:, rows:]


def _determinant(matrices: Float[Array, "n n B"]) -> Float[Array, " B"]:
    """Compute determinants by expansion along the first row."""
    if len(matrices) == 1:
        return matrices[0, 0]
    minors = [jnp.delete(matrices[1:], k, axis=1) for k in range(len(matrices))]
    terms = [(-1) ** k * matrices[0, k] * _determinant(minor) for k, minor in enumerate(minors)]
    result: Array = reduce(jnp.add, terms)
    return result


class _Orthonormal(NamedTuple):
    """Carry of the orthonormalisation."""

    waiting: list[Column]  # scaled to norm 1; the next column comes first
    left: list[Column]  # orthonormal, the newest last; 0 where not computed yet
    covered: Float[Array, "m B"]  # squared projections of the coordinate axes on `left`
    own: Float[Array, " B"]  # squared norm of the next column, less its projection on `left`


def _orthonormal(rotated: Rotated, rows: int) -> list[Column]:
    """Return the columns of W scaled to norm 1. Columns that are zero, or rounding error, are
    replaced by the coordinate axis farthest from the span of the columns before, orthogonalised."""
    waiting = []
    for column, square in zip(rotated.columns, rotated.squares, strict=True):
        regular = ~(square <= jnp.finfo(square.dtype).tiny ** 0.75)  # NaN stays NaN
        scale = jnp.where(regular, jax.lax.rsqrt(jnp.where(regular, square, 1)), 0)
        waiting.append(scale[None] * column[:rows])
    size, zero = len(waiting), jnp.zeros_like(waiting[0])

    def add(_: Array, carry: _Orthonormal) -> _Orthonormal:
        column = jnp.where((carry.own < 0.5)[None], _first_least(carry.covered), carry.waiting[0])
        for _again in range(2):  # the second pass removes the rounding of the first
            column = _without(carry.left, column)
            column = column * jax.lax.rsqrt(_inner(column, column))[None]
        left = [*carry.left[1:], column]
        waiting = carry.waiting[1:] + carry.waiting[:1]
        remainder = _without(left, waiting[0])
        covered = reduce(jnp.add, [u * u for u in left])
        return _Orthonormal(waiting, left, covered, _inner(remainder, remainder))

    start = _Orthonormal(waiting, [zero] * size, zero, _inner(waiting[0], waiting[0]))
    end: _Orthonormal = jax.lax.fori_loop(0, size, add, start)
    return end.left


def _first_least(x: Float[Array, "m B"]) -> Float[Array, "m B"]:
    """Return 1 at the first of the smallest entries, and 0 elsewhere."""
    least = reduce(jnp.minimum, list(x))
    here = x == least[None]
    before = [jnp.zeros_like(here[0])]
    for k in range(len(x) - 1):
        before.append(before[-1] | here[k])
    first: Array = (here & ~jnp.stack(before)).astype(x.dtype)
    return first


def _inner(x: Column, y: Column) -> Float[Array, " B"]:
    """Compute ⟨x, y⟩ term by term, which is faster than a sum over an axis."""
    return reduce(jnp.add, map(jnp.multiply, x, y))


def _without(basis: list[Column], x: Column) -> Column:
    """Return x less its projection on orthonormal columns."""
    for u in basis:
        x = x - _inner(u, x)[None] * u
    return x
