"""Polar factors, roots and sums that are safe to differentiate and to round.

Derivatives of `jnp.linalg.svd` and `eigh` are NaN at repeated or vanishing singular values; those
of the functions here are finite.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree

from jdam._core.batching import by_platform
from jdam._core.derivatives import full_precision
from jdam._core.jacobi import SMALL, small_polar
from jdam._core.lapack import determinant, eigh, full_svd, svd
from jdam._core.newton import newton_polar

#: The length of the blocks in which long sums are computed.
LONG = 256
#: The longest inner product that one matrix product sums, in lanes.
PIECE = 2048


def polar(matrix: Float[Array, "*batch m n"]) -> Float[Array, "*batch m n"]:
    """Compute the orthogonal polar factor R of K = H R, for m ≤ n: R Rᵀ = I and H = (K Kᵀ)^½ ⪰ 0.

    R maximises ⟨R, K⟩ among matrices with orthonormal rows (the Procrustes problem). If K is
    rank-deficient, R is completed to orthonormal rows by an arbitrary choice."""
    return _small_polar(matrix) if matrix.shape[-1] <= SMALL else _polar(matrix)[0]


_small_polar = jax.custom_jvp(lambda matrix: small_polar(matrix))


@_small_polar.defjvp
@full_precision
def _small_polar_jvp(
    primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> tuple[PyTree, PyTree]:
    (matrix,), (dmatrix,) = primals, tangents
    factor = _small_polar(matrix)
    values, left = eigh(jax.lax.stop_gradient(_symmetric(matrix @ factor.mT)))
    return factor, _polar_derivative(matrix, dmatrix, factor, (left, jnp.maximum(values, 0)))


@jax.custom_jvp
def _polar(matrix: Array) -> tuple[Array, Array, Array]:
    """Compute R, and U and s of K = U diag(s) Vᵀ, which count as constants."""
    if by_platform(cpu=True, accelerator=False):
        left, values, right = svd(matrix)
        return left @ right, left, values
    factor = newton_polar(matrix)
    values, left = eigh(_symmetric(matrix @ factor.mT))  # XLA drops this unless differentiated
    return factor, left, jnp.maximum(values, 0)


@_polar.defjvp
@full_precision
def _polar_jvp(primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]) -> tuple[PyTree, PyTree]:
    (matrix,), (dmatrix,) = primals, tangents
    factor, *constant = _polar(matrix)
    left, values = jax.lax.stop_gradient(constant)
    derivative = _polar_derivative(matrix, dmatrix, factor, (left, values))
    zeros = jax.tree.map(jnp.zeros_like, (left, values))
    return (factor, left, values), (derivative, *zeros)


def _polar_derivative(
    matrix: Array, dmatrix: Array, factor: Array, spectrum: tuple[Array, Array]
) -> Array:
    """Compute dR, given U and s of K."""
    # dK Rᵀ = dH + H W with W = dR Rᵀ skew and dH symmetric, so H W + W H = dK Rᵀ − R dKᵀ. The part
    # of dR outside the row space of R is H⁻¹ dK (I − RᵀR).
    left, values = spectrum
    root = _symmetric(matrix @ factor.mT)
    inner = dmatrix @ factor.mT
    derivative: Array = _solve_lyapunov(root, values, left, inner - inner.mT) @ factor
    if matrix.shape[-2] < matrix.shape[-1]:
        outside = dmatrix - inner @ factor
        derivative = derivative + _solve(root, values, left, outside)
    return derivative


def nearest_rotation(matrix: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """Return the rotation R, of determinant 1, that maximises ⟨R, K⟩.

    For K = U diag(s) Vᵀ it is U diag(1, …, 1, ±1) Vᵀ, completed arbitrarily if K is rank-deficient.
    It has no derivative."""
    matrix = jax.lax.stop_gradient(matrix)
    size = matrix.shape[-1]
    if size == 2:
        return _plane_rotation(matrix)
    if size <= SMALL:
        return small_polar(matrix, proper=True)
    left, _, right = svd(matrix)
    sign = determinant(left @ right)[..., None]
    signs = jnp.where(jnp.arange(size) == size - 1, jnp.sign(sign), jnp.ones_like(sign))
    rotation: Array = (left * signs[..., None, :]) @ right
    return rotation


def _plane_rotation(matrix: Float[Array, "*batch 2 2"]) -> Float[Array, "*batch 2 2"]:
    """Return the R of `nearest_rotation` in the plane, by its angle θ:
    ⟨R, K⟩ = (K₁₁ + K₂₂) cos θ + (K₂₁ − K₁₂) sin θ."""
    cosine, sine = jnp.trace(matrix, axis1=-2, axis2=-1), matrix[..., 1, 0] - matrix[..., 0, 1]
    norm = jnp.hypot(cosine, sine)
    cosine, norm = (jnp.where(norm == 0, 1, x) for x in (cosine, norm))  # K has no angle
    rows = jnp.stack([cosine, -sine], -1), jnp.stack([sine, cosine], -1)
    return jnp.stack(rows, -2) / norm[..., None, None]


class ShrunkPolar(NamedTuple):
    """Result of `shrunk_polar`: the factor, and K = U diag(s) Vᵀ, which counts as constant."""

    factor: Float[Array, "*batch m n"]
    left: Float[Array, "*batch m m"]  # U
    values: Float[Array, "*batch m"]  # s
    right: Float[Array, "*batch n n"]  # Vᵀ, square


@jax.custom_jvp
def shrunk_polar(matrix: Float[Array, "*batch m n"]) -> ShrunkPolar:
    """Compute R = U diag(`shrink`(s)) Vᵀ of K = U diag(s) Vᵀ, for m ≤ n: a smooth polar factor.

    With H = (4KKᵀ + I)^½, (H + I) R = 2K and H = 2KRᵀ + I. R maximises 2⟨R, K⟩ + log det(I − RRᵀ).
    R ≈ K near K = 0, and R tends to the polar factor as K grows."""
    rows, columns = matrix.shape[-2:]
    left, values, right = (full_svd if rows < columns else svd)(matrix)
    factor = (left * shrink(values)[..., None, :]) @ right[..., :rows, :]
    return ShrunkPolar(factor, left, values, right)


@shrunk_polar.defjvp
@full_precision
def _shrunk_polar_jvp(
    primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> tuple[PyTree, PyTree]:
    # H H = 4KKᵀ + I, so H dH + dH H = 4(dK Kᵀ + K dKᵀ); and (H + I) dR = 2dK − dH R.
    (matrix,), (dmatrix,) = primals, tangents
    primal_out = shrunk_polar(matrix)
    root = 2 * _symmetric(matrix @ primal_out.factor.mT)
    unit = jnp.broadcast_to(jnp.eye(root.shape[-1], dtype=root.dtype), root.shape)
    left, values, right = jax.lax.stop_gradient(primal_out[1:])
    sizes = jnp.hypot(2 * values, 1)
    inner = 8 * _symmetric(dmatrix @ matrix.mT)
    droot = _solve_lyapunov(root + unit, sizes, left, inner)
    rest = 2 * dmatrix - droot @ primal_out.factor
    dfactor = _solve(root + 2 * unit, sizes + 1, left, rest)
    zeros = jax.tree.map(jnp.zeros_like, (left, values, right))
    return primal_out, ShrunkPolar(dfactor, *zeros)


@jax.custom_jvp
def shrink(values: Array) -> Array:
    """Compute r = 2s/(√(4s² + 1) + 1), whose inverse is s = r/(1 − r²)."""
    return 2 * values / (jnp.hypot(2 * values, 1) + 1)


@shrink.defjvp
@full_precision
def _shrink_jvp(primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]) -> tuple[PyTree, PyTree]:
    shrunk = shrink(*primals)
    square = shrunk * shrunk
    return shrunk, (1 - square) ** 2 / (1 + square) * tangents[0]


@jax.custom_jvp
def psd_root(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """Compute the symmetric root S ⪰ 0 of a symmetric matrix A ⪰ 0: S S = A.

    Negative eigenvalues count as zero, so that |S S − A| measures how far A is from ⪰ 0."""
    values, basis = eigh(matrix)
    result: Array = (basis * jnp.sqrt(jnp.maximum(values, 0))[..., None, :]) @ basis.mT
    return result


@psd_root.defjvp
@full_precision
def _psd_root_jvp(
    primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> tuple[PyTree, PyTree]:
    # S S = A, so S dS + dS S = dA.
    (matrix,), (dmatrix,) = primals, tangents
    root = psd_root(matrix)
    values, basis = eigh(jax.lax.stop_gradient(matrix))
    values = jnp.sqrt(jnp.maximum(values, 0))
    return root, _solve_lyapunov(root, values, basis, _symmetric(dmatrix))


def rotation_part(factor: Float[Array, "d r"], tangent: Float[Array, "d r"]) -> Array:
    """Return the L Ω, with Ω skew, nearest to a tangent dL: G Ω + Ω G = LᵀdL − dLᵀL for G = LᵀL."""
    gram = factor.mT @ factor
    values, basis = eigh(jax.lax.stop_gradient(gram))
    inner = factor.mT @ tangent
    return factor @ _solve_lyapunov(gram, jnp.maximum(values, 0), basis, inner - inner.mT)


def _solve_lyapunov(root: Array, values: Array, basis: Array, right: Array) -> Array:
    """Solve S Y + Y S = B, given S and its eigenvalues and eigenvectors, by the pseudo-inverse if S
    is singular.

    As the solution of a linear system, Y can be differentiated repeatedly, without derivatives of
    the eigenvectors."""
    sums = values[..., :, None] + values[..., None, :]
    result: Array = jax.lax.custom_linear_solve(
        lambda y: root @ y + y @ root,
        right,
        lambda _, b: basis @ ((basis.mT @ b @ basis) * _pseudo_reciprocal(sums)) @ basis.mT,
        symmetric=True,
    )
    return result


def _solve(root: Array, values: Array, basis: Array, right: Array) -> Array:
    """Solve S Y = B in the same way."""
    result: Array = jax.lax.custom_linear_solve(
        lambda y: root @ y,
        right,
        lambda _, b: basis @ ((basis.mT @ b) * _pseudo_reciprocal(values[..., :, None])),
        symmetric=True,
    )
    return result


def pseudo_solve(
    matrix: Float[Array, "*batch n n"], right: Float[Array, "*batch n"], rtol: float
) -> Float[Array, "*batch n"]:
    """Compute A⁺b of symmetric matrices A, in the same way. Eigenvalues up to `rtol` times the
    largest one count as 0."""
    matrix = _symmetric(matrix)
    values, basis = eigh(jax.lax.stop_gradient(matrix))
    sizes = jnp.abs(values)
    regular = sizes > rtol * sizes.max(-1, keepdims=True)
    reciprocal = jnp.where(regular, 1 / jnp.where(regular, values, 1), 0)
    result: Array = jax.lax.custom_linear_solve(
        lambda x: jnp.matvec(matrix, x),
        right,
        lambda _, b: jnp.matvec(basis, reciprocal * jnp.vecmat(b, basis)),
        symmetric=True,
    )
    return result


def _symmetric(matrix: Array) -> Array:
    return (matrix + matrix.mT) / 2


def _pseudo_reciprocal(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch m n"]:
    """Return 1/x, or 0 where x is at most the rounding error of the largest entry."""
    rounding = max(x.shape[-2:]) * float(jnp.finfo(x.dtype).eps)
    regular = x > rounding * x.max((-1, -2), keepdims=True)
    return jnp.where(regular, 1 / jnp.where(regular, x, 1), 0)


def safe_sqrt(x: Array) -> Array:
    """Compute √x with derivative 0 at x = 0."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))


def safe_log(x: Array) -> Array:
    """Compute log x, which is −∞ with derivative 0 at x = 0."""
    on = x > 0
    return jnp.where(on, jnp.log(jnp.where(on, x, 1)), -jnp.inf)


def rounding(terms: int, dtype: jnp.dtype) -> float:
    """Return a bound on the relative error of a sum of `terms` rounded squares or products."""
    return (terms + 8) * float(jnp.finfo(dtype).eps)


def long_sum(x: Float[Array, "*batch n"]) -> Float[Array, " *batch"]:
    """Compute Σₙ xₙ by blocks of blocks, so that the rounding error grows with log n instead of
    n."""
    while x.shape[-1] > 2 * LONG:
        missing = -x.shape[-1] % LONG
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
        x = x.reshape(*x.shape[:-1], -1, LONG).sum(-1)
        x = jax.lax.optimization_barrier(x)  # XLA would merge both into one running sum
    return x.sum(-1)


def long_vecdot(
    x: Float[Array, "*batch n"], y: Float[Array, "*batch n"]
) -> Float[Array, " *batch"]:
    """Compute ⟨x, y⟩ along the last axis, long vectors in pieces.

    Inner products are summed in lanes, which in float32 is a digit more accurate than one running
    sum."""
    if x.shape[-1] <= PIECE:
        return jnp.vecdot(x, y)
    return long_sum(jnp.vecdot(_in_pieces(x), _in_pieces(y)))


def long_products(x: Float[Array, " n"], ys: Float[Array, "B n"]) -> Float[Array, " B"]:
    """Compute ⟨x, yᵢ⟩, long vectors in pieces; under `jax.vmap` over x, by matrix products."""
    if x.size <= PIECE:
        # In this order, the product under `jax.vmap` over x is a row-major (queries, patterns).
        return jnp.vecmat(x, ys.mT)
    return long_sum(jnp.einsum("kc,bkc->bk", _in_pieces(x), _in_pieces(ys)))


def _in_pieces(x: Float[Array, "*batch n"]) -> Float[Array, "*batch k c"]:
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % PIECE)])
    return x.reshape(*x.shape[:-1], -1, PIECE)


def squared_norm(x: Float[Array, "*batch m n"]) -> Float[Array, " *batch"]:
    """Compute |x|_F² of each matrix."""
    flat = x.reshape(*x.shape[:-2], -1)
    return long_vecdot(flat, flat)


def squared_distances(x: Float[Array, "..."], ys: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """Compute |x − yᵢ|² of arrays, from differences: relative accuracy even for near-coincident
    points."""
    difference = (x[None] - ys).reshape(len(ys), -1)
    return long_vecdot(difference, difference)
