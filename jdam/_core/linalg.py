"""Polar factors and positive semidefinite roots, with derivatives that survive repeated
and vanishing singular values, where those of `jnp.linalg.svd` and `eigh` are NaN."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam._core.derivatives import full_precision
from jdam._core.jacobi import SMALL, small_polar
from jdam._core.lapack import determinant, eigh, full_svd, svd
from jdam._core.newton import newton_polar

#: How many numbers may be summed one after the other.
LONG = 256
#: How many products a matrix product may sum, in lanes.
PIECE = 2048


def polar(matrix: Float[Array, "*batch m n"]) -> Float[Array, "*batch m n"]:
    """The orthogonal polar factor R of K = H R, for m ≤ n: R Rᵀ = I and H = (K Kᵀ)^½ ⪰ 0.

    R maximises ⟨R, K⟩ among matrices with orthonormal rows (the Procrustes problem). Where
    K loses rank, R is completed by an arbitrary orthogonal choice.
    """
    return _small_polar(matrix) if matrix.shape[-1] <= SMALL else _polar(matrix)[0]


@jax.custom_jvp
def _small_polar(matrix: Array) -> Array:
    return small_polar(matrix)


@_small_polar.defjvp
@full_precision
def _small_polar_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    (matrix,), (dmatrix,) = primals, tangents
    factor = _small_polar(matrix)
    values, left = eigh(jax.lax.stop_gradient(_symmetric(matrix @ factor.mT)))
    return factor, _polar_derivative(matrix, dmatrix, factor, (left, jnp.maximum(values, 0)))


@jax.custom_jvp
def _polar(matrix: Array) -> tuple[Array, Array, Array]:
    """R, and U and s of K = U diag(s) Vᵀ, which count as constant."""
    found: tuple[Array, Array, Array] = jax.lax.platform_dependent(
        matrix, cpu=_polar_by_svd, default=_polar_by_newton
    )
    return found


def _polar_by_svd(matrix: Array) -> tuple[Array, Array, Array]:
    left, values, right = svd(matrix)
    return left @ right, left, values


def _polar_by_newton(matrix: Array) -> tuple[Array, Array, Array]:
    factor = newton_polar(matrix)
    values, left = eigh(_symmetric(matrix @ factor.mT))  # compiled for derivatives only
    return factor, left, jnp.maximum(values, 0)


@_polar.defjvp
@full_precision
def _polar_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    (matrix,), (dmatrix,) = primals, tangents
    factor, *constant = _polar(matrix)
    left, values = jax.lax.stop_gradient(constant)
    derivative = _polar_derivative(matrix, dmatrix, factor, (left, values))
    still = jax.tree.map(jnp.zeros_like, (left, values))
    return (factor, left, values), (derivative, *still)


def _polar_derivative(
    matrix: Array, dmatrix: Array, factor: Array, spectrum: tuple[Array, Array]
) -> Array:
    """dR, given U and s of K."""
    # dK Rᵀ = dH + H W with W = dR Rᵀ skew and dH symmetric, so H W + W H = dK Rᵀ − R dKᵀ; and
    # what of dR lies outside the rows of R is H⁻¹ dK (I − RᵀR).
    left, values = spectrum
    root = _symmetric(matrix @ factor.mT)
    inner = dmatrix @ factor.mT
    derivative: Array = _solve_lyapunov(root, values, left, inner - inner.mT) @ factor
    if matrix.shape[-2] < matrix.shape[-1]:
        outside = dmatrix - inner @ factor
        derivative = derivative + _solve(root, values, left, outside)
    return derivative


def nearest_rotation(matrix: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """The rotation R, of determinant 1, that maximises ⟨R, K⟩: U diag(1, …, 1, ±1) Vᵀ of
    K = U diag(s) Vᵀ, completed where K loses rank. It has no derivative."""
    matrix = jax.lax.stop_gradient(matrix)
    size = matrix.shape[-1]
    if size <= SMALL:
        return small_polar(matrix, proper=True)
    left, _, right = svd(matrix)
    sign = determinant(left @ right)[..., None]
    signs = jnp.where(jnp.arange(size) == size - 1, jnp.sign(sign), jnp.ones_like(sign))
    rotation: Array = (left * signs[..., None, :]) @ right
    return rotation


class ShrunkPolar(NamedTuple):
    """The shrunk polar factor of a matrix, and its singular value decomposition K = U diag(s) Vᵀ,
    which counts as constant."""

    factor: Float[Array, "*batch m n"]
    left: Float[Array, "*batch m m"]  # U
    values: Float[Array, "*batch m"]  # s
    right: Float[Array, "*batch n n"]  # Vᵀ, all of it


@jax.custom_jvp
def shrunk_polar(matrix: Float[Array, "*batch m n"]) -> ShrunkPolar:
    """R = U diag(`shrink`(s)) Vᵀ of K = U diag(s) Vᵀ, for m ≤ n: the polar factor, but smooth.

    With H = (4KKᵀ + I)^½, (H + I) R = 2K and H = 2KRᵀ + I. R maximises 2⟨R, K⟩ +
    log det(I − RRᵀ). Near K = 0 it is K, and it tends to the polar factor as K grows.
    """
    rows, columns = matrix.shape[-2:]
    left, values, right = (full_svd if rows < columns else svd)(matrix)
    factor = (left * shrink(values)[..., None, :]) @ right[..., :rows, :]
    return ShrunkPolar(factor, left, values, right)


@shrunk_polar.defjvp
@full_precision
def _shrunk_polar_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    # H H = 4KKᵀ + I, so H dH + dH H = 4(dK Kᵀ + K dKᵀ); and (H + I) dR = 2dK − dH R.
    (matrix,), (dmatrix,) = primals, tangents
    found = shrunk_polar(matrix)
    root = 2 * _symmetric(matrix @ found.factor.mT)
    unit = jnp.broadcast_to(jnp.eye(root.shape[-1], dtype=root.dtype), root.shape)
    left, values, right = jax.lax.stop_gradient(found[1:])
    sizes = jnp.hypot(2 * values, 1)
    inner = 8 * _symmetric(dmatrix @ matrix.mT)
    droot = _solve_lyapunov(root + unit, sizes, left, inner)
    rest = 2 * dmatrix - droot @ found.factor
    dfactor = _solve(root + 2 * unit, sizes + 1, left, rest)
    still = jax.tree.map(jnp.zeros_like, (left, values, right))
    return found, ShrunkPolar(dfactor, *still)


@jax.custom_jvp
def shrink(values: Array) -> Array:
    """r = 2s/(√(4s² + 1) + 1), whose inverse is s = r/(1 − r²)."""
    return 2 * values / (jnp.hypot(2 * values, 1) + 1)


@shrink.defjvp
@full_precision
def _shrink_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    shrunk = shrink(*primals)
    square = shrunk * shrunk
    return shrunk, (1 - square) ** 2 / (1 + square) * tangents[0]


@jax.custom_jvp
def psd_root(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """The symmetric root S ⪰ 0 of a symmetric matrix A ⪰ 0: S S = A.

    Negative eigenvalues count as zero, so that |S S − A| measures how far A is from ⪰ 0.
    """
    values, basis = eigh(matrix)
    result: Array = (basis * jnp.sqrt(jnp.maximum(values, 0))[..., None, :]) @ basis.mT
    return result


@psd_root.defjvp
@full_precision
def _psd_root_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    # S S = A, so S dS + dS S = dA.
    (matrix,), (dmatrix,) = primals, tangents
    root = psd_root(matrix)
    values, basis = eigh(jax.lax.stop_gradient(matrix))
    values = jnp.sqrt(jnp.maximum(values, 0))
    return root, _solve_lyapunov(root, values, basis, _symmetric(dmatrix))


def rotation_part(factor: Float[Array, "d r"], tangent: Float[Array, "d r"]) -> Array:
    """The L Ω, Ω skew, that is nearest to a tangent dL: with G = LᵀL, G Ω + Ω G = LᵀdL − dLᵀL."""
    gram = factor.mT @ factor
    values, basis = eigh(jax.lax.stop_gradient(gram))
    inner = factor.mT @ tangent
    return factor @ _solve_lyapunov(gram, jnp.maximum(values, 0), basis, inner - inner.mT)


def _solve_lyapunov(root: Array, values: Array, basis: Array, right: Array) -> Array:
    """Y with S Y + Y S = B, given S and its eigenvalues and eigenvectors; the pseudo-inverse's
    solution where eigenvalues vanish. As the solution of a linear system it can be
    differentiated again and again, without the derivatives of the eigenvectors."""
    sums = values[..., :, None] + values[..., None, :]
    result: Array = jax.lax.custom_linear_solve(
        lambda y: root @ y + y @ root,
        right,
        lambda _, b: basis @ ((basis.mT @ b @ basis) * _pseudo_reciprocal(sums)) @ basis.mT,
        symmetric=True,
    )
    return result


def _solve(root: Array, values: Array, basis: Array, right: Array) -> Array:
    """Y with S Y = B, likewise."""
    result: Array = jax.lax.custom_linear_solve(
        lambda y: root @ y,
        right,
        lambda _, b: basis @ ((basis.mT @ b) * _pseudo_reciprocal(values[..., :, None])),
        symmetric=True,
    )
    return result


def _symmetric(matrix: Array) -> Array:
    return (matrix + matrix.mT) / 2


def _pseudo_reciprocal(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch m n"]:
    """1/x, and 0 where x is no more than the rounding of the largest: the pseudo-inverse."""
    rounding = max(x.shape[-2:]) * float(jnp.finfo(x.dtype).eps)
    kept = x > rounding * x.max((-1, -2), keepdims=True)
    return jnp.where(kept, 1 / jnp.where(kept, x, 1), 0)


def safe_sqrt(x: Array) -> Array:
    """√x with derivative 0 instead of infinity at x = 0."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))


def safe_log(x: Array) -> Array:
    """log x, −∞ where x is 0, with derivative 0 there."""
    on = x > 0
    return jnp.where(on, jnp.log(jnp.where(on, x, 1)), -jnp.inf)


def rounding(terms: int, dtype: jnp.dtype) -> float:
    """A bound on the relative error of a sum of so many rounded squares or products."""
    return (terms + 8) * float(jnp.finfo(dtype).eps)


def long_sum(x: Float[Array, "*batch n"]) -> Float[Array, " *batch"]:
    """Σₙ xₙ in blocks of blocks, whose rounding grows with log n: a running sum's grows with n."""
    while x.shape[-1] > 2 * LONG:
        missing = -x.shape[-1] % LONG
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
        x = x.reshape(*x.shape[:-1], -1, LONG).sum(-1)
        x = jax.lax.optimization_barrier(x)  # XLA would make one running sum of both
    return x.sum(-1)


def long_vecdot(
    x: Float[Array, "*batch n"], y: Float[Array, "*batch n"]
) -> Float[Array, " *batch"]:
    """⟨x, y⟩ along the last axis, long ones in pieces. As an inner product it is summed in lanes,
    which in float32 keeps a digit more than one running sum."""
    if x.shape[-1] <= PIECE:
        return jnp.vecdot(x, y)
    return long_sum(jnp.vecdot(_in_pieces(x), _in_pieces(y)))


def long_products(x: Float[Array, " n"], ys: Float[Array, "B n"]) -> Float[Array, " B"]:
    """⟨x, yᵢ⟩, of a vmapped batch of x by matrix products, of long vectors in pieces."""
    if x.size <= PIECE:
        # In this order the product, vmapped over x, is (queries, patterns) and row-major.
        return jnp.vecmat(x, ys.mT)
    return long_sum(jnp.einsum("kc,bkc->bk", _in_pieces(x), _in_pieces(ys)))


def _in_pieces(x: Float[Array, "*batch n"]) -> Float[Array, "*batch k c"]:
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % PIECE)])
    return x.reshape(*x.shape[:-1], -1, PIECE)


def squared_norm(x: Float[Array, "*batch m n"]) -> Float[Array, " *batch"]:
    """|x|_F² of each matrix."""
    flat = x.reshape(*x.shape[:-2], -1)
    return long_vecdot(flat, flat)
