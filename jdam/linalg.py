"""Polar factors and positive semidefinite roots, with derivatives that survive repeated
and vanishing singular values, where those of `jnp.linalg.svd` and `eigh` are NaN."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


@jax.custom_jvp
def polar(matrix: Float[Array, "*batch m n"]) -> Float[Array, "*batch m n"]:
    """The orthogonal polar factor R of K = H R, for m ≤ n: R Rᵀ = I and H = (K Kᵀ)^½ ⪰ 0.

    R maximises ⟨R, K⟩ among matrices with orthonormal rows (the Procrustes problem). Where
    K loses rank, R is completed by an arbitrary orthogonal choice.
    """
    left, _, right = jnp.linalg.svd(matrix, full_matrices=False)
    return left @ right


@polar.defjvp
def _polar_jvp(primals, tangents):
    # With K = U S Vᵀ and M = Uᵀ dK V:  dR = U [(M − Mᵀ) ∘ 1/(sᵢ+sⱼ)] Vᵀ + U S⁻¹ Uᵀ dK (I − V Vᵀ).
    (matrix,), (dmatrix,) = primals, tangents
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    inner = left.mT @ dmatrix
    square = inner @ right.mT
    sums = values[..., :, None] + values[..., None, :]
    skew = (square - square.mT) * _safe_reciprocal(sums)
    outer = (inner - square @ right) * _safe_reciprocal(values)[..., :, None]
    return left @ right, left @ (skew @ right + outer)


@jax.custom_jvp
def psd_root(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """The symmetric root S ⪰ 0 of a symmetric matrix A ⪰ 0: S S = A.

    Negative eigenvalues count as zero, so that |S S − A| measures how far A is from ⪰ 0.
    """
    values, vectors = jnp.linalg.eigh(matrix)
    return _from_spectrum(jnp.sqrt(jnp.maximum(values, 0)), vectors)


@psd_root.defjvp
def _psd_root_jvp(primals, tangents):
    # dS solves S dS + dS S = dA: in the eigenbasis of S an entrywise division.
    (matrix,), (dmatrix,) = primals, tangents
    values, vectors = jnp.linalg.eigh(matrix)
    roots = jnp.sqrt(jnp.maximum(values, 0))
    inner = vectors.mT @ dmatrix @ vectors
    inner = inner * _safe_reciprocal(roots[..., :, None] + roots[..., None, :])
    return _from_spectrum(roots, vectors), vectors @ inner @ vectors.mT


def _from_spectrum(values: Float[Array, "*batch n"], vectors: Float[Array, "*batch n n"]):
    return (vectors * values[..., None, :]) @ vectors.mT


def _safe_reciprocal(x: Array) -> Array:
    """1/x, and 0 where x = 0: the pseudo-inverse's choice."""
    nonzero = x != 0
    return jnp.where(nonzero, 1 / jnp.where(nonzero, x, 1), 0)


def safe_sqrt(x: Array) -> Array:
    """√x with derivative 0 instead of infinity at x = 0."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))


def squared_norm(x: Float[Array, "*batch m n"]) -> Float[Array, " *batch"]:
    """|x|_F² of each matrix. As an inner product it is summed in lanes, which in float32
    keeps a digit more than one running sum over all entries."""
    flat = x.reshape(*x.shape[:-2], -1)
    return jnp.vecdot(flat, flat)
